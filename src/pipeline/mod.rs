//! The two stages on their threads: newest observation in, dated action chunks out.
//!
//! ```text
//! frames, prompt ─► encoder thread ── newest filled slot ─► decoder thread ─► chunk ring ─► control thread
//!                        ▲                                      │   ▲
//!                        └───────────── free slots ◄────────────┘   └── newest joint state, running plan
//! ```
//!
//! A cache slot is a value that moves, so no stage can touch a slot that the other one uses. How many slots go round
//! decides what overlaps: one makes the stages take turns (`sequential`), three let them work at the same time.

pub mod inputs;
pub mod joint_map;
pub mod leftover;
pub mod mailbox;
mod noise;
mod report;
mod resplit;
mod stages;
mod stepped;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Instant;

use crate::choice::choice;
use crate::clock::{Clock, Monotonic};
use crate::control::PlanView;
use crate::control::chunk::ActionChunk;
use crate::engine::partition::{Decision, Offer, Refusal, Split};
use crate::engine::{Engine, EngineError, GuidanceSchedule};
use crate::error::{Blame, Fault};
use crate::model::{ModelError, Policy};
use crate::rt::latest::Reader;
use crate::rt::rights;
use crate::rt::signals::Epoch;

use inputs::{InputSlots, KeptFrames};
use joint_map::{JointBinding, JointMap};
use mailbox::Mailbox;
pub use report::{PipelineReport, Resplit, StageReport};
use resplit::{Builder, Message};
pub use stepped::{StageTimes, SteppedPipeline, SteppedStages};

choice! {
    /// How encoder and decoder share time.
    PipelineMode {
        /// Encode, then decode: shortest latency of one observation.
        Sequential = "sequential",
        /// Encode the next observation while decoding this one: highest chunk rate.
        Pipelined = "pipelined",
        /// Decode again and again on the newest cache with the newest joint state; only new frames are encoded.
        DualRate = "dual_rate",
    }
}

impl PipelineMode {
    /// Cache slots that go round.
    fn slots(self) -> usize {
        match self {
            PipelineMode::Sequential => 1,
            PipelineMode::Pipelined | PipelineMode::DualRate => 3,
        }
    }
}

/// One camera as the pipeline needs it.
#[derive(Debug, Clone, PartialEq)]
pub struct CameraBinding {
    /// Its name, for messages.
    pub name: String,
    /// The policy's image key.
    pub model_key: String,
}

/// Guidance of the next chunk by the running one.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct RtcConfig {
    /// Weights between committed and free steps.
    pub schedule: GuidanceSchedule,
    /// Step at which guidance ends; 0 means as far as the leftover reaches.
    pub execution_horizon: usize,
    /// Upper bound of the gain.
    pub max_weight: f32,
}

/// What may change while the pipeline runs.
#[derive(Debug, Clone, PartialEq)]
pub struct LiveConfig {
    /// Older frames are not encoded, ms; one per camera.
    pub camera_max_age_ms: Vec<f64>,
    /// Whether a stale camera is left out (true) or stops the encoder (false).
    pub drop_lost_views: bool,
    /// Largest difference of stamps within one observation, ms.
    pub max_camera_skew_ms: f64,
    /// Older joint states are not decoded from, ms.
    pub max_joint_state_age_ms: f64,
    /// Whether all chunks start from the same noise.
    pub hold_noise: bool,
    /// Policy steps between adopted chunks.
    pub replan_steps: usize,
    /// Guidance, if the seam asks for it.
    pub rtc: Option<RtcConfig>,
    /// Flow-matching steps.
    pub steps: usize,
    /// Latest age of a chunk when it is ready, observation to chunk, ms; 0 for no budget.
    pub chunk_budget_ms: f64,
}

/// What is fixed at start.
#[derive(Debug, Clone, PartialEq)]
pub struct PipelineConfig {
    /// How the stages share time.
    pub mode: PipelineMode,
    /// How they share the device; may be changed later.
    pub split: Split,
    /// In the order of the input slots.
    pub cameras: Vec<CameraBinding>,
    /// Joint names in robot order, for messages.
    pub joint_names: Vec<String>,
    /// In the same order.
    pub joints: Vec<JointBinding>,
    /// Seconds between actions.
    pub dt: f64,
    /// Seed of the noise.
    pub seed: u64,
    /// CPU of the encoder thread and of the decoder thread, where given.
    pub cpus: [Option<usize>; 2],
    /// Whether the stages begin at once, or wait for [`Pipeline::resume`].
    pub paused: bool,
    /// Initial values of what may change.
    pub live: LiveConfig,
}

/// Both ends that connect the pipeline to the rest of the node.
pub struct PipelineIo {
    /// Newest observations.
    pub inputs: Arc<InputSlots>,
    /// Stamps and latencies.
    pub clock: Arc<dyn Clock>,
    /// The way to the control thread and back.
    pub ports: Arc<Mutex<Ports>>,
    /// Reset epoch; chunks carry the one they were started in.
    pub epoch: Arc<Epoch>,
    /// Every chunk, for whoever wants to look; a full channel drops.
    pub tap: crossbeam_channel::Sender<Arc<ActionChunk>>,
}

