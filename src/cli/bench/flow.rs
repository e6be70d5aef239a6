//! Both stages on their shares: together, alone, and as a running pipeline. What goes round is the same as in the node:
//! slots that move, a mailbox in which the newest wins.

use std::sync::Barrier;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crate::clock::{Clock, Monotonic};
use crate::engine::cuda::CudaEngine;
use crate::engine::partition::Grant;
use crate::engine::{DecodeInput, Decoder, EncodeInput, Encoder, Engine, EngineError, View};
use crate::model::{Dims, Frame, ModelError};
use crate::pipeline::PipelineMode;
use crate::pipeline::mailbox::Mailbox;
use crate::rt::SystemClock;
use crate::telemetry::trace::{self, What};

/// Runs of each stage before anything is timed.
const WARM: usize = 5;
/// A stage that waits for the other one looks this often whether it should end.
const WAIT: Duration = Duration::from_millis(50);

/// One observation, drawn at random: times do not depend on the values.
pub struct Load {
    frames: Vec<Frame>,
    tokens: Vec<u32>,
    state: Vec<f32>,
    noise: Vec<f32>,
    horizon: usize,
}

impl Load {
    /// `views` frames of this size and `tokens` prompt tokens for a model of these dimensions.
    pub fn random(dims: &Dims, views: usize, tokens: usize, (w, h): (usize, usize)) -> Result<Self, ModelError> {
        use rand::{Rng, SeedableRng};
        use rand_distr::{Distribution, StandardNormal};
        let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(7);
        let frames = (0..views)
            .map(|_| {
                let bytes: Vec<u8> = (0..w * h * 3).map(|_| rng.random()).collect();
                Frame::new(w, h, w * 3, "rgb8", bytes)
            })
            .collect::<Result<Vec<_>, _>>()?;
        let mut normal = |n: usize| -> Vec<f32> { (0..n).map(|_| StandardNormal.sample(&mut rng)).collect() };
        Ok(Self {
            frames,
            tokens: (0..tokens).map(|i| (i % dims.vocab) as u32).collect(),
            state: normal(dims.state_dim),
            noise: normal(dims.horizon * dims.action_dim),
            horizon: dims.horizon,
        })
    }

    /// The same with its frames where `engine` wants them, as in the node.
    pub fn kept_by(mut self, engine: &CudaEngine) -> Self {
        let memory = engine.frame_memory();
        self.frames = self.frames.into_iter().map(|f| f.kept_in(memory.as_deref())).collect();
        self
    }

    /// What memory the frames are in: pageable where the engine had no room for them.
    pub fn memory(&self) -> &'static str {
        let pageable = self.frames.iter().any(|f| f.pixels().held_by::<Vec<u8>>().is_some());
        if pageable { "pageable" } else { "page-locked" }
    }

    /// Camera views.
    pub fn views(&self) -> usize {
        self.frames.len()
    }

    /// Prompt tokens.
    pub fn tokens(&self) -> usize {
        self.tokens.len()
    }

    /// Actions a chunk.
    pub fn horizon(&self) -> usize {
        self.horizon
    }

    fn encode<E: Encoder>(&self, encoder: &mut E, slot: &mut E::Cache) -> Result<(), EngineError> {
        let views: Vec<_> = self.frames.iter().map(View::Frame).collect();
        encoder.encode(&EncodeInput { views: &views, tokens: &self.tokens }, slot)
    }

    fn decode<D: Decoder>(&self, decoder: &mut D, slot: &D::Cache, out: &mut [f32]) -> Result<(), EngineError> {
        let input = DecodeInput { state: &self.state, noise: &self.noise, steps: 10, guidance: None };
        decoder.decode(slot, &input, out)
    }
}

/// Seconds since `start`, in milliseconds.
fn ms(start: Instant) -> f64 {
    start.elapsed().as_secs_f64() * 1e3
}

/// A span from `begun` until now in the trace.
fn mark(what: What, number: usize, begun: Instant) {
    let now = SystemClock.monotonic();
    let begun = Monotonic(now.0 - begun.elapsed().as_nanos() as i64);
    trace::span(what, number as u64, begun, now);
}

