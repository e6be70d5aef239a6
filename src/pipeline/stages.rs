//! The bodies of the two stage threads.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crossbeam_channel::{Receiver, Sender};

use super::inputs::{CameraSample, JointSample, believed};
use super::leftover::{Grid, History, PastChunk, leftover};
use super::mailbox::Mailbox;
use super::noise::NoiseSource;
use super::resplit::Seat;
use super::{CameraBinding, PipelineConfig, PipelineError, PipelineMode, Ports, Retired, Shared};
use crate::clock::{Monotonic, RosTime};
use crate::control::MAX_JOINTS;
use crate::control::chunk::{ActionChunk, ChunkTiming};
use crate::engine::{DecodeInput, Decoder, EncodeInput, Encoder, EngineError, Guidance, KvCache, View};
use crate::error::Blame;
use crate::model::{Dims, Family, ModelError};
use crate::telemetry::trace::{self, What};

/// A stage that waits looks this often whether it should end.
const WAIT: Duration = Duration::from_millis(100);

/// Frames of one observation that arrive within this time are encoded together.
pub(super) const GATHER: Duration = Duration::from_millis(30);

/// A filled cache slot on its way to the decoder.
pub(super) struct Filled<C> {
    slot: C,
    prefix: Prefix,
}

impl<C> Filled<C> {
    pub fn new(slot: C, prefix: Prefix) -> Self {
        Self { slot, prefix }
    }

    pub fn into_slot(self) -> C {
        self.slot
    }
}

/// What a slot was filled from.
#[derive(Debug, Clone)]
pub(super) struct Prefix {
    prompt_generation: u64,
    oldest_image: RosTime,
    newest_arrival: Monotonic,
    encode_start: Monotonic,
    encode_end: Monotonic,
    /// The joint state that went into the prompt (π0.5 only).
    state: Option<StateSample>,
}

/// A joint state fit to decode from.
#[derive(Debug, Clone)]
struct StateSample {
    stamp: RosTime,
    /// The policy's order and units.
    policy: Vec<f64>,
}

/// Nanoseconds between two moments, for a histogram.
fn ns(from: Monotonic, to: Monotonic) -> u64 {
    u64::try_from(to.0.saturating_sub(from.0)).unwrap_or(0)
}

/// Input slots of the cameras in the model's order; a policy camera without a robot camera is a masked view.
pub(super) fn order_views(cameras: &[CameraBinding], keys: &[String]) -> Result<Vec<usize>, PipelineError> {
    for camera in cameras {
        if !keys.contains(&camera.model_key) {
            return Err(PipelineError::Config(format!(
                "cameras.{}.model_key '{}' is no image of this policy: use one of {}",
                camera.name,
                camera.model_key,
                keys.join(", ")
            )));
        }
        if let Some(twin) = cameras.iter().find(|c| c.model_key == camera.model_key && c.name != camera.name) {
            return Err(PipelineError::Config(format!(
                "cameras.{} and cameras.{} both have model_key '{}': give each camera its own",
                camera.name, twin.name, camera.model_key
            )));
        }
    }
    let views: Vec<_> = keys.iter().filter_map(|k| cameras.iter().position(|c| &c.model_key == k)).collect();
    if views.is_empty() {
        return Err(PipelineError::Config("camera_names is empty: the policy needs at least one camera".into()));
    }
    Ok(views)
}

/// Refuses what the model cannot do.
pub(super) fn check_mode(config: &PipelineConfig, dims: &Dims) -> Result<(), PipelineError> {
    if config.mode == PipelineMode::DualRate && dims.family == Family::Pi05 {
        return Err(PipelineError::Config(
            "pipeline_mode 'dual_rate' needs the joint state in the suffix, but π0.5 has it in the prompt: use 'pipelined'"
                .into(),
        ));
    }
    let replan = config.live.replan_steps;
    if replan == 0 || replan > dims.horizon {
        return Err(PipelineError::Config(format!(
            "replan_steps is {replan}, but a chunk has {0} actions: use 1 to {0}",
            dims.horizon
        )));
    }
    if config.joint_names.len() > MAX_JOINTS {
        return Err(PipelineError::Config(format!(
            "joint_names has {} joints: at most {MAX_JOINTS} are supported",
            config.joint_names.len()
        )));
    }
    Ok(())
}

