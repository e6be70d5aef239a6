//! Latest-value input slots: subscriptions write, stages and control read the newest, nothing queues.

use std::collections::{HashMap, VecDeque};
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::Duration;

use crate::clock::{Monotonic, RosTime};
use crate::control::{InputFault, MAX_JOINTS};
use crate::model::{Frame, FrameMemory};
use crate::rt::latest::{Reader, Writer, latest};

fn lock<T>(m: &Mutex<T>) -> MutexGuard<'_, T> {
    m.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A stamp further ahead of the clock than this is not believed: the sender's clock is wrong.
pub const FUTURE_STAMP_TOLERANCE: Duration = Duration::from_millis(100);

/// Newest frame of one camera.
#[derive(Debug, Clone)]
pub struct CameraSample {
    /// The pixels.
    pub frame: Frame,
    /// When it was taken.
    pub stamp: RosTime,
    /// When it arrived.
    pub arrived: Monotonic,
    /// Counts the frames of this camera from 1.
    pub count: u64,
}

/// What is known of a camera without touching its pixels; readable from the control thread.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CameraFreshness {
    /// Good frames so far.
    pub frames: u64,
    /// Messages that could not be used.
    pub refused: u64,
    /// Whether the newest message was one of them.
    pub unusable: bool,
    /// Good frames in a row whose bytes equal those of the frame before.
    pub frozen: u64,
    /// When the newest good frame was taken.
    pub stamp: RosTime,
    /// When it arrived.
    pub arrived: Monotonic,
    /// Nanoseconds between arrivals of good frames, smoothed over some eight of them; 0 before the second.
    pub interval: i64,
}

impl CameraFreshness {
    /// Good frames a second, 0 before the second one.
    pub fn rate_hz(&self) -> f64 {
        if self.interval > 0 { 1e9 / self.interval as f64 } else { 0.0 }
    }

    /// What is wrong with it, if anything, for camera `camera` whose frames may be `max_ms` old.
    pub fn fault(&self, camera: usize, max_ms: f64, ros_now: RosTime, now: Monotonic) -> Option<InputFault> {
        let age = self.age_ms(ros_now, now);
        if age <= max_ms {
            None
        } else if self.unusable {
            Some(InputFault::CameraUnusable { camera })
        } else if self.frames == 0 {
            Some(InputFault::CameraMissing { camera })
        } else {
            Some(InputFault::CameraStale { camera, age: age * 1e-3, max: max_ms * 1e-3 })
        }
    }

    /// Age in ms: the larger of stamp age and arrival age. A zero stamp or one from the future is not believed.
    /// Infinite before the first frame.
    pub fn age_ms(&self, ros_now: RosTime, now: Monotonic) -> f64 {
        if self.frames == 0 {
            return f64::INFINITY;
        }
        age_ms(self.stamp, self.arrived, ros_now, now)
    }
}

/// The larger of stamp age and arrival age, in ms; a stamp that cannot be true is left out.
pub fn age_ms(stamp: RosTime, arrived: Monotonic, ros_now: RosTime, now: Monotonic) -> f64 {
    let arrival = now.ms_since(arrived).max(0.0);
    if stamp_is_believable(stamp, ros_now) { arrival.max(ros_now.ms_since(stamp)) } else { arrival }
}

/// When something was measured: its stamp, or when it arrived if that cannot be true.
pub fn believed(stamp: RosTime, arrived: Monotonic, ros_now: RosTime, now: Monotonic) -> RosTime {
    let arrival = || ros_now.plus_seconds(-now.seconds_since(arrived).max(0.0));
    if stamp_is_believable(stamp, ros_now) { stamp } else { arrival() }
}

/// Whether a stamp is set and not from the future.
pub fn stamp_is_believable(stamp: RosTime, ros_now: RosTime) -> bool {
    stamp.0 > 0 && stamp <= ros_now + FUTURE_STAMP_TOLERANCE
}

