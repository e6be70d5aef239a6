//! The CUDA engine against the published policies and the float32 oracle. Needs a GPU: `scripts/gpu-check`.
//!
//! Buffers are poisoned before each comparison, inputs are fresh, and planted faults must be noticed.

#[allow(dead_code)]
#[path = "common/golden.rs"]
mod golden;
#[allow(dead_code)]
#[path = "common/kernels.rs"]
mod kernels;
#[allow(dead_code)]
#[path = "common/seeded.rs"]
mod seeded;

use golden::{CASES, Golden, relative_l2};
use half::bf16;
use kernels::tuning;
use pi0_mps::engine::cpu::CpuEngine;
use pi0_mps::engine::cuda::{CudaCache, CudaDecoder, CudaEncoder, CudaEngine, Packing};
use pi0_mps::engine::{
    DecodeInput, Decoder, EncodeInput, Encoder, Engine, EngineError, Guidance, GuidanceSchedule, KvCache, View,
};
use pi0_mps::model::{Checkpoint, Dims, Encoding, Family, Frame, Preprocessor, Resampler};
use seeded::{PEAK, full_width, normals, write_checkpoint};

/// bf16 weights and activations against float32.
const TOLERANCE: f64 = 1e-2;
/// The worst velocity where attention is peaked: scores are large, and so is what bf16 queries and keys do to them.
const PEAKED_TOLERANCE: f64 = 1.5e-2;

const GUIDANCE_SCHEDULES: [GuidanceSchedule; 4] =
    [GuidanceSchedule::Linear, GuidanceSchedule::Exp, GuidanceSchedule::Ones, GuidanceSchedule::Zeros];

struct Gpu {
    encoder: CudaEncoder,
    decoder: CudaDecoder,
    cache: CudaCache,
}

impl Gpu {
    fn new(engine: &CudaEngine, views: usize, tokens: usize) -> Self {
        let (encoder, decoder) = engine.stages().unwrap();
        let mut cache = engine.cache(views, tokens).unwrap();
        cache.poison().unwrap();
        Self { encoder, decoder, cache }
    }

    fn golden(case: &Golden) -> Self {
        let checkpoint = Checkpoint::open(&case.dir).unwrap();
        let engine = kernels::load(&checkpoint, Resampler::from(checkpoint.origin()));
        println!("parity of {}", engine.describe());
        Self::new(&engine, case.views.len(), case.tokens.len())
    }

    fn poison(&mut self) {
        self.encoder.poison().unwrap();
        self.decoder.poison().unwrap();
        self.cache.poison().unwrap();
    }

    fn embeddings(&mut self, views: &[Vec<f32>], tokens: &[u32]) -> Vec<f32> {
        let views: Vec<View<'_>> = views.iter().map(|v| View::Planes(v)).collect();
        self.encoder.encode_with_embeddings(&EncodeInput { views: &views, tokens }, &mut self.cache).unwrap()
    }

    fn encode(&mut self, views: &[Vec<f32>], tokens: &[u32]) {
        let views: Vec<View<'_>> = views.iter().map(|v| View::Planes(v)).collect();
        self.encoder.encode(&EncodeInput { views: &views, tokens }, &mut self.cache).unwrap();
    }

    /// Velocities and actions.
    fn decode(&mut self, input: &DecodeInput<'_>) -> (Vec<f32>, Vec<f32>) {
        let mut actions = vec![f32::NAN; input.noise.len()];
        let velocities = self.decoder.decode_with_velocities(&self.cache, input, &mut actions).unwrap();
        (velocities, actions)
    }
}

fn plain<'a>(state: &'a [f32], noise: &'a [f32]) -> DecodeInput<'a> {
    DecodeInput { state, noise, steps: 10, guidance: None }
}

fn guided<'a>(state: &'a [f32], noise: &'a [f32], previous: &'a [f32]) -> DecodeInput<'a> {
    let schedule = GuidanceSchedule::Exp;
    let guidance = Guidance { previous, inference_delay: 4, execution_horizon: 30, max_weight: 10.0, schedule };
    DecodeInput { guidance: Some(guidance), ..plain(state, noise) }
}

