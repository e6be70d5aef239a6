//! The node from start to end.

use std::ffi::OsString;
use std::io::Write;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use crossbeam_channel::{Receiver, Sender};
use r2r::std_srvs::srv::Trigger;
use r2r::{Context, QosProfile};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

use super::args::{Args, NODE_NAME, STOP_NODE_NAME};
use super::clock::NodeClock;
use super::failure::{Refusal, middleware, stop_on_panic};
use super::graph::{InputWiring, Latch};
use super::outputs::RosOutputs;
use super::parameters::{self, Parameters};
use super::services::{self, Job, Services};
use super::spin::{Spinner, drain, spawn};
use super::status::StatusPublisher;
use super::wiring::{Output, Wiring};
use super::{inputs, log, services::outcome, services::respond};
use crate::error::Fault;
use crate::node::{Commands, Identity, Node};
use crate::params::{ParamError, Params, help_table, params_file, yaml};
use crate::telemetry::trace;

/// Runs `control_node`; returns its exit code: 0 after SIGINT, SIGTERM or SIGHUP, 2 for what the user can put right, 3
/// for the machine, 70 for an error in the program.
pub fn run() -> ExitCode {
    let given: Vec<OsString> = std::env::args_os().skip(1).collect();
    let outcome = Args::parse(given.iter().cloned()).map_err(|e| Refusal::new(Fault::Input, e)).and_then(|args| {
        if args.help {
            return say(&help());
        }
        if args.version {
            return say(concat!("control_node ", env!("CARGO_PKG_VERSION"), "\n"));
        }
        log::begin(args.log_level.unwrap_or("info"));
        live(&args, &given)
    });
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(refusal) => {
            for problem in &refusal.problems {
                // Where the terminal is gone, nobody is left to tell.
                let _ = writeln!(std::io::stderr(), "control_node: {problem}");
            }
            ExitCode::from(refusal.fault.exit_code())
        }
    }
}

/// To standard output; a reader that has seen enough is no error.
fn say(text: &str) -> Result<(), Refusal> {
    match std::io::stdout().write_all(text.as_bytes()) {
        Err(e) if e.kind() != std::io::ErrorKind::BrokenPipe => {
            Err(Refusal::new(Fault::Machine, format!("cannot write to standard output: {e}")))
        }
        _ => Ok(()),
    }
}

fn help() -> String {
    format!(
        "control_node: real-time control of a robot with the pi0 policy\n\n\
         Usage: control_node [--help] [--version] [--trace FILE] [--ros-args ROS-ARGUMENTS]\n\n\
         \x20 --trace FILE                at the end, write what ran when, for https://ui.perfetto.dev\n\n\
         ROS arguments most often used:\n\
         \x20 --params-file FILE          parameters from a YAML file; config/defaults.yaml lists them all\n\
         \x20 -p NAME:=VALUE              one parameter\n\
         \x20 -r FROM:=TO                 remap a topic or service; __node:=NAME, __ns:=/NAMESPACE for the node itself\n\
         \x20 --log-level LEVEL           debug, info, warn, error\n\n\
         The node never moves the robot because it started: call ~/enable for that, ~/stop to stop.\n\n\
         Parameters:\n{}",
        help_table()
    )
}

