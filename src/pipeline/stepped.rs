//! The two stages by a clock that the caller moves: the same stages, with no thread and no sleep, for replay.
//!
//! A stage computes at once when it begins, and what it made is there when its time is over: what comes of a recording
//! does not depend on how fast this machine is.

use std::sync::Arc;
use std::time::Duration;

use super::stages::{Filled, GATHER, News};
use super::{PipelineConfig, PipelineError, PipelineIo, PipelineMode, PipelineReport, Stages};
use crate::clock::Monotonic;
use crate::control::chunk::ActionChunk;
use crate::engine::Engine;
use crate::error::Fault;
use crate::model::Policy;

/// How long each stage takes by the virtual clock.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StageTimes {
    /// An encode.
    pub encode: Duration,
    /// A decode.
    pub decode: Duration,
}

/// Both stages, moved by [`step`](Self::step).
pub struct SteppedPipeline<E: Engine> {
    stages: Stages<E>,
    news: News,
    /// A slot that is free for the next encode.
    free: Option<E::Cache>,
    /// Done at that time.
    encoding: Option<(Monotonic, Filled<E::Cache>)>,
    /// The newest decoded, or decoded again and again.
    held: Option<Filled<E::Cache>>,
    decoding: Option<(Monotonic, ActionChunk)>,
    /// Joint state messages at the last decode.
    decoded: u64,
}

impl<E: Engine> SteppedPipeline<E> {
    /// As [`Pipeline::start`](super::Pipeline::start), by the clock in `io`.
    pub fn new(
        engine: Arc<E>,
        policy: Arc<Policy>,
        config: PipelineConfig,
        io: PipelineIo,
        times: StageTimes,
    ) -> Result<Self, PipelineError> {
        let stages = Stages::new(engine, policy, config, io, Some(times))?;
        Ok(Self { stages, news: News::default(), free: None, encoding: None, held: None, decoding: None, decoded: 0 })
    }

    /// When something ends, or has waited long enough, after `now`, if nothing comes in before.
    pub fn due(&self, now: Monotonic) -> Option<Monotonic> {
        let gathered = self.news.first.filter(|_| self.encoding.is_none()).map(|t| t + GATHER);
        let ends = [self.encoding.as_ref().map(|e| e.0), self.decoding.as_ref().map(|d| d.0), gathered];
        ends.into_iter().flatten().filter(|t| *t > now).min()
    }

    /// Chunks decoded so far.
    pub fn chunks(&self) -> u64 {
        self.stages.shared.report(|r| r.decode.runs)
    }

    /// Figures and faults so far.
    pub fn report(&self) -> PipelineReport {
        self.stages.shared.report(|r| r.clone())
    }

    /// Why the pipeline cannot go on, if it cannot, and who has to act.
    pub fn fault(&self) -> Option<(Fault, String)> {
        self.stages.shared.report(|r| r.fault.clone())
    }

    /// Ends what is due at the clock's time and begins what can begin.
    pub fn step(&mut self) {
        let now = self.stages.shared.clock.monotonic();
        self.end(now);
        self.begin_decode();
        self.begin_encode();
    }

    fn end(&mut self, now: Monotonic) {
        let Stages { encode, decode, filled, .. } = &mut self.stages;
        decode.free_retired();
        if let Some((_, done)) = self.encoding.take_if(|(end, _)| *end <= now)
            && let Some(old) = filled.put(done)
        {
            encode.shared.report(|r| r.displaced += 1);
            let _ = encode.give_back.send(old.slot);
        }
        if let Some((_, chunk)) = self.decoding.take_if(|(end, _)| *end <= now) {
            decode.hand_over(chunk);
            self.release();
        }
    }

    /// Gives the decoded slot back, unless it will be decoded again.
    fn release(&mut self) {
        if self.stages.shared.config.mode != PipelineMode::DualRate
            && let Some(done) = self.held.take()
        {
            let _ = self.stages.encode.give_back.send(done.slot);
        }
    }

    fn begin_decode(&mut self) {
        let Stages { shared, encode, decode, filled, .. } = &mut self.stages;
        if self.decoding.is_some() {
            return;
        }
        let newer = filled.try_take();
        let is_new = newer.is_some();
        if let Some(newer) = newer
            && let Some(old) = self.held.replace(newer)
        {
            let _ = encode.give_back.send(old.slot);
        }
        let messages = shared.inputs.joints().messages;
        let Some(held) = self.held.as_ref().filter(|_| is_new || messages != self.decoded) else { return };
        self.decoded = messages;
        match decode.try_decode(held) {
            Some(chunk) => self.decoding = Some((chunk.timing.decode_end, chunk)),
            None => self.release(),
        }
    }

    fn begin_encode(&mut self) {
        let encode = &mut self.stages.encode;
        if self.encoding.is_some() {
            return;
        }
        let Some(mut slot) = self.free.take().or_else(|| encode.free.try_recv().ok()) else { return };
        let Some(views) = encode.try_observation(&mut self.news) else {
            self.free = Some(slot);
            return;
        };
        match encode.encode(&views, &mut slot) {
            Ok(prefix) => self.encoding = Some((prefix.encode_end, Filled { slot, prefix })),
            Err(e) => {
                encode.failed(&e);
                self.free = Some(slot);
            }
        }
    }
}