/// What joins a decoder to the control thread. It outlives the pipeline, so that the next one goes on with it; the lock
/// is the decoder's alone.
pub struct Ports {
    /// Chunks to the control thread.
    pub chunks: rtrb::Producer<Arc<ActionChunk>>,
    /// Chunks the control thread has done with, to be freed by the decoder.
    pub retired: rtrb::Consumer<Retired>,
    /// The plan in execution.
    pub plan: Reader<Option<PlanView>>,
    /// Sequence of the last chunk.
    pub sequence: u64,
}

/// A chunk the control thread has done with.
#[derive(Debug)]
pub struct Retired {
    /// The chunk, freed by whoever takes this.
    pub chunk: Arc<ActionChunk>,
    /// When the control thread took it.
    pub taken: Monotonic,
}

/// Why a pipeline cannot start or go on.
#[derive(Debug, thiserror::Error)]
pub enum PipelineError {
    /// Parameters and checkpoint do not fit.
    #[error("{0}")]
    Config(String),
    /// The device.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// The checkpoint.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// A thread could not be started.
    #[error("cannot start thread '{name}': {source}; raise the limit of threads (ulimit -u)")]
    Thread {
        /// Its name.
        name: &'static str,
        /// Why.
        source: std::io::Error,
    },
}

impl Blame for PipelineError {
    fn fault(&self) -> Fault {
        match self {
            PipelineError::Config(_) => Fault::Input,
            PipelineError::Engine(e) => e.fault(),
            PipelineError::Model(e) => e.fault(),
            PipelineError::Thread { .. } => Fault::Machine,
        }
    }
}

/// What both stages know.
struct Shared {
    config: PipelineConfig,
    policy: Arc<Policy>,
    inputs: Arc<InputSlots>,
    clock: Arc<dyn Clock>,
    epoch: Arc<Epoch>,
    live: Mutex<Arc<LiveConfig>>,
    report: Mutex<PipelineReport>,
    stopping: AtomicBool,
    paused: AtomicBool,
    /// Input slots of the valid views, in the model's order.
    views: Vec<usize>,
    joints: JointMap,
}

impl Shared {
    fn stopping(&self) -> bool {
        self.stopping.load(Ordering::Acquire)
    }

    fn paused(&self) -> bool {
        self.paused.load(Ordering::Acquire)
    }

