//! `pi0 bench`: how long one observation takes on the GPU, and what encoder and decoder do to each other on two shares of
//! it, beside what the hardware allows.

use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::{Duration, Instant};

use serde_json::{Map, Value as Json, json};

use super::CliError;
use crate::engine::cuda::CudaEngine;
use crate::engine::partition::{Backend, Grant, Kind, Offer, Split};
use crate::engine::{Device, Engine};
use crate::model::{Checkpoint, Dims, Family, Frame, Resampler};
use crate::params::{ParamError, Params, Value, yaml};
use crate::pipeline::PipelineMode;
use crate::telemetry::{OutFile, trace};
use flow::Load;
use series::Series;

mod floor;
pub(super) mod flow;
mod plot;
mod series;

/// Splits that are timed, in percent of the encoder: those of the original benchmark.
const SPLITS: [u8; 3] = [50, 70, 30];
/// Shares at which each stage is timed alone.
const ALONE: [u8; 3] = [25, 50, 75];

/// Time encoder and decoder one after the other, alone and together on every kind of share, and as a pipeline.
///
/// The inputs are random frames, prompt tokens and noise; with --random-weights the weights are too. Times are host to
/// host, from frames in page-locked memory as in the node, the GPU idle before each; GPU times of the stages come from events. The floor of a stage is the larger of its
/// operations over the GPU's bf16 rate and its bytes over the memory's, for perfect kernels.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    setup: Setup,
    /// What to time; all of it if not given.
    #[arg(long, value_enum, value_delimiter = ',')]
    part: Vec<Part>,
    /// Time only the running pipeline of these parameters (pipeline_mode, partition, shares), as pi0 tune writes them; of
    /// several files the later ones count more.
    #[arg(long = "params-file", value_name = "FILE", conflicts_with = "part")]
    params_files: Vec<PathBuf>,
    /// Observations timed one after the other.
    #[arg(long, default_value_t = 5000, value_parser = clap::value_parser!(u64).range(1..=1_000_000))]
    runs: u64,
    /// Observations timed on each split.
    #[arg(long, default_value_t = 500, value_parser = clap::value_parser!(u64).range(1..=1_000_000))]
    split_runs: u64,
    /// Seconds that each running pipeline is watched.
    #[arg(long, default_value_t = 10.0)]
    seconds: f64,
    /// Seconds of running before the first timed one.
    #[arg(long, default_value_t = 30.0)]
    warm_up: f64,
    /// bf16 rate of the GPU in TFLOP/s, for the floors (H100 and H200: 790 measured).
    #[arg(long, default_value_t = 790.0)]
    tflops: f64,
    /// Memory rate in TB/s, for the floors (H100: 3.0, H200: 4.3, measured).
    #[arg(long, default_value_t = 3.0)]
    bandwidth: f64,
    /// Draw times and rates over the split into this SVG file.
    #[arg(long, value_name = "FILE")]
    plot: Option<PathBuf>,
    /// Write what the running pipelines did when into this file, for https://ui.perfetto.dev.
    #[arg(long, value_name = "FILE")]
    trace: Option<PathBuf>,
    /// Print one JSON object instead of a table.
    #[arg(long)]
    json: bool,
}

/// What is loaded and looked at.
#[derive(Debug, clap::Args)]
pub(super) struct Setup {
    /// cuda or cuda:N.
    #[arg(long, default_value = "cuda")]
    device: String,
    /// Checkpoint directory; without it, random weights of the published π0.
    #[arg(long, value_name = "DIR", conflicts_with = "random_weights")]
    checkpoint: Option<PathBuf>,
    /// Random weights of the published π0's size (the default).
    #[arg(long)]
    random_weights: bool,
    /// Camera views.
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u64).range(1..=8))]
    views: u64,
    /// Prompt tokens.
    #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u64).range(1..=256))]
    prompt_tokens: u64,
    /// Actions a chunk, with random weights.
    #[arg(long, default_value_t = 50, value_parser = clap::value_parser!(u64).range(1..=63))]
    horizon: u64,
    /// Size of the camera frames.
    #[arg(long, default_value = "640x480")]
    frame: Size,
}

