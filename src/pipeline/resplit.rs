//! Other shares for running stages, make before break: a builder thread makes the new pair of stages beside the running
//! ones and warms it up; each stage thread takes its successor between two frames and sends back what it had.
//!
//! Pairs that have been used stay on a shelf, so that going back to one costs nothing. Equal grants are the same pair.

use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender};

use super::mailbox::Mailbox;
use super::report::Resplit;
use super::{PipelineError, Shared, stages};
use crate::clock::Monotonic;
use crate::engine::Engine;
use crate::engine::partition::{Backend, Decision, Grant, Kind, Offer, Refusal, Split};
use crate::telemetry::trace::{self, What};

/// Pairs kept beside the running one; the one not used for longest goes first.
const SHELF: usize = 4;
/// Splits that are ready from the start, in percent of the encoder: those of the benchmark.
const POOL: [u8; 3] = [50, 70, 30];
/// The builder looks this often whether it should end.
const WAIT: Duration = Duration::from_millis(100);

/// A stage and the grant it was built for.
pub(super) struct Seated<S> {
    pub grant: Grant,
    pub stage: S,
}

/// The place of a stage in its thread.
pub(super) struct Seat<S> {
    pub now: Seated<S>,
    next: Arc<Mailbox<Seated<S>>>,
    back: Box<dyn Fn(Seated<S>) + Send>,
}

impl<S> Seat<S> {
    /// A place that nobody else ever takes.
    pub fn fixed(stage: S) -> Self {
        let now = Seated { grant: Grant::whole(0), stage };
        Self { now, next: Arc::default(), back: Box::new(|_| ()) }
    }

    /// Between two frames: the successor takes over, if one waits.
    pub fn relieve(&mut self) {
        if let Some(next) = self.next.try_take() {
            (self.back)(std::mem::replace(&mut self.now, next));
        }
    }
}

/// What the builder hears.
pub(super) enum Message<E, D> {
    /// Another grant, asked for at that moment.
    Ask(Decision, Instant),
    /// What a stage thread had before.
    Encoder(Seated<E>),
    Decoder(Seated<D>),
    Stop,
}

/// Both stages of one grant; a half that is missing is in its thread or on its way.
struct Pair<E, D> {
    grant: Grant,
    encoder: Option<E>,
    decoder: Option<D>,
    warm: Warm,
}

/// What stages were warmed up with, or have worked with: prompt, steps, and whether views may be fewer. With others they
/// would be slower at first, or for a longer prompt all the time.
type Warm = (u64, usize, bool);

/// A re-split under way.
struct Pending {
    decision: Decision,
    asked: Instant,
    build: Duration,
    cached: bool,
}

type Sending<E> = Sender<Message<<E as Engine>::Encoder, <E as Engine>::Decoder>>;
type Receiving<E> = Receiver<Message<<E as Engine>::Encoder, <E as Engine>::Decoder>>;

/// Makes pairs and hands them over; the body of the builder thread.
pub(super) struct Builder<E: Engine> {
    engine: Arc<E>,
    shared: Arc<Shared>,
    /// For warming up: no stage ever sees it.
    slot: E::Cache,
    messages: Receiving<E>,
    next_encoder: Arc<Mailbox<Seated<E::Encoder>>>,
    next_decoder: Arc<Mailbox<Seated<E::Decoder>>>,
    /// What each stage thread has, as far as is known.
    at: [Grant; 2],
    /// Least recently used first.
    shelf: Vec<Pair<E::Encoder, E::Decoder>>,
    /// Asked for and not begun.
    wanted: Option<(Decision, Instant)>,
    /// Begun and not in force.
    pending: Option<Pending>,
}

/// What each stage gets of `offer`, or why not; without an offer there is nothing to divide.
pub(super) fn decide(offer: Option<&Offer>, takes_turns: bool, split: Split) -> Result<Decision, Refusal> {
    match offer {
        None => Ok(Decision { grant: Grant::whole(0), reason: "not applicable: this device has no shares".into() }),
        Some(offer) if takes_turns => Ok(offer.whole()),
        Some(offer) => offer.decide(split),
    }
}