/// Runs both stages once, so that the first real chunk is as fast as the others: on the newest frames, or grey images
/// where there are none yet, and a zero state. Where cameras may be left out, of fewer views too. `idle`: no other stage works
/// on the device.
pub(super) fn warm_up<E: Encoder, D: Decoder<Cache = E::Cache>>(
    shared: &Shared,
    encoder: &mut E,
    decoder: &mut D,
    slot: &mut E::Cache,
    idle: bool,
) -> Result<(), PipelineError> {
    let dims = *shared.policy.dims();
    let grey = vec![0.0; 3 * dims.vision.image * dims.vision.image];
    let newest: Vec<_> = shared.views.iter().map(|&camera| shared.inputs.frame(camera)).collect();
    let views: Vec<_> =
        newest.iter().map(|s| s.as_ref().map_or(View::Planes(&grey), |s| View::Frame(&s.frame))).collect();
    let tokens = shared.policy.tokens(&shared.inputs.prompt().text, &vec![0.0; shared.policy.state_len()])?;
    let fewest = if shared.live().drop_lost_views { 1 } else { views.len() };
    // All of them first, for room that grows later forgets what was prepared in it; and last, to decode from.
    let all = views.len();
    for count in std::iter::once(all).chain(fewest..all).chain((fewest < all).then_some(all)) {
        encoder.prepare(count, tokens.len(), dims.max_tokens, idle)?;
        encoder.encode(&EncodeInput { views: &views[..count], tokens: &tokens }, slot)?;
    }
    let len = dims.horizon * dims.action_dim;
    let (state, noise, mut actions) = (vec![0.0; dims.state_dim], vec![0.0; len], vec![0.0; len]);
    let input = DecodeInput { state: &state, noise: &noise, steps: shared.live().steps, guidance: None };
    decoder.decode(slot, &input, &mut actions)?;
    Ok(())
}

/// The newest joint state in the policy's terms, or why there is none.
fn state_sample(shared: &Shared, joints: &JointSample) -> Result<StateSample, String> {
    let (ros_now, now) = (shared.clock.ros(), shared.clock.monotonic());
    let (n, max_age) = (shared.joints.len(), shared.live().max_joint_state_age_ms);
    for (i, name) in shared.config.joint_names.iter().enumerate() {
        if !joints.positions[i].is_finite() {
            return Err(if joints.seen(i) {
                format!("joint '{name}' has position {}", joints.positions[i])
            } else {
                format!("joint '{name}' has not been seen on joint_states")
            });
        }
        let age = joints.age_ms(i, ros_now, now);
        if age > max_age {
            return Err(format!("joint '{name}' is {age:.0} ms old"));
        }
    }
    let mut policy = vec![0.0; n];
    shared.joints.to_policy(&joints.positions[..n], &mut policy);
    Ok(StateSample { stamp: joints.oldest_stamp(n, ros_now), policy })
}

/// The encoder thread.
pub(super) struct EncodeStage<E: Encoder> {
    pub shared: Arc<Shared>,
    pub encoder: Seat<E>,
    pub free: Receiver<E::Cache>,
    pub give_back: Sender<E::Cache>,
    pub filled: Arc<Mailbox<Filled<E::Cache>>>,
    /// Tokens of the prompt of that generation, where they depend on nothing else.
    pub prompt: Option<(u64, Vec<u32>)>,
}

impl<E: Encoder> EncodeStage<E> {
    /// Encodes every new observation into a free slot until the pipeline stops.
    pub fn run(mut self) {
        let mut encoded = vec![0; self.shared.views.len()];
        let mut generation = None;
        while !self.shared.stopping() {
            let Ok(mut slot) = self.free.recv_timeout(WAIT) else { continue };
            let Some(views) = self.next_observation(&mut encoded, &mut generation) else { break };
            self.encoder.relieve();
            // The canary of debug builds: whoever still reads this slot gets NaN, and the decoder notices.
            if cfg!(debug_assertions)
                && let Err(e) = slot.poison()
            {
                tracing::error!("poisoning a cache slot: {e}");
            }
            match self.encode_once(&views, &mut slot) {
                Some(prefix) => {
                    if let Some(old) = self.filled.put(Filled { slot, prefix }) {
                        self.shared.report(|r| r.displaced += 1);
                        let _ = self.give_back.send(old.slot);
                    }
                }
                None => {
                    let _ = self.give_back.send(slot);
                }
            }
        }
    }

