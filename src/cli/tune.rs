//! `pi0 tune`: which mode, backend and split serve a target best on this GPU, measured; writes the parameter file.

use std::fmt::Write as _;
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::time::Duration;

use indicatif::ProgressBar;

use super::CliError;
use super::bench::{Setup, Share, flow, out_file, shares};
use crate::engine::Engine;
use crate::engine::partition::{Backend, Kind, Offer};
use crate::model::Family;
use crate::pipeline::PipelineMode;
use crate::telemetry::OutFile;

/// How a file of this tool begins.
const MARK: &str = "# pi0 tune ";
/// Shares of the encoder that are tried, percent; then all between the best one's neighbours.
const PERCENTS: [u8; 7] = [30, 40, 50, 60, 66, 70, 80];

/// Run the pipeline in every mode on every kind of share, then on all splits around the best one, and write the parameters
/// that serve the target best.
///
/// latency: youngest images in a finished chunk. rate: most chunks, each of new images. state-rate: most chunks, each of
/// the newest joint state. --budget-ms bounds the age of the images in 99 of 100 chunks.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    setup: Setup,
    /// What to be best at.
    #[arg(long, value_enum)]
    target: Target,
    /// Oldest images of a chunk when it is finished, ms.
    #[arg(long, value_name = "MS")]
    budget_ms: Option<f64>,
    /// Seconds that each candidate runs.
    #[arg(long, default_value_t = 3.0)]
    seconds: f64,
    /// Where the parameters go; without it, standard output. A file that is already there is replaced only if pi0 tune
    /// wrote it: it holds these parameters and no others.
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
    /// Print one JSON object instead of the parameters.
    #[arg(long)]
    json: bool,
}

/// What to be best at.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Target {
    /// Youngest images in a finished chunk.
    Latency,
    /// Most chunks a second, each of new images.
    Rate,
    /// Most chunks a second, each of the newest joint state.
    StateRate,
}

/// What a candidate did.
#[derive(Debug, Clone)]
struct Measured {
    share: Share,
    mode: PipelineMode,
    decode_hz: f64,
    encode_hz: f64,
    /// Of the images when a chunk was finished, ms.
    age_p50: f64,
    age_p99: f64,
}

impl Measured {
    /// Whether it can serve the target at all.
    fn serves(&self, target: Target) -> bool {
        target == Target::StateRate || self.mode != PipelineMode::DualRate
    }

    /// Less is better.
    fn cost(&self, target: Target) -> f64 {
        match target {
            Target::Latency => self.age_p50,
            Target::Rate | Target::StateRate => -self.decode_hz,
        }
    }

    fn line(&self) -> String {
        format!(
            "{:10} {:24} {:6.1} chunks/s {:6.1} encodes/s   image age p50 {:6.2} ms, p99 {:6.2} ms",
            self.mode.name(),
            self.share.name(),
            self.decode_hz,
            self.encode_hz,
            self.age_p50,
            self.age_p99
        )
    }
}

/// Splits around the best candidate's that have not been tried, of the same kind.
fn around(best: &Measured, offer: &Offer, tried: &[Measured]) -> Vec<Share> {
    let Some(percent) = best.share.percent else { return Vec::new() };
    let below = PERCENTS.iter().rev().find(|p| **p < percent).copied().unwrap_or(percent.saturating_sub(10));
    let above = PERCENTS.iter().find(|p| **p > percent).copied().unwrap_or(percent + 10);
    let between: Vec<u8> = (below + 1..above).collect();
    let new = |s: &Share| s.grant.kind == best.share.grant.kind && tried.iter().all(|t| t.share.grant != s.grant);
    shares(offer, &between).into_iter().filter(new).collect()
}

/// The best candidate within the budget, or why there is none.
fn choose(all: &[Measured], target: Target, budget_ms: Option<f64>) -> Result<&Measured, String> {
    let within = |m: &&Measured| m.serves(target) && budget_ms.is_none_or(|b| m.age_p99 <= b);
    all.iter().filter(within).min_by(|a, b| a.cost(target).total_cmp(&b.cost(target))).ok_or_else(|| {
        let least = all.iter().filter(|m| m.serves(target)).map(|m| m.age_p99).fold(f64::INFINITY, f64::min);
        format!("nothing stays within --budget-ms {}: the best has a p99 of {least:.2} ms", budget_ms.unwrap_or(0.0))
    })
}

/// Begins --out; a file that holds more than this tool writes is left alone.
fn begin(file: &Path) -> Result<OutFile, CliError> {
    let mut start = Vec::new();
    if file.is_file() {
        let read = File::open(file).and_then(|f| f.take(MARK.len() as u64).read_to_end(&mut start));
        read.map_err(|e| CliError::input(format!("--out {}: {e}", file.display())))?;
    }
    if !(start.is_empty() || start == MARK.as_bytes()) {
        return Err(CliError::input(format!(
            "--out {}: is there and was not written by pi0 tune, whose parameters would replace all of it: choose another \
             file, and load it after this one",
            file.display()
        )));
    }
    out_file("--out", file)
}

