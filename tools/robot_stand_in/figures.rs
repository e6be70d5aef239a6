//! What a run came to, from the node's own recordings: every tick with its times, every chunk with the stamps it was
//! made from, every joint state with the time of its arrival.

use std::collections::BTreeMap;
use std::path::Path;

use pi0_mps::bag::message::{ChunkTimes, JointState, Tick};
use pi0_mps::bag::{BagReader, Message};
use pi0_mps::clock::RosTime;

use crate::Outcome;

/// Ticks and joint states by their stamps and chunks by their numbers, gathered from recordings that may overlap.
#[derive(Default)]
pub struct Gathered {
    ticks: BTreeMap<RosTime, Tick>,
    chunks: BTreeMap<u64, ChunkTimes>,
    /// When each arrived.
    joints: BTreeMap<RosTime, RosTime>,
}

impl Gathered {
    /// Adds a recording.
    pub fn add(&mut self, recording: &Path) -> Outcome<()> {
        for record in BagReader::open(recording).map_err(|e| e.to_string())? {
            let record = record.map_err(|e| e.to_string())?;
            if record.topic.kind == Tick::TYPE {
                let tick: Tick = record.decode().map_err(|e| e.to_string())?;
                self.ticks.insert(tick.stamp, tick);
            } else if record.topic.kind == ChunkTimes::TYPE {
                let chunk: ChunkTimes = record.decode().map_err(|e| e.to_string())?;
                self.chunks.insert(chunk.sequence, chunk);
            } else if record.topic.kind == JointState::TYPE {
                let state: JointState = record.decode().map_err(|e| e.to_string())?;
                self.joints.insert(state.stamp, record.time);
            }
        }
        Ok(())
    }

    /// Figures of all joint states, and of the ticks that were published while the policy was followed.
    pub fn times(&self) -> Times {
        let arrived: Vec<RosTime> = self.joints.values().copied().collect();
        let mut times = Times {
            states: arrived.windows(2).map(|w| w[1].ms_since(w[0])).collect(),
            transport: self.joints.iter().map(|(stamp, arrived)| arrived.ms_since(*stamp)).collect(),
            ..Times::default()
        };
        let mut before: Option<(u64, RosTime)> = None;
        for tick in self.ticks.values().filter(|t| t.published && t.chunk > 0 && t.plan_age.is_finite()) {
            times.ticks += 1;
            times.any_command.push(tick.plan_age);
            if before.is_some_and(|(chunk, _)| chunk == tick.chunk) {
                continue;
            }
            if let Some((_, at)) = before {
                times.adopted.push(tick.stamp.ms_since(at));
            }
            before = Some((tick.chunk, tick.stamp));
            // The tick's stamp is when it woke; publish returned so much later.
            let after = tick.times[2] - tick.times[0];
            if let Some(chunk) = self.chunks.get(&tick.chunk) {
                times.from_image.push(tick.stamp.ms_since(chunk.oldest_image) + after);
                times.from_state.push(tick.stamp.ms_since(chunk.stamp) + after);
            }
        }
        times
    }
}

/// Times in ms.
#[derive(Default)]
pub struct Times {
    /// Commands that followed the policy.
    pub ticks: usize,
    /// Between the first commands of chunks that follow one another.
    pub adopted: Vec<f64>,
    /// From the camera's stamp of the oldest image of a chunk to its first command published.
    pub from_image: Vec<f64>,
    /// From the stamp of the joint state of a chunk to its first command published.
    pub from_state: Vec<f64>,
    /// From the arrival of the newest image to any command made of it published.
    pub any_command: Vec<f64>,
    /// Between joint states that arrived.
    pub states: Vec<f64>,
    /// From the stamp of a joint state to its arrival.
    pub transport: Vec<f64>,
}

/// The value that the share `q` (0 to 1) of all does not exceed; NaN of none.
pub fn quantile(values: &[f64], q: f64) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let rank = (q * sorted.len() as f64).ceil() as usize;
    sorted.get(rank.max(1) - 1).copied().unwrap_or(f64::NAN)
}

/// The head of the lines below.
pub fn head() -> String {
    format!("  {:38} {:>7} {:>9} {:>9} {:>9} {:>9}", "", "n", "p50", "p99", "p99.9", "max")
}

/// A line of a table.
pub fn line(name: &str, values: &[f64]) -> String {
    let [p50, p99, p999, max] = [0.5, 0.99, 0.999, 1.0].map(|q| quantile(values, q));
    format!("  {name:38} {:>7} {p50:9.2} {p99:9.2} {p999:9.2} {max:9.2}", values.len())
}