/// Frames of a camera that are kept, so that one can be found that was taken when a slower camera took its own.
const KEPT_FRAMES: usize = 4;

#[derive(Debug, Default)]
struct CameraSlot {
    /// The newest frames, the newest last; and why the last message was refused, if it was.
    newest: Mutex<(VecDeque<CameraSample>, Option<String>)>,
    frames: AtomicU64,
    refused: AtomicU64,
    unusable: AtomicBool,
    frozen: AtomicU64,
    stamp: AtomicI64,
    arrived: AtomicI64,
    interval: AtomicI64,
}

/// Joint positions merged from any number of publishers, each joint with its own stamp.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct JointSample {
    /// Robot units; NaN until a joint has been seen. Garbage is kept as garbage: whoever reads checks.
    pub positions: [f64; MAX_JOINTS],
    /// When each was measured.
    pub stamps: [RosTime; MAX_JOINTS],
    /// When each arrived.
    pub arrived: [Monotonic; MAX_JOINTS],
    /// Messages merged.
    pub messages: u64,
}

impl Default for JointSample {
    fn default() -> Self {
        Self {
            positions: [f64::NAN; MAX_JOINTS],
            stamps: [RosTime(0); MAX_JOINTS],
            arrived: [Monotonic(0); MAX_JOINTS],
            messages: 0,
        }
    }
}

impl JointSample {
    /// Whether joint `i` has ever been heard of.
    pub fn seen(&self, i: usize) -> bool {
        self.arrived[i].0 != 0
    }

    /// Age of joint `i` in ms, infinite if it was never seen.
    pub fn age_ms(&self, i: usize, ros_now: RosTime, now: Monotonic) -> f64 {
        if self.seen(i) { age_ms(self.stamps[i], self.arrived[i], ros_now, now) } else { f64::INFINITY }
    }

    /// The oldest stamp among the first `n` joints; a stamp that cannot be true counts as now.
    pub fn oldest_stamp(&self, n: usize, ros_now: RosTime) -> RosTime {
        let believed = |s: &RosTime| if stamp_is_believable(*s, ros_now) { *s } else { ros_now };
        self.stamps[..n].iter().map(believed).min().unwrap_or(ros_now)
    }
}

/// The sentence the policy follows.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Prompt {
    /// As the user wrote it.
    pub text: String,
    /// Counts changes.
    pub generation: u64,
}

struct JointSlot {
    merged: JointSample,
    control: Writer<JointSample>,
    unknown: Vec<String>,
}

/// Frames wait in an engine's memory until this goes; then those that are here go to the heap, so that the engine's device
/// is given back though no camera sends any more.
pub struct KeptFrames(Arc<InputSlots>);

impl Drop for KeptFrames {
    fn drop(&mut self) {
        self.0.move_frames(None);
    }
}

/// Every input slot of the node.
pub struct InputSlots {
    cameras: Vec<CameraSlot>,
    /// Where frames wait. Whoever brings one reads it until the frame is in its slot.
    memory: RwLock<Option<Arc<dyn FrameMemory>>>,
    joint_index: HashMap<String, usize>,
    joints: Mutex<JointSlot>,
    prompt: Mutex<Prompt>,
    changes: Mutex<u64>,
    changed: Condvar,
}

impl InputSlots {
    /// Slots for so many cameras and these joints; the reader is the control thread's view of the joints.
    pub fn new(cameras: usize, joint_names: &[String], prompt: &str) -> (Self, Reader<JointSample>) {
        let (control, reader) = latest(JointSample::default());
        let slots = Self {
            cameras: (0..cameras).map(|_| CameraSlot::default()).collect(),
            memory: RwLock::default(),
            joint_index: joint_names.iter().take(MAX_JOINTS).cloned().zip(0..).collect(),
            joints: Mutex::new(JointSlot { merged: JointSample::default(), control, unknown: Vec::new() }),
            prompt: Mutex::new(Prompt { text: prompt.into(), generation: 0 }),
            changes: Mutex::new(0),
            changed: Condvar::new(),
        };
        (slots, reader)
    }

