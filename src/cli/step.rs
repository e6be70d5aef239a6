//! `pi0 step`: the whole node in virtual time, driven from outside period by period.

use std::io::{BufRead, Read, Write};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use serde::Deserialize;
use serde_json::{Value as Json, json};

use super::CliError;
use crate::clock::{Clock, Monotonic, RosTime, VirtualClock};
use crate::control::chunk::ActionChunk;
use crate::control::{Lifecycle, Requests, Window};
use crate::engine::cpu::CpuEngine;
use crate::engine::cuda::CudaEngine;
use crate::engine::{DecodeInput, Decoder, Device, EncodeInput, Encoder, Engine, View};
use crate::model::{Checkpoint, Frame, Policy, Resampler};
use crate::node::{Outputs, SteppedNode};
use crate::params::{Params, Settings, Value, yaml};
use crate::pipeline::StageTimes;

/// Virtual time begins here: zero means "not set".
const EPOCH_NS: i64 = 1_000_000_000_000;
/// The stages are looked at so many times a control period.
const LOOKS: u32 = 4;
/// Runs behind a measured stage time.
const RUNS: usize = 7;

/// Run the node in virtual time, for evaluation: a simulator says what it sees, one control period at a time.
///
/// On stdin one line of JSON a period: `joints` (positions in the order of joint_names), `images` (a list of [camera,
/// width, height], whose rgb8 bytes follow the line in that order), `prompt`, `enable` (arm now); each may be missing.
/// `{"new": true}` starts over with a fresh node. On stdout one line of JSON an answer: mode, counters and the published
/// window, if there is one. Everything between is the running node's code; only threads and clocks are replaced, and a
/// stage takes the time it is said to take.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Checkpoint directory (LeRobot or openpi-PyTorch layout).
    #[arg(long, value_name = "DIR")]
    checkpoint: PathBuf,
    /// Parameters of the robot, as for the node; may be given again, later ones win.
    #[arg(long = "params-file", value_name = "FILE", required = true)]
    params_files: Vec<PathBuf>,
    /// One parameter, `name:=value`; may be given again.
    #[arg(short = 'p', long = "param", value_name = "NAME:=VALUE")]
    params: Vec<String>,
    /// Virtual milliseconds of an encode [default: as measured here at the start].
    #[arg(long, value_name = "MS")]
    encode_ms: Option<f64>,
    /// Virtual milliseconds of a decode [default: as measured here at the start].
    #[arg(long, value_name = "MS")]
    decode_ms: Option<f64>,
    /// Virtual milliseconds more for every decode, as a slower or distant device takes.
    #[arg(long, value_name = "MS", default_value_t = 0.0)]
    added_latency_ms: f64,
    /// Threads a stage of the CPU engine may use.
    #[arg(long, value_name = "N", default_value_t = 1)]
    threads: usize,
}

impl Args {
    fn settings(&self) -> Result<Settings, CliError> {
        let mut given = Vec::new();
        for path in &self.params_files {
            given.extend(yaml::read(path, "pi0_mps").map_err(CliError::input)?);
        }
        for param in &self.params {
            let (name, value) = param
                .split_once(":=")
                .ok_or_else(|| CliError::input(format!("-p {param}: write it as name:=value")))?;
            let text = format!("/**:\n  ros__parameters:\n    {name}: {value}\n");
            let found = yaml::overrides(&text, "pi0_mps");
            given.extend(found.map_err(|e| CliError::input(format!("-p {param}: {e}")))?);
        }
        given.push(("checkpoint".into(), Value::String(self.checkpoint.display().to_string())));
        settings(given)
    }
}

