//! `pi0 bench`: how long one observation takes on the GPU, beside what the hardware allows.

use std::path::PathBuf;
use std::str::FromStr;
use std::time::{Duration, Instant};

use serde_json::{Map, Value, json};

use super::CliError;
use crate::engine::cuda::CudaEngine;
use crate::engine::{DecodeInput, Decoder, Device, EncodeInput, Encoder, Engine, View};
use crate::model::{Checkpoint, Dims, Family, Frame, Resampler, StackDims, VisionDims};

mod floor;

/// Time observations host to host, one after the other, the GPU idle before each.
///
/// The inputs are random frames, prompt tokens and noise; with --random-weights the weights are too. GPU times of the
/// stages come from events. The floor of a stage is the larger of its operations over the GPU's bf16 rate and its bytes
/// over the memory's, for perfect kernels.
#[derive(Debug, clap::Args)]
pub struct Args {
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
    /// Observations timed.
    #[arg(long, default_value_t = 5000, value_parser = clap::value_parser!(u64).range(1..=1_000_000))]
    runs: u64,
    /// Seconds of running before the first timed one.
    #[arg(long, default_value_t = 30.0)]
    warm_up: f64,
    /// bf16 rate of the GPU in TFLOP/s, for the floors (H100 and H200: 790 measured).
    #[arg(long, default_value_t = 790.0)]
    tflops: f64,
    /// Memory rate in TB/s, for the floors (H100: 3.0, H200: 4.3, measured).
    #[arg(long, default_value_t = 3.0)]
    bandwidth: f64,
    /// Print one JSON object instead of a table.
    #[arg(long)]
    json: bool,
}

/// `640x480`.
#[derive(Debug, Clone, Copy)]
struct Size(usize, usize);

impl FromStr for Size {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        let side = |n: &str| n.parse().ok().filter(|n| (1..=Frame::MAX_SIDE).contains(n));
        s.split_once('x')
            .and_then(|(w, h)| Some(Self(side(w)?, side(h)?)))
            .ok_or_else(|| format!("expected WIDTHxHEIGHT, each 1 to {}", Frame::MAX_SIDE))
    }
}

/// Dimensions of the published π0.
fn published(horizon: usize) -> Dims {
    let stack = |width, mlp| StackDims { layers: 18, width, mlp, heads: 8, head_dim: 256 };
    Dims {
        family: Family::Pi0,
        vision: VisionDims { layers: 27, width: 1152, mlp: 4304, heads: 16, patch: 14, image: 224 },
        trunk: stack(2048, 16384),
        expert: stack(1024, 4096),
        vocab: 257_152,
        state_dim: 32,
        action_dim: 32,
        horizon,
        max_tokens: 48,
        min_period: 0.004,
        max_period: 4.0,
    }
}

/// One measured series in milliseconds, sorted.
struct Series {
    name: &'static str,
    ms: Vec<f64>,
    floor: Option<f64>,
}

impl Series {
    fn quantile(&self, q: f64) -> f64 {
        let last = self.ms.len().saturating_sub(1);
        self.ms.get((last as f64 * q).round() as usize).copied().unwrap_or(f64::NAN)
    }

    fn mean(&self) -> f64 {
        self.ms.iter().sum::<f64>() / self.ms.len() as f64
    }

    fn deviation(&self) -> f64 {
        let mean = self.mean();
        (self.ms.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / self.ms.len() as f64).sqrt()
    }

    fn json(&self) -> Value {
        json!({
            "mean": self.mean(), "median": self.quantile(0.5), "min": self.quantile(0.0), "max": self.quantile(1.0),
            "p95": self.quantile(0.95), "p99": self.quantile(0.99), "deviation": self.deviation(),
            "floor": self.floor, "ratio": self.floor.map(|f| self.quantile(0.5) / f),
        })
    }

    fn line(&self) -> String {
        let floor = self.floor.map_or(String::new(), |f| format!("{f:8.3} {:6.2}", self.quantile(0.5) / f));
        format!(
            "{:22} {:8.3} {:8.3} {:8.3} {:8.3} {:8.3} {:8.3} {:8.3} {floor}",
            self.name,
            self.mean(),
            self.quantile(0.5),
            self.quantile(0.0),
            self.quantile(1.0),
            self.quantile(0.95),
            self.quantile(0.99),
            self.deviation()
        )
    }
}