    fn live(&self) -> Arc<LiveConfig> {
        self.live.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn report<R>(&self, f: impl FnOnce(&mut PipelineReport) -> R) -> R {
        f(&mut self.report.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl PipelineConfig {
    /// Whether cameras, joints and mode fit the policy; if not, why.
    pub fn fits(&self, policy: &Policy) -> Result<(), PipelineError> {
        bind(self, policy).map(drop)
    }
}

/// Input slots of the valid views in the model's order, and the joints in the policy's; refuses what does not fit.
fn bind(config: &PipelineConfig, policy: &Policy) -> Result<(Vec<usize>, JointMap), PipelineError> {
    let views = stages::order_views(&config.cameras, policy.cameras())?;
    let joints = JointMap::new(&config.joint_names, config.joints.clone(), policy.action_len(), "action")?;
    if policy.state_len() != policy.action_len() {
        return Err(PipelineError::Config(format!(
            "the policy's state has {} values and its action {}: only policies that command the joints they measure can be run",
            policy.state_len(),
            policy.action_len()
        )));
    }
    stages::check_mode(config, policy.dims())?;
    Ok((views, joints))
}

/// The running stages.
pub struct Pipeline {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
    close: Box<dyn Fn() + Send + Sync>,
    offer: Option<Offer>,
    ask: Box<dyn Fn(Decision) + Send + Sync>,
    _kept: KeptFrames,
}

impl Pipeline {
    /// Checks the configuration against the policy, warms both stages up, then starts their threads.
    /// Nothing of the warm-up reaches the statistics or the control thread.
    pub fn start<E: Engine>(
        engine: Arc<E>,
        policy: Arc<Policy>,
        config: PipelineConfig,
        io: PipelineIo,
    ) -> Result<Self, PipelineError> {
        let (views, joints) = bind(&config, &policy)?;
        let decision = resplit::decide(engine.offer(), config.mode == PipelineMode::Sequential, config.split);
        let decision = decision.map_err(EngineError::from)?;
        // One more than go round: the builder warms new stages up with it.
        let mut slots = (0..=config.mode.slots())
            .map(|_| engine.cache(views.len(), policy.dims().max_tokens))
            .collect::<Result<Vec<_>, _>>()?;
        let shared = Arc::new(Shared {
            live: Mutex::new(Arc::new(config.live.clone())),
            report: Mutex::new(PipelineReport { partition: decision.to_string(), ..Default::default() }),
            stopping: AtomicBool::new(false),
            paused: AtomicBool::new(config.paused),
            policy,
            inputs: io.inputs,
            clock: io.clock,
            epoch: io.epoch,
            views,
            joints,
            config,
        });

        // Before the warm-up, which takes the newest frames.
        let kept = shared.inputs.keep_frames_in(engine.frame_memory());
        let offer = engine.offer().cloned();
        tracing::info!("partition: {decision}");
        let Some(spare) = slots.pop() else { return Err(PipelineError::Config("no cache slots".into())) };
        let (encoder, decoder, builder, to_builder) = Builder::start(engine, shared.clone(), spare, decision.grant)?;
        let (free_tx, free_rx) = crossbeam_channel::unbounded();
        for slot in slots {
            // The receiver lives in this function: the send cannot fail.
            let _ = free_tx.send(slot);
        }
        let filled = Arc::new(Mailbox::default());
        let encode = stages::EncodeStage {
            shared: shared.clone(),
            encoder,
            free: free_rx,
            give_back: free_tx.clone(),
            filled: filled.clone(),
            prompt: None,
        };
        let decode = stages::DecodeStage::new(shared.clone(), decoder, free_tx, filled.clone(), io.ports, io.tap);
        let close = {
            let (shared, filled, to_builder) = (shared.clone(), filled, to_builder.clone());
            Box::new(move || {
                shared.stopping.store(true, Ordering::Release);
                let _ = to_builder.send(Message::Stop);
                filled.close();
                shared.inputs.wake();
            })
        };
        // Where the builder has ended, nothing is to be built any more.
        let ask = Box::new(move |decision| _ = to_builder.send(Message::Ask(decision, Instant::now())));
        let mut pipeline = Self { shared, threads: Vec::new(), close, offer, ask, _kept: kept };
        let [encoder_cpu, decoder_cpu] = pipeline.shared.config.cpus;
        pipeline.spawn("pi0_encoder", encoder_cpu, move || encode.run())?;
        pipeline.spawn("pi0_decoder", decoder_cpu, move || decode.run())?;
        pipeline.spawn("pi0_builder", None, move || builder.run())?;
        Ok(pipeline)
    }

    fn spawn(
        &mut self,
        name: &'static str,
        cpu: Option<usize>,
        body: impl FnOnce() + Send + 'static,
    ) -> Result<(), PipelineError> {
        let shared = self.shared.clone();
        let guarded = move || {
            if let Some(cpu) = cpu {
                let granted = rights::affinity(cpu);
                tracing::info!("{name}: {granted}");
                shared.report(|r| r.rights.push((format!("{name}.cpu"), granted.to_string())));
            }
            if std::panic::catch_unwind(std::panic::AssertUnwindSafe(body)).is_err() {
                let what = format!("the {name} thread panicked: see the log; restart the node");
                shared.report(|r| r.fault = Some((Fault::Internal, what)));
            }
        };
        let thread = std::thread::Builder::new()
            .name(name.into())
            .spawn(guarded)
            .map_err(|source| PipelineError::Thread { name, source })?;
        self.threads.push(thread);
        Ok(())
    }

    /// Figures and faults so far.
    pub fn report(&self) -> PipelineReport {
        self.shared.report(|r| r.clone())
    }

    /// Why the pipeline cannot go on, if it cannot, and who has to act.
    pub fn fault(&self) -> Option<(Fault, String)> {
        self.shared.report(|r| r.fault.clone())
    }

    /// Changes what may change; in force from the next chunk on.
    pub fn set_live(&self, live: LiveConfig) {
        *self.shared.live.lock().unwrap_or_else(PoisonError::into_inner) = Arc::new(live);
    }

    /// Both stages stand still after the work in hand, keeping their memory.
    pub fn pause(&self) {
        self.shared.paused.store(true, Ordering::Release);
    }

    /// Both stages go on with the newest observation.
    pub fn resume(&self) {
        self.shared.paused.store(false, Ordering::Release);
        self.shared.inputs.wake();
    }

    /// What `split` would give each stage here, or why it cannot be had and what could.
    pub fn decide(&self, split: Split) -> Result<Decision, Refusal> {
        resplit::decide(self.offer.as_ref(), self.shared.config.mode == PipelineMode::Sequential, split)
    }

    /// Other shares, in force between two frames as soon as their stages are ready; [`report`](Self::report) says when.
    pub fn set_split(&self, split: Split) -> Result<Decision, Refusal> {
        let decision = self.decide(split)?;
        (self.ask)(decision.clone());
        Ok(decision)
    }

    /// Ends both stages after the work in hand; returns when their threads have ended.
    pub fn stop(self) {
        // Drop does it.
    }
}

impl Drop for Pipeline {
    fn drop(&mut self) {
        (self.close)();
        for thread in self.threads.drain(..) {
            // A panic was caught and reported inside the thread.
            let _ = thread.join();
        }
    }
}