#[test]
#[ignore = "needs a GPU"]
fn golden_cases_agree() {
    for name in CASES {
        let case = Golden::read(name);
        let mut gpu = Gpu::golden(&case);
        // The first run makes buffers and graphs, the second finds them poisoned.
        let first = gpu.embeddings(&case.views, &case.tokens);
        let before = gpu.decode(&plain(&case.state, &case.noise));
        gpu.poison();
        let embeddings = gpu.embeddings(&case.views, &case.tokens);
        let (velocities, actions) = gpu.decode(&plain(&case.state, &case.noise));
        let e = relative_l2(&embeddings, &case.prefix_embs);
        let v = relative_l2(&velocities, &case.velocities);
        let a = relative_l2(&actions, &case.actions);
        println!("parity {name}: embeddings {e:.1e}, velocities {v:.1e}, actions {a:.1e}");
        // How far velocities may be from float32 ones, tests/gpu_parity.rs works out.
        assert!(e <= TOLERANCE && a <= TOLERANCE, "{name}: {e} {a}");
        assert_eq!(first, embeddings, "{name}: embeddings of two runs");
        assert_eq!(before, (velocities, actions), "{name}: two runs");
    }
}

#[test]
#[ignore = "needs a GPU"]
fn every_guidance_schedule_agrees() {
    for name in CASES {
        let case = Golden::read(name);
        let Some(rtc) = &case.rtc else { continue };
        let mut gpu = Gpu::golden(&case);
        gpu.encode(&case.views, &case.tokens);
        for (schedule, expected) in GUIDANCE_SCHEDULES.into_iter().zip(&rtc.actions) {
            let guidance = Guidance {
                previous: &rtc.previous,
                inference_delay: rtc.inference_delay,
                execution_horizon: rtc.execution_horizon,
                max_weight: 10.0,
                schedule,
            };
            let (_, actions) = gpu.decode(&DecodeInput { guidance: Some(guidance), ..plain(&case.state, &case.noise) });
            let distance = relative_l2(&actions, expected);
            println!("parity {name} {schedule:?}: actions {distance:.1e}");
            assert!(distance <= TOLERANCE, "{name} {schedule:?}: {distance}");
        }
        // And without guidance again: nothing of it may stay behind.
        let (_, actions) = gpu.decode(&plain(&case.state, &case.noise));
        assert!(relative_l2(&actions, &case.actions) <= TOLERANCE);
    }
}

/// Both engines on one seeded checkpoint.
struct Pair {
    dir: tempfile::TempDir,
    dims: Dims,
    gpu: Gpu,
    views: Vec<Vec<f32>>,
    tokens: Vec<u32>,
    state: Vec<f32>,
    noise: Vec<f32>,
    embeddings: Vec<f32>,
    velocities: Vec<f32>,
    actions: Vec<f32>,
}

