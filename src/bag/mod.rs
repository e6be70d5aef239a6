//! Recordings: rosbag2 bags in MCAP and sqlite3, read without ROS, and MCAP written so that Foxglove, `ros2 bag` and
//! `rosbags` read it.

pub mod cdr;
pub mod message;
mod read;
mod sqlite;
mod write;

use std::path::{Path, PathBuf};
use std::sync::Arc;

pub use cdr::CdrError;
pub use message::Message;
pub use read::{BagReader, TopicCount};
pub use write::BagWriter;

use crate::clock::RosTime;
use crate::error::{Blame, Fault};

/// A topic of a bag.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Topic {
    /// Its name, absolute.
    pub name: String,
    /// Its type, `package/msg/Name`.
    pub kind: String,
}

impl Topic {
    /// A topic of messages `M`.
    pub fn of<M: Message>(name: impl Into<String>) -> Arc<Self> {
        Arc::new(Self { name: name.into(), kind: M::TYPE.into() })
    }
}

/// One message of a bag.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    /// Where it was published.
    pub topic: Arc<Topic>,
    /// When it was received.
    pub time: RosTime,
    /// As it was on the wire.
    pub data: Arc<[u8]>,
}

impl Record {
    /// A message of the program's own.
    pub fn new<M: Message>(topic: &Arc<Topic>, time: RosTime, message: &M) -> Self {
        Self { topic: topic.clone(), time, data: message.to_cdr().into() }
    }

    /// What it says.
    pub fn decode<M: Message>(&self) -> Result<M, BagError> {
        let bad = |reason: String| BagError::Message { topic: self.topic.name.clone(), time: self.time, reason };
        if self.topic.kind != M::TYPE {
            return Err(bad(format!("it is a {}, not a {}", self.topic.kind, M::TYPE)));
        }
        M::from_cdr(&self.data).map_err(|e| bad(e.to_string()))
    }
}

/// Why a bag cannot be read or written.
#[derive(Debug, thiserror::Error)]
pub enum BagError {
    /// The file system.
    #[error("{}: {source}", path.display())]
    Io {
        /// Which file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// Not a bag, or one of a kind that is not read here.
    #[error("{}: {reason}", path.display())]
    Foreign {
        /// Which file.
        path: PathBuf,
        /// What it is, what is wanted.
        reason: String,
    },
    /// A bag that ends early or is damaged; what came before was read.
    #[error("{}: damaged after {read} messages: {reason}", path.display())]
    Damaged {
        /// Which file.
        path: PathBuf,
        /// Messages before the damage.
        read: u64,
        /// What is wrong.
        reason: String,
    },
    /// A message that is not what its type says.
    #[error("message on {topic} at {:.9} s: {reason}", time.0 as f64 * 1e-9)]
    Message {
        /// Where.
        topic: String,
        /// When.
        time: RosTime,
        /// What is wrong.
        reason: String,
    },
}

impl BagError {
    fn io(path: &Path) -> impl FnOnce(std::io::Error) -> Self + '_ {
        move |source| Self::Io { path: path.into(), source }
    }
}

impl Blame for BagError {
    fn fault(&self) -> Fault {
        match self {
            BagError::Io { source, .. } if source.kind() != std::io::ErrorKind::NotFound => Fault::Machine,
            _ => Fault::Input,
        }
    }
}