    /// Fills the slot, or reports why not.
    pub fn encode_once(&mut self, views: &[CameraSample], slot: &mut E::Cache) -> Option<Prefix> {
        self.encode(views, slot)
            .inspect_err(|e| {
                tracing::error!("encode: {e}");
                self.shared.report(|r| {
                    r.encode.errors += 1;
                    r.last_error = Some(format!("encode: {e}"));
                    r.fault = r.fault.take().or(e.is_fatal().then(|| (e.fault(), e.to_string())));
                });
            })
            .ok()
    }

    /// Waits until every live camera has a new frame (or one has, and the others had their time), or the prompt has
    /// changed. `None` when the pipeline stops.
    fn next_observation(&self, encoded: &mut [u64], generation: &mut Option<u64>) -> Option<Vec<CameraSample>> {
        let shared = &*self.shared;
        let mut seen = shared.inputs.changes();
        let mut first_news = None;
        while !shared.stopping() {
            if shared.paused() {
                first_news = None;
                seen = shared.inputs.wait_change(seen, WAIT);
                continue;
            }
            if let Some(views) = self.poll_observation(encoded, generation, &mut first_news) {
                return Some(views);
            }
            seen = shared.inputs.wait_change(seen, if first_news.is_some() { Duration::from_millis(5) } else { WAIT });
        }
        None
    }

    /// The observation to encode now, if there is one; `first_news` is since when some of it is new.
    pub fn poll_observation(
        &self,
        encoded: &mut [u64],
        generation: &mut Option<u64>,
        first_news: &mut Option<Monotonic>,
    ) -> Option<Vec<CameraSample>> {
        let shared = &*self.shared;
        let now = shared.clock.monotonic();
        match self.gather() {
            Ok(views) => {
                let prompt = shared.inputs.prompt().generation;
                let fresh = views.iter().filter(|(i, s)| s.count > encoded[*i]).count();
                if fresh > 0 || *generation != Some(prompt) {
                    let since = *first_news.get_or_insert(now);
                    if fresh == views.len() || now >= since + GATHER {
                        views.iter().for_each(|(i, s)| encoded[*i] = s.count);
                        *generation = Some(prompt);
                        shared.report(|r| r.waiting_for = None);
                        return Some(views.into_iter().map(|(_, s)| s).collect());
                    }
                }
            }
            Err(why) => {
                shared.report(|r| r.waiting_for = Some(why));
                *first_news = None;
            }
        }
        None
    }

    /// The newest fresh frame of each view (with its place among the views), or what is missing.
    fn gather(&self) -> Result<Vec<(usize, CameraSample)>, String> {
        let shared = &*self.shared;
        let live = shared.live();
        let (ros_now, now) = (shared.clock.ros(), shared.clock.monotonic());
        let mut views = Vec::with_capacity(shared.views.len());
        let mut lost = None;
        for (place, &camera) in shared.views.iter().enumerate() {
            let name = &shared.config.cameras[camera].name;
            let max_age = live.camera_max_age_ms.get(camera).copied().unwrap_or(f64::INFINITY);
            let age = shared.inputs.freshness(camera).age_ms(ros_now, now);
            match shared.inputs.frame(camera) {
                Some(sample) if age <= max_age => views.push((place, sample)),
                Some(_) => lost = Some(format!("camera '{name}': newest frame is {age:.0} ms old")),
                None => lost = Some(format!("camera '{name}': no frame yet")),
            }
        }
        if shared.policy.dims().family == Family::Pi05 {
            // Its prompt holds the state.
            state_sample(shared, &shared.inputs.joints())?;
        }
        match lost {
            Some(why) if views.is_empty() || !live.drop_lost_views => return Err(why),
            _ => {}
        }
        let taken = |s: &CameraSample| believed(s.stamp, s.arrived, ros_now, now);
        let skew = |views: &[(usize, CameraSample)]| {
            let stamps = views.iter().map(|(_, s)| taken(s));
            stamps.clone().max().unwrap_or_default().ms_since(stamps.min().unwrap_or_default())
        };
        if skew(&views) > live.max_camera_skew_ms {
            // Cameras of different rates: what the faster ones took when the slowest took its newest.
            let moment = views.iter().map(|(_, s)| taken(s)).min().unwrap_or_default();
            for (place, sample) in &mut views {
                let near = shared.inputs.frame_near(shared.views[*place], moment, ros_now, now);
                *sample = near.unwrap_or_else(|| sample.clone());
            }
        }
        let skew = skew(&views);
        if skew > live.max_camera_skew_ms {
            shared.report(|r| r.skewed += 1);
            return Err(format!(
                "camera stamps are {skew:.0} ms apart, more than max_camera_skew_ms {:.0}",
                live.max_camera_skew_ms
            ));
        }
        Ok(views)
    }

