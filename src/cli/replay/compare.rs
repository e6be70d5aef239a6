//! Two runs over the same recording: how far their commands are apart.

use serde_json::{Map, Value as Json, json};

use super::CliError;
use super::output::{Latencies, Signal, Tape};
use crate::clock::RosTime;

/// Commands further apart than this are two motions with a pause between; nothing is interpolated over it.
const LONGEST_GAP_S: f64 = 0.5;

/// The difference of one joint's commands.
#[derive(Debug, Clone, PartialEq)]
struct Difference {
    joint: String,
    largest: f64,
    mean: f64,
    /// When, ROS time.
    at: RosTime,
    commands: usize,
}

/// The difference of two runs.
#[derive(Debug)]
pub struct Comparison {
    joints: Vec<Difference>,
    /// Joints that have no command at a time of the other run.
    unpaired: Vec<String>,
    begin: RosTime,
    latencies: [Latencies; 2],
}

impl Comparison {
    /// Commands of `ours` against what `theirs` says for the same times.
    pub fn new(ours: &Tape, theirs: &Tape) -> Result<Self, CliError> {
        let (mut joints, mut unpaired) = (Vec::new(), Vec::new());
        for ((joint, a), (_, b)) in ours.signals.iter().zip(&theirs.signals) {
            match difference(joint, a, b) {
                Some(difference) => joints.push(difference),
                None => unpaired.push(joint.clone()),
            }
        }
        let range = |t: &Tape| {
            let times = || t.signals.iter().flat_map(|(_, s)| s.iter().map(|(at, _)| *at));
            times().min().zip(times().max())
        };
        let say = |r: Option<(RosTime, RosTime)>| {
            r.map_or("never".into(), |(a, b)| format!("{:.3} to {:.3} s", a.0 as f64 * 1e-9, b.0 as f64 * 1e-9))
        };
        if joints.is_empty() {
            return Err(CliError::input(format!(
                "the two runs have no time in common: commands from {} here, from {} there",
                say(range(ours)),
                say(range(theirs))
            )));
        }
        let begin = range(ours).map(|r| r.0).unwrap_or_default();
        Ok(Self { joints, unpaired, begin, latencies: [ours.latencies.clone(), theirs.latencies.clone()] })
    }

    /// The largest difference of any command; one that is not a number is the largest.
    pub fn largest(&self) -> f64 {
        self.joints.iter().map(|d| d.largest).max_by(f64::total_cmp).unwrap_or(0.0)
    }

    /// Why the runs do not agree to within `most`, if they don't: what could not be compared doesn't.
    pub fn disagreement(&self, most: f64) -> Option<String> {
        let largest = self.largest();
        if !self.unpaired.is_empty() {
            let joints = self.unpaired.join(", ");
            return Some(format!(
                "no command of {joints} is at a time of the other run, so that --tolerance {most} cannot be told: \
                 compare runs over the same recording"
            ));
        }
        (largest > most || largest.is_nan()).then(|| {
            format!("the commands differ by {largest:.6}, more than the tolerance of {most}: see the joints above")
        })
    }

    /// By joint.
    pub fn json(&self) -> Json {
        let joints = self.joints.iter().map(|d| {
            let at = d.at.seconds_since(self.begin);
            (d.joint.clone(), json!({"largest": d.largest, "mean": d.mean, "at": at, "commands": d.commands}))
        });
        json!({
            "largest": self.largest(),
            "joints": joints.collect::<Map<_, _>>(),
            "not_compared": self.unpaired,
            "latency_ms": self.latencies[1].json(),
        })
    }

    /// Two tables.
    pub fn text(&self) -> String {
        let names = self.joints.iter().map(|d| &d.joint).chain(&self.unpaired);
        let width = names.map(String::len).max().unwrap_or(0).max(22);
        let mut out = format!(
            "{:<w$}{:>12}{:>12}{:>12}{:>12}\n",
            "difference",
            "largest",
            "mean",
            "at",
            "commands",
            w = width + 2
        );
        for d in &self.joints {
            let at = format!("{:.3} s", d.at.seconds_since(self.begin));
            out += &format!("  {:<width$}{:>12.6}{:>12.6}{at:>12}{:>12}\n", d.joint, d.largest, d.mean, d.commands);
        }
        for joint in &self.unpaired {
            out += &format!("  {joint:<width$}  no command at a time of the other run\n");
        }
        let [ours, theirs] = &self.latencies;
        out + &Latencies::table(&[("replay", ours), ("other", theirs)])
    }
}