    /// Number of cameras.
    pub fn cameras(&self) -> usize {
        self.cameras.len()
    }

    /// Lets frames wait in an engine's memory as long as the guard is there.
    pub fn keep_frames_in(self: &Arc<Self>, memory: Option<Arc<dyn FrameMemory>>) -> KeptFrames {
        self.move_frames(memory);
        KeptFrames(self.clone())
    }

    fn move_frames(&self, to: Option<Arc<dyn FrameMemory>>) {
        let mut memory = self.memory.write().unwrap_or_else(PoisonError::into_inner);
        *memory = to;
        for slot in &self.cameras {
            for sample in &mut lock(&slot.newest).0 {
                sample.frame = sample.frame.clone().kept_in(memory.as_deref());
            }
        }
    }

    /// A frame of camera `i` has arrived. Unknown cameras are ignored.
    pub fn put_frame(&self, i: usize, frame: Frame, stamp: RosTime, arrived: Monotonic) {
        let Some(slot) = self.cameras.get(i) else { return };
        {
            let memory = self.memory.read().unwrap_or_else(PoisonError::into_inner);
            let frame = frame.kept_in(memory.as_deref());
            let mut newest = lock(&slot.newest);
            let same = newest.0.back().is_some_and(|old| old.frame == frame);
            slot.frozen.store(if same { slot.frozen.load(Ordering::Relaxed) + 1 } else { 0 }, Ordering::Relaxed);
            let count = slot.frames.load(Ordering::Relaxed) + 1;
            if count > 1 {
                let gap = arrived.0.saturating_sub(slot.arrived.load(Ordering::Relaxed)).max(0);
                let mean = slot.interval.load(Ordering::Relaxed);
                slot.interval.store(if mean == 0 { gap } else { mean + (gap - mean) / 8 }, Ordering::Relaxed);
            }
            if newest.0.len() == KEPT_FRAMES {
                newest.0.pop_front();
            }
            newest.0.push_back(CameraSample { frame, stamp, arrived, count });
            newest.1 = None;
            slot.unusable.store(false, Ordering::Relaxed);
            slot.stamp.store(stamp.0, Ordering::Relaxed);
            slot.arrived.store(arrived.0, Ordering::Relaxed);
            slot.frames.store(count, Ordering::Release);
        }
        self.wake();
    }

    /// A message of camera `i` could not be used, and why.
    pub fn refuse_frame(&self, i: usize, reason: String) {
        let Some(slot) = self.cameras.get(i) else { return };
        slot.refused.fetch_add(1, Ordering::Relaxed);
        slot.unusable.store(true, Ordering::Relaxed);
        lock(&slot.newest).1 = Some(reason);
    }

    /// Newest good frame of camera `i`.
    pub fn frame(&self, i: usize) -> Option<CameraSample> {
        lock(&self.cameras.get(i)?.newest).0.back().cloned()
    }

    /// The frame of camera `i` that was taken nearest to `moment`, among the last few.
    pub fn frame_near(&self, i: usize, moment: RosTime, ros_now: RosTime, now: Monotonic) -> Option<CameraSample> {
        let taken = |s: &CameraSample| believed(s.stamp, s.arrived, ros_now, now);
        let newest = lock(&self.cameras.get(i)?.newest);
        newest.0.iter().min_by_key(|s| taken(s).0.abs_diff(moment.0)).cloned()
    }

    /// Why the newest message of camera `i` was refused, if it was.
    pub fn refusal(&self, i: usize) -> Option<String> {
        lock(&self.cameras.get(i)?.newest).1.clone()
    }

