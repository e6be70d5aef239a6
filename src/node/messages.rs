//! What the node hears and says, as the messages of a recording.

use crate::bag::message::{
    ChunkTimes, DiagnosticArray, DiagnosticStatus, Image, JointTrajectory, Log, Numbers, Point, Text,
};
use crate::bag::{Record, Topic};
use crate::clock::RosTime;
use crate::control::chunk::ActionChunk;
use crate::control::{Names, TickReport, Window};
use crate::model::{Encoding, Frame};
use crate::params::Settings;
use crate::params::choice::OutputKind;

use std::sync::Arc;

use super::Status;
use super::core::{EventLevel, event_texts};

/// The full name of the node unless it was given another one.
pub const DEFAULT_NAME: &str = "/pi0_mps";

/// An absolute topic name, as the middleware makes it from a parameter's for a node of that full name.
pub fn absolute(topic: &str, node: &str) -> String {
    let namespace = node.rsplit_once('/').map_or("", |(space, _)| space);
    match (topic.strip_prefix('~'), topic.starts_with('/')) {
        (Some(private), _) => format!("{node}{private}"),
        (None, true) => topic.into(),
        (None, false) => format!("{namespace}/{topic}"),
    }
}

/// One command topic in a recording.
#[derive(Debug, Clone)]
struct Group {
    topic: Arc<Topic>,
    kind: OutputKind,
    joints: Vec<usize>,
    names: Vec<String>,
}

/// The topics of one node in a recording, and the messages on them.
#[derive(Debug, Clone)]
pub struct Messages {
    node: String,
    joint_names: Vec<String>,
    groups: Vec<Group>,
    cameras: Vec<Arc<Topic>>,
    /// Measured positions.
    pub joint_states: Arc<Topic>,
    /// The task.
    pub prompt: Arc<Topic>,
    /// Parameters as YAML.
    pub parameters: Arc<Topic>,
    chunks: Arc<Topic>,
    chunk_times: Arc<Topic>,
    /// Ticks.
    pub ticks: Arc<Topic>,
    status: Arc<Topic>,
    diagnostics: Arc<Topic>,
    log: Arc<Topic>,
}

impl Messages {
    /// For a node of that full name.
    pub fn new(settings: &Settings, node: &str) -> Self {
        let at = |topic: &str| absolute(topic, node);
        let joint_names: Vec<String> = settings.joints.iter().map(|j| j.name.clone()).collect();
        let group = |g: &crate::params::OutputGroup| Group {
            topic: match g.kind {
                OutputKind::Trajectory => Topic::of::<JointTrajectory>(at(&g.topic)),
                OutputKind::Command => Topic::of::<Numbers>(at(&g.topic)),
            },
            kind: g.kind,
            joints: g.joints.clone(),
            names: g.joints.iter().filter_map(|j| joint_names.get(*j).cloned()).collect(),
        };
        Self {
            groups: settings.outputs.iter().map(group).collect(),
            cameras: settings.inputs.cameras.iter().map(|c| Topic::of::<Image>(at(&c.topic))).collect(),
            joint_states: Topic::of::<crate::bag::message::JointState>(at("joint_states")),
            prompt: Topic::of::<Text>(at("~/prompt")),
            parameters: Topic::of::<Text>(at("~/parameters")),
            chunks: Topic::of::<JointTrajectory>(at("~/action_chunk")),
            chunk_times: Topic::of::<ChunkTimes>(at("~/chunk_times")),
            ticks: Topic::of::<crate::bag::message::Tick>(at("~/tick")),
            status: Topic::of::<DiagnosticStatus>(at("~/status")),
            diagnostics: Topic::of::<DiagnosticArray>("/diagnostics"),
            log: Topic::of::<Log>("/rosout"),
            joint_names,
            node: node.into(),
        }
    }

    /// The command topics, with the joints of each message in its order.
    pub fn commands(&self) -> impl Iterator<Item = (&Arc<Topic>, &[String])> {
        self.groups.iter().map(|g| (&g.topic, &*g.names))
    }

