//! Subscriptions. Each message goes straight to its slot in the core.

use r2r::QosProfile;
use r2r::rosgraph_msgs::msg::Clock as ClockMsg;
use r2r::sensor_msgs::msg::{CompressedImage, Image, JointState};
use r2r::std_msgs::msg::String as StringMsg;

use super::clock::NodeClock;
use super::convert::from_stamp;
use super::failure::{Refusal, middleware};
use super::pictures::Pictures;
use super::spin::{Drain, drain};
use crate::model::Frame;
use crate::node::Inputs;
use crate::params::choice::{Reliability, Transport};
use crate::params::{Qos, Settings};

/// Topic of the robot's URDF.
pub const DESCRIPTION: &str = "robot_description";

/// Subscribes to the cameras, the joint states, the prompt and the robot description (handed to `prompt` and
/// `description`) and, under simulated time, the clock.
pub fn subscribe(
    node: &mut r2r::Node,
    settings: &Settings,
    clock: &NodeClock,
    inputs: &Inputs,
    prompt: impl Fn(String) + Send + 'static,
    description: impl Fn(String) + Send + 'static,
) -> Result<Vec<Drain>, Refusal> {
    let mut drains = Vec::new();
    let images = qos(settings.inputs.images_qos);
    for (index, camera) in settings.inputs.cameras.iter().enumerate() {
        let doing = format!("subscribing to camera '{}' on '{}'", camera.name, camera.topic);
        let inputs = inputs.clone();
        drains.push(match camera.transport {
            Transport::Raw => {
                let stream = node.subscribe::<Image>(&camera.topic, images.clone()).map_err(middleware(doing))?;
                drain(stream, move |m: Image| {
                    let stamp = from_stamp(&m.header.stamp);
                    inputs.frame(index, stamp, frame(m));
                })
            }
            Transport::Compressed => {
                let stream =
                    node.subscribe::<CompressedImage>(&camera.topic, images.clone()).map_err(middleware(doing))?;
                let (pictures, clock) = (Pictures::of(index, inputs)?, clock.clone());
                drain(stream, move |m| pictures.put(m, &clock))
            }
        });
    }

    let joint_states = qos(settings.inputs.joint_states_qos);
    let stream = node
        .subscribe::<JointState>("joint_states", joint_states)
        .map_err(middleware("subscribing to 'joint_states'"))?;
    let to = inputs.clone();
    drains.push(drain(stream, move |m: JointState| to.joints(from_stamp(&m.header.stamp), &m.name, &m.position)));

    let stream = node
        .subscribe::<StringMsg>("~/prompt", QosProfile::default().keep_last(1))
        .map_err(middleware("subscribing to '~/prompt'"))?;
    drains.push(drain(stream, move |m: StringMsg| prompt(m.data)));

    let latched = QosProfile::default().keep_last(1).reliable().transient_local();
    let stream = node
        .subscribe::<StringMsg>(DESCRIPTION, latched)
        .map_err(middleware(format!("subscribing to '{DESCRIPTION}'")))?;
    drains.push(drain(stream, move |m: StringMsg| description(m.data)));

    if settings.process.use_sim_time {
        let newest = QosProfile::default().keep_last(1).best_effort();
        let stream = node.subscribe::<ClockMsg>("/clock", newest).map_err(middleware("subscribing to '/clock'"))?;
        let clock = clock.clone();
        drains.push(drain(stream, move |m: ClockMsg| clock.set(from_stamp(&m.clock))));
    }
    Ok(drains)
}

fn frame(m: Image) -> Result<Frame, crate::model::ModelError> {
    let size = |n: u32| usize::try_from(n).unwrap_or(usize::MAX);
    Frame::new(size(m.width), size(m.height), size(m.step), &m.encoding, m.data)
}

fn qos(q: Qos) -> QosProfile {
    let profile = QosProfile::default().keep_last(q.depth);
    match q.reliability {
        Reliability::BestEffort => profile.best_effort(),
        Reliability::Reliable => profile.reliable(),
    }
}
