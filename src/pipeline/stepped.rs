//! The two stages under a clock that the caller moves: the same observation, guidance, noise and dating of chunks, with
//! no thread and no sleep. The work is done at once; its result is handed over when the time given for it has passed.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use super::inputs::KeptFrames;
use super::mailbox::Mailbox;
use super::resplit::Seat;
use super::stages::{DecodeStage, EncodeStage, Filled, GATHER};
use super::{PipelineConfig, PipelineError, PipelineIo, PipelineMode, PipelineReport, Shared};
use crate::clock::{Clock, Monotonic, RosTime};
use crate::control::chunk::ActionChunk;
use crate::engine::{DecodeInput, Decoder, EncodeInput, Encoder, Engine, EngineError};
use crate::error::Fault;
use crate::model::Policy;

/// How long each stage takes in virtual time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StageTimes {
    /// From images and prompt to a filled cache.
    pub encode: Duration,
    /// From a filled cache to a chunk.
    pub decode: Duration,
}

/// The stages, advanced by the caller.
pub trait SteppedStages {
    /// Hands over what is finished and starts what can start, at the clock's time.
    fn advance(&mut self);
    /// When it has something to do next, after the clock's time, if nothing comes in before.
    fn due(&self) -> Option<Monotonic>;
    /// Figures and faults so far.
    fn report(&self) -> PipelineReport;
    /// Chunks so far.
    fn chunks(&self) -> u64;
    /// Why they cannot go on, if they cannot, and who has to act.
    fn fault(&self) -> Option<(Fault, String)>;
}

/// The caller's clock, and how far the stage at work is ahead of it.
struct StageClock {
    base: Arc<dyn Clock>,
    ahead_ns: AtomicI64,
}

impl StageClock {
    fn spend(&self, time: Duration) {
        self.ahead_ns.fetch_add(i64::try_from(time.as_nanos()).unwrap_or(i64::MAX), Ordering::Relaxed);
    }

    fn ahead(&self) -> Duration {
        Duration::from_nanos(self.ahead_ns.load(Ordering::Relaxed).max(0) as u64)
    }
}

impl Clock for StageClock {
    fn monotonic(&self) -> Monotonic {
        self.base.monotonic() + self.ahead()
    }

    fn ros(&self) -> RosTime {
        self.base.ros() + self.ahead()
    }
}

/// A stage's device that takes a given time by the stage's clock.
struct Timed<T> {
    inner: T,
    clock: Arc<StageClock>,
    time: Duration,
}

impl<E: Encoder> Encoder for Timed<E> {
    type Cache = E::Cache;

    fn prepare(&mut self, views: usize, tokens: usize, most: usize, idle: bool) -> Result<(), EngineError> {
        self.inner.prepare(views, tokens, most, idle)
    }

    fn encode(&mut self, input: &EncodeInput<'_>, cache: &mut E::Cache) -> Result<(), EngineError> {
        self.clock.spend(self.time);
        self.inner.encode(input, cache)
    }

    fn encode_with_embeddings(
        &mut self,
        input: &EncodeInput<'_>,
        cache: &mut E::Cache,
    ) -> Result<Vec<f32>, EngineError> {
        self.inner.encode_with_embeddings(input, cache)
    }
}

impl<D: Decoder> Decoder for Timed<D> {
    type Cache = D::Cache;

    fn decode(&mut self, cache: &D::Cache, input: &DecodeInput<'_>, actions: &mut [f32]) -> Result<(), EngineError> {
        self.clock.spend(self.time);
        self.inner.decode(cache, input, actions)
    }

    fn decode_with_velocities(
        &mut self,
        cache: &D::Cache,
        input: &DecodeInput<'_>,
        actions: &mut [f32],
    ) -> Result<Vec<f32>, EngineError> {
        self.inner.decode_with_velocities(cache, input, actions)
    }
}

/// The stages of one engine.
pub struct SteppedPipeline<E: Engine> {
    shared: Arc<Shared>,
    clock: Arc<StageClock>,
    encode: EncodeStage<Timed<E::Encoder>>,
    decode: DecodeStage<Timed<E::Decoder>>,
    free: Vec<E::Cache>,
    /// Frames encoded so far by view, the prompt they went with, and when news was first seen.
    encoded: (Vec<u64>, Option<u64>, Option<Monotonic>),
    encoding: Option<(Monotonic, Filled<E::Cache>)>,
    newest: Option<Filled<E::Cache>>,
    /// In the decoder's hands, and in dual-rate mode kept for the next joint state.
    held: Option<Filled<E::Cache>>,
    decoding: Option<(Monotonic, Option<ActionChunk>)>,
    decoded: u64,
    _kept: KeptFrames,
}