    fn encode(&mut self, views: &[CameraSample], slot: &mut E::Cache) -> Result<Prefix, EngineError> {
        let shared = &*self.shared;
        let encode_start = shared.clock.monotonic();
        let prompt = shared.inputs.prompt();
        let kept = self.prompt.take().filter(|(generation, _)| *generation == prompt.generation);
        let state = match shared.policy.dims().family {
            Family::Pi0 => None,
            Family::Pi05 => Some(state_sample(shared, &shared.inputs.joints()).map_err(|found| {
                EngineError::Shape { what: "joint state for the prompt", expected: "fresh and finite".into(), found }
            })?),
        };
        let tokens = match kept {
            Some((_, tokens)) => tokens,
            None => shared.policy.tokens(&prompt.text, state.as_ref().map_or(&[], |s| &s.policy))?,
        };
        let frames: Vec<_> = views.iter().map(|s| View::Frame(&s.frame)).collect();
        self.encoder.now.stage.encode(&EncodeInput { views: &frames, tokens: &tokens }, slot)?;
        if state.is_none() {
            self.prompt = Some((prompt.generation, tokens));
        }
        let encode_end = shared.clock.monotonic();
        trace::span(What::Encode, shared.report(|r| r.encode.runs), encode_start, encode_end);
        shared.report(|r| {
            r.encode.runs += 1;
            r.encode.time.record(ns(encode_start, encode_end));
        });
        Ok(Prefix {
            prompt_generation: prompt.generation,
            oldest_image: views
                .iter()
                .map(|s| believed(s.stamp, s.arrived, shared.clock.ros(), encode_end))
                .min()
                .unwrap_or_default(),
            newest_arrival: views.iter().map(|s| s.arrived).max().unwrap_or_default(),
            encode_start,
            encode_end,
            state,
        })
    }
}

/// The decoder thread.
pub(super) struct DecodeStage<D: Decoder> {
    shared: Arc<Shared>,
    decoder: Seat<D>,
    free: Sender<D::Cache>,
    filled: Arc<Mailbox<Filled<D::Cache>>>,
    ports: Arc<Mutex<Ports>>,
    tap: Sender<Arc<ActionChunk>>,
    noise: NoiseSource,
    history: History,
    epoch: u64,
    grid: Grid,
    /// Normalised state, previous chunk and actions of the decode in hand.
    state: Vec<f32>,
    previous: Vec<f32>,
    actions: Vec<f32>,
}

impl<D: Decoder> DecodeStage<D> {
    pub fn new(
        shared: Arc<Shared>,
        decoder: Seat<D>,
        free: Sender<D::Cache>,
        filled: Arc<Mailbox<Filled<D::Cache>>>,
        ports: Arc<Mutex<Ports>>,
        tap: Sender<Arc<ActionChunk>>,
    ) -> Self {
        let dims = *shared.policy.dims();
        let len = dims.horizon * dims.action_dim;
        Self {
            noise: NoiseSource::new(shared.config.seed, len),
            history: History::default(),
            epoch: 0,
            grid: Grid { horizon: dims.horizon, action_dim: dims.action_dim, action_len: shared.policy.action_len() },
            state: vec![0.0; dims.state_dim],
            previous: Vec::new(),
            actions: vec![0.0; len],
            shared,
            decoder,
            free,
            filled,
            ports,
            tap,
        }
    }

