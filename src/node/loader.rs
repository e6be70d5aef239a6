//! Loads the policy onto its device beside the running control loop, and starts the stages, which wait.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use crate::control::{Controller, Lifecycle};
use crate::engine::cpu::CpuEngine;
use crate::engine::cuda::CudaEngine;
use crate::engine::{Device, Engine};
use crate::model::{Checkpoint, Policy};
use crate::pipeline::{Pipeline, PipelineIo, PipelineMode};

use super::control_loop::Change;
use super::core::Core;
use super::{NodeError, convert, lock};

/// Checks the checkpoint against the settings, loads it and warms it up.
pub(super) fn configure(core: &Core) -> Result<(), NodeError> {
    *lock(&core.not_configured) = None;
    let settings = lock(&core.settings).clone();
    let checkpoint = Checkpoint::open(&settings.model.checkpoint)?;
    if settings.process.lock_memory {
        checkpoint.unpin()?;
    }
    let policy = convert::policy(&settings, &checkpoint)?;
    fit(core, checkpoint.dims().horizon)?;

    let resolved = settings.model.device.resolve()?;
    tracing::info!("device {}: {}", resolved.device, resolved.reason);
    let cores = std::thread::available_parallelism().map_or(1, |n| n.get());
    // Stages that work at the same time share the cores; one core is left to control and publishing.
    let stages = if settings.gpu.pipeline_mode == PipelineMode::Sequential { 1 } else { 2 };
    let threads = (cores.saturating_sub(1) / stages).max(1);
    let resampler = policy.origin().into();
    match resolved.device {
        Device::Cuda(index) => start(core, CudaEngine::load(&checkpoint, resampler, index as usize)?, policy),
        Device::Auto | Device::Cpu => start(core, CpuEngine::load(&checkpoint, resampler, threads)?, policy),
    }
}

/// Gives the control loop a controller for chunks of this policy's horizon.
fn fit(core: &Core, horizon: usize) -> Result<(), NodeError> {
    let settings = lock(&core.settings);
    if core.horizon.load(Ordering::Acquire) != horizon {
        core.send(Change::Controller(Box::new(Controller::new(convert::control(&settings, horizon))?)))?;
        core.horizon.store(horizon, Ordering::Release);
    }
    Ok(())
}

fn start<E: Engine>(core: &Core, engine: E, policy: Policy) -> Result<(), NodeError> {
    *lock(&core.device) = engine.describe();
    core.signals.set_lifecycle(Lifecycle::Warmup);
    let config = convert::pipeline(&lock(&core.settings));
    let io = PipelineIo {
        inputs: core.inputs.clone(),
        clock: core.clock.clone(),
        ports: core.ports.clone(),
        epoch: core.signals.epoch.clone(),
        tap: core.tap.clone(),
    };
    let pipeline = Pipeline::start(Arc::new(engine), Arc::new(policy), config, io)?;
    // Under one lock with what sets them: no change of settings during the warm-up is lost.
    let settings = lock(&core.settings);
    pipeline.set_live(convert::live(&settings));
    if let Err(e) = pipeline.set_split(settings.gpu.split) {
        tracing::error!("{e}; the shares stay as they were at start");
    }
    *lock(&core.pipeline) = Some(pipeline);
    Ok(())
}
