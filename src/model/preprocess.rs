//! Camera frames to the square image the vision tower sees: resize with aspect kept, pad with black, scale.
//!
//! Two resamplers exist because the two stacks that train these policies differ: on fine texture they are tens of grey
//! levels apart, so the one that trained the checkpoint must be used.

use super::{Encoding, Frame, ModelError, Origin};

/// How a frame is brought to the model's size.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Resampler {
    /// Pillow's antialiased bilinear filter on bytes, bit for bit; a frame already at size is taken as it is.
    OpenPi,
    /// Four-neighbour bilinear in floating point, half-pixel centres, no antialiasing (PyTorch's `interpolate`).
    LeRobot,
}

impl From<Origin> for Resampler {
    fn from(origin: Origin) -> Self {
        match origin {
            Origin::OpenPi => Resampler::OpenPi,
            Origin::LeRobot => Resampler::LeRobot,
        }
    }
}

/// Frame sizes whose tables are kept; a node has a handful of cameras.
const KEPT_PLANS: usize = 8;

/// Turns frames into model images. Keeps its tables: nothing is allocated after the first frame of a size.
#[derive(Debug, Clone)]
pub struct Preprocessor {
    size: usize,
    resampler: Resampler,
    plans: Vec<Plan>,
    /// Rows resized horizontally, `[frame height, inner width, 3]`.
    rows: Vec<u8>,
    sums: Vec<i32>,
    /// The padded image, `[size, size, 3]`.
    image: Vec<u8>,
}

impl Preprocessor {
    /// For square images of `size` pixels a side.
    pub fn new(size: usize, resampler: Resampler) -> Self {
        Self { size, resampler, plans: Vec::new(), rows: Vec::new(), sums: Vec::new(), image: Vec::new() }
    }

    /// Pixels a side of the output.
    pub fn size(&self) -> usize {
        self.size
    }

    /// Which resampler it runs.
    pub fn resampler(&self) -> Resampler {
        self.resampler
    }

    /// Writes red, green and blue planes `[3, size, size]` in [-1, 1]; padding is -1.
    pub fn planes(&mut self, frame: &Frame, out: &mut [f32]) -> Result<(), ModelError> {
        let pixels = self.size * self.size;
        check_length("image planes", 3 * pixels, out.len())?;
        match self.resampler {
            Resampler::OpenPi => {
                let mut image = std::mem::take(&mut self.image);
                image.resize(3 * pixels, 0);
                let done = self.rgb8(frame, &mut image);
                for (c, plane) in out.chunks_exact_mut(pixels.max(1)).enumerate() {
                    for (o, p) in plane.iter_mut().zip(image.as_chunks::<3>().0) {
                        *o = UNIT[p[c] as usize] * 2.0 - 1.0;
                    }
                }
                self.image = image;
                done
            }
            Resampler::LeRobot => {
                out.fill(-1.0);
                self.bilinear(frame, |c, i, value| out[c * pixels + i] = value * 2.0 - 1.0)
            }
        }
    }

    /// Writes the resized and padded image as bytes `[size, size, 3]` in red, green, blue: with [`Resampler::OpenPi`]
    /// the exact bytes of that stack, with [`Resampler::LeRobot`] its values rounded to the nearest byte.
    pub fn rgb8(&mut self, frame: &Frame, out: &mut [u8]) -> Result<(), ModelError> {
        check_length("image bytes", 3 * self.size * self.size, out.len())?;
        out.fill(0);
        match self.resampler {
            Resampler::OpenPi if (frame.width(), frame.height()) == (self.size, self.size) => {
                let layout = Layout::of(frame.encoding());
                for (y, row) in out.chunks_exact_mut(3 * self.size).enumerate() {
                    let pixels = frame_row(frame, y).chunks_exact(layout.bytes);
                    for (o, p) in row.as_chunks_mut::<3>().0.iter_mut().zip(pixels) {
                        *o = layout.rgb.map(|i| p[i]);
                    }
                }
                Ok(())
            }
            Resampler::OpenPi => self.antialiased(frame, out),
            Resampler::LeRobot => self.bilinear(frame, |c, i, value| out[3 * i + c] = (value * 255.0).round() as u8),
        }
    }