    fn ports(&self) -> MutexGuard<'_, Ports> {
        self.ports.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Decodes until the pipeline stops: each filled slot once, or in dual-rate mode each joint state on the newest.
    pub fn run(mut self) {
        let dual_rate = self.shared.config.mode == PipelineMode::DualRate;
        let mut held: Option<Filled<D::Cache>> = None;
        let mut decoded = 0;
        while !self.shared.stopping() {
            self.free_retired();
            self.decoder.relieve();
            if self.shared.paused() {
                // What was encoded before the pause is old news after it.
                for old in held.take().into_iter().chain(self.filled.take(WAIT)) {
                    let _ = self.free.send(old.slot);
                }
                self.history.clear();
                continue;
            }
            let newer = if held.is_some() { self.filled.try_take() } else { self.filled.take(WAIT) };
            let is_new = newer.is_some();
            if let Some(newer) = newer
                && let Some(old) = held.replace(newer)
            {
                let _ = self.free.send(old.slot);
            }
            let Some(filled) = &held else { continue };
            let messages = self.shared.inputs.joints().messages;
            if is_new || messages != decoded {
                decoded = messages;
                if let Some(chunk) = self.decode_once(filled) {
                    self.hand_over(chunk);
                }
            } else {
                self.shared.inputs.wait_change(self.shared.inputs.changes(), Duration::from_millis(5));
            }
            if !dual_rate && let Some(done) = held.take() {
                let _ = self.free.send(done.slot);
            }
        }
    }

    /// Frees the chunks that the control thread has done with.
    pub fn free_retired(&mut self) {
        loop {
            let Ok(Retired { chunk, taken }) = self.ports().retired.pop() else { break };
            self.shared.report(|r| r.hand_over.record(ns(chunk.timing.decode_end, taken)));
        }
    }

    /// A chunk, or a report why there is none.
    pub fn decode_once(&mut self, filled: &Filled<D::Cache>) -> Option<ActionChunk> {
        self.decode(filled).unwrap_or_else(|e| {
            tracing::error!("decode: {e}");
            let fatal = matches!(&e, PipelineError::Engine(e) if e.is_fatal());
            self.shared.report(|r| {
                r.decode.errors += 1;
                r.last_error = Some(format!("decode: {e}"));
                r.fault = r.fault.take().or(fatal.then(|| (e.fault(), e.to_string())));
            });
            None
        })
    }

    /// One chunk; `None` when there is no joint state to decode from.
    fn decode(&mut self, filled: &Filled<D::Cache>) -> Result<Option<ActionChunk>, PipelineError> {
        let shared = self.shared.clone();
        // Read before the state: a stop that comes after this makes the chunk stale, whatever it was made from.
        let epoch = shared.epoch.current();
        if epoch != self.epoch {
            self.epoch = epoch;
            self.history.clear();
        }
        let state = match &filled.prefix.state {
            Some(state) => state.clone(),
            None => match state_sample(&shared, &shared.inputs.joints()) {
                Ok(state) => state,
                Err(why) => {
                    shared.report(|r| r.waiting_for = Some(why));
                    return Ok(None);
                }
            },
        };
        let live = shared.live();
        let decode_start = shared.clock.monotonic();
        shared.policy.normalize_state(&state.policy, &mut self.state)?;
        let delay = self.prepare_guidance(&state, filled.prefix.prompt_generation)?;
        let guidance = match (delay, live.rtc) {
            (Some(d), Some(rtc)) => {
                let rows = self.previous.len() / self.grid.action_dim;
                let end = if rtc.execution_horizon == 0 { rows } else { rtc.execution_horizon.max(d).min(rows) };
                Some(Guidance {
                    previous: &self.previous,
                    inference_delay: d,
                    execution_horizon: end,
                    max_weight: rtc.max_weight,
                    schedule: rtc.schedule,
                })
            }
            _ => None,
        };
        let guided = guidance.is_some();
        let input = DecodeInput { state: &self.state, noise: self.noise.current(), steps: live.steps, guidance };
        self.decoder.now.stage.decode(&filled.slot, &input, &mut self.actions)?;
        if cfg!(debug_assertions) && self.actions.iter().any(|a| !a.is_finite()) {
            let found = "actions are not finite: a cache slot was read while it was written, or the model diverged";
            tracing::error!("{found}");
            shared.report(|r| r.last_error = Some(found.into()));
        }
        if !live.hold_noise {
            self.noise.advance();
        }
        let decode_end = shared.clock.monotonic();

        let n = self.grid.action_len;
        let mut absolute = vec![0.0; self.grid.horizon * n];
        shared.policy.to_robot(&self.actions, &state.policy, &mut absolute)?;
        let mut positions = vec![0.0; absolute.len()];
        for (policy, robot) in absolute.chunks_exact(n).zip(positions.chunks_exact_mut(n)) {
            shared.joints.to_robot(policy, robot);
        }
        let sequence = {
            let mut ports = self.ports();
            ports.sequence += 1;
            ports.sequence
        };
        trace::span(What::Decode, sequence, decode_start, decode_end);
        self.history.push(PastChunk {
            sequence,
            prompt_generation: filled.prefix.prompt_generation,
            model: self.actions.clone(),
            absolute,
        });
        let chunk_ms = decode_end.ms_since(filled.prefix.newest_arrival);
        shared.report(|r| {
            r.decode.runs += 1;
            r.decode.time.record(ns(decode_start, decode_end));
            r.queue.record(ns(filled.prefix.encode_end, decode_start));
            r.chunk.record(ns(filled.prefix.newest_arrival, decode_end));
            r.over_budget += u64::from(live.chunk_budget_ms > 0.0 && chunk_ms > live.chunk_budget_ms);
            r.guided += u64::from(guided);
            r.waiting_for = None;
        });
        Ok(Some(ActionChunk {
            sequence,
            epoch,
            prompt_generation: filled.prefix.prompt_generation,
            state_stamp: state.stamp,
            oldest_image_stamp: filled.prefix.oldest_image,
            dt: shared.config.dt,
            horizon: self.grid.horizon,
            joints: n,
            positions,
            timing: ChunkTiming {
                observed: filled.prefix.newest_arrival,
                encode_start: filled.prefix.encode_start,
                encode_end: filled.prefix.encode_end,
                decode_start,
                decode_end,
            },
        }))
    }

