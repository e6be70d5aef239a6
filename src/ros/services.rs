//! Services that may take their time: requests come from the spin thread through a queue, and are answered from a
//! thread of their own. `~/stop` is not among them.

use std::sync::Arc;
use std::time::Duration;

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, TrySendError, bounded};
use r2r::rcl_interfaces::msg::ParameterEvent;
use r2r::rcl_interfaces::srv::{
    DescribeParameters, GetParameterTypes, GetParameters, ListParameters, SetParameters, SetParametersAtomically,
};
use r2r::std_srvs::srv::{SetBool, Trigger};
use r2r::{Publisher, QosProfile, ServiceRequest, WrappedServiceTypeSupport};

use super::convert::text;
use super::failure::{Refusal, middleware};
use super::lifecycle::{self, LifecycleJob};
use super::parameters::Parameters;
use super::spin::{Drain, drain};
use crate::clock::Clock;
use crate::node::lifecycle::Transitions;
use crate::node::{Commands, Node};
use crate::params::{Change, Value};

/// A request, or the order to end.
pub enum Job {
    Enable(ServiceRequest<SetBool::Service>),
    Reset(ServiceRequest<Trigger::Service>),
    SaveRecording(ServiceRequest<Trigger::Service>),
    Get(ServiceRequest<GetParameters::Service>),
    Types(ServiceRequest<GetParameterTypes::Service>),
    Describe(ServiceRequest<DescribeParameters::Service>),
    List(ServiceRequest<ListParameters::Service>),
    Set(ServiceRequest<SetParameters::Service>),
    SetAtomically(ServiceRequest<SetParametersAtomically::Service>),
    Lifecycle(LifecycleJob),
    /// From `~/prompt`: the parameter follows the topic.
    Prompt(String),
    /// From `robot_description`: limits that no parameter gives.
    Description(String),
    Quit,
}

/// How often a description that waits is looked at.
const LOOK: Duration = Duration::from_millis(500);

/// Requests that wait; more are dropped, and their callers time out.
const QUEUE: usize = 64;

/// The queue between the spin thread and the one that answers.
pub fn queue() -> (Sender<Job>, Receiver<Job>) {
    bounded(QUEUE)
}

/// Puts a job into the queue, if it has room.
pub fn enqueue(to: &Sender<Job>, name: &str, job: Job) {
    if let Err(TrySendError::Full(_)) = to.try_send(job) {
        tracing::warn!("{name}: {QUEUE} requests wait already; this one is dropped");
    }
}

/// Offers the services; requests go to the queue.
pub fn offer(node: &mut r2r::Node, to: &Sender<Job>, drains: &mut Vec<Drain>) -> Result<(), Refusal> {
    let mut offer = Offer { node, drains, to };
    offer.service("~/enable", Job::Enable)?;
    offer.service("~/reset", Job::Reset)?;
    offer.service("~/save_recording", Job::SaveRecording)?;
    offer.service("~/get_parameters", Job::Get)?;
    offer.service("~/get_parameter_types", Job::Types)?;
    offer.service("~/describe_parameters", Job::Describe)?;
    offer.service("~/list_parameters", Job::List)?;
    offer.service("~/set_parameters", Job::Set)?;
    offer.service("~/set_parameters_atomically", Job::SetAtomically)?;
    offer.service("~/change_state", |r| Job::Lifecycle(LifecycleJob::Change(r)))?;
    offer.service("~/get_state", |r| Job::Lifecycle(LifecycleJob::State(r)))?;
    offer.service("~/get_available_states", |r| Job::Lifecycle(LifecycleJob::States(r)))?;
    offer.service("~/get_available_transitions", |r| Job::Lifecycle(LifecycleJob::Transitions(r)))?;
    offer.service("~/get_transition_graph", |r| Job::Lifecycle(LifecycleJob::Graph(r)))?;
    Ok(())
}

struct Offer<'a> {
    node: &'a mut r2r::Node,
    drains: &'a mut Vec<Drain>,
    to: &'a Sender<Job>,
}

impl Offer<'_> {
    fn service<T>(&mut self, name: &'static str, job: fn(ServiceRequest<T>) -> Job) -> Result<(), Refusal>
    where
        T: WrappedServiceTypeSupport + 'static,
        ServiceRequest<T>: Send,
    {
        let stream = self
            .node
            .create_service::<T>(name, QosProfile::services_default())
            .map_err(middleware(format!("offering '{name}'")))?;
        let to = self.to.clone();
        self.drains.push(drain(stream, move |request| enqueue(&to, name, job(request))));
        Ok(())
    }
}

