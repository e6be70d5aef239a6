//! The message types that a recording of this node holds, with their definitions as Foxglove and rosbag2 read them.

use super::cdr::{CdrError, CdrReader, CdrWriter};
use crate::clock::RosTime;

/// A ROS message that can be put into a bag.
pub trait Message: Sized {
    /// Its type, `package/msg/Name`.
    const TYPE: &'static str;
    /// Its definition in `ros2msg` form: fields, then every type in it behind a line of `=`.
    const DEFINITION: &'static str;
    /// Its fields.
    fn write(&self, w: &mut CdrWriter);
    /// Its fields.
    fn read(r: &mut CdrReader<'_>) -> Result<Self, CdrError>;

    /// As it stands in a bag.
    fn to_cdr(&self) -> Vec<u8> {
        let mut w = CdrWriter::default();
        self.write(&mut w);
        w.finish()
    }

    /// From a bag.
    fn from_cdr(data: &[u8]) -> Result<Self, CdrError> {
        Self::read(&mut CdrReader::new(data)?)
    }
}

macro_rules! with_header {
    ($fields:literal) => {
        concat!(
            "std_msgs/Header header\n",
            $fields,
            "================================================================================\n",
            "MSG: std_msgs/Header\nbuiltin_interfaces/Time stamp\nstring frame_id\n",
            "================================================================================\n",
            "MSG: builtin_interfaces/Time\nint32 sec\nuint32 nanosec\n"
        )
    };
}

const NANOS: i64 = 1_000_000_000;

fn write_time(w: &mut CdrWriter, t: RosTime) {
    let sec = t.0.div_euclid(NANOS).clamp(i64::from(i32::MIN), i64::from(i32::MAX));
    w.i32(sec as i32);
    w.u32(t.0.rem_euclid(NANOS) as u32);
}

fn read_time(r: &mut CdrReader<'_>) -> Result<RosTime, CdrError> {
    let sec = i64::from(r.i32()?);
    Ok(RosTime(sec * NANOS + i64::from(r.u32()?)))
}

fn write_header(w: &mut CdrWriter, stamp: RosTime) {
    write_time(w, stamp);
    w.text("");
}

fn read_header(r: &mut CdrReader<'_>) -> Result<RosTime, CdrError> {
    let stamp = read_time(r)?;
    r.text()?;
    Ok(stamp)
}

/// An image as it came from the driver.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Image {
    /// When it was taken.
    pub stamp: RosTime,
    /// Pixels a row.
    pub width: u32,
    /// Rows.
    pub height: u32,
    /// Name of the pixel layout.
    pub encoding: String,
    /// Bytes a row.
    pub step: u32,
    /// Rows, one after the other.
    pub data: Vec<u8>,
}

impl Message for Image {
    const TYPE: &'static str = "sensor_msgs/msg/Image";
    const DEFINITION: &'static str =
        with_header!("uint32 height\nuint32 width\nstring encoding\nuint8 is_bigendian\nuint32 step\nuint8[] data\n");

    fn write(&self, w: &mut CdrWriter) {
        write_header(w, self.stamp);
        w.u32(self.height);
        w.u32(self.width);
        w.text(&self.encoding);
        w.u8(0);
        w.u32(self.step);
        w.bytes(&self.data);
    }

    fn read(r: &mut CdrReader<'_>) -> Result<Self, CdrError> {
        let stamp = read_header(r)?;
        let (height, width, encoding) = (r.u32()?, r.u32()?, r.text()?);
        r.u8()?;
        Ok(Self { stamp, width, height, encoding, step: r.u32()?, data: r.bytes()?.to_vec() })
    }
}

/// An image as a codec left it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CompressedImage {
    /// When it was taken.
    pub stamp: RosTime,
    /// Name of the codec, and more.
    pub format: String,
    /// The file.
    pub data: Vec<u8>,
}

impl Message for CompressedImage {
    const TYPE: &'static str = "sensor_msgs/msg/CompressedImage";
    const DEFINITION: &'static str = with_header!("string format\nuint8[] data\n");

    fn write(&self, w: &mut CdrWriter) {
        write_header(w, self.stamp);
        w.text(&self.format);
        w.bytes(&self.data);
    }