fn settings(given: Vec<(String, Value)>) -> Result<Settings, CliError> {
    let params = Params::from_overrides(given)
        .map_err(|errors| CliError::input(errors.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n")))?;
    Ok(params.settings())
}

/// One line of input.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Request {
    new: bool,
    joints: Option<Vec<f64>>,
    images: Vec<(usize, usize, usize)>,
    prompt: Option<String>,
    enable: bool,
}

/// Keeps the newest window.
#[derive(Clone, Default)]
struct Newest(Arc<Mutex<Option<Window>>>);

impl Newest {
    fn take(&self) -> Option<Window> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

impl Outputs for Newest {
    fn trajectory(&mut self, window: &Window) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(window.clone());
    }

    fn chunk(&mut self, _: &ActionChunk) {}
}

/// Runs the tool.
pub fn run(args: &Args) -> Result<(), CliError> {
    let settings = args.settings()?;
    let checkpoint = Checkpoint::open(&args.checkpoint)?;
    let resampler = Resampler::from(checkpoint.origin());
    match settings.model.device.resolve()?.device {
        Device::Cuda(index) => {
            let engine = CudaEngine::load(&checkpoint, resampler, index as usize)?;
            serve(args, &settings, &checkpoint, &engine)
        }
        Device::Auto | Device::Cpu => {
            let engine = CpuEngine::load(&checkpoint, resampler, args.threads)?;
            serve(args, &settings, &checkpoint, &engine)
        }
    }
}

fn serve<E: Engine>(args: &Args, settings: &Settings, checkpoint: &Checkpoint, engine: &E) -> Result<(), CliError> {
    let policy = Arc::new(SteppedNode::policy(settings, checkpoint)?);
    let measured = measure(engine, &policy, settings)?;
    let ms = |given: Option<f64>, measured: Duration| match given {
        Some(ms) if ms.is_finite() && (0.0..60_000.0).contains(&ms) => Ok(Duration::from_secs_f64(ms * 1e-3)),
        Some(ms) => Err(CliError::input(format!("{ms} ms of a stage: give 0 to 60000"))),
        None => Ok(measured),
    };
    let times = StageTimes {
        encode: ms(args.encode_ms, measured.encode)?,
        decode: ms(args.decode_ms, measured.decode)? + ms(Some(args.added_latency_ms), Duration::ZERO)?,
    };
    let (mut input, mut output) = (std::io::stdin().lock(), std::io::stdout().lock());
    let mut say = |answer: Json| writeln!(output, "{answer}").and_then(|()| output.flush());
    let broken = |e: std::io::Error| CliError::input(format!("the other end is gone: {e}"));
    say(json!({
        "engine": engine.describe(),
        "encode_ms": times.encode.as_secs_f64() * 1e3,
        "decode_ms": times.decode.as_secs_f64() * 1e3,
        "measured_ms": [measured.encode.as_secs_f64() * 1e3, measured.decode.as_secs_f64() * 1e3],
        "period": settings.timing.period().as_secs_f64(),
    }))
    .map_err(broken)?;

    let fresh = || Session::new(settings, &policy, engine, times);
    let mut session = fresh()?;
    let mut line = String::new();
    loop {
        line.clear();
        if input.read_line(&mut line).map_err(broken)? == 0 {
            return Ok(());
        }
        let request: Request = serde_json::from_str(&line)
            .map_err(|e| CliError::input(format!("a line of stdin: {e}; see pi0 step --help")))?;
        let mut frames = Vec::new();
        for (camera, width, height) in &request.images {
            if *width > Frame::MAX_SIDE || *height > Frame::MAX_SIDE || *camera >= settings.inputs.cameras.len() {
                return Err(CliError::input(format!("image [{camera}, {width}, {height}]: no such camera or size")));
            }
            let mut pixels = vec![0; 3 * width * height];
            input.read_exact(&mut pixels).map_err(broken)?;
            frames.push((*camera, Frame::new(*width, *height, 3 * width, "rgb8", pixels)?));
        }
        if request.new {
            session = fresh()?;
            say(json!({})).map_err(broken)?;
        } else {
            let answer = session.step(&request, frames)?;
            say(answer).map_err(broken)?;
        }
    }
}

/// A node from its start to the next `new`.
struct Session {
    node: SteppedNode,
    clock: VirtualClock,
    period: Duration,
    names: Vec<String>,
    window: Newest,
}

impl Session {
    fn new<E: Engine>(
        settings: &Settings,
        policy: &Arc<Policy>,
        engine: &E,
        times: StageTimes,
    ) -> Result<Self, CliError> {
        let clock = VirtualClock::new(Monotonic(EPOCH_NS), RosTime(EPOCH_NS));
        let window = Newest::default();
        let node = SteppedNode::with_policy(
            settings.clone(),
            policy.clone(),
            engine,
            times,
            Arc::new(clock.clone()),
            Box::new(window.clone()),
        )?;
        node.set_lifecycle(Lifecycle::Ready);
        let names = settings.joints.iter().map(|j| j.name.clone()).collect();
        Ok(Self { node, clock, period: settings.timing.period(), names, window })
    }

    fn step(&mut self, request: &Request, frames: Vec<(usize, Frame)>) -> Result<Json, CliError> {
        let inputs = self.node.inputs();
        let stamp = self.clock.ros();
        if let Some(joints) = &request.joints {
            inputs.joints(stamp, &self.names, joints);
        }
        for (camera, frame) in frames {
            inputs.frame(camera, stamp, Ok(frame));
        }
        if let Some(prompt) = &request.prompt {
            inputs.prompt(prompt)?;
        }
        if request.enable {
            self.node.ask(Requests { enable: true, ..Requests::default() });
        }
        for _ in 0..LOOKS {
            self.node.think();
            self.clock.advance(self.period / LOOKS);
        }
        let report = self.node.control(0);
        self.node.publish();
        let (status, pipeline) = (self.node.control_status(), self.node.pipeline_report());
        Ok(json!({
            "seconds": self.clock.ros().seconds_since(RosTime(EPOCH_NS)),
            "mode": status.mode.to_string(),
            "reason": status.reason.map(|r| format!("{r:?}")),
            "refusal": report.and_then(|r| r.refusal).map(|r| format!("{r:?}")),
            "waiting_for": pipeline.waiting_for.or(pipeline.last_error),
            "chunks": status.counters.chunks,
            "adopted": status.counters.adopted,
            "refused": status.counters.refused_total(),
            "starved": status.counters.starved,
            "guided": pipeline.guided,
            "interventions": status.interventions.total(),
            "seam_jump_rad": report.and_then(|r| r.adoption).filter(|a| !a.from_rest).map(|a| a.jump),
            "window": self.window.take().map(|w| window(&w)),
        }))
    }
}

fn window(w: &Window) -> Json {
    let points = |f: &dyn Fn(usize) -> Vec<f64>| (0..w.points()).map(f).collect::<Vec<_>>();
    json!({
        "start": w.start().seconds_since(RosTime(EPOCH_NS)),
        "first": w.seconds_from_start(0),
        "period": w.period(),
        "positions": points(&|i| w.positions(i).to_vec()),
        "velocities": points(&|i| w.velocities(i).to_vec()),
    })
}

/// Median wall-clock time of each stage on grey images.
fn measure<E: Engine>(engine: &E, policy: &Policy, settings: &Settings) -> Result<StageTimes, CliError> {
    let dims = *policy.dims();
    let (mut encoder, mut decoder) = engine.stages()?;
    let views = settings.inputs.cameras.len();
    let mut slot = engine.cache(views, dims.max_tokens)?;
    let frame = Frame::new(224, 224, 3 * 224, "rgb8", vec![128; 3 * 224 * 224])?;
    let frame = frame.kept_in(engine.frame_memory().as_deref());
    let views = vec![View::Frame(&frame); views];
    let tokens = policy.tokens(&settings.model.prompt, &vec![0.0; policy.state_len()])?;
    let len = dims.horizon * dims.action_dim;
    let (state, noise, mut actions) = (vec![0.0; dims.state_dim], vec![0.0; len], vec![0.0; len]);
    let steps = settings.model.num_inference_steps;
    let (mut encode, mut decode) = (Vec::new(), Vec::new());
    for _ in 0..RUNS {
        let start = Instant::now();
        encoder.encode(&EncodeInput { views: &views, tokens: &tokens }, &mut slot)?;
        let encoded = Instant::now();
        decoder.decode(&slot, &DecodeInput { state: &state, noise: &noise, steps, guidance: None }, &mut actions)?;
        encode.push(encoded - start);
        decode.push(encoded.elapsed());
    }
    let median = |mut times: Vec<Duration>| {
        times.sort_unstable();
        times[times.len() / 2]
    };
    Ok(StageTimes { encode: median(encode), decode: median(decode) })
}
