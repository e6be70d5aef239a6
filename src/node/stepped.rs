//! The node under a clock that the caller moves: the same slots, control loop, publisher and status, with no thread, no
//! policy and no sleep. For tests and replay.

use std::sync::Arc;
use std::time::Duration;

use super::control_loop::{ControlLoop, Turn};
use super::core::Core;
use super::publisher::Publisher;
use super::{Commands, Inputs, NodeError, Outputs, Parts, Status};
use crate::clock::{Clock, Monotonic};
use crate::control::chunk::ActionChunk;
use crate::control::{ControlStatus, Lifecycle, PlanView, Requests, TickReport};
use crate::error::Fault;
use crate::model::Dims;
use crate::params::Settings;
use crate::pipeline::{PipelineIo, Retired};
use crate::rt::latest::Reader;
use crate::rt::period::Wake;
use crate::rt::signals::RequestBits;

/// A node whose periods and publishing are called one by one.
pub struct SteppedNode {
    core: Arc<Core>,
    control: ControlLoop,
    turn: Turn,
    publisher: Publisher,
    ports: Option<Ports>,
    period: Duration,
    scheduled: Monotonic,
}

/// The decoder's ends of the node.
struct Ports {
    chunks: rtrb::Producer<Arc<ActionChunk>>,
    retired: rtrb::Consumer<Retired>,
    plan: Reader<Option<PlanView>>,
    tap: crossbeam_channel::Sender<Arc<ActionChunk>>,
}

impl SteppedNode {
    /// A node that is inactive, for a policy of these dimensions that the caller plays.
    pub fn new(
        settings: Settings,
        dims: Dims,
        clock: Arc<dyn Clock>,
        outputs: Box<dyn Outputs>,
    ) -> Result<Self, NodeError> {
        let (period, scheduled) = (settings.timing.period(), clock.monotonic());
        let Parts { core, control, publisher, chunks, retired, plan, tap, .. } =
            Parts::new(settings, dims, clock, outputs, None)?;
        let ports = Some(Ports { chunks, retired, plan, tap });
        Ok(Self { core, control, turn: Turn::new(scheduled), publisher, ports, period, scheduled })
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

    /// A chunk from the decoder; false if it finds no room, or a pipeline is connected.
    pub fn put_chunk(&mut self, chunk: ActionChunk) -> bool {
        let Some(ports) = &mut self.ports else { return false };
        while ports.retired.pop().is_ok() {}
        ports.chunks.push(Arc::new(chunk)).is_ok()
    }

    /// What a pipeline needs to work for this node; `None` once it has been given away.
    pub(super) fn pipeline_io(&mut self) -> Option<PipelineIo> {
        let Ports { chunks, retired, plan, tap } = self.ports.take()?;
        Some(PipelineIo {
            inputs: self.core.inputs.clone(),
            clock: self.core.clock.clone(),
            chunks,
            retired,
            plan,
            epoch: self.core.signals.epoch.clone(),
            tap,
        })
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