/// Runs the tool.
pub fn run(args: &Args) -> Result<(), CliError> {
    let index = match args.device.parse::<Device>()? {
        Device::Cuda(index) => index as usize,
        other => return Err(CliError::input(format!("--device {other}: only cuda or cuda:N is timed here"))),
    };
    if !(args.warm_up.is_finite() && (0.0..=3600.0).contains(&args.warm_up)) {
        return Err(CliError::input(format!("--warm-up {}: must be 0 to 3600 seconds", args.warm_up)));
    }
    if !(args.tflops > 0.0 && args.bandwidth > 0.0) {
        return Err(CliError::input("--tflops and --bandwidth must be above 0"));
    }
    let loading = Instant::now();
    let engine = match &args.checkpoint {
        Some(dir) => {
            let checkpoint = Checkpoint::open(dir)?;
            CudaEngine::load(&checkpoint, Resampler::from(checkpoint.origin()), index)?
        }
        None => CudaEngine::random(&published(args.horizon as usize), Resampler::OpenPi, index, 1)?,
    };
    let load_s = loading.elapsed().as_secs_f64();
    let dims = *engine.dims();
    let (views, tokens) = (args.views as usize, args.prompt_tokens as usize);
    let series = measure(args, &engine, &dims, views, tokens)?;
    let title = format!(
        "{}; {views} views of {}x{}, {tokens} prompt tokens, horizon {}, 10 steps, {} runs, weights ready in {load_s:.1} s",
        engine.describe(),
        args.frame.0,
        args.frame.1,
        dims.horizon,
        args.runs
    );
    if args.json {
        let stages: Map<String, Value> = series.iter().map(|s| (s.name.to_string(), s.json())).collect();
        println!(
            "{}",
            json!({ "engine": engine.describe(), "views": views, "prompt_tokens": tokens,
            "horizon": dims.horizon, "runs": args.runs, "load_s": load_s, "tflops": args.tflops,
            "bandwidth": args.bandwidth, "ms": stages })
        );
        return Ok(());
    }
    println!("{title}");
    println!(
        "{:22} {:>8} {:>8} {:>8} {:>8} {:>8} {:>8} {:>8} {:>8} {:>6}",
        "ms", "mean", "median", "min", "max", "p95", "p99", "std dev", "floor", "ratio"
    );
    series.iter().for_each(|s| println!("{}", s.line()));
    Ok(())
}

fn measure(
    args: &Args,
    engine: &CudaEngine,
    dims: &Dims,
    views: usize,
    tokens: usize,
) -> Result<Vec<Series>, CliError> {
    use rand::{Rng, SeedableRng};
    use rand_distr::{Distribution, StandardNormal};
    let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(7);
    let Size(w, h) = args.frame;
    let frames = (0..views)
        .map(|_| {
            let bytes: Vec<u8> = (0..w * h * 3).map(|_| rng.random()).collect();
            Frame::new(w, h, w * 3, "rgb8", bytes)
        })
        .collect::<Result<Vec<_>, _>>()?;
    let frames: Vec<View<'_>> = frames.iter().map(View::Frame).collect();
    let prompt: Vec<u32> = (0..tokens).map(|i| (i % dims.vocab) as u32).collect();
    let mut normal = |n: usize| -> Vec<f32> { (0..n).map(|_| StandardNormal.sample(&mut rng)).collect() };
    let (state, noise) = (normal(dims.state_dim), normal(dims.horizon * dims.action_dim));

    let (mut encoder, mut decoder) = engine.stages()?;
    let mut cache = engine.cache(views, tokens)?;
    let mut actions = vec![0.0; noise.len()];
    let encode = EncodeInput { views: &frames, tokens: &prompt };
    let decode = DecodeInput { state: &state, noise: &noise, steps: 10, guidance: None };
    let mut ms: [Vec<f64>; 6] = Default::default();
    let warm = Instant::now() + Duration::from_secs_f64(args.warm_up);
    let mut warming = true;
    while ms[0].len() < args.runs as usize {
        let start = Instant::now();
        encoder.encode(&encode, &mut cache)?;
        let encoded = Instant::now();
        decoder.decode(&cache, &decode, &mut actions)?;
        let done = Instant::now();
        // At least one run warms up, however short that was asked to be.
        if warming {
            warming = done < warm;
            continue;
        }
        let t = encoder.last_times()?;
        let gpu = [t.images, t.vision, t.trunk, decoder.last_ms()?].map(f64::from);
        let host = [(done - start).as_secs_f64() * 1e3, (encoded - start).as_secs_f64() * 1e3];
        for (series, v) in ms.iter_mut().zip(host.into_iter().chain(gpu)) {
            series.push(v);
        }
    }
    let floors = floor::Floors::new(dims, views, tokens, args.tflops, args.bandwidth);
    let [total, host_encode, images, vision, trunk, decoder] = ms.map(|mut v| {
        v.sort_by(f64::total_cmp);
        v
    });
    Ok(vec![
        Series { name: "host to host", ms: total, floor: Some(floors.vision + floors.trunk + floors.decoder) },
        Series { name: "host, encode", ms: host_encode, floor: None },
        Series { name: "gpu, frames", ms: images, floor: None },
        Series { name: "gpu, vision", ms: vision, floor: Some(floors.vision) },
        Series { name: "gpu, trunk", ms: trunk, floor: Some(floors.trunk) },
        Series { name: "gpu, decoder", ms: decoder, floor: Some(floors.decoder) },
    ])
}
