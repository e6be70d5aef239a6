//! Times over the split as a drawing: where the two curves cross, the pipeline is fastest.

use std::fmt::Write;

use super::{Results, Share};
use crate::engine::partition::Kind;

/// Size of the drawing and of the plot inside it, px.
const WIDTH: f64 = 860.0;
const HEIGHT: f64 = 460.0;
const LEFT: f64 = 70.0;
const RIGHT: f64 = 820.0;
const TOP: f64 = 70.0;
const BOTTOM: f64 = 380.0;
/// Encode, decode, both, period: they differ in brightness too.
const COLOURS: [&str; 4] = ["#2a6fb0", "#d1495b", "#333333", "#e0a030"];

/// One curve: what it is, and milliseconds over the encoder's share of the SMs.
struct Curve {
    name: String,
    colour: &'static str,
    dashed: bool,
    points: Vec<(f64, f64)>,
}

/// The encoder's part of the SMs in use, 0 to 1.
fn part(share: &Share) -> f64 {
    share.grant.encoder as f64 / (share.grant.encoder + share.grant.decoder) as f64
}

fn curves(r: &Results) -> Vec<Curve> {
    let mut all = Vec::new();
    for (kind, dashed) in [(Kind::Green, false), (Kind::Mps, true)] {
        let mut add = |what: &str, colour: usize, mut points: Vec<(f64, f64)>| {
            points.sort_by(|a, b| a.0.total_cmp(&b.0));
            if !points.is_empty() {
                let name = format!("{}, {what}", kind.name());
                all.push(Curve { name, colour: COLOURS[colour], dashed, points });
            }
        };
        let alone = || r.alone.iter().filter(|(s, _)| s.grant.kind == kind);
        add("encode alone", 0, alone().map(|(s, t)| (part(s), t[0].median())).collect());
        add("decode alone", 1, alone().map(|(s, t)| (part(s), t[1].median())).collect());
        let both = r.concurrent.iter().filter(|(s, _)| s.grant.kind == kind);
        add("both at once", 2, both.map(|(s, t)| (part(s), t[0].median())).collect());
        let running = r.running.iter().filter(|(s, p)| s.grant.kind == kind && p.mode.name() == "pipelined");
        add("pipelined, period", 3, running.map(|(s, p)| (part(s), p.period.median())).collect());
    }
    all
}

/// The drawing as SVG.
pub fn draw(r: &Results, title: &str) -> String {
    let curves = curves(r);
    let most = curves.iter().flat_map(|c| &c.points).map(|p| p.1).filter(|v| v.is_finite()).fold(1.0, f64::max);
    // Five steps of a round number.
    let step = [1.0, 2.0, 5.0, 10.0, 20.0, 50.0].into_iter().find(|s| s * 5.0 >= most).unwrap_or(most / 5.0);
    let x = |part: f64| LEFT + (RIGHT - LEFT) * part;
    let y = |ms: f64| BOTTOM - (BOTTOM - TOP) * ms / (step * 5.0);
    let mut out = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {HEIGHT}\" font-family=\"sans-serif\" \
         font-size=\"13\">\n<rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n\
         <text x=\"{LEFT}\" y=\"28\" font-size=\"16\">Encoder and decoder over the split, median ms</text>\n\
         <text x=\"{LEFT}\" y=\"48\" fill=\"#555\">{}</text>\n",
        title.replace('&', "&amp;").replace('<', "&lt;")
    );
    for i in 0..=5 {
        let ms = step * f64::from(i);
        let _ = writeln!(
            out,
            "<line x1=\"{LEFT}\" x2=\"{RIGHT}\" y1=\"{0:.1}\" y2=\"{0:.1}\" stroke=\"#ddd\"/>\
             <text x=\"{1}\" y=\"{2:.1}\" text-anchor=\"end\">{ms:.0}</text>",
            y(ms),
            LEFT - 8.0,
            y(ms) + 4.0
        );
        let percent = 20 * i;
        let _ = writeln!(
            out,
            "<text x=\"{:.1}\" y=\"{}\" text-anchor=\"middle\">{percent} %</text>",
            x(f64::from(percent) / 100.0),
            BOTTOM + 18.0
        );
    }
    let _ = writeln!(
        out,
        "<text x=\"{}\" y=\"{}\" text-anchor=\"middle\">SMs of the encoder</text>",
        (LEFT + RIGHT) / 2.0,
        BOTTOM + 36.0
    );
    for (i, c) in curves.iter().enumerate() {
        let dash = if c.dashed { " stroke-dasharray=\"6 4\"" } else { "" };
        let line: Vec<String> = c.points.iter().map(|(p, ms)| format!("{:.1},{:.1}", x(*p), y(*ms))).collect();
        let _ = writeln!(
            out,
            "<polyline points=\"{}\" fill=\"none\" stroke=\"{}\" stroke-width=\"2\"{dash}/>",
            line.join(" "),
            c.colour
        );
        for (p, ms) in &c.points {
            let _ = writeln!(out, "<circle cx=\"{:.1}\" cy=\"{:.1}\" r=\"3.5\" fill=\"{}\"/>", x(*p), y(*ms), c.colour);
        }
        let (at, row) = (LEFT + 195.0 * (i % 4) as f64, BOTTOM + 56.0 + 16.0 * (i / 4) as f64);
        let _ = writeln!(out, "<text x=\"{at}\" y=\"{row}\" fill=\"{}\">{}</text>", c.colour, c.name);
    }
    out + "</svg>\n"
}
