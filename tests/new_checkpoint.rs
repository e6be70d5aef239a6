//! The synthetic policy in a closed loop: a robot that tracks perfectly, at 30 Hz, a new plan every ten actions.

use std::path::Path;
use std::process::{Command, Output};

use pi0_mps::engine::cpu::{CpuCache, CpuDecoder, CpuEncoder, CpuEngine};
use pi0_mps::engine::{DecodeInput, Decoder, EncodeInput, Encoder, Engine, View};
use pi0_mps::model::synthetic::{self, MEAN_POSE};
use pi0_mps::model::{Checkpoint, Frame, Policy, PolicyOptions, Resampler};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rand_distr::StandardNormal;

const JOINTS: usize = 7;
const REPLAN: usize = 10;

struct Loop {
    policy: Policy,
    encoder: CpuEncoder,
    decoder: CpuDecoder,
    cache: CpuCache,
    rng: ChaCha8Rng,
}

impl Loop {
    fn new(dir: &Path) -> Self {
        let checkpoint = Checkpoint::open(dir).unwrap();
        let policy = Policy::open(&checkpoint, dir, &PolicyOptions::default()).unwrap();
        let engine = CpuEngine::load(&checkpoint, Resampler::from(checkpoint.origin()), 1).unwrap();
        let (encoder, decoder) = engine.stages().unwrap();
        let cache = engine.cache(2, policy.dims().max_tokens).unwrap();
        Self { policy, encoder, decoder, cache, rng: ChaCha8Rng::seed_from_u64(11) }
    }

    /// `[horizon, JOINTS]` in robot units, from fresh noise.
    fn plan(&mut self, frames: &[Frame; 2], prompt: &str, state: &[f64; JOINTS]) -> Vec<[f64; JOINTS]> {
        let dims = *self.policy.dims();
        let tokens = self.policy.tokens(prompt, state).unwrap();
        let views = frames.each_ref().map(View::Frame);
        self.encoder.encode(&EncodeInput { views: &views, tokens: &tokens }, &mut self.cache).unwrap();
        let mut normalised = vec![0.0; dims.state_dim];
        self.policy.normalize_state(state, &mut normalised).unwrap();
        let noise: Vec<f32> = (0..dims.horizon * dims.action_dim).map(|_| self.rng.sample(StandardNormal)).collect();
        let mut actions = vec![0.0; noise.len()];
        let input = DecodeInput { state: &normalised, noise: &noise, steps: 10, guidance: None };
        self.decoder.decode(&self.cache, &input, &mut actions).unwrap();
        let mut robot = vec![0.0; dims.horizon * JOINTS];
        self.policy.to_robot(&actions, state, &mut robot).unwrap();
        robot.as_chunks::<JOINTS>().0.to_vec()
    }
}

/// A picture with a blob where the arm is, and sensor noise.
fn picture(state: &[f64; JOINTS], hue: u8, rng: &mut impl Rng) -> Frame {
    let (width, height) = (160usize, 120usize);
    let (cx, cy) = (80.0 + 60.0 * state[0], 60.0 + 45.0 * state[1]);
    let mut data = Vec::with_capacity(width * height * 3);
    for y in 0..height {
        for x in 0..width {
            let near = (x as f64 - cx).hypot(y as f64 - cy) < 20.0;
            let grey = if near { 220 } else { 60 + (y / 2) as u8 };
            let grain: u8 = rng.random_range(0..8);
            data.extend([grey + grain, if near { hue } else { grey }, hue / 2 + grain]);
        }
    }
    Frame::new(width, height, width * 3, "rgb8", data).unwrap()
}

fn largest(a: &[f64; JOINTS], b: &[f64; JOINTS]) -> f64 {
    // The gripper is in metres.
    a.iter().zip(b).take(6).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max)
}

fn new_checkpoint(dir: &Path, more: &[&str]) -> Output {
    let base = ["new-checkpoint", "--preset", "tiny"];
    Command::new(env!("CARGO_BIN_EXE_pi0")).args(base).args(more).arg(dir).output().unwrap()
}