    /// Index of the plan for this frame size, made if it is new.
    fn plan(&mut self, frame: &Frame) -> Result<usize, ModelError> {
        let key = (frame.width(), frame.height());
        if let Some(i) = self.plans.iter().position(|p| p.frame == key) {
            return Ok(i);
        }
        let plan = Plan::new(key, self.size, self.resampler)?;
        if self.plans.len() == KEPT_PLANS {
            self.plans.remove(0);
        }
        self.plans.push(plan);
        Ok(self.plans.len() - 1)
    }

    /// Pillow's two passes: across each row to bytes, then down the columns to bytes.
    fn antialiased(&mut self, frame: &Frame, out: &mut [u8]) -> Result<(), ModelError> {
        let plan = self.plan(frame)?;
        let plan = &self.plans[plan];
        let width = 3 * plan.inner.0;
        self.rows.resize(frame.height() * width, 0);
        let layout = Layout::of(frame.encoding());
        for (y, row) in self.rows.chunks_exact_mut(width).enumerate() {
            let source = frame_row(frame, y);
            match layout.bytes {
                1 => across::<1>(source, layout.rgb, &plan.columns, row),
                3 => across::<3>(source, layout.rgb, &plan.columns, row),
                _ => across::<4>(source, layout.rgb, &plan.columns, row),
            }
        }
        self.sums.resize(width, 0);
        for (y, taps) in plan.rows.iter().enumerate() {
            self.sums.fill(ROUND);
            for (weight, row) in taps.weights.iter().zip(self.rows[taps.start * width..].chunks_exact(width)) {
                for (sum, p) in self.sums.iter_mut().zip(row) {
                    *sum += *p as i32 * weight;
                }
            }
            let at = 3 * ((plan.top + y) * self.size + plan.left);
            for (o, sum) in out[at..at + width].iter_mut().zip(&self.sums) {
                *o = to_byte(*sum);
            }
        }
        Ok(())
    }

    /// Calls `put(channel, pixel, value in [0, 1])` for every pixel of the inner image.
    fn bilinear(&mut self, frame: &Frame, mut put: impl FnMut(usize, usize, f32)) -> Result<(), ModelError> {
        let plan = self.plan(frame)?;
        let plan = &self.plans[plan];
        let layout = Layout::of(frame.encoding());
        for (y, v) in plan.vertical.iter().enumerate() {
            let (above, below) = (frame_row(frame, v.at), frame_row(frame, v.next));
            let row = (plan.top + y) * self.size + plan.left;
            for (x, h) in plan.horizontal.iter().enumerate() {
                let (left, right) = (h.at * layout.bytes, h.next * layout.bytes);
                for (c, i) in layout.rgb.into_iter().enumerate() {
                    let p = |row: &[u8], at: usize| UNIT[row[at + i] as usize];
                    let upper = (1.0 - h.part) * p(above, left) + h.part * p(above, right);
                    let lower = (1.0 - h.part) * p(below, left) + h.part * p(below, right);
                    let value = (1.0 - v.part) * upper + v.part * lower;
                    put(c, row + x, value.clamp(0.0, 1.0));
                }
            }
        }
        Ok(())
    }
}

fn check_length(what: &'static str, expected: usize, found: usize) -> Result<(), ModelError> {
    if expected == found { Ok(()) } else { Err(ModelError::Length { what, expected, found }) }
}

/// The pixels of row `y`, without the padding of the row stride. `Frame` has checked that they are there.
fn frame_row(frame: &Frame, y: usize) -> &[u8] {
    &frame.data()[y * frame.step()..][..frame.width() * frame.encoding().bytes_per_pixel()]
}

/// A byte as a fraction of one, rounded as `p / 255` in f32 is.
const UNIT: [f32; 256] = {
    let mut table = [0.0; 256];
    let mut i = 0;
    while i < 256 {
        table[i] = i as f32 / 255.0;
        i += 1;
    }
    table
};

