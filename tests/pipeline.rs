//! The stages on their threads: what comes out is what one thread would have computed, whatever overlaps.

use std::collections::HashMap;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use pi0_mps::clock::{Clock, Monotonic, RosTime};
use pi0_mps::control::PlanView;
use pi0_mps::control::chunk::ActionChunk;
use pi0_mps::engine::cpu::CpuEngine;
use pi0_mps::engine::frames::{FramePool, Lent};
use pi0_mps::engine::partition::{Backend, Grant, Granularity, Offer, Split};
use pi0_mps::engine::{
    DecodeInput, Decoder, EncodeInput, Encoder, Engine, EngineError, GuidanceSchedule, KvCache, View,
};
use pi0_mps::model::synthetic::{self, JOINT_NAMES, MEAN_POSE};
use pi0_mps::model::{Checkpoint, Dims, Frame, FrameMemory, Policy, PolicyOptions};
use pi0_mps::pipeline::inputs::InputSlots;
use pi0_mps::pipeline::joint_map::JointBinding;
use pi0_mps::pipeline::{
    CameraBinding, LiveConfig, Pipeline, PipelineConfig, PipelineIo, PipelineMode, Ports, Retired, RtcConfig,
};
use pi0_mps::rt::SystemClock;
use pi0_mps::rt::latest::{Writer, latest};
use pi0_mps::rt::signals::Epoch;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

const MODES: [PipelineMode; 3] = [PipelineMode::Sequential, PipelineMode::Pipelined, PipelineMode::DualRate];
const PATIENCE: Duration = Duration::from_secs(60);
const SIZE: usize = 48;

fn names() -> Vec<String> {
    JOINT_NAMES.map(String::from).to_vec()
}

fn config(mode: PipelineMode) -> PipelineConfig {
    let camera = |name: &str| CameraBinding { name: name.into(), model_key: format!("observation.images.{name}") };
    PipelineConfig {
        mode,
        split: Split { backend: Backend::Auto, encoder: 50, decoder: 50 },
        cameras: vec![camera("base"), camera("wrist")],
        joint_names: names(),
        joints: (0..7).map(|index| JointBinding { index, scale: 1.0, offset: 0.0 }).collect(),
        dt: 1.0 / 30.0,
        seed: 5,
        cpus: [None; 2],
        paused: false,
        live: LiveConfig {
            camera_max_age_ms: vec![60_000.0; 2],
            drop_lost_views: false,
            // Frames of one observation have one stamp here: on a busy machine no others are mixed.
            max_camera_skew_ms: 0.0,
            max_joint_state_age_ms: 60_000.0,
            hold_noise: true,
            replan_steps: 10,
            rtc: None,
            steps: 10,
            chunk_budget_ms: 0.0,
        },
    }
}

/// A pipeline with both its ends in the test's hands.
struct Rig {
    inputs: Arc<InputSlots>,
    chunks: rtrb::Consumer<Arc<ActionChunk>>,
    retired: rtrb::Producer<Retired>,
    epoch: Arc<Epoch>,
    plan: Writer<Option<PlanView>>,
    pipeline: Pipeline,
}

impl Rig {
    fn start<E: Engine>(engine: &Arc<E>, policy: Arc<Policy>, config: PipelineConfig) -> Self {
        let (inputs, _control) = InputSlots::new(2, &names(), "pick up the cube");
        let inputs = Arc::new(inputs);
        let (to_control, chunks) = rtrb::RingBuffer::new(4096);
        let (back, retired) = rtrb::RingBuffer::new(4);
        let (plan_writer, plan) = latest(None::<PlanView>);
        let (tap, _) = crossbeam_channel::bounded(1);
        let epoch = Arc::new(Epoch::default());
        let io = PipelineIo {
            inputs: inputs.clone(),
            clock: Arc::new(SystemClock),
            ports: Arc::new(Mutex::new(Ports { chunks: to_control, retired, plan, sequence: 0 })),
            epoch: epoch.clone(),
            tap,
        };
        let pipeline = Pipeline::start(Arc::clone(engine), policy, config, io).unwrap();
        Self { inputs, chunks, retired: back, epoch, plan: plan_writer, pipeline }
    }

    fn joints(&self, positions: &[f64; 7]) {
        self.inputs.put_joints(&names(), positions, SystemClock.ros(), SystemClock.monotonic());
    }

