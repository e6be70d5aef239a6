//! What can be wrong with a checkpoint or an input; each error names the thing, the value and the remedy.

use std::path::PathBuf;

use crate::error::{Blame, Fault};

/// An error of the model layer.
#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    /// A file could not be read.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// A file is there, but not what it should be.
    #[error("{}: {reason}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What is wrong and what to do.
        reason: String,
    },
    /// A tensor is missing, of the wrong shape or of a type that cannot be used.
    #[error("{}: tensor '{tensor}': expected {expected}, found {found}", path.display())]
    Tensor {
        /// The file.
        path: PathBuf,
        /// Its name as looked for.
        tensor: String,
        /// Shape or type the model needs.
        expected: String,
        /// What is there.
        found: String,
    },
    /// A camera frame cannot be used.
    #[error("image: {reason}; {remedy}")]
    Frame {
        /// What is wrong.
        reason: String,
        /// What to do.
        remedy: String,
    },
    /// A vector does not fit the policy.
    #[error("{what}: expected {expected} values, found {found}")]
    Length {
        /// The vector.
        what: &'static str,
        /// Values the policy needs.
        expected: usize,
        /// Values given.
        found: usize,
    },
    /// A vector holds something that is no number.
    #[error("{what}[{index}] is {value}, expected a finite number")]
    NotFinite {
        /// The vector.
        what: &'static str,
        /// First bad index.
        index: usize,
        /// What is there.
        value: f64,
    },
    /// A setting contradicts the checkpoint or another setting.
    #[error("{setting}: {reason}")]
    Setting {
        /// Its name.
        setting: &'static str,
        /// What is wrong and what to do.
        reason: String,
    },
}

impl Blame for ModelError {
    fn fault(&self) -> Fault {
        match self {
            ModelError::Frame { .. } | ModelError::NotFinite { .. } => Fault::Peer,
            _ => Fault::Input,
        }
    }
}
