//! The node under a clock that the caller moves: the same slots, control loop, publisher and status, with no thread and
//! no sleep; with a policy whose stages take a given time, or one that the caller plays. For tests and evaluation.

use std::sync::Arc;
use std::time::Duration;

use super::control_loop::{ControlLoop, Turn};
use super::core::Core;
use super::publisher::Publisher;
use super::{Commands, Inputs, NodeError, Outputs, Parts, Status, convert, lock};
use crate::clock::{Clock, Monotonic};
use crate::control::chunk::ActionChunk;
use crate::control::{ControlStatus, Lifecycle, Requests, TickReport};
use crate::engine::Engine;
use crate::error::Fault;
use crate::model::{Checkpoint, Dims, Policy};
use crate::params::Settings;
use crate::pipeline::{PipelineIo, PipelineReport, StageTimes, SteppedPipeline, SteppedStages};
use crate::rt::period::Wake;
use crate::rt::signals::RequestBits;

/// A node whose periods and publishing are called one by one.
pub struct SteppedNode {
    core: Arc<Core>,
    control: ControlLoop,
    turn: Turn,
    publisher: Publisher,
    chunks: Chunks,
    period: Duration,
    scheduled: Monotonic,
}

/// Where chunks come from.
enum Chunks {
    /// The caller.
    Played,
    /// A policy.
    Decoded(Box<dyn SteppedStages>),
}

impl SteppedNode {
    /// A node that is inactive, for a policy of these dimensions that the caller plays.
    pub fn new(
        settings: Settings,
        dims: Dims,
        clock: Arc<dyn Clock>,
        outputs: Box<dyn Outputs>,
    ) -> Result<Self, NodeError> {
        Self::make(settings, dims, clock, outputs, |_| Ok(Chunks::Played))
    }

    /// The policy of a checkpoint as these settings have it; refuses cameras and joints that do not fit it.
    pub fn policy(settings: &Settings, checkpoint: &Checkpoint) -> Result<Policy, NodeError> {
        convert::policy(settings, checkpoint)
    }

    /// A node that is inactive, with a policy on an engine whose stages take `times` of the clock.
    pub fn with_policy<E: Engine>(
        settings: Settings,
        policy: Arc<Policy>,
        engine: &E,
        times: StageTimes,
        clock: Arc<dyn Clock>,
        outputs: Box<dyn Outputs>,
    ) -> Result<Self, NodeError>
    where
        SteppedPipeline<E>: 'static,
    {
        let config = convert::pipeline(&settings);
        Self::make(settings, *engine.dims(), clock, outputs, |core| {
            let io = PipelineIo {
                inputs: core.inputs.clone(),
                clock: core.clock.clone(),
                ports: core.ports.clone(),
                epoch: core.signals.epoch.clone(),
                tap: core.tap.clone(),
            };
            Ok(Chunks::Decoded(Box::new(SteppedPipeline::new(engine, policy, config, io, times)?)))
        })
    }

    fn make(
        settings: Settings,
        dims: Dims,
        clock: Arc<dyn Clock>,
        outputs: Box<dyn Outputs>,
        chunks_from: impl FnOnce(&Core) -> Result<Chunks, NodeError>,
    ) -> Result<Self, NodeError> {
        let (period, scheduled) = (settings.timing.period(), clock.monotonic());
        let Parts { core, control, publisher, .. } = Parts::new(settings, dims.horizon, clock, outputs, None)?;
        let chunks = chunks_from(&core)?;
        Ok(Self { core, control, turn: Turn::new(scheduled), publisher, chunks, period, scheduled })
    }

    /// Where subscriptions put what they hear.
    pub fn inputs(&self) -> Inputs {
        Inputs(self.core.clone())
    }

    /// What services can ask for; their answers need periods that another thread calls.
    pub fn commands(&self) -> Commands {
        Commands(self.core.clone())
    }

    /// Asks as the services do, without waiting for an answer.
    pub fn ask(&self, r: Requests) {
        let bits = [
            (r.enable, RequestBits::ENABLE),
            (r.disable, RequestBits::DISABLE),
            (r.stop, RequestBits::STOP),
            (r.reset, RequestBits::RESET),
        ];
        for (_, bit) in bits.into_iter().filter(|(asked, _)| *asked) {
            self.core.signals.requests.ask(bit);
        }
    }

    /// What the loader says of the policy.
    pub fn set_lifecycle(&self, lifecycle: Lifecycle) {
        self.core.signals.set_lifecycle(lifecycle);
    }

    /// A stage has ended for good, and why.
    pub fn fail_inference(&self, why: &str) {
        self.core.fail_inference(Fault::Internal, why.into());
    }

    /// A chunk from the decoder that the caller plays; false if it finds no room, or there is a policy.
    pub fn put_chunk(&mut self, chunk: ActionChunk) -> bool {
        let Chunks::Played = &self.chunks else { return false };
        let mut ports = lock(&self.core.ports);
        while ports.retired.pop().is_ok() {}
        ports.chunks.push(Arc::new(chunk)).is_ok()
    }

    /// Lets the policy's stages start and finish what they can at the clock's time.
    pub fn think(&mut self) {
        if let Chunks::Decoded(stages) = &mut self.chunks {
            stages.advance();
        }
    }

    /// When the policy's stages have something to do next, if nothing comes in before.
    pub fn due(&self) -> Option<Monotonic> {
        match &self.chunks {
            Chunks::Played => None,
            Chunks::Decoded(stages) => stages.due(),
        }
    }

    /// Why the policy's stages cannot go on, if they cannot, and who has to act.
    pub fn fault(&self) -> Option<(Fault, String)> {
        match &self.chunks {
            Chunks::Played => None,
            Chunks::Decoded(stages) => stages.fault(),
        }
    }

    /// Chunks that the policy has made.
    pub fn chunks(&self) -> u64 {
        match &self.chunks {
            Chunks::Played => 0,
            Chunks::Decoded(stages) => stages.chunks(),
        }
    }

    /// What the policy's stages have done; nothing without a policy.
    pub fn pipeline_report(&self) -> PipelineReport {
        match &self.chunks {
            Chunks::Played => PipelineReport::default(),
            Chunks::Decoded(stages) => stages.report(),
        }
    }

    /// The epoch that new chunks carry.
    pub fn epoch(&self) -> u64 {
        self.core.signals.epoch.current()
    }

    /// One period of the control thread at the clock's time, `skipped` periods having passed without one. What its
    /// tick did, or `None` if there was no window to write to.
    pub fn control(&mut self, skipped: u64) -> Option<TickReport> {
        let periods = u32::try_from(skipped.saturating_add(1)).unwrap_or(u32::MAX);
        self.scheduled = self.scheduled + self.period.saturating_mul(periods);
        let wake = Wake { scheduled: self.scheduled, woke: self.core.clock.monotonic(), skipped };
        self.control.period(&wake, &mut self.turn)
    }

    /// One round of the publisher thread.
    pub fn publish(&mut self) {
        self.publisher.round();
    }

    /// The whole node at this moment.
    pub fn status(&self) -> Status {
        self.core.status()
    }

    /// The control core at this moment, with the periods for which there was no window.
    pub fn control_status(&self) -> ControlStatus {
        self.core.snapshot().status
    }
}
