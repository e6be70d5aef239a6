//! Which device an engine runs on, as a user names it.

use std::fmt;
use std::str::FromStr;

use super::{EngineError, cuda};

/// A device as asked for: `auto`, `cpu` or `cuda:N`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Device {
    /// The best one there is.
    #[default]
    Auto,
    /// The float32 oracle.
    Cpu,
    /// The GPU of that CUDA index.
    Cuda(u32),
}

impl Device {
    /// The device of that name: `auto`, `cpu` or `cuda:N`.
    pub fn from_name(name: &str) -> Option<Self> {
        match name {
            "auto" => Some(Device::Auto),
            "cpu" => Some(Device::Cpu),
            _ => name.strip_prefix("cuda:")?.parse().ok().map(Device::Cuda),
        }
    }
}

/// As on the command line: a [name](Device::from_name), or `cuda` for `cuda:0`.
impl FromStr for Device {
    type Err = EngineError;

    fn from_str(name: &str) -> Result<Self, EngineError> {
        let found = if name == "cuda" { Some(Device::Cuda(0)) } else { Device::from_name(name) };
        found.ok_or_else(|| EngineError::Shape {
            what: "device",
            expected: "auto, cpu or cuda:N".into(),
            found: format!("'{name}'"),
        })
    }
}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Device::Auto => f.write_str("auto"),
            Device::Cpu => f.write_str("cpu"),
            Device::Cuda(index) => write!(f, "cuda:{index}"),
        }
    }
}

/// A device that this build can run on, and why it is this one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Resolved {
    /// Never [`Device::Auto`].
    pub device: Device,
    /// One clause for people and diagnostics.
    pub reason: String,
}

impl Device {
    /// The device to run on; a GPU that this build or machine lacks is [`EngineError::Unavailable`].
    pub fn resolve(self) -> Result<Resolved, EngineError> {
        match self {
            Device::Auto => Ok(match cuda::probe(0) {
                Ok(gpu) => Resolved { device: Device::Cuda(0), reason: gpu },
                Err(e) => Resolved { device: Device::Cpu, reason: format!("auto is the CPU: {e}") },
            }),
            Device::Cpu => Ok(Resolved { device: Device::Cpu, reason: "asked for".into() }),
            Device::Cuda(index) => Ok(Resolved { device: self, reason: cuda::probe(index as usize)? }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_are_named_as_in_the_documentation() {
        for (name, device) in [
            ("auto", Device::Auto),
            ("cpu", Device::Cpu),
            ("cuda:0", Device::Cuda(0)),
            ("cuda", Device::Cuda(0)),
            ("cuda:12", Device::Cuda(12)),
        ] {
            assert_eq!(name.parse::<Device>().unwrap(), device);
            assert_eq!(Device::from_name(name), (name != "cuda").then_some(device), "a parameter names the index");
        }
        for name in ["", "gpu", "cuda:", "cuda:-1", "cuda:x", "CPU"] {
            let e = name.parse::<Device>().unwrap_err().to_string();
            assert_eq!(e, format!("device: expected auto, cpu or cuda:N, got '{name}'"));
        }
    }

    #[test]
    fn a_device_that_is_not_there_says_so() {
        assert_eq!(Device::Cpu.resolve().unwrap().device, Device::Cpu);
        let auto = Device::Auto.resolve().unwrap();
        assert_eq!(auto.device == Device::Cpu, cuda::probe(0).is_err(), "{auto:?}");
        let e = Device::Cuda(99).resolve().unwrap_err().to_string();
        assert!(e.starts_with("device 'cuda:99' is not available: "), "{e}");
    }
}