    /// Both cameras send `frame`; the stamp tells the observation from all others.
    fn observe(&self, frame: &Frame) -> RosTime {
        let stamp = SystemClock.ros();
        for camera in 0..2 {
            self.inputs.put_frame(camera, frame.clone(), stamp, SystemClock.monotonic());
        }
        stamp
    }

    fn wait_for(&mut self, what: &str, mut wanted: impl FnMut(&ActionChunk) -> bool) -> Arc<ActionChunk> {
        let end = Instant::now() + PATIENCE;
        loop {
            match self.chunks.pop() {
                Ok(chunk) if wanted(&chunk) => return chunk,
                Ok(_) => {}
                Err(_) => {
                    assert!(Instant::now() < end, "no {what}; {:?}", self.pipeline.report().waiting_for);
                    std::thread::sleep(Duration::from_millis(1));
                }
            }
        }
    }
}

fn frame(value: u8) -> Frame {
    let mut rng = ChaCha8Rng::seed_from_u64(value.into());
    let data: Vec<u8> = (0..SIZE * SIZE * 3).map(|i| if i < 3 { value } else { rng.random() }).collect();
    Frame::new(SIZE, SIZE, SIZE * 3, "rgb8", data).unwrap()
}

fn synthetic_policy(dir: &Path) -> (Checkpoint, Arc<Policy>) {
    synthetic::write(dir, 3).unwrap();
    let checkpoint = Checkpoint::open(dir).unwrap();
    let policy = Policy::open(&checkpoint, dir, &PolicyOptions::default()).unwrap();
    (checkpoint, Arc::new(policy))
}

/// What one thread computes for this observation.
fn alone(engine: &CpuEngine, policy: &Policy, frame: &Frame, state: &[f64; 7], noise: &[f32]) -> Vec<f64> {
    let dims = *policy.dims();
    let (mut encoder, mut decoder) = engine.stages().unwrap();
    let mut cache = engine.cache(2, dims.max_tokens).unwrap();
    let tokens = policy.tokens("pick up the cube", state).unwrap();
    encoder.encode(&EncodeInput { views: &[View::Frame(frame); 2], tokens: &tokens }, &mut cache).unwrap();
    let mut normalised = vec![0.0; dims.state_dim];
    policy.normalize_state(state, &mut normalised).unwrap();
    let mut actions = vec![0.0; noise.len()];
    let input = DecodeInput { state: &normalised, noise, steps: 10, guidance: None };
    decoder.decode(&cache, &input, &mut actions).unwrap();
    let mut robot = vec![0.0; dims.horizon * policy.action_len()];
    policy.to_robot(&actions, state, &mut robot).unwrap();
    robot
}

#[test]
fn overlapped_stages_compute_what_one_thread_computes_bit_for_bit() {
    let dir = tempfile::tempdir().unwrap();
    let (checkpoint, policy) = synthetic_policy(dir.path());
    let engine = Arc::new(CpuEngine::load(&checkpoint, policy.origin().into(), 1).unwrap());
    let noise = {
        use rand_distr::{Distribution, StandardNormal};
        let mut rng = ChaCha8Rng::seed_from_u64(5);
        (0..policy.dims().horizon * policy.dims().action_dim)
            .map(|_| StandardNormal.sample(&mut rng))
            .collect::<Vec<f32>>()
    };
    for mode in MODES {
        let mut rig = Rig::start(&engine, policy.clone(), config(mode));
        rig.joints(&MEAN_POSE);
        let mut sent = HashMap::new();
        let mut checked = 0;
        // Faster than the encoder: slots are displaced, and encode and decode overlap.
        for value in 0..24 {
            let f = frame(value);
            sent.insert(rig.observe(&f), f);
            std::thread::sleep(Duration::from_millis(15));
        }
        let last = *sent.keys().max().unwrap();
        let mut seen = Vec::new();
        rig.wait_for("chunk of the last observation", |c| {
            seen.push((c.oldest_image_stamp, c.positions.clone()));
            c.oldest_image_stamp == last
        });
        for (stamp, positions) in &seen {
            let want = alone(&engine, &policy, &sent[stamp], &MEAN_POSE, &noise);
            assert_eq!(positions, &want, "{mode:?}");
            checked += 1;
        }
        let report = rig.pipeline.report();
        assert!(checked > 0 && report.encode.errors + report.decode.errors == 0, "{mode:?}");
        if mode == PipelineMode::Sequential {
            assert_eq!(report.displaced, 0, "one slot cannot overtake itself");
        }
    }
}

