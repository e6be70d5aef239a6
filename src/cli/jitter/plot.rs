//! The histogram as a drawing: both axes logarithmic, because one late wake-up in a thousand is what matters.

use std::fmt::Write;

use super::report::{Report, time};
use crate::telemetry::Histogram;

/// Bins per factor of ten in lateness.
const PER_DECADE: f64 = 10.0;
/// Size of the drawing, px.
const WIDTH: f64 = 860.0;
const HEIGHT: f64 = 440.0;
/// The plot inside it, px.
const LEFT: f64 = 70.0;
const RIGHT: f64 = 840.0;
const TOP: f64 = 100.0;
const BOTTOM: f64 = 380.0;
/// One colour per phase; they differ in brightness too.
const COLOURS: [&str; 2] = ["#2a6fb0", "#d1495b"];

/// Where a histogram is drawn: powers of ten from and to.
struct Axes {
    /// Of nanoseconds.
    x: (i32, i32),
    /// Of wake-ups; begins half a decade below one, so that a single wake-up is seen.
    y: (f64, i32),
}

impl Axes {
    fn of(histograms: &[&Histogram]) -> Self {
        let decade = |n: u64| n.max(1).ilog10() as i32;
        let low = histograms.iter().map(|h| decade(h.stats().min)).min().unwrap_or(3);
        let high = histograms.iter().map(|h| decade(h.stats().max) + 1).max().unwrap_or(4);
        let most = histograms.iter().map(|h| decade(h.count()) + 1).max().unwrap_or(1);
        Self { x: (low, high.max(low + 1)), y: (-0.5, most) }
    }

    fn x(&self, log: f64) -> f64 {
        LEFT + (RIGHT - LEFT) * (log - f64::from(self.x.0)) / f64::from(self.x.1 - self.x.0)
    }

    fn y(&self, count: u64) -> f64 {
        let log = if count == 0 { self.y.0 } else { (count as f64).log10() };
        BOTTOM - (BOTTOM - TOP) * (log - self.y.0) / (f64::from(self.y.1) - self.y.0)
    }
}

/// Wake-ups per bin; bin `i` begins at `10^(low + i / PER_DECADE)` ns.
fn bins(h: &Histogram, axes: &Axes) -> Vec<u64> {
    let mut bins = vec![0; (f64::from(axes.x.1 - axes.x.0) * PER_DECADE) as usize];
    for (ns, n) in h.nonzero() {
        let log = (ns.clamp(1, h.stats().max.max(1)) as f64).log10() - f64::from(axes.x.0);
        let i = ((log * PER_DECADE) as usize).min(bins.len() - 1);
        bins[i] += n;
    }
    bins
}

