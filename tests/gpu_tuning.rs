//! Times of the two stages at full size on random weights: over the decoder's knobs, on shares, for prompts of other
//! lengths. Prints tables, asserts nothing about speed. Needs a GPU: `scripts/gpu-check`.

#[allow(dead_code)]
#[path = "common/kernels.rs"]
mod kernels;
#[allow(dead_code)]
#[path = "common/seeded.rs"]
mod seeded;

use std::sync::atomic::{AtomicBool, Ordering};

use kernels::{portable, tuning};
use pi0_mps::engine::cuda::{CudaCache, CudaEncoder, CudaEngine, Packing, Stage, Tuning};
use pi0_mps::engine::partition::{Backend, Split};
use pi0_mps::engine::{DecodeInput, Decoder, EncodeInput, Encoder, Engine, View};
use pi0_mps::model::{Dims, Family, Frame, Resampler};
use seeded::{full_width, normals};

fn median(mut v: Vec<f32>) -> (f32, f32, f32) {
    v.sort_by(f32::total_cmp);
    (v[v.len() / 2], v[v.len() / 20], v[v.len() * 95 / 100])
}

fn dims() -> Dims {
    let mut dims = full_width(Family::Pi0, 18);
    dims.vision.layers = 27;
    dims.vocab = 257_152;
    dims
}

/// The full-size engine, and the library's log where RUST_LOG asks for it.
fn engine(path: Option<Packing>) -> CudaEngine {
    let filter = tracing_subscriber::EnvFilter::from_default_env();
    let _ = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stdout).try_init();
    let start = std::time::Instant::now();
    let engine = match path {
        None => kernels::random(&dims(), Resampler::OpenPi, 1),
        Some(path) => CudaEngine::random_for(path, &dims(), Resampler::OpenPi, 0, 1).unwrap(),
    };
    println!("{} loaded in {:.1} s", engine.describe(), start.elapsed().as_secs_f32());
    engine
}

fn frame() -> Frame {
    let bytes: Vec<u8> = normals(3, 640 * 480 * 3).iter().map(|x| (128.0 + 60.0 * x) as u8).collect();
    Frame::new(640, 480, 640 * 3, "rgb8", bytes).unwrap()
}

fn tokens() -> Vec<u32> {
    (2..22).collect()
}

#[test]
#[ignore = "needs a GPU"]
fn encode_times() {
    let engine = engine(None);
    let (frame, tokens) = (frame(), tokens());
    let mut cache = engine.cache(3, 48).unwrap();
    let (mut encoder, _) = engine.stages().unwrap();
    for views in [2, 1, 3] {
        let views = vec![View::Frame(&frame); views];
        let mut parts: [Vec<f32>; 4] = Default::default();
        for run in 0..60 {
            let start = std::time::Instant::now();
            encoder.encode(&EncodeInput { views: &views, tokens: &tokens }, &mut cache).unwrap();
            let host = start.elapsed().as_secs_f32() * 1e3;
            if run == 0 {
                println!("first encode of {} views: {host:.0} ms", views.len());
            }
            let t = encoder.last_times().unwrap();
            if run >= 10 {
                for (p, v) in parts.iter_mut().zip([host, t.images, t.vision, t.trunk]) {
                    p.push(v);
                }
            }
        }
        let [host, images, vision, trunk] = parts.map(|p| median(p).0);
        println!(
            "encode {} views: host {host:.3} ms; images {images:.3}, vision {vision:.3}, trunk {trunk:.3}",
            views.len()
        );
    }
}

/// Each stage on its share, alone and beside the other one, GPU times: what a share is worth, by backend.
#[test]
#[ignore = "needs a GPU"]
fn share_times() {
    let engine = engine(None);
    let (frame, tokens) = (frame().kept_in(engine.frame_memory().as_deref()), tokens());
    let views = [View::Frame(&frame), View::Frame(&frame)];
    let (state, noise) = (normals(4, 32), normals(5, 50 * 32));
    for backend in [Backend::Green, Backend::Mps] {
        for percent in [50, 58, 63, 70] {
            let split = Split { backend, encoder: percent, decoder: 100 - percent };
            let Ok(decision) = engine.offer().unwrap().decide(split) else { continue };
            let (mut encoder, mut decoder) = engine.stages_on(decision.grant).unwrap();
            encoder.prepare(2, tokens.len(), tokens.len(), true).unwrap();
            let mut caches = [(); 2].map(|()| engine.cache(2, 48).unwrap());
            let mut encode = |cache: &mut CudaCache| {
                let start = std::time::Instant::now();
                encoder.encode(&EncodeInput { views: &views, tokens: &tokens }, cache).unwrap();
                let host = start.elapsed().as_secs_f32() * 1e3;
                let t = encoder.last_times().unwrap();
                [host, t.images, t.vision, t.trunk]
            };
            let mut actions = vec![0.0; noise.len()];
            let input = DecodeInput { state: &state, noise: &noise, steps: 10, guidance: None };
            let mut decode = |cache: &CudaCache| {
                decoder.decode(cache, &input, &mut actions).unwrap();
                decoder.last_ms().unwrap()
            };
            caches.iter_mut().for_each(|cache| _ = encode(cache));
            let of = |times: Vec<[f32; 4]>| [0, 1, 2, 3].map(|part| median(times.iter().map(|t| t[part]).collect()).0);
            let [filling, filled] = &mut caches;
            let alone = of((0..30).map(|_| encode(filling)).collect());
            let decoded = median((0..30).map(|_| decode(filled)).collect()).0;
            let stop = AtomicBool::new(false);
            let (beside, decoded_beside) = std::thread::scope(|scope| {
                let decoding = scope.spawn(|| {
                    let mut times = Vec::new();
                    // Also where the encoder fails and nobody says stop.
                    while !stop.load(Ordering::Relaxed) && times.len() < 1000 {
                        times.push(decode(filled));
                    }
                    median(times).0
                });
                let times = of((0..60).map(|_| encode(filling)).collect());
                stop.store(true, Ordering::Relaxed);
                (times, decoding.join().unwrap())
            });
            println!(
                "{}: encode, of it images, vision, trunk {alone:.2?} ms, beside the decoder {beside:.2?}; decode {decoded:.2}, beside the encoder {decoded_beside:.2}",
                decision.grant
            );
        }
    }
}