#[test]
fn dual_rate_decodes_each_joint_state_on_the_newest_cache() {
    let dir = tempfile::tempdir().unwrap();
    let (checkpoint, policy) = synthetic_policy(dir.path());
    let engine = Arc::new(CpuEngine::load(&checkpoint, policy.origin().into(), 1).unwrap());
    let mut rig = Rig::start(&engine, policy, config(PipelineMode::DualRate));
    rig.joints(&MEAN_POSE);
    let image = rig.observe(&frame(1));
    let first = rig.wait_for("chunk", |_| true);
    for _ in 0..3 {
        let mut pose = MEAN_POSE;
        pose[0] += 0.1;
        rig.joints(&pose);
        let stamp = rig.inputs.joints().stamps[0];
        let next = rig.wait_for("chunk of the new state", |c| c.state_stamp == stamp);
        assert_eq!(next.oldest_image_stamp, image);
        assert_ne!(next.positions, first.positions);
    }
    assert_eq!(rig.pipeline.report().encode.runs, 1);
}

#[test]
fn a_chunk_that_comes_back_is_freed_and_its_hand_over_is_counted() {
    let dir = tempfile::tempdir().unwrap();
    let (checkpoint, policy) = synthetic_policy(dir.path());
    let engine = Arc::new(CpuEngine::load(&checkpoint, policy.origin().into(), 1).unwrap());
    let mut rig = Rig::start(&engine, policy, config(PipelineMode::Pipelined));
    rig.joints(&MEAN_POSE);
    rig.observe(&frame(1));
    let chunk = rig.wait_for("chunk", |_| true);
    let (end, freed) = (chunk.timing.decode_end, Arc::downgrade(&chunk));
    // The second one as if the clock of the hand-over had been read before the decode ended.
    for taken in [end + Duration::from_nanos(100), Monotonic(0)] {
        rig.retired.push(Retired { chunk: chunk.clone(), taken }).unwrap();
    }
    drop(chunk);
    let patience = Instant::now() + PATIENCE;
    let hand_over = loop {
        let stats = rig.pipeline.report().hand_over.stats();
        if stats.count == 2 && freed.strong_count() == 0 {
            break stats;
        }
        assert!(Instant::now() < patience, "{stats:?}, {} references", freed.strong_count());
        std::thread::sleep(Duration::from_millis(1));
    };
    assert_eq!((hand_over.min, hand_over.max), (0, 100));
}

#[test]
fn guidance_keeps_a_new_chunk_on_the_committed_steps_of_the_running_plan() {
    let dir = tempfile::tempdir().unwrap();
    let (checkpoint, policy) = synthetic_policy(dir.path());
    let engine = Arc::new(CpuEngine::load(&checkpoint, policy.origin().into(), 1).unwrap());
    let mut config = config(PipelineMode::Pipelined);
    config.live.replan_steps = 20;
    let free = config.live.clone();
    let dt = config.dt;
    let mut rig = Rig::start(&engine, policy, config);
    rig.joints(&MEAN_POSE);
    rig.observe(&frame(1));
    let old = rig.wait_for("first chunk", |_| true);

    // The arm is not where the plan has it: on its own, the policy would start from here.
    let mut pose = MEAN_POSE;
    pose[0] += 0.15;
    let mut chunk = |live: LiveConfig, plan: Option<PlanView>| {
        rig.pipeline.set_live(live);
        rig.plan.put(plan);
        rig.joints(&pose);
        let stamp = rig.observe(&frame(2));
        let chunk = rig.wait_for("chunk", |c| c.oldest_image_stamp == stamp);
        (chunk, rig.pipeline.report().guided)
    };
    let (unguided, none) = chunk(free.clone(), None);
    let now = SystemClock.ros();
    let origin = now.plus_seconds(-5.0 * dt);
    let plan = PlanView {
        sequence: old.sequence,
        prompt_generation: 0,
        state_stamp: old.state_stamp,
        origin,
        adopted_at: origin,
        next_adoption: now.plus_seconds(8.0 * dt),
        dt,
        horizon: old.horizon,
        lag: 0.0,
        pace: 1.0,
    };
    let rtc = RtcConfig { schedule: GuidanceSchedule::Exp, execution_horizon: 20, max_weight: 10.0 };
    let (guided, one) = chunk(LiveConfig { rtc: Some(rtc), ..free }, Some(plan));
    assert_eq!((none, one), (0, 1));

    let first = plan.index_at(guided.state_stamp);
    let distance = |c: &ActionChunk| {
        let mut largest = 0.0f64;
        for i in 0..5 {
            let u = first + i as f64;
            let (below, part) = (u.floor() as usize, u.fract());
            for j in 0..6 {
                let planned = old.action(below)[j] * (1.0 - part) + old.action(below + 1)[j] * part;
                largest = largest.max((c.action(i)[j] - planned).abs());
            }
        }
        largest
    };
    let (with, without) = (distance(&guided), distance(&unguided));
    assert!(without > 0.05 && with < 0.2 * without, "guided {with}, unguided {without}");
}

