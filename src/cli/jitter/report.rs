//! The figures as text and as JSON.

use serde_json::{Value, json};

use super::{Machine, Phase, Plan, Rights};
use crate::rt::rights::Right;

/// Characters of the longest bar.
const BAR: usize = 24;

/// A measurement and everything it depends on.
#[derive(Debug, Clone)]
pub(super) struct Report {
    pub machine: Machine,
    pub plan: Plan,
    pub rights: Rights,
    pub phases: Vec<Phase>,
}

/// Nanoseconds as a person reads them.
pub(super) fn time(ns: u64) -> String {
    let (value, unit) = match ns {
        0..1_000_000 => (ns as f64 * 1e-3, "µs"),
        1_000_000..1_000_000_000 => (ns as f64 * 1e-6, "ms"),
        _ => (ns as f64 * 1e-9, "s"),
    };
    // Three digits say all that a quantile knows.
    let decimals = if value < 9.995 { 2 } else { usize::from(value < 99.95) };
    format!("{value:.decimals$} {unit}")
}

/// Bounds of the bin with `ns` in the series 1, 2, 5, 10, … µs: above the first, up to the second.
fn bin(ns: u64) -> (u64, u64) {
    let (mut low, mut high) = (0, 1_000);
    // The first digits 1, 2, 5 in turn.
    let mut factors = [(2, 1), (5, 2), (2, 1)].iter().cycle();
    while ns > high {
        let (up, down) = factors.next().copied().unwrap_or((2, 1));
        (low, high) = (high, high / down * up);
    }
    (low, high)
}

impl Report {
    /// What was measured, and on what.
    pub fn conditions(&self) -> String {
        let Plan { rate, duration, .. } = &self.plan;
        let each = if self.phases.len() > 1 { " each" } else { "" };
        format!("{rate} Hz for {duration} s{each}, {}", self.machine.hardware())
    }

    /// Figures and histograms for a terminal.
    pub fn text(&self) -> String {
        let mut out = format!("wake-ups at {}\n{}\n", self.conditions(), self.machine.system());
        for (name, right) in &self.rights {
            out += &format!("  {name:<12} {right}\n");
        }
        let skipped = "skipped periods";
        out += &format!("\n{:<12} {:>10} {:>10} {:>10}   {skipped}\n", "lateness", "p50", "p99", "max");
        for p in &self.phases {
            let s = p.lateness.stats();
            let (p50, p99, max) = (time(s.p50), time(s.p99), time(s.max));
            let all = s.count + p.skipped;
            out += &format!("{:<12} {p50:>10} {p99:>10} {max:>10}   {} of {all}\n", p.name, p.skipped);
        }
        out + "\n" + &self.histogram()
    }

    /// One line per bin, one column of bars per phase. A bin that is not empty has a bar, however short.
    fn histogram(&self) -> String {
        let mut bins = Vec::<((u64, u64), Vec<u64>)>::new();
        for (i, phase) in self.phases.iter().enumerate() {
            for (ns, count) in phase.lateness.nonzero() {
                // A bucket's largest value may lie past the largest value recorded.
                let bounds = bin(ns.min(phase.lateness.stats().max));
                let place = bins.binary_search_by_key(&bounds, |(b, _)| *b).unwrap_or_else(|at| {
                    bins.insert(at, (bounds, vec![0; self.phases.len()]));
                    at
                });
                bins[place].1[i] += count;
            }
        }
        let most = bins.iter().flat_map(|(_, counts)| counts).copied().max().unwrap_or(1).max(1);
        let mut out = format!("{:<20}", "lateness up to");
        for p in &self.phases {
            out += &format!("  {:<width$}", p.name, width = BAR + 9);
        }
        out = out.trim_end().to_owned() + "\n";
        for ((_, high), counts) in &bins {
            let mut line = format!("{:>14}      ", time(*high));
            for n in counts {
                let bar = ((*n as f64 / most as f64 * BAR as f64).round() as usize).max(usize::from(*n > 0));
                line += &format!("  {:<BAR$} {:>8}", "█".repeat(bar), n);
            }
            out += &(line + "\n");
        }
        out
    }

