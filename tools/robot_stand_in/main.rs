//! A robot for `control_node` to drive over real topics where there is no ROS but the libraries that the two carry:
//! starts the node, shows it cameras and joint states, follows its trajectories, and counts. `scripts/gpu-check node`
//! packs and runs it.
//!
//! Exit code 1: something that must hold did not; what, in the lines that begin with `violation`.

mod figures;
mod node;
mod robot;

use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::{Duration, Instant};

use clap::Parser;
use pi0_mps::engine::Device;
use pi0_mps::error::Fault;
use pi0_mps::model::{Checkpoint, Policy, PolicyOptions};
use pi0_mps::params::{Params, Settings, Value, yaml};

use figures::Gathered;
use node::{ControlNode, gpu_mib, how};
use robot::{Chunk, Robot, Scene};

/// A result with a sentence for people.
type Outcome<T> = Result<T, String>;

/// Where the arm begins: within the limits of config/robots/sim_arm.yaml; rad, gripper in m.
const HOME: [f64; 7] = [0.0, -0.1, 1.65, 1.1, 0.0, 0.0, 0.02];
/// Longest loading and warming up of a policy.
const LOADING: Duration = Duration::from_secs(180);
/// Relative L2 distance that chunks of two devices may have, normalised actions.
const AGREE: f64 = 1.5e-2;
/// Scenes that both devices are shown, and chunks of each that must be the same bits.
const SCENES: u64 = 3;
const SAME: usize = 3;
/// After a change of scene, so long until no older image or joint state can be in a chunk.
const SETTLE: f64 = 0.5;
/// Shares of the encoder, percent: three that are kept ready, then new ones and known ones by turns.
const SPLITS: [i64; 20] = [70, 30, 50, 80, 20, 70, 60, 40, 30, 90, 50, 80, 20, 60, 40, 90, 70, 80, 20, 60];
/// What the node records, and how often that is fetched; s.
const RECORDED: f64 = 60.0;
const FETCH: Duration = Duration::from_secs(45);
/// Between two looks at memory.
const LOOK: Duration = Duration::from_secs(5);
/// Growth over the second half of a soak that is none: samples vary.
const FLAT_MIB: f64 = 32.0;
/// Modes of a node that is armed and not stopping.
const MOVING: [&str; 3] = ["ramp", "run", "coast"];

#[derive(Debug, Parser)]
#[command(name = "robot_stand_in")]
struct Args {
    /// The node's program.
    #[arg(long)]
    node: PathBuf,
    /// Params files of the node, the later ones counting more.
    #[arg(long, required = true)]
    params_file: Vec<PathBuf>,
    /// Folders of policies; only `agree` takes more than one.
    #[arg(long, required = true)]
    checkpoint: Vec<PathBuf>,
    /// cpu or cuda:N.
    #[arg(long, default_value = "cuda:0")]
    device: Device,
    /// How encoder and decoder share the GPU.
    #[arg(long, default_value = "auto")]
    partition: String,
    /// Seconds that the node is armed.
    #[arg(long, default_value_t = 60.0)]
    seconds: f64,
    /// Images a second of each camera.
    #[arg(long, default_value_t = 30.0)]
    image_hz: f64,
    /// Policy steps between adopted chunks.
    #[arg(long, default_value_t = 2)]
    replan_steps: i64,
    /// Folder for logs and recordings.
    #[arg(long)]
    work: PathBuf,
    /// Shell command by which `mps` ends the MPS daemon and its servers.
    #[arg(long, default_value = "false")]
    kill_mps: String,
    /// What to look at.
    check: Check,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Check {
    /// Chunks of this device and of the CPU, from the same observations.
    Agree,
    /// Shares that change while the node moves the arm.
    Resplit,
    /// A long run in dual-rate mode.
    Soak,
    /// The MPS daemon dies while the node moves the arm.
    Mps,
}

impl Args {
    /// What the node is told beyond its params files; `checkpoint` included.
    fn parameters(&self, checkpoint: &Path, device: Device, more: &[(&str, String)]) -> Vec<(String, String)> {
        let mut all = vec![
            ("checkpoint".to_owned(), checkpoint.display().to_string()),
            ("device".into(), device.to_string()),
            ("recorder.folder".into(), self.work.join("recordings").display().to_string()),
            ("recorder.seconds".into(), format!("{RECORDED:.1}")),
            ("recorder.image_rate_hz".into(), "0.0".into()),
        ];
        all.extend(more.iter().map(|(name, value)| ((*name).to_owned(), value.clone())));
        all
    }