#[test]
fn a_chunk_carries_the_epoch_in_which_it_was_begun() {
    let dir = tempfile::tempdir().unwrap();
    let (checkpoint, policy) = synthetic_policy(dir.path());
    let engine = Arc::new(CpuEngine::load(&checkpoint, policy.origin().into(), 1).unwrap());
    let mut rig = Rig::start(&engine, policy, config(PipelineMode::Pipelined));
    rig.joints(&MEAN_POSE);
    rig.observe(&frame(1));
    assert_eq!(rig.wait_for("chunk", |_| true).epoch, 0);
    rig.epoch.set(4);
    let stamp = rig.observe(&frame(2));
    assert_eq!(rig.wait_for("chunk", |c| c.oldest_image_stamp == stamp).epoch, 4);
}

#[test]
fn no_chunk_is_made_from_a_joint_state_that_is_garbage() {
    let dir = tempfile::tempdir().unwrap();
    let (checkpoint, policy) = synthetic_policy(dir.path());
    let engine = Arc::new(CpuEngine::load(&checkpoint, policy.origin().into(), 1).unwrap());
    let mut rig = Rig::start(&engine, policy, config(PipelineMode::Pipelined));
    let mut pose = MEAN_POSE;
    pose[2] = f64::NAN;
    rig.joints(&pose);
    rig.observe(&frame(1));
    let end = Instant::now() + PATIENCE;
    while rig.pipeline.report().waiting_for.is_none_or(|w| !w.contains("joint 'elbow' has position NaN")) {
        assert!(Instant::now() < end, "{:?}", rig.pipeline.report().waiting_for);
        std::thread::sleep(Duration::from_millis(1));
    }
    assert!(rig.chunks.pop().is_err());
    rig.joints(&MEAN_POSE);
    rig.observe(&frame(2));
    rig.wait_for("chunk once the state is good", |_| true);
}

/// An engine whose slots tell whether anybody else touched them: each word of a slot holds the first byte of the
/// image it was filled from, written slowly; the decoder reads as slowly and answers with that byte.
struct Canary {
    dims: Dims,
    /// Releases a slot's content before the decoder has read it, to prove that the canary fires.
    planted: bool,
    /// Every encode of an image whose first byte is in here fails.
    poison: Vec<u8>,
    /// What it can be divided into, and the shares it was asked to build stages for.
    offer: Offer,
    built: Mutex<Vec<Grant>>,
    encoded: Arc<Mutex<Vec<Encoded>>>,
    /// Every encoder holds one.
    alive: Arc<()>,
    /// Where frames are to wait; encodes of others fail.
    memory: Option<Arc<FramePool<Vec<u8>>>>,
}

impl Canary {
    fn new(policy: &Policy) -> Self {
        let green = Ok(Granularity { least: 8, step: 8, groups: 15 });
        Self {
            dims: *policy.dims(),
            planted: false,
            poison: Vec::new(),
            offer: Offer { sms: 132, chip: 132, mps: false, green, least_decoder: 1, decoder_waits: false },
            encoded: Arc::default(),
            built: Mutex::default(),
            alive: Arc::default(),
            memory: None,
        }
    }
}

struct Words(Arc<Vec<AtomicU64>>, usize);

impl KvCache for Words {
    fn len(&self) -> usize {
        self.1
    }
}

/// An encode: which encoder, on which thread, of how many views and tokens.
type Encoded = (usize, String, usize, usize);

struct CanaryEncoder {
    number: usize,
    encoded: Arc<Mutex<Vec<Encoded>>>,
    poison: Vec<u8>,
    shared: Option<Arc<Vec<AtomicU64>>>,
    rng: ChaCha8Rng,
    _alive: Arc<()>,
    lends: bool,
}

struct CanaryDecoder(ChaCha8Rng);

