//! The mode machine as one table.

/// What the controller is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
#[repr(u8)]
pub enum Mode {
    /// No policy is loaded.
    #[default]
    Unconfigured,
    /// A policy is loaded and runs its first inferences, which are kept out of every statistic.
    Warmup,
    /// Inference runs; nothing is published.
    Active,
    /// Armed: blending from the pose at arming, or after a coast, to the plan.
    Ramp,
    /// Armed: following the plan.
    Run,
    /// Armed: no chunk in time; decelerating, then holding.
    Coast,
    /// Decelerating to rest.
    Stopping,
    /// Stopped by request, latched.
    Stopped,
    /// Something of this node's own failed.
    Fault,
}

/// Diagnostic levels, with the numbers of `diagnostic_msgs/DiagnosticStatus`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum Level {
    /// As it should be.
    Ok = 0,
    /// Worth a look.
    Warn = 1,
    /// Somebody has to act.
    Error = 2,
    /// No news.
    Stale = 3,
}

/// One row of the mode table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ModeRow {
    /// The mode.
    pub mode: Mode,
    /// Its name in status and diagnostics.
    pub name: &'static str,
    /// Whether every tick publishes a window.
    pub publishes: bool,
    /// Whether it follows the policy.
    pub armed: bool,
    /// Level reported when nothing else is wrong.
    pub level: Level,
    /// Lifecycle state of the node it belongs to.
    pub lifecycle: &'static str,
    /// What leads here.
    pub entered_by: &'static str,
    /// What may come next, and nothing else.
    pub next: &'static [Mode],
}

use Mode::{Active, Coast, Fault, Ramp, Run, Stopped, Stopping, Unconfigured, Warmup};

#[rustfmt::skip]
/// Every mode: what it does, how it is reported, where it leads.
pub const MODES: [ModeRow; 9] = [
    ModeRow { mode: Unconfigured, name: "unconfigured", publishes: false, armed: false, level: Level::Stale, lifecycle: "unconfigured",
        entered_by: "start; cleanup", next: &[Warmup, Active, Stopped, Fault] },
    ModeRow { mode: Warmup, name: "warmup", publishes: false, armed: false, level: Level::Ok, lifecycle: "inactive, or active until the first chunk",
        entered_by: "the policy is loaded; deactivate", next: &[Unconfigured, Active, Stopped, Fault] },
    ModeRow { mode: Active, name: "active", publishes: false, armed: false, level: Level::Ok, lifecycle: "active",
        entered_by: "warm-up done; disarmed and at rest; reset", next: &[Unconfigured, Warmup, Ramp, Stopped, Fault] },
    ModeRow { mode: Ramp, name: "ramp", publishes: true, armed: true, level: Level::Ok, lifecycle: "active",
        entered_by: "enable accepted; a distant plan after a coast", next: &[Run, Coast, Stopping, Fault] },
    ModeRow { mode: Run, name: "run", publishes: true, armed: true, level: Level::Ok, lifecycle: "active",
        entered_by: "ramp done; a fresh chunk after a coast", next: &[Coast, Stopping, Fault] },
    ModeRow { mode: Coast, name: "coast", publishes: true, armed: true, level: Level::Warn, lifecycle: "active",
        entered_by: "the plan ran out and miss_policy is coast", next: &[Ramp, Run, Stopping, Fault] },
    ModeRow { mode: Stopping, name: "stopping", publishes: true, armed: false, level: Level::Warn, lifecycle: "active",
        entered_by: "disable, stop, or anything that is not safe any more", next: &[Unconfigured, Warmup, Active, Stopped, Fault] },
    ModeRow { mode: Stopped, name: "stopped", publishes: false, armed: false, level: Level::Warn, lifecycle: "active",
        entered_by: "stop, once at rest", next: &[Unconfigured, Warmup, Active, Fault] },
    ModeRow { mode: Fault, name: "fault", publishes: false, armed: false, level: Level::Error, lifecycle: "active",
        entered_by: "inference failed, or an internal check did", next: &[Unconfigured, Warmup, Active] },
];

impl Mode {
    /// Its row of the table.
    pub fn row(self) -> &'static ModeRow {
        &MODES[self as usize]
    }

    /// Whether every tick publishes a window.
    pub fn publishes(self) -> bool {
        self.row().publishes
    }

    /// Whether it follows the policy.
    pub fn armed(self) -> bool {
        self.row().armed
    }
}

impl std::fmt::Display for Mode {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.row().name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_is_indexed_by_mode_and_consistent() {
        for (i, row) in MODES.iter().enumerate() {
            assert_eq!((row.mode as usize, row.mode.to_string().as_str()), (i, row.name));
            assert!(!row.next.contains(&row.mode), "{} leads to itself", row.name);
            if row.armed {
                assert!(row.publishes && row.next.contains(&Stopping), "{} can be stopped", row.name);
            } else {
                assert!(!row.next.contains(&Run) && !row.next.contains(&Coast), "{} is armed without a ramp", row.name);
            }
        }
        assert!(!Stopped.row().next.contains(&Ramp), "a latched stop is only left by reset");
    }
}
