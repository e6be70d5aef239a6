//! The services and the topic of a managed node, over the core's state machine.

use r2r::lifecycle_msgs::msg::{State as StateMsg, Transition, TransitionDescription, TransitionEvent};
use r2r::lifecycle_msgs::srv::{ChangeState, GetAvailableStates, GetAvailableTransitions, GetState};
use r2r::{Publisher, QosProfile, ServiceRequest};

use super::failure::{Refusal, middleware};
use super::services::respond;
use crate::clock::RosTime;
use crate::node::lifecycle::{By, Edge, State, Transitions, available, graph};

/// A request of one of the five services.
pub enum LifecycleJob {
    Change(ServiceRequest<ChangeState::Service>),
    State(ServiceRequest<GetState::Service>),
    States(ServiceRequest<GetAvailableStates::Service>),
    Transitions(ServiceRequest<GetAvailableTransitions::Service>),
    Graph(ServiceRequest<GetAvailableTransitions::Service>),
}

/// Answers; a transition is answered once it is made, and nobody waits for it here.
pub fn answer(job: LifecycleJob, transitions: &Transitions) {
    match job {
        LifecycleJob::Change(r) => {
            let asked = &r.message.transition;
            let by = if asked.label.is_empty() { By::Id(asked.id) } else { By::Label(asked.label.clone()) };
            transitions.change(by, move |success| respond("~/change_state", r, ChangeState::Response { success }));
        }
        LifecycleJob::State(r) => {
            let current_state = state(transitions.state());
            respond("~/get_state", r, GetState::Response { current_state });
        }
        LifecycleJob::States(r) => {
            let unknown = StateMsg { id: 0, label: "unknown".into() };
            let available_states = std::iter::once(unknown).chain(State::ALL.map(state)).collect();
            respond("~/get_available_states", r, GetAvailableStates::Response { available_states });
        }
        LifecycleJob::Transitions(r) => describe("~/get_available_transitions", r, available(transitions.state())),
        LifecycleJob::Graph(r) => describe("~/get_transition_graph", r, graph()),
    }
}

fn describe(service: &str, r: ServiceRequest<GetAvailableTransitions::Service>, edges: Vec<Edge>) {
    let description = |e: &Edge| TransitionDescription {
        transition: transition(e),
        start_state: state(e.from),
        goal_state: state(e.to),
    };
    let available_transitions = edges.iter().map(description).collect();
    respond(service, r, GetAvailableTransitions::Response { available_transitions });
}

fn state(s: State) -> StateMsg {
    StateMsg { id: s as u8, label: s.label().into() }
}

fn transition(e: &Edge) -> Transition {
    Transition { id: e.id, label: e.label.into() }
}

/// `~/transition_event`.
pub struct TransitionPublisher(Publisher<TransitionEvent>);

impl TransitionPublisher {
    /// Advertises it.
    pub fn advertise(node: &mut r2r::Node) -> Result<Self, Refusal> {
        let qos = QosProfile::default().keep_last(10).reliable();
        let publisher =
            node.create_publisher("~/transition_event", qos).map_err(middleware("advertising '~/transition_event'"))?;
        Ok(Self(publisher))
    }

    /// Tells a transition.
    pub fn publish(&self, edge: &Edge, now: RosTime) {
        let event = TransitionEvent {
            timestamp: u64::try_from(now.0).unwrap_or_default(),
            transition: transition(edge),
            start_state: state(edge.from),
            goal_state: state(edge.to),
        };
        if let Err(e) = self.0.publish(&event) {
            tracing::warn!("publishing ~/transition_event failed: {e}");
        }
    }
}