/// Whether a frame is where an engine asked for it.
fn lent(frame: &Frame) -> bool {
    frame.pixels().held_by::<Lent<Vec<u8>>>().is_some()
}

fn dawdle(rng: &mut ChaCha8Rng) {
    std::thread::sleep(Duration::from_micros(rng.random_range(0..200)));
}

impl Engine for Canary {
    type Cache = Words;
    type Encoder = CanaryEncoder;
    type Decoder = CanaryDecoder;

    fn dims(&self) -> &Dims {
        &self.dims
    }

    fn describe(&self) -> String {
        "canary".into()
    }

    fn offer(&self) -> Option<&Offer> {
        Some(&self.offer)
    }

    fn frame_memory(&self) -> Option<Arc<dyn FrameMemory>> {
        self.memory.clone().map(|m| m as Arc<dyn FrameMemory>)
    }

    fn stages_on(&self, grant: Grant) -> Result<(CanaryEncoder, CanaryDecoder), EngineError> {
        self.built.lock().unwrap().push(grant);
        self.stages()
    }

    fn cache(&self, _views: usize, _tokens: usize) -> Result<Words, EngineError> {
        Ok(Words(Arc::new((0..16).map(|_| AtomicU64::new(u64::MAX)).collect()), 0))
    }

    fn stages(&self) -> Result<(CanaryEncoder, CanaryDecoder), EngineError> {
        let shared = self.planted.then(|| Arc::new((0..16).map(|_| AtomicU64::new(0)).collect()));
        let rng = ChaCha8Rng::seed_from_u64(1);
        let (poison, lends) = (self.poison.clone(), self.memory.is_some());
        let (number, encoded) = (self.built.lock().unwrap().len(), self.encoded.clone());
        let encoder = CanaryEncoder { number, encoded, poison, shared, rng, _alive: self.alive.clone(), lends };
        Ok((encoder, CanaryDecoder(ChaCha8Rng::seed_from_u64(2))))
    }
}

impl Encoder for CanaryEncoder {
    type Cache = Words;

    fn encode(&mut self, input: &EncodeInput<'_>, cache: &mut Words) -> Result<(), EngineError> {
        let thread = std::thread::current().name().unwrap_or_default().to_owned();
        self.encoded.lock().unwrap().push((self.number, thread, input.views.len(), input.tokens.len()));
        let View::Frame(frame) = input.views[0] else {
            cache.1 = 1;
            return Ok(());
        };
        if self.lends != lent(frame) {
            let found = format!("lent memory: {}", lent(frame));
            return Err(EngineError::Shape { what: "frame", expected: format!("lent memory: {}", self.lends), found });
        }
        let value = frame.data()[0];
        if self.poison.contains(&value) {
            let found = format!("poison {value}");
            return Err(EngineError::Shape { what: "image", expected: "no poison".into(), found });
        }
        if let Some(shared) = &self.shared {
            // The fault this guards against: every slot is the same memory.
            cache.0 = shared.clone();
        }
        for word in cache.0.iter() {
            word.store(value.into(), Ordering::Relaxed);
            dawdle(&mut self.rng);
        }
        cache.1 = 1;
        Ok(())
    }

    fn encode_with_embeddings(&mut self, i: &EncodeInput<'_>, cache: &mut Words) -> Result<Vec<f32>, EngineError> {
        self.encode(i, cache).map(|()| Vec::new())
    }
}

impl Decoder for CanaryDecoder {
    type Cache = Words;

    fn decode(&mut self, cache: &Words, _: &DecodeInput<'_>, actions: &mut [f32]) -> Result<(), EngineError> {
        let mut words = Vec::new();
        for word in cache.0.iter() {
            words.push(word.load(Ordering::Relaxed));
            dawdle(&mut self.0);
        }
        let torn = words.iter().any(|w| *w != words[0]);
        actions.fill(if torn { f32::NAN } else { words[0] as f32 });
        Ok(())
    }

    fn decode_with_velocities(
        &mut self,
        cache: &Words,
        input: &DecodeInput<'_>,
        actions: &mut [f32],
    ) -> Result<Vec<f32>, EngineError> {
        self.decode(cache, input, actions).map(|()| Vec::new())
    }
}