impl Pair {
    fn new(dims: Dims, views: usize, tokens: usize, seed: u64) -> Self {
        let dir = tempfile::tempdir().unwrap();
        write_checkpoint(dir.path(), &dims, seed, PEAK);
        let checkpoint = Checkpoint::open(dir.path()).unwrap();
        assert_eq!(*checkpoint.dims(), dims);
        let threads = std::thread::available_parallelism().map_or(1, |n| n.get());
        let oracle = CpuEngine::load(&checkpoint, Resampler::LeRobot, threads).unwrap();
        let engine = kernels::load(&checkpoint, Resampler::LeRobot);
        let side = dims.vision.image;
        let views: Vec<Vec<f32>> = (0..views as u64)
            .map(|v| normals(seed + 100 + v, 3 * side * side).iter().map(|x| (x * 0.5).clamp(-1.0, 1.0)).collect())
            .collect();
        let tokens: Vec<u32> = (0..tokens).map(|i| ((i * 7 + seed as usize) % dims.vocab) as u32).collect();
        let state = normals(seed + 200, dims.state_dim);
        let noise = normals(seed + 300, dims.horizon * dims.action_dim);

        let (mut encoder, mut decoder) = oracle.stages().unwrap();
        let mut cache = oracle.cache(views.len(), tokens.len()).unwrap();
        let planes: Vec<View<'_>> = views.iter().map(|v| View::Planes(v)).collect();
        let embeddings =
            encoder.encode_with_embeddings(&EncodeInput { views: &planes, tokens: &tokens }, &mut cache).unwrap();
        let mut actions = vec![f32::NAN; noise.len()];
        let velocities = decoder.decode_with_velocities(&cache, &plain(&state, &noise), &mut actions).unwrap();
        let gpu = Gpu::new(&engine, views.len(), tokens.len());
        Self { dir, dims, gpu, views, tokens, state, noise, embeddings, velocities, actions }
    }

    /// The same checkpoint once more, with the decoder on this path.
    fn on(&self, path: Packing) -> CudaEngine {
        let checkpoint = Checkpoint::open(self.dir.path()).unwrap();
        CudaEngine::load_for(path, &checkpoint, Resampler::LeRobot, 0).unwrap().tuned(tuning())
    }

    /// Worst distance of a step's velocity, and that of the actions.
    fn distances(&mut self) -> (f64, f64) {
        let (velocities, actions) = self.gpu.decode(&plain(&self.state, &self.noise));
        let steps = velocities.chunks_exact(self.noise.len()).zip(self.velocities.chunks_exact(self.noise.len()));
        let worst = steps.map(|(a, b)| relative_l2(a, b)).fold(0.0, |w, d| if d > w || d.is_nan() { d } else { w });
        (worst, relative_l2(&actions, &self.actions))
    }

    fn encode(&mut self) -> f64 {
        let embeddings = self.gpu.embeddings(&self.views, &self.tokens);
        relative_l2(&embeddings, &self.embeddings)
    }
}

#[test]
#[ignore = "needs a GPU"]
fn full_width_layers_agree_with_the_oracle_and_faults_are_noticed() {
    for (family, views, tokens, seed) in [(Family::Pi0, 2, 20, 11), (Family::Pi05, 1, 33, 12)] {
        let mut pair = Pair::new(full_width(family, 2), views, tokens, seed);
        pair.encode();
        pair.distances();
        pair.gpu.poison();
        let embeddings = pair.encode();
        let (velocities, actions) = pair.distances();
        println!(
            "parity {family:?} full width, 2 layers: embeddings {embeddings:.1e}, velocities {velocities:.1e}, actions {actions:.1e}"
        );
        assert!(embeddings <= TOLERANCE && velocities <= PEAKED_TOLERANCE && actions <= TOLERANCE);
        let sound = velocities;

        // Every position of the suffix one too low, and the last prompt token missing.
        let rows = pair.gpu.cache.len();
        pair.gpu.cache.set_rows(rows - 1);
        let (short, _) = pair.distances();
        pair.gpu.cache.set_rows(rows);
        pair.gpu.cache.drop_key(rows / 2).unwrap();
        let (dropped, _) = pair.distances();
        println!("faults {family:?}: sound {sound:.1e}, one row short {short:.1e}, one key dropped {dropped:.1e}");
        assert!(short > PEAKED_TOLERANCE, "a prefix one row short went unnoticed: {short}");
        assert!(dropped > 1.05 * sound, "a dropped key went unnoticed: {dropped}");

        pair.encode();
        let first = pair.gpu.decode(&plain(&pair.state, &pair.noise));
        for run in 0..200 {
            let again = pair.gpu.decode(&plain(&pair.state, &pair.noise));
            assert!(again == first, "run {run} differs");
        }
        println!(
            "bits {family:?}: 200 decodes of {} equal, {:?} blocks",
            pair.dims.expert.width,
            pair.gpu.decoder.blocks()
        );

        let previous = normals(seed + 400, pair.noise.len());
        let (_, steered) = pair.gpu.decode(&guided(&pair.state, &pair.noise, &previous));
        assert!(relative_l2(&steered, &first.1) > 0.1, "guidance changes nothing");

        // By launches: as near, with guidance too, and without dependent launch the same bits.
        let engine = pair.on(Packing::General);
        pair.gpu = Gpu::new(&engine, views, tokens);
        pair.encode();
        pair.gpu.decoder.poison().unwrap();
        let (velocities, actions) = pair.distances();
        println!("parity {family:?} full width, launches: velocities {velocities:.1e}, actions {actions:.1e}");
        assert!(velocities <= PEAKED_TOLERANCE && actions <= TOLERANCE && pair.gpu.decoder.blocks().is_none());
        let (_, actions) = pair.gpu.decode(&guided(&pair.state, &pair.noise, &previous));
        let distance = relative_l2(&steered, &actions);
        println!("parity {family:?} full width, guided: actions {distance:.1e} from those by launches");
        assert!(distance <= TOLERANCE);
        let dependent = pair.gpu.decode(&plain(&pair.state, &pair.noise));
        let mut serial = Gpu::new(&engine.tuned(tuning().dependent(false)), views, tokens);
        serial.encode(&pair.views, &pair.tokens);
        let alone = serial.decode(&plain(&pair.state, &pair.noise));
        assert_eq!(dependent, alone, "dependent launch changes results");
    }
}

