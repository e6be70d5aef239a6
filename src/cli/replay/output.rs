//! What a node commanded: the digest of it, the file of it, and what another recording says of the same.

use std::collections::HashMap;
use std::fs::File;
use std::io::BufWriter;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde_json::{Map, Value as Json, json};
use sha2::{Digest, Sha256};

use super::CliError;
use super::route::{Remap, Wanted, assign};
use crate::bag::message::{ChunkTimes, JointTrajectory, Numbers};
use crate::bag::{BagReader, BagWriter, Message, Record};
use crate::clock::RosTime;
use crate::control::chunk::ActionChunk;
use crate::control::{Names, TickReport, Window};
use crate::error::Fault;
use crate::node::Outputs;
use crate::node::messages::{Messages, absolute};
use crate::params::Settings;
use crate::telemetry::{Histogram, OutFile, Stats};

/// The commands of one joint: when it was told to be where.
pub type Signal = Vec<(RosTime, f64)>;

/// Commands by joint, and latencies.
#[derive(Debug, Clone, Default)]
pub struct Tape {
    /// Joints in the parameters' order, with their commands.
    pub signals: Vec<(String, Signal)>,
    /// Of the chunks.
    pub latencies: Latencies,
}

/// Latencies of a run, in nanoseconds.
#[derive(Debug, Clone, Default)]
pub struct Latencies {
    encode: Histogram,
    queue: Histogram,
    decode: Histogram,
    chunk: Histogram,
    /// From the joint state to the chunk in the recording.
    state: Histogram,
}

fn ns(ms: f64) -> u64 {
    (ms * 1e6).max(0.0) as u64
}

impl Latencies {
    fn chunk_times(&mut self, c: &ChunkTimes) {
        let of = [&mut self.encode, &mut self.queue, &mut self.decode, &mut self.chunk];
        of.into_iter().zip(c.times).for_each(|(h, ms)| h.record(ns(ms)));
    }