/// Runs the tool.
pub fn run(args: &Args) -> Result<(), CliError> {
    if !(args.seconds.is_finite() && (0.1..=600.0).contains(&args.seconds)) {
        return Err(CliError::input(format!("--seconds {}: must be 0.1 to 600", args.seconds)));
    }
    if args.budget_ms.is_some_and(|b| !(b.is_finite() && b > 0.0)) {
        return Err(CliError::input("--budget-ms must be above 0"));
    }
    let out = args.out.as_deref().map(begin).transpose()?;
    let (engine, load) = args.setup.load()?;
    let Some(offer) = engine.offer() else { return Err(CliError::input("this device has no shares to tune")) };
    let mut candidates = vec![(Share { grant: offer.whole().grant, percent: None }, PipelineMode::Sequential)];
    for share in shares(offer, &PERCENTS) {
        candidates.push((share, PipelineMode::Pipelined));
        if engine.dims().family == Family::Pi0 {
            candidates.push((share, PipelineMode::DualRate));
        }
    }
    let bar = ProgressBar::new(candidates.len() as u64);
    let measure = |share: Share, mode| -> Result<Measured, CliError> {
        let r = flow::running(&engine, &load, share.grant, mode, Duration::from_secs_f64(args.seconds))?;
        let (decode_hz, encode_hz, mut age) = (r.decode_hz(), r.encode_hz(), r.age);
        age.sort_by(f64::total_cmp);
        let quantile = |q: f64| age.get((age.len().saturating_sub(1) as f64 * q).round() as usize).copied();
        let [age_p50, age_p99] = [0.5, 0.99].map(|q| quantile(q).unwrap_or(f64::INFINITY));
        let measured = Measured { share, mode, decode_hz, encode_hz, age_p50, age_p99 };
        bar.println(measured.line());
        bar.inc(1);
        Ok(measured)
    };
    let mut all = candidates.iter().map(|(share, mode)| measure(*share, *mode)).collect::<Result<Vec<_>, _>>()?;
    if let Ok(best) = choose(&all, args.target, args.budget_ms) {
        let (more, mode) = (around(best, offer, &all), best.mode);
        bar.inc_length(more.len() as u64);
        // What has been measured so far is not lost to a split that turns out not to work.
        for share in more {
            match measure(share, mode) {
                Ok(measured) => all.push(measured),
                Err(e) => {
                    bar.println(format!("{}: {e}; no further splits are tried", share.name()));
                    break;
                }
            }
        }
    }
    bar.finish_and_clear();
    let best = choose(&all, args.target, args.budget_ms).map_err(CliError::input)?;
    let about = format!("{}; {}", engine.describe(), args.setup.about(&load));
    let text = yaml(best, &all, args, &about);
    if let Some((file, out)) = args.out.as_ref().zip(out) {
        out.finish_with(&text).map_err(|e| CliError::input(format!("--out {}: {e}", file.display())))?;
    }
    if args.json {
        let row = |m: &Measured| {
            serde_json::json!({ "mode": m.mode.name(), "backend": m.share.grant.kind.name(),
                "encoder_percent": m.share.percent, "encoder_sms": m.share.grant.encoder,
                "decoder_sms": m.share.grant.decoder, "decode_hz": m.decode_hz, "encode_hz": m.encode_hz,
                "image_age_ms_p50": m.age_p50, "image_age_ms_p99": m.age_p99 })
        };
        println!("{}", serde_json::json!({ "best": row(best), "all": all.iter().map(row).collect::<Vec<_>>() }));
    } else if let Some(file) = &args.out {
        println!("{}\n{}: written", best.line(), file.display());
    } else {
        print!("{text}");
    }
    Ok(())
}