    /// Fills `previous` with the leftover of the running plan and returns the inference delay in steps;
    /// `None` when nothing may guide the next chunk.
    fn prepare_guidance(&mut self, state: &StateSample, prompt_generation: u64) -> Result<Option<usize>, ModelError> {
        let live = self.shared.live();
        let plan = *self.ports().plan.newest();
        let Some(plan) = plan.filter(|_| live.rtc.is_some()) else { return Ok(None) };
        let Some(past) = self.history.adopted(plan.sequence) else { return Ok(None) };
        let expected = self.shared.report(|r| r.decode.time.stats().p50) as f64 * 1e-9;
        let ready = self.shared.clock.ros().plus_seconds(expected);
        let delay = plan.delay_steps(state.stamp, ready);
        // Beyond these bounds guidance cannot do what it promises: the seam falls back to the cross-fade.
        if delay > live.replan_steps || live.replan_steps > self.grid.horizon.saturating_sub(delay) {
            return Ok(None);
        }
        let same_prompt = past.prompt_generation == prompt_generation;
        let Some(mut left) = leftover(past, plan.index_at(state.stamp), self.grid) else {
            return Ok(None);
        };
        if !same_prompt {
            // A new prompt is bound only by what is already committed.
            left.rows = left.rows.min(delay);
            left.absolute.truncate(left.rows * self.grid.action_len);
            left.model.truncate(left.rows * self.grid.action_dim);
        }
        if left.rows == 0 {
            return Ok(None);
        }
        self.previous.clear();
        self.previous.resize(left.rows * self.grid.action_dim, 0.0);
        self.shared.policy.to_model(&left.absolute, &state.policy, &mut self.previous)?;
        let (n, dim) = (self.grid.action_len, self.grid.action_dim);
        for (row, model) in self.previous.chunks_exact_mut(dim).zip(left.model.chunks_exact(dim)) {
            // Padded columns follow what the model had there: zero would be a pull towards the mean pose.
            row[n..].copy_from_slice(&model[n..]);
        }
        Ok(Some(delay))
    }

    /// Gives a chunk to the control thread, and to whoever looks.
    pub fn hand_over(&mut self, chunk: ActionChunk) {
        let chunk = Arc::new(chunk);
        // Nobody looking, or looking too slowly, is no reason to wait.
        let _ = self.tap.try_send(chunk.clone());
        if self.ports().chunks.push(chunk).is_err() {
            self.shared.report(|r| r.not_taken += 1);
        }
    }
}
