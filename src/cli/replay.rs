//! `pi0 replay`: a recording through the whole node by a virtual clock, with no ROS and no robot.

mod compare;
mod output;
mod route;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};
use serde_json::{Value as Json, json};

use super::CliError;
use crate::bag::message::{ChunkTimes, Text};
use crate::bag::{BagError, BagReader, Message, Record};
use crate::clock::RosTime;
use crate::control::{ControlStatus, TickReport};
use crate::engine::cpu::CpuEngine;
use crate::engine::cuda::CudaEngine;
use crate::engine::{Device, Engine};
use crate::model::{Checkpoint, Policy};
use crate::node::messages::{DEFAULT_NAME, Messages};
use crate::node::{ReplayNode, ReplayOptions, SteppedNode};
use crate::params::{Params, Settings, Value, yaml};
use crate::pipeline::{PipelineReport, StageTimes};

use compare::Comparison;
use output::{Collector, Latencies, Tape};
use route::{Remap, Routes};

/// Replay a recording through the whole node by a virtual clock, without ROS and without a robot.
///
/// BAG is a rosbag2 folder or file (MCAP or sqlite3, also compressed with zstd) or a recording of the node's flight
/// recorder. Images, joint states and prompts go in at the times at which they were recorded; encoder, decoder and
/// control loop run as in the node; it arms itself, and its commands go nowhere but into the digest and --out. Same bag,
/// parameters and checkpoint, same digest on the CPU.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Recording: rosbag2 folder, .mcap, .db3.
    #[arg(value_name = "BAG")]
    bag: PathBuf,
    /// ROS parameter file of the robot; later ones win [default: the parameters in a flight recording].
    #[arg(long = "params-file", visible_alias = "params", value_name = "FILE")]
    params_files: Vec<PathBuf>,
    /// One parameter, as for the node.
    #[arg(short = 'p', long = "param", value_name = "NAME:=VALUE")]
    params: Vec<String>,
    /// Checkpoint directory, instead of the one in the parameters.
    #[arg(long, value_name = "DIR")]
    checkpoint: Option<PathBuf>,
    /// auto, cpu or cuda:N, instead of the one in the parameters.
    #[arg(long)]
    device: Option<String>,
    /// Threads of the CPU engine [default: all cores].
    #[arg(long, value_name = "N")]
    threads: Option<usize>,
    /// Full name of the node, for topics in its namespace.
    #[arg(long, value_name = "NAME", default_value = DEFAULT_NAME)]
    name: String,
    /// A topic of the recordings under another name.
    #[arg(long, value_name = "FROM:=TO")]
    remap: Vec<String>,
    /// How long an encode takes by the virtual clock [default: the median in a flight recording, else 20].
    #[arg(long, value_name = "MS")]
    encode_ms: Option<f64>,
    /// How long a decode takes by the virtual clock [default: the median in a flight recording, else 20].
    #[arg(long, value_name = "MS")]
    decode_ms: Option<f64>,
    /// Do not arm before this time after the first message [default: as soon as the node would allow it].
    #[arg(long, value_name = "SECONDS", default_value_t = 0.0)]
    arm_after: f64,
    /// Arm again after a stop.
    #[arg(long)]
    rearm: bool,
    /// Stop where the recorded pose leaves the commands by max_tracking_error. A recording does not follow the commands
    /// of its replay, so that this is off.
    #[arg(long)]
    check_tracking: bool,
    /// Replay what can be read of a damaged recording.
    #[arg(long)]
    salvage: bool,
    /// Write commands, chunks and events (.mcap); an existing file is replaced when the replay is done, but none that is
    /// read here.
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
    /// Compare with the commands in another recording.
    #[arg(long, value_name = "BAG")]
    compare: Option<PathBuf>,
    /// With --compare: fail if a command differs by more than this (rad or m), or if a joint has none to compare.
    #[arg(long, value_name = "DIFFERENCE", requires = "compare")]
    tolerance: Option<f64>,
    /// Print one JSON object instead of text.
    #[arg(long)]
    json: bool,
}

