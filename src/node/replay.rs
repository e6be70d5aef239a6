//! The whole node by a virtual clock, policy included: what a recording holds goes in, what the node would have
//! commanded comes out, the same on every run.

use std::sync::Arc;
use std::time::Duration;

use super::{Inputs, NodeError, Outputs, SteppedNode, convert};
use crate::clock::{Clock, Monotonic, RosTime, VirtualClock};
use crate::control::{ControlStatus, Lifecycle, Mode, Names, Requests, TickReport};
use crate::engine::Engine;
use crate::model::Policy;
use crate::params::Settings;
use crate::pipeline::{PipelineReport, StageTimes};

/// The virtual monotonic clock begins here: zero would mean "never".
const BEGIN: Monotonic = Monotonic(1_000_000_000);

/// What a recording does not say.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ReplayOptions {
    /// How long the stages take.
    pub times: StageTimes,
    /// Arm not before.
    pub arm_from: RosTime,
    /// Arm again after a stop, not only once.
    pub rearm: bool,
}

/// A node that is fed from a recording. It arms itself: there is no robot.
pub struct ReplayNode {
    node: SteppedNode,
    clock: VirtualClock,
    options: ReplayOptions,
    names: Names,
    period: Duration,
    tick_due: Monotonic,
    ready: bool,
    armed: bool,
}

impl ReplayNode {
    /// A node at `start`, the time of the first message.
    pub fn new<E: Engine>(
        settings: Settings,
        policy: Arc<Policy>,
        engine: &E,
        start: RosTime,
        outputs: Box<dyn Outputs>,
        options: ReplayOptions,
    ) -> Result<Self, NodeError> {
        let clock = VirtualClock::new(BEGIN, start);
        let (period, names) = (settings.timing.period(), convert::names(&settings));
        let shared = Arc::new(clock.clone());
        let node = SteppedNode::with_policy(settings, policy, engine, options.times, shared, outputs)?;
        node.set_lifecycle(Lifecycle::Warmup);
        Ok(Self { node, clock, options, names, period, tick_due: BEGIN + period, ready: false, armed: false })
    }

    /// Where messages go, at the time that the node has been brought to.
    pub fn inputs(&self) -> Inputs {
        self.node.inputs()
    }

    /// Names for texts of reasons.
    pub fn names(&self) -> &Names {
        &self.names
    }

    /// Lets the node live until `until`, and tells of every tick. An error is a stage that cannot go on.
    pub fn advance(
        &mut self,
        until: RosTime,
        mut told: impl FnMut(RosTime, &TickReport, &ControlStatus),
    ) -> Result<(), NodeError> {
        loop {
            // What came in at this time may let a stage begin.
            self.node.think();
            let (now, ros) = (self.clock.monotonic(), self.clock.ros());
            let end = Monotonic(now.0.saturating_add(until.0.saturating_sub(ros.0).max(0)));
            let next = self.node.due().map_or(self.tick_due, |t| t.min(self.tick_due)).min(end);
            self.clock.advance(Duration::from_nanos(u64::try_from(next.0.saturating_sub(now.0)).unwrap_or(0)));
            self.node.think();
            if next >= self.tick_due {
                self.tick(&mut told)?;
            } else if next >= end {
                return Ok(());
            }
        }
    }

    fn tick(&mut self, told: &mut impl FnMut(RosTime, &TickReport, &ControlStatus)) -> Result<(), NodeError> {
        self.tick_due = self.tick_due + self.period;
        if !self.ready && self.node.chunks() > 0 {
            self.ready = true;
            self.node.set_lifecycle(Lifecycle::Ready);
        }
        let idle = self.node.control_status().mode == Mode::Active && self.clock.ros() >= self.options.arm_from;
        if idle && (!self.armed || self.options.rearm) {
            self.node.ask(Requests { enable: true, ..Requests::default() });
        }
        if let Some(report) = self.node.control(0) {
            self.armed |= report.mode.armed();
            told(self.clock.ros(), &report, &self.node.control_status());
        }
        self.node.publish();
        self.node.fault().map_or(Ok(()), |(_, why)| Err(NodeError::Refused(why)))
    }

    /// Whether every input was heard and a chunk has come of them.
    pub fn ready(&self) -> bool {
        self.ready
    }

    /// What the control core has done.
    pub fn control_status(&self) -> ControlStatus {
        self.node.control_status()
    }

    /// What the stages have done.
    pub fn pipeline_report(&self) -> PipelineReport {
        self.node.pipeline_report()
    }
}
