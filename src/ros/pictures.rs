//! Compressed images: decoding takes milliseconds, so each camera has a thread for it, which only ever sees the newest.

use crossbeam_channel::{Receiver, Sender, TrySendError, bounded};
use r2r::sensor_msgs::msg::CompressedImage;

use super::convert::from_stamp;
use super::failure::Refusal;
use super::spin::spawn;
use crate::clock::{Clock, Monotonic};
use crate::model::Frame;
use crate::node::Inputs;

/// A picture and when it came.
type Picture = (CompressedImage, Monotonic);

/// Where the pictures of one camera go. Its thread ends with it.
pub struct Pictures {
    to: Sender<Picture>,
    /// The other end, to take back what is not the newest any more.
    waiting: Receiver<Picture>,
}

impl Pictures {
    /// Starts the thread of camera number `camera`.
    pub fn of(camera: usize, inputs: Inputs) -> Result<Self, Refusal> {
        let (to, waiting) = bounded::<Picture>(1);
        let decode = waiting.clone();
        // Not waited for: it ends once nothing can come any more.
        drop(spawn(&format!("ros-picture-{camera}"), move || {
            for (message, arrived) in decode {
                let stamp = from_stamp(&message.header.stamp);
                inputs.frame_of(camera, stamp, arrived, Frame::decode(&message.data));
            }
        })?);
        Ok(Self { to, waiting })
    }

    /// Takes a picture that has just come; one that still waits is dropped for it.
    pub fn put(&self, message: CompressedImage, clock: &impl Clock) {
        let mut picture = (message, clock.monotonic());
        while let Err(TrySendError::Full(newest)) = self.to.try_send(picture) {
            let _ = self.waiting.try_recv();
            picture = newest;
        }
    }
}