    /// A published window on every command topic.
    pub fn window<'a>(&'a self, at: RosTime, w: &'a Window) -> impl Iterator<Item = Record> + 'a {
        let some = (w.points() > 0).then_some(());
        some.into_iter().flat_map(move |()| {
            self.groups.iter().map(move |g| match g.kind {
                OutputKind::Trajectory => Record::new(&g.topic, at, &trajectory(g, w)),
                OutputKind::Command => Record::new(&g.topic, at, &Numbers(pick(&g.joints, w.command()))),
            })
        })
    }

    /// A chunk as a trajectory, and where its time went.
    pub fn chunk(&self, at: RosTime, c: &ActionChunk) -> [Record; 2] {
        let due = |i: usize| (i as f64 * c.dt * 1e9).round() as i64;
        let actions = c.positions.chunks_exact(c.joints.max(1)).enumerate();
        let points = actions.map(|(i, p)| Point { positions: p.to_vec(), velocities: Vec::new(), at: due(i) });
        let trajectory =
            JointTrajectory { stamp: c.state_stamp, names: self.joint_names.clone(), points: points.collect() };
        let t = &c.timing;
        let times = ChunkTimes {
            stamp: c.state_stamp,
            oldest_image: c.oldest_image_stamp,
            sequence: c.sequence,
            epoch: c.epoch,
            prompt_generation: c.prompt_generation,
            times: [
                t.encode_end.ms_since(t.encode_start),
                t.decode_start.ms_since(t.encode_end),
                t.decode_end.ms_since(t.decode_start),
                t.decode_end.ms_since(t.observed),
            ],
        };
        [Record::new(&self.chunks, at, &trajectory), Record::new(&self.chunk_times, at, &times)]
    }

    /// A camera's frame, at most `width` pixels wide; 0 leaves it as it is.
    pub fn frame(&self, camera: usize, at: RosTime, stamp: RosTime, frame: &Frame, width: usize) -> Option<Record> {
        let topic = self.cameras.get(camera)?;
        let image = smaller(frame, width).unwrap_or_else(|| whole(frame));
        Some(Record::new(topic, at, &Image { stamp, ..image }))
    }

    /// What a tick has to say: lines of log, and the same as text.
    pub fn events(
        &self,
        at: RosTime,
        report: &TickReport,
        chunk: Option<u64>,
        names: &Names,
    ) -> (Vec<Record>, Vec<String>) {
        let name = self.node.trim_start_matches('/');
        let lines = event_texts(report, chunk, names).into_iter().map(|(level, text)| {
            let level = match level {
                EventLevel::Info => 20,
                EventLevel::Warn => 30,
            };
            let log = Log { stamp: at, level, name: name.into(), text: text.clone() };
            (Record::new(&self.log, at, &log), text)
        });
        lines.unzip()
    }

    /// The status and the diagnostics.
    pub fn status(&self, at: RosTime, s: &Status) -> [Record; 2] {
        let name = self.node.trim_start_matches('/');
        let one = |level: u8, of: String, message: &str, values: &[(String, String)]| DiagnosticStatus {
            level,
            name: of,
            message: message.into(),
            hardware_id: name.into(),
            values: values.to_vec(),
        };
        let status = one(s.level as u8, name.into(), &s.message, &s.values);
        let each =
            s.diagnostics.iter().map(|d| one(d.level as u8, format!("{name}: {}", d.name), &d.message, &d.values));
        let diagnostics = DiagnosticArray { stamp: at, status: each.collect() };
        [Record::new(&self.status, at, &status), Record::new(&self.diagnostics, at, &diagnostics)]
    }
}

fn pick(joints: &[usize], row: &[f64]) -> Vec<f64> {
    joints.iter().filter_map(|j| row.get(*j).copied()).collect()
}

fn trajectory(g: &Group, w: &Window) -> JointTrajectory {
    let point = |i: usize| Point {
        positions: pick(&g.joints, w.positions(i)),
        velocities: pick(&g.joints, w.velocities(i)),
        at: i64::try_from(w.time_from_start(i).as_nanos()).unwrap_or(i64::MAX),
    };
    JointTrajectory { stamp: w.start(), names: g.names.clone(), points: (0..w.points()).map(point).collect() }
}

