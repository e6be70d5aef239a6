//! Camera frames to patches on the GPU: bytes go up as they are, the kernel converts, resizes, pads and scales.
//!
//! Frames that wait in page-locked memory go up from there, others by way of such memory of the encoder's own.

use std::sync::Arc;

use super::device::{Buffer, Device, Pinned};
use super::kernels::{ImageArgs, ImagesArgs, Kernels, PlacedArgs, Shape};
use super::stream::Stream;
use super::weights::MAX_VIEWS;
use super::{check_finite, check_len};
use crate::engine::frames::Lent;
use crate::engine::{EngineError, View};
use crate::model::{Encoding, Frame, ModelError, Resampler};

/// Frame sizes whose tables are kept, the least recently used goes: never one of the observation at hand.
const KEPT_TABLES: usize = MAX_VIEWS;

/// Bytes of a frame copied at a time.
const COPY_PIECE: usize = 256 << 10;

/// Where a resized frame lies in the square image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Placement {
    width: usize,
    height: usize,
    left: usize,
    top: usize,
}

/// Aspect kept, centred, the odd pixel below or to the right (spec section 1).
fn place(width: usize, height: usize, size: usize) -> Result<Placement, ModelError> {
    let (w, h) = (width as f64, height as f64);
    let ratio = (w / size as f64).max(h / size as f64);
    let inner = ((w / ratio) as usize, (h / ratio) as usize);
    if inner.0 == 0 || inner.1 == 0 {
        return Err(ModelError::Frame {
            reason: format!("a frame of {width}x{height} leaves nothing of its short side at {size} pixels"),
            remedy: "crop it nearer to a square".into(),
        });
    }
    Ok(Placement { width: inner.0, height: inner.1, left: (size - inner.0) / 2, top: (size - inner.1) / 2 })
}

/// Pillow's fixed-point taps of one axis: first source sample, taps and weights of each output sample.
fn taps(n_in: usize, n_out: usize) -> Vec<(i32, Vec<i32>)> {
    let scale = n_in as f64 / n_out as f64;
    let support = scale.max(1.0);
    (0..n_out)
        .map(|o| {
            let centre = (o as f64 + 0.5) * scale;
            let start = (centre - support + 0.5).max(0.0) as usize;
            let end = ((centre + support + 0.5) as usize).min(n_in);
            let weight = |x: usize| (1.0 - (x as f64 - centre + 0.5).abs() / support).max(0.0);
            let total: f64 = (start..end).map(weight).sum();
            let fixed = |x| (0.5 + weight(x) / total * f64::from(1 << 22)) as i32;
            (start as i32, (start..end).map(fixed).collect())
        })
        .collect()
}

/// Tables of one frame size on the device.
struct Tables {
    frame: (usize, usize),
    at: Placement,
    /// First source sample of each output column, then row; then the number of taps; then the weights.
    values: Buffer<i32>,
    taps: usize,
}

impl Tables {
    fn new(
        device: &Arc<Device>,
        frame: (usize, usize),
        size: usize,
        resampler: Resampler,
    ) -> Result<Self, EngineError> {
        let at = place(frame.0, frame.1, size)?;
        if resampler == Resampler::LeRobot {
            return Ok(Self { frame, at, values: Buffer::zeroed(device, 0)?, taps: 0 });
        }
        let mut all = taps(frame.0, at.width);
        all.extend(taps(frame.1, at.height));
        let most = all.iter().map(|(_, w)| w.len()).max().unwrap_or(0);
        let mut values: Vec<i32> = all.iter().map(|(first, _)| *first).collect();
        values.extend(all.iter().map(|(_, w)| w.len() as i32));
        for (_, w) in &all {
            values.extend(w);
            values.extend(std::iter::repeat_n(0, most - w.len()));
        }
        Ok(Self { frame, at, values: Buffer::from_slice(device, &values)?, taps: most })
    }
}

/// Pinned and device memory of one view's bytes.
struct Slot {
    pinned: Pinned<u8>,
    bytes: Buffer<u8>,
}

/// Uploads views and queues the kernel that makes patches of them.
pub(super) struct Images {
    device: Arc<Device>,
    size: usize,
    patch: usize,
    patch_stride: usize,
    resampler: Resampler,
    slots: Vec<Slot>,
    tables: Vec<Tables>,
}

impl Images {
    pub fn new(device: &Arc<Device>, size: usize, patch: usize, patch_stride: usize, resampler: Resampler) -> Self {
        let device = Arc::clone(device);
        Self { device, size, patch, patch_stride, resampler, slots: Vec::new(), tables: Vec::new() }
    }

    fn slot(&mut self, index: usize, bytes: usize) -> Result<&mut Slot, EngineError> {
        while self.slots.len() <= index {
            self.slots.push(Slot { pinned: Pinned::zeroed(&self.device, 0)?, bytes: Buffer::zeroed(&self.device, 0)? });
        }
        let device = Arc::clone(&self.device);
        let slot = &mut self.slots[index];
        if slot.bytes.len() < bytes {
            *slot = Slot { pinned: Pinned::zeroed(&device, bytes)?, bytes: Buffer::zeroed(&device, bytes)? };
        }
        Ok(slot)
    }