    fn rows(&self) -> [(&'static str, Stats); 5] {
        [
            ("encode", self.encode.stats()),
            ("queue", self.queue.stats()),
            ("decode", self.decode.stats()),
            ("image to chunk", self.chunk.stats()),
            ("joint state to chunk", self.state.stats()),
        ]
    }

    /// p50, p99 and largest of each.
    pub fn json(&self) -> Json {
        let ms = |ns: u64| ns as f64 * 1e-6;
        let row = |s: Stats| json!({"count": s.count, "p50": ms(s.p50), "p99": ms(s.p99), "max": ms(s.max)});
        Json::Object(self.rows().map(|(name, s)| (name.replace(' ', "_"), row(s))).into_iter().collect::<Map<_, _>>())
    }

    /// Runs side by side.
    pub fn table(runs: &[(&str, &Latencies)]) -> String {
        let mut out = format!("{:<24}", "latency in ms");
        runs.iter().for_each(|(name, _)| out += &format!("{:>32}", format!("{name}: p50 / p99 / max")));
        out.push('\n');
        for i in 0..Self::default().rows().len() {
            let rows: Vec<_> = runs.iter().map(|(_, l)| l.rows()[i]).collect();
            out += &format!("  {:<22}", rows.first().map_or("", |r| r.0));
            for (_, s) in rows {
                let cell = match s.count {
                    0 => "not recorded".into(),
                    _ => [s.p50, s.p99, s.max].map(|ns| format!("{:.1}", ns as f64 * 1e-6)).join(" / "),
                };
                out += &format!("{cell:>32}");
            }
            out.push('\n');
        }
        out
    }
}

/// What a recording tells of a node.
#[derive(Debug, Clone, Copy)]
enum Told<'a> {
    /// With the joints of each message.
    Commands(&'a [String]),
    Chunk,
    ChunkTimes,
}

impl Tape {
    /// The commands in a recording: of a replay, of the flight recorder, or of `ros2 bag`.
    pub fn read(path: &Path, settings: &Settings, node: &str, remap: &Remap) -> Result<Self, CliError> {
        let messages = Messages::new(settings, node);
        let mut wanted: Vec<_> = (messages.commands())
            .map(|(topic, joints)| {
                let kinds: &[_] = if topic.kind == Numbers::TYPE { &[Numbers::TYPE] } else { &[JointTrajectory::TYPE] };
                let what = format!("commands on {}", topic.name);
                Wanted::new(Told::Commands(joints), what, topic.name.clone(), kinds)
            })
            .collect();
        // These are of a node of any name.
        let own = |told, what: &str, name: &str, kinds| Wanted {
            end: format!("/{name}"),
            ..Wanted::new(told, what, absolute(&format!("~/{name}"), node), kinds)
        };
        wanted.push(own(Told::Chunk, "chunks", "action_chunk", &[JointTrajectory::TYPE]));
        wanted.push(own(Told::ChunkTimes, "times of chunks", "chunk_times", &[ChunkTimes::TYPE]));
        let found = assign(&BagReader::contents(path)?, &wanted, remap)
            .map_err(|e| CliError::input(format!("{}: {e}", path.display())))?;

        let joints: Vec<String> = settings.joints.iter().map(|j| j.name.clone()).collect();
        let mut tape = Self { signals: joints.iter().map(|j| (j.clone(), Signal::new())).collect(), ..Self::default() };
        let place: HashMap<&str, usize> = joints.iter().map(String::as_str).zip(0..).collect();
        let period = settings.timing.period().as_secs_f64();
        let mut reader = BagReader::open(path)?;
        for record in reader.by_ref() {
            let record = record?;
            match found.get(&record.topic) {
                None => {}
                Some(Told::ChunkTimes) => tape.latencies.chunk_times(&record.decode()?),
                Some(Told::Chunk) => {
                    let chunk: JointTrajectory = record.decode()?;
                    tape.latencies.state.record(ns(record.time.ms_since(chunk.stamp)));
                }
                Some(Told::Commands(names)) => {
                    for (name, at, position) in command(&record, names, period)? {
                        if let Some(i) = place.get(name.as_str()) {
                            tape.signals[*i].1.push((at, position));
                        }
                    }
                }
            }
        }
        tape.signals.iter_mut().for_each(|(_, s)| s.sort_by_key(|(at, _)| *at));
        if tape.signals.iter().all(|(_, s)| s.is_empty()) {
            let wanted: Vec<_> = messages.commands().map(|(t, _)| t.name.clone()).collect();
            let has: Vec<_> = reader.topics().keys().cloned().collect();
            return Err(CliError::input(format!(
                "{}: no commands on {}; it has {}",
                path.display(),
                wanted.join(", "),
                has.join(", ")
            )));
        }
        Ok(tape)
    }
}

/// The first point of a command: what each joint is told next, and when.
fn command(record: &Record, names: &[String], period: f64) -> Result<Vec<(String, RosTime, f64)>, CliError> {
    if record.topic.kind == Numbers::TYPE {
        let Numbers(values) = record.decode()?;
        let at = record.time.plus_seconds(period);
        return Ok(names.iter().zip(values).map(|(n, q)| (n.clone(), at, q)).collect());
    }
    let t: JointTrajectory = record.decode()?;
    let Some(first) = t.points.first() else { return Ok(Vec::new()) };
    // A trajectory without a stamp begins when it comes.
    let from = if t.stamp.0 == 0 { record.time } else { t.stamp };
    let at = RosTime(from.0.saturating_add(first.at));
    Ok(t.names.into_iter().zip(&first.positions).map(|(n, q)| (n, at, *q)).collect())
}

/// Takes what a replayed node says.
#[derive(Clone)]
pub struct Collector(Arc<Mutex<Collected>>);

struct Collected {
    messages: Arc<Messages>,
    now: RosTime,
    digest: Sha256,
    tape: Tape,
    file: Option<(PathBuf, OutFile, BagWriter<BufWriter<File>>)>,
    failure: Option<std::io::Error>,
}

impl Collector {
    /// A collector that also writes to `out`, if given.
    pub fn new(
        messages: Arc<Messages>,
        settings: &Settings,
        begin: RosTime,
        out: Option<&Path>,
    ) -> Result<Self, CliError> {
        let file = out
            .map(|path| {
                let bag = OutFile::create(path).and_then(|out| {
                    let bag = BagWriter::new(BufWriter::new(out.writer()?), &[("tool", "pi0 replay".into())])?;
                    Ok((path.to_owned(), out, bag))
                });
                bag.map_err(|e| unwritable(path, &e))
            })
            .transpose()?;
        let signals = settings.joints.iter().map(|j| (j.name.clone(), Signal::new())).collect();
        let tape = Tape { signals, ..Tape::default() };
        let collected = Collected { messages, now: begin, digest: Sha256::new(), tape, file, failure: None };
        Ok(Self(Arc::new(Mutex::new(collected))))
    }

