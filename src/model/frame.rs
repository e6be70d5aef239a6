//! One camera frame, checked once when it is made so that nothing after it needs to check again.

use super::ModelError;
use super::pixels::{FrameMemory, Pixels};
use super::yuv::YuvLayout;

/// Pixel layouts of a frame, by their names in `sensor_msgs/image_encodings`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Encoding {
    /// Red, green, blue; 8 bits each.
    Rgb8,
    /// Blue, green, red; 8 bits each.
    Bgr8,
    /// Red, green, blue, alpha; alpha is ignored.
    Rgba8,
    /// Blue, green, red, alpha; alpha is ignored.
    Bgra8,
    /// One grey byte, used for all three channels.
    Mono8,
}

impl Encoding {
    /// Every supported encoding with its ROS name.
    pub const ALL: [(Encoding, &'static str); 5] = [
        (Encoding::Rgb8, "rgb8"),
        (Encoding::Bgr8, "bgr8"),
        (Encoding::Rgba8, "rgba8"),
        (Encoding::Bgra8, "bgra8"),
        (Encoding::Mono8, "mono8"),
    ];

    /// The encoding of that ROS name.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.iter().find(|(_, n)| *n == name).map(|(e, _)| *e)
    }

    /// Bytes of one pixel.
    pub fn bytes_per_pixel(self) -> usize {
        match self {
            Encoding::Rgb8 | Encoding::Bgr8 => 3,
            Encoding::Rgba8 | Encoding::Bgra8 => 4,
            Encoding::Mono8 => 1,
        }
    }
}

/// A camera frame; cheap to clone, the pixels are shared.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Frame {
    width: usize,
    height: usize,
    step: usize,
    encoding: Encoding,
    data: Pixels,
}

impl Frame {
    /// Largest side accepted, in pixels: a corrupt header must not make anybody allocate gigabytes.
    pub const MAX_SIDE: usize = 8192;

    /// A frame of `height` rows of `step` bytes, of which the first `width · bytes_per_pixel` are pixels. The layouts
    /// with shared colour (yuv422, uyvy, yuv422_yuy2, yuyv, nv12, nv21) become rgb8.
    pub fn new(width: usize, height: usize, step: usize, encoding: &str, data: Vec<u8>) -> Result<Self, ModelError> {
        if width == 0 || height == 0 || width > Self::MAX_SIDE || height > Self::MAX_SIDE {
            return Err(ModelError::Frame {
                reason: format!("size {width}x{height} is outside 1x1 to {0}x{0}", Self::MAX_SIDE),
                remedy: "check the camera driver".into(),
            });
        }
        if let Some(yuv) = YuvLayout::from_name(encoding) {
            let rgb = yuv.to_rgb(width, height, step, &data)?;
            return Ok(Self { width, height, step: 3 * width, encoding: Encoding::Rgb8, data: Pixels::new(rgb) });
        }
        let found = Encoding::from_name(encoding).ok_or_else(|| {
            let known = Encoding::ALL.iter().map(|(_, n)| *n).chain(YuvLayout::ALL.iter().map(|(_, n)| *n));
            ModelError::Frame {
                reason: format!("encoding '{encoding}' is not supported"),
                remedy: format!("publish one of {}", known.collect::<Vec<_>>().join(", ")),
            }
        })?;
        if step < width * found.bytes_per_pixel() || data.len() < step * (height - 1) + width * found.bytes_per_pixel()
        {
            return Err(ModelError::Frame {
                reason: format!(
                    "{} bytes with step {step} are too few for {width}x{height} {encoding} ({} bytes a row)",
                    data.len(),
                    width * found.bytes_per_pixel()
                ),
                remedy: "check that the publisher fills step, width, height and encoding for the data it sends".into(),
            });
        }
        Ok(Self { width, height, step, encoding: found, data: Pixels::new(data) })
    }

    /// Pixels a row.
    pub fn width(&self) -> usize {
        self.width
    }

    /// Rows.
    pub fn height(&self) -> usize {
        self.height
    }

    /// Bytes a row, padding included.
    pub fn step(&self) -> usize {
        self.step
    }

    /// Pixel layout.
    pub fn encoding(&self) -> Encoding {
        self.encoding
    }

    /// All bytes, rows `step` apart.
    pub fn data(&self) -> &[u8] {
        &self.data
    }

    /// The same, to be asked what memory they are in.
    pub fn pixels(&self) -> &Pixels {
        &self.data
    }

    /// The same frame with its bytes in `memory`; on the heap where that is none or has no room.
    pub fn kept_in(mut self, memory: Option<&dyn FrameMemory>) -> Self {
        match memory.and_then(|m| m.keep(&self.data)) {
            Some(kept) => self.data = kept,
            None if self.data.held_by::<Vec<u8>>().is_none() => self.data = Pixels::new(self.data.to_vec()),
            None => {}
        }
        self
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    #[test]
    fn a_frame_must_hold_what_its_header_says() {
        assert!(Frame::new(4, 2, 12, "rgb8", vec![0; 24]).is_ok());
        assert!(Frame::new(4, 2, 16, "rgb8", vec![0; 28]).is_ok(), "the last row needs no padding");
        for (w, h, step, encoding, bytes, says) in [
            (4, 2, 12, "rgb8", 23, "too few"),
            (4, 2, 11, "rgb8", 24, "too few"),
            (0, 2, 12, "rgb8", 24, "outside"),
            (4, 9000, 12, "rgb8", 24, "outside"),
            (4, 2, 12, "16UC1", 24, "'16UC1' is not supported"),
        ] {
            let e = Frame::new(w, h, step, encoding, vec![0; bytes]).unwrap_err().to_string();
            assert!(e.contains(says), "{e}");
        }
    }

    /// Memory of one place, which is free as long as nobody holds it.
    struct OnePlace(Arc<()>);

    struct Kept {
        bytes: Vec<u8>,
        _place: Arc<()>,
    }

    impl AsRef<[u8]> for Kept {
        fn as_ref(&self) -> &[u8] {
            &self.bytes
        }
    }

    impl FrameMemory for OnePlace {
        fn keep(&self, bytes: &[u8]) -> Option<Pixels> {
            (Arc::strong_count(&self.0) == 1)
                .then(|| Pixels::new(Kept { bytes: bytes.to_vec(), _place: self.0.clone() }))
        }
    }

    #[test]
    fn a_frame_is_the_same_wherever_its_bytes_are() {
        let frame = |value| Frame::new(4, 2, 12, "rgb8", vec![value; 24]).unwrap();
        let on_the_heap = |f: &Frame| f.pixels().held_by::<Vec<u8>>().is_some();
        let memory = OnePlace(Arc::default());
        let kept = frame(7).kept_in(Some(&memory));
        assert!(kept.pixels().held_by::<Kept>().is_some() && !on_the_heap(&kept));
        assert_eq!(kept, frame(7));
        assert_ne!(kept, frame(8));
        let no_room = frame(8).kept_in(Some(&memory));
        assert!(on_the_heap(&no_room));
        assert_eq!(no_room, frame(8));
        let copy = kept.clone();
        let moved = kept.kept_in(None);
        assert!(on_the_heap(&moved) && copy.pixels().held_by::<Kept>().is_some());
        assert_eq!(moved, copy);
        drop(copy);
        assert!(moved.kept_in(Some(&memory)).pixels().held_by::<Kept>().is_some());
    }
}