    fn tables(&mut self, frame: &Frame) -> Result<&Tables, EngineError> {
        let key = (frame.width(), frame.height());
        let found = match self.tables.iter().position(|t| t.frame == key) {
            Some(at) => self.tables.remove(at),
            None => {
                let made = Tables::new(&self.device, key, self.size, self.resampler)?;
                if self.tables.len() == KEPT_TABLES {
                    self.tables.remove(0);
                }
                made
            }
        };
        self.tables.push(found);
        Ok(&self.tables[self.tables.len() - 1])
    }

    /// Queues the uploads of all views, then one kernel that converts them into `patches` (a device address, where each
    /// view has `tokens` rows of `patch_stride`) and puts `placed` in place.
    ///
    /// The stream must have been synchronised since the last call, and must be before the views go: the GPU reads page-locked
    /// frames where they are.
    pub fn queue(
        &mut self,
        stream: &Stream,
        kernels: &Kernels,
        views: &[View<'_>],
        patches: &Buffer<u16>,
        tokens: usize,
        placed: PlacedArgs,
    ) -> Result<(), EngineError> {
        let mut all = ImagesArgs { placed, ..ImagesArgs::default() };
        for (i, (view, args)) in views.iter().zip(&mut all.views).enumerate() {
            *args = self.upload(stream, i, view)?;
            args.patches = patches.at(i * tokens * self.patch_stride);
        }
        let mut shape = Shape { dependent: false, ..Shape::items(3 * self.size * self.size, 256) };
        shape.grid[1] = views.len().min(MAX_VIEWS) as u32;
        kernels.images.launch(stream, shape, &all)
    }

    /// Queues the upload of view `index`; what the kernel is to know of it, but where its patches go.
    fn upload(&mut self, stream: &Stream, index: usize, view: &View<'_>) -> Result<ImageArgs, EngineError> {
        let mut args = ImageArgs {
            size: self.size as i32,
            patch: self.patch as i32,
            patch_stride: self.patch_stride as i32,
            ..ImageArgs::default()
        };
        let frame = match view {
            View::Planes(planes) => {
                check_len("image planes", planes, 3 * self.size * self.size)?;
                check_finite("image planes", planes)?;
                let slot = self.slot(index, size_of_val(*planes))?;
                let bytes: &[u8] = bytemuck::cast_slice(planes);
                slot.pinned.as_mut_slice()[..bytes.len()].copy_from_slice(bytes);
                stream.upload(&slot.pinned, bytes.len(), &slot.bytes, 0)?;
                args.planes = slot.bytes.pointer();
                return Ok(args);
            }
            View::Frame(frame) => frame,
        };
        let as_it_is = (frame.width(), frame.height()) == (self.size, self.size);
        args.resampler = match self.resampler {
            Resampler::OpenPi if as_it_is => 0,
            Resampler::OpenPi => 1,
            Resampler::LeRobot => 2,
        };
        let t = self.tables(frame)?;
        let outputs = t.at.width + t.at.height;
        args.first = t.values.pointer();
        if t.taps > 0 {
            args.count = t.values.at(outputs);
            args.weights = t.values.at(2 * outputs);
        }
        args.taps = t.taps as i32;
        args.resized_w = t.at.width as i32;
        args.resized_h = t.at.height as i32;
        args.left = t.at.left as i32;
        args.top = t.at.top as i32;

        let pixel = frame.encoding().bytes_per_pixel();
        // Only what the header promises: the buffer may be longer.
        let needed = frame.step() * (frame.height() - 1) + frame.width() * pixel;
        let slot = self.slot(index, needed)?;
        let locked = frame.pixels().held_by::<Lent<Pinned<u8>>>().and_then(Lent::buffer);
        match locked {
            Some(buffer) => stream.upload(buffer, needed, &slot.bytes, 0)?,
            // Piece by piece, so that the copy to the GPU runs behind the copy into pinned memory.
            None => {
                for at in (0..needed).step_by(COPY_PIECE) {
                    let end = (at + COPY_PIECE).min(needed);
                    slot.pinned.as_mut_slice()[at..end].copy_from_slice(&frame.data()[at..end]);
                    stream.upload_part(&slot.pinned, at..end, &slot.bytes)?;
                }
            }
        }
        args.bytes = slot.bytes.pointer();
        [args.red, args.green, args.blue] = match frame.encoding() {
            Encoding::Rgb8 | Encoding::Rgba8 => [0, 1, 2],
            Encoding::Bgr8 | Encoding::Bgra8 => [2, 1, 0],
            Encoding::Mono8 => [0, 0, 0],
        };
        args.width = frame.width() as i32;
        args.height = frame.height() as i32;
        args.step = frame.step() as i32;
        args.pixel = pixel as i32;
        Ok(args)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn common_cameras_land_where_the_reference_puts_them() {
        assert_eq!(place(640, 480, 224).unwrap(), Placement { width: 224, height: 168, left: 0, top: 28 });
        assert_eq!(place(1920, 1080, 224).unwrap(), Placement { width: 224, height: 126, left: 0, top: 49 });
        assert!(place(4000, 1, 16).is_err());
    }

    #[test]
    fn taps_sum_to_one_in_fixed_point() {
        for (n_in, n_out) in [(640, 224), (480, 168), (100, 224), (224, 224)] {
            for (first, w) in taps(n_in, n_out) {
                assert!(first as usize + w.len() <= n_in);
                assert!((w.iter().sum::<i32>() - (1 << 22)).abs() <= w.len() as i32);
            }
        }
    }
}
