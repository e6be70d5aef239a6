//! `pi0 doctor`: what on this machine would keep the node from running well, and how to fix it.

mod mps;

use std::fs;
use std::path::{Path, PathBuf};

use serde::Serialize;

use super::CliError;
use crate::engine::Device;
use crate::model::{Checkpoint, Policy, PolicyOptions};
use crate::node::SteppedNode;
use crate::params::{DefaultValue, Params, Settings, Value, spec, yaml};
use crate::rt::rights::{self, Right};

/// Looks at this machine and, where given, at a checkpoint and a parameter file.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Checkpoint directory to check: tensors, tokenizer, normalisation statistics.
    #[arg(long)]
    checkpoint: Option<PathBuf>,
    /// ROS parameter file (YAML) to check against the parameter table, and the checkpoint against it. May be given again:
    /// a later file goes on top of the ones before.
    #[arg(long = "params-file", value_name = "FILE")]
    params_files: Vec<PathBuf>,
    /// Print one JSON object instead of a table.
    #[arg(long)]
    json: bool,
}

/// Any of these gives Fast DDS other transports than its default: versions 2 and 3, and both.
const PROFILES: [&str; 3] =
    ["FASTRTPS_DEFAULT_PROFILES_FILE", "FASTDDS_DEFAULT_PROFILES_FILE", "FASTDDS_BUILTIN_TRANSPORTS"];

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

    /// A right that the node asks for, and runs without where it is denied.
    fn right(check: &'static str, right: Right) -> Self {
        match right {
            Right::Granted(what) => Self::ok(check, what),
            Right::Denied { reason, remedy } => Self::new(check, Verdict::Warn, reason, remedy),
        }
    }
}

