//! Faults of encoder and decoder on their own threads while a robot moves: a stage hangs, fails, or answers what is
//! not finite. The real policy, pipeline and controller; only the stages are told to misbehave.

mod control_common;

use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use control_common::{Played, limits};
use pi0_mps::clock::{Clock, RosTime};
use pi0_mps::control::*;
use pi0_mps::engine::cpu::CpuEngine;
use pi0_mps::engine::partition::{Backend, Split};
use pi0_mps::engine::{DecodeInput, Decoder, EncodeInput, Encoder, Engine, EngineError, View};
use pi0_mps::model::synthetic::{self, JOINT_NAMES, MEAN_POSE};
use pi0_mps::model::{Checkpoint, Dims, Frame, Policy, PolicyOptions};
use pi0_mps::pipeline::inputs::InputSlots;
use pi0_mps::pipeline::joint_map::JointBinding;
use pi0_mps::pipeline::{
    CameraBinding, LiveConfig, Pipeline, PipelineConfig, PipelineIo, PipelineMode, Ports, Retired,
};
use pi0_mps::rt::SystemClock;
use pi0_mps::rt::latest::{Writer, latest};
use pi0_mps::rt::signals::Epoch;

const PATIENCE: Duration = Duration::from_secs(120);
const PERIOD: f64 = 0.02;
const DT: f64 = 1.0 / 30.0;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
enum Trouble {
    No,
    /// Does not return while it lasts.
    EncoderHangs,
    /// Is given an image that is not finite, which it refuses.
    EncoderFails,
    DecoderHangs,
    /// Is given a joint state that is not finite, which it refuses.
    DecoderFails,
    /// One action of one joint; everything else is good.
    OneNan,
    AllInfinite,
}

use Trouble::*;

/// What the stages are told, from the test's thread.
#[derive(Clone, Default)]
struct Told(Arc<AtomicU8>);

impl Told {
    fn tell(&self, trouble: Trouble) {
        self.0.store(trouble as u8, Ordering::Release);
    }

    fn is(&self, trouble: Trouble) -> bool {
        self.0.load(Ordering::Acquire) == trouble as u8
    }