    /// Everything, times in nanoseconds.
    pub fn json(&self) -> Value {
        let rights: Vec<Value> = (self.rights.iter())
            .map(|(name, right)| match right {
                Right::Granted(what) => json!({ "name": name, "granted": true, "what": what }),
                Right::Denied { reason, remedy } => {
                    json!({ "name": name, "granted": false, "reason": reason, "remedy": remedy })
                }
            })
            .collect();
        let phases: Vec<Value> = (self.phases.iter())
            .map(|p| {
                let s = p.lateness.stats();
                json!({
                    "name": p.name,
                    "wake_ups": s.count,
                    "skipped": p.skipped,
                    "lateness_ns": {
                        "min": s.min, "mean": s.mean, "p50": s.p50, "p95": s.p95, "p99": s.p99, "max": s.max,
                    },
                    "histogram_ns": p.lateness.nonzero().collect::<Vec<_>>(),
                })
            })
            .collect();
        json!({
            "machine": self.machine,
            "rate_hz": self.plan.rate,
            "duration_s": self.plan.duration,
            "priority": self.plan.priority,
            "cpu": self.plan.cpu,
            "rights": rights,
            "phases": phases,
        })
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::telemetry::Histogram;

    /// Idle: 180 wake-ups at 40 µs, 20 at 90 µs. Under load: 198 at 60 µs, one at 3 ms, one period skipped.
    pub fn given() -> Report {
        let phase = |name, values: &[(u64, u64)], skipped| {
            let mut lateness = Histogram::new();
            values.iter().for_each(|(ns, n)| (0..*n).for_each(|_| lateness.record(*ns)));
            Phase { name, lateness, skipped }
        };
        Report {
            machine: Machine {
                cpu: "Core <A> & \"B\"".into(),
                cpus: 4,
                virtual_machine: false,
                kernel: "6.8.0".into(),
                preempt_rt: true,
                governor: None,
            },
            plan: Plan { rate: 50.0, duration: 4.0, priority: Some(40), cpu: None },
            rights: vec![
                ("lock_memory", Right::Denied { reason: "limited".into(), remedy: "raise it".into() }),
                ("priority", Right::Granted("SCHED_FIFO 40".into())),
            ],
            phases: vec![
                phase("idle", &[(40_000, 180), (90_000, 20)], 0),
                phase("under load", &[(60_000, 198), (3_000_000, 1)], 1),
            ],
        }
    }

    #[test]
    fn times_have_three_digits_and_a_unit() {
        let shown = [0, 940, 9_994, 9_996, 99_940, 123_456, 4_200_000, 2_000_000_000].map(time);
        assert_eq!(shown, ["0.00 µs", "0.94 µs", "9.99 µs", "10.0 µs", "99.9 µs", "123 µs", "4.20 ms", "2.00 s"]);
    }

    #[test]
    fn bins_go_1_2_5_and_include_their_upper_bound() {
        for (ns, bounds) in [
            (0, (0, 1_000)),
            (1_000, (0, 1_000)),
            (1_001, (1_000, 2_000)),
            (2_001, (2_000, 5_000)),
            (5_001, (5_000, 10_000)),
            (10_001, (10_000, 20_000)),
            (3_000_000, (2_000_000, 5_000_000)),
        ] {
            assert_eq!(bin(ns), bounds, "{ns}");
        }
    }

    #[test]
    fn the_text_has_conditions_rights_figures_and_every_wake_up() {
        let text = given().text();
        let bars = |n: usize| "█".repeat(n);
        for part in [
            "wake-ups at 50 Hz for 4 s each, 4 × Core <A> & \"B\"\nLinux 6.8.0 (PREEMPT_RT)\n".into(),
            "lock_memory  denied: limited; raise it\n".into(),
            "priority     granted: SCHED_FIFO 40\n".into(),
            // A quantile is within 1 % above the value.
            "idle            40.2 µs    90.0 µs    90.0 µs   0 of 200\n".into(),
            "under load      60.2 µs    60.2 µs    3.00 ms   1 of 200\n".into(),
            format!("50.0 µs        {:<24}      180  {:<24}        0\n", bars(22), ""),
            format!("100 µs        {:<24}       20  {:<24}      198\n", bars(2), bars(24)),
            format!("5.00 ms        {:<24}        0  {:<24}        1\n", "", bars(1)),
        ] {
            assert!(text.contains(&part), "'{part}' is not in:\n{text}");
        }
    }

    #[test]
    fn the_json_has_every_figure_in_nanoseconds() {
        let v = given().json();
        let keys: Vec<_> = v.as_object().unwrap().keys().map(String::as_str).collect();
        assert_eq!(keys, ["machine", "rate_hz", "duration_s", "priority", "cpu", "rights", "phases"]);
        assert_eq!(v["machine"]["preempt_rt"], true);
        assert_eq!(
            v["rights"][0],
            json!({"name": "lock_memory", "granted": false, "reason": "limited", "remedy": "raise it"})
        );
        assert_eq!(v["rights"][1]["what"], "SCHED_FIFO 40");
        let load = &v["phases"][1];
        assert_eq!((&load["wake_ups"], &load["skipped"]), (&json!(199), &json!(1)));
        assert_eq!(load["lateness_ns"]["max"], 3_000_000);
        let counted: u64 = load["histogram_ns"].as_array().unwrap().iter().map(|b| b[1].as_u64().unwrap()).sum();
        assert_eq!(counted, 199);
    }
}