/// Where red, green and blue lie in a pixel.
struct Layout {
    bytes: usize,
    rgb: [usize; 3],
}

impl Layout {
    fn of(encoding: Encoding) -> Self {
        let rgb = match encoding {
            Encoding::Rgb8 | Encoding::Rgba8 => [0, 1, 2],
            Encoding::Bgr8 | Encoding::Bgra8 => [2, 1, 0],
            Encoding::Mono8 => [0, 0, 0],
        };
        Self { bytes: encoding.bytes_per_pixel(), rgb }
    }
}

/// Everything that depends on the frame's size only.
#[derive(Debug, Clone)]
struct Plan {
    frame: (usize, usize),
    /// Width and height of the resized image inside the padding.
    inner: (usize, usize),
    top: usize,
    left: usize,
    columns: Vec<Taps>,
    rows: Vec<Taps>,
    horizontal: Vec<Neighbours>,
    vertical: Vec<Neighbours>,
}

impl Plan {
    fn new(frame: (usize, usize), size: usize, resampler: Resampler) -> Result<Self, ModelError> {
        let (w, h) = (frame.0 as f64, frame.1 as f64);
        let ratio = (w / size as f64).max(h / size as f64);
        let inner = ((w / ratio) as usize, (h / ratio) as usize);
        if inner.0 == 0 || inner.1 == 0 {
            return Err(ModelError::Frame {
                reason: format!("a frame of {}x{} leaves nothing of its short side at {size} pixels", frame.0, frame.1),
                remedy: "crop it nearer to a square".into(),
            });
        }
        let mut plan = Self {
            frame,
            inner,
            top: (size - inner.1) / 2,
            left: (size - inner.0) / 2,
            columns: Vec::new(),
            rows: Vec::new(),
            horizontal: Vec::new(),
            vertical: Vec::new(),
        };
        match resampler {
            Resampler::OpenPi => {
                plan.columns = taps(frame.0, inner.0);
                plan.rows = taps(frame.1, inner.1);
            }
            Resampler::LeRobot => {
                plan.horizontal = neighbours(frame.0, inner.0);
                plan.vertical = neighbours(frame.1, inner.1);
            }
        }
        Ok(plan)
    }
}

/// Fixed-point weights of one output sample, in units of 2^-22 (Pillow's 8-bit resampling).
#[derive(Debug, Clone)]
struct Taps {
    start: usize,
    weights: Vec<i32>,
}

const PRECISION_BITS: u32 = 22;
const ROUND: i32 = 1 << (PRECISION_BITS - 1);

fn to_byte(sum: i32) -> u8 {
    (sum >> PRECISION_BITS).clamp(0, 255) as u8
}

/// Pillow's triangle filter, widened by the down-scale factor, from `n_in` samples to `n_out`.
fn taps(n_in: usize, n_out: usize) -> Vec<Taps> {
    let scale = n_in as f64 / n_out as f64;
    let support = scale.max(1.0);
    (0..n_out)
        .map(|o| {
            let centre = (o as f64 + 0.5) * scale;
            let start = (centre - support + 0.5).max(0.0) as usize;
            let end = ((centre + support + 0.5) as usize).min(n_in);
            let weight = |x: usize| (1.0 - (x as f64 - centre + 0.5).abs() / support).max(0.0);
            let total: f64 = (start..end).map(weight).sum();
            let fixed = |x| (0.5 + weight(x) / total * f64::from(1 << PRECISION_BITS)) as i32;
            Taps { start, weights: (start..end).map(fixed).collect() }
        })
        .collect()
}

/// One row of `BYTES`-byte pixels to RGB bytes.
fn across<const BYTES: usize>(source: &[u8], rgb: [usize; 3], columns: &[Taps], out: &mut [u8]) {
    let pixels = source.as_chunks::<BYTES>().0;
    for (o, taps) in out.as_chunks_mut::<3>().0.iter_mut().zip(columns) {
        let mut sums = [ROUND; 3];
        for (weight, p) in taps.weights.iter().zip(&pixels[taps.start..]) {
            for c in 0..3 {
                sums[c] += p[rgb[c]] as i32 * weight;
            }
        }
        *o = sums.map(to_byte);
    }
}