/// A part of the benchmark.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Part {
    /// One observation after the other.
    Sequential,
    /// Each stage alone at each share.
    Alone,
    /// Both stages at once on each split.
    Concurrent,
    /// The running pipeline in each mode.
    Running,
}

impl Setup {
    /// The engine and an observation for it.
    pub(super) fn load(&self) -> Result<(CudaEngine, Load), CliError> {
        let index = match self.device.parse::<Device>()? {
            Device::Cuda(index) => index as usize,
            other => return Err(CliError::input(format!("--device {other}: only cuda or cuda:N is timed here"))),
        };
        let engine = match &self.checkpoint {
            Some(dir) => {
                let checkpoint = Checkpoint::open(dir)?;
                CudaEngine::load(&checkpoint, Resampler::from(checkpoint.origin()), index)?
            }
            None => CudaEngine::random(&Dims::published(self.horizon as usize), Resampler::OpenPi, index, 1)?,
        };
        let Size(w, h) = self.frame;
        let load = Load::random(engine.dims(), self.views as usize, self.prompt_tokens as usize, (w, h))?;
        let load = load.kept_by(&engine);
        Ok((engine, load))
    }

    /// What is looked at, for people.
    pub(super) fn about(&self, load: &Load) -> String {
        let Size(w, h) = self.frame;
        let (views, tokens, horizon) = (load.views(), load.tokens(), load.horizon());
        let memory = load.memory();
        format!("{views} views of {w}x{h} in {memory} memory, {tokens} prompt tokens, horizon {horizon}, 10 steps")
    }
}

/// `640x480`.
#[derive(Debug, Clone, Copy)]
pub(super) struct Size(usize, usize);

impl FromStr for Size {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        let side = |n: &str| n.parse().ok().filter(|n| (1..=Frame::MAX_SIDE).contains(n));
        s.split_once('x')
            .and_then(|(w, h)| Some(Self(side(w)?, side(h)?)))
            .ok_or_else(|| format!("expected WIDTHxHEIGHT, each 1 to {}", Frame::MAX_SIDE))
    }
}

/// A grant that is timed, and what was asked for.
#[derive(Debug, Clone, Copy)]
pub(super) struct Share {
    /// SMs of each stage.
    pub grant: Grant,
    /// In percent of the encoder; none where it has no meaning.
    pub percent: Option<u8>,
}

impl Share {
    /// As in a table.
    pub(super) fn name(&self) -> String {
        let Grant { kind, encoder, decoder } = self.grant;
        match self.percent {
            Some(p) => format!("{} {p}-{} ({encoder}+{decoder})", kind.name(), 100 - p),
            None => kind.name().into(),
        }
    }

    fn json(&self) -> Json {
        let Grant { kind, encoder, decoder } = self.grant;
        json!({ "backend": kind.name(), "encoder_percent": self.percent, "encoder_sms": encoder, "decoder_sms": decoder })
    }
}

/// Every grant that these percentages make on what `offer` has; `shared` once, where they have no meaning.
pub(super) fn shares(offer: &Offer, percents: &[u8]) -> Vec<Share> {
    let mut all: Vec<Share> = Vec::new();
    for backend in [Backend::Shared, Backend::Green, Backend::Mps] {
        for percent in percents {
            let split = Split { backend, encoder: *percent, decoder: 100 - *percent };
            let Ok(decision) = offer.decide(split) else { continue };
            if all.iter().all(|s| s.grant != decision.grant) {
                let percent = (decision.grant.kind != Kind::Shared).then_some(*percent);
                all.push(Share { grant: decision.grant, percent });
            }
        }
    }
    all
}

/// Clocks, power and temperature now, as nvidia-smi reads them; none where it is not there.
fn clocks() -> Option<String> {
    let fields = "--query-gpu=clocks.sm,clocks.mem,power.draw,temperature.gpu";
    let out = std::process::Command::new("nvidia-smi").args([fields, "--format=csv,noheader"]).output().ok()?;
    Some(String::from_utf8_lossy(&out.stdout).trim().replace('\n', "; ")).filter(|s| !s.is_empty())
}