/// A whole power of ten of nanoseconds, as 10 µs.
fn decade(power: i32) -> String {
    let (unit, zero) = match power {
        ..3 => ("ns", 0),
        3..6 => ("µs", 3),
        6..9 => ("ms", 6),
        _ => ("s", 9),
    };
    format!("1{} {unit}", "0".repeat(usize::try_from(power - zero).unwrap_or(0)))
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

/// A document of its own, with figures, conditions and axes.
pub(super) fn svg(report: &Report) -> String {
    let mut out = String::new();
    // Writing to a string cannot fail.
    let _ = draw(report, &mut out);
    out
}

fn draw(report: &Report, out: &mut String) -> std::fmt::Result {
    let histograms: Vec<&Histogram> = report.phases.iter().map(|p| &p.lateness).collect();
    let axes = Axes::of(&histograms);
    let rights: Vec<String> = report
        .rights
        .iter()
        .map(|(name, r)| format!("{name} {}", if r.granted() { "granted" } else { "denied" }))
        .collect();
    let conditions = escape(&report.conditions());
    let system = escape(&format!("{}; {}", report.machine.system(), rights.join(", ")));
    writeln!(
        out,
        r##"<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" font-family="system-ui, sans-serif" font-size="12" fill="#333">
<title>Wake-up lateness at {conditions}</title>
<rect width="100%" height="100%" fill="#fff"/>
<text x="{LEFT}" y="26" font-size="17" font-weight="600">Wake-up lateness of the control loop</text>
<text x="{LEFT}" y="45">{conditions}</text>
<text x="{LEFT}" y="62">{system}</text>"##
    )?;
    grid(&axes, out)?;
    for ((phase, colour), column) in report.phases.iter().zip(COLOURS).zip(0u8..) {
        let s = phase.lateness.stats();
        if s.count == 0 {
            continue;
        }
        curve(&bins(&phase.lateness, &axes), &axes, colour, out)?;
        let x = axes.x((s.max.max(1) as f64).log10());
        writeln!(out, r#"<path d="M{x:.1} {TOP}V{BOTTOM}" stroke="{colour}" stroke-dasharray="4 3"/>"#)?;
        // Above the plot, where nothing can hide it.
        let (x, y) = (LEFT + (RIGHT - LEFT) / 2.0 * f64::from(column), TOP - 10.0);
        let (name, p50, p99, max) = (escape(phase.name), time(s.p50), time(s.p99), time(s.max));
        writeln!(
            out,
            r##"<rect x="{x}" y="{}" width="12" height="12" fill="{colour}"/><text x="{}" y="{y}" font-size="11">{name}: p50 {p50}, p99 {p99}, max {max}, skipped {}</text>"##,
            y - 10.0,
            x + 18.0,
            phase.skipped
        )?;
    }
    writeln!(out, "</svg>")
}

fn grid(axes: &Axes, out: &mut String) -> std::fmt::Result {
    for power in axes.x.0..=axes.x.1 {
        let x = axes.x(f64::from(power));
        writeln!(out, r##"<path d="M{x:.1} {TOP}V{BOTTOM}" stroke="#ddd"/>"##)?;
        writeln!(out, r#"<text x="{x:.1}" y="{}" text-anchor="middle">{}</text>"#, BOTTOM + 17.0, decade(power))?;
        for digit in 2..10 {
            let x = axes.x(f64::from(power) + f64::from(digit).log10());
            if x < RIGHT {
                writeln!(out, r##"<path d="M{x:.1} {BOTTOM}v4" stroke="#888"/>"##)?;
            }
        }
    }
    for power in 0..=axes.y.1 {
        let count = 10u64.saturating_pow(power.unsigned_abs());
        let y = axes.y(count);
        writeln!(out, r##"<path d="M{LEFT} {y:.1}H{RIGHT}" stroke="#ddd"/>"##)?;
        writeln!(out, r#"<text x="{}" y="{:.1}" text-anchor="end">{count}</text>"#, LEFT - 6.0, y + 4.0)?;
    }
    let middle = (TOP + BOTTOM) / 2.0;
    writeln!(out, r##"<path d="M{LEFT} {TOP}V{BOTTOM}H{RIGHT}" fill="none" stroke="#333"/>"##)?;
    writeln!(
        out,
        r#"<text x="{}" y="{}" text-anchor="middle">lateness: scheduled to awake</text>"#,
        (LEFT + RIGHT) / 2.0,
        BOTTOM + 40.0
    )?;
    writeln!(
        out,
        r#"<text x="18" y="{middle}" text-anchor="middle" transform="rotate(-90 18 {middle})">wake-ups per bin</text>"#
    )
}

/// The outline of all bins, filled.
fn curve(bins: &[u64], axes: &Axes, colour: &str, out: &mut String) -> std::fmt::Result {
    write!(out, r#"<path d="M{LEFT} {BOTTOM}"#)?;
    for (i, n) in bins.iter().enumerate() {
        let end = axes.x(f64::from(axes.x.0) + (i + 1) as f64 / PER_DECADE);
        write!(out, "V{:.1}H{end:.1}", axes.y(*n))?;
    }
    writeln!(out, r#"V{BOTTOM}Z" fill="{colour}" fill-opacity="0.3" stroke="{colour}" stroke-width="1.5"/>"#)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::jitter::report::tests::given;

    #[test]
    fn the_drawing_has_title_axes_units_and_figures_and_is_well_formed() {
        let text = svg(&given());
        for part in [
            "<title>Wake-up lateness at 50 Hz for 4 s each, 4 × Core &lt;A&gt; &amp; \"B\"</title>",
            ">lateness: scheduled to awake<",
            ">wake-ups per bin<",
            ">10 µs<",
            ">100 µs<",
            ">1 ms<",
            ">10 ms<",
            ">Linux 6.8.0 (PREEMPT_RT); lock_memory denied, priority granted<",
            "idle: p50 40.2 µs, p99 90.0 µs, max 90.0 µs, skipped 0<",
            "under load: p50 60.2 µs, p99 60.2 µs, max 3.00 ms, skipped 1<",
        ] {
            assert!(text.contains(part), "'{part}' is not in:\n{text}");
        }
        // Every element is closed, and none of the machine's own text opened one.
        let opened = text.matches('<').count() - text.matches("</").count();
        assert_eq!(opened, text.matches("</").count() + text.matches("/>").count());
        assert!(!text.contains("NaN") && !text.contains("inf"));
    }

    #[test]
    fn every_wake_up_is_in_a_bin_and_every_bin_on_the_paper() {
        let report = given();
        let all: Vec<&Histogram> = report.phases.iter().map(|p| &p.lateness).collect();
        let axes = Axes::of(&all);
        assert_eq!((axes.x, axes.y), ((4, 7), (-0.5, 3)));
        let idle = bins(all[0], &axes);
        // 40 µs is 6.02 tenths of a decade past 10 µs, 90 µs is 9.54.
        assert_eq!((idle.len(), idle[6], idle[9], idle.iter().sum::<u64>()), (30, 180, 20, 200));
        assert_eq!((axes.x(4.0), axes.x(7.0)), (LEFT, RIGHT));
        assert_eq!((axes.y(0), axes.y(1000)), (BOTTOM, TOP));
        assert!(axes.y(1) < BOTTOM - 20.0, "one wake-up is seen");
    }

    #[test]
    fn nothing_measured_and_extremes_are_drawn_too() {
        let mut report = given();
        report.phases[0].lateness = Histogram::new();
        report.phases[1].lateness.record(0);
        report.phases[1].lateness.record(u64::MAX);
        let text = svg(&report);
        assert!(text.contains("under load: p50") && !text.contains("idle: p50"));
        assert!(!text.contains("NaN") && !text.contains("inf"), "{text}");
        report.phases.clear();
        assert!(svg(&report).ends_with("</svg>\n"));
    }

    #[test]
    fn decades_have_their_units() {
        assert_eq!(
            [0, 2, 3, 5, 6, 8, 9, 10].map(decade),
            ["1 ns", "100 ns", "1 µs", "100 µs", "1 ms", "100 ms", "1 s", "10 s"]
        );
    }
}
