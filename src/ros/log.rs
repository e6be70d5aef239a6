//! Events of `tracing` go to ROS's logging: console, log file and `/rosout`.

use std::fmt::Write;
use std::sync::OnceLock;

use r2r::LogSeverity;
use tracing::field::{Field, Visit};
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::layer::{Context, Layer, SubscriberExt};
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{EnvFilter, registry};

use super::convert::text;

/// Name of the node's logger, once there is a node.
static LOGGER: OnceLock<String> = OnceLock::new();

/// Begins with standard error; `level` and what is worse is logged.
pub fn begin(level: &str) {
    // Fails only if it was begun before.
    let _ = registry().with(EnvFilter::new(level)).with(RosLog).try_init();
}

/// From now on events go to the logger of that name.
pub fn to_logger(name: &str) {
    let _ = LOGGER.set(name.into());
}

struct RosLog;

impl<S: Subscriber> Layer<S> for RosLog {
    fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
        let mut line = Line::default();
        event.record(&mut line);
        let meta = event.metadata();
        let Some(logger) = LOGGER.get() else {
            eprintln!("[{}] {}", meta.level(), line.0);
            return;
        };
        let severity = match *meta.level() {
            Level::ERROR => LogSeverity::Error,
            Level::WARN => LogSeverity::Warn,
            Level::INFO => LogSeverity::Info,
            _ => LogSeverity::Debug,
        };
        // r2r panics on a NUL.
        r2r::log(&text(&line.0), logger, meta.file().unwrap_or_default(), meta.line().unwrap_or_default(), severity);
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
