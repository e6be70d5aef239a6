//! Loads the policy onto its device beside the running control loop, and makes the node ready when everything is.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use crate::control::chunk::ActionChunk;
use crate::control::{Lifecycle, PlanView};
use crate::engine::cpu::CpuEngine;
use crate::engine::cuda::CudaEngine;
use crate::engine::{Device, Engine};
use crate::error::{Blame, Fault};
use crate::model::{Checkpoint, Policy};
use crate::pipeline::{Pipeline, PipelineIo, PipelineMode, Retired};
use crate::rt::latest::Reader;

use super::core::Core;
use super::{NodeError, convert, lock};

/// What the pipeline will need.
pub(super) struct Parts {
    pub checkpoint: Checkpoint,
    pub policy: Arc<Policy>,
    pub chunks: rtrb::Producer<Arc<ActionChunk>>,
    pub retired: rtrb::Consumer<Retired>,
    pub plan: Reader<Option<PlanView>>,
    pub tap: crossbeam_channel::Sender<Arc<ActionChunk>>,
}

/// How often inputs are looked at while they are waited for.
const LOOK: Duration = Duration::from_millis(20);

/// The body of the loader thread.
pub(super) fn run(core: &Core, parts: Parts) {
    let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| load(core, parts)));
    let failure = match outcome {
        Ok(Ok(())) => return watch(core),
        Ok(Err(e)) => (e.fault(), e.to_string()),
        Err(_) => (Fault::Internal, "loading the policy panicked: see the log".into()),
    };
    tracing::error!("{}", failure.1);
    *lock(&core.failure) = Some(failure);
    core.signals.set_lifecycle(Lifecycle::Failed);
}

fn load(core: &Core, parts: Parts) -> Result<(), NodeError> {
    let settings = lock(&core.settings).clone();
    let resolved = settings.model.device.resolve()?;
    tracing::info!("device {}: {}", resolved.device, resolved.reason);
    let cores = std::thread::available_parallelism().map_or(1, |n| n.get());
    // Stages that work at the same time share the cores; one core is left to control and publishing.
    let stages = if settings.gpu.pipeline_mode == PipelineMode::Sequential { 1 } else { 2 };
    let threads = (cores.saturating_sub(1) / stages).max(1);
    let resampler = parts.policy.origin().into();
    match resolved.device {
        Device::Cuda(index) => {
            let engine = CudaEngine::load(&parts.checkpoint, resampler, index as usize)?;
            start(core, engine, parts)
        }
        Device::Auto | Device::Cpu => {
            let engine = CpuEngine::load(&parts.checkpoint, resampler, threads)?;
            start(core, engine, parts)
        }
    }
}

fn start<E: Engine>(core: &Core, engine: E, parts: Parts) -> Result<(), NodeError> {
    *lock(&core.device) = engine.describe();
    core.signals.set_lifecycle(Lifecycle::Warmup);
    let config = convert::pipeline(&lock(&core.settings));
    let io = PipelineIo {
        inputs: core.inputs.clone(),
        clock: core.clock.clone(),
        chunks: parts.chunks,
        retired: parts.retired,
        plan: parts.plan,
        epoch: core.signals.epoch.clone(),
        tap: parts.tap,
    };
    let pipeline = Pipeline::start(Arc::new(engine), parts.policy, config, io)?;
    // What was changed meanwhile.
    let settings = lock(&core.settings);
    pipeline.set_live(convert::live(&settings));
    if let Err(e) = pipeline.set_split(settings.gpu.split) {
        tracing::error!("{e}; the shares stay as they were at start");
    }
    *lock(&core.pipeline) = Some(pipeline);
    Ok(())
}

/// Makes the node active once every input has been heard and a chunk has come of them, then watches the stages for a
/// fault.
fn watch(core: &Core) {
    let stopping = || core.signals.stopping.load(Ordering::Acquire);
    while !stopping() && core.with_facts(None, super::status::missing).is_some() {
        std::thread::sleep(LOOK);
    }
    core.signals.set_lifecycle(Lifecycle::Ready);
    while !stopping() {
        if let Some(fault) = lock(&core.pipeline).as_ref().and_then(Pipeline::fault) {
            tracing::error!("{}", fault.1);
            return core.fail_inference(fault.0, fault.1);
        }
        std::thread::sleep(LOOK);
    }
}