/// From the command line to the end of the process.
fn live(args: &Args, given: &[OsString]) -> Result<(), Refusal> {
    if let Some(problem) = args.unreadable_params_file() {
        return Err(Refusal::new(Fault::Input, problem));
    }
    name_the_stop_node(args, given)?;
    let (end, ended_by) = catch_signals()?;
    if args.trace.is_some() {
        trace::start();
    }

    let context = context()?;
    let mut node = r2r::Node::create(context.clone(), NODE_NAME, "").map_err(|e| {
        let check = security().unwrap_or("check its name, namespace and remappings");
        Refusal::new(Fault::Input, format!("the node cannot be created: {e}; {check}"))
    })?;
    let name = node.fully_qualified_name().map_err(middleware("reading the node's name"))?;
    log::to_node(&mut node, args.no_rosout)?;
    let params = read_parameters(&node, &name, args)?;
    let settings = params.settings();
    let clock = NodeClock::new(settings.process.use_sim_time);
    let shared_clock: Arc<dyn crate::clock::Clock> = Arc::new(clock.clone());

    let outputs = RosOutputs::advertise(&mut node, &settings)?;
    let (space, own) = name.rsplit_once('/').unwrap_or(("", &name));
    let resolve = |topic: &str| args.topic(topic, space, own);
    let topics = settings.outputs.iter().map(|o| resolve(&o.topic)).zip(outputs.publishers());
    let topics = topics.map(|(topic, to)| Output { topic, to }).collect();
    let status = StatusPublisher::advertise(&mut node, &name, shared_clock.clone())?;
    let events = node
        .create_publisher("/parameter_events", QosProfile::parameter_events())
        .map_err(middleware("advertising '/parameter_events'"))?;

    let identity = Identity { name: name.clone(), parameters: params_file(&params) };
    let core = Arc::new(Node::start_as(identity, settings.clone(), shared_clock.clone(), Box::new(outputs))?);
    let commands = core.commands();
    stop_on_panic(commands.clone());
    let mut wiring = Wiring::new(topics, core.inputs());
    let (jobs, requests) = services::queue();
    let prompts = jobs.clone();
    let take_prompt = move |prompt| services::enqueue(&prompts, "~/prompt", Job::Prompt(prompt));
    let descriptions = jobs.clone();
    let describe = move |urdf| services::enqueue(&descriptions, inputs::DESCRIPTION, Job::Description(urdf));
    let mut drains = inputs::subscribe(&mut node, &settings, &clock, &core.inputs(), take_prompt, describe)?;
    let mut input_wiring = InputWiring::new(&settings, core.inputs(), resolve);
    let mut latch = Latch::new(resolve(inputs::DESCRIPTION));
    services::offer(&mut node, &jobs, &mut drains)?;
    let parameters = Parameters::new(params, name.clone());
    let services = Services {
        core: core.clone(),
        commands: commands.clone(),
        transitions: core.transitions(),
        parameters,
        events,
        clock: shared_clock,
    };

    let stop_service = args.service("~/stop", space, own);
    let again = args.service(&stop_service, space, own);
    if again != stop_service {
        let problem = format!("~/stop is remapped to {stop_service}, and that to {again}: give ~/stop one name");
        return Err(Refusal::new(Fault::Input, problem));
    }
    let stop = serve_stop(&context, &stop_service, commands)?;
    let spinner = Spinner::start("ros-spin", node, drains, move |node| {
        wiring.look(node);
        input_wiring.look(node);
        latch.look(node);
    })?;
    let services = spawn("ros-services", move || services.run(&requests))?;
    let (quit_status, quit) = crossbeam_channel::bounded(1);
    let watched = core.clone();
    let failed = move || {
        let _ = end.try_send(End::Failure);
    };
    let status = spawn("ros-status", move || status.run(&watched, &quit, failed))?;
    tracing::info!("{name} is up; unarmed until ~/enable");

    match ended_by.recv() {
        Ok(End::Signal(name)) => {
            tracing::info!("{name}: stopping the robot, then leaving; another one after {ONE_WISH:?} leaves at once");
        }
        _ => tracing::error!("the node cannot go on: stopping the robot, then leaving"),
    }
    // No more commands and parameters; measurements still come in, so that the stop is a good one, and ~/stop answers.
    let _ = jobs.send(Job::Quit);
    let _ = services.join();
    drop(quit_status);
    let _ = status.join();
    let failure = core.failure();
    let ended = Arc::into_inner(core).map(Node::shutdown);
    std::thread::sleep(FLUSH);
    stop.end();
    spinner.end();
    if let Some(file) = &args.trace
        && let Err(e) = trace::write(file)
    {
        tracing::error!("--trace {}: {e}", file.display());
    }
    match (failure, ended) {
        (Some((fault, problem)), _) => return Err(Refusal::new(fault, problem)),
        (None, Some(result)) => result?,
        (None, None) => return Err(Refusal::new(Fault::Internal, "the node is still in use at its end")),
    }
    tracing::info!("done");
    Ok(())
}

/// Time for the middleware to send the last message.
const FLUSH: Duration = Duration::from_millis(100);

/// Why the node leaves.
enum End {
    Signal(&'static str),
    /// The core has one.
    Failure,
}

/// The signals that end the node. SIGHUP comes when its terminal or connection is gone.
const ENDING: [(i32, &str); 3] = [(SIGINT, "SIGINT"), (SIGTERM, "SIGTERM"), (SIGHUP, "SIGHUP")];

/// Signals within this time are one wish: ros2 launch sends its child a SIGINT of its own on top of the one that Ctrl-C
/// sends to all of them, and that must not cut the stop short.
const ONE_WISH: Duration = Duration::from_secs(1);

/// The first signal is for the main thread; one that comes [`ONE_WISH`] after it ends the process at once.
fn catch_signals() -> Result<(Sender<End>, Receiver<End>), Refusal> {
    let error = |e: std::io::Error| Refusal::new(Fault::Machine, format!("cannot handle signals: {e}"));
    let hurry = Arc::new(AtomicBool::new(false));
    let ending = ENDING.iter().filter(|(signal, _)| !(*signal == SIGHUP && is_ignored(SIGHUP)));
    let ending: Vec<i32> = ending.map(|(signal, _)| *signal).collect();
    for signal in &ending {
        // In the handler, not in the thread below: it ends the process whatever the threads are doing.
        signal_hook::flag::register_conditional_shutdown(*signal, 128 + signal, hurry.clone()).map_err(error)?;
    }
    let mut signals = Signals::new(&ending).map_err(error)?;
    let (end, ended_by) = crossbeam_channel::bounded(1);
    let tell = end.clone();
    spawn("ros-signals", move || {
        let first = signals.forever().next();
        let Some((_, name)) = ENDING.iter().find(|(signal, _)| Some(*signal) == first) else { return };
        let _ = tell.try_send(End::Signal(name));
        std::thread::sleep(ONE_WISH);
        hurry.store(true, Ordering::Relaxed);
    })?;
    Ok((end, ended_by))
}

/// Whether the process was started to ignore a signal, as nohup does with SIGHUP.
fn is_ignored(signal: i32) -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    let mask = mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok());
    mask.is_some_and(|mask| mask >> (signal - 1) & 1 == 1)
}

