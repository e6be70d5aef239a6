//! What algorithms are timed on.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::super::device::{Buffer, Device, Pinned, Span};
use super::super::kernels::{DifferArgs, RandomArgs, Shape, TrafficArgs};
use super::super::lane::Lane;
use super::super::plan;
use super::super::stream::{Event, Stream};
use super::{Key, Operands};
use crate::engine::EngineError;

/// Weights are read from this much memory in turn while candidates are timed, or more: more than any L2.
pub(in super::super) const COLD_BYTES: usize = 192 << 20;

/// Numbers that one block draws while the timed runs are queued: about 0.1 ms.
const HELD: usize = 1 << 18;

/// The traffic on the other share ends by itself after this time, in ns.
const TRAFFIC_NS: i64 = 50_000_000;
/// Its blocks are waited for this long: where fewer find room than the driver promised, or another process holds SMs, it is timed
/// beside those that run.
const TRAFFIC_BEGINS: Duration = Duration::from_millis(5);

/// Memory of the stage on which candidates may be timed, while nothing else uses it.
pub(in super::super) struct Scratch<'a> {
    /// Only read.
    pub weights: Span<'a>,
    /// Overwritten.
    pub rows: Span<'a>,
    /// Overwritten.
    pub out: Span<'a>,
}

/// Memory of the scratch, or of its own where that is too little.
struct Piece {
    at: u64,
    bytes: usize,
    own: Option<Buffer<u8>>,
}

impl Piece {
    fn new(device: &Arc<Device>, lent: Span<'_>, needed: usize) -> Result<Self, EngineError> {
        if lent.bytes >= needed {
            return Ok(Self { at: lent.at, bytes: lent.bytes, own: None });
        }
        let own = Buffer::zeroed(device, needed)?;
        Ok(Self { at: own.pointer(), bytes: needed, own: Some(own) })
    }
}

/// Of a product's result.
fn out_bytes(key: &Key) -> usize {
    key.epilogue.parts() * key.rows * key.outputs * if key.epilogue.wide() { 4 } else { 2 }
}

/// What candidates are timed on; it goes before the scratch does.
pub(super) struct Bench {
    /// Goes first: it reads the weights.
    traffic: Option<Traffic>,
    /// Times taken while all of it ran.
    beside: usize,
    lane: Arc<Lane>,
    weights: Piece,
    /// Bytes of the weights read since they were last begun.
    read: usize,
    rows: Piece,
    /// Room for two results.
    out: Piece,
    /// Whether the last two results differed.
    differ: Pinned<u8>,
    events: [Event; 2],
}

impl Bench {
    /// With weights of `cold` bytes at least, and traffic on the SMs of `other`.
    pub fn new(
        lane: &Arc<Lane>,
        other: Option<&Arc<Lane>>,
        stream: &Stream,
        keys: &[Key],
        scratch: &Scratch<'_>,
        cold: usize,
    ) -> Result<Self, EngineError> {
        let device = lane.device();
        let most = |f: fn(&Key) -> usize| keys.iter().map(f).max().unwrap_or(0);
        let bench = Self {
            traffic: other.map(Traffic::new).transpose()?,
            beside: 0,
            lane: Arc::clone(lane),
            weights: Piece::new(device, scratch.weights, cold.max(most(|k| k.outputs * k.k * 2)))?,
            read: 0,
            rows: Piece::new(device, scratch.rows, HELD.max(most(|k| k.rows * k.k)) * 2)?,
            out: Piece::new(device, scratch.out, 2 * most(out_bytes))?,
            differ: Pinned::zeroed(device, size_of::<u32>())?,
            events: [Event::new(lane)?, Event::new(lane)?],
        };
        // Zeros would draw less power than real numbers.
        if let Some(own) = &bench.weights.own {
            bench.draw(stream, own.pointer(), own.len() / 2, 1024)?;
        }
        bench.draw(stream, bench.rows.at, bench.rows.bytes / 2, 1024)?;
        bench.draw(stream, bench.out.at, bench.out.bytes / 2, 1024)?;
        Ok(bench)
    }

    /// Queues drawing `count` bf16 numbers, the same every time.
    fn draw(&self, stream: &Stream, to: u64, count: usize, blocks: usize) -> Result<(), EngineError> {
        let args = RandomArgs { to, count: count as i64, seed: 1, deviation: 1.0, to_f32: 0 };
        let shape = Shape { dependent: false, ..Shape::blocks(blocks, 256) };
        self.lane.kernels().random.launch(stream, shape, &args)
    }

    /// What is queued from now on is timed, beside the traffic if there is one and `beside` says so.
    pub fn begin(&mut self, stream: &Stream, beside: bool) -> Result<(), EngineError> {
        if let Some(traffic) = self.traffic.as_mut().filter(|_| beside) {
            self.beside += usize::from(traffic.begin(&self.weights)?);
        }
        // Keeps the share busy while the runs are queued: draws the first of the rows' numbers once more.
        self.draw(stream, self.rows.at, HELD, 1)?;
        stream.record(&self.events[0])
    }