    /// The robot that the params files describe.
    fn settings(&self) -> Outcome<Settings> {
        let mut given = vec![("checkpoint".to_owned(), Value::String(self.checkpoint[0].display().to_string()))];
        for file in &self.params_file {
            let failed = |e: String| format!("{}: {e}", file.display());
            let text = std::fs::read_to_string(file).map_err(|e| failed(e.to_string()))?;
            given.extend(yaml::overrides(&text, "pi0_mps").map_err(failed)?);
        }
        let problems =
            |e: Vec<pi0_mps::params::ParamError>| e.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ");
        Ok(Params::from_overrides(given).map_err(problems)?.settings())
    }

    fn start_node(&self, name: &str, parameters: &[(String, String)]) -> Outcome<ControlNode> {
        let mut arguments = Vec::new();
        for file in &self.params_file {
            arguments.extend(["--params-file".into(), file.display().to_string()]);
        }
        for (name, value) in parameters {
            arguments.extend(["-p".into(), format!("{name}:={value}")]);
        }
        ControlNode::start(&self.node, &arguments, self.work.join(format!("{name}.log")))
    }
}

/// What must hold and does not.
#[derive(Default)]
struct Violations(Vec<String>);

impl Violations {
    fn unless(&mut self, holds: bool, what: impl FnOnce() -> String) {
        if !holds {
            self.0.push(what());
        }
    }
}

/// Waits until `holds`; an error if the node ends, or says nothing of the kind in time.
fn wait(
    node: &mut ControlNode,
    robot: &Robot,
    what: &str,
    patience: Duration,
    mut holds: impl FnMut() -> bool,
) -> Outcome<()> {
    let end = Instant::now() + patience;
    while !holds() {
        if let Some(status) = node.ended() {
            return Err(format!("the node ended with {} before {what}:\n{}", how(status), node.tail()));
        }
        if Instant::now() > end {
            let said = robot.heard(|h| h.status("message").to_owned());
            let seconds = patience.as_secs();
            return Err(format!("no {what} within {seconds} s; the node says '{said}':\n{}", node.tail()));
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}

/// Waits for the first chunk and for mode `active`; how the node started, in words, from the stamps of its log.
fn started(node: &mut ControlNode, robot: &Robot) -> Outcome<String> {
    wait(node, robot, "chunk", LOADING, || robot.heard(|h| !h.chunk_times.is_empty()))?;
    let first = robot.heard(|h| h.chunk_times.first().copied()).unwrap_or(node.started);
    let first = first.saturating_duration_since(node.started).as_secs_f64();
    wait(node, robot, "mode 'active'", LOADING, || robot.heard(|h| h.status("mode") == "active"))?;
    let at = |text| node.logged(text).unwrap_or(f64::NAN);
    let (device, weights, warm) = (at("device "), at("partition: "), at("configuring → inactive"));
    Ok(format!(
        "  {:.2} s from checkpoint to weights on the device; after the start: {weights:.2} s weights, {warm:.2} s warmed up, {first:.2} s \
         first chunk heard, {:.2} s active",
        weights - device,
        at("warmup → active"),
    ))
}

/// Arms, for as long as what the node is still discovering makes it refuse.
fn arm(robot: &Robot) -> Outcome<()> {
    let end = Instant::now() + Duration::from_secs(20);
    loop {
        match robot.enable(true) {
            Ok(_) => return Ok(()),
            Err(why) if Instant::now() > end => return Err(format!("~/enable refused for 20 s: {why}")),
            Err(_) => std::thread::sleep(Duration::from_millis(100)),
        }
    }
}

/// A run with the arm moving: `turn` is called with the seconds so far, again and again for `seconds`.
struct Run {
    gathered: Gathered,
    /// MiB of GPU and host, one for each look.
    memory: Vec<(f64, f64)>,
}

impl Run {
    fn drive(
        node: &mut ControlNode,
        robot: &Robot,
        seconds: f64,
        mut turn: impl FnMut(f64) -> Outcome<()>,
    ) -> Outcome<Self> {
        let mut run = Self { gathered: Gathered::default(), memory: Vec::new() };
        let start = Instant::now();
        let (mut look, mut fetch) = (start, start + FETCH);
        while start.elapsed().as_secs_f64() < seconds {
            if let Some(status) = node.ended() {
                return Err(format!("the node ended with {}:\n{}", how(status), node.tail()));
            }
            let (mode, text) = robot.heard(|h| (h.status("mode").to_owned(), h.status("message").to_owned()));
            // What ~/status says may be a second old.
            if start.elapsed() > Duration::from_secs(3) && !MOVING.contains(&mode.as_str()) {
                return Err(format!("the node stopped after {:.1} s: {text}", start.elapsed().as_secs_f64()));
            }
            turn(start.elapsed().as_secs_f64())?;
            if Instant::now() >= look {
                look += LOOK;
                run.memory.push((gpu_mib().unwrap_or(f64::NAN), node.host_mib().unwrap_or(f64::NAN)));
            }
            if Instant::now() >= fetch {
                fetch += FETCH;
                run.fetch(robot)?;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        run.fetch(robot)?;
        Ok(run)
    }

    /// Takes over what the node has recorded.
    fn fetch(&mut self, robot: &Robot) -> Outcome<()> {
        let path = PathBuf::from(robot.save_recording()?);
        self.gathered.add(&path)?;
        std::fs::remove_file(&path).map_err(|e| format!("{}: {e}", path.display()))
    }

    /// GPU and host memory in words.
    fn memory_lines(&self, before: Option<f64>, after: Option<f64>) -> String {
        let of = |v: Option<f64>| v.map_or_else(|| "unknown".into(), |v| format!("{v:.0}"));
        let range = |pick: fn(&(f64, f64)) -> f64| {
            let values: Vec<f64> = self.memory.iter().map(pick).filter(|v| v.is_finite()).collect();
            let [low, high] = [0.0, 1.0].map(|q| figures::quantile(&values, q));
            if values.is_empty() { "unknown".into() } else { format!("{low:.0} to {high:.0}") }
        };
        let (gpu, host) = (range(|m| m.0), range(|m| m.1));
        format!(
            "  GPU memory, MiB: before {}, while armed {gpu}, after {}; host memory of the node {host}",
            of(before),
            of(after)
        )
    }

    /// Whether memory grew over the second half.
    fn check_flat(&self, violations: &mut Violations) {
        let half = &self.memory[self.memory.len() / 2..];
        for (name, pick) in [("GPU", (|m| m.0) as fn(&(f64, f64)) -> f64), ("host", |m| m.1)] {
            let (Some(first), Some(last)) = (half.first().map(pick), half.last().map(pick)) else { continue };
            let grown = last - first;
            // What is not known is said where memory is printed.
            violations.unless(grown.is_nan() || grown <= FLAT_MIB, || {
                format!("{name} memory grew from {first:.0} to {last:.0} MiB over the second half")
            });
        }
    }
}

/// What the node counted, and what the arm was told.
fn account(robot: &Robot, violations: &mut Violations) -> String {
    robot.heard(|h| {
        let count = |key| h.count(key);
        let [ticks, published, skipped, unarmed] = ["ticks", "published", "skipped", "unarmed"].map(count);
        let [misses, chunks, adopted, rejected] = ["deadline_misses", "chunks", "chunks_adopted", "chunks_rejected"].map(count);
        let errors = ["encode_errors", "decode_errors"].map(|key| h.diagnostic("inference", key).to_owned());
        violations.unless(ticks == published + skipped + unarmed, || {
            format!("{ticks} ticks are not {published} published, {skipped} skipped, {unarmed} unarmed")
        });
        violations.unless(published > 0 && h.trajectories > 0, || "no command came".into());
        violations.unless(skipped == 0, || format!("{skipped} ticks skipped"));
        violations.unless(misses == 0, || format!("{misses} deadlines missed"));
        violations.unless(adopted > 1, || format!("{adopted} chunks adopted"));
        violations.unless(errors.iter().all(|n| n == "0"), || format!("encode and decode errors: {errors:?}"));
        violations.unless(h.wrong.0 == 0, || format!("{} wrong trajectories: {}", h.wrong.0, h.wrong.1.join("; ")));
        format!(
            "  ticks {ticks}: published {published}, skipped {skipped}, unarmed {unarmed}; deadline misses {misses}\n  chunks \
             {chunks}: adopted {adopted}, rejected {rejected}; trajectories received {}, wrong {}; interventions {}; \
             encode errors {}, decode errors {}; recorder lost {}",
            h.trajectories,
            h.wrong.0,
            h.status("interventions"),
            errors[0],
            errors[1],
            h.diagnostic("recorder", "messages_lost"),
        )
    })
}

/// The table of a run; the gaps between adopted chunks, ms.
fn table(robot: &Robot, run: &Run, armed: Instant) -> (String, Vec<f64>) {
    let made = robot.heard(|h| {
        let armed: Vec<_> = h.chunk_times.iter().filter(|t| **t > armed).collect();
        armed.windows(2).map(|w| (*w[1] - *w[0]).as_secs_f64() * 1e3).collect::<Vec<_>>()
    });
    let times = run.gathered.times();
    let lines = [
        figures::head(),
        figures::line("between chunks heard, ms", &made),
        figures::line("between chunks adopted, ms", &times.adopted),
        figures::line("image stamp to first command, ms", &times.from_image),
        figures::line("joint state stamp to first command, ms", &times.from_state),
        figures::line("age of images in any command, ms", &times.any_command),
        figures::line("between joint states sent, ms", &robot.between_states(armed)),
        figures::line("between joint states that arrived, ms", &times.states),
        figures::line("joint state stamp to arrival, ms", &times.transport),
    ];
    (lines.join("\n"), times.adopted)
}

/// Disarms, waits for the arm to rest, ends the node.
fn finish(mut node: ControlNode, robot: &Robot, violations: &mut Violations) -> Outcome<String> {
    robot.enable(false)?;
    wait(&mut node, robot, "rest", Duration::from_secs(20), || robot.heard(|h| h.status("mode") == "active"))?;
    // One more look at everything that is told once a second.
    std::thread::sleep(Duration::from_millis(1200));
    let account = account(robot, violations);
    violations.unless(robot.heard(|h| h.brakes), || "the last trajectory speeds up".into());
    let ended = node.end();
    violations.unless(ended == "exit code 0", || format!("the node ended with {ended}:\n{}", node.tail()));
    Ok(account)
}

/// The same scenes on both devices: all chunks of a scene the same bits, and those of the two devices close.
fn agree(args: &Args, robot: &Robot, violations: &mut Violations) -> Outcome<()> {
    for checkpoint in &args.checkpoint {
        let name = checkpoint.file_name().map_or_else(String::new, |n| n.to_string_lossy().into_owned());
        let ours = scenes(args, robot, checkpoint, args.device, &format!("agree-{name}-{}", args.device), violations)?;
        let reference = scenes(args, robot, checkpoint, Device::Cpu, &format!("agree-{name}-reference"), violations)?;
        let opened = Checkpoint::open(checkpoint).map_err(|e| e.to_string())?;
        let policy = Policy::open(&opened, checkpoint, &PolicyOptions::default()).map_err(|e| e.to_string())?;
        let dims = *policy.dims();
        for scene in 0..SCENES {
            let pose = robot.still_pose(scene);
            let model = |chunk: &Chunk| {
                let mut out = vec![0.0; dims.horizon * dims.action_dim];
                policy.to_model(&chunk.positions, &pose, &mut out).map_err(|e| e.to_string()).map(|()| out)
            };
            let (a, b) = (model(&ours[scene as usize])?, model(&reference[scene as usize])?);
            let norm = |v: &mut dyn Iterator<Item = f64>| v.map(|x| x * x).sum::<f64>().sqrt();
            let difference = norm(&mut a.iter().zip(&b).map(|(a, b)| f64::from(a - b)));
            let distance = difference / norm(&mut b.iter().map(|b| f64::from(*b)));
            println!("  {name}, scene {scene}: {} and cpu differ by {distance:.1e} (relative L2)", args.device);
            violations
                .unless(distance <= AGREE, || format!("{name}, scene {scene}: {distance:.1e} is above {AGREE:.1e}"));
        }
        let differ = |chunks: &[Chunk]| chunks.windows(2).all(|w| w[0].positions != w[1].positions);
        violations.unless(differ(&ours), || format!("{name}: the chunks do not depend on the scene"));
    }
    Ok(())
}

/// A chunk of each scene on that device, the node not armed.
fn scenes(
    args: &Args,
    robot: &Robot,
    checkpoint: &Path,
    device: Device,
    name: &str,
    violations: &mut Violations,
) -> Outcome<Vec<Chunk>> {
    let told = |name, value: &str| (name, value.to_owned());
    let more = [told("seam", "none"), told("noise", "held"), told("seed", "1"), told("pipeline_mode", "sequential")];
    robot.forget();
    robot.show(Scene::Still(0));
    let mut node = args.start_node(name, &args.parameters(checkpoint, device, &more))?;
    let start = started(&mut node, robot)?;
    println!("{name}: {}\n{}", robot.heard(|h| h.status("device").to_owned()), start);
    let mut chunks = Vec::new();
    for scene in 0..SCENES {
        robot.show(Scene::Still(scene));
        let from = pi0_mps::clock::Clock::ros(&pi0_mps::rt::SystemClock).plus_seconds(SETTLE);
        let mut fresh = Vec::new();
        wait(&mut node, robot, "three chunks of a scene", Duration::from_secs(60), || {
            fresh = robot.heard(|h| h.chunks.iter().filter(|c| c.stamp > from).cloned().collect());
            fresh.len() >= SAME
        })?;
        let same = fresh.windows(2).all(|w| w[0].positions == w[1].positions);
        violations.unless(same, || format!("{name}, scene {scene}: chunks of the same observation differ"));
        let finite = fresh.iter().all(|c| !c.positions.is_empty() && c.positions.iter().all(|x| x.is_finite()));
        violations.unless(finite, || format!("{name}, scene {scene}: a chunk that is empty or not finite"));
        chunks.extend(fresh.into_iter().next());
    }
    let ended = node.end();
    violations.unless(ended == "exit code 0", || format!("{name}: the node ended with {ended}:\n{}", node.tail()));
    Ok(chunks)
}

/// Twenty re-splits while the arm moves.
fn resplit(args: &Args, robot: &Robot, violations: &mut Violations) -> Outcome<()> {
    let before = gpu_mib();
    let mut node = moving(args, robot, &format!("resplit-{}", args.partition), "pipelined")?;
    let armed = Instant::now();
    let every = args.seconds / (SPLITS.len() + 1) as f64;
    let (mut asked, mut seen, mut built) = (0, String::from("0"), [Vec::new(), Vec::new()]);
    let run = Run::drive(&mut node.0, robot, args.seconds, |seconds| {
        if asked < SPLITS.len() && seconds > every * (asked + 1) as f64 {
            let encoder = SPLITS[asked];
            robot.set_parameters(&[("mps_encoder_percentage", encoder), ("mps_decoder_percentage", 100 - encoder)])?;
            asked += 1;
        }
        robot.heard(|h| {
            let resplits = h.diagnostic("gpu", "resplits");
            if resplits != seen {
                seen = resplits.to_owned();
                let keys = ["last_resplit_build_ms", "last_resplit_in_force_ms"];
                let values = keys.map(|key| h.diagnostic("gpu", key).parse::<f64>().ok());
                built.iter_mut().zip(values).for_each(|(all, value)| all.extend(value));
            }
        });
        Ok(())
    })?;
    let (text, adopted) = table(robot, &run, armed);
    let (partition, account) =
        (robot.heard(|h| h.diagnostic("gpu", "partition").to_owned()), finish(node.0, robot, violations)?);
    let done: usize = robot.heard(|h| h.diagnostic("gpu", "resplits").parse().unwrap_or(0));
    println!("{}\n{account}\n{text}", node.1);
    println!("  re-splits: {asked} asked for, {done} done; in the end {partition}");
    println!(
        "{}\n{}",
        figures::line("building the stages, ms", &built[0]),
        figures::line("until in force, ms", &built[1])
    );
    println!("{}", run.memory_lines(before, gpu_mib()));
    // One that is asked for while another is built takes its place.
    violations.unless(done + 2 >= SPLITS.len(), || format!("{done} re-splits of {}", SPLITS.len()));
    let (median, most) = (figures::quantile(&adopted, 0.5), figures::quantile(&adopted, 1.0));
    violations
        .unless(most <= 2.0 * median, || format!("{most:.1} ms between adopted chunks, the median is {median:.1} ms"));
    Ok(())
}

/// A node that moves the arm, and how it started.
fn moving(args: &Args, robot: &Robot, name: &str, mode: &str) -> Outcome<(ControlNode, String)> {
    robot.forget();
    robot.show(Scene::Live);
    let more = [
        ("partition", args.partition.clone()),
        ("pipeline_mode", mode.to_owned()),
        ("replan_steps", args.replan_steps.to_string()),
    ];
    let mut node = args.start_node(name, &args.parameters(&args.checkpoint[0], args.device, &more))?;
    let start = started(&mut node, robot)?;
    println!("{name}: {}, {mode}", robot.heard(|h| h.status("device").to_owned()));
    arm(robot)?;
    wait(&mut node, robot, "a moving arm", Duration::from_secs(20), || {
        robot.heard(|h| MOVING.contains(&h.status("mode")) && h.trajectories > 0)
    })?;
    Ok((node, start))
}

/// A long run.
fn soak(args: &Args, robot: &Robot, violations: &mut Violations) -> Outcome<()> {
    let before = gpu_mib();
    let (mut node, start) = moving(args, robot, "soak", "dual_rate")?;
    let armed = Instant::now();
    let run = Run::drive(&mut node, robot, args.seconds, |_| Ok(()))?;
    let (text, _) = table(robot, &run, armed);
    let inference = robot.heard(|h| {
        let values = ["encodes", "decodes", "encode_ms_p50", "encode_ms_p99", "decode_ms_p50", "decode_ms_p99"];
        values.map(|key| format!("{key} {}", h.diagnostic("inference", key))).join(", ")
    });
    let account = finish(node, robot, violations)?;
    println!("{}\n{account}\n  {inference}\n{text}\n{}", start, run.memory_lines(before, gpu_mib()));
    let expected = (args.seconds * 0.95 / robot.period()) as usize;
    let found = run.gathered.times().ticks;
    violations.unless(found >= expected, || format!("{found} commands in the recordings, {expected} expected"));
    run.check_flat(violations);
    violations
        .unless(args.device == Device::Cpu || before.is_some(), || "nvidia-smi does not tell the GPU's memory".into());
    Ok(())
}

/// The daemon dies under a moving arm: the arm is brought to rest, the node says why and ends as the machine's fault.
fn mps(args: &Args, robot: &Robot, violations: &mut Violations) -> Outcome<()> {
    let (mut node, start) = moving(args, robot, "mps", "pipelined")?;
    println!("{}\n  {}", start, robot.heard(|h| h.diagnostic("gpu", "partition").to_owned()));
    std::thread::sleep(Duration::from_secs(2));
    let before = robot.heard(|h| h.texts.len());
    let killed = Command::new("sh").args(["-c", &args.kill_mps]).output().map_err(|e| format!("sh: {e}"))?;
    if !killed.status.success() {
        return Err(format!("--kill-mps failed: {}", String::from_utf8_lossy(&killed.stderr).trim()));
    }
    let at = Instant::now();
    let mut silent = None;
    let mut last = (0, at);
    while node.ended().is_none() && at.elapsed() < Duration::from_secs(60) {
        let count = robot.heard(|h| h.trajectories);
        if count != last.0 {
            last = (count, Instant::now());
        } else if last.1.elapsed() > Duration::from_millis(200) {
            silent = silent.or(Some(last.1.saturating_duration_since(at)));
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    let (texts, brakes, wrong) = robot.heard(|h| (h.texts.clone(), h.brakes, h.wrong.clone()));
    let said = texts[before..].join(" | ");
    println!(
        "  the last trajectory came {:.2} s after the kill; status: {said}",
        silent.unwrap_or_default().as_secs_f64()
    );
    violations.unless(brakes, || "the last trajectory speeds up".into());
    violations.unless(wrong.0 == 0, || format!("{} wrong trajectories: {}", wrong.0, wrong.1.join("; ")));
    // As EngineError::Device begins: a call that failed, with what the driver says.
    violations.unless(said.contains("GPU, "), || format!("the status does not say why: '{said}'"));
    match node.ended() {
        Some(status) => {
            println!("  it ended with {} after {:.2} s", how(status), at.elapsed().as_secs_f64());
            let expected = i32::from(Fault::Machine.exit_code());
            violations.unless(status.code() == Some(expected), || format!("{}, not {expected}", how(status)));
        }
        None => violations.0.push("the node did not end within 60 s".into()),
    }
    println!("{}", node.tail());
    Ok(())
}

fn run(args: &Args) -> Outcome<Violations> {
    std::fs::create_dir_all(args.work.join("recordings")).map_err(|e| format!("{}: {e}", args.work.display()))?;
    let robot = Robot::start(&args.settings()?, &HOME, args.image_hz)?;
    let mut violations = Violations::default();
    let outcome = match args.check {
        Check::Agree => agree(args, &robot, &mut violations),
        Check::Resplit => resplit(args, &robot, &mut violations),
        Check::Soak => soak(args, &robot, &mut violations),
        Check::Mps => mps(args, &robot, &mut violations),
    };
    robot.end();
    violations.0.extend(outcome.err());
    Ok(violations)
}

fn main() -> ExitCode {
    match run(&Args::parse()) {
        Ok(Violations(all)) if all.is_empty() => ExitCode::SUCCESS,
        Ok(Violations(all)) => {
            all.iter().for_each(|v| println!("violation: {v}"));
            ExitCode::FAILURE
        }
        Err(e) => {
            eprintln!("error: {e}");
            ExitCode::from(2)
        }
    }
}