/// Everything that was measured.
#[derive(Default)]
pub(super) struct Results {
    sequential: Vec<Series>,
    /// Encode and decode of each share alone.
    alone: Vec<(Share, [Series; 2])>,
    /// Until both have ended, encode, decode.
    concurrent: Vec<(Share, [Series; 3])>,
    running: Vec<(Share, Pipelined)>,
    clocks: Vec<(&'static str, String)>,
}

/// A running pipeline.
struct Pipelined {
    mode: PipelineMode,
    period: Series,
    decode: Series,
    age: Series,
    decode_hz: f64,
    encode_hz: f64,
}

/// Begins the file that a flag names, before anything is measured for it.
pub(super) fn out_file(flag: &str, file: &Path) -> Result<OutFile, CliError> {
    OutFile::create(file).map_err(|e| CliError::input(format!("{flag} {}: {e}", file.display())))
}

/// Runs the tool.
pub fn run(args: &Args) -> Result<(), CliError> {
    for (what, seconds) in [("warm-up", args.warm_up), ("seconds", args.seconds)] {
        if !(seconds.is_finite() && (0.0..=3600.0).contains(&seconds)) {
            return Err(CliError::input(format!("--{what} {seconds}: must be 0 to 3600 seconds")));
        }
    }
    if !(args.tflops > 0.0 && args.bandwidth > 0.0) {
        return Err(CliError::input("--tflops and --bandwidth must be above 0"));
    }
    let begin = |flag: &'static str, file: &Option<PathBuf>| -> Result<_, CliError> {
        file.as_ref().map(|file| Ok((flag, file.clone(), out_file(flag, file)?))).transpose()
    };
    let (trace_to, plot_to) = (begin("--trace", &args.trace)?, begin("--plot", &args.plot)?);
    let write = |(flag, file, out): (&str, PathBuf, OutFile), text: &str| {
        out.finish_with(text).map_err(|e| CliError::input(format!("{flag} {}: {e}", file.display())))
    };
    let loading = Instant::now();
    let (engine, load) = args.setup.load()?;
    let load_s = loading.elapsed().as_secs_f64();
    if args.trace.is_some() {
        trace::start();
    }
    let results = measure(args, &engine, &load)?;
    if let Some((to, text)) = trace_to.zip(trace::text()) {
        write(to, &text)?;
    }
    if let Some(to) = plot_to {
        write(to, &plot::draw(&results, &engine.describe()))?;
    }
    if args.json {
        println!("{}", json(args, &engine, &load, load_s, &results));
        return Ok(());
    }
    println!("{}; {}; weights ready in {load_s:.1} s", engine.describe(), args.setup.about(&load));
    print!("{}", table(&results));
    if let Some(offer) = engine.offer().filter(|o| !o.mps) {
        let why = offer.decide(Split { backend: Backend::Mps, encoder: 50, decoder: 50 });
        println!("mps was not timed: {}", why.err().map_or_else(String::new, |e| e.to_string()));
    }
    Ok(())
}

/// The mode and the split that params files ask for.
fn chosen(files: &[PathBuf]) -> Result<(PipelineMode, Split), CliError> {
    // A robot has to be named, and no time depends on which.
    let names = |one: &str| Value::Strings(vec![one.into()]);
    let mut given = vec![
        ("checkpoint".to_owned(), Value::String("none".into())),
        ("camera_names".into(), names("camera")),
        ("joint_names".into(), names("joint")),
        ("policy_rate_hz".into(), Value::Double(30.0)),
    ];
    for file in files {
        given.extend(yaml::read(file, "pi0_mps").map_err(CliError::input)?);
    }
    let problems = |e: Vec<ParamError>| e.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n");
    let gpu = Params::from_overrides(given).map_err(|e| CliError::input(problems(e)))?.settings().gpu;
    Ok((gpu.pipeline_mode, gpu.split))
}