#[test]
fn frames_wait_where_the_engine_wants_them_and_leave_it_nothing_when_it_goes() {
    let dir = tempfile::tempdir().unwrap();
    let (_, policy) = synthetic_policy(dir.path());
    let memory = Arc::new(FramePool::new(|bytes| Ok(vec![0; bytes])));
    let engine = Arc::new(Canary { memory: Some(memory.clone()), ..Canary::new(&policy) });
    let mut rig = Rig::start(&engine, policy.clone(), config(PipelineMode::Pipelined));
    rig.joints(&MEAN_POSE);
    for value in 0..20 {
        let stamp = rig.observe(&frame(value));
        rig.wait_for("chunk", |c| c.oldest_image_stamp == stamp);
    }
    assert_eq!(rig.pipeline.report().encode.errors, 0, "{:?}", rig.pipeline.report().last_error);
    assert!(memory.size().0 <= 2 * 8, "{} buffers for two cameras", memory.size().0);
    let Rig { inputs, pipeline, .. } = rig;
    drop((pipeline, engine));
    let newest = inputs.frame(0).unwrap().frame;
    assert!(newest == frame(19) && !lent(&newest));
    assert_eq!(Arc::strong_count(&memory), 1);
}

/// What the canary's answers 0 and 1 become as a position of the first joint.
fn canary_scale(policy: &Policy) -> (f64, f64) {
    let position = |v: f32| {
        let mut out = vec![0.0; 7];
        policy.to_robot(&vec![v; policy.dims().action_dim], &MEAN_POSE, &mut out).unwrap();
        out[0]
    };
    (position(0.0), position(1.0))
}

/// Runs observations past the canary engine; the chunks whose slot was written while it was read, or held another
/// image than the chunk says.
fn torn_chunks(mode: PipelineMode, planted: bool) -> (usize, usize) {
    let dir = tempfile::tempdir().unwrap();
    let (_, policy) = synthetic_policy(dir.path());
    let (zero, one) = canary_scale(&policy);
    let engine = Arc::new(Canary { planted, ..Canary::new(&policy) });
    let mut rig = Rig::start(&engine, policy, config(mode));
    rig.joints(&MEAN_POSE);
    let mut sent = HashMap::new();
    for value in 1..=200u8 {
        sent.insert(rig.observe(&frame(value)), value);
        if mode == PipelineMode::DualRate {
            rig.joints(&MEAN_POSE);
        }
        std::thread::sleep(Duration::from_micros(700));
    }
    std::thread::sleep(Duration::from_millis(50));
    let (mut chunks, mut torn) = (0, 0);
    while let Ok(chunk) = rig.chunks.pop() {
        let value = (chunk.positions[0] - zero) / (one - zero);
        chunks += 1;
        torn += usize::from((value - f64::from(sent[&chunk.oldest_image_stamp])).abs() > 1e-3 || value.is_nan());
    }
    (torn, chunks)
}

#[test]
fn no_slot_is_written_while_it_is_read() {
    for mode in MODES {
        let (torn, chunks) = torn_chunks(mode, false);
        assert!(torn == 0 && chunks > 10, "{mode:?}: {torn} of {chunks}");
    }
}

#[test]
fn the_canary_fires_when_slots_share_memory() {
    let (torn, chunks) = torn_chunks(PipelineMode::Pipelined, true);
    assert!(torn > 0, "{torn} of {chunks}");
}