impl<E: Engine> Builder<E> {
    /// The pair of `grant` in their seats, and the builder that can replace them.
    #[allow(clippy::type_complexity)] // two seats and who fills them
    pub fn start(
        engine: Arc<E>,
        shared: Arc<Shared>,
        mut slot: E::Cache,
        grant: Grant,
    ) -> Result<(Seat<E::Encoder>, Seat<E::Decoder>, Self, Sending<E>), PipelineError> {
        let (encoder, decoder) = build(&*engine, &shared, &mut slot, grant, true)?;
        let (send, messages) = crossbeam_channel::unbounded();
        let (next_encoder, next_decoder) = (Arc::new(Mailbox::default()), Arc::new(Mailbox::default()));
        // Where the builder is gone, what comes back is dropped here.
        let (to_builder, also) = (send.clone(), send.clone());
        let encoder = Seat {
            now: Seated { grant, stage: encoder },
            next: Arc::clone(&next_encoder),
            back: Box::new(move |s| _ = to_builder.send(Message::Encoder(s))),
        };
        let decoder = Seat {
            now: Seated { grant, stage: decoder },
            next: Arc::clone(&next_decoder),
            back: Box::new(move |s| _ = also.send(Message::Decoder(s))),
        };
        let mut builder = Self {
            engine,
            shared,
            slot,
            messages,
            next_encoder,
            next_decoder,
            at: [grant; 2],
            shelf: Vec::new(),
            wanted: None,
            pending: None,
        };
        builder.fill_pool(grant);
        Ok((encoder, decoder, builder, send))
    }

    /// Makes the common splits of the running backend. One that cannot be had is left out.
    fn fill_pool(&mut self, running: Grant) {
        let backend = match running.kind {
            Kind::Mps => Backend::Mps,
            Kind::Green => Backend::Green,
            // All shares are the same there.
            Kind::Whole | Kind::Shared => return,
        };
        for percent in POOL {
            let split = Split { backend, encoder: percent, decoder: 100 - percent };
            let Some(Ok(Decision { grant, .. })) = self.engine.offer().map(|o| o.decide(split)) else { continue };
            if grant == running || self.shelf.iter().any(|p| p.grant == grant) {
                continue;
            }
            match build(&*self.engine, &self.shared, &mut self.slot, grant, true) {
                Ok((e, d)) => {
                    self.shelf.push(Pair { grant, encoder: Some(e), decoder: Some(d), warm: self.warm() });
                }
                Err(e) => tracing::warn!("the split {grant} is not kept ready: {e}"),
            }
        }
    }

    /// Serves requests until told to stop.
    pub fn run(mut self) {
        while !self.shared.stopping() {
            match self.messages.recv_timeout(WAIT) {
                Ok(Message::Stop) => break,
                // The newest wish counts.
                Ok(Message::Ask(decision, asked)) => self.wanted = Some((decision, asked)),
                Ok(Message::Encoder(s)) => self.came_back(s.grant, 0, |pair| pair.encoder = Some(s.stage)),
                Ok(Message::Decoder(s)) => self.came_back(s.grant, 1, |pair| pair.decoder = Some(s.stage)),
                Err(_) => {}
            }
            // One at a time: between two re-splits every pair is whole.
            if self.pending.is_none()
                && let Some((decision, asked)) = self.wanted.take()
                && let Err(e) = self.begin(decision, asked)
            {
                tracing::error!("re-split: {e}; the shares stay as they are");
                self.shared.report(|r| r.last_error = Some(format!("re-split: {e}")));
            }
        }
    }

