//! What the node says about itself: one status for people and machines, and six diagnostics.

use crate::clock::{Monotonic, RosTime};
use crate::control::{ChunkRefusal, ControlStatus, DeadlinesSnapshot, InputFault, Level, Mode, Names, Reason, Rule};
use crate::pipeline::PipelineReport;
use crate::pipeline::inputs::{CameraFreshness, JointSample, stamp_is_believable};
use crate::telemetry::Stats;

use super::recorder::Report;

/// The whole node at one moment.
#[derive(Debug, Clone, PartialEq)]
pub struct Status {
    /// The worst that is true.
    pub level: Level,
    /// Control mode.
    pub mode: Mode,
    /// One sentence: what it does, or why it does not.
    pub message: String,
    /// Everything countable, by name.
    pub values: Vec<(String, String)>,
    /// One per part of the node.
    pub diagnostics: Vec<Diagnostic>,
}

/// One entry of `/diagnostics`.
#[derive(Debug, Clone, PartialEq)]
pub struct Diagnostic {
    /// `inputs`, `inference`, `control`, `safety`, `gpu` or `recorder`.
    pub name: &'static str,
    /// How serious.
    pub level: Level,
    /// One sentence.
    pub message: String,
    /// Figures with units in their names.
    pub values: Vec<(String, String)>,
}

/// One camera as it is seen now.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct CameraView {
    pub name: String,
    pub max_age_ms: f64,
    pub freshness: CameraFreshness,
    pub size: Option<(usize, usize)>,
    /// Why its last message could not be used, or why none comes.
    pub refusal: Option<String>,
}

/// Everything a status is made of.
pub(super) struct Facts<'a> {
    pub ros_now: RosTime,
    pub now: Monotonic,
    /// Since the control loop began.
    pub seconds: f64,
    pub control: &'a ControlStatus,
    /// Nobody listens to an output, or somebody else publishes on it.
    pub output_fault: Option<InputFault>,
    /// Limits of each joint with their sources; empty where one is missing.
    pub limits_from: &'a [String],
    /// What is wrong with the robot description.
    pub description_problems: &'a [String],
    /// Windows that the control loop counts as published and that were never sent.
    pub unsent: u64,
    /// For how long there has been no window to write to, because none came back from the publisher; 0 if there is.
    pub blocked_ms: f64,
    /// What a robot plays of its last window before it brakes.
    pub output_window_ms: f64,
    pub names: &'a Names,
    pub deadlines: DeadlinesSnapshot,
    pub pipeline: &'a PipelineReport,
    /// Chunks decoded before inference was last activated.
    pub decoded_before: u64,
    /// Loading the policy failed.
    pub load_error: bool,
    /// Label of the lifecycle state.
    pub lifecycle: &'a str,
    pub pipeline_mode: &'a str,
    pub cameras: &'a [CameraView],
    pub joints: &'a JointSample,
    pub max_joint_age_ms: f64,
    pub unknown_joints: &'a [String],
    /// What is wrong with the publishers of `joint_states`.
    pub joint_states_wiring: Option<&'a str>,
    /// What keeps the node from becoming active, or what failed.
    pub note: Option<&'a str>,
    pub prompt: &'a str,
    pub device: &'a str,
    /// Rights asked for and what came of it.
    pub rights: &'a [(String, String)],
    /// Identical frames in a row that count as frozen.
    pub frozen_after: u64,
    /// What the flight recorder has done; `None` if it is switched off.
    pub recorder: Option<Report>,
}

fn ms(ns: f64) -> String {
    format!("{:.2}", ns * 1e-6)
}

fn push_stats(values: &mut Vec<(String, String)>, name: &str, s: &Stats) {
    for (suffix, ns) in [("p50", s.p50), ("p99", s.p99), ("max", s.max)] {
        values.push((format!("{name}_ms_{suffix}"), ms(ns as f64)));
    }
}