/// The value at quantile `q`.
fn quantile(values: &[f64], q: f64) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted[((sorted.len() - 1) as f64 * q) as usize]
}

fn moves_an_arm_smoothly(seed: u64) {
    const SECONDS: usize = 10;
    let folder = tempfile::tempdir().unwrap();
    synthetic::write(folder.path(), seed).unwrap();
    let mut policy = Loop::new(folder.path());
    let mut rng = ChaCha8Rng::seed_from_u64(5);
    let mut state = [0.0, -0.1, 1.65, 1.1, 0.0, 0.0, 0.02];
    // Largest joint difference: between actions in turn, and between a plan and its successor where they overlap.
    let (mut steps, mut seams) = (Vec::new(), Vec::new());
    let (mut low, mut high) = (state, state);
    let mut old: Option<Vec<[f64; JOINTS]>> = None;
    for _ in 0..SECONDS * 30 / REPLAN {
        let frames = [picture(&state, 40, &mut rng), picture(&state, 90, &mut rng)];
        let plan = policy.plan(&frames, "put the red cube into the mug", &state);
        if let Some(old) = &old {
            seams.extend((0..REPLAN).map(|i| largest(&plan[i], &old[i + REPLAN])));
        }
        steps.push(largest(&plan[0], &state));
        for i in 0..REPLAN {
            steps.push(largest(&plan[i + 1], &plan[i]));
            for k in 0..JOINTS {
                low[k] = low[k].min(plan[i + 1][k]);
                high[k] = high[k].max(plan[i + 1][k]);
            }
        }
        state = plan[REPLAN];
        old = Some(plan);
    }
    println!("seed {seed}: step p50 {:.4} max {:.4}", quantile(&steps, 0.5), quantile(&steps, 1.0));
    println!("  seam p50 {:.4} p99 {:.4}", quantile(&seams, 0.5), quantile(&seams, 0.99));
    println!("  low  {low:.3?}\n  high {high:.3?}");
    assert!(quantile(&steps, 1.0) <= 0.05);
    assert!(quantile(&seams, 0.99) <= 0.05);
    assert!((0..6).filter(|k| high[*k] - low[*k] > 0.2).count() >= 3);
    assert!((0..6).all(|k| low[k] > MEAN_POSE[k] - 1.2 && high[k] < MEAN_POSE[k] + 1.2));
    assert!(low[6] >= 0.0 && high[6] <= 0.035);
}

#[test]
fn seed_1_moves_an_arm_smoothly() {
    moves_an_arm_smoothly(1);
}

#[test]
fn seed_2_moves_an_arm_smoothly() {
    moves_an_arm_smoothly(2);
}

#[test]
fn images_and_prompt_bend_the_motion_and_noise_does_not() {
    let folder = tempfile::tempdir().unwrap();
    synthetic::write(folder.path(), 1).unwrap();
    let mut policy = Loop::new(folder.path());
    let state = [0.2, -0.1, 1.5, 1.1, 0.1, -0.2, 0.02];
    let mut rng = ChaCha8Rng::seed_from_u64(5);
    let frames = [picture(&state, 40, &mut rng), picture(&state, 90, &mut rng)];
    let other_frames = [picture(&[0.9; JOINTS], 200, &mut rng), picture(&state, 90, &mut rng)];
    let prompt = "put the red cube into the mug";
    let reference = policy.plan(&frames, prompt, &state);
    let mut distance = |frames: &[Frame; 2], prompt: &str, state: &[f64; JOINTS]| {
        let plan = policy.plan(frames, prompt, state);
        plan.iter().zip(&reference).map(|(a, b)| largest(a, b)).fold(0.0, f64::max)
    };
    let noise = distance(&frames, prompt, &state);
    let image = distance(&other_frames, prompt, &state);
    let words = distance(&frames, "open the drawer", &state);
    let moved = distance(&frames, prompt, &[0.3, -0.1, 1.5, 1.1, 0.1, -0.2, 0.02]);
    println!("noise {noise:.5}, image {image:.5}, prompt {words:.5}, state {moved:.5}");
    assert!(noise < 1e-3, "{noise}");
    assert!(image > 3.0 * noise && image < 0.1, "{image}");
    assert!(words > 3.0 * noise && words < 0.1, "{words}");
    assert!(moved > 0.05, "{moved}");
}