/// Few blocks, many, and blocks that sleep at random: the same bits.
#[test]
#[ignore = "needs a GPU"]
fn the_persistent_decoder_depends_on_neither_blocks_nor_timing() {
    // 51 token rows are the most: 50 actions and the state, or 51 actions.
    for (family, horizon, layers, steps, views) in
        [(Family::Pi0, 50, 4, 10, 2), (Family::Pi05, 51, 2, 3, 5), (Family::Pi0, 50, 2, 3, 1)]
    {
        let mut dims = full_width(family, layers);
        dims.horizon = horizon;
        dims.vision.layers = 1;
        dims.trunk.mlp = 2048;
        if kernels::portable() {
            return;
        }
        let Ok(mut engine) = CudaEngine::random_for(Packing::Published, &dims, Resampler::LeRobot, 0, 41) else {
            println!("bits: no persistent decoder on this GPU");
            return;
        };
        let planes: Vec<Vec<f32>> = (0..views).map(|v| normals(42 + v, 3 * 224 * 224)).collect();
        let (state, noise) = (normals(44, 32), normals(45, horizon * 32));
        let input = DecodeInput { steps, ..plain(&state, &noise) };
        let mut expected = None;
        let (mut runs, mut sizes) = (0, Vec::new());
        for (clusters, delay, times) in [
            (99, 0, 50),
            (25, 0, 50),
            (16, 0, 50),
            (12, 0, 50),
            (11, 0, 50),
            (6, 0, 30),
            (1, 0, 5),
            (99, 3_000, 400),
            (19, 10_000, 300),
            (12, 3_000, 300),
            (11, 2_000, 300),
        ] {
            engine = engine.tuned(tuning().clusters(clusters).delay(delay));
            let mut gpu = Gpu::new(&engine, planes.len(), 20);
            sizes.push(gpu.decoder.blocks().unwrap());
            gpu.encode(&planes, &(2..22).collect::<Vec<u32>>());
            for run in 0..times {
                if run % 10 == 0 {
                    gpu.decoder.poison().unwrap();
                }
                let got = gpu.decode(&input);
                assert!(got.0.iter().all(|v| v.is_finite()), "{clusters} clusters, run {run}: not finite");
                assert!(
                    *expected.get_or_insert_with(|| got.clone()) == got,
                    "{clusters} clusters, delay {delay}, run {run} differs"
                );
                runs += 1;
            }
        }
        println!("bits {family:?}: {runs} decodes equal over {sizes:?} blocks, 1300 of them with random delays");
    }
}

