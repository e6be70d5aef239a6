//! The bytes of a frame: shared, and in whatever memory they were put, the heap's or some that an engine lends.

use std::any::Any;
use std::fmt;
use std::ops::Deref;
use std::sync::Arc;

/// Whatever can hold the bytes of a frame.
pub trait Bytes: AsRef<[u8]> + Any + Send + Sync {}

impl<T: AsRef<[u8]> + Any + Send + Sync> Bytes for T {}

/// Bytes that never change; cheap to clone.
#[derive(Clone)]
pub struct Pixels(Arc<dyn Bytes>);

impl Pixels {
    /// Bytes that `memory` holds and frees.
    pub fn new(memory: impl Bytes) -> Self {
        Self(Arc::new(memory))
    }

    /// What holds them, if that is a `T`: how an engine knows its own memory again.
    pub fn held_by<T: Bytes>(&self) -> Option<&T> {
        let memory: &dyn Any = &*self.0;
        memory.downcast_ref()
    }
}

impl Deref for Pixels {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        (*self.0).as_ref()
    }
}

impl PartialEq for Pixels {
    fn eq(&self, other: &Self) -> bool {
        self[..] == other[..]
    }
}

impl Eq for Pixels {}

impl fmt::Debug for Pixels {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} bytes", self.len())
    }
}

/// Memory of an engine in which frames wait to be encoded.
pub trait FrameMemory: Send + Sync {
    /// A copy of `bytes` in it, or none while it has no room. It may take milliseconds.
    fn keep(&self, bytes: &[u8]) -> Option<Pixels>;
}