/// The difference of `a` from the line through `b`, at the times of `a`; `None` if they have none in common.
fn difference(joint: &str, a: &Signal, b: &Signal) -> Option<Difference> {
    let mut d = Difference { joint: joint.into(), largest: -1.0, mean: 0.0, at: RosTime(0), commands: 0 };
    for (at, q) in a {
        let Some(other) = interpolate(b, *at) else { continue };
        let apart = (q - other).abs();
        d.mean += apart;
        d.commands += 1;
        if apart.total_cmp(&d.largest).is_gt() {
            (d.largest, d.at) = (apart, *at);
        }
    }
    d.mean /= d.commands.max(1) as f64;
    (d.commands > 0).then_some(d)
}

/// Between the two commands around `at`.
fn interpolate(signal: &Signal, at: RosTime) -> Option<f64> {
    let after = signal.partition_point(|(t, _)| *t < at);
    let (t1, q1) = signal.get(after)?;
    if *t1 == at {
        return Some(*q1);
    }
    let (t0, q0) = signal.get(after.checked_sub(1)?)?;
    let span = t1.seconds_since(*t0);
    (span <= LONGEST_GAP_S).then(|| q0 + (q1 - q0) * at.seconds_since(*t0) / span)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_are_compared_at_the_same_time_and_not_over_a_pause() {
        let at = |ms: i64| RosTime(1_000_000_000 + ms * 1_000_000);
        let b: Signal = vec![(at(0), 0.0), (at(20), 0.2), (at(1000), 5.0)];
        let a: Signal =
            vec![(at(-5), 9.0), (at(10), 0.1), (at(15), 0.25), (at(500), 9.0), (at(1000), 5.0), (at(1001), 9.0)];
        let d = difference("elbow", &a, &b).unwrap();
        assert_eq!((d.commands, d.at), (3, at(15)));
        assert!((d.largest - 0.1).abs() < 1e-12 && (d.mean - 0.1 / 3.0).abs() < 1e-12);
        assert_eq!(difference("elbow", &a[..1].to_vec(), &b), None);
    }

    #[test]
    fn what_cannot_be_compared_is_not_within_the_tolerance() {
        let tape = |signals: &[(&str, &[(i64, f64)])]| {
            let signal = |s: &[(i64, f64)]| s.iter().map(|(at, q)| (RosTime(*at), *q)).collect();
            let signals = signals.iter().map(|(joint, s)| ((*joint).into(), signal(s))).collect();
            Tape { signals, ..Tape::default() }
        };
        let ours = tape(&[("elbow", &[(1, 0.0), (2, 0.1)]), ("wrist", &[(1, 0.5)])]);
        let against = |elbow: &[(i64, f64)], wrist: &[(i64, f64)]| {
            Comparison::new(&ours, &tape(&[("elbow", elbow), ("wrist", wrist)])).unwrap()
        };
        let close = against(&[(1, 0.0), (2, 0.2)], &[(1, 0.5)]);
        assert_eq!((close.disagreement(0.2), close.json()["not_compared"].clone()), (None, json!([])));
        assert!(close.disagreement(0.05).unwrap().contains("differ by 0.100000, more than the tolerance of 0.05"));
        let partly = against(&[(1, 0.0)], &[(7, 0.5)]);
        assert!(partly.disagreement(9.0).unwrap().contains("no command of wrist"));
        assert_eq!(partly.json()["not_compared"], json!(["wrist"]));
        assert!(partly.text().contains("  wrist "), "{}", partly.text());
        let broken = against(&[(1, f64::NAN), (2, 0.1)], &[(1, 0.5)]);
        assert!(broken.disagreement(9.0).unwrap().contains("differ by NaN"));
    }
}