/// Before the first command nothing is said about slack: zero would read as a near miss.
fn push_slack(values: &mut Vec<(String, String)>, d: &DeadlinesSnapshot) {
    values.push(pair("deadline_ms", ms(d.deadline as f64)));
    if let Some(s) = d.slack {
        for (suffix, ns) in [("min", s.min), ("p01", s.p01), ("p50", s.p50)] {
            values.push((format!("slack_ms_{suffix}"), ms(ns as f64)));
        }
    }
}

fn pair(name: impl Into<String>, value: impl ToString) -> (String, String) {
    (name.into(), value.to_string())
}

impl Status {
    pub(super) fn new(f: &Facts<'_>) -> Self {
        let diagnostics = vec![inputs(f), inference(f), control(f), safety(f), gpu(f), recorder(f)];
        let message = message(f);
        let told = diagnostics.iter().map(|d| d.level).filter(|l| *l != Level::Stale);
        let level = match (f.control.level, told.max().unwrap_or(Level::Ok)) {
            // No news is news only where nobody has to act.
            (Level::Stale, Level::Error) if f.load_error => Level::Error,
            (own, worst) => own.max(worst),
        };
        Self { level, mode: f.control.mode, values: values(f, &message), message, diagnostics }
    }
}

/// While the publisher is stuck.
const BLOCKED: &str = "no command leaves the node: publishing is blocked and the robot has braked by itself; check network and middleware";

/// Whether nothing has left the node for longer than the robot could go on by itself.
fn blocked(f: &Facts<'_>) -> bool {
    f.blocked_ms > f.output_window_ms
}

/// Ticks whose window was sent, and periods that left nothing: a window that was not sent is a skipped period.
fn sent_and_skipped(f: &Facts<'_>) -> (u64, u64) {
    let k = &f.control.counters;
    let unsent = f.unsent.min(k.published);
    (k.published - unsent, k.skipped + unsent)
}

fn message(f: &Facts<'_>) -> String {
    let c = f.control;
    if blocked(f) && f.note.is_none() {
        return BLOCKED.into();
    }
    match (f.note, c.reason, c.mode) {
        (Some(note), _, _) => note.into(),
        (None, Some(reason), Mode::Active | Mode::Coast | Mode::Stopping | Mode::Stopped | Mode::Fault) => {
            reason.text(f.names)
        }
        (None, _, Mode::Active) => "ready; call ~/enable to arm".into(),
        (None, _, Mode::Ramp) => "armed: moving to the start of the plan".into(),
        (None, _, Mode::Run) => "armed: following the policy".into(),
        (None, _, mode) => mode.to_string(),
    }
}

fn values(f: &Facts<'_>, message: &str) -> Vec<(String, String)> {
    let c = f.control;
    let k = &c.counters;
    let (published, skipped) = sent_and_skipped(f);
    let mut v = vec![
        pair("mode", c.mode),
        pair("lifecycle", f.lifecycle),
        pair("reason", message),
        pair("armed", c.mode.armed()),
        pair("pipeline_mode", f.pipeline_mode),
        pair("device", f.device),
        pair("prompt", f.prompt),
        pair("epoch", c.epoch),
        pair("seconds", format!("{:.3}", f.seconds)),
        pair("ticks", k.ticks),
        pair("published", published),
        pair("skipped", skipped),
        pair("unarmed", k.unarmed),
        pair("deadline_misses", f.deadlines.misses),
        pair("chunks", k.chunks),
        pair("chunks_adopted", k.adopted),
        pair("chunks_superseded", k.superseded),
        pair("chunks_rejected", k.refused_total()),
        pair("starved", k.starved),
    ];
    push_stats(&mut v, "chunk_age", &f.pipeline.chunk.stats());
    push_stats(&mut v, "encode", &f.pipeline.encode.time.stats());
    push_stats(&mut v, "decode", &f.pipeline.decode.time.stats());
    v.push(pair("interventions", c.interventions.total()));
    v.push(pair("max_seam_jump_rad", format!("{:.5}", c.seam_jump_max)));
    v.push(pair("max_tracking_error_rad", format!("{:.5}", c.tracking_error_max)));
    v.extend(f.cameras.iter().map(|camera| pair(format!("camera.{}", camera.name), camera_text(f, camera))));
    v
}