#[test]
fn the_tool_writes_the_same_bytes_again_and_spares_what_is_not_its_own() {
    let folder = tempfile::tempdir().unwrap();
    let (one, two) = (folder.path().join("one"), folder.path().join("two"));
    let read = |dir: &Path| {
        let mut files: Vec<_> = std::fs::read_dir(dir).unwrap().map(|e| e.unwrap().path()).collect();
        files.sort();
        files.into_iter().map(|p| (p.file_name().unwrap().to_owned(), std::fs::read(&p).unwrap())).collect::<Vec<_>>()
    };
    for dir in [&one, &two] {
        let done = new_checkpoint(dir, &["--seed", "3", "--json"]);
        assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
        let summary: serde_json::Value = serde_json::from_slice(&done.stdout).unwrap();
        assert_eq!(summary["seed"], 3);
    }
    assert!(read(&one) == read(&two));
    assert_eq!(read(&one).len(), 7, "nothing unfinished is left");

    assert!(new_checkpoint(&one, &["--seed", "4"]).status.success(), "an earlier one may be replaced");
    assert!(read(&one) != read(&two));

    let foreign = folder.path().join("foreign");
    std::fs::create_dir(&foreign).unwrap();
    std::fs::write(foreign.join("config.json"), "{}").unwrap();
    let refused = new_checkpoint(&foreign, &[]);
    assert_eq!(refused.status.code(), Some(2));
    let message = String::from_utf8_lossy(&refused.stderr);
    assert!(message.contains("not empty") && message.contains("--force"), "{message}");
    assert_eq!(std::fs::read(foreign.join("config.json")).unwrap(), b"{}");
    assert!(new_checkpoint(&foreign, &["--force"]).status.success());
    assert!(synthetic::is_synthetic(&foreign));

    let file = folder.path().join("file");
    std::fs::write(&file, "").unwrap();
    assert_eq!(new_checkpoint(&file, &[]).status.code(), Some(2));
}

#[test]
fn threads_do_not_change_a_bit() {
    let folder = tempfile::tempdir().unwrap();
    synthetic::write(folder.path(), 1).unwrap();
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    let dims = *checkpoint.dims();
    let frame = picture(&[0.1; JOINTS], 120, &mut ChaCha8Rng::seed_from_u64(3));
    let noise: Vec<f32> = (0..dims.horizon * dims.action_dim).map(|i| (i as f32 * 1.7).sin()).collect();
    let run = |threads| {
        let engine = CpuEngine::load(&checkpoint, Resampler::LeRobot, threads).unwrap();
        let (mut encoder, mut decoder) = engine.stages().unwrap();
        let mut cache = engine.cache(2, 40).unwrap();
        let input = EncodeInput { views: &[View::Frame(&frame); 2], tokens: &[2, 30, 40, 50] };
        let embeddings = encoder.encode_with_embeddings(&input, &mut cache).unwrap();
        let mut actions = vec![0.0; noise.len()];
        let input = DecodeInput { state: &[0.2; 32], noise: &noise, steps: 4, guidance: None };
        let velocities = decoder.decode_with_velocities(&cache, &input, &mut actions).unwrap();
        (embeddings, velocities, actions)
    };
    let one = run(1);
    assert!(one.2.iter().all(|v| v.is_finite()));
    for threads in [2, 5] {
        assert!(run(threads) == one, "{threads} threads");
    }
}