fn measure(args: &Args, engine: &CudaEngine, load: &Load) -> Result<Results, CliError> {
    let wanted = |part| args.params_files.is_empty() && (args.part.is_empty() || args.part.contains(&part));
    let mut results = Results::default();
    let note = |results: &mut Results, after| results.clocks.extend(clocks().map(|c| (after, c)));
    if wanted(Part::Sequential) {
        let t = flow::sequential(engine, load, Duration::from_secs_f64(args.warm_up), args.runs as usize)?;
        let f = floor::Floors::new(engine.dims(), load.views(), load.tokens(), args.tflops, args.bandwidth);
        let [images, vision, trunk, decoder] = t.gpu;
        results.sequential = vec![
            Series::new("host to host", t.total, Some(f.vision + f.trunk + f.decoder)),
            Series::new("host, encode", t.encode, None),
            Series::new("gpu, frames", images, None),
            Series::new("gpu, vision", vision, Some(f.vision)),
            Series::new("gpu, trunk", trunk, Some(f.trunk)),
            Series::new("gpu, decoder", decoder, Some(f.decoder)),
        ];
        note(&mut results, "sequential");
    }
    let Some(offer) = engine.offer() else { return Ok(results) };
    let runs = args.split_runs as usize;
    let whole = Share { grant: offer.whole().grant, percent: None };
    if wanted(Part::Alone) {
        for share in std::iter::once(whole).chain(shares(offer, &ALONE)) {
            let [encode, decode] = flow::alone(engine, load, share.grant, runs)?;
            let name = |stage: &str| format!("{}, {stage} alone", share.name());
            let series = [Series::new(name("encode"), encode, None), Series::new(name("decode"), decode, None)];
            results.alone.push((share, series));
        }
        note(&mut results, "alone");
    }
    if wanted(Part::Concurrent) {
        for share in shares(offer, &SPLITS) {
            let [both, encode, decode] = flow::together(engine, load, share.grant, runs)?;
            let name = |what: &str| format!("{}, {what}", share.name());
            let series = [
                Series::new(name("both"), both, None),
                Series::new(name("encode"), encode, None),
                Series::new(name("decode"), decode, None),
            ];
            results.concurrent.push((share, series));
        }
        note(&mut results, "concurrent");
    }
    let mut pipelines = Vec::new();
    if wanted(Part::Running) {
        pipelines.push((whole, PipelineMode::Sequential));
        for share in shares(offer, &SPLITS) {
            pipelines.push((share, PipelineMode::Pipelined));
            if engine.dims().family == Family::Pi0 {
                pipelines.push((share, PipelineMode::DualRate));
            }
        }
    }
    if !args.params_files.is_empty() {
        pipelines.push(match chosen(&args.params_files)? {
            (PipelineMode::Sequential, _) => (whole, PipelineMode::Sequential),
            (mode, split) => {
                let grant = offer.decide(split).map_err(|e| CliError::input(e.to_string()))?.grant;
                (Share { grant, percent: (grant.kind != Kind::Shared).then_some(split.encoder) }, mode)
            }
        });
    }
    if !pipelines.is_empty() {
        for (share, mode) in pipelines {
            let r = flow::running(engine, load, share.grant, mode, Duration::from_secs_f64(args.seconds))?;
            let name = |what: &str| format!("{}, {mode}, {what}", share.name());
            let (decode_hz, encode_hz) = (r.decode_hz(), r.encode_hz());
            let pipelined = Pipelined {
                mode,
                period: Series::new(name("period"), r.period, None),
                decode: Series::new(name("decode"), r.decode, None),
                age: Series::new(name("age"), r.age, None),
                decode_hz,
                encode_hz,
            };
            results.running.push((share, pipelined));
        }
        note(&mut results, "running");
    }
    Ok(results)
}

fn table(r: &Results) -> String {
    let mut out = format!("{}\n", Series::head());
    let mut add = |series: &[Series]| series.iter().for_each(|s| out += &format!("{}\n", s.line()));
    add(&r.sequential);
    r.alone.iter().for_each(|(_, s)| add(s));
    r.concurrent.iter().for_each(|(_, s)| add(s));
    for (_, p) in &r.running {
        [&p.period, &p.decode, &p.age].into_iter().for_each(|s| add(std::slice::from_ref(s)));
    }
    for (share, p) in &r.running {
        out += &format!("{}, {}: {:.1} chunks/s, {:.1} encodes/s\n", share.name(), p.mode, p.decode_hz, p.encode_hz);
    }
    for (after, clocks) in &r.clocks {
        out += &format!("clocks, power, temperature after {after}: {clocks}\n");
    }
    out
}