/// How long a stage takes where nobody says.
const STAGE_MS: f64 = 20.0;
/// A flight recording has its parameters among its first messages.
const LOOKED_AT: usize = 256;
/// A message further than this from the one before has a wrong time: the node would live through all that lies between.
const LONGEST_SILENCE: Duration = Duration::from_secs(3600);
/// Larger than any distance of a joint: the check is off.
const NO_TRACKING_LIMIT: f64 = 1e6;

/// Runs the tool.
pub fn run(args: &Args) -> Result<(), CliError> {
    if let Some(most) = args.tolerance.filter(|t| t.is_nan() || *t < 0.0) {
        return Err(CliError::input(format!("--tolerance {most}: must be 0 or more")));
    }
    keep_inputs(args)?;
    let own = OwnRecording::look(&args.bag)?;
    let settings = settings(args, own.parameters.as_deref())?;
    let times = StageTimes {
        encode: stage_time("--encode-ms", args.encode_ms, own.encode_ms)?,
        decode: stage_time("--decode-ms", args.decode_ms, own.decode_ms)?,
    };
    // Before the work, so that a wrong file is found at once.
    let remap = Remap::new(&args.remap, &args.name)?;
    let routes = Routes::new(&settings, &args.name, &remap, &BagReader::contents(&args.bag)?)?;
    let other = args.compare.as_deref().map(|path| Tape::read(path, &settings, &args.name, &remap)).transpose()?;

    let checkpoint = Checkpoint::open(&settings.model.checkpoint)?;
    let policy = Arc::new(SteppedNode::policy(&settings, &checkpoint)?);
    let device = settings.model.device.resolve()?;
    let threads = args.threads.unwrap_or_else(|| std::thread::available_parallelism().map_or(1, |n| n.get()));
    let resampler = policy.origin().into();
    let replay = Replay { args, settings, policy, times, routes };
    let outcome = match device.device {
        Device::Cuda(index) => replay.run(CudaEngine::load(&checkpoint, resampler, index as usize)?)?,
        Device::Auto | Device::Cpu => replay.run(CpuEngine::load(&checkpoint, resampler, threads)?)?,
    };
    let comparison = other.map(|tape| Comparison::new(&outcome.tape, &tape)).transpose()?;
    if args.json {
        println!("{}", outcome.json(args, times, comparison.as_ref()));
    } else {
        print!("{}", outcome.text(args, times, comparison.as_ref()));
    }
    let disagreement = comparison.zip(args.tolerance).and_then(|(c, most)| c.disagreement(most));
    disagreement.map_or(Ok(()), |why| Err(CliError::input(why)))
}

/// What is read must not be replaced by --out.
fn keep_inputs(args: &Args) -> Result<(), CliError> {
    let Some(out) = &args.out else { return Ok(()) };
    let real = |path: &Path| path.canonicalize().ok();
    // A file that is not there yet would still become one of a bag's folder.
    let folder = out.parent().map(|p| if p.as_os_str().is_empty() { Path::new(".") } else { p });
    let Some(to) = real(out).or_else(|| Some(real(folder?)?.join(out.file_name()?))) else { return Ok(()) };
    let mut inputs: Vec<_> = args.params_files.iter().map(|file| ("--params-file", file, file.clone())).collect();
    for (what, bag) in std::iter::once(("BAG", &args.bag)).chain(args.compare.iter().map(|bag| ("--compare", bag))) {
        let files = BagReader::files(bag)?.into_iter().chain([bag.clone()]);
        inputs.extend(files.map(|file| (what, bag, file)));
    }
    match inputs.iter().find(|(.., file)| real(file).is_some_and(|file| to.starts_with(file))) {
        Some((what, input, _)) => Err(CliError::input(format!(
            "--out {}: belongs to {what} {}, which is read: choose another file",
            out.display(),
            input.display()
        ))),
        None => Ok(()),
    }
}