    /// Freshness of camera `i`, without a lock.
    pub fn freshness(&self, i: usize) -> CameraFreshness {
        let slot = &self.cameras[i];
        let frames = slot.frames.load(Ordering::Acquire);
        CameraFreshness {
            frames,
            refused: slot.refused.load(Ordering::Relaxed),
            unusable: slot.unusable.load(Ordering::Relaxed),
            frozen: slot.frozen.load(Ordering::Relaxed),
            stamp: RosTime(slot.stamp.load(Ordering::Relaxed)),
            arrived: Monotonic(slot.arrived.load(Ordering::Relaxed)),
            interval: slot.interval.load(Ordering::Relaxed),
        }
    }

    /// Merges a joint state message. Names that are not joints of this node are remembered for the diagnostics;
    /// a name without a position is ignored.
    pub fn put_joints(&self, names: &[String], positions: &[f64], stamp: RosTime, arrived: Monotonic) {
        let mut guard = lock(&self.joints);
        let slot = &mut *guard;
        let mut ours = false;
        for (name, position) in names.iter().zip(positions) {
            match self.joint_index.get(name) {
                Some(&i) => {
                    slot.merged.positions[i] = *position;
                    slot.merged.stamps[i] = stamp;
                    slot.merged.arrived[i] = arrived;
                    ours = true;
                }
                None if slot.unknown.len() < MAX_JOINTS && !slot.unknown.contains(name) => {
                    slot.unknown.push(name.clone());
                }
                None => {}
            }
        }
        if ours {
            slot.merged.messages += 1;
            slot.control.put(slot.merged);
            drop(guard);
            self.wake();
        }
    }

    /// Newest merged joint state.
    pub fn joints(&self) -> JointSample {
        lock(&self.joints).merged
    }

    /// Names heard on `joint_states` that are not joints of this node.
    pub fn unknown_joints(&self) -> Vec<String> {
        lock(&self.joints).unknown.clone()
    }

    /// Takes a new prompt; the same text again is no change. Returns its generation.
    pub fn put_prompt(&self, text: &str) -> u64 {
        let mut prompt = lock(&self.prompt);
        if prompt.text != text {
            *prompt = Prompt { text: text.into(), generation: prompt.generation + 1 };
        }
        let generation = prompt.generation;
        drop(prompt);
        self.wake();
        generation
    }

    /// The prompt in force.
    pub fn prompt(&self) -> Prompt {
        lock(&self.prompt).clone()
    }

    /// Counts changes of any input.
    pub fn changes(&self) -> u64 {
        *lock(&self.changes)
    }

    /// Waits until an input changed after `seen`, at most `timeout`; returns the count now.
    pub fn wait_change(&self, seen: u64, timeout: Duration) -> u64 {
        let guard = lock(&self.changes);
        match self.changed.wait_timeout_while(guard, timeout, |c| *c == seen) {
            Ok((guard, _)) => *guard,
            Err(poisoned) => *poisoned.into_inner().0,
        }
    }

