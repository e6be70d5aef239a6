//! `pi0 infer`: one inference from a file to a file, to prove parity with a PyTorch policy.

mod case;

use std::path::PathBuf;
use std::time::Instant;

use clap::builder::{PossibleValuesParser, TypedValueParser};
use serde_json::{Map, Value, json};

use super::CliError;
use crate::engine::cpu::CpuEngine;
use crate::engine::cuda::CudaEngine;
use crate::engine::{
    DecodeInput, Decoder, Device, EncodeInput, Encoder, Engine, Guidance, GuidanceSchedule, KvCache, Resolved, View,
};
use crate::model::{Checkpoint, Resampler};
use case::Case;

/// Gain bound of the reference implementation.
const DEFAULT_MAX_GUIDANCE_WEIGHT: f32 = 10.0;

/// Run one inference on inputs from a file and write actions, velocities and prefix embeddings.
///
/// The case is a safetensors file with `in.image.N` [3, size, size] in [-1, 1], `in.image_mask`, `in.tokens`,
/// `in.token_mask`, `in.state`, `in.noise` [horizon, action_dim] and, for --rtc, `in.rtc.prev_chunk_left_over`
/// [rows, action_dim]. The output file holds `actions` [horizon, action_dim], `v` [steps, horizon, action_dim] and
/// `prefix_embs` [valid rows, width], all in normalised model space. Where the case holds the outputs of a reference
/// (`out.*`), the relative L2 distance to them is reported.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Checkpoint directory (LeRobot or openpi-PyTorch layout).
    #[arg(long, value_name = "DIR")]
    checkpoint: PathBuf,
    /// Inputs (.safetensors).
    #[arg(long, value_name = "FILE")]
    case: PathBuf,
    /// Where the outputs go (.safetensors); an existing file is replaced.
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
    /// auto, cpu or cuda:N.
    #[arg(long, default_value = "auto")]
    device: String,
    /// Flow-matching steps [default: the checkpoint's, else 10].
    #[arg(long, value_name = "N")]
    steps: Option<usize>,
    /// Threads a stage of the CPU engine may use [default: all cores].
    #[arg(long, value_name = "N")]
    threads: Option<usize>,
    /// Guided real-time chunking with this schedule; needs --inference-delay and --execution-horizon.
    #[arg(long, value_parser = schedule(), requires_all = ["inference_delay", "execution_horizon"])]
    rtc: Option<GuidanceSchedule>,
    /// Committed steps of the previous chunk: their weight is one.
    #[arg(long, value_name = "D", requires = "rtc")]
    inference_delay: Option<usize>,
    /// Index of the action at which guidance ends.
    #[arg(long, value_name = "S", requires = "rtc")]
    execution_horizon: Option<usize>,
    /// Upper bound of the guidance gain [default: 10].
    #[arg(long, value_name = "W", requires = "rtc")]
    max_guidance_weight: Option<f32>,
    /// Print one JSON object instead of text.
    #[arg(long)]
    json: bool,
}

/// The schedules by their parameter names.
fn schedule() -> impl TypedValueParser<Value = GuidanceSchedule> {
    PossibleValuesParser::new(GuidanceSchedule::NAMES)
        .try_map(|name| GuidanceSchedule::from_name(&name).ok_or("not a schedule"))
}

/// Flags of guidance once they are known to belong together.
struct Rtc {
    schedule: GuidanceSchedule,
    inference_delay: usize,
    execution_horizon: usize,
    max_weight: f32,
}

impl Args {
    fn rtc(&self, horizon: usize, previous_rows: Option<usize>) -> Result<Option<Rtc>, CliError> {
        let (Some(schedule), Some(d), Some(end)) = (self.rtc, self.inference_delay, self.execution_horizon) else {
            return Ok(None);
        };
        let rows = previous_rows.ok_or_else(|| {
            CliError::input(format!(
                "{}: --rtc needs the tensor 'in.rtc.prev_chunk_left_over' [rows, action_dim], which is not there",
                self.case.display()
            ))
        })?;
        let max_weight = self.max_guidance_weight.unwrap_or(DEFAULT_MAX_GUIDANCE_WEIGHT);
        if end == 0 || end > horizon {
            return Err(CliError::input(format!("--execution-horizon {end}: must be 1 to the horizon, {horizon}")));
        }
        if d > end || d > rows {
            return Err(CliError::input(format!(
                "--inference-delay {d}: must not exceed --execution-horizon ({end}) or the rows left of the previous \
                 chunk ({rows})"
            )));
        }
        if !max_weight.is_finite() || max_weight < 0.0 {
            return Err(CliError::input(format!("--max-guidance-weight {max_weight}: must be 0 or more")));
        }
        Ok(Some(Rtc { schedule, inference_delay: d, execution_horizon: end, max_weight }))
    }
}