impl<E: Engine> SteppedPipeline<E> {
    /// Checks the configuration against the policy, as the running pipeline does.
    pub fn new(
        engine: &E,
        policy: Arc<Policy>,
        config: PipelineConfig,
        io: PipelineIo,
        times: StageTimes,
    ) -> Result<Self, PipelineError> {
        let (views, joints) = super::bind(&config, &policy)?;
        let clock = Arc::new(StageClock { base: io.clock, ahead_ns: AtomicI64::new(0) });
        let kept = io.inputs.keep_frames_in(engine.frame_memory());
        let (encoder, decoder) = engine.stages()?;
        let free = (0..config.mode.slots())
            .map(|_| engine.cache(views.len(), policy.dims().max_tokens))
            .collect::<Result<Vec<_>, _>>()?;
        let shared = Arc::new(Shared {
            live: Mutex::new(Arc::new(config.live.clone())),
            report: Mutex::new(PipelineReport::default()),
            stopping: AtomicBool::new(false),
            paused: AtomicBool::new(false),
            policy,
            inputs: io.inputs,
            clock: clock.clone(),
            epoch: io.epoch,
            views,
            joints,
            config,
        });
        // The threads' channels, which nothing goes through here.
        let (free_tx, free_rx) = crossbeam_channel::unbounded();
        let filled = Arc::new(Mailbox::default());
        let encode = EncodeStage {
            shared: shared.clone(),
            encoder: Seat::fixed(Timed { inner: encoder, clock: clock.clone(), time: times.encode }),
            free: free_rx,
            give_back: free_tx.clone(),
            filled: filled.clone(),
            prompt: None,
        };
        let decoder = Seat::fixed(Timed { inner: decoder, clock: clock.clone(), time: times.decode });
        let decode = DecodeStage::new(shared.clone(), decoder, free_tx, filled, io.ports, io.tap);
        Ok(Self {
            encoded: (vec![0; shared.views.len()], None, None),
            shared,
            clock,
            encode,
            decode,
            free,
            encoding: None,
            newest: None,
            held: None,
            decoding: None,
            decoded: 0,
            _kept: kept,
        })
    }

    /// Runs `work` with the stage clock at the caller's time; what it made, and when that is finished.
    fn timed<R>(&mut self, work: impl FnOnce(&mut Self) -> R) -> (Monotonic, R) {
        self.clock.ahead_ns.store(0, Ordering::Relaxed);
        let made = work(self);
        let due = self.clock.monotonic();
        self.clock.ahead_ns.store(0, Ordering::Relaxed);
        (due, made)
    }

    fn start_encode(&mut self) {
        if self.encoding.is_some() || self.free.is_empty() {
            return;
        }
        let (encoded, generation, first_news) = &mut self.encoded;
        let Some(views) = self.encode.poll_observation(encoded, generation, first_news) else { return };
        *first_news = None;
        let Some(mut slot) = self.free.pop() else { return };
        let (due, made) = self.timed(|s| s.encode.encode_once(&views, &mut slot));
        match made {
            Some(prefix) => self.encoding = Some((due, Filled::new(slot, prefix))),
            None => self.free.push(slot),
        }
    }

    fn start_decode(&mut self) {
        if self.decoding.is_some() {
            return;
        }
        let newer = self.newest.take();
        let is_new = newer.is_some();
        if let Some(newer) = newer
            && let Some(old) = self.held.replace(newer)
        {
            self.free.push(old.into_slot());
        }
        let messages = self.shared.inputs.joints().messages;
        let Some(filled) = self.held.take() else { return };
        if is_new || messages != self.decoded {
            self.decoded = messages;
            let (due, chunk) = self.timed(|s| s.decode.decode_once(&filled));
            self.decoding = Some((due, chunk));
        }
        self.held = Some(filled);
    }
}

impl<E: Engine> SteppedStages for SteppedPipeline<E> {
    fn advance(&mut self) {
        let now = self.clock.base.monotonic();
        self.decode.free_retired();
        if let Some((_, chunk)) = self.decoding.take_if(|(due, _)| *due <= now) {
            if let Some(chunk) = chunk {
                self.decode.hand_over(chunk);
            }
            if self.shared.config.mode != PipelineMode::DualRate
                && let Some(done) = self.held.take()
            {
                self.free.push(done.into_slot());
            }
        }
        if let Some((_, filled)) = self.encoding.take_if(|(due, _)| *due <= now)
            && let Some(old) = self.newest.replace(filled)
        {
            self.shared.report(|r| r.displaced += 1);
            self.free.push(old.into_slot());
        }
        self.start_decode();
        self.start_encode();
    }

    fn due(&self) -> Option<Monotonic> {
        let now = self.clock.base.monotonic();
        let gathered = self.encoded.2.filter(|_| self.encoding.is_none()).map(|t| t + GATHER);
        let ends = [self.encoding.as_ref().map(|e| e.0), self.decoding.as_ref().map(|d| d.0), gathered];
        ends.into_iter().flatten().filter(|t| *t > now).min()
    }

    fn chunks(&self) -> u64 {
        self.shared.report(|r| r.decode.runs)
    }

    fn fault(&self) -> Option<(Fault, String)> {
        self.shared.report(|r| r.fault.clone())
    }

    fn report(&self) -> PipelineReport {
        self.shared.report.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}