/// What a prompt of another length costs the first time, and after that.
#[test]
#[ignore = "needs a GPU"]
fn prompt_times() {
    let engine = engine(None);
    let frame = frame();
    let views = [View::Frame(&frame), View::Frame(&frame)];
    let mut cache = engine.cache(3, 48).unwrap();
    let (mut encoder, _) = engine.stages().unwrap();
    let mut encode = |encoder: &mut CudaEncoder, len: u32| {
        let tokens: Vec<u32> = (2..2 + len).collect();
        let start = std::time::Instant::now();
        encoder.encode(&EncodeInput { views: &views, tokens: &tokens }, &mut cache).unwrap();
        start.elapsed().as_secs_f32() * 1e3
    };
    let start = std::time::Instant::now();
    encoder.prepare(2, 20, 48, true).unwrap();
    println!("prompts of 1 to 48 tokens prepared in {:.0} ms", start.elapsed().as_secs_f32() * 1e3);
    encode(&mut encoder, 20);
    for len in [20, 21, 22, 23, 24, 32, 33, 34, 40, 48, 12, 1] {
        let first = encode(&mut encoder, len);
        let (mid, low, high) = median((0..60).map(|_| encode(&mut encoder, len)).collect());
        println!("encode {len} tokens: at first {first:.2} ms, then {mid:.2} ({low:.2} to {high:.2})");
    }
}

/// Times decoders of one engine over the same prefix.
struct Timed {
    engine: Option<CudaEngine>,
    cache: CudaCache,
    state: Vec<f32>,
    noise: Vec<f32>,
    base: Option<Vec<f32>>,
}

impl Timed {
    fn new(path: Option<Packing>) -> Self {
        let engine = engine(path);
        let (frame, tokens) = (frame(), tokens());
        let mut cache = engine.cache(3, 48).unwrap();
        let (mut encoder, _) = engine.stages().unwrap();
        let views = [View::Frame(&frame), View::Frame(&frame)];
        encoder.encode(&EncodeInput { views: &views, tokens: &tokens }, &mut cache).unwrap();
        drop(encoder);
        Self { engine: Some(engine), cache, state: normals(4, 32), noise: normals(5, 50 * 32), base: None }
    }

    /// `same`: must give what the first of them gave, to the bit.
    fn time(&mut self, label: String, tuning: Tuning, same: bool) {
        let engine = self.engine.take().unwrap().tuned(tuning);
        let (_, mut decoder) = engine.stages().unwrap();
        self.engine = Some(engine);
        let mut actions = vec![0.0; self.noise.len()];
        let input = DecodeInput { state: &self.state, noise: &self.noise, steps: 10, guidance: None };
        let mut times = Vec::new();
        for run in 0..120 {
            decoder.decode(&self.cache, &input, &mut actions).unwrap();
            if run >= 20 {
                times.push(decoder.last_ms().unwrap());
            }
        }
        let (mid, low, high) = median(times);
        println!("decode {label}: {mid:.3} ms ({low:.3} to {high:.3}), {:?} blocks", decoder.blocks());
        if same {
            assert!(actions.iter().all(|a| a.is_finite()));
            assert!(*self.base.get_or_insert_with(|| actions.clone()) == actions, "the result changed");
        }
    }
}

#[test]
#[ignore = "needs a GPU"]
fn decode_times() {
    let mut timed = Timed::new(None);
    timed.time("default".into(), tuning(), true);
    if portable() {
        return;
    }
    for clusters in [32, 31, 24, 16, 12, 11, 10, 8, 6, 4] {
        timed.time(format!("on at most {clusters} clusters"), Tuning::default().clusters(clusters), true);
    }
}

#[test]
#[ignore = "needs a GPU"]
fn launch_times() {
    use Stage::{Attention, Down, GateUp, Out, Qkv};
    let mut timed = Timed::new(Some(Packing::General));
    let prefetches: [&[(Stage, Stage)]; 2] =
        [&[(Attention, GateUp)], &[(Qkv, Out), (Attention, GateUp), (Out, Down), (GateUp, Qkv)]];
    let slices = [[512, 256, 512, 512], [512, 512, 512, 512], [256, 256, 1024, 512]];
    let exclusives: [&[Stage]; 3] = [&[], &[Attention, Down], &[Qkv, Attention, Out, GateUp, Down]];
    timed.time("by launches".into(), tuning(), true);
    for stage in [Qkv, Attention, Out, GateUp, Down] {
        timed.time(format!("{stage:?} twice"), tuning().twice(stage), false);
    }
    // The portable kernels know of no other knob.
    if portable() {
        return;
    }
    timed.time("without dependent launch".into(), Tuning::default().dependent(false), true);
    for prefetch in prefetches {
        timed.time(format!("prefetch {prefetch:?}"), Tuning::default().prefetch(prefetch), true);
    }
    for stages in exclusives {
        timed.time(format!("exclusive {stages:?}"), Tuning::default().exclusive(stages), true);
    }
    for slices in slices {
        timed.time(format!("slices {slices:?}"), Tuning::default().slices(slices), false);
    }
}
