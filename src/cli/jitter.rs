//! `pi0 jitter`: how late this machine wakes the control thread.

mod load;
mod machine;
mod plot;
mod report;

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};

use super::CliError;
use crate::error::Fault;
use crate::params::{Value, spec};
use crate::rt::period::Periodic;
use crate::rt::rights::{self, Right};
use crate::telemetry::Histogram;
use load::Load;
use machine::Machine;
use report::Report;

/// Longest measurement of one phase: a day, in seconds.
const LONGEST: f64 = 86_400.0;
/// How often the progress bar is drawn.
const REDRAW: Duration = Duration::from_millis(100);

/// Measure how late this machine wakes the control thread.
///
/// A thread with the period loop and the rights of the control thread (SCHED_FIFO, CPU, locked memory) sleeps from
/// period to period and records how much later than asked it ran: first on the machine as it is, then with one thread
/// per CPU that computes and streams through memory, as inference does. Rights that were denied are named with their
/// remedy; the measurement goes on without them, as the node would.
#[derive(Debug, Clone, clap::Args)]
pub struct Args {
    /// Rate of the loop, as control_rate_hz.
    #[arg(long, value_name = "HZ", allow_negative_numbers = true, default_value_t = 50.0)]
    rate: f64,
    /// Seconds to measure, idle and under load each.
    #[arg(long, value_name = "S", allow_negative_numbers = true, default_value_t = 10.0)]
    duration: f64,
    /// SCHED_FIFO priority, as rt_priority; 0 asks for none.
    #[arg(long, value_name = "N", allow_negative_numbers = true, default_value_t = 40)]
    priority: i64,
    /// CPU of the loop, as the first of cpu_affinity; any if not given.
    #[arg(long, value_name = "N")]
    cpu: Option<usize>,
    /// Measure under load only.
    #[arg(long, conflicts_with = "idle")]
    load: bool,
    /// Measure without load only.
    #[arg(long)]
    idle: bool,
    /// Draw the histogram into this file; an existing file is replaced.
    #[arg(long, value_name = "FILE")]
    svg: Option<PathBuf>,
    /// Print one JSON object instead of text.
    #[arg(long)]
    json: bool,
}

/// What is to be measured, checked.
#[derive(Debug, Clone, PartialEq)]
struct Plan {
    rate: f64,
    duration: f64,
    /// `None` asks for none.
    priority: Option<i32>,
    cpu: Option<usize>,
}

impl Plan {
    /// Checks the arguments; `cpus` are those this process may use.
    fn new(args: &Args, cpus: &[usize]) -> Result<Self, CliError> {
        // The node's own ranges: what is measured here can be configured there.
        let check = |flag: &str, parameter: &str, value: Value| match spec(parameter).map(|s| s.check(&value)) {
            Some(Err(why)) => Err(CliError::input(format!("--{flag} {why}, the range of {parameter}"))),
            _ => Ok(()),
        };
        check("rate", "control_rate_hz", Value::Double(args.rate))?;
        check("priority", "rt_priority", Value::Int(args.priority))?;
        let least = 1.0 / args.rate;
        if !(least..=LONGEST).contains(&args.duration) {
            return Err(CliError::input(format!(
                "--duration {} is outside {least} to {LONGEST} s: give at least one period of --rate {}",
                args.duration, args.rate
            )));
        }
        if let Some(cpu) = args.cpu.filter(|cpu| !cpus.contains(cpu)) {
            let known: Vec<_> = cpus.iter().map(ToString::to_string).collect();
            return Err(CliError::input(format!(
                "--cpu {cpu} is not among the CPUs this process may use: give one of {}",
                known.join(", ")
            )));
        }
        let priority = i32::try_from(args.priority).ok().filter(|p| *p > 0);
        Ok(Self { rate: args.rate, duration: args.duration, priority, cpu: args.cpu })
    }

    fn period(&self) -> Duration {
        Duration::from_secs_f64(1.0 / self.rate)
    }

    /// Periods of one phase.
    fn periods(&self) -> u64 {
        (self.duration * self.rate).round().max(1.0) as u64
    }
}

/// The wake-ups of one phase; `woken + skipped` is the number of periods that passed.
#[derive(Debug, Clone)]
struct Phase {
    name: &'static str,
    /// Scheduled start to awake, ns; one value per wake-up.
    lateness: Histogram,
    /// Whole periods without a wake-up of their own.
    skipped: u64,
}