/// Warm stages, a filled slot, and one to fill.
struct Rig {
    encoder: <CudaEngine as Engine>::Encoder,
    decoder: <CudaEngine as Engine>::Decoder,
    slots: [<CudaEngine as Engine>::Cache; 2],
    actions: Vec<f32>,
}

impl Rig {
    fn new(engine: &CudaEngine, load: &Load, grant: Grant) -> Result<Self, EngineError> {
        let (encoder, decoder) = engine.stages_on(grant)?;
        let slot = || engine.cache(load.views(), load.tokens());
        let mut rig = Self { encoder, decoder, slots: [slot()?, slot()?], actions: vec![0.0; load.noise.len()] };
        rig.encoder.prepare(load.views(), load.tokens(), load.tokens(), true)?;
        for _ in 0..WARM {
            for slot in &mut rig.slots {
                load.encode(&mut rig.encoder, slot)?;
                load.decode(&mut rig.decoder, slot, &mut rig.actions)?;
            }
        }
        Ok(rig)
    }
}

/// Host times of one observation, the GPU idle before each, and the stages' GPU times, all in ms.
pub struct Sequential {
    /// Frames in to actions out.
    pub total: Vec<f64>,
    /// Its first part.
    pub encode: Vec<f64>,
    /// GPU times: frames, vision, trunk, decoder.
    pub gpu: [Vec<f64>; 4],
}

/// One observation after the other on the whole GPU, for `warm_up`, then `runs` times.
pub fn sequential(engine: &CudaEngine, load: &Load, warm_up: Duration, runs: usize) -> Result<Sequential, EngineError> {
    let mut rig = Rig::new(engine, load, Grant::whole(engine.offer().map_or(0, |o| o.sms)))?;
    let mut out = Sequential { total: Vec::new(), encode: Vec::new(), gpu: Default::default() };
    let warm = Instant::now() + warm_up;
    while out.total.len() < runs {
        let start = Instant::now();
        load.encode(&mut rig.encoder, &mut rig.slots[0])?;
        let encoded = ms(start);
        load.decode(&mut rig.decoder, &rig.slots[0], &mut rig.actions)?;
        let total = ms(start);
        if Instant::now() < warm {
            continue;
        }
        let t = rig.encoder.last_times()?;
        let gpu = [t.images, t.vision, t.trunk, rig.decoder.last_ms()?];
        out.total.push(total);
        out.encode.push(encoded);
        out.gpu.iter_mut().zip(gpu).for_each(|(series, v)| series.push(f64::from(v)));
    }
    Ok(out)
}

/// Each stage alone on its share: encode and decode times, host to host, ms.
pub fn alone(engine: &CudaEngine, load: &Load, grant: Grant, runs: usize) -> Result<[Vec<f64>; 2], EngineError> {
    let mut rig = Rig::new(engine, load, grant)?;
    let mut times = [Vec::new(), Vec::new()];
    for _ in 0..runs {
        let start = Instant::now();
        load.encode(&mut rig.encoder, &mut rig.slots[0])?;
        times[0].push(ms(start));
    }
    for _ in 0..runs {
        let start = Instant::now();
        load.decode(&mut rig.decoder, &rig.slots[1], &mut rig.actions)?;
        times[1].push(ms(start));
    }
    Ok(times)
}

/// Both stages begin at the same moment on an idle GPU: until both have ended, and each of them, ms.
pub fn together(engine: &CudaEngine, load: &Load, grant: Grant, runs: usize) -> Result<[Vec<f64>; 3], EngineError> {
    let Rig { mut encoder, mut decoder, slots: [mut filling, filled], mut actions } = Rig::new(engine, load, grant)?;
    let (begin, end) = (Barrier::new(2), Barrier::new(2));
    let mut times: [Vec<f64>; 3] = Default::default();
    std::thread::scope(|scope| {
        let encoding = scope.spawn(|| {
            let mut times = Vec::with_capacity(runs);
            let mut failed = None;
            // Also after a failure: the other side waits at the barriers.
            for _ in 0..runs {
                begin.wait();
                let start = Instant::now();
                failed = failed.or(load.encode(&mut encoder, &mut filling).err());
                times.push(ms(start));
                end.wait();
            }
            failed.map_or(Ok(times), Err)
        });
        let mut failed = None;
        for _ in 0..runs {
            begin.wait();
            let start = Instant::now();
            failed = failed.or(load.decode(&mut decoder, &filled, &mut actions).err());
            times[2].push(ms(start));
            end.wait();
            times[0].push(ms(start));
        }
        match encoding.join() {
            Ok(encoded) => times[1] = encoded?,
            Err(panic) => std::panic::resume_unwind(panic),
        }
        failed.map_or(Ok(()), Err)
    })?;
    Ok(times)
}