    /// Stands still as long as it is told to.
    fn hang(&self, trouble: Trouble) {
        while self.is(trouble) {
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

/// Ends the trouble with the test, so that stages which hang can be joined.
struct Voice(Told);

impl Drop for Voice {
    fn drop(&mut self) {
        self.0.tell(No);
    }
}

/// The engine, with stages that can be told to misbehave.
struct Troubled(CpuEngine, Told);

struct Stage<S>(S, Told);

type Cache = <CpuEngine as Engine>::Cache;

impl Engine for Troubled {
    type Cache = Cache;
    type Encoder = Stage<<CpuEngine as Engine>::Encoder>;
    type Decoder = Stage<<CpuEngine as Engine>::Decoder>;

    fn dims(&self) -> &Dims {
        self.0.dims()
    }

    fn describe(&self) -> String {
        self.0.describe()
    }

    fn cache(&self, views: usize, tokens: usize) -> Result<Cache, EngineError> {
        self.0.cache(views, tokens)
    }

    fn stages(&self) -> Result<(Self::Encoder, Self::Decoder), EngineError> {
        let (encoder, decoder) = self.0.stages()?;
        Ok((Stage(encoder, self.1.clone()), Stage(decoder, self.1.clone())))
    }
}

impl<E: Encoder<Cache = Cache>> Encoder for Stage<E> {
    type Cache = Cache;

    fn encode(&mut self, input: &EncodeInput<'_>, cache: &mut Cache) -> Result<(), EngineError> {
        self.1.hang(EncoderHangs);
        if self.1.is(EncoderFails) {
            let planes = vec![f32::NAN; 3 * 224 * 224];
            let views = vec![View::Planes(&planes); input.views.len()];
            return self.0.encode(&EncodeInput { views: &views, ..*input }, cache);
        }
        self.0.encode(input, cache)
    }

    fn encode_with_embeddings(&mut self, i: &EncodeInput<'_>, cache: &mut Cache) -> Result<Vec<f32>, EngineError> {
        self.0.encode_with_embeddings(i, cache)
    }
}

impl<D: Decoder<Cache = Cache>> Decoder for Stage<D> {
    type Cache = Cache;

    fn decode(&mut self, cache: &Cache, input: &DecodeInput<'_>, actions: &mut [f32]) -> Result<(), EngineError> {
        self.1.hang(DecoderHangs);
        if self.1.is(DecoderFails) {
            let state = vec![f32::NAN; input.state.len()];
            return self.0.decode(cache, &DecodeInput { state: &state, ..*input }, actions);
        }
        self.0.decode(cache, input, actions)?;
        if self.1.is(OneNan) {
            actions[0] = f32::NAN;
        }
        if self.1.is(AllInfinite) {
            actions.fill(f32::INFINITY);
        }
        Ok(())
    }

    fn decode_with_velocities(
        &mut self,
        cache: &Cache,
        input: &DecodeInput<'_>,
        actions: &mut [f32],
    ) -> Result<Vec<f32>, EngineError> {
        self.0.decode_with_velocities(cache, input, actions)
    }
}

/// A moving robot: the stages on their threads, the controller ticked here.
struct Rig {
    /// Before the pipeline, which waits for its stages.
    voice: Voice,
    inputs: Arc<InputSlots>,
    chunks: rtrb::Consumer<Arc<ActionChunk>>,
    retired: rtrb::Producer<Retired>,
    epoch: Arc<Epoch>,
    plan: Writer<Option<PlanView>>,
    pipeline: Pipeline,
    controller: Controller,
    window: Window,
    robot: Played,
    last: RosTime,
    pictures: u8,
}

impl Rig {
    fn start(mode: PipelineMode) -> Self {
        let dir = tempfile::tempdir().unwrap();
        synthetic::write(dir.path(), 3).unwrap();
        let checkpoint = Checkpoint::open(dir.path()).unwrap();
        let policy = Arc::new(Policy::open(&checkpoint, dir.path(), &PolicyOptions::default()).unwrap());
        let told = Told::default();
        let engine = CpuEngine::load(&checkpoint, policy.origin().into(), 1).unwrap();
        let engine = Arc::new(Troubled(engine, told.clone()));
        let names = JOINT_NAMES.map(String::from).to_vec();
        let camera = |name: &str| CameraBinding { name: name.into(), model_key: format!("observation.images.{name}") };
        let config = PipelineConfig {
            mode,
            split: Split { backend: Backend::Auto, encoder: 50, decoder: 50 },
            cameras: vec![camera("base"), camera("wrist")],
            joint_names: names.clone(),
            joints: (0..7).map(|index| JointBinding { index, scale: 1.0, offset: 0.0 }).collect(),
            dt: DT,
            seed: 5,
            cpus: [None; 2],
            paused: false,
            live: LiveConfig {
                camera_max_age_ms: vec![60_000.0; 2],
                drop_lost_views: false,
                max_camera_skew_ms: 60_000.0,
                max_joint_state_age_ms: 60_000.0,
                hold_noise: false,
                replan_steps: 10,
                rtc: None,
                steps: 2,
                chunk_budget_ms: 0.0,
            },
        };
        let (inputs, _control) = InputSlots::new(2, &names, "pick up the cube");
        let inputs = Arc::new(inputs);
        let (to_control, chunks) = rtrb::RingBuffer::new(16);
        let (back, retired) = rtrb::RingBuffer::new(32);
        let (plan, plan_reader) = latest(None::<PlanView>);
        let (tap, _) = crossbeam_channel::bounded(1);
        let epoch = Arc::new(Epoch::default());
        let io = PipelineIo {
            inputs: inputs.clone(),
            clock: Arc::new(SystemClock),
            ports: Arc::new(Mutex::new(Ports { chunks: to_control, retired, plan: plan_reader, sequence: 0 })),
            epoch: epoch.clone(),
            tap,
        };
        let pipeline = Pipeline::start(engine, policy, config, io).unwrap();
        let mut config = ControlConfig::new(names, PERIOD, DT, 50);
        for (joint, q) in config.joints.iter_mut().zip(MEAN_POSE) {
            let reach = limits(2.0, 8.0).unwrap();
            joint.limits = Some(JointLimits { min_position: q - 1.0, max_position: q + 1.0, ..reach });
        }
        // However busy the machine: what is judged here is what comes, not how soon.
        (config.max_chunk_age, config.max_image_age) = (60.0, 60.0);
        config.replan_steps = 10;
        let controller = Controller::new(config).unwrap();
        let last = SystemClock.ros();
        Self {
            voice: Voice(told),
            inputs,
            chunks,
            retired: back,
            epoch,
            plan,
            pipeline,
            window: controller.window(),
            controller,
            robot: Played::hold(last, &MEAN_POSE, PERIOD),
            last,
            pictures: 0,
        }
    }

    /// One period of everything, every window checked.
    fn step(&mut self, enable: bool) -> TickReport {
        std::thread::sleep(Duration::from_secs_f64(PERIOD));
        let (now, mono) = (SystemClock.ros(), SystemClock.monotonic());
        let skipped = (now.seconds_since(self.last) / PERIOD).floor().max(1.0) as u64 - 1;
        self.last = now;
        let (pose, velocity) = self.robot.at(now);
        self.inputs.put_joints(&JOINT_NAMES.map(String::from), &pose, now, mono);
        self.pictures = self.pictures.wrapping_add(1);
        for camera in 0..2 {
            let frame = Frame::new(32, 32, 96, "rgb8", vec![self.pictures; 32 * 32 * 3]).unwrap();
            self.inputs.put_frame(camera, frame, now, mono);
        }
        let mut chunk = None;
        if let Ok(newer) = self.chunks.pop() {
            chunk = Some(newer.clone());
            let _ = self.retired.push(Retired { chunk: newer, taken: mono });
        }
        let input = TickInput {
            ros_now: now,
            mono_now: mono,
            skipped,
            measured: Measured {
                positions: JointVector::from_slice(&pose).unwrap(),
                ages: JointVector::zeros(pose.len()),
                arrived: [mono; MAX_JOINTS],
            },
            inputs: InputHealth::Ok,
            lifecycle: Lifecycle::Ready,
            chunk: chunk.as_deref(),
            requests: Requests { enable, ..Requests::default() },
        };
        let report = self.controller.tick(&input, &mut self.window);
        self.epoch.set(self.controller.epoch());
        self.plan.put(self.controller.status().plan);
        if report.published {
            let w = &self.window;
            let mut played = Played::hold(now, if report.restarted { w.now().0 } else { &pose }, PERIOD);
            if !report.restarted {
                played.v[0] = velocity;
            }
            played.first = w.seconds_from_start(0);
            for i in 0..w.points() {
                played.q.push(w.positions(i).to_vec());
                played.v.push(w.velocities(i).to_vec());
            }
            assert_eq!(played.violation(self.controller.config()), None, "{report:?}");
            self.robot = played;
        }
        let c = self.controller.status().counters;
        let settled = c.adopted + c.superseded + c.refused_total() + c.discarded;
        assert!(c.chunks == settled || c.chunks == settled + 1, "{c:?}");
        assert_eq!(c.ticks, c.published + c.skipped + c.unarmed, "{c:?}");
        report
    }

    fn until(&mut self, what: &str, mut reached: impl FnMut(&Self) -> bool) {
        let end = Instant::now() + PATIENCE;
        while !reached(self) {
            self.step(false);
            let status = self.controller.status();
            assert!(status.mode.armed(), "{what}: disarmed, {:?}", status.reason);
            let error = || self.pipeline.report().last_error;
            assert!(Instant::now() < end, "not {what}: mode {}, {:?}, {:?}", status.mode, status.counters, error());
        }
    }

    fn mode(&self) -> Mode {
        self.controller.mode()
    }

    fn armed(mode: PipelineMode) -> Self {
        let mut rig = Self::start(mode);
        let end = Instant::now() + PATIENCE;
        while !rig.step(rig.controller.status().counters.chunks > 0).mode.armed() {
            let waiting = || rig.pipeline.report().waiting_for;
            assert!(Instant::now() < end, "not armed: {:?}", waiting());
        }
        rig.until("following", |rig| rig.mode() == Mode::Run && rig.controller.status().counters.adopted > 2);
        rig
    }
}

/// Of the refusals, those of chunks that are not finite.
fn not_finite(rig: &Rig) -> u64 {
    rig.controller.status().counters.refused[ChunkRefusal::NonFinite { joint: 0, step: 0 }.kind()]
}

/// The plan is played to its end, then it decelerates and holds, armed; and goes on by itself when the trouble is over.
fn coasts_and_goes_on(mode: PipelineMode, trouble: Trouble) {
    let mut rig = Rig::armed(mode);
    rig.voice.0.tell(trouble);
    rig.until(&format!("at rest under {trouble:?}"), |rig| {
        rig.mode() == Mode::Coast && rig.robot.at(rig.last).1.iter().all(|v| *v == 0.0)
    });
    let (held, adopted) = (rig.robot.at(rig.last).0, rig.controller.status().counters.adopted);
    for _ in 0..20 {
        rig.step(false);
    }
    assert_eq!(rig.mode(), Mode::Coast, "{trouble:?}");
    assert_eq!(rig.controller.status().reason, Some(Reason::Starved));
    assert_eq!(rig.robot.at(rig.last).0, held, "{trouble:?}: it holds still");
    assert_eq!(rig.controller.status().counters.adopted, adopted);
    let report = rig.pipeline.report();
    let error = report.last_error.unwrap_or_default();
    match trouble {
        EncoderFails => assert!(report.encode.errors > 0 && error.contains("image planes"), "{error}"),
        DecoderFails => assert!(report.decode.errors > 0 && error.contains("state"), "{error}"),
        OneNan | AllInfinite => assert!(not_finite(&rig) > 0, "{trouble:?}: {error}"),
        No | EncoderHangs | DecoderHangs => {
            assert_eq!((report.encode.errors, report.decode.errors, not_finite(&rig)), (0, 0, 0))
        }
    }
    rig.voice.0.tell(No);
    rig.until(&format!("going on after {trouble:?}"), |rig| {
        rig.mode() == Mode::Run && rig.controller.status().counters.adopted > adopted + 2
    });
    rig.pipeline.stop();
}

#[test]
fn an_encoder_that_hangs_or_fails_leaves_the_robot_holding_and_it_goes_on_afterwards() {
    coasts_and_goes_on(PipelineMode::Pipelined, EncoderHangs);
    coasts_and_goes_on(PipelineMode::Sequential, EncoderFails);
}

#[test]
fn a_decoder_that_hangs_or_fails_leaves_the_robot_holding_and_it_goes_on_afterwards() {
    coasts_and_goes_on(PipelineMode::Pipelined, DecoderHangs);
    coasts_and_goes_on(PipelineMode::DualRate, DecoderFails);
}

#[test]
fn nothing_of_a_chunk_that_is_not_finite_is_executed() {
    coasts_and_goes_on(PipelineMode::DualRate, OneNan);
    coasts_and_goes_on(PipelineMode::Pipelined, AllInfinite);
}