/// The two samples an output lies between, and how far towards the second.
#[derive(Debug, Clone)]
struct Neighbours {
    at: usize,
    next: usize,
    part: f32,
}

/// PyTorch's bilinear source positions: half-pixel centres, clamped at the edges, in f32.
fn neighbours(n_in: usize, n_out: usize) -> Vec<Neighbours> {
    let scale = n_in as f32 / n_out as f32;
    (0..n_out)
        .map(|o| {
            // One rounding, as PyTorch's build has it: two would move samples by 1e-5 of a grey level range.
            let source = scale.mul_add(o as f32 + 0.5, -0.5).max(0.0);
            let at = (source as usize).min(n_in - 1);
            Neighbours { at, next: (at + 1).min(n_in - 1), part: (source - at as f32).clamp(0.0, 1.0) }
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The same picture in every encoding, with a row stride that is not the row's length.
    fn encoded(encoding: Encoding, name: &str, w: usize, h: usize, grey: bool) -> Frame {
        let layout = Layout::of(encoding);
        let step = w * layout.bytes + 5;
        let mut data = vec![0xEE; step * h];
        for y in 0..h {
            for x in 0..w {
                let rgb = [x * 7 + y, x + y * 5, x * y].map(|v| if grey { (x * 11 + y * 3) as u8 } else { v as u8 });
                for (value, i) in rgb.into_iter().zip(layout.rgb) {
                    data[y * step + x * layout.bytes + i] = value;
                }
            }
        }
        Frame::new(w, h, step, name, data).unwrap()
    }

    #[test]
    fn the_encoding_and_the_stride_change_nothing() {
        for resampler in [Resampler::OpenPi, Resampler::LeRobot] {
            for (w, h) in [(40, 30), (13, 29), (16, 16)] {
                for grey in [false, true] {
                    let mut p = Preprocessor::new(16, resampler);
                    let mut first: Option<Vec<f32>> = None;
                    for (encoding, name) in Encoding::ALL {
                        if encoding == Encoding::Mono8 && !grey {
                            continue;
                        }
                        let mut out = vec![0.0; 3 * 16 * 16];
                        p.planes(&encoded(encoding, name, w, h, grey), &mut out).unwrap();
                        assert!(out.iter().all(|v| (-1.0..=1.0).contains(v)));
                        assert_eq!(*first.get_or_insert(out.clone()), out, "{name} {w}x{h} {resampler:?}");
                    }
                    assert_eq!(p.plans.len(), usize::from(resampler == Resampler::LeRobot || w != h));
                }
            }
        }
    }

    #[test]
    fn padding_is_black_and_the_odd_row_goes_below() {
        let white = Frame::new(16, 7, 48, "rgb8", vec![255; 48 * 7]).unwrap();
        for resampler in [Resampler::OpenPi, Resampler::LeRobot] {
            let mut out = vec![0.0; 3 * 256];
            Preprocessor::new(16, resampler).planes(&white, &mut out).unwrap();
            let rows: Vec<f32> = out[..256].chunks(16).map(|r| r[3]).collect();
            let expected: Vec<f32> = (0..16).map(|y| if (4..11).contains(&y) { 1.0 } else { -1.0 }).collect();
            assert_eq!(rows, expected, "{resampler:?}");
        }
    }

    #[test]
    fn a_frame_too_thin_and_a_wrong_buffer_are_refused() {
        let thin = Frame::new(4000, 1, 12000, "rgb8", vec![0; 12000]).unwrap();
        let mut p = Preprocessor::new(16, Resampler::OpenPi);
        let e = p.planes(&thin, &mut vec![0.0; 768]).unwrap_err().to_string();
        assert!(e.contains("4000x1"), "{e}");
        let e = p.planes(&thin, &mut [0.0; 5]).unwrap_err().to_string();
        assert!(e.contains("expected 768") && e.contains("found 5"), "{e}");
    }
}