    fn read(r: &mut CdrReader<'_>) -> Result<Self, CdrError> {
        Ok(Self { stamp: read_header(r)?, format: r.text()?, data: r.bytes()?.to_vec() })
    }
}

/// Joint positions; velocities and efforts are not used here.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct JointState {
    /// When they were measured.
    pub stamp: RosTime,
    /// Joints.
    pub names: Vec<String>,
    /// Their positions.
    pub positions: Vec<f64>,
}

impl Message for JointState {
    const TYPE: &'static str = "sensor_msgs/msg/JointState";
    const DEFINITION: &'static str =
        with_header!("string[] name\nfloat64[] position\nfloat64[] velocity\nfloat64[] effort\n");

    fn write(&self, w: &mut CdrWriter) {
        write_header(w, self.stamp);
        w.texts(self.names.iter());
        w.doubles(&self.positions);
        w.doubles(&[]);
        w.doubles(&[]);
    }

    fn read(r: &mut CdrReader<'_>) -> Result<Self, CdrError> {
        Ok(Self { stamp: read_header(r)?, names: r.texts()?, positions: r.doubles()? })
    }
}

/// Text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Text(pub String);

impl Message for Text {
    const TYPE: &'static str = "std_msgs/msg/String";
    const DEFINITION: &'static str = "string data\n";

    fn write(&self, w: &mut CdrWriter) {
        w.text(&self.0);
    }

    fn read(r: &mut CdrReader<'_>) -> Result<Self, CdrError> {
        r.text().map(Self)
    }
}

/// Numbers, one per joint of a command.
#[derive(Debug, Clone, PartialEq)]
pub struct Numbers(pub Vec<f64>);

impl Message for Numbers {
    const TYPE: &'static str = "std_msgs/msg/Float64MultiArray";
    const DEFINITION: &'static str = concat!(
        "std_msgs/MultiArrayLayout layout\nfloat64[] data\n",
        "================================================================================\n",
        "MSG: std_msgs/MultiArrayLayout\nstd_msgs/MultiArrayDimension[] dim\nuint32 data_offset\n",
        "================================================================================\n",
        "MSG: std_msgs/MultiArrayDimension\nstring label\nuint32 size\nuint32 stride\n"
    );

    fn write(&self, w: &mut CdrWriter) {
        w.length(0);
        w.u32(0);
        w.doubles(&self.0);
    }

    fn read(r: &mut CdrReader<'_>) -> Result<Self, CdrError> {
        for _ in 0..r.length(12)? {
            r.text()?;
            r.u32()?;
            r.u32()?;
        }
        r.u32()?;
        r.doubles().map(Self)
    }
}

/// One point of a trajectory.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Point {
    /// One per joint.
    pub positions: Vec<f64>,
    /// One per joint, or none.
    pub velocities: Vec<f64>,
    /// Nanoseconds from the start of the trajectory.
    pub at: i64,
}

/// A trajectory.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct JointTrajectory {
    /// From when its points count.
    pub stamp: RosTime,
    /// Joints.
    pub names: Vec<String>,
    /// In time.
    pub points: Vec<Point>,
}

impl Message for JointTrajectory {
    const TYPE: &'static str = "trajectory_msgs/msg/JointTrajectory";
    const DEFINITION: &'static str = concat!(
        "std_msgs/Header header\nstring[] joint_names\ntrajectory_msgs/JointTrajectoryPoint[] points\n",
        "================================================================================\n",
        "MSG: std_msgs/Header\nbuiltin_interfaces/Time stamp\nstring frame_id\n",
        "================================================================================\n",
        "MSG: builtin_interfaces/Time\nint32 sec\nuint32 nanosec\n",
        "================================================================================\n",
        "MSG: trajectory_msgs/JointTrajectoryPoint\nfloat64[] positions\nfloat64[] velocities\n",
        "float64[] accelerations\nfloat64[] effort\nbuiltin_interfaces/Duration time_from_start\n",
        "================================================================================\n",
        "MSG: builtin_interfaces/Duration\nint32 sec\nuint32 nanosec\n"
    );

    fn write(&self, w: &mut CdrWriter) {
        write_header(w, self.stamp);
        w.texts(self.names.iter());
        w.length(self.points.len());
        for p in &self.points {
            w.doubles(&p.positions);
            w.doubles(&p.velocities);
            w.doubles(&[]);
            w.doubles(&[]);
            write_time(w, RosTime(p.at));
        }
    }

    fn read(r: &mut CdrReader<'_>) -> Result<Self, CdrError> {
        let (stamp, names) = (read_header(r)?, r.texts()?);
        let point = |r: &mut CdrReader<'_>| {
            let (positions, velocities) = (r.doubles()?, r.doubles()?);
            r.doubles()?;
            r.doubles()?;
            Ok(Point { positions, velocities, at: read_time(r)?.0 })
        };
        let points = (0..r.length(24)?).map(|_| point(r)).collect::<Result<_, _>>()?;
        Ok(Self { stamp, names, points })
    }
}