pub(super) fn camera_text(f: &Facts<'_>, c: &CameraView) -> String {
    match c.size {
        Some((w, h)) => {
            let age = c.freshness.age_ms(f.ros_now, f.now);
            format!("{w}x{h} at {:.1} Hz, {age:.0} ms old, {} frames", c.freshness.rate_hz(), c.freshness.frames)
        }
        None => "no frame yet".into(),
    }
}

fn inputs(f: &Facts<'_>) -> Diagnostic {
    let mut problems = Vec::new();
    let mut values = Vec::new();
    for (i, c) in f.cameras.iter().enumerate() {
        values.push(pair(format!("camera.{}", c.name), camera_text(f, c)));
        if c.freshness.refused > 0 {
            values.push(pair(format!("camera.{}.refused", c.name), c.freshness.refused));
        }
        if let Some(problem) = camera_problem(f, i, c) {
            problems.push((Level::Error, problem));
        } else if c.freshness.frozen >= f.frozen_after {
            problems.push((
                Level::Warn,
                format!("camera '{}': the last {} frames are identical: frozen?", c.name, c.freshness.frozen),
            ));
        }
        if c.freshness.frames > 0 && !stamp_is_believable(c.freshness.stamp, f.ros_now) {
            problems.push((
                Level::Warn,
                format!("camera '{}': its stamps are zero or in the future: judged by arrival instead", c.name),
            ));
        }
    }
    problems.extend((0..f.names.joints.len()).filter_map(|i| joint_problem(f, i)).map(|p| (Level::Error, p)));
    let unbelievable = |i: &usize| f.joints.seen(*i) && !stamp_is_believable(f.joints.stamps[*i], f.ros_now);
    if let Some(joint) = (0..f.names.joints.len()).find(unbelievable).and_then(|i| f.names.joints.get(i)) {
        problems.push((
            Level::Warn,
            format!("joint '{joint}': its stamps are zero or in the future: judged by arrival instead"),
        ));
    }
    let oldest = (0..f.names.joints.len()).map(|i| f.joints.age_ms(i, f.ros_now, f.now)).fold(0.0, f64::max);
    values.push(pair("joint_states.messages", f.joints.messages));
    values.push(pair("joint_states.oldest_age_ms", format!("{oldest:.1}")));
    values.push(pair("prompt", f.prompt));
    if f.prompt.trim().is_empty() {
        problems.push((Level::Warn, InputFault::PromptMissing.text(f.names)));
    }
    summarise("inputs", problems, "all inputs fresh", values)
}

/// What is wrong with camera `i`, if anything: what the control side says of it, and what its last message said.
fn camera_problem(f: &Facts<'_>, i: usize, c: &CameraView) -> Option<String> {
    let text = c.freshness.fault(i, c.max_age_ms, f.ros_now, f.now)?.text(f.names);
    Some(match &c.refusal {
        Some(why) => format!("{text} ({why})"),
        None => text,
    })
}

/// What is wrong with joint `i`, if anything: what the control side says of it, and what was heard instead.
fn joint_problem(f: &Facts<'_>, i: usize) -> Option<String> {
    let (position, age) = (f.joints.positions[i], f.joints.age_ms(i, f.ros_now, f.now));
    let missing = || Reason::StateMissing { joint: i }.text(f.names);
    if !f.joints.seen(i) {
        let heard = match f.joint_states_wiring {
            _ if !f.unknown_joints.is_empty() => format!("heard instead: {}", f.unknown_joints.join(", ")),
            Some(why) => why.into(),
            None => "nothing heard yet".into(),
        };
        Some(format!("{} ({heard})", missing()))
    } else if !position.is_finite() {
        Some(format!("{} (its position is {position})", missing()))
    } else if age > f.max_joint_age_ms {
        let stale = Reason::StateStale { joint: i, age: age * 1e-3, max: f.max_joint_age_ms * 1e-3 }.text(f.names);
        Some(f.joint_states_wiring.map_or(stale.clone(), |why| format!("{stale} ({why})")))
    } else {
        None
    }
}