#[test]
fn shares_change_under_running_stages() {
    let dir = tempfile::tempdir().unwrap();
    let (_, policy) = synthetic_policy(dir.path());
    let (zero, one) = canary_scale(&policy);
    for mode in [PipelineMode::Pipelined, PipelineMode::DualRate] {
        let engine = Arc::new(Canary::new(&policy));
        let mut rig = Rig::start(&engine, policy.clone(), config(mode));
        let pool = engine.built.lock().unwrap().clone();
        let shares = |g: &Grant| (g.encoder, g.decoder);
        assert_eq!(pool.iter().map(shares).collect::<Vec<_>>(), [(68, 64), (92, 40), (36, 96)], "ready at start");
        let (mut sent, mut value) = (HashMap::new(), 0u8);
        let mut split_to = |percent: u8, resplits: u64| {
            let split = Split { backend: Backend::Auto, encoder: percent, decoder: 100 - percent };
            rig.pipeline.set_split(split).unwrap();
            let end = Instant::now() + PATIENCE;
            while rig.pipeline.report().resplits < resplits {
                assert!(Instant::now() < end, "{percent} %: {:?}", rig.pipeline.report());
                value = value % 250 + 1;
                rig.joints(&MEAN_POSE);
                sent.insert(rig.observe(&frame(value)), value);
                std::thread::sleep(Duration::from_millis(1));
            }
            rig.pipeline.report()
        };
        // Two of the pool, then more than the shelf holds, then one that has gone from it.
        for (i, percent) in [70, 30, 80, 20, 60, 90, 75, 40, 70].into_iter().enumerate() {
            let report = split_to(percent, i as u64 + 1);
            let resplit = report.last_resplit.unwrap();
            assert_eq!(resplit.cached, i < 2, "{percent} %");
            assert!(resplit.total_ms >= resplit.build_ms);
            assert!(report.partition.starts_with("green: encoder "), "{}", report.partition);
        }
        assert_eq!(engine.built.lock().unwrap().len(), pool.len() + 7);
        // 69 % is the 92 SMs that run already.
        assert!(split_to(69, 0).partition.starts_with("green: encoder 92 SMs, decoder 40 SMs"));
        let over = Split { backend: Backend::Green, encoder: 70, decoder: 70 };
        assert!(rig.pipeline.set_split(over).unwrap_err().to_string().contains("at most 30 %"));
        // The engine's own, those on the shelf, the one at work.
        assert!(Arc::strong_count(&engine.alive) <= 1 + 4 + 1, "{}", Arc::strong_count(&engine.alive));
        let mut chunks = 0;
        while let Ok(chunk) = rig.chunks.pop() {
            let found = (chunk.positions[0] - zero) / (one - zero);
            chunks += 1;
            assert!((found - f64::from(sent[&chunk.oldest_image_stamp])).abs() < 1e-3, "{found}");
        }
        let report = rig.pipeline.report();
        assert!(chunks > 9 && report.encode.errors + report.decode.errors == 0, "{chunks} {report:?}");
    }
}

#[test]
fn where_cameras_may_be_left_out_fewer_views_are_warm_too() {
    let dir = tempfile::tempdir().unwrap();
    let (_, policy) = synthetic_policy(dir.path());
    for (drop_lost_views, warm) in [(false, vec![2]), (true, vec![2, 1, 2])] {
        let engine = Arc::new(Canary::new(&policy));
        let mut config = config(PipelineMode::Pipelined);
        config.live.drop_lost_views = drop_lost_views;
        let _rig = Rig::start(&engine, policy.clone(), config);
        let encoded = engine.encoded.lock().unwrap().clone();
        for number in 1..=engine.built.lock().unwrap().len() {
            let views: Vec<_> = encoded.iter().filter(|e| e.0 == number).map(|e| e.2).collect();
            assert_eq!(views, warm, "encoder {number}");
        }
    }
}

#[test]
fn a_split_kept_ready_is_warm_for_the_prompt_of_today() {
    let dir = tempfile::tempdir().unwrap();
    let (_, policy) = synthetic_policy(dir.path());
    let engine = Arc::new(Canary::new(&policy));
    let rig = Rig::start(&engine, policy.clone(), config(PipelineMode::Pipelined));
    let seventy = 1 + engine.built.lock().unwrap().iter().position(|g| g.encoder == 92).unwrap();
    let prompt = "pick up the red cube and put it where it was";
    let tokens = policy.tokens(prompt, &[0.0; 7]).unwrap().len();
    rig.inputs.put_prompt(prompt);
    rig.pipeline.set_split(Split { backend: Backend::Auto, encoder: 70, decoder: 30 }).unwrap();
    let end = Instant::now() + PATIENCE;
    let of_seventy = || {
        let all = engine.encoded.lock().unwrap().clone();
        let of = |e: &Encoded| e.0 == seventy && e.3 == tokens;
        all.into_iter().filter(of).map(|(_, thread, ..)| thread).collect::<Vec<_>>()
    };
    while rig.pipeline.report().resplits == 0 || !of_seventy().iter().any(|thread| thread == "pi0_encoder") {
        assert!(Instant::now() < end, "{:?} {:?}", of_seventy(), rig.pipeline.report());
        rig.joints(&MEAN_POSE);
        rig.observe(&frame(1));
        std::thread::sleep(Duration::from_millis(1));
    }
    assert_eq!(of_seventy()[0], "pi0_builder", "the first of that length is not a frame's");
    assert!(rig.pipeline.report().last_resplit.unwrap().cached);
}