/// A status with its values.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct DiagnosticStatus {
    /// 0 good, 1 warning, 2 error, 3 stale.
    pub level: u8,
    /// Of what.
    pub name: String,
    /// One sentence.
    pub message: String,
    /// Which hardware.
    pub hardware_id: String,
    /// Figures.
    pub values: Vec<(String, String)>,
}

impl Message for DiagnosticStatus {
    const TYPE: &'static str = "diagnostic_msgs/msg/DiagnosticStatus";
    const DEFINITION: &'static str = concat!(
        "byte OK=0\nbyte WARN=1\nbyte ERROR=2\nbyte STALE=3\n",
        "byte level\nstring name\nstring message\nstring hardware_id\ndiagnostic_msgs/KeyValue[] values\n",
        "================================================================================\n",
        "MSG: diagnostic_msgs/KeyValue\nstring key\nstring value\n"
    );

    fn write(&self, w: &mut CdrWriter) {
        w.u8(self.level);
        w.text(&self.name);
        w.text(&self.message);
        w.text(&self.hardware_id);
        w.length(self.values.len());
        for (key, value) in &self.values {
            w.text(key);
            w.text(value);
        }
    }

    fn read(r: &mut CdrReader<'_>) -> Result<Self, CdrError> {
        let (level, name, message, hardware_id) = (r.u8()?, r.text()?, r.text()?, r.text()?);
        let values = (0..r.length(8)?).map(|_| Ok((r.text()?, r.text()?))).collect::<Result<_, _>>()?;
        Ok(Self { level, name, message, hardware_id, values })
    }
}

/// Statuses of one moment.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct DiagnosticArray {
    /// When.
    pub stamp: RosTime,
    /// One per part.
    pub status: Vec<DiagnosticStatus>,
}

impl Message for DiagnosticArray {
    const TYPE: &'static str = "diagnostic_msgs/msg/DiagnosticArray";
    const DEFINITION: &'static str = concat!(
        "std_msgs/Header header\ndiagnostic_msgs/DiagnosticStatus[] status\n",
        "================================================================================\n",
        "MSG: std_msgs/Header\nbuiltin_interfaces/Time stamp\nstring frame_id\n",
        "================================================================================\n",
        "MSG: builtin_interfaces/Time\nint32 sec\nuint32 nanosec\n",
        "================================================================================\n",
        "MSG: diagnostic_msgs/DiagnosticStatus\nbyte OK=0\nbyte WARN=1\nbyte ERROR=2\nbyte STALE=3\n",
        "byte level\nstring name\nstring message\nstring hardware_id\ndiagnostic_msgs/KeyValue[] values\n",
        "================================================================================\n",
        "MSG: diagnostic_msgs/KeyValue\nstring key\nstring value\n"
    );

    fn write(&self, w: &mut CdrWriter) {
        write_header(w, self.stamp);
        w.length(self.status.len());
        self.status.iter().for_each(|s| s.write(w));
    }

    fn read(r: &mut CdrReader<'_>) -> Result<Self, CdrError> {
        let stamp = read_header(r)?;
        let status = (0..r.length(17)?).map(|_| DiagnosticStatus::read(r)).collect::<Result<_, _>>()?;
        Ok(Self { stamp, status })
    }
}

