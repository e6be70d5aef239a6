//! Encoder and decoder on two shares of one GPU: the same chunks whatever the share, and shares that change under a
//! running node. Needs a GPU: `scripts/gpu-check`.
//!
//! `PI0_FRAMES` (500) and `PI0_SECONDS` (60) say how long. With an MPS daemon the `mps` backend is tested too.

#[allow(dead_code)]
#[path = "common/kernels.rs"]
mod kernels;
#[allow(dead_code)]
#[path = "common/seeded.rs"]
mod seeded;

use std::sync::Arc;
use std::sync::mpsc::{Sender, channel, sync_channel};
use std::time::{Duration, Instant};

use pi0_mps::clock::Clock;
use pi0_mps::control::{ActionChunk, Window};
use pi0_mps::engine::cuda::{CudaCache, CudaDecoder, CudaEncoder, CudaEngine, Gpu};
use pi0_mps::engine::partition::{Backend, Decision, Split};
use pi0_mps::engine::{DecodeInput, Decoder, EncodeInput, Encoder, Engine, KvCache, View};
use pi0_mps::model::synthetic::{self, JOINT_NAMES, MEAN_POSE};
use pi0_mps::model::{Family, Frame, Resampler};
use pi0_mps::node::{Node, Outputs};
use pi0_mps::params::{Params, Value, yaml};
use pi0_mps::rt::SystemClock;
use seeded::{full_width, normals};

fn from_env(name: &str, default: usize) -> usize {
    std::env::var(name).ok().and_then(|v| v.parse().ok()).unwrap_or(default)
}

/// Observations that differ in image, prompt length, state and noise.
struct Script {
    frames: Vec<Frame>,
    states: Vec<Vec<f32>>,
    noise: Vec<Vec<f32>>,
}

const VIEWS: usize = 2;
const TOKENS: usize = 20;

impl Script {
    fn new() -> Self {
        let frame = |seed: u64| {
            let bytes: Vec<u8> = normals(seed, 224 * 224 * 3).iter().map(|x| (128.0 + 60.0 * x) as u8).collect();
            Frame::new(224, 224, 224 * 3, "rgb8", bytes).unwrap()
        };
        Self {
            frames: (0..8).map(frame).collect(),
            states: (0..7).map(|i| normals(100 + i, 32)).collect(),
            noise: (0..5).map(|i| normals(200 + i, 50 * 32)).collect(),
        }
    }

    fn encode(&self, i: usize, encoder: &mut CudaEncoder, cache: &mut CudaCache) {
        let views = [View::Frame(&self.frames[i % 8]), View::Frame(&self.frames[(i / 8) % 8])];
        let tokens: Vec<u32> = (0..TOKENS - i % 2).map(|t| ((t * 7 + i) % 64) as u32).collect();
        cache.poison().unwrap();
        encoder.encode(&EncodeInput { views: &views, tokens: &tokens }, cache).unwrap();
    }

    /// Two decodes of one cache, as in dual-rate mode; a digest of all their bits.
    fn decode(&self, i: usize, decoder: &mut CudaDecoder, cache: &CudaCache) -> u64 {
        let mut digest = 0xcbf2_9ce4_8422_2325u64;
        let mut actions = vec![f32::NAN; 50 * 32];
        for state in [i, i + 3] {
            let (state, noise) = (&self.states[state % 7], &self.noise[i % 5]);
            decoder.decode(cache, &DecodeInput { state, noise, steps: 10, guidance: None }, &mut actions).unwrap();
            for a in &actions {
                assert!(a.is_finite(), "observation {i}");
                digest = (digest ^ u64::from(a.to_bits())).wrapping_mul(0x0000_0100_0000_01b3);
            }
        }
        digest
    }

    /// Digests of the first `frames` observations, encoded and decoded at the same time.
    fn overlapped(&self, engine: &CudaEngine, stages: (CudaEncoder, CudaDecoder), frames: usize) -> (Vec<u64>, f64) {
        let (mut encoder, mut decoder) = stages;
        encoder.prepare(VIEWS, TOKENS, TOKENS, true).unwrap();
        let (filled, to_decode) = sync_channel::<CudaCache>(3);
        let (free, to_fill) = channel();
        (0..3).for_each(|_| free.send(engine.cache(VIEWS, TOKENS).unwrap()).unwrap());
        let start = Instant::now();
        let digests = std::thread::scope(|scope| {
            scope.spawn(move || {
                for i in 0..frames {
                    let mut cache = to_fill.recv().unwrap();
                    self.encode(i, &mut encoder, &mut cache);
                    filled.send(cache).unwrap();
                }
            });
            (0..frames)
                .map(|i| {
                    let cache = to_decode.recv().unwrap();
                    let digest = self.decode(i, &mut decoder, &cache);
                    let _ = free.send(cache);
                    digest
                })
                .collect()
        });
        (digests, start.elapsed().as_secs_f64() * 1e3 / frames as f64)
    }
}

fn decide(engine: &CudaEngine, backend: Backend, encoder: u8) -> Option<Decision> {
    engine.offer().unwrap().decide(Split { backend, encoder, decoder: 100 - encoder }).ok()
}

