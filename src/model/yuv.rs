//! Camera layouts with shared colour, turned into rgb8 on arrival: everything after it knows packed pixels only.
//!
//! Colours are BT.601 in studio range (Y 16 to 235, U and V 16 to 240), which is what USB cameras send and what
//! OpenCV, and with it cv_bridge, takes these layouts for. Reference: Recommendation ITU-R BT.601-7.

use super::ModelError;

/// Where brightness (Y) and colour (U, V) of the pixels lie, by the names of `sensor_msgs/image_encodings`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum YuvLayout {
    /// U Y V Y: two pixels in four bytes.
    Uyvy,
    /// Y U Y V: two pixels in four bytes.
    Yuyv,
    /// All Y, then a plane of U V pairs, each for 2×2 pixels.
    Nv12,
    /// All Y, then a plane of V U pairs, each for 2×2 pixels.
    Nv21,
}

impl YuvLayout {
    /// Every layout with its names.
    pub const ALL: [(YuvLayout, &'static str); 6] = [
        (YuvLayout::Uyvy, "yuv422"),
        (YuvLayout::Uyvy, "uyvy"),
        (YuvLayout::Yuyv, "yuv422_yuy2"),
        (YuvLayout::Yuyv, "yuyv"),
        (YuvLayout::Nv12, "nv12"),
        (YuvLayout::Nv21, "nv21"),
    ];

    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.iter().find(|(_, n)| *n == name).map(|(l, _)| *l)
    }

    /// `width`×`height` pixels as rgb8 without padding. `step` is the length of a row of Y (and, for the layouts with
    /// planes, of a row of the second plane) in bytes.
    pub fn to_rgb(self, width: usize, height: usize, step: usize, data: &[u8]) -> Result<Vec<u8>, ModelError> {
        let planes = matches!(self, YuvLayout::Nv12 | YuvLayout::Nv21);
        let wrong = |reason: String| ModelError::Frame {
            reason,
            remedy: "check that the publisher fills step, width, height and encoding for the data it sends".into(),
        };
        if width % 2 == 1 || (planes && height % 2 == 1) {
            return Err(wrong(format!("{width}x{height} cannot share colour between two pixels: a side is odd")));
        }
        let row = if planes { width } else { 2 * width };
        let rows = if planes { height + height / 2 } else { height };
        if step < row || data.len() < step * (rows - 1) + row {
            return Err(wrong(format!(
                "{} bytes with step {step} are too few for {width}x{height} ({rows} rows of {row} bytes)",
                data.len()
            )));
        }
        let mut rgb = vec![0; 3 * width * height];
        for (y, out) in rgb.chunks_exact_mut(3 * width).enumerate() {
            let line = &data[y * step..][..row];
            let pairs = out.chunks_exact_mut(6);
            match self {
                YuvLayout::Uyvy => pairs.zip(line.chunks_exact(4)).for_each(|(o, i)| pair(o, [i[1], i[3]], i[0], i[2])),
                YuvLayout::Yuyv => pairs.zip(line.chunks_exact(4)).for_each(|(o, i)| pair(o, [i[0], i[2]], i[1], i[3])),
                YuvLayout::Nv12 | YuvLayout::Nv21 => {
                    let colours = &data[(height + y / 2) * step..][..row];
                    let (u, v) = if self == YuvLayout::Nv12 { (0, 1) } else { (1, 0) };
                    pairs
                        .zip(line.chunks_exact(2).zip(colours.chunks_exact(2)))
                        .for_each(|(o, (l, c))| pair(o, [l[0], l[1]], c[u], c[v]));
                }
            }
        }
        Ok(rgb)
    }
}

/// Fixed point with 16 bits after the point.
const ONE: f64 = 65536.0;
/// Full range over the range of Y, and over that of U and V.
const LUMA: i32 = (ONE * 255.0 / 219.0 + 0.5) as i32;
const CHROMA: f64 = ONE * 255.0 / 224.0;
/// BT.601: R - Y, B - Y, and their parts in G - Y, from the weights 0.299, 0.587, 0.114.
const RED_V: i32 = (CHROMA * 2.0 * (1.0 - 0.299) + 0.5) as i32;
const BLUE_U: i32 = (CHROMA * 2.0 * (1.0 - 0.114) + 0.5) as i32;
const GREEN_U: i32 = (CHROMA * 2.0 * (1.0 - 0.114) * 0.114 / 0.587 + 0.5) as i32;
const GREEN_V: i32 = (CHROMA * 2.0 * (1.0 - 0.299) * 0.299 / 0.587 + 0.5) as i32;