/// What a pipeline did while it ran; times in ms.
pub struct Running {
    /// Wall time, s.
    pub seconds: f64,
    /// From the end of one decode to the next.
    pub period: Vec<f64>,
    /// Duration of an encode.
    pub encode: Vec<f64>,
    /// Duration of a decode.
    pub decode: Vec<f64>,
    /// From the start of an encode to the end of a decode of it: what an image's age is at least.
    pub age: Vec<f64>,
}

impl Running {
    /// Decodes a second.
    pub fn decode_hz(&self) -> f64 {
        self.decode.len() as f64 / self.seconds
    }

    /// Encodes a second.
    pub fn encode_hz(&self) -> f64 {
        self.encode.len() as f64 / self.seconds
    }
}

/// A pipeline in `mode` on these shares for `length`, with a new frame always there.
pub fn running(
    engine: &CudaEngine,
    load: &Load,
    grant: Grant,
    mode: PipelineMode,
    length: Duration,
) -> Result<Running, EngineError> {
    let Rig { mut encoder, mut decoder, slots, mut actions } = Rig::new(engine, load, grant)?;
    let stop = AtomicBool::new(false);
    let filled = Mailbox::<(<CudaEngine as Engine>::Cache, Instant)>::default();
    let (free, to_fill) = crossbeam_channel::unbounded();
    let [first, second] = slots;
    let rest = if mode == PipelineMode::Sequential {
        Vec::new()
    } else {
        vec![second, engine.cache(load.views(), load.tokens())?]
    };
    // The receiver lives in this function: these cannot fail, nor those below.
    std::iter::once(first).chain(rest).for_each(|slot| _ = free.send(slot));
    let mut out = Running { seconds: 0.0, period: Vec::new(), encode: Vec::new(), decode: Vec::new(), age: Vec::new() };
    let start = Instant::now();
    std::thread::scope(|scope| {
        let encoding = scope.spawn(|| {
            let mut times = Vec::new();
            while !stop.load(Ordering::Acquire) {
                let Ok(mut slot) = to_fill.recv_timeout(WAIT) else { continue };
                let begun = Instant::now();
                if let Err(e) = load.encode(&mut encoder, &mut slot) {
                    stop.store(true, Ordering::Release);
                    return Err(e);
                }
                times.push(ms(begun));
                mark(What::Encode, times.len(), begun);
                if let Some((old, _)) = filled.put((slot, begun)) {
                    let _ = free.send(old);
                }
            }
            Ok(times)
        });
        let mut failed = None;
        let mut held: Option<(<CudaEngine as Engine>::Cache, Instant)> = None;
        let mut last = None;
        while start.elapsed() < length && !stop.load(Ordering::Acquire) {
            let newer = if held.is_some() { filled.try_take() } else { filled.take(WAIT) };
            if let Some(newer) = newer
                && let Some((old, _)) = held.replace(newer)
            {
                let _ = free.send(old);
            }
            let Some((slot, begun)) = &held else { continue };
            let start = Instant::now();
            if let Err(e) = load.decode(&mut decoder, slot, &mut actions) {
                failed = Some(e);
                break;
            }
            out.decode.push(ms(start));
            mark(What::Decode, out.decode.len(), start);
            out.age.push(ms(*begun));
            let now = Instant::now();
            if let Some(last) = last.replace(now) {
                out.period.push((now - last).as_secs_f64() * 1e3);
            }
            if mode != PipelineMode::DualRate
                && let Some((slot, _)) = held.take()
            {
                let _ = free.send(slot);
            }
        }
        out.seconds = start.elapsed().as_secs_f64();
        stop.store(true, Ordering::Release);
        match encoding.join() {
            Ok(encoded) => out.encode = encoded?,
            Err(panic) => std::panic::resume_unwind(panic),
        }
        failed.map_or(Ok(()), Err)
    })?;
    Ok(out)
}