/// The first thing that is missing for a node to become active: an input, or the chunk made of them.
pub(super) fn missing(f: &Facts<'_>) -> Option<String> {
    let joint = (0..f.names.joints.len()).find_map(|i| joint_problem(f, i));
    let camera = || f.cameras.iter().enumerate().find_map(|(i, c)| camera_problem(f, i, c));
    joint
        .or_else(camera)
        .or_else(|| {
            (f.pipeline.decode.runs <= f.decoded_before).then(|| match &f.pipeline.waiting_for {
                Some(why) => why.clone(),
                None => "first action chunk".into(),
            })
        })
        .map(|what| format!("waiting: {what}"))
}

fn inference(f: &Facts<'_>) -> Diagnostic {
    let r = f.pipeline;
    let mut values = vec![
        pair("encodes", r.encode.runs),
        pair("decodes", r.decode.runs),
        pair("encode_errors", r.encode.errors),
        pair("decode_errors", r.decode.errors),
        pair("chunks_over_budget", r.over_budget),
        pair("chunks_guided", r.guided),
        pair("chunks_not_taken", r.not_taken),
        pair("prefixes_displaced", r.displaced),
        pair("observations_skewed", r.skewed),
    ];
    push_stats(&mut values, "chunk_age", &r.chunk.stats());
    push_stats(&mut values, "encode", &r.encode.time.stats());
    push_stats(&mut values, "decode", &r.decode.time.stats());
    push_stats(&mut values, "queue", &r.queue.stats());
    push_stats(&mut values, "hand_over", &r.hand_over.stats());
    for (i, n) in f.control.counters.refused.iter().enumerate().filter(|(_, n)| **n > 0) {
        values.push(pair(format!("chunks_refused_{}", ChunkRefusal::NAMES[i]), n));
    }
    let mut problems = Vec::new();
    if let Some((_, fault)) = &r.fault {
        problems.push((Level::Error, fault.clone()));
    }
    if let Some(why) = &r.waiting_for {
        problems.push((Level::Warn, format!("waiting: {why}")));
    }
    if let Some(e) = &r.last_error {
        problems.push((Level::Warn, e.clone()));
    }
    summarise("inference", problems, "chunks are coming", values)
}

fn control(f: &Facts<'_>) -> Diagnostic {
    let k = &f.control.counters;
    let (published, skipped) = sent_and_skipped(f);
    let mut values = vec![
        pair("mode", f.control.mode),
        pair("ticks", k.ticks),
        pair("published", published),
        pair("skipped", skipped),
        pair("unarmed", k.unarmed),
        pair("deadline_misses", f.deadlines.misses),
        pair("clock_jumps", k.clock_jumps),
        pair("windows_not_sent", f.unsent),
        pair("publisher_blocked_ms", format!("{:.0}", f.blocked_ms)),
    ];
    push_stats(&mut values, "wake_late", &f.deadlines.wake_late);
    push_stats(&mut values, "compute", &f.deadlines.compute);
    push_stats(&mut values, "publish", &f.deadlines.publish);
    push_slack(&mut values, &f.deadlines);
    push_stats(&mut values, "plan_age", &f.deadlines.plan_age);
    push_stats(&mut values, "observation_to_command", &f.deadlines.observation_to_command);
    values.extend(f.rights.iter().cloned());
    let level = if blocked(f) { Level::Error } else { f.control.level };
    Diagnostic { name: "control", level, message: message(f), values }
}