/// Rights asked for, by name, and what came of it.
type Rights = Vec<(&'static str, Right)>;

/// Runs the tool.
pub fn run(args: &Args) -> Result<(), CliError> {
    let cpus: Vec<usize> = core_affinity::get_core_ids().unwrap_or_default().iter().map(|c| c.id).collect();
    let plan = Plan::new(args, &cpus)?;
    // Before the measurement, so that it is not made in vain.
    let mut svg = args.svg.as_deref().map(|path| create(path).map(|file| (path, file))).transpose()?;

    let mut given = vec![("lock_memory", rights::lock_memory())];
    let mut phases = Vec::new();
    for (name, loaded) in [("idle", false), ("under load", true)] {
        let left_out = if loaded { args.idle } else { args.load };
        if !left_out {
            let (phase, thread_rights) = measure(&plan, name, loaded)?;
            phases.push(phase);
            given.truncate(1);
            given.extend(thread_rights);
        }
    }
    let report = Report { machine: Machine::read(), plan, rights: given, phases };
    if let Some((path, file)) = &mut svg {
        file.write_all(plot::svg(&report).as_bytes()).map_err(|e| not_written(path, &e))?;
    }
    if args.json {
        println!("{}", report.json());
    } else {
        print!("{}", report.text());
        if let Some(path) = &args.svg {
            println!("\nplot: {}", path.display());
        }
    }
    Ok(())
}

fn create(path: &Path) -> Result<File, CliError> {
    File::create(path).map_err(|e| not_written(path, &e))
}

fn not_written(path: &Path, e: &std::io::Error) -> CliError {
    CliError::input(format!("--svg {}: {e}; give a file in an existing folder that you may write to", path.display()))
}

fn no_thread(e: std::io::Error) -> CliError {
    CliError {
        fault: Fault::Machine,
        message: format!("cannot start a thread: {e}; raise the limit of threads (ulimit -u)"),
    }
}

/// One phase, with a progress bar while it lasts, and the rights its thread got.
fn measure(plan: &Plan, name: &'static str, loaded: bool) -> Result<(Phase, Rights), CliError> {
    let load = loaded.then(Load::start).transpose().map_err(no_thread)?;
    let passed = AtomicU64::new(0);
    let bar = progress_bar(plan.periods(), name);
    let measured = std::thread::scope(|scope| {
        let thread = std::thread::Builder::new()
            .name("pi0_jitter".into())
            .spawn_scoped(scope, || wake_ups(plan, name, &passed))
            .map_err(no_thread)?;
        while !thread.is_finished() {
            bar.set_position(passed.load(Ordering::Relaxed));
            std::thread::sleep(REDRAW);
        }
        thread.join().map_err(|_| CliError { fault: Fault::Internal, message: "the measuring thread panicked".into() })
    });
    bar.finish_and_clear();
    drop(load);
    measured
}

/// Drawn on stderr, and only if that is a terminal.
fn progress_bar(periods: u64, name: &'static str) -> ProgressBar {
    let style = ProgressStyle::with_template("{prefix:>10} {wide_bar} {eta}");
    ProgressBar::new(periods).with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar())).with_prefix(name)
}

/// The loop of the control thread, with nothing to do in its periods.
fn wake_ups(plan: &Plan, name: &'static str, passed: &AtomicU64) -> (Phase, Rights) {
    let mut given = Rights::new();
    given.extend(plan.priority.map(|p| ("priority", rights::fifo(p))));
    given.extend(plan.cpu.map(|cpu| ("cpu", rights::affinity(cpu))));
    rights::prefault_stack();
    let mut phase = Phase { name, lateness: Histogram::new(), skipped: 0 };
    let mut periodic = Periodic::new(plan.period());
    while phase.lateness.count() + phase.skipped < plan.periods() {
        let wake = periodic.wait();
        phase.lateness.record(u64::try_from(wake.woke.0 - wake.scheduled.0).unwrap_or(0));
        phase.skipped += wake.skipped;
        passed.store(phase.lateness.count() + phase.skipped, Ordering::Relaxed);
    }
    (phase, given)
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Debug, Parser)]
    struct Line {
        #[command(flatten)]
        args: Args,
    }

    fn plan(line: &[&str]) -> Result<Plan, String> {
        let args = Line::try_parse_from([&["jitter"], line].concat()).map_err(|e| e.to_string())?.args;
        Plan::new(&args, &[0, 3]).map_err(|e| e.to_string())
    }

    #[test]
    fn arguments_become_a_plan() {
        let p = plan(&[]).unwrap();
        assert_eq!(p, Plan { rate: 50.0, duration: 10.0, priority: Some(40), cpu: None });
        assert_eq!((p.period(), p.periods()), (Duration::from_millis(20), 500));
        let p = plan(&["--rate", "1000", "--duration", "0.5", "--priority", "0", "--cpu", "3"]).unwrap();
        assert_eq!((p.priority, p.cpu, p.periods()), (None, Some(3), 500));
    }

    #[test]
    fn bad_arguments_are_refused_with_the_value_and_the_remedy() {
        for (line, parts) in [
            (["--rate", "0"], ["--rate 0.0", "1 to 1000 Hz", "control_rate_hz"]),
            (["--rate", "nan"], ["--rate .nan", "1 to 1000 Hz", "control_rate_hz"]),
            (["--priority", "100"], ["--priority 100", "0 to 99", "rt_priority"]),
            (["--priority", "-1"], ["--priority -1", "0 to 99", "rt_priority"]),
            (["--duration", "0.001"], ["--duration 0.001", "0.02 to 86400 s", "--rate 50"]),
            (["--duration", "inf"], ["--duration inf", "0.02 to 86400 s", "--rate 50"]),
            (["--duration", "nan"], ["--duration NaN", "0.02 to 86400 s", "--rate 50"]),
            (["--cpu", "2"], ["--cpu 2", "may use", "one of 0, 3"]),
            (["--load", "--idle"], ["--load", "--idle", "cannot be used with"]),
        ] {
            let message = plan(&line).unwrap_err();
            for part in parts {
                assert!(message.contains(part), "{line:?}: '{part}' is not in: {message}");
            }
        }
    }

    #[test]
    fn a_file_that_cannot_be_written_is_refused_before_anything_is_measured() {
        let args = Line::parse_from(["jitter", "--svg", "/nowhere/at/all.svg", "--duration", "86400"]).args;
        let e = run(&args).unwrap_err().to_string();
        assert!(e.contains("/nowhere/at/all.svg") && e.contains("existing folder"), "{e}");
    }

    #[test]
    fn every_period_is_a_wake_up_or_skipped() {
        let plan = Plan { rate: 1000.0, duration: 0.05, priority: None, cpu: None };
        for loaded in [false, true] {
            let (phase, rights) = measure(&plan, "name", loaded).unwrap();
            let passed = phase.lateness.count() + phase.skipped;
            assert!(phase.lateness.count() > 0 && passed >= 50, "{phase:?}");
            assert!(rights.is_empty(), "none was asked for");
        }
    }
}
