//! `pi0 doctor`: what on this machine would keep the node from running well, and how to fix it.

mod mps;

use std::fs;
use std::path::{Path, PathBuf};

use serde::Serialize;

use super::CliError;
use crate::engine::Device;
use crate::model::{Checkpoint, Policy, PolicyOptions};
use crate::params::{Params, Value, yaml};

/// Looks at this machine and, where given, at a checkpoint and a parameter file.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Checkpoint directory to check: tensors, tokenizer, normalisation statistics.
    #[arg(long)]
    checkpoint: Option<PathBuf>,
    /// ROS parameter file (YAML) to check against the parameter table.
    #[arg(long)]
    params_file: Option<PathBuf>,
    /// Print one JSON object instead of a table.
    #[arg(long)]
    json: bool,
}

/// How bad a finding is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
enum Verdict {
    Ok,
    Note,
    Warn,
    Error,
}

/// One finding.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
struct Finding {
    check: &'static str,
    verdict: Verdict,
    found: String,
    /// What to do; empty when nothing needs doing.
    remedy: String,
}

impl Finding {
    fn ok(check: &'static str, found: impl Into<String>) -> Self {
        Self { check, verdict: Verdict::Ok, found: found.into(), remedy: String::new() }
    }

    fn new(check: &'static str, verdict: Verdict, found: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { check, verdict, found: found.into(), remedy: remedy.into() }
    }
}

/// Runs the checks; the exit code is 0 unless one of them is an error.
pub fn run(args: &Args) -> Result<(), CliError> {
    let mut findings = machine();
    findings.extend(ros(|name| std::env::var(name).ok()));
    findings.push(gpu());
    findings.extend(mps::findings());
    if let Some(dir) = &args.checkpoint {
        findings.extend(checkpoint(dir));
    }
    if let Some(file) = &args.params_file {
        findings.push(params_file(file, args.checkpoint.as_deref()));
    }
    let worst = findings.iter().map(|f| f.verdict).max().unwrap_or(Verdict::Ok);
    if args.json {
        println!("{}", serde_json::json!({ "verdict": worst, "findings": findings }));
    } else {
        print!("{}", table(&findings));
    }
    if worst == Verdict::Error {
        return Err(CliError::input("pi0 doctor found errors; see above"));
    }
    Ok(())
}

fn table(findings: &[Finding]) -> String {
    let mut out = String::new();
    for f in findings {
        let mark = match f.verdict {
            Verdict::Ok => "ok   ",
            Verdict::Note => "note ",
            Verdict::Warn => "WARN ",
            Verdict::Error => "ERROR",
        };
        out += &format!("{mark}  {:<22} {}\n", f.check, f.found);
        if !f.remedy.is_empty() {
            out += &format!("{:31}→ {}\n", "", f.remedy);
        }
    }
    out
}

fn read(path: &str) -> Option<String> {
    fs::read_to_string(path).ok().map(|s| s.trim().to_owned())
}

/// The soft limit of a line of /proc/self/limits; `None` when it is missing, `u64::MAX` when unlimited.
fn soft_limit(limits: &str, name: &str) -> Option<u64> {
    let rest = limits.lines().find_map(|l| l.strip_prefix(name))?;
    match rest.split_whitespace().next()? {
        "unlimited" => Some(u64::MAX),
        n => n.parse().ok(),
    }
}

/// Kilobytes of a line of /proc/meminfo.
fn meminfo_kb(meminfo: &str, name: &str) -> Option<u64> {
    meminfo.lines().find_map(|l| l.strip_prefix(name))?.trim_start_matches(':').split_whitespace().next()?.parse().ok()
}

fn machine() -> Vec<Finding> {
    let mut out = Vec::new();
    let cores = std::thread::available_parallelism().map_or(1, |n| n.get());
    out.push(if cores >= 2 {
        Finding::ok("cores", cores.to_string())
    } else {
        Finding::new("cores", Verdict::Warn, "1", "the control loop shares its core with inference: use two or more")
    });
    let limits = read("/proc/self/limits").unwrap_or_default();
    let status = read("/proc/self/status").unwrap_or_default();
    out.push(realtime(&limits, &status));
    out.push(match soft_limit(&limits, "Max locked memory") {
        Some(bytes) if bytes >= 64 << 20 || is_root(&status) => Finding::ok("memory locking", "allowed"),
        Some(bytes) => Finding::new(
            "memory locking",
            Verdict::Warn,
            format!("limited to {} KiB", bytes >> 10),
            "add '<user> - memlock unlimited' to /etc/security/limits.conf and log in again",
        ),
        None => Finding::new("memory locking", Verdict::Note, "unknown", "/proc/self/limits cannot be read"),
    });
    out.push(if read("/sys/kernel/realtime").as_deref() == Some("1") {
        Finding::ok("kernel", "PREEMPT_RT")
    } else {
        Finding::new(
            "kernel",
            Verdict::Note,
            "not PREEMPT_RT",
            "for sub-millisecond jitter install a PREEMPT_RT kernel",
        )
    });
    match read("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor") {
        Some(g) if g == "performance" => out.push(Finding::ok("CPU governor", g)),
        Some(g) => {
            out.push(Finding::new("CPU governor", Verdict::Note, g, "run: cpupower frequency-set -g performance"))
        }
        None => {}
    }
    if let Some(kb) = read("/proc/meminfo").and_then(|m| meminfo_kb(&m, "MemAvailable")) {
        out.push(Finding::ok("memory available", format!("{:.1} GiB", kb as f64 / 1048576.0)));
    }
    out
}