#[test]
#[ignore = "needs a GPU"]
fn horizons_steps_and_prefixes_of_other_sizes_agree() {
    for (horizon, views, tokens, seed) in
        [(10, 1, 1, 21), (16, 3, 48, 22), (30, 1, 7, 23), (51, 2, 20, 25), (63, 1, 20, 24)]
    {
        let mut dims = full_width(Family::Pi0, 1);
        dims.horizon = horizon;
        dims.trunk.mlp = 2048;
        let mut pair = Pair::new(dims, views, tokens, seed);
        pair.encode();
        let (velocities, actions) = pair.distances();
        println!(
            "parity horizon {horizon}, {views} views, {tokens} tokens: velocities {velocities:.1e}, actions {actions:.1e}"
        );
        assert!(velocities <= PEAKED_TOLERANCE && actions <= TOLERANCE);
    }
}

#[test]
#[ignore = "needs a GPU"]
fn shapes_may_change_from_call_to_call() {
    let case = Golden::read("pi0_tiny");
    let checkpoint = Checkpoint::open(&case.dir).unwrap();
    let engine = kernels::load(&checkpoint, Resampler::LeRobot);
    let mut gpu = Gpu::new(&engine, case.views.len(), case.tokens.len());
    gpu.encode(&case.views, &case.tokens);
    let whole = gpu.decode(&plain(&case.state, &case.noise));
    for _ in 0..3 {
        gpu.encode(&case.views[..1], &case.tokens[..2]);
        let part = gpu.decode(&plain(&case.state, &case.noise));
        assert_ne!(part, whole);
        // Another slot, then the first again: graphs hold no cache address.
        let mut other = engine.cache(case.views.len(), case.tokens.len()).unwrap();
        std::mem::swap(&mut gpu.cache, &mut other);
        gpu.encode(&case.views, &case.tokens);
        assert!(gpu.decode(&plain(&case.state, &case.noise)) == whole, "another slot");
        std::mem::swap(&mut gpu.cache, &mut other);
        assert!(gpu.decode(&plain(&case.state, &case.noise)) == part, "the first slot again");
        let few = gpu.decode(&DecodeInput { steps: 4, ..plain(&case.state, &case.noise) });
        assert_eq!(few.0.len(), 4 * case.noise.len());
    }
}

#[test]
#[ignore = "needs a GPU"]
fn prompts_of_any_length_are_encoded_without_measuring_and_the_same_by_a_graph() {
    const MOST: usize = 48;
    let dims = full_width(Family::Pi0, 2);
    let engine = kernels::random(&dims, Resampler::OpenPi, 11);
    let mut gpu = Gpu::new(&engine, 2, MOST);
    let views: Vec<_> = (0..2).map(|v| normals(v, 3 * dims.vision.image * dims.vision.image)).collect();
    let prompt = |len: usize| -> Vec<u32> { (0..len).map(|t| ((t * 7 + len) % dims.vocab) as u32).collect() };
    gpu.encoder.prepare(2, 20, MOST, true).unwrap();
    gpu.encode(&views, &prompt(20));
    let measured = engine.measured();
    assert!(measured > 0);
    for len in (1..=MOST).rev() {
        // Kernel by kernel at first, then by a graph.
        let [first, second] = [(); 2].map(|()| {
            gpu.poison();
            gpu.encode(&views, &prompt(len));
            gpu.cache.layer(1).unwrap()
        });
        assert!(first.iter().flatten().all(|x| x.is_finite()), "{len} tokens");
        assert!(first == second, "{len} tokens");
    }
    assert_eq!(engine.measured(), measured, "a frame waited until algorithms were timed");
}

