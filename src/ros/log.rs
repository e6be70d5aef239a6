//! Events of `tracing` go to ROS's logging: console, log file and `/rosout`.

use std::fmt::Write as _;
use std::io::Write as _;
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::Duration;

use r2r::rcl_interfaces::msg::Log;
use r2r::{LogSeverity, Publisher, QosProfile};
use tracing::field::{Field, Visit};
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::layer::{Context, Layer, SubscriberExt};
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{EnvFilter, registry};

use super::convert::{stamp, text};
use super::failure::{Refusal, middleware};
use crate::clock::Clock;
use crate::rt::SystemClock;

/// Where events go once there is a node.
static NODE: OnceLock<NodeLog> = OnceLock::new();

struct NodeLog {
    logger: String,
    /// rcl leaves `/rosout` to the client libraries, and r2r does not publish on it. None: the user wants none.
    rosout: Option<Mutex<Publisher<Log>>>,
}

/// What is said on `/rosout` waits this long for those who come late.
const LIFESPAN: Duration = Duration::from_secs(10);

/// Begins with standard error; `level` and what is worse is logged.
pub fn begin(level: &str) {
    // Fails only if it was begun before.
    let _ = registry().with(EnvFilter::new(level)).with(RosLog).try_init();
}

/// From now on events go to the logger of that node and, unless `quiet`, to `/rosout`.
pub fn to_node(node: &mut r2r::Node, quiet: bool) -> Result<(), Refusal> {
    let mut qos = QosProfile::default().keep_last(1000).reliable().transient_local();
    qos.lifespan = LIFESPAN;
    let rosout = match quiet {
        true => None,
        false => Some(Mutex::new(node.create_publisher("/rosout", qos).map_err(middleware("advertising '/rosout'"))?)),
    };
    // Set once: there is one node.
    let _ = NODE.set(NodeLog { logger: node.logger().into(), rosout });
    Ok(())
}

struct RosLog;

impl<S: Subscriber> Layer<S> for RosLog {
    fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
        let mut line = Line::default();
        event.record(&mut line);
        let meta = event.metadata();
        let Some(NodeLog { logger, rosout }) = NODE.get() else {
            // Unlike eprintln, no panic where the terminal is gone.
            let _ = writeln!(std::io::stderr(), "[{}] {}", meta.level(), line.0);
            return;
        };
        let (severity, number) = match *meta.level() {
            Level::ERROR => (LogSeverity::Error, Log::ERROR as u8),
            Level::WARN => (LogSeverity::Warn, Log::WARN as u8),
            Level::INFO => (LogSeverity::Info, Log::INFO as u8),
            _ => (LogSeverity::Debug, Log::DEBUG as u8),
        };
        // r2r panics on a NUL.
        let (msg, file, line) = (text(&line.0), meta.file().unwrap_or_default(), meta.line().unwrap_or_default());
        r2r::log(&msg, logger, file, line, severity);
        if let Some(rosout) = rosout {
            let entry = Log {
                stamp: stamp(SystemClock.ros()),
                level: number,
                name: logger.clone(),
                msg,
                file: file.into(),
                function: meta.target().into(),
                line,
            };
            // At the end of the process nobody is left to tell.
            let _ = rosout.lock().unwrap_or_else(PoisonError::into_inner).publish(&entry);
        }
    }
}

/// The message, then the other fields as `name=value`.
#[derive(Default)]
struct Line(String);

impl Visit for Line {
    fn record_debug(&mut self, field: &Field, value: &dyn std::fmt::Debug) {
        // Writing to a string cannot fail.
        let _ = match field.name() {
            "message" => write!(self.0, "{value:?}"),
            name => write!(self.0, " {name}={value:?}"),
        };
    }
}
