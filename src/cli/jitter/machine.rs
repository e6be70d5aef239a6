//! What has to be known of a machine to compare its wake-ups with those of another one.

use serde::Serialize;

/// The machine, as the kernel describes it.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(super) struct Machine {
    /// Model name.
    pub cpu: String,
    /// CPUs that this process may use.
    pub cpus: usize,
    /// Whether it runs on a hypervisor, whose own scheduling adds to every wake-up.
    pub virtual_machine: bool,
    /// Release.
    pub kernel: String,
    pub preempt_rt: bool,
    /// Frequency governor, where there is one.
    pub governor: Option<String>,
}

impl Machine {
    pub fn read() -> Self {
        let read = |path: &str| std::fs::read_to_string(path).ok().map(|s| s.trim().to_owned());
        let (cpu, virtual_machine) = cpuinfo(&read("/proc/cpuinfo").unwrap_or_default());
        Self {
            cpu,
            cpus: std::thread::available_parallelism().map_or(1, |n| n.get()),
            virtual_machine,
            kernel: read("/proc/sys/kernel/osrelease").unwrap_or_else(|| "unknown".into()),
            preempt_rt: read("/sys/kernel/realtime").as_deref() == Some("1"),
            governor: read("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"),
        }
    }

    /// Its CPUs.
    pub fn hardware(&self) -> String {
        format!("{} × {}{}", self.cpus, self.cpu, if self.virtual_machine { " (virtual machine)" } else { "" })
    }

    /// What runs on them.
    pub fn system(&self) -> String {
        let rt = if self.preempt_rt { "PREEMPT_RT" } else { "not PREEMPT_RT" };
        let governor = self.governor.as_ref().map(|g| format!(", governor {g}")).unwrap_or_default();
        format!("Linux {} ({rt}){governor}", self.kernel)
    }
}

/// Model name and whether there is a hypervisor, from /proc/cpuinfo.
fn cpuinfo(text: &str) -> (String, bool) {
    let value = |name: &str| {
        let line = text.lines().find(|l| l.split(':').next().is_some_and(|key| key.trim() == name))?;
        line.split_once(':').map(|(_, v)| v.split_whitespace().collect::<Vec<_>>().join(" "))
    };
    let cpu = value("model name").or(value("Model")).unwrap_or_else(|| "unknown CPU".into());
    (cpu, value("flags").is_some_and(|flags| flags.split(' ').any(|f| f == "hypervisor")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_machine_is_read_as_the_kernel_writes_it() {
        let text = "processor\t: 0\nmodel name\t: AMD  EPYC 7R13\nflags\t\t: fpu vme hypervisor lahf_lm\n";
        assert_eq!(cpuinfo(text), ("AMD EPYC 7R13".into(), true));
        assert_eq!(cpuinfo("processor : 0\nflags : fpu\n"), ("unknown CPU".into(), false));
        assert_eq!(cpuinfo("Model\t\t: Raspberry Pi 5\n"), ("Raspberry Pi 5".into(), false));
    }

    #[test]
    fn two_lines_say_all_of_it() {
        let m = Machine {
            cpu: "A".into(),
            cpus: 2,
            virtual_machine: true,
            kernel: "6.8".into(),
            preempt_rt: false,
            governor: Some("powersave".into()),
        };
        assert_eq!(m.hardware(), "2 × A (virtual machine)");
        assert_eq!(m.system(), "Linux 6.8 (not PREEMPT_RT), governor powersave");
    }
}
