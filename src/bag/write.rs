//! Bags written: one MCAP file of the profile `ros2`.

use std::collections::{BTreeMap, HashMap};
use std::io::{Seek, Write};
use std::sync::Arc;

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

/// Writes one bag.
pub struct BagWriter<W: Write + Seek> {
    mcap: Writer<W>,
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
        let made = options.create(to).and_then(|mut mcap| {
            let metadata: BTreeMap<_, _> = facts.iter().map(|(k, v)| ((*k).into(), v.clone())).collect();
            mcap.write_metadata(&Metadata { name: "pi0_mps".into(), metadata })?;
            Ok(mcap)
        });
        Ok(Self { mcap: made.map_err(io)?, channels: HashMap::new() })
    }

    /// One message.
    pub fn write(&mut self, record: &Record) -> std::io::Result<()> {
        let (channel_id, sequence) = self.channel(&record.topic).map_err(io)?;
        let time = u64::try_from(record.time.0).unwrap_or(0);
        let header = MessageHeader { channel_id, sequence, log_time: time, publish_time: time };
        self.mcap.write_to_known_channel(&header, &record.data).map_err(io)
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
        self.mcap.finish().map_err(io)?;
        Ok(self.mcap.into_inner())
    }
}

fn io(e: McapError) -> std::io::Error {
    match e {
        McapError::Io(e) => e,
        e => std::io::Error::other(e),
    }
}