fn stage_time(flag: &str, given: Option<f64>, recorded: Option<f64>) -> Result<Duration, CliError> {
    let ms = given.or(recorded).unwrap_or(STAGE_MS);
    let time = Duration::try_from_secs_f64(ms * 1e-3).ok().filter(|t| !t.is_zero() && *t <= Duration::from_secs(60));
    time.ok_or_else(|| CliError::input(format!("{flag} {ms}: must be above 0 and at most 60000 ms")))
}

/// What a recording of the node's own says beside its messages.
#[derive(Debug, Default)]
struct OwnRecording {
    parameters: Option<String>,
    encode_ms: Option<f64>,
    decode_ms: Option<f64>,
}

impl OwnRecording {
    fn look(path: &Path) -> Result<Self, CliError> {
        let mut own = Self::default();
        let mut reader = BagReader::open(path)?;
        for record in reader.by_ref().take(LOOKED_AT) {
            // What is wrong with it is said when it is replayed.
            let Ok(record) = record else { break };
            if record.topic.name.ends_with("/parameters") && record.topic.kind == Text::TYPE {
                own.parameters = Some(record.decode::<Text>()?.0).filter(|text| !text.is_empty());
                break;
            }
        }
        if own.parameters.is_some() {
            // Of the last seconds: short enough to be read twice.
            let chunks = reader.filter_map(Result::ok).filter(|r| r.topic.kind == ChunkTimes::TYPE);
            let (mut encode, mut decode): (Vec<_>, Vec<_>) =
                chunks.filter_map(|r| r.decode::<ChunkTimes>().ok()).map(|c| (c.times[0], c.times[2])).unzip();
            (own.encode_ms, own.decode_ms) = (median(&mut encode), median(&mut decode));
        }
        Ok(own)
    }
}

fn median(values: &mut [f64]) -> Option<f64> {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().filter(|x| x.is_finite() && *x > 0.0)
}

/// A damaged bag, with what could be read of it.
fn damaged(e: BagError, read: &BagReader) -> CliError {
    let BagError::Damaged { .. } = e else { return e.into() };
    let topics: Vec<_> = read.topics().iter().map(|(name, t)| format!("{name} ({})", t.messages)).collect();
    let could = if topics.is_empty() { "nothing could be read".into() } else { format!("read: {}", topics.join(", ")) };
    CliError::input(format!("{e}; {could}. --salvage replays what can be read"))
}