/// The parameters, and what was measured as comments.
fn yaml(best: &Measured, all: &[Measured], args: &Args, about: &str) -> String {
    let target = match args.target {
        Target::Latency => "latency",
        Target::Rate => "rate",
        Target::StateRate => "state-rate",
    };
    let budget = args.budget_ms.map_or_else(String::new, |b| format!(" --budget-ms {b}"));
    let mut out = format!("{MARK}--target {target}{budget}\n# {about}\n#\n# measured, {} s each:\n", args.seconds);
    for m in all {
        let mark = if std::ptr::eq(m, best) { '>' } else { ' ' };
        let _ = writeln!(out, "# {mark} {}", m.line());
    }
    let (backend, encoder) = match best.share.grant.kind {
        Kind::Whole => (Backend::Auto, 50),
        Kind::Mps => (Backend::Mps, best.share.percent.unwrap_or(50)),
        Kind::Green => (Backend::Green, best.share.percent.unwrap_or(50)),
        Kind::Shared => (Backend::Shared, 50),
    };
    let _ = write!(
        out,
        "/**:\n  ros__parameters:\n    pipeline_mode: {}\n    partition: {backend}\n    mps_encoder_percentage: {encoder}\n    \
         mps_decoder_percentage: {}\n",
        best.mode,
        100 - encoder
    );
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::partition::Grant;
    use crate::params::{Value, yaml as params_yaml};

    fn measured(mode: PipelineMode, kind: Kind, decode_hz: f64, age: f64) -> Measured {
        let share = Share { grant: Grant { kind, encoder: 92, decoder: 40 }, percent: Some(70) };
        Measured { share, mode, decode_hz, encode_hz: 100.0, age_p50: age, age_p99: age + 1.0 }
    }

    fn args(more: &[&str]) -> Args {
        use clap::Parser;
        #[derive(Parser)]
        struct Line {
            #[command(flatten)]
            args: Args,
        }
        Line::parse_from([&["tune", "--target", "rate"], more].concat()).args
    }

    #[test]
    fn each_target_has_its_own_best() {
        let all = [
            measured(PipelineMode::Sequential, Kind::Whole, 90.0, 11.0),
            measured(PipelineMode::Pipelined, Kind::Green, 130.0, 16.0),
            measured(PipelineMode::Pipelined, Kind::Mps, 140.0, 18.0),
            measured(PipelineMode::DualRate, Kind::Green, 210.0, 19.0),
        ];
        let best = |target, budget| choose(&all, target, budget).map(|m| (m.mode, m.share.grant.kind));
        assert_eq!(best(Target::Latency, None), Ok((PipelineMode::Sequential, Kind::Whole)));
        assert_eq!(best(Target::Rate, None), Ok((PipelineMode::Pipelined, Kind::Mps)));
        assert_eq!(best(Target::Rate, Some(17.5)), Ok((PipelineMode::Pipelined, Kind::Green)));
        assert_eq!(best(Target::StateRate, None), Ok((PipelineMode::DualRate, Kind::Green)));
        assert!(best(Target::Rate, Some(5.0)).unwrap_err().contains("the best has a p99 of 12.00 ms"));
    }

    #[test]
    fn splits_around_the_best_are_tried_too() {
        let offer = crate::engine::partition::hopper();
        let tried = |percents: &[u8]| -> Vec<Measured> {
            let row = |share| Measured { share, ..measured(PipelineMode::Pipelined, Kind::Mps, 100.0, 1.0) };
            shares(&offer, percents).into_iter().map(row).collect()
        };
        let all = tried(&PERCENTS);
        let encoders = |kind, percent| {
            let best = all.iter().find(|m| m.share.grant.kind == kind && m.share.percent == percent).unwrap();
            let new = around(best, &offer, &all);
            assert!(new.iter().all(|s| s.grant.kind == kind));
            new.iter().map(|s| s.grant.encoder).collect::<Vec<_>>()
        };
        assert_eq!(encoders(Kind::Mps, Some(60)), [68, 70, 72, 74, 76, 78, 82, 84, 86]);
        assert_eq!(encoders(Kind::Mps, Some(66)), [82, 84, 86, 90, 92]);
        assert_eq!(encoders(Kind::Mps, Some(30)), [28, 30, 32, 34, 36, 38, 42, 44, 46, 48, 50, 52]);
        assert_eq!(encoders(Kind::Green, Some(60)), Vec::<usize>::new(), "groups of eight: 76 and 84 were tried");
        assert_eq!(encoders(Kind::Green, Some(80)), [100, 116], "groups of eight");
        assert_eq!(encoders(Kind::Shared, None), Vec::<usize>::new());
    }

    #[test]
    fn what_is_written_is_a_parameter_file() {
        let args = args(&[]);
        let all = [measured(PipelineMode::Pipelined, Kind::Green, 130.0, 16.0)];
        let text = yaml(&all[0], &all, &args, "a GPU");
        let given = params_yaml::overrides(&text, "pi0_mps").unwrap();
        let value = |name: &str| given.iter().find(|(n, _)| n == name).map(|(_, v)| v.clone());
        assert_eq!(value("partition"), Some(Value::String("green".into())));
        assert_eq!(value("mps_decoder_percentage"), Some(Value::Int(30)));
        assert_eq!(value("pipeline_mode"), Some(Value::String("pipelined".into())));
        assert!(text.contains("# > pipelined  green 70-30 (92+40)"), "{text}");

        // That file may be replaced; the robot's own may not, and nothing is measured before this is known.
        let dir = tempfile::tempdir().unwrap();
        let [tuned, robot, absent] =
            ["tuned.yaml", "robot.yaml", "absent/tuned.yaml"].map(|name| dir.path().join(name));
        std::fs::write(&tuned, &text).unwrap();
        begin(&tuned).unwrap().finish_with("# pi0 tune again\n").unwrap();
        assert_eq!(std::fs::read_to_string(&tuned).unwrap(), "# pi0 tune again\n");
        let own = "/**:\n  ros__parameters:\n    camera_names: [base]\n";
        std::fs::write(&robot, own).unwrap();
        for (out, why) in [(&robot, "was not written by pi0 tune"), (&absent, "No such file")] {
            let refused = run(&self::args(&["--out", out.to_str().unwrap()])).unwrap_err().to_string();
            assert!(refused.starts_with(&format!("--out {}: ", out.display())) && refused.contains(why), "{refused}");
        }
        assert_eq!(std::fs::read_to_string(&robot).unwrap(), own);
    }
}