#[test]
#[ignore = "needs a GPU"]
fn chunks_are_equal_whatever_the_share() {
    let frames = from_env("PI0_FRAMES", 500);
    let engine = kernels::random(&full_width(Family::Pi0, 18), Resampler::OpenPi, 3);
    println!("bits {}: {:?}", engine.describe(), engine.offer().unwrap());
    let script = Script::new();
    let (mut encoder, mut decoder) = engine.stages().unwrap();
    let mut cache = engine.cache(VIEWS, TOKENS).unwrap();
    let expected: Vec<u64> = (0..frames)
        .map(|i| {
            script.encode(i, &mut encoder, &mut cache);
            script.decode(i, &mut decoder, &cache)
        })
        .collect();
    assert!(expected.windows(2).all(|w| w[0] != w[1]), "the observations do not differ");

    // The canary of debug builds: a slot given away before it was filled shows in the actions.
    let rows = cache.len();
    cache.poison().unwrap();
    cache.set_rows(rows);
    let mut actions = vec![0.0; 50 * 32];
    let input = DecodeInput { state: &script.states[0], noise: &script.noise[0], steps: 10, guidance: None };
    decoder.decode(&cache, &input, &mut actions).unwrap();
    assert!(actions.iter().any(|a| !a.is_finite()), "the canary does not fire");

    let check = |name: String, stages: (CudaEncoder, CudaDecoder), frames: usize| {
        let (found, ms) = script.overlapped(&engine, stages, frames);
        let wrong = found.iter().zip(&expected).filter(|(a, b)| a != b).count();
        println!("bits {name}: {wrong} of {frames} observations differ; {ms:.2} ms each (two decodes)");
        assert_eq!(wrong, 0, "{name}");
    };
    for (backend, percents) in
        [(Backend::Shared, &[50][..]), (Backend::Green, &[50, 66, 30, 70, 90]), (Backend::Mps, &[50, 63, 70, 30])]
    {
        for (i, percent) in percents.iter().enumerate() {
            match decide(&engine, backend, *percent) {
                Some(d) => {
                    let stages = engine.stages_on(d.grant).unwrap();
                    check(d.to_string(), stages, if i < 2 { frames } else { frames / 5 });
                }
                None => println!("bits {backend} {percent}: not to be had here"),
            }
        }
    }
    // Shares that leave something to others.
    let part = engine.offer().unwrap().decide(Split { backend: Backend::Green, encoder: 40, decoder: 30 }).unwrap();
    check(part.to_string(), engine.stages_on(part.grant).unwrap(), frames / 10);
    check("two contexts, no shares".into(), engine.stages_in_own_contexts().unwrap(), frames / 10);
}

#[test]
#[ignore = "needs a GPU"]
fn algorithms_are_timed_beside_a_busy_share_while_nothing_works() {
    // Two layers: their products are those of all.
    let engine = kernels::random(&full_width(Family::Pi0, 2), Resampler::OpenPi, 3);
    let prepared = |backend, encoder, idle| {
        let grant = decide(&engine, backend, encoder)?.grant;
        let before = (engine.measured(), engine.measured_beside_traffic());
        let (mut encoder, _decoder) = engine.stages_on(grant).unwrap();
        encoder.prepare(VIEWS, TOKENS, TOKENS, idle).unwrap();
        let found = (engine.measured() - before.0, engine.measured_beside_traffic() - before.1);
        println!("bits {backend}, idle {idle}: {} classes timed, {} times beside traffic", found.0, found.1);
        Some(found)
    };
    assert!(matches!(prepared(Backend::Green, 63, true), Some((1.., 1..))), "green contexts");
    // A share that is made while another one works has no traffic beside it.
    assert!(matches!(prepared(Backend::Green, 50, false), Some((1.., 0))), "green contexts, at work");
    // Other numbers of SMs: what is known on a share of the same size is not timed again.
    for percent in [59, 50, 70] {
        assert!(matches!(prepared(Backend::Mps, percent, true), None | Some((1.., 1..))), "mps {percent}");
    }
    assert!(matches!(prepared(Backend::Mps, 30, false), None | Some((_, 0))), "mps, at work");
    // Nor do stages that share all SMs.
    assert!(matches!(prepared(Backend::Shared, 50, true), Some((_, 0))), "shared streams");
}

/// When each chunk came.
struct Chunks(Sender<Instant>);

impl Outputs for Chunks {
    fn trajectory(&mut self, _: &Window) {}
    fn chunk(&mut self, _: &ActionChunk) {
        let _ = self.0.send(Instant::now());
    }
}

