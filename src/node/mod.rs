//! The whole node without a middleware: inputs, pipeline, control thread.
//!
//! This room only holds the shape that `ros/` is written against, with a core that counts what comes in and plays a
//! held pose when enabled, so that the middleware side can be exercised on its own.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use crate::clock::{Clock, RosTime};
use crate::control::chunk::ActionChunk;
use crate::error::{Blame, Fault};
use crate::model::{Frame, ModelError};
use crate::params::Settings;

/// What can go wrong with a node.
#[derive(Debug, thiserror::Error)]
pub enum NodeError {
    /// A setting cannot be used, or not now.
    #[error("{0}")]
    Settings(String),
}

impl Blame for NodeError {
    fn fault(&self) -> Fault {
        Fault::Input
    }
}

/// How well it goes, as diagnostics say it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Level {
    /// As it should.
    Ok,
    /// Works, but somebody should look.
    Warn,
    /// Does not work.
    Error,
    /// Nothing has been heard for too long.
    Stale,
}

/// One entry of `/diagnostics`.
#[derive(Debug, Clone, PartialEq)]
pub struct Diagnostic {
    /// inputs, inference, control, safety or gpu.
    pub name: &'static str,
    /// How well it goes.
    pub level: Level,
    /// One line.
    pub message: String,
    /// Keys with units, and their values.
    pub values: Vec<(String, String)>,
}

/// A snapshot of the node.
#[derive(Debug, Clone, PartialEq)]
pub struct Status {
    /// The worst of all.
    pub level: Level,
    /// Mode of the control loop.
    pub mode: &'static str,
    /// One line.
    pub message: String,
    /// Keys with units, and their values.
    pub values: Vec<(String, String)>,
    /// The parts.
    pub diagnostics: Vec<Diagnostic>,
}

/// What is published at each tick: the plan from the next period on, and the braking tail.
#[derive(Debug, Clone, PartialEq)]
pub struct OutputWindow {
    /// ROS time of the tick.
    pub stamp: RosTime,
    /// Joints of one point.
    pub joints: usize,
    /// Seconds from the stamp, strictly increasing.
    pub times: Vec<f64>,
    /// `[points, joints]`, row-major, robot units.
    pub positions: Vec<f64>,
    /// `[points, joints]`, row-major, robot units per second.
    pub velocities: Vec<f64>,
}

/// Where the node's outputs go; called on the publisher thread only.
pub trait Outputs: Send {
    /// The window of a tick.
    fn trajectory(&mut self, w: &OutputWindow);
    /// A chunk as the policy produced it.
    fn chunk(&mut self, c: &ActionChunk);
}

#[derive(Default)]
struct Shared {
    frames: AtomicU64,
    bad_frames: Mutex<(u64, String)>,
    joints: AtomicU64,
    prompt: Mutex<String>,
    armed: AtomicBool,
    quit: AtomicBool,
}

/// The running core.
pub struct Node {
    shared: Arc<Shared>,
    publisher: std::thread::JoinHandle<()>,
}

/// What comes in from topics.
#[derive(Clone)]
pub struct Inputs(Arc<Shared>);

/// What an operator asks for.
#[derive(Clone)]
pub struct Commands(Arc<Shared>);

impl Node {
    /// Starts the core; returns at once and loads in a thread of its own.
    pub fn start(settings: Settings, clock: Arc<dyn Clock>, mut outputs: Box<dyn Outputs>) -> Result<Node, NodeError> {
        let shared = Arc::new(Shared::default());
        let s = shared.clone();
        let publisher = std::thread::spawn(move || {
            let joints = settings.joints.len();
            while !s.quit.load(Ordering::Relaxed) {
                std::thread::sleep(settings.timing.period());
                if s.armed.load(Ordering::Relaxed) {
                    outputs.trajectory(&OutputWindow {
                        stamp: clock.ros(),
                        joints,
                        times: vec![0.02, 0.04],
                        positions: (0..2 * joints).map(|i| i as f64 * 0.1).collect(),
                        velocities: vec![0.0; 2 * joints],
                    });
                    outputs.chunk(&ActionChunk {
                        sequence: 1,
                        epoch: 0,
                        prompt_generation: 0,
                        state_stamp: clock.ros(),
                        oldest_image_stamp: clock.ros(),
                        dt: settings.timing.dt(),
                        horizon: 3,
                        joints,
                        positions: vec![0.5; 3 * joints],
                        timing: Default::default(),
                    });
                }
            }
            std::thread::sleep(Duration::from_millis(100));
            outputs.trajectory(&OutputWindow {
                stamp: clock.ros(),
                joints,
                times: vec![0.02],
                positions: vec![-1.0; joints],
                velocities: vec![0.0; joints],
            });
        });
        Ok(Node { shared, publisher })
    }