    /// Waits for it; how long it took, in ms.
    pub fn end(&mut self, stream: &Stream) -> Result<f32, EngineError> {
        stream.record(&self.events[1])?;
        if let Some(traffic) = &self.traffic {
            stream.fill(&traffic.stop, 1)?;
        }
        stream.synchronize()?;
        if let Some(traffic) = &self.traffic {
            traffic.wait()?;
        }
        self.events[1].ms_since(&self.events[0])
    }

    /// Operands of the next run. Its weights lie behind those of the run before, so that they come back only after all
    /// others, when L2 has them no more.
    pub fn operands(&mut self, key: Key) -> Operands {
        let bytes = (key.outputs * key.k * 2).next_multiple_of(256);
        if self.read + bytes > self.weights.bytes {
            self.read = 0;
        }
        let w = self.weights.at + self.read as u64;
        self.read += bytes;
        Operands { w, x: self.rows.at, bias: self.out.at, c: self.out.at, d: self.out.at }
    }

    /// Whether the other stage's share is kept busy.
    pub fn busy(&self) -> bool {
        self.traffic.is_some()
    }

    /// How many times were taken while every block of the traffic ran.
    pub fn beside(&self) -> usize {
        self.beside
    }

    /// A bias that no result overwrites.
    pub fn bias(&self) -> u64 {
        self.rows.at
    }

    /// Where a result can be kept beside the one that [`operands`](Self::operands) names.
    pub fn second(&self, key: Key) -> u64 {
        self.out.at + out_bytes(&key) as u64
    }

    /// Whether both are the same.
    pub fn same(&mut self, stream: &Stream, key: Key) -> Result<bool, EngineError> {
        self.differ.as_mut_slice().fill(0);
        let (a, b, differ) = (self.out.at, self.second(key), self.differ.as_ptr() as u64);
        let args = DifferArgs { a, b, differ, count: (out_bytes(&key) / 4) as i64 };
        self.lane.kernels().differ.launch(stream, Shape { dependent: false, ..Shape::blocks(256, 256) }, &args)?;
        stream.synchronize()?;
        Ok(self.differ.as_slice().iter().all(|d| *d == 0))
    }
}

/// A kernel that reads memory on another stage's share, in blocks that lie on its SMs as the decoder's do: on Hopper in the same
/// clusters and with as much shared memory.
struct Traffic {
    lane: Arc<Lane>,
    stream: Stream,
    shape: Shape,
    /// Whether it should stop.
    stop: Buffer<u8>,
    /// Whether each block has begun.
    began: Pinned<u8>,
}

impl Traffic {
    fn new(lane: &Arc<Lane>) -> Result<Self, EngineError> {
        let _current = lane.enter()?;
        let (stream, kernels) = (Stream::new(lane)?, lane.kernels());
        let shared = plan::traffic_shared(kernels.hopper().is_some()) as u32;
        let mut shape = Shape { shared, dependent: false, ..Shape::blocks(lane.sms(), 256) };
        if kernels.hopper().is_some() {
            let ranks = plan::RANKS;
            let cluster = Shape { cluster: ranks as u32, ..shape };
            let one = Shape { grid: [ranks as u32, 1, 1], ..cluster };
            let clusters = kernels.traffic.clusters_at_once(&stream, one)?.min(lane.sms() / ranks);
            shape = Shape { grid: [(clusters.max(1) * ranks) as u32, 1, 1], ..cluster };
        }
        let (stop, began) = (Buffer::zeroed(lane.device(), 1)?, Pinned::zeroed(lane.device(), shape.grid[0] as usize)?);
        Ok(Self { lane: Arc::clone(lane), stream, shape, stop, began })
    }

    /// Returns when every block runs, or after [`TRAFFIC_BEGINS`]; whether every block runs.
    fn begin(&mut self, weights: &Piece) -> Result<bool, EngineError> {
        let _current = self.lane.enter()?;
        self.stream.fill(&self.stop, 0)?;
        let began = self.began.as_mut_slice();
        began.fill(0);
        let began = began.as_ptr();
        let args = TrafficArgs {
            from: weights.at,
            count: (weights.bytes / 16) as i64,
            stop: self.stop.pointer(),
            began: began as u64,
            most_ns: TRAFFIC_NS,
            never: self.stop.pointer(),
        };
        self.lane.kernels().traffic.launch(&self.stream, self.shape, &args)?;
        let deadline = Instant::now() + TRAFFIC_BEGINS;
        // SAFETY: a live allocation of so many bytes, which the device writes meanwhile.
        let runs = |block| unsafe { began.add(block).read_volatile() } != 0;
        let all_run = || (0..self.began.len()).all(runs);
        while !all_run() && Instant::now() < deadline {
            std::hint::spin_loop();
        }
        Ok(all_run())
    }

    fn wait(&self) -> Result<(), EngineError> {
        let _current = self.lane.enter()?;
        self.stream.synchronize()
    }
}

impl Drop for Traffic {
    fn drop(&mut self) {
        // Where timing failed halfway: what it reads may go.
        let _ = self.wait();
    }
}