/// A line of the log.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Log {
    /// When.
    pub stamp: RosTime,
    /// 10 debug, 20 info, 30 warning, 40 error, 50 fatal.
    pub level: u8,
    /// Who says it.
    pub name: String,
    /// What.
    pub text: String,
}

impl Message for Log {
    const TYPE: &'static str = "rcl_interfaces/msg/Log";
    const DEFINITION: &'static str = concat!(
        "byte DEBUG=10\nbyte INFO=20\nbyte WARN=30\nbyte ERROR=40\nbyte FATAL=50\n",
        "builtin_interfaces/Time stamp\nuint8 level\nstring name\nstring msg\nstring file\nstring function\nuint32 line\n",
        "================================================================================\n",
        "MSG: builtin_interfaces/Time\nint32 sec\nuint32 nanosec\n"
    );

    fn write(&self, w: &mut CdrWriter) {
        write_time(w, self.stamp);
        w.u8(self.level);
        w.text(&self.name);
        w.text(&self.text);
        w.text("");
        w.text("");
        w.u32(0);
    }

    fn read(r: &mut CdrReader<'_>) -> Result<Self, CdrError> {
        Ok(Self { stamp: read_time(r)?, level: r.u8()?, name: r.text()?, text: r.text()? })
    }
}

/// One tick of the control loop: this node's own type, for plots of a recording.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Tick {
    /// ROS time of the tick.
    pub stamp: RosTime,
    /// Number of the mode, and its name.
    pub mode: (u8, String),
    /// Epoch of chunks that may be executed.
    pub epoch: u64,
    /// The plan that is followed; 0 for none.
    pub chunk: u64,
    /// Whether a window was published.
    pub published: bool,
    /// Periods skipped before this tick.
    pub skipped: u64,
    /// Interventions of the safety filter since the start.
    pub interventions: u64,
    /// Scheduled to awake, awake to computed, scheduled to publish returned, and what was left until the deadline then;
    /// ms, NaN where there is none.
    pub times: [f64; 4],
    /// Observation to publish returned, ms; NaN when no plan is followed.
    pub plan_age: f64,
    /// Largest distance of the measured from the commanded position; rad or m.
    pub tracking_error: f64,
    /// Largest joint difference of two plans at the seam of this tick, before blending; NaN without one.
    pub seam_jump: f64,
    /// Positions, one per joint; rad or m.
    pub measured: Vec<f64>,
    /// What the robot was told to be at now; empty before the first arming.
    pub command: Vec<f64>,
}

impl Message for Tick {
    const TYPE: &'static str = "pi0_mps/msg/Tick";
    const DEFINITION: &'static str = with_header!(
        "uint8 mode\nstring mode_name\nuint64 epoch\nuint64 chunk\nbool published\nuint64 skipped\nuint64 interventions\n\
         float64 wake_late_ms\nfloat64 compute_ms\nfloat64 publish_ms\nfloat64 slack_ms\nfloat64 plan_age_ms\n\
         float64 tracking_error\nfloat64 seam_jump\nfloat64[] measured\nfloat64[] command\n"
    );

    fn write(&self, w: &mut CdrWriter) {
        write_header(w, self.stamp);
        w.u8(self.mode.0);
        w.text(&self.mode.1);
        w.u64(self.epoch);
        w.u64(self.chunk);
        w.u8(self.published.into());
        w.u64(self.skipped);
        w.u64(self.interventions);
        self.times.iter().for_each(|t| w.f64(*t));
        w.f64(self.plan_age);
        w.f64(self.tracking_error);
        w.f64(self.seam_jump);
        w.doubles(&self.measured);
        w.doubles(&self.command);
    }

    fn read(r: &mut CdrReader<'_>) -> Result<Self, CdrError> {
        Ok(Self {
            stamp: read_header(r)?,
            mode: (r.u8()?, r.text()?),
            epoch: r.u64()?,
            chunk: r.u64()?,
            published: r.u8()? != 0,
            skipped: r.u64()?,
            interventions: r.u64()?,
            times: [r.f64()?, r.f64()?, r.f64()?, r.f64()?],
            plan_age: r.f64()?,
            tracking_error: r.f64()?,
            seam_jump: r.f64()?,
            measured: r.doubles()?,
            command: r.doubles()?,
        })
    }
}

