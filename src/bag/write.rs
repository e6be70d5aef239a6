//! Bags written: one MCAP file of the profile `ros2`.

use std::collections::{BTreeMap, HashMap};
use std::io::{Seek, SeekFrom, Write};
use std::sync::{Arc, Mutex, PoisonError};

use mcap::records::{MessageHeader, Metadata};
use mcap::{McapError, McapResult, WriteOptions, Writer};

use super::{Message, Record, Topic, message};

/// Definition of a type that this program writes.
fn definition(kind: &str) -> Option<&'static str> {
    macro_rules! of {
        ($($t:ty),*) => { [$((<$t>::TYPE, <$t>::DEFINITION)),*] };
    }
    let all = of![
        message::Image,
        message::CompressedImage,
        message::JointState,
        message::Text,
        message::Numbers,
        message::JointTrajectory,
        message::DiagnosticStatus,
        message::DiagnosticArray,
        message::Log,
        message::Tick,
        message::ChunkTimes
    ];
    all.into_iter().find(|(name, _)| *name == kind).map(|(_, definition)| definition)
}

/// Passes everything on and remembers why the first write failed: the format's own errors do not always say.
struct Noting<W> {
    to: W,
    failure: Failure,
}

type Failure = Arc<Mutex<Option<std::io::Error>>>;

impl<W> Noting<W> {
    fn note<T>(&mut self, result: std::io::Result<T>) -> std::io::Result<T> {
        if let Err(e) = &result {
            let copy = e.raw_os_error().map(std::io::Error::from_raw_os_error);
            let mut first = self.failure.lock().unwrap_or_else(PoisonError::into_inner);
            first.get_or_insert_with(|| copy.unwrap_or_else(|| std::io::Error::new(e.kind(), e.to_string())));
        }
        result
    }
}

impl<W: Write> Write for Noting<W> {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        let result = self.to.write(bytes);
        self.note(result)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        let result = self.to.flush();
        self.note(result)
    }
}

impl<W: Seek> Seek for Noting<W> {
    fn seek(&mut self, to: SeekFrom) -> std::io::Result<u64> {
        let result = self.to.seek(to);
        self.note(result)
    }
}

/// Writes one bag.
pub struct BagWriter<W: Write + Seek> {
    mcap: Writer<Noting<W>>,
    failure: Failure,
    channels: HashMap<Arc<Topic>, (u16, u32)>,
}

/// What rosbag2 says of a topic's publishers; none is known.
const NO_QOS: (&str, &str) = ("offered_qos_profiles", "");

impl<W: Write + Seek> BagWriter<W> {
    /// A bag with `facts` about it, which viewers show.
    pub fn new(to: W, facts: &[(&str, String)]) -> std::io::Result<Self> {
        let options = WriteOptions::new()
            .profile("ros2")
            .library(concat!("pi0_mps ", env!("CARGO_PKG_VERSION")))
            // One more thread would be one more to compete with the control loop.
            .compression_threads(0);
        let failure = Failure::default();
        let made = options.create(Noting { to, failure: failure.clone() }).and_then(|mut mcap| {
            let metadata: BTreeMap<_, _> = facts.iter().map(|(k, v)| ((*k).into(), v.clone())).collect();
            mcap.write_metadata(&Metadata { name: "pi0_mps".into(), metadata })?;
            Ok(mcap)
        });
        let mcap = made.map_err(|e| why(&failure, e))?;
        Ok(Self { mcap, failure, channels: HashMap::new() })
    }

    /// One message.
    pub fn write(&mut self, record: &Record) -> std::io::Result<()> {
        let (channel_id, sequence) = self.channel(&record.topic).map_err(|e| why(&self.failure, e))?;
        let time = u64::try_from(record.time.0).unwrap_or(0);
        let header = MessageHeader { channel_id, sequence, log_time: time, publish_time: time };
        self.mcap.write_to_known_channel(&header, &record.data).map_err(|e| why(&self.failure, e))
    }

    fn channel(&mut self, topic: &Arc<Topic>) -> McapResult<(u16, u32)> {
        if let Some(channel) = self.channels.get_mut(topic) {
            channel.1 += 1;
            return Ok(*channel);
        }
        let definition = definition(&topic.kind).unwrap_or_default();
        let schema = self.mcap.add_schema(&topic.kind, "ros2msg", definition.as_bytes())?;
        let qos = BTreeMap::from([(NO_QOS.0.into(), NO_QOS.1.into())]);
        let id = self.mcap.add_channel(schema, &topic.name, "cdr", &qos)?;
        self.channels.insert(topic.clone(), (id, 0));
        Ok((id, 0))
    }

    /// Ends the bag; without it, it would be a truncated one.
    pub fn finish(mut self) -> std::io::Result<W> {
        self.mcap.finish().map_err(|e| why(&self.failure, e))?;
        Ok(self.mcap.into_inner().to)
    }
}

fn why(failure: &Failure, e: McapError) -> std::io::Error {
    let noted = failure.lock().unwrap_or_else(PoisonError::into_inner).take();
    noted.unwrap_or_else(|| std::io::Error::other(e))
}