    fn lock(&self) -> MutexGuard<'_, Collected> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A tick at `at`: what it says, for people. Comes before its window.
    pub fn tick(&self, at: RosTime, report: &TickReport, names: &Names) -> Vec<String> {
        let mut to = self.lock();
        to.now = at;
        let (records, texts) = to.messages.events(at, report, None, names);
        records.iter().for_each(|r| to.write(r));
        texts
    }

    /// SHA-256 over every published window, in order: ROS time of its start, its points with their times, positions
    /// and velocities, all little-endian.
    pub fn digest(&self) -> String {
        self.lock().digest.clone().finalize().iter().map(|b| format!("{b:02x}")).collect()
    }

    /// The commands.
    pub fn tape(&self) -> Tape {
        self.lock().tape.clone()
    }

    /// Ends the file and puts it into its place.
    pub fn finish(&self) -> Result<(), CliError> {
        let mut to = self.lock();
        let Some((path, out, bag)) = to.file.take() else { return Ok(()) };
        let written = to.failure.take().map_or(Ok(()), Err).and_then(|()| {
            bag.finish()?.into_inner().map_err(std::io::IntoInnerError::into_error)?;
            out.finish()
        });
        written.map_err(|e| unwritable(&path, &e))
    }
}

fn unwritable(path: &Path, e: &std::io::Error) -> CliError {
    CliError { fault: Fault::Machine, message: format!("{}: {e}; choose another --out", path.display()) }
}

impl Collected {
    fn write(&mut self, record: &Record) {
        if let (Some((.., bag)), None) = (&mut self.file, &self.failure) {
            self.failure = bag.write(record).err();
        }
    }
}

impl Outputs for Collector {
    fn trajectory(&mut self, w: &Window) {
        let mut to = self.lock();
        to.digest.update(w.start().0.to_le_bytes());
        to.digest.update((w.points() as u64).to_le_bytes());
        for i in 0..w.points() {
            to.digest.update((w.time_from_start(i).as_nanos() as u64).to_le_bytes());
            for x in w.positions(i).iter().chain(w.velocities(i)) {
                to.digest.update(x.to_le_bytes());
            }
        }
        if w.points() > 0 {
            let at = RosTime(w.start().0 + w.time_from_start(0).as_nanos() as i64);
            for ((_, signal), q) in to.tape.signals.iter_mut().zip(w.positions(0)) {
                signal.push((at, *q));
            }
        }
        let (messages, now) = (to.messages.clone(), to.now);
        messages.window(now, w).for_each(|r| to.write(&r));
    }

    fn chunk(&mut self, chunk: &ActionChunk) {
        let mut to = self.lock();
        let [trajectory, times] = to.messages.chunk(to.now, chunk);
        if let Ok(times) = times.decode::<ChunkTimes>() {
            to.tape.latencies.chunk_times(&times);
        }
        let late = ns(to.now.ms_since(chunk.state_stamp));
        to.tape.latencies.state.record(late);
        to.write(&trajectory);
        to.write(&times);
    }
}