#[test]
#[ignore = "needs a GPU"]
fn shares_change_under_a_running_node() {
    let seconds = from_env("PI0_SECONDS", 60);
    let probe = Gpu::open(0).unwrap();
    let mps = pi0_mps::engine::cuda::offer(0).unwrap().mps;
    for backend in [Backend::Green, Backend::Mps] {
        if backend == Backend::Mps && !mps {
            println!("resplit mps: not to be had here");
            continue;
        }
        let dir = tempfile::tempdir().unwrap();
        synthetic::write(dir.path(), 1).unwrap();
        let sim_arm = std::env::var("PI0_FIXTURES").map_or_else(
            |_| concat!(env!("CARGO_MANIFEST_DIR"), "/config/robots/sim_arm.yaml").to_owned(),
            |fixtures| format!("{fixtures}/sim_arm.yaml"),
        );
        let mut given = yaml::overrides(&std::fs::read_to_string(sim_arm).unwrap(), "pi0_mps").unwrap();
        for (name, value) in [
            ("checkpoint", Value::String(dir.path().display().to_string())),
            ("device", Value::String("cuda:0".into())),
            ("partition", Value::String(backend.name().into())),
            ("pipeline_mode", Value::String("pipelined".into())),
            ("lock_memory", Value::Bool(false)),
        ] {
            given.retain(|(n, _)| n != name);
            given.push((name.into(), value));
        }
        let mut params = Params::from_overrides(given).unwrap();
        let (send, came) = channel();
        let node = Node::start(params.settings(), Arc::new(SystemClock), Box::new(Chunks(send))).unwrap();
        let (inputs, names) = (node.inputs(), JOINT_NAMES.map(String::from));
        let bytes: Vec<u8> = normals(1, 640 * 480 * 3).iter().map(|x| (128.0 + 60.0 * x) as u8).collect();
        let mut frame_bytes = bytes.clone();
        let feed = |frame_bytes: &mut Vec<u8>, n: u8| {
            frame_bytes[0] = n;
            let frame = Frame::new(640, 480, 640 * 3, "rgb8", frame_bytes.clone()).unwrap();
            let stamp = SystemClock.ros();
            (0..2).for_each(|camera| inputs.frame(camera, stamp, Ok(frame.clone())));
            inputs.joints(stamp, &names, &MEAN_POSE);
        };
        let status = |key: &str| {
            let s = node.status();
            let all = s.diagnostics.iter().flat_map(|d| d.values.iter()).chain(s.values.iter());
            all.into_iter().find(|(k, _)| k == key).map_or_else(String::new, |(_, v)| v.clone())
        };
        let patience = Instant::now() + Duration::from_secs(60);
        while node.status().mode.to_string() != "active" {
            assert!(Instant::now() < patience, "{:?}", node.status().message);
            feed(&mut frame_bytes, 0);
            std::thread::sleep(Duration::from_millis(10));
        }
        println!("resplit {backend}: {}", status("partition"));
        let before = [status("skipped"), status("deadline_misses")];
        // Three that are ready, then new ones and known ones by turns.
        let splits = [70, 30, 50, 80, 20, 70, 60, 40, 30, 90, 50, 80, 20, 60, 40, 90, 70, 80, 20, 60];
        let every = Duration::from_secs_f64(seconds as f64 / (splits.len() + 1) as f64);
        let (start, mut done, mut n) = (Instant::now(), 0, 0u8);
        let mut memory = Vec::new();
        came.try_iter().for_each(drop);
        while start.elapsed() < every * (splits.len() as u32 + 1) {
            n = n.wrapping_add(1);
            feed(&mut frame_bytes, n);
            std::thread::sleep(Duration::from_millis(16));
            if done < splits.len() && start.elapsed() > every * (done as u32 + 1) {
                println!(
                    "resplit {backend} {done}: in force {}, {} in {} ms, {} ms",
                    status("partition"),
                    status("last_resplit"),
                    status("last_resplit_build_ms"),
                    status("last_resplit_in_force_ms")
                );
                let set = [("mps_encoder_percentage".to_owned(), Value::Int(splits[done]))];
                let other = [("mps_decoder_percentage".to_owned(), Value::Int(100 - splits[done]))];
                params.set(&[set, other].concat(), false).unwrap();
                // And another prompt, of another length: nothing may wait for it either.
                inputs.prompt(&format!("touch the block{}", " again".repeat(done))).unwrap();
                node.apply(&params.settings()).unwrap();
                done += 1;
                memory.push(probe.memory().unwrap().0 >> 20);
            }
        }
        let times: Vec<Instant> = came.try_iter().collect();
        let mut gaps: Vec<f64> = times.windows(2).map(|w| (w[1] - w[0]).as_secs_f64() * 1e3).collect();
        gaps.sort_by(f64::total_cmp);
        let (median, most) = (gaps[gaps.len() / 2], gaps[gaps.len() - 1]);
        println!(
            "resplit {backend}: {} re-splits, {} chunks, gap median {median:.2} ms, longest {most:.2} ms; skipped {} -> {}, \
             deadline misses {} -> {}; free MiB {memory:?}",
            status("resplits"),
            times.len(),
            before[0],
            status("skipped"),
            before[1],
            status("deadline_misses"),
        );
        assert!(status("resplits").parse::<usize>().unwrap() >= splits.len() - 2);
        assert_eq!([status("skipped"), status("deadline_misses")], before, "a tick was missed");
        assert!(most <= 2.0 * median, "{most} ms between two chunks");
        node.shutdown().unwrap();
    }
}