fn safety(f: &Facts<'_>) -> Diagnostic {
    let c = f.control;
    let mut values: Vec<_> = Rule::ALL
        .iter()
        .map(|(rule, name)| pair(format!("interventions.{name}"), c.interventions.by_rule(*rule)))
        .collect();
    for (j, joint) in f.names.joints.iter().enumerate() {
        for (rule, name) in Rule::ALL {
            match c.interventions.of(j, rule) {
                0 => {}
                n => values.push(pair(format!("{joint}.{name}"), n)),
            }
        }
    }
    values.push(pair("seam_jump_rad", format!("{:.5}", c.seam_jump)));
    values.push(pair("max_seam_jump_rad", format!("{:.5}", c.seam_jump_max)));
    values.push(pair("tracking_error_rad", format!("{:.5}", c.tracking_error)));
    values.push(pair("max_tracking_error_rad", format!("{:.5}", c.tracking_error_max)));
    for (joint, from) in f.names.joints.iter().zip(f.limits_from) {
        values.push(pair(format!("limits.{joint}"), if from.is_empty() { "incomplete: no arming" } else { from }));
    }
    let described = f.description_problems.iter().map(|p| (Level::Warn, p.clone()));
    let problems = f.output_fault.iter().map(|fault| (Level::Warn, fault.text(f.names))).chain(described).collect();
    summarise("safety", problems, "within limits", values)
}

fn gpu(f: &Facts<'_>) -> Diagnostic {
    let p = f.pipeline;
    let mut values = vec![pair("device", f.device), pair("partition", &p.partition), pair("resplits", p.resplits)];
    if let Some(r) = p.last_resplit {
        let how = if r.cached { "kept ready" } else { "built" };
        values.push(pair("last_resplit", how));
        values.push(pair("last_resplit_build_ms", format!("{:.1}", r.build_ms)));
        values.push(pair("last_resplit_in_force_ms", format!("{:.1}", r.total_ms)));
    }
    Diagnostic { name: "gpu", level: Level::Ok, message: f.device.into(), values }
}

fn recorder(f: &Facts<'_>) -> Diagnostic {
    let Some(r) = &f.recorder else { return summarise("recorder", Vec::new(), "switched off", Vec::new()) };
    let values = vec![
        pair("held_seconds", format!("{:.1}", r.seconds)),
        pair("held_megabytes", format!("{:.1}", r.bytes as f64 * 1e-6)),
        pair("messages_lost", r.lost),
        pair("recordings_written", r.written),
        pair("last_recording", r.last.as_ref().map(|p| p.display().to_string()).unwrap_or_default()),
    ];
    let problems = r.failure.iter().map(|why| (Level::Warn, why.clone())).collect();
    summarise("recorder", problems, "recording", values)
}

fn summarise(
    name: &'static str,
    problems: Vec<(Level, String)>,
    fine: &str,
    values: Vec<(String, String)>,
) -> Diagnostic {
    let level = problems.iter().map(|(l, _)| *l).max().unwrap_or(Level::Ok);
    let message = if problems.is_empty() {
        fine.into()
    } else {
        problems.into_iter().map(|(_, text)| text).collect::<Vec<_>>().join("; ")
    };
    Diagnostic { name, level, message, values }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::Slack;

    #[test]
    fn slack_is_said_in_milliseconds_from_the_first_command_on() {
        let said = |slack| {
            let mut values = Vec::new();
            push_slack(&mut values, &DeadlinesSnapshot { deadline: 20_000_000, slack, ..Default::default() });
            values.into_iter().map(|(k, v)| format!("{k} {v}")).collect::<Vec<_>>().join(", ")
        };
        assert_eq!(said(None), "deadline_ms 20.00");
        let slack = Slack { min: -1_500_000, p01: 18_000_000, p50: 19_870_000 };
        assert_eq!(said(Some(slack)), "deadline_ms 20.00, slack_ms_min -1.50, slack_ms_p01 18.00, slack_ms_p50 19.87");
    }
}