/// Who answers.
pub struct Services {
    pub core: Arc<Node>,
    pub commands: Commands,
    pub transitions: Transitions,
    pub parameters: Parameters,
    pub events: Publisher<ParameterEvent>,
    pub clock: Arc<dyn Clock>,
}

impl Services {
    /// Answers until told to end.
    pub fn run(mut self, jobs: &Receiver<Job>) {
        self.publish(&self.parameters.declared(self.clock.ros()));
        // A robot description that came while armed waits for the node to be disarmed.
        let mut description: Option<String> = None;
        loop {
            match jobs.recv_timeout(LOOK) {
                Ok(Job::Quit) | Err(RecvTimeoutError::Disconnected) => return,
                Ok(Job::Description(urdf)) => description = Some(urdf),
                Ok(job) => self.answer(job),
                Err(RecvTimeoutError::Timeout) => {}
            }
            if !self.core.armed()
                && let Some(urdf) = description.take()
            {
                self.parameters.describe_robot(&self.core, &urdf);
            }
        }
    }

    fn answer(&mut self, job: Job) {
        match job {
            Job::Enable(r) => {
                let (success, message) = outcome("~/enable", self.commands.enable(r.message.data));
                respond("~/enable", r, SetBool::Response { success, message });
            }
            Job::Reset(r) => {
                let (success, message) = outcome("~/reset", self.commands.reset());
                respond("~/reset", r, Trigger::Response { success, message });
            }
            // Writing a file takes a while, in which ~/enable must answer.
            Job::SaveRecording(r) => {
                let commands = self.commands.clone();
                std::thread::spawn(move || {
                    let (success, message) = outcome("~/save_recording", commands.save_recording());
                    respond("~/save_recording", r, Trigger::Response { success, message });
                });
            }
            Job::Get(r) => {
                let values = self.parameters.get(&r.message.names);
                respond("get_parameters", r, GetParameters::Response { values });
            }
            Job::Types(r) => {
                let types = self.parameters.types(&r.message.names);
                respond("get_parameter_types", r, GetParameterTypes::Response { types });
            }
            Job::Describe(r) => {
                let descriptors = self.parameters.describe(&r.message.names);
                respond("describe_parameters", r, DescribeParameters::Response { descriptors });
            }
            Job::List(r) => {
                let result = self.parameters.list(&r.message.prefixes, r.message.depth);
                respond("list_parameters", r, ListParameters::Response { result });
            }
            Job::Set(r) => {
                let (results, changes) = self.parameters.set(&self.core, &r.message.parameters);
                respond("set_parameters", r, SetParameters::Response { results });
                self.announce(&changes);
            }
            Job::SetAtomically(r) => {
                let (result, changes) = self.parameters.set_atomically(&self.core, &r.message.parameters);
                respond("set_parameters_atomically", r, SetParametersAtomically::Response { result });
                self.announce(&changes);
            }
            Job::Lifecycle(job) => lifecycle::answer(job, &self.transitions),
            Job::Prompt(prompt) => match self.core.inputs().prompt(&prompt) {
                Ok(()) => {
                    let changes = self.parameters.follow("prompt", Value::String(prompt));
                    self.announce(&changes);
                }
                Err(e) => tracing::warn!("~/prompt refused: {e}"),
            },
            Job::Description(_) | Job::Quit => {}
        }
    }

    fn announce(&self, changes: &[Change]) {
        if !changes.is_empty() {
            self.publish(&self.parameters.changed(self.clock.ros(), changes));
        }
    }

    fn publish(&self, event: &ParameterEvent) {
        if let Err(e) = self.events.publish(event) {
            tracing::warn!("publishing /parameter_events failed: {e}");
        }
    }
}

/// A command's outcome as SetBool and Trigger say it, and in the log.
pub fn outcome(service: &str, result: Result<String, String>) -> (bool, String) {
    match result {
        Ok(message) => {
            tracing::info!("{service}: {message}");
            (true, text(&message))
        }
        Err(reason) => {
            tracing::warn!("{service} refused: {reason}");
            (false, text(&reason))
        }
    }
}

/// Answers; a caller that is gone is no fault of ours.
pub fn respond<T: WrappedServiceTypeSupport + 'static>(
    service: &str,
    request: ServiceRequest<T>,
    response: T::Response,
) {
    if let Err(e) = request.respond(response) {
        tracing::warn!("{service}: the answer could not be sent: {e}");
    }
}