fn json(args: &Args, engine: &CudaEngine, load: &Load, load_s: f64, r: &Results) -> Json {
    let named = |series: &[Series], names: &[&str]| -> Map<String, Json> {
        names.iter().zip(series).map(|(n, s)| ((*n).into(), s.json())).collect()
    };
    let row = |share: &Share, more: Json| {
        let mut row = share.json();
        if let (Json::Object(row), Json::Object(more)) = (&mut row, more) {
            row.extend(more);
        }
        row
    };
    let sequential: Map<String, Json> = r.sequential.iter().map(|s| (s.name().into(), s.json())).collect();
    let alone: Vec<_> =
        r.alone.iter().map(|(share, s)| row(share, json!({ "ms": named(s, &["encode", "decode"]) }))).collect();
    let concurrent: Vec<_> = (r.concurrent.iter())
        .map(|(share, s)| row(share, json!({ "ms": named(s, &["both", "encode", "decode"]) })))
        .collect();
    let running: Vec<_> = (r.running.iter())
        .map(|(share, p)| {
            row(
                share,
                json!({ "mode": p.mode.name(), "decode_hz": p.decode_hz, "encode_hz": p.encode_hz,
                    "ms": { "period": p.period.json(), "decode": p.decode.json(), "age": p.age.json() } }),
            )
        })
        .collect();
    json!({ "engine": engine.describe(), "views": load.views(), "memory": load.memory(), "prompt_tokens": load.tokens(),
        "horizon": load.horizon(), "runs": args.runs, "load_s": load_s, "tflops": args.tflops,
        "bandwidth": args.bandwidth, "ms": sequential, "alone": alone, "concurrent": concurrent,
        "running": running, "clocks": r.clocks.iter().map(|(a, c)| json!({ "after": a, "read": c })).collect::<Vec<_>>() })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::partition::hopper;

    #[test]
    fn the_configurations_of_the_original_benchmark_are_there() {
        let offer = hopper();
        let names: Vec<_> = shares(&offer, &SPLITS).iter().map(Share::name).collect();
        let expected = [
            "shared",
            "green 50-50 (68+64)",
            "green 70-30 (92+40)",
            "green 30-70 (36+96)",
            "mps 50-50 (66+66)",
            "mps 70-30 (94+38)",
            "mps 30-70 (40+92)",
        ];
        assert_eq!(names, expected);
        let without = Offer { mps: false, ..offer };
        assert_eq!(shares(&without, &SPLITS).len(), 4);
    }

    #[test]
    fn a_file_that_cannot_be_written_is_found_before_anything_is_measured() {
        use clap::Parser;
        #[derive(Parser)]
        struct Line {
            #[command(flatten)]
            args: Args,
        }
        let dir = tempfile::tempdir().unwrap();
        let absent = dir.path().join("absent/file");
        for flag in ["--plot", "--trace"] {
            let args = Line::parse_from(["bench", flag, absent.to_str().unwrap()]).args;
            let refused = run(&args).unwrap_err().to_string();
            assert!(refused.contains(&format!("{flag} {}: No such file", absent.display())), "{refused}");
        }
    }

    #[test]
    fn a_file_that_tune_wrote_says_mode_and_split() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let split = "mps_encoder_percentage: 40\n    mps_decoder_percentage: 60\n";
        let text = format!("/**:\n  ros__parameters:\n    pipeline_mode: dual_rate\n    partition: green\n    {split}");
        std::fs::write(file.path(), text).unwrap();
        let expected = Split { backend: Backend::Green, encoder: 40, decoder: 60 };
        assert_eq!(chosen(&[file.path().into()]).unwrap(), (PipelineMode::DualRate, expected));
        std::fs::write(file.path(), "/**:\n  ros__parameters:\n    partition: half\n").unwrap();
        let refused = chosen(&[file.path().into()]).unwrap_err().to_string();
        assert!(refused.contains("partition") && refused.contains("half"), "{refused}");
    }
}