/// Where the time of a chunk went: this node's own type, beside the chunk as a trajectory.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct ChunkTimes {
    /// ROS time of the joint state it was decoded from.
    pub stamp: RosTime,
    /// ROS time of the oldest image it saw.
    pub oldest_image: RosTime,
    /// Counts chunks.
    pub sequence: u64,
    /// Counts stops and resets.
    pub epoch: u64,
    /// Counts prompts.
    pub prompt_generation: u64,
    /// Encode, waiting for the decoder, decode, and newest image to finished chunk; ms.
    pub times: [f64; 4],
}

impl Message for ChunkTimes {
    const TYPE: &'static str = "pi0_mps/msg/ChunkTimes";
    const DEFINITION: &'static str = with_header!(
        "builtin_interfaces/Time oldest_image\nuint64 sequence\nuint64 epoch\nuint64 prompt_generation\n\
         float64 encode_ms\nfloat64 queue_ms\nfloat64 decode_ms\nfloat64 observation_to_chunk_ms\n"
    );

    fn write(&self, w: &mut CdrWriter) {
        write_header(w, self.stamp);
        write_time(w, self.oldest_image);
        w.u64(self.sequence);
        w.u64(self.epoch);
        w.u64(self.prompt_generation);
        self.times.iter().for_each(|t| w.f64(*t));
    }

    fn read(r: &mut CdrReader<'_>) -> Result<Self, CdrError> {
        Ok(Self {
            stamp: read_header(r)?,
            oldest_image: read_time(r)?,
            sequence: r.u64()?,
            epoch: r.u64()?,
            prompt_generation: r.u64()?,
            times: [r.f64()?, r.f64()?, r.f64()?, r.f64()?],
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn round_trip<M: Message + PartialEq + std::fmt::Debug>(m: M) {
        let data = m.to_cdr();
        assert_eq!(M::from_cdr(&data).as_ref(), Ok(&m));
        for cut in 0..data.len() {
            assert!(M::from_cdr(&data[..cut]).is_err() || data[cut..].iter().all(|b| *b == 0), "{}: {cut}", M::TYPE);
        }
        assert!(M::DEFINITION.ends_with('\n'), "{}", M::TYPE);
    }

    #[test]
    fn every_message_comes_back_as_it_was() {
        let stamp = RosTime(1_795_447_329_023_492_893);
        let names = vec!["a".to_owned(), "elbow".to_owned()];
        let image =
            Image { stamp, width: 2, height: 1, encoding: "rgb8".into(), step: 6, data: vec![1, 2, 3, 4, 5, 255] };
        round_trip(image);
        round_trip(CompressedImage { stamp, format: "png".into(), data: vec![9, 8, 7] });
        round_trip(Text("put the red cube into the mug".into()));
        round_trip(Numbers(vec![1.0, -2.5]));
        let points = vec![Point { positions: vec![1.0, 2.0], velocities: vec![0.5, 0.1], at: 1_020_000_001 }];
        round_trip(JointTrajectory { stamp, names, points });
        let status = DiagnosticStatus { level: 2, name: "n".into(), message: "m".into(), ..Default::default() };
        round_trip(DiagnosticArray { stamp, status: vec![status.clone()] });
        round_trip(DiagnosticStatus { values: vec![("k".into(), "v".into())], ..status });
        round_trip(Tick {
            stamp,
            mode: (4, "run".into()),
            published: true,
            times: [0.1, 0.2, 0.3, 0.4],
            measured: vec![1.0],
            command: vec![2.0],
            ..Default::default()
        });
        round_trip(ChunkTimes { stamp, sequence: 9, times: [1.0, 2.0, 3.0, 4.0], ..Default::default() });
    }

    #[test]
    fn a_stamp_before_the_epoch_survives() {
        let at = |ns| JointState { stamp: RosTime(ns), names: vec!["a".into()], positions: vec![1.0] };
        assert_eq!(JointState::from_cdr(&at(-1).to_cdr()), Ok(at(-1)));
    }
}