    /// Wakes whoever waits for a change.
    pub fn wake(&self) {
        *lock(&self.changes) += 1;
        self.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(n: &[&str]) -> Vec<String> {
        n.iter().map(|s| s.to_string()).collect()
    }

    fn frame(value: u8) -> Frame {
        Frame::new(2, 2, 6, "rgb8", vec![value; 12]).unwrap()
    }

    #[test]
    fn joint_states_of_several_publishers_merge_per_joint() {
        let (slots, mut control) = InputSlots::new(0, &names(&["a", "b"]), "");
        slots.put_joints(&names(&["b", "x"]), &[2.0, 9.0], RosTime(5), Monotonic(6));
        assert!(slots.joints().positions[0].is_nan() && !slots.joints().seen(0));
        slots.put_joints(&names(&["a"]), &[1.0], RosTime(7), Monotonic(8));
        let j = *control.newest();
        assert_eq!((j.positions[0], j.positions[1], j.messages), (1.0, 2.0, 2));
        assert_eq!((j.stamps[0], j.stamps[1]), (RosTime(7), RosTime(5)));
        assert_eq!(slots.unknown_joints(), ["x"]);
    }

    #[test]
    fn a_name_without_a_position_changes_nothing() {
        let (slots, _control) = InputSlots::new(0, &names(&["a", "b"]), "");
        slots.put_joints(&names(&["a", "b"]), &[1.0], RosTime(5), Monotonic(6));
        assert!(slots.joints().seen(0) && !slots.joints().seen(1));
    }

    #[test]
    fn age_is_the_larger_of_stamp_and_arrival_and_false_stamps_are_left_out() {
        let ms = 1_000_000;
        let now = (RosTime(10_000 * ms), Monotonic(500 * ms));
        let age = |stamp, arrived| age_ms(RosTime(stamp), Monotonic(arrived), now.0, now.1);
        assert!((age(9_970 * ms, 490 * ms) - 30.0).abs() < 1e-9);
        assert!((age(9_999 * ms, 450 * ms) - 50.0).abs() < 1e-9);
        assert!((age(0, 480 * ms) - 20.0).abs() < 1e-9, "a zero stamp is not believed");
        assert!((age(13_000 * ms, 480 * ms) - 20.0).abs() < 1e-9, "a stamp from the future is not believed");
        assert!((age(7_000 * ms, 499 * ms) - 3_000.0).abs() < 1e-9, "a camera clock 3 s behind counts as stale");
    }

    #[test]
    fn a_frozen_camera_is_seen_by_its_content() {
        let (slots, _control) = InputSlots::new(1, &[], "");
        for t in 1..=4 {
            slots.put_frame(0, frame(7), RosTime(t), Monotonic(t));
        }
        assert_eq!((slots.freshness(0).frozen, slots.freshness(0).frames), (3, 4));
        slots.put_frame(0, frame(8), RosTime(5), Monotonic(5));
        assert_eq!(slots.freshness(0).frozen, 0);
    }

    #[test]
    fn frames_wait_in_the_memory_of_the_engine_while_there_is_one() {
        use crate::engine::frames::{FramePool, Lent};

        let (slots, _control) = InputSlots::new(2, &[], "");
        let slots = Arc::new(slots);
        let lent = |s: &CameraSample| s.frame.pixels().held_by::<Lent<Vec<u8>>>().is_some();
        let put = |i, value| slots.put_frame(i, frame(value), RosTime(value.into()), Monotonic(value.into()));
        put(0, 1);
        put(1, 1);
        let pool = Arc::new(FramePool::new(|bytes| Ok(vec![0; bytes])));
        let guard = slots.keep_frames_in(Some(pool.clone()));
        assert!(lent(&slots.frame(0).unwrap()) && lent(&slots.frame(1).unwrap()), "those that had come before");
        for value in 1..=100 {
            put(0, value);
            let newest = slots.frame(0).unwrap();
            assert!(lent(&newest) && newest.frame == frame(value));
        }
        assert_eq!(slots.freshness(0).frozen, 0);
        put(0, 100);
        assert_eq!(slots.freshness(0).frozen, 1, "compared by content");
        let (buffers, _) = pool.size();
        assert!(buffers <= KEPT_FRAMES + 3, "{buffers}: they come back");
        drop(guard);
        assert!(slots.cameras.iter().all(|c| lock(&c.newest).0.iter().all(|s| !lent(s))));
        assert_eq!(slots.frame(0).unwrap().frame, frame(100));
        put(1, 7);
        assert!(!lent(&slots.frame(1).unwrap()));
        assert_eq!(Arc::strong_count(&pool), 1, "nothing of the engine is left");
    }

    #[test]
    fn the_same_prompt_again_is_no_change() {
        let (slots, _control) = InputSlots::new(0, &[], "pick");
        assert_eq!(slots.put_prompt("pick"), 0);
        assert_eq!(slots.put_prompt("place"), 1);
    }
}
