//! Between messages and the program's own types.

use r2r::builtin_interfaces::msg::{Duration, Time};
use r2r::diagnostic_msgs::msg::{DiagnosticStatus, KeyValue};

use crate::clock::RosTime;
use crate::control::Level;

const NANOS: i64 = 1_000_000_000;

/// A stamp; zero stays zero, "not set".
pub fn from_stamp(t: &Time) -> RosTime {
    RosTime(i64::from(t.sec) * NANOS + i64::from(t.nanosec))
}

/// A stamp; what 32 bits of seconds cannot hold is cut off.
pub fn stamp(t: RosTime) -> Time {
    let (sec, nanosec) = split(t.0);
    Time { sec, nanosec }
}

/// A time from the start of a trajectory.
pub fn duration(d: std::time::Duration) -> Duration {
    Duration { sec: i32::try_from(d.as_secs()).unwrap_or(i32::MAX), nanosec: d.subsec_nanos() }
}

fn split(nanos: i64) -> (i32, u32) {
    let sec = nanos.div_euclid(NANOS).clamp(i64::from(i32::MIN), i64::from(i32::MAX));
    (sec as i32, nanos.rem_euclid(NANOS) as u32)
}

/// Text as a message can carry it: a NUL would end it early, and r2r panics on one.
pub fn text(s: &str) -> String {
    s.replace('\0', "\u{fffd}")
}

/// A diagnostic as a message.
pub fn diagnostic(
    level: Level,
    name: &str,
    message: &str,
    values: impl IntoIterator<Item = (String, String)>,
    hardware: &str,
) -> DiagnosticStatus {
    DiagnosticStatus {
        level: level as u8,
        name: text(name),
        message: text(message),
        hardware_id: text(hardware),
        values: values.into_iter().map(|(k, v)| KeyValue { key: text(&k), value: text(&v) }).collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stamps_survive_both_ways_and_stay_normalised() {
        for ns in [0, 1, 1_234_567_890_123_456_789, -1, -1_500_000_000] {
            let t = stamp(RosTime(ns));
            assert!(t.nanosec < 1_000_000_000);
            assert_eq!(from_stamp(&t), RosTime(ns));
        }
        assert_eq!(stamp(RosTime(i64::MAX)).sec, i32::MAX);
        assert_eq!(duration(std::time::Duration::from_millis(1020)), Duration { sec: 1, nanosec: 20_000_000 });
        assert_eq!(duration(std::time::Duration::MAX).sec, i32::MAX);
    }

    #[test]
    fn a_nul_never_reaches_the_middleware() {
        let d = diagnostic(Level::Error, "a\0", "b\0c", [("\0".to_owned(), "\0".to_owned())], "");
        assert_eq!((d.name.as_str(), d.message.as_str(), d.level), ("a\u{fffd}", "b\u{fffd}c", 2));
        assert!(!d.values[0].key.contains('\0') && !d.values[0].value.contains('\0'));
    }
}