/// Runs the tool.
pub fn run(args: &Args) -> Result<(), CliError> {
    let device = args.device.parse::<Device>()?.resolve()?;
    let threads = args.threads.unwrap_or_else(|| std::thread::available_parallelism().map_or(1, |n| n.get()));
    let checkpoint = Checkpoint::open(&args.checkpoint)?;
    let resampler = Resampler::from(checkpoint.origin());
    match device.device {
        Device::Cuda(index) => {
            infer(args, &device, &checkpoint, &CudaEngine::load(&checkpoint, resampler, index as usize)?)
        }
        Device::Auto | Device::Cpu => {
            infer(args, &device, &checkpoint, &CpuEngine::load(&checkpoint, resampler, threads)?)
        }
    }
}

fn infer<E: Engine>(args: &Args, device: &Resolved, checkpoint: &Checkpoint, engine: &E) -> Result<(), CliError> {
    let dims = *checkpoint.dims();
    let case = Case::read(&args.case, &dims)?;
    let rtc = args.rtc(dims.horizon, case.previous.as_ref().map(|p| p.len() / dims.action_dim))?;
    let steps = args.steps.or(checkpoint.config().num_inference_steps).unwrap_or(10);

    let (mut encoder, mut decoder) = engine.stages()?;
    let mut cache = engine.cache(case.views.len(), case.tokens.len())?;

    let views: Vec<View<'_>> = case.views.iter().map(|v| View::Planes(v)).collect();
    let start = Instant::now();
    let prefix = encoder.encode_with_embeddings(&EncodeInput { views: &views, tokens: &case.tokens }, &mut cache)?;
    let encoded = Instant::now();
    let mut actions = vec![0.0; dims.horizon * dims.action_dim];
    let guidance = rtc.as_ref().zip(case.previous.as_deref()).map(|(rtc, previous)| Guidance {
        previous,
        inference_delay: rtc.inference_delay,
        execution_horizon: rtc.execution_horizon,
        max_weight: rtc.max_weight,
        schedule: rtc.schedule,
    });
    let input = DecodeInput { state: &case.state, noise: &case.noise, steps, guidance };
    let velocities = decoder.decode_with_velocities(&cache, &input, &mut actions)?;
    let decoded = Instant::now();

    let rows = cache.len();
    case::write(
        &args.out,
        &[
            ("actions", &[dims.horizon, dims.action_dim], &actions),
            ("v", &[steps, dims.horizon, dims.action_dim], &velocities),
            ("prefix_embs", &[rows, dims.trunk.width], &prefix),
        ],
    )?;

    let mut distances = Map::new();
    let mut compare = |name: &str, reference: Option<&[f32]>, ours: &[f32]| {
        if let Some(distance) = reference.and_then(|r| case::relative_l2(ours, r)) {
            distances.insert(name.into(), json!(distance));
        }
    };
    compare("prefix_embs", case.reference.prefix_embs.as_deref(), &prefix);
    match &rtc {
        // The reference's velocities are those of the unguided flow.
        Some(rtc) => compare("actions", case.reference.guided(rtc.schedule), &actions),
        None => {
            compare("v", case.reference.velocities.as_deref(), &velocities);
            compare("actions", case.reference.actions.as_deref(), &actions);
        }
    }
    report(
        args,
        &device.device,
        &device.reason,
        &engine.describe(),
        Facts {
            family: format!("{:?}", dims.family).to_lowercase(),
            prefix_rows: rows,
            steps,
            encode_ms: (encoded - start).as_secs_f64() * 1e3,
            decode_ms: (decoded - encoded).as_secs_f64() * 1e3,
            distances,
        },
    );
    Ok(())
}

struct Facts {
    family: String,
    prefix_rows: usize,
    steps: usize,
    encode_ms: f64,
    decode_ms: f64,
    distances: Map<String, Value>,
}

fn report(args: &Args, device: &Device, reason: &str, engine: &str, facts: Facts) {
    let Facts { family, prefix_rows, steps, encode_ms, decode_ms, distances } = facts;
    if args.json {
        let object = json!({
            "device": device.to_string(),
            "device_reason": reason,
            "engine": engine,
            "family": family,
            "prefix_rows": prefix_rows,
            "steps": steps,
            "encode_ms": encode_ms,
            "decode_ms": decode_ms,
            "relative_l2": distances,
            "out": args.out,
        });
        println!("{object}");
        return;
    }
    println!("device   {device} ({reason}): {engine}");
    println!("model    {family}, {prefix_rows} prefix rows, {steps} steps");
    println!("time     encode {encode_ms:.2} ms, decode {decode_ms:.2} ms (first run, nothing warm)");
    for (name, distance) in &distances {
        println!("parity   {name}: relative L2 {:.2e}", distance.as_f64().unwrap_or(f64::NAN));
    }
    println!("written  {}", args.out.display());
}