fn whole(frame: &Frame) -> Image {
    let name = Encoding::ALL.iter().find(|(e, _)| *e == frame.encoding()).map_or("", |(_, name)| name);
    let pixels = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
    Image {
        stamp: RosTime::default(),
        width: pixels(frame.width()),
        height: pixels(frame.height()),
        encoding: name.into(),
        step: pixels(frame.step()),
        data: frame.data().to_vec(),
    }
}

/// The mean of each block of pixels, in rgb8; `None` if the frame is small enough.
fn smaller(frame: &Frame, width: usize) -> Option<Image> {
    if width == 0 || frame.width() <= width {
        return None;
    }
    let rgb = match frame.encoding() {
        Encoding::Bgr8 | Encoding::Bgra8 => [2, 1, 0],
        Encoding::Mono8 => [0, 0, 0],
        Encoding::Rgb8 | Encoding::Rgba8 => [0, 1, 2],
    };
    let bytes = frame.encoding().bytes_per_pixel();
    let height = (frame.height() * width / frame.width()).max(1);
    // The span of source pixels of a target pixel: never empty, since the target is smaller.
    let span = |i: usize, to: usize, from: usize| i * from / to..((i + 1) * from / to).max(i * from / to + 1);
    let mut data = Vec::with_capacity(3 * width * height);
    let mut sums = vec![[0u32; 3]; width];
    for y in 0..height {
        sums.fill([0; 3]);
        let rows = span(y, height, frame.height());
        let tall = rows.len();
        for row in rows {
            let source = &frame.data()[row * frame.step()..];
            for (x, sum) in sums.iter_mut().enumerate() {
                for pixel in span(x, width, frame.width()).map(|c| &source[c * bytes..]) {
                    (0..3).for_each(|c| sum[c] += u32::from(pixel[rgb[c]]));
                }
            }
        }
        for (x, sum) in sums.iter().enumerate() {
            let n = (tall * span(x, width, frame.width()).len()) as u32;
            data.extend(sum.map(|s| ((s + n / 2) / n) as u8));
        }
    }
    let pixels = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
    Some(Image {
        stamp: RosTime::default(),
        width: pixels(width),
        height: pixels(height),
        encoding: "rgb8".into(),
        step: pixels(3 * width),
        data,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_resolved_as_the_middleware_does() {
        for (topic, node, full) in [
            ("camera/base/image_raw", "/pi0_mps", "/camera/base/image_raw"),
            ("camera/base/image_raw", "/left/pi0", "/left/camera/base/image_raw"),
            ("~/prompt", "/left/pi0", "/left/pi0/prompt"),
            ("/diagnostics", "/left/pi0", "/diagnostics"),
        ] {
            assert_eq!(absolute(topic, node), full);
        }
    }

    #[test]
    fn a_smaller_frame_is_the_mean_of_its_blocks() {
        // 4x2 bgr8 with a padded row: blocks of 2x2.
        let row = |v: [u8; 4]| v.iter().flat_map(|b| [*b, 100, 7]).chain([9, 9]).collect::<Vec<_>>();
        let data = [row([0, 10, 20, 40]), row([10, 20, 20, 41])].concat();
        let frame = Frame::new(4, 2, 14, "bgr8", data).unwrap();
        let image = smaller(&frame, 2).unwrap();
        assert_eq!((image.width, image.height, image.step), (2, 1, 6));
        assert_eq!(image.data, [7, 100, 10, 7, 100, 30]);
        assert!(smaller(&frame, 4).is_none() && smaller(&frame, 0).is_none());
        // Sides that do not divide.
        let odd = Frame::new(7, 5, 7, "mono8", vec![50; 35]).unwrap();
        let image = smaller(&odd, 3).unwrap();
        assert_eq!((image.width, image.height, image.data), (3, 2, vec![50; 18]));
    }
}