/// `-r __node:=NAME`, as launch files write it, renames every node of a process, and the hidden one must not have the
/// same name. r2r reads the process's own arguments, so the program starts itself again with one rule more.
fn name_the_stop_node(args: &Args, given: &[OsString]) -> Result<(), Refusal> {
    let Some(rule) = args.stop_node_rule() else { return Ok(()) };
    let failed = |e: std::io::Error| Refusal::new(Fault::Machine, format!("cannot start again under a new name: {e}"));
    let program = std::env::current_exe().map_err(failed)?;
    let mut command = std::process::Command::new(program);
    if let Some(arg0) = std::env::args_os().next() {
        command.arg0(arg0);
    }
    Err(failed(command.args(rule).args(given).exec()))
}

/// r2r panics where rcl refuses the arguments: what it says becomes an error.
fn context() -> Result<Context, Refusal> {
    let hook = std::panic::take_hook();
    std::panic::set_hook(Box::new(|_| {}));
    let made = std::panic::catch_unwind(Context::create);
    std::panic::set_hook(hook);
    match made {
        Ok(context) => context.map_err(middleware("starting ROS")),
        Err(panic) => {
            let said = panic
                .downcast_ref::<String>()
                .cloned()
                .or(panic.downcast_ref::<&str>().map(|s| (*s).to_owned()))
                .unwrap_or_else(|| "no reason given".into());
            let check = security().map_or_else(String::new, |check| format!("; {check}"));
            Err(Refusal::new(Fault::Input, format!("the ROS arguments or a params file cannot be used: {said}{check}")))
        }
    }
}

/// What to look at if security is on: the middleware says little of what it misses.
fn security() -> Option<&'static str> {
    std::env::var("ROS_SECURITY_ENABLE").is_ok_and(|on| on == "true").then_some(
        "ROS_SECURITY_ENABLE is true: check ROS_SECURITY_KEYSTORE, the enclave, and that the middleware is built with security",
    )
}

fn read_parameters(node: &r2r::Node, name: &str, args: &Args) -> Result<Params, Refusal> {
    // r2r leaves out what it takes for another node's, and a file with limits must not be left out in silence.
    let unread = |file: &PathBuf| {
        // A pipe has been read by rcl, to its end.
        file.is_file().then_some(())?;
        let text = std::fs::read_to_string(file).map_err(|e| e.to_string());
        let problem = text.and_then(|text| yaml::check_sections(&text, name)).err()?;
        Some(format!("params file '{}': {problem}", file.display()))
    };
    let problems: Vec<String> = args.params_files.iter().filter_map(unread).collect();
    if !problems.is_empty() {
        return Err(Refusal { fault: Fault::Input, problems });
    }
    Params::from_overrides(parameters::overrides(node)).map_err(|errors| {
        let problems = errors.iter().map(ParamError::to_string).collect();
        Refusal { fault: Fault::Input, problems }
    })
}

/// `~/stop`, as `service`, on a node and thread of its own, so that nothing else can delay it. The name is that which the
/// rules for the visible node give it: the middleware takes `~` for the hidden one.
fn serve_stop(context: &Context, service: &str, commands: Commands) -> Result<Spinner, Refusal> {
    let mut node =
        r2r::Node::create(context.clone(), STOP_NODE_NAME, "").map_err(middleware("creating the node of ~/stop"))?;
    let requests = node
        .create_service::<Trigger::Service>(service, QosProfile::services_default())
        .map_err(middleware(format!("offering '~/stop' as '{service}'")))?;
    let answer = drain(requests, move |request| {
        let (success, message) = outcome("~/stop", commands.stop());
        respond("~/stop", request, Trigger::Response { success, message });
    });
    Spinner::start("ros-stop", node, vec![answer], |_| {})
}