    /// Where messages go.
    pub fn inputs(&self) -> Inputs {
        Inputs(self.shared.clone())
    }

    /// Where commands go.
    pub fn commands(&self) -> Commands {
        Commands(self.shared.clone())
    }

    /// Whether the robot is under control now, which decides what parameters may change.
    pub fn armed(&self) -> bool {
        self.shared.armed.load(Ordering::Relaxed)
    }

    /// A whole snapshot.
    pub fn status(&self) -> Status {
        let values = vec![
            ("frames".to_owned(), self.shared.frames.load(Ordering::Relaxed).to_string()),
            ("joint states".to_owned(), self.shared.joints.load(Ordering::Relaxed).to_string()),
            ("prompt".to_owned(), self.shared.prompt.lock().map(|p| p.clone()).unwrap_or_default()),
        ];
        let bad = self.shared.bad_frames.lock().map(|b| b.clone()).unwrap_or_default();
        let level = if bad.0 > 0 { Level::Warn } else { Level::Ok };
        let mode = if self.armed() { "armed" } else { "active" };
        Status {
            level,
            mode,
            message: bad.1.clone(),
            values: values.clone(),
            diagnostics: vec![Diagnostic { name: "inputs", level, message: bad.1, values }],
        }
    }

    /// Takes live changes, already validated.
    pub fn apply(&self, settings: &Settings) -> Result<(), NodeError> {
        if settings.model.prompt == "refuse" {
            return Err(NodeError::Settings("the prompt cannot be used".into()));
        }
        Ok(())
    }

    /// Stops the robot with a decelerating trajectory published to its end, and joins every thread.
    pub fn shutdown(self) -> Result<(), NodeError> {
        self.shared.quit.store(true, Ordering::Relaxed);
        let _ = self.publisher.join();
        Ok(())
    }
}

impl Inputs {
    /// A frame of camera `camera` (index into `settings.inputs.cameras`), or why it cannot be used.
    pub fn frame(&self, _camera: usize, _stamp: RosTime, frame: Result<Frame, ModelError>) {
        match frame {
            Ok(_) => _ = self.0.frames.fetch_add(1, Ordering::Relaxed),
            Err(e) => {
                if let Ok(mut bad) = self.0.bad_frames.lock() {
                    *bad = (bad.0 + 1, e.to_string());
                }
            }
        }
    }

    /// Measured positions by name.
    pub fn joints(&self, _stamp: RosTime, _names: &[String], _positions: &[f64]) {
        self.0.joints.fetch_add(1, Ordering::Relaxed);
    }

    /// A new prompt.
    pub fn prompt(&self, text: &str) -> Result<(), NodeError> {
        if let Ok(mut p) = self.0.prompt.lock() {
            *p = text.into();
        }
        Ok(())
    }
}

impl Commands {
    /// Arms or disarms; the answer says what is so now, or why not.
    pub fn enable(&self, on: bool) -> Result<String, String> {
        self.0.armed.store(on, Ordering::Relaxed);
        Ok(if on { "armed" } else { "disarmed" }.into())
    }

    /// Latched decelerating stop.
    pub fn stop(&self) -> Result<String, String> {
        self.0.armed.store(false, Ordering::Relaxed);
        Ok("stopped".into())
    }

    /// Releases a stop.
    pub fn reset(&self) -> Result<String, String> {
        Err("nothing to reset".into())
    }
}