fn is_root(status: &str) -> bool {
    status.lines().find_map(|l| l.strip_prefix("Uid:")).and_then(|l| l.split_whitespace().nth(1)) == Some("0")
}

fn realtime(limits: &str, status: &str) -> Finding {
    match soft_limit(limits, "Max realtime priority") {
        Some(p) if p > 0 => Finding::ok("SCHED_FIFO", format!("allowed up to priority {p}")),
        _ if is_root(status) => Finding::ok("SCHED_FIFO", "allowed (root)"),
        _ => Finding::new(
            "SCHED_FIFO",
            Verdict::Warn,
            "not allowed",
            "add '<user> - rtprio 98' to /etc/security/limits.conf and log in again",
        ),
    }
}

fn ros(var: impl Fn(&str) -> Option<String>) -> Vec<Finding> {
    let Some(distro) = var("ROS_DISTRO") else {
        return vec![Finding::new(
            "ROS 2",
            Verdict::Note,
            "not sourced",
            "control_node needs it: source /opt/ros/<distro>/setup.bash, or let scripts/demo set one up",
        )];
    };
    let rmw = var("RMW_IMPLEMENTATION").unwrap_or_else(|| "rmw_fastrtps_cpp".into());
    let mut out = vec![Finding::ok("ROS 2", format!("{distro}, {rmw}"))];
    if rmw.contains("fastrtps") && var("FASTDDS_DEFAULT_PROFILES_FILE").is_none() {
        out.push(Finding::new(
            "image transport",
            Verdict::Warn,
            "Fast DDS with its default 512 KiB shared-memory segment: larger best-effort images are lost",
            "export FASTDDS_DEFAULT_PROFILES_FILE=<share>/config/fastdds.xml on both sides",
        ));
    }
    out
}

fn gpu() -> Finding {
    match Device::Auto.resolve() {
        Ok(r) => Finding::ok("inference device", format!("{} ({})", r.device, r.reason)),
        Err(e) => Finding::new("inference device", Verdict::Error, e.to_string(), ""),
    }
}

fn checkpoint(dir: &Path) -> Vec<Finding> {
    let loaded = match Checkpoint::open(dir) {
        Ok(c) => c,
        Err(e) => {
            return vec![Finding::new("checkpoint", Verdict::Error, e.to_string(), "download or convert it again")];
        }
    };
    let d = loaded.dims();
    let found = format!(
        "{:?} ({:?} layout), horizon {}, image {}², vision {}×{}, prefix {}×{}, expert {}×{}",
        d.family,
        loaded.origin(),
        d.horizon,
        d.vision.image,
        d.vision.layers,
        d.vision.width,
        d.trunk.layers,
        d.trunk.width,
        d.expert.layers,
        d.expert.width
    );
    let policy = match Policy::open(&loaded, dir, &PolicyOptions::default()) {
        Ok(p) => Finding::ok(
            "policy",
            format!("cameras {}; {} state and {} action values", p.cameras().join(", "), p.state_len(), p.action_len()),
        ),
        Err(e) => Finding::new("policy", Verdict::Error, e.to_string(), ""),
    };
    vec![Finding::ok("checkpoint", found), policy]
}

/// Checks a params file as the node would; a checkpoint given to this tool counts as given, since a launch file does
/// the same.
fn params_file(file: &Path, checkpoint: Option<&Path>) -> Finding {
    let read = fs::read_to_string(file).map_err(|e| e.to_string());
    let problems = match read.and_then(|text| yaml::overrides(&text, "pi0_mps")) {
        Err(e) => vec![e],
        Ok(mut given) => {
            if let Some(dir) = checkpoint {
                given.push(("checkpoint".into(), Value::String(dir.display().to_string())));
            }
            let checked = Params::from_overrides(given);
            checked.err().unwrap_or_default().iter().map(ToString::to_string).collect()
        }
    };
    if problems.is_empty() {
        Finding::ok("parameter file", file.display().to_string())
    } else {
        Finding::new("parameter file", Verdict::Error, format!("{}: {}", file.display(), problems.join("; ")), "")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: &str = "Max locked memory         65536                65536                bytes     \n\
                          Max realtime priority     0                    0                              \n";

    #[test]
    fn limits_are_read_as_the_kernel_writes_them() {
        assert_eq!(soft_limit(LIMITS, "Max locked memory"), Some(65536));
        assert_eq!(soft_limit(LIMITS, "Max realtime priority"), Some(0));
        assert_eq!(soft_limit("Max locked memory  unlimited unlimited bytes", "Max locked memory"), Some(u64::MAX));
        assert_eq!(soft_limit(LIMITS, "Max nonsense"), None);
    }

    #[test]
    fn a_right_that_is_missing_comes_with_its_remedy() {
        let f = realtime(LIMITS, "Uid:\t1000\t1000\t1000\t1000");
        assert_eq!(f.verdict, Verdict::Warn);
        assert!(f.remedy.contains("rtprio"));
        assert_eq!(realtime(LIMITS, "Uid:\t0\t0\t0\t0").verdict, Verdict::Ok);
    }

    #[test]
    fn small_shared_memory_segments_are_named_only_for_fast_dds() {
        let env = |rmw: &'static str| {
            move |n: &str| match n {
                "ROS_DISTRO" => Some("jazzy".to_owned()),
                "RMW_IMPLEMENTATION" => Some(rmw.to_owned()),
                _ => None,
            }
        };
        assert_eq!(ros(env("rmw_fastrtps_cpp")).len(), 2);
        assert_eq!(ros(env("rmw_cyclonedds_cpp")).len(), 1);
        assert_eq!(ros(|_| None)[0].verdict, Verdict::Note);
    }
}