    /// A stage thread has taken what was staged and sent what it had.
    fn came_back(&mut self, grant: Grant, stage: usize, put: impl FnOnce(&mut Pair<E::Encoder, E::Decoder>)) {
        let at = self.shelf.iter().position(|p| p.grant == grant).unwrap_or_else(|| {
            self.shelf.push(Pair { grant, encoder: None, decoder: None, warm: Warm::default() });
            self.shelf.len() - 1
        });
        put(&mut self.shelf[at]);
        self.shelf[at].warm = self.warm();
        if let Some(p) = &self.pending {
            self.at[stage] = p.decision.grant;
        }
        self.settle();
    }

    /// Stages the pair of another grant, built if need be.
    fn begin(&mut self, decision: Decision, asked: Instant) -> Result<(), PipelineError> {
        let grant = decision.grant;
        if self.at == [grant; 2] {
            self.shared.report(|r| r.partition = decision.to_string());
            return Ok(());
        }
        let start = Instant::now();
        let warm = self.warm();
        let (cached, pair) = match self.shelf.iter().position(|p| p.grant == grant) {
            Some(at) => {
                let mut pair = self.shelf.remove(at);
                if let Pair { encoder: Some(encoder), decoder: Some(decoder), warm: was, .. } = &mut pair
                    && *was != warm
                {
                    stages::warm_up(&self.shared, encoder, decoder, &mut self.slot, false)?;
                }
                (true, pair)
            }
            None => {
                let (e, d) = build(&*self.engine, &self.shared, &mut self.slot, grant, false)?;
                (false, Pair { grant, encoder: Some(e), decoder: Some(d), warm })
            }
        };
        let Pair { encoder: Some(encoder), decoder: Some(decoder), .. } = pair else { return Ok(()) };
        let build = start.elapsed();
        let now = self.shared.clock.monotonic();
        trace::span(What::Build, self.shared.report(|r| r.resplits) + 1, before(now, build), now);
        self.pending = Some(Pending { decision, asked, build, cached });
        // Which of them swaps first does not matter: for the length of a frame shares may overlap.
        self.next_encoder.put(Seated { grant, stage: encoder });
        self.next_decoder.put(Seated { grant, stage: decoder });
        self.shared.inputs.wake();
        Ok(())
    }

    fn warm(&self) -> Warm {
        let live = self.shared.live();
        (self.shared.inputs.prompt().generation, live.steps, live.drop_lost_views)
    }

    /// Both threads have swapped: says so, and lets go of what has not been used for longest.
    fn settle(&mut self) {
        let Some(p) = self.pending.take_if(|p| self.at == [p.decision.grant; 2]) else { return };
        let swap = p.asked.elapsed();
        let text = p.decision.to_string();
        let how = if p.cached { "kept ready" } else { "built" };
        tracing::info!("re-split to {text}: {how} in {:.1} ms, in force after {:.1} ms", ms(p.build), ms(swap));
        let done = Resplit { build_ms: ms(p.build), total_ms: ms(swap), cached: p.cached };
        let now = self.shared.clock.monotonic();
        let number = self.shared.report(|r| r.resplits) + 1;
        trace::span(What::Resplit, number, before(now, swap), now);
        self.shared.report(|r| {
            r.partition = text;
            r.resplits += 1;
            r.last_resplit = Some(done);
        });
        while self.shelf.len() > SHELF {
            self.shelf.remove(0);
        }
    }
}

/// A warm pair of that grant. `idle`: no other stage works on the device.
fn build<E: Engine>(
    engine: &E,
    shared: &Shared,
    slot: &mut E::Cache,
    grant: Grant,
    idle: bool,
) -> Result<(E::Encoder, E::Decoder), PipelineError> {
    let (mut encoder, mut decoder) = engine.stages_on(grant)?;
    stages::warm_up(shared, &mut encoder, &mut decoder, slot, idle)?;
    Ok((encoder, decoder))
}

fn before(now: Monotonic, t: Duration) -> Monotonic {
    Monotonic(now.0.saturating_sub(i64::try_from(t.as_nanos()).unwrap_or(i64::MAX)))
}

fn ms(t: Duration) -> f64 {
    t.as_secs_f64() * 1e3
}