#[test]
fn without_shares_a_split_is_not_applicable() {
    let dir = tempfile::tempdir().unwrap();
    let (checkpoint, policy) = synthetic_policy(dir.path());
    let engine = Arc::new(CpuEngine::load(&checkpoint, policy.origin().into(), 1).unwrap());
    let rig = Rig::start(&engine, policy, config(PipelineMode::Pipelined));
    assert!(rig.pipeline.report().partition.contains("not applicable"), "{}", rig.pipeline.report().partition);
    rig.pipeline.set_split(Split { backend: Backend::Mps, encoder: 70, decoder: 70 }).unwrap();
}

#[test]
fn a_failed_encode_is_counted_and_the_next_observation_goes_through() {
    let dir = tempfile::tempdir().unwrap();
    let (_, policy) = synthetic_policy(dir.path());
    for mode in MODES {
        let engine = Arc::new(Canary { poison: vec![1, 2, 3, 4, 5], ..Canary::new(&policy) });
        let mut rig = Rig::start(&engine, policy.clone(), config(mode));
        rig.joints(&MEAN_POSE);
        // More failures than slots: a slot that got lost would end it.
        for value in 1..=5 {
            rig.observe(&frame(value));
            let end = Instant::now() + PATIENCE;
            while rig.pipeline.report().encode.errors < value.into() {
                assert!(Instant::now() < end);
                std::thread::sleep(Duration::from_millis(1));
            }
        }
        let stamp = rig.observe(&frame(9));
        rig.wait_for("chunk after the failures", |c| c.oldest_image_stamp == stamp);
        let report = rig.pipeline.report();
        assert_eq!(report.encode.errors, 5, "{mode:?}");
        assert!(report.last_error.is_some_and(|e| e.contains("poison 5")), "{mode:?}");
        rig.pipeline.stop();
    }
}

#[test]
fn a_camera_whose_stamps_cannot_be_true_is_dated_by_arrival() {
    let dir = tempfile::tempdir().unwrap();
    let (_, policy) = synthetic_policy(dir.path());
    let engine = Arc::new(Canary::new(&policy));
    let mut live = config(PipelineMode::Pipelined);
    live.live.max_camera_skew_ms = 10_000.0;
    let mut rig = Rig::start(&engine, policy, live);
    let before = SystemClock.ros();
    for (value, stamp) in [(1, RosTime(0)), (2, before.plus_seconds(60.0))] {
        rig.joints(&MEAN_POSE);
        rig.inputs.put_frame(0, frame(value), stamp, SystemClock.monotonic());
        rig.inputs.put_frame(1, frame(value), SystemClock.ros(), SystemClock.monotonic());
        let chunk = rig.wait_for("chunk from a camera without a clock", |_| true);
        assert!(chunk.oldest_image_stamp >= before.plus_seconds(-1.0), "{stamp:?}");
        assert!(chunk.oldest_image_stamp <= SystemClock.ros(), "{stamp:?}");
    }
    assert_eq!(rig.pipeline.report().skewed, 0);
}

#[test]
fn of_a_faster_camera_the_frame_is_taken_that_fits_the_slower_one() {
    let dir = tempfile::tempdir().unwrap();
    let (_, policy) = synthetic_policy(dir.path());
    let engine = Arc::new(Canary::new(&policy));
    let mut live = config(PipelineMode::Sequential);
    live.live.max_camera_skew_ms = 5.0;
    let mut rig = Rig::start(&engine, policy, live);
    let taken = SystemClock.ros().plus_seconds(-0.1);
    let put = |inputs: &InputSlots, camera, value, seconds| {
        inputs.put_frame(camera, frame(value), taken.plus_seconds(seconds), SystemClock.monotonic());
    };
    for (value, seconds) in [(1, 0.0), (2, 0.033), (3, 0.066)] {
        put(&rig.inputs, 0, value, seconds);
    }
    put(&rig.inputs, 1, 4, 0.036);
    rig.joints(&MEAN_POSE);
    let chunk = rig.wait_for("chunk of frames 3 ms apart", |_| true);
    assert_eq!(chunk.oldest_image_stamp, taken.plus_seconds(0.033));
    assert_eq!(rig.pipeline.report().skewed, 0);

    put(&rig.inputs, 1, 5, 0.050);
    let end = Instant::now() + PATIENCE;
    while rig.pipeline.report().skewed == 0 {
        assert!(Instant::now() < end, "no frame of the other camera is within 5 ms of this one");
        std::thread::sleep(Duration::from_millis(1));
    }
}