#[test]
#[ignore = "needs a GPU"]
fn frames_become_the_patches_of_the_reference() {
    let dims = {
        let mut d = full_width(Family::Pi0, 1);
        d.trunk.mlp = 1024;
        d
    };
    let (side, patch) = (dims.vision.image, dims.vision.patch);
    for resampler in [Resampler::OpenPi, Resampler::LeRobot] {
        let engine = kernels::random(&dims, resampler, 5);
        let mut gpu = Gpu::new(&engine, 1, 1);
        for (w, h) in [(640, 480), (1280, 720), (224, 224), (301, 517), (100, 80)] {
            for (encoding, name) in Encoding::ALL {
                let step = w * encoding.bytes_per_pixel() + 13;
                let bytes: Vec<u8> =
                    normals((w * h) as u64, step * h).iter().map(|x| (128.0 + 60.0 * x) as u8).collect();
                let frame = Frame::new(w, h, step, name, bytes).unwrap();
                let mut planes = vec![0.0; 3 * side * side];
                Preprocessor::new(side, resampler).planes(&frame, &mut planes).unwrap();
                gpu.encoder
                    .encode(&EncodeInput { views: &[View::Frame(&frame)], tokens: &[1] }, &mut gpu.cache)
                    .unwrap();
                let (patches, stride) = gpu.encoder.patches(1).unwrap();
                let mut worst = 0.0f32;
                for (i, expected) in planes.iter().enumerate() {
                    let (c, y, x) = (i / (side * side), i / side % side, i % side);
                    let token = y / patch * (side / patch) + x / patch;
                    let at = token * stride + (c * patch + y % patch) * patch + x % patch;
                    let (ours, theirs) = (bf16::from_bits(patches[at]).to_f32(), bf16::from_f32(*expected).to_f32());
                    worst = worst.max((ours - theirs).abs());
                }
                // Bytes are equal; without antialiasing the last bit of a bf16 near one may differ.
                let allowed = if resampler == Resampler::OpenPi { 0.0 } else { 0.0079 };
                assert!(worst <= allowed, "{resampler:?} {w}x{h} {name}: {worst}");
            }
        }
    }
}

/// Rows of `w` pixels `step` bytes apart, the last one without padding, of values that depend on `seed`.
fn random_frame(seed: u64, (w, h): (usize, usize), padding: usize, encoding: Encoding, name: &str) -> Frame {
    let row = w * encoding.bytes_per_pixel();
    let step = row + padding;
    let bytes = normals(seed, step * (h - 1) + row).iter().map(|x| (128.0 + 60.0 * x) as u8).collect();
    Frame::new(w, h, step, name, bytes).unwrap()
}

/// The patches and the whole cache of an observation, each bit of them.
fn bits_of(gpu: &mut Gpu, layers: usize, frames: &[Frame], tokens: &[u32]) -> (Vec<u16>, Vec<[Vec<f32>; 2]>) {
    gpu.poison();
    let views: Vec<_> = frames.iter().map(View::Frame).collect();
    gpu.encoder.encode(&EncodeInput { views: &views, tokens }, &mut gpu.cache).unwrap();
    let (patches, _) = gpu.encoder.patches(frames.len()).unwrap();
    (patches, (0..layers).map(|l| gpu.cache.layer(l).unwrap()).collect())
}