fn pair(out: &mut [u8], y: [u8; 2], u: u8, v: u8) {
    let (u, v) = (i32::from(u) - 128, i32::from(v) - 128);
    for (out, y) in out.chunks_exact_mut(3).zip(y) {
        let y = (i32::from(y) - 16).max(0) * LUMA + (1 << 15);
        let byte = |x: i32| (x >> 16).clamp(0, 255) as u8;
        out[0] = byte(y + RED_V * v);
        out[1] = byte(y - GREEN_U * u - GREEN_V * v);
        out[2] = byte(y + BLUE_U * u);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Colours of a test picture as (Y, U, V) by BT.601 and in RGB.
    const BARS: [([u8; 3], [u8; 3]); 5] = [
        ([235, 128, 128], [255, 255, 255]),
        ([16, 128, 128], [0, 0, 0]),
        ([81, 90, 240], [255, 0, 0]),
        ([145, 54, 34], [0, 255, 0]),
        ([41, 240, 110], [0, 0, 255]),
    ];

    fn near(a: &[u8], b: [u8; 3]) -> bool {
        a.iter().zip(b).all(|(a, b)| a.abs_diff(b) <= 2)
    }

    #[test]
    fn the_colours_of_bars_come_out_in_every_layout() {
        for ([y, u, v], rgb) in BARS {
            let step = 10; // rows are padded
            let padded = |row: &[u8]| row.iter().copied().chain(std::iter::repeat(77)).take(step).collect::<Vec<_>>();
            let four = |row: [u8; 4]| [padded(&[row, row].concat()), padded(&[row, row].concat())].concat();
            let planes = |c: [u8; 2]| [padded(&[y; 4]), padded(&[y; 4]), padded(&[c, c].concat())].concat();
            for (layout, data) in [
                (YuvLayout::Uyvy, four([u, y, v, y])),
                (YuvLayout::Yuyv, four([y, u, y, v])),
                (YuvLayout::Nv12, planes([u, v])),
                (YuvLayout::Nv21, planes([v, u])),
            ] {
                let out = layout.to_rgb(4, 2, step, &data).unwrap();
                assert_eq!(out.len(), 24);
                assert!(out.chunks(3).all(|p| near(p, rgb)), "{layout:?} {rgb:?}: {out:?}");
            }
        }
    }

    #[test]
    fn each_pixel_has_its_own_brightness_and_its_neighbours_colour() {
        let grey = |y: u8| u8::try_from((u32::from(y) - 16) * 255 / 219).unwrap();
        let out = YuvLayout::Yuyv.to_rgb(2, 1, 4, &[100, 128, 200, 128]).unwrap();
        assert!(near(&out[..3], [grey(100); 3]) && near(&out[3..], [grey(200); 3]), "{out:?}");
        let out = YuvLayout::Nv12.to_rgb(2, 2, 2, &[20, 60, 100, 200, 128, 128]).unwrap();
        for (pixel, y) in out.chunks(3).zip([20, 60, 100, 200]) {
            assert!(near(pixel, [grey(y); 3]), "{out:?}");
        }
    }

    #[test]
    fn too_few_bytes_and_odd_sides_are_refused() {
        for (layout, w, h, step, bytes, says) in [
            (YuvLayout::Uyvy, 4, 2, 8, 15, "too few"),
            (YuvLayout::Uyvy, 4, 2, 7, 99, "too few"),
            (YuvLayout::Nv12, 4, 2, 4, 11, "too few"),
            (YuvLayout::Nv12, 4, 3, 4, 99, "odd"),
            (YuvLayout::Yuyv, 3, 2, 8, 99, "odd"),
        ] {
            let e = layout.to_rgb(w, h, step, &vec![0; bytes]).unwrap_err().to_string();
            assert!(e.contains(says), "{e}");
        }
        assert!(YuvLayout::Nv12.to_rgb(4, 2, 4, &[0; 12]).is_ok());
    }
}