/// The parameters of the robot: files, then single ones, then flags.
fn settings(args: &Args, recorded: Option<&str>) -> Result<Settings, CliError> {
    let node = args.name.rsplit('/').next().unwrap_or_default();
    let mut given = Vec::new();
    let read = |text: &str, what: &dyn std::fmt::Display| {
        yaml::overrides(text, node).map_err(|e| CliError::input(format!("{what}: {e}")))
    };
    match recorded {
        _ if !args.params_files.is_empty() => {
            for file in &args.params_files {
                given.extend(yaml::read(file, node).map_err(CliError::input)?);
            }
        }
        Some(text) => given.extend(read(text, &"the parameters in the recording")?),
        None => {
            return Err(CliError::input(format!(
                "{} holds no parameters (only flight recordings do): give --params-file, the file the robot is \
                 started with",
                args.bag.display()
            )));
        }
    }
    for param in &args.params {
        let (name, value) = param
            .split_once(":=")
            .ok_or_else(|| CliError::input(format!("-p {param}: write NAME:=VALUE, as for the node")))?;
        given.extend(read(&format!("/**:\n  ros__parameters:\n    {name}: {value}\n"), &format!("-p {param}"))?);
    }
    if let Some(dir) = &args.checkpoint {
        given.push(("checkpoint".into(), Value::String(dir.display().to_string())));
    }
    if let Some(device) = &args.device {
        given.push(("device".into(), Value::String(device.clone())));
    }
    let params = Params::from_overrides(given)
        .map_err(|errors| CliError::input(errors.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n")))?;
    let mut settings = params.settings();
    if !args.check_tracking {
        settings.joints.iter_mut().for_each(|j| j.max_tracking_error = NO_TRACKING_LIMIT);
    }
    Ok(settings)
}

/// Everything the loop needs but the engine.
struct Replay<'a> {
    args: &'a Args,
    settings: Settings,
    policy: Arc<Policy>,
    times: StageTimes,
    routes: Routes,
}

/// What came of it.
struct Outcome {
    digest: String,
    tape: Tape,
    messages: u64,
    used: Vec<(String, u64)>,
    seconds: f64,
    left_out: u64,
    salvaged: Option<String>,
    status: ControlStatus,
    pipeline: PipelineReport,
    engine: String,
    events: Vec<(f64, String)>,
}

impl Replay<'_> {
    fn run<E: Engine>(self, engine: E) -> Result<Outcome, CliError> {
        let Self { args, settings, policy, times, mut routes } = self;
        let settings = &settings;
        let mut reader = BagReader::open(&args.bag)?;
        let Some(mut first) = reader.next().transpose()? else {
            return Err(CliError::input(format!("{}: holds no messages", args.bag.display())));
        };
        let (mut next, mut left_out) = (reader.next(), 0);
        // Where the time of the first is wrong, all others would be too far from it.
        while args.salvage
            && let Some(Ok(second)) = &next
            && (first.time == RosTime(0) || silence(first.time, second).is_err())
        {
            (first, next, left_out) = (second.clone(), reader.next(), left_out + 1);
        }
        let begin = first.time;
        let messages = Arc::new(Messages::new(settings, &args.name));
        let collector = Collector::new(messages, settings, begin, args.out.as_deref())?;
        let arm_from = begin.plus_seconds(args.arm_after);
        let options = ReplayOptions { times, arm_from, rearm: args.rearm };
        let outputs = Box::new(collector.clone());
        let mut node = ReplayNode::new(settings.clone(), policy, &engine, begin, outputs, options)?;
        let names = node.names().clone();
        let mut events = Vec::new();
        let mut told = |at: RosTime, report: &TickReport, _: &ControlStatus| {
            events.extend(collector.tick(at, report, &names).into_iter().map(|text| (at.seconds_since(begin), text)));
        };

        let bar = progress(reader.expected());
        let inputs = node.inputs();
        let (mut last, mut salvaged) = (begin, None);
        let mut now: Option<Result<Record, BagError>> = Some(Ok(first));
        while let Some(record) = now {
            let record = match record {
                Ok(record) => record,
                Err(e) if args.salvage => {
                    salvaged = Some(e.to_string());
                    break;
                }
                Err(e) => return Err(damaged(e, &reader)),
            };
            let given = match silence(last, &record) {
                Ok(()) => {
                    // A clock that went back while recording cannot take the node back.
                    last = last.max(record.time);
                    node.advance(last, &mut told)?;
                    routes.give(&record, &inputs)
                }
                wrong => wrong,
            };
            if let Err(e) = given {
                if !args.salvage {
                    return Err(CliError::input(format!("{e}; --salvage leaves such messages out")));
                }
                left_out += 1;
            }
            bar.inc(1);
            now = next.take().or_else(|| reader.next());
        }
        bar.finish_and_clear();
        if !node.ready() {
            let waiting = node.pipeline_report().waiting_for;
            return Err(CliError::input(routes.missing(reader.topics(), waiting)));
        }
        collector.finish()?;
        Ok(Outcome {
            digest: collector.digest(),
            tape: collector.tape(),
            messages: reader.topics().values().map(|t| t.messages).sum(),
            used: routes.used(),
            seconds: last.seconds_since(begin),
            left_out,
            salvaged,
            status: node.control_status(),
            pipeline: node.pipeline_report(),
            engine: engine.describe(),
            events,
        })
    }
}

/// Whether a message is near enough to the time of the one before it to wait for it.
fn silence(before: RosTime, record: &Record) -> Result<(), BagError> {
    let apart = record.time.seconds_since(before);
    if apart.abs() <= LONGEST_SILENCE.as_secs_f64() {
        return Ok(());
    }
    let reason = format!(
        "its time is {apart:+.3} s from that of the message before it, {:.9} s, and more than {} s are not replayed",
        before.0 as f64 * 1e-9,
        LONGEST_SILENCE.as_secs()
    );
    Err(BagError::Message { topic: record.topic.name.clone(), time: record.time, reason })
}