#[test]
#[ignore = "needs a GPU"]
fn frames_encode_to_the_same_bits_from_page_locked_memory() {
    const LAYERS: usize = 2;
    let mut dims = full_width(Family::Pi0, LAYERS);
    dims.trunk.mlp = 1024;
    for resampler in [Resampler::OpenPi, Resampler::LeRobot] {
        let engine = kernels::random(&dims, resampler, 5);
        let memory = engine.frame_memory().unwrap();
        let mut gpu = Gpu::new(&engine, 3, 4);
        let mut seen = Vec::new();
        // The frames of one round go before the next: their memory is used again.
        for (round, padding) in [0, 0, 13, 1, 64].into_iter().enumerate() {
            let sizes = [(640, 480), (224, 224), (301, 517)];
            let (on_the_heap, locked): (Vec<_>, Vec<_>) =
                (sizes.into_iter().zip(Encoding::ALL.into_iter().skip(round % 3)))
                    .zip(10 * round as u64..)
                    .map(|((size, (encoding, name)), seed)| {
                        let frame = random_frame(seed, size, padding, encoding, name);
                        let locked = frame.clone().kept_in(Some(&*memory));
                        assert!(locked.pixels().held_by::<Vec<u8>>().is_none() && locked == frame);
                        (frame, locked)
                    })
                    .unzip();
            // Another prompt each time: its upload goes behind the images.
            let tokens = [1, 2, 3, round as u32 + 4];
            let expected = bits_of(&mut gpu, LAYERS, &on_the_heap, &tokens);
            assert!(bits_of(&mut gpu, LAYERS, &locked, &tokens) == expected, "{resampler:?}, round {round}");
            let mixed = [locked[0].clone(), on_the_heap[1].clone(), locked[2].clone()];
            assert!(bits_of(&mut gpu, LAYERS, &mixed, &tokens) == expected, "{resampler:?}, round {round}, mixed");
            // One after the other, and on an encoder that knows neither sizes nor prompt.
            let mut fresh = Gpu::new(&engine, 3, 4);
            assert!(bits_of(&mut fresh, LAYERS, &locked, &tokens) == expected, "{resampler:?}, round {round}, fresh");
            assert!(!seen.contains(&expected), "other frames, other bits");
            seen.push(expected);
        }
    }
}

#[test]
#[ignore = "needs a GPU"]
fn frames_that_come_while_others_are_encoded_keep_their_bits() {
    const CAMERAS: u64 = 4;
    let mut dims = full_width(Family::Pi0, 1);
    dims.trunk.mlp = 1024;
    let engine = kernels::random(&dims, Resampler::OpenPi, 5);
    let memory = engine.frame_memory().unwrap();
    let mut gpu = Gpu::new(&engine, 1, 1);
    let frame = |camera| random_frame(camera, (1920, 1080), 0, Encoding::Rgb8, "rgb8");
    let expected: Vec<_> = (0..CAMERAS).map(|c| bits_of(&mut gpu, 1, &[frame(c)], &[1]).0).collect();
    let (sender, frames) = std::sync::mpsc::sync_channel(1);
    std::thread::scope(|scope| {
        // Goes when an assertion fails: the cameras end with it.
        let frames = frames;
        for camera in 0..CAMERAS {
            let (sender, memory, frame) = (sender.clone(), &*memory, frame(camera));
            scope.spawn(move || {
                let come = || (camera, frame.clone().kept_in(Some(memory)));
                for _ in (0..50).take_while(|_| sender.send(come()).is_ok()) {}
            });
        }
        drop(sender);
        // The memory of each, which its encode uploads from, is filled anew as soon as it has gone.
        let mut seen = 0;
        for (camera, frame) in &frames {
            seen += 1;
            assert!(frame.pixels().held_by::<Vec<u8>>().is_none());
            let input = EncodeInput { views: &[View::Frame(&frame)], tokens: &[1] };
            gpu.encoder.encode(&input, &mut gpu.cache).unwrap();
            drop(frame);
            assert!(gpu.encoder.patches(1).unwrap().0 == expected[camera as usize], "frame {seen} of {camera}");
        }
        assert_eq!(seen, 50 * CAMERAS);
    });
}