/// Runs the checks; the exit code is 0 unless one of them is an error.
pub fn run(args: &Args) -> Result<(), CliError> {
    let files: Vec<String> = args.params_files.iter().map(|f| f.display().to_string()).collect();
    let files = files.join(", ");
    let checked = (!files.is_empty()).then(|| params(&args.params_files, args.checkpoint.as_deref()));
    let settings = checked.as_ref().and_then(|c| c.as_ref().ok());
    let mut findings = machine();
    let asks = settings.map_or((default_priority(), true), |s| (s.process.rt_priority, s.process.lock_memory));
    findings.extend(granted(asks.0, asks.1));
    findings.extend(ros(|name| std::env::var(name).ok()));
    findings.push(gpu());
    findings.extend(mps::findings());
    if let Some(dir) = &args.checkpoint {
        findings.extend(checkpoint(dir, settings));
    }
    if let Some(checked) = &checked {
        findings.push(match checked {
            Ok(_) => Finding::ok("parameter file", files),
            Err(problems) => Finding::new("parameter file", Verdict::Error, format!("{files}: {problems}"), ""),
        });
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

/// What the node asks for where no parameter file says otherwise.
fn default_priority() -> Option<u8> {
    match spec("rt_priority").map(|s| s.default) {
        Some(DefaultValue::Int(priority)) => u8::try_from(priority).ok().filter(|p| *p > 0),
        _ => None,
    }
}

/// Real-time rights, asked for as the node asks: what a limit or a user id promises, a container may still refuse.
fn granted(priority: Option<u8>, lock_memory: bool) -> Vec<Finding> {
    let scheduled = priority.and_then(|p| std::thread::spawn(move || rights::fifo(p.into())).join().ok());
    let scheduled = scheduled.map(|right| Finding::right("SCHED_FIFO", right));
    let locked = lock_memory.then(|| Finding::right("memory locking", rights::may_lock_memory()));
    scheduled.into_iter().chain(locked).collect()
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
    if rmw.contains("fastrtps") && PROFILES.iter().all(|name| var(name).is_none()) {
        out.push(Finding::new(
            "image transport",
            Verdict::Warn,
            "Fast DDS with its default 512 KiB shared-memory segment: larger best-effort images are lost",
            "export FASTRTPS_DEFAULT_PROFILES_FILE (up to Jazzy) or FASTDDS_DEFAULT_PROFILES_FILE (later), on both sides: \
             <share>/config/fastdds.xml",
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

fn checkpoint(dir: &Path, settings: Option<&Settings>) -> Vec<Finding> {
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
    let mut out = vec![if loaded.config().horizon.is_some() {
        Finding::ok("checkpoint", found)
    } else {
        Finding::new(
            "checkpoint",
            Verdict::Warn,
            format!("{found}, which is assumed: config.json gives neither 'chunk_size' nor 'action_horizon'"),
            "write \"action_horizon\": N of the training configuration into config.json",
        )
    }];
    if loaded.state_in_prompt_is_assumed() {
        out.push(Finding::new(
            "state in the prompt",
            Verdict::Warn,
            "assumed: config.json does not give 'discrete_state_input'",
            "write \"discrete_state_input\": true or false into config.json, as in the training configuration (pi05_libero: false)",
        ));
    }
    let policy = match settings {
        Some(settings) => SteppedNode::policy(settings, &loaded).map_err(|e| e.to_string()),
        None => Policy::open(&loaded, dir, &PolicyOptions::default()).map_err(|e| e.to_string()),
    };
    out.push(match policy {
        Ok(p) => {
            let cameras = p.cameras().join(", ");
            let (state, action) = (p.state_len(), p.action_len());
            let fits = if settings.is_some() { "; cameras and joints of the parameter file fit" } else { "" };
            Finding::ok("policy", format!("cameras {cameras}; {state} state and {action} action values{fits}"))
        }
        Err(e) if settings.is_none() => {
            Finding::new("policy", Verdict::Error, e, "what parameters say of it is read from --params-file")
        }
        Err(e) => Finding::new("policy", Verdict::Error, e, ""),
    });
    out
}

/// What params files set, checked as the node would; a checkpoint given to this tool counts as given, since a launch
/// file does the same.
fn params(files: &[PathBuf], checkpoint: Option<&Path>) -> Result<Settings, String> {
    let mut given = Vec::new();
    for file in files {
        given.extend(yaml::read(file, "pi0_mps")?);
    }
    if let Some(dir) = checkpoint {
        given.push(("checkpoint".into(), Value::String(dir.display().to_string())));
    }
    let params = Params::from_overrides(given)
        .map_err(|errors| errors.iter().map(ToString::to_string).collect::<Vec<_>>().join("; "))?;
    Ok(params.settings())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_right_that_is_denied_comes_with_its_remedy() {
        let denied = Right::Denied { reason: "SCHED_FIFO 40: no".into(), remedy: "add rtprio".into() };
        let f = Finding::right("SCHED_FIFO", denied);
        assert_eq!((f.verdict, f.remedy.as_str()), (Verdict::Warn, "add rtprio"));
        assert_eq!(Finding::right("SCHED_FIFO", Right::Granted("SCHED_FIFO 40".into())).verdict, Verdict::Ok);
    }

    #[test]
    fn rights_are_those_that_the_node_would_get() {
        let priority = default_priority();
        let asked = granted(priority, true);
        let node = std::thread::spawn(move || rights::fifo(priority.unwrap().into())).join().unwrap();
        assert_eq!(asked[0], Finding::right("SCHED_FIFO", node));
        assert_eq!(asked.len(), 2);
        assert_eq!(granted(None, false), [], "where none is asked for");
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
        for name in PROFILES {
            let set = |n: &str| (n == name).then(|| "file".to_owned()).or_else(|| env("rmw_fastrtps_cpp")(n));
            assert_eq!(ros(set).len(), 1, "{name}");
        }
        assert_eq!(ros(env("rmw_fastrtps_cpp")).len(), 2);
        assert_eq!(ros(env("rmw_cyclonedds_cpp")).len(), 1);
        assert_eq!(ros(|_| None)[0].verdict, Verdict::Note);
    }
}