fn progress(total: Option<u64>) -> ProgressBar {
    let bar = match total {
        Some(total) => {
            ProgressBar::new(total).with_style(style("replay {bar:40} {pos}/{len} messages, {elapsed}, {eta} left"))
        }
        None => ProgressBar::new_spinner().with_style(style("replay {spinner} {pos} messages, {elapsed}")),
    };
    bar.enable_steady_tick(Duration::from_millis(200));
    bar
}

fn style(template: &str) -> ProgressStyle {
    ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar())
}

impl Outcome {
    fn json(&self, args: &Args, times: StageTimes, comparison: Option<&Comparison>) -> Json {
        let k = &self.status.counters;
        let ms = |d: Duration| d.as_secs_f64() * 1e3;
        json!({
            "bag": args.bag,
            "engine": self.engine,
            "seconds": self.seconds,
            "messages": self.messages,
            "used": self.used.iter().map(|(t, n)| (t.clone(), json!(n))).collect::<serde_json::Map<_, _>>(),
            "messages_left_out": self.left_out,
            "salvaged_until": self.salvaged,
            "encode_ms": ms(times.encode),
            "decode_ms": ms(times.decode),
            "digest": self.digest,
            "ticks": k.ticks,
            "published": k.published,
            "unarmed": k.unarmed,
            "chunks": self.pipeline.decode.runs,
            "chunks_guided": self.pipeline.guided,
            "chunks_adopted": k.adopted,
            "chunks_superseded": k.superseded,
            "chunks_rejected": k.refused_total(),
            "starved": k.starved,
            "interventions": self.status.interventions.total(),
            "max_seam_jump": self.status.seam_jump_max,
            "mode": self.status.mode.to_string(),
            "events": self.events.iter().map(|(at, text)| json!({"at": at, "text": text})).collect::<Vec<_>>(),
            "latency_ms": self.tape.latencies.json(),
            "comparison": comparison.map(Comparison::json),
            "out": args.out,
        })
    }

    fn text(&self, args: &Args, times: StageTimes, comparison: Option<&Comparison>) -> String {
        let k = &self.status.counters;
        let ms = |d: Duration| d.as_secs_f64() * 1e3;
        let mut out = format!(
            "bag      {:.2} s, {} messages; used: {}\n\
             engine   {}, by the virtual clock encode {:.1} ms and decode {:.1} ms\n\
             control  {} ticks: {} published, {} skipped, {} unarmed; {} interventions, at the end {}\n\
             chunks   {} made, {} guided, {} adopted, {} superseded, {} rejected; largest jump at a seam {:.4}\n",
            self.seconds,
            self.messages,
            self.used.iter().map(|(t, n)| format!("{t} ({n})")).collect::<Vec<_>>().join(", "),
            self.engine,
            ms(times.encode),
            ms(times.decode),
            k.ticks,
            k.published,
            k.skipped,
            k.unarmed,
            self.status.interventions.total(),
            self.status.mode,
            self.pipeline.decode.runs,
            self.pipeline.guided,
            k.adopted,
            k.superseded,
            k.refused_total(),
            self.status.seam_jump_max,
        );
        for (at, event) in &self.events {
            out += &format!("event    {at:8.3} s  {event}\n");
        }
        if self.left_out > 0 {
            out += &format!("left out {} messages that could not be used\n", self.left_out);
        }
        if let Some(why) = &self.salvaged {
            out += &format!("salvaged {why}\n");
        }
        if k.published == 0 {
            out += "         nothing was published: see the events\n";
        }
        out += &match comparison {
            Some(c) => c.text(),
            None => Latencies::table(&[("replay", &self.tape.latencies)]),
        };
        if let Some(path) = &args.out {
            out += &format!("written  {}\n", path.display());
        }
        out + &format!("digest   sha256 {}\n", self.digest)
    }
}