#[test]
#[ignore = "needs a GPU"]
fn more_frame_sizes_than_are_kept_are_still_each_resized_right() {
    const LAYERS: usize = 1;
    let mut dims = full_width(Family::Pi0, LAYERS);
    dims.trunk.mlp = 1024;
    let engine = kernels::random(&dims, Resampler::OpenPi, 5);
    let memory = engine.frame_memory();
    let frame = |i: u64| {
        let size = (200 + 31 * i as usize, 300 - 17 * i as usize);
        random_frame(i, size, 0, Encoding::Rgb8, "rgb8").kept_in(memory.as_deref())
    };
    let mut gpu = Gpu::new(&engine, 8, 1);
    let alone: Vec<_> = (0..12).map(|i| bits_of(&mut gpu, LAYERS, &[frame(i)], &[1]).0).collect();
    // Of the sizes kept now one is used again and seven are pushed out, and so on.
    for first in [4, 0, 3, 11, 5] {
        let chosen: Vec<u64> = (0..8).map(|k| (first + k * 5) % 12).collect();
        let frames: Vec<_> = chosen.iter().map(|i| frame(*i)).collect();
        let (patches, _) = bits_of(&mut gpu, LAYERS, &frames, &[1]);
        for (i, found) in chosen.iter().zip(patches.chunks(patches.len() / 8)) {
            assert!(found == alone[*i as usize], "size {i} among {chosen:?}");
        }
    }
}

#[test]
#[ignore = "needs a GPU"]
fn frames_outlive_their_engine_and_go_on_any_thread() {
    let mut dims = full_width(Family::Pi0, 1);
    dims.trunk.mlp = 1024;
    let engine = kernels::random(&dims, Resampler::OpenPi, 5);
    let memory = engine.frame_memory().unwrap();
    let frame = random_frame(1, (640, 480), 0, Encoding::Rgb8, "rgb8");
    let kept = frame.clone().kept_in(Some(&*memory));
    let clones: Vec<_> = (0..4).map(|_| kept.clone()).collect();
    drop((engine, memory));
    assert!(kept == frame);
    std::thread::scope(|scope| clones.into_iter().for_each(|c| drop(scope.spawn(move || drop(c)))));
    assert!(kept == frame);
    std::thread::spawn(move || drop(kept)).join().unwrap();
    // The last one has taken the device along; a new one works.
    let engine = kernels::random(&dims, Resampler::OpenPi, 5);
    let again = frame.clone().kept_in(engine.frame_memory().as_deref());
    assert!(again == frame && again.pixels().held_by::<Vec<u8>>().is_none());
    let (mut gpu, frames) = (Gpu::new(&engine, 1, 1), [again]);
    let expected = bits_of(&mut gpu, 1, &[frame], &[1]);
    assert!(bits_of(&mut gpu, 1, &frames, &[1]) == expected);
}

#[test]
#[ignore = "needs a GPU"]
fn wrong_input_is_refused_by_name() {
    let case = Golden::read("pi0_tiny");
    let checkpoint = Checkpoint::open(&case.dir).unwrap();
    let engine = kernels::load(&checkpoint, Resampler::LeRobot);
    let mut gpu = Gpu::new(&engine, 1, 4);
    let mut actions = vec![0.0; case.noise.len()];
    let e = gpu.decoder.decode(&gpu.cache, &plain(&case.state, &case.noise), &mut actions).unwrap_err();
    assert!(e.to_string().contains("an encoded prefix"), "{e}");
    let planes = View::Planes(&case.views[0]);
    for (views, tokens, says) in [
        (vec![], vec![1], "views"),
        (vec![planes], vec![], "prompt tokens"),
        (vec![planes], vec![99], "vocabulary"),
        (vec![planes, planes], vec![1], "cache slot"),
        (vec![View::Planes(&case.views[0][1..])], vec![1], "image planes"),
    ] {
        let e = gpu.encoder.encode(&EncodeInput { views: &views, tokens: &tokens }, &mut gpu.cache).unwrap_err();
        assert!(e.to_string().contains(says), "{e}");
        assert_eq!(gpu.cache.len(), 0);
    }
    assert!(matches!(CudaEngine::load(&checkpoint, Resampler::LeRobot, 99), Err(EngineError::Unavailable { .. })));
    gpu.encode(&case.views[..1], &case.tokens[..3]);
    let e = gpu.decoder.decode(&gpu.cache, &plain(&case.state, &case.noise[1..]), &mut actions).unwrap_err();
    assert!(e.to_string().contains("noise"), "{e}");
}
