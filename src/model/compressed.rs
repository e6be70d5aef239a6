//! JPEG and PNG pictures as frames. What the data is, is read from the data: the `format` of a
//! `sensor_msgs/CompressedImage` is written in many ways.

use std::io::Cursor;

use png::{ColorType, Transformations};
use zune_jpeg::JpegDecoder;
use zune_jpeg::zune_core::bytestream::ZCursor;
use zune_jpeg::zune_core::colorspace::ColorSpace;
use zune_jpeg::zune_core::options::DecoderOptions;

use super::{Frame, ModelError};

const JPEG: &[u8] = &[0xff, 0xd8, 0xff];
const END_OF_JPEG: &[u8] = &[0xff, 0xd9];
const PNG: &[u8] = &[0x89, b'P', b'N', b'G', 0x0d, 0x0a, 0x1a, 0x0a];

impl Frame {
    /// The frame of a JPEG or PNG picture: rgb8, rgba8 or mono8. A picture that is damaged or cut short is an error, not
    /// half a picture.
    pub fn decode(data: &[u8]) -> Result<Self, ModelError> {
        if data.starts_with(JPEG) {
            jpeg(data)
        } else if data.starts_with(PNG) {
            png(data)
        } else {
            let head: Vec<String> = data.iter().take(4).map(|b| format!("{b:02x}")).collect();
            Err(ModelError::Frame {
                reason: format!(
                    "{} compressed bytes that begin with '{}' are neither JPEG nor PNG",
                    data.len(),
                    head.join(" ")
                ),
                remedy: "set the format of the publisher to jpeg or png".into(),
            })
        }
    }
}

fn damaged(kind: &str, bytes: usize, why: impl std::fmt::Display) -> ModelError {
    ModelError::Frame {
        reason: format!("{bytes} bytes of {kind} cannot be decoded: {why}"),
        remedy: "check the publisher and the network for cut messages".into(),
    }
}

fn jpeg(data: &[u8]) -> Result<Frame, ModelError> {
    let wrong = |why: &dyn std::fmt::Display| damaged("JPEG", data.len(), why);
    // The decoder fills what is missing with grey; cameras pad with zeros.
    let end = data.iter().rposition(|b| *b != 0).map_or(0, |last| last + 1);
    if !data[..end].ends_with(END_OF_JPEG) {
        return Err(wrong(&"its end is missing"));
    }
    let options = DecoderOptions::default()
        .set_strict_mode(true)
        .set_max_width(Frame::MAX_SIDE)
        .set_max_height(Frame::MAX_SIDE)
        .jpeg_set_out_colorspace(ColorSpace::RGB);
    let mut decoder = JpegDecoder::new_with_options(ZCursor::new(data), options);
    let pixels = decoder.decode().map_err(|e| wrong(&e))?;
    let (width, height) = decoder.dimensions().ok_or_else(|| wrong(&"it has no size"))?;
    Frame::new(width, height, 3 * width, "rgb8", pixels)
}

fn png(data: &[u8]) -> Result<Frame, ModelError> {
    let wrong = |why: &dyn std::fmt::Display| damaged("PNG", data.len(), why);
    let mut decoder = png::Decoder::new(Cursor::new(data));
    decoder.set_transformations(Transformations::normalize_to_color8());
    let header = decoder.read_header_info().map_err(|e| wrong(&e))?;
    let (width, height) = (header.width as usize, header.height as usize);
    // Before anything is allocated for it.
    if width > Frame::MAX_SIDE || height > Frame::MAX_SIDE {
        return Err(wrong(&format!("its size {width}x{height} is outside 1x1 to {0}x{0}", Frame::MAX_SIDE)));
    }
    let mut reader = decoder.read_info().map_err(|e| wrong(&e))?;
    let bytes = reader.output_buffer_size().ok_or_else(|| wrong(&"it is too large"))?;
    let mut pixels = vec![0; bytes];
    let info = reader.next_frame(&mut pixels).map_err(|e| wrong(&e))?;
    let (encoding, step) = match info.color_type {
        ColorType::Rgb => ("rgb8", 3 * width),
        ColorType::Rgba => ("rgba8", 4 * width),
        ColorType::Grayscale => ("mono8", width),
        ColorType::GrayscaleAlpha => {
            let grey: Vec<u8> = pixels.chunks_exact(2).map(|p| p[0]).collect();
            return Frame::new(width, height, width, "mono8", grey);
        }
        ColorType::Indexed => return Err(wrong(&"its palette was not expanded")),
    };
    Frame::new(width, height, step, encoding, pixels)
}

#[cfg(test)]
mod tests {
    use rand::{Rng, SeedableRng};
    use rand_chacha::ChaCha8Rng;

    use super::*;
    use crate::model::Encoding;

    /// 32×16: the left half (200, 40, 40), the right half (40, 80, 200); quality 95, colour at half width and height.
    const BASELINE: &[u8] = include_bytes!("../../tests/fixtures/images/halves.jpg");
    /// The same picture, progressive.
    const PROGRESSIVE: &[u8] = include_bytes!("../../tests/fixtures/images/halves_progressive.jpg");
    /// Its brightness alone.
    const GREY: &[u8] = include_bytes!("../../tests/fixtures/images/halves_grey.jpg");

    fn encode(color: ColorType, depth: png::BitDepth, size: (u32, u32), pixels: &[u8]) -> Vec<u8> {
        let mut out = Vec::new();
        let mut encoder = png::Encoder::new(&mut out, size.0, size.1);
        encoder.set_color(color);
        encoder.set_depth(depth);
        encoder.write_header().unwrap().write_image_data(pixels).unwrap();
        out
    }

    fn near(pixel: &[u8], wanted: [u8; 3]) -> bool {
        pixel.iter().zip(wanted).all(|(a, b)| a.abs_diff(b) <= 4)
    }

    #[test]
    fn jpeg_pictures_are_what_was_taken() {
        let padded = [BASELINE, &[0; 7]].concat();
        for (data, left, right) in [
            (BASELINE, [200, 40, 40], [40, 80, 200]),
            (PROGRESSIVE, [200, 40, 40], [40, 80, 200]),
            (&padded, [200, 40, 40], [40, 80, 200]),
            (GREY, [88; 3], [82; 3]),
        ] {
            let frame = Frame::decode(data).unwrap();
            assert_eq!((frame.width(), frame.height(), frame.encoding()), (32, 16, Encoding::Rgb8));
            let pixel = |x: usize, y: usize| &frame.data()[y * frame.step() + 3 * x..][..3];
            assert!(near(pixel(4, 8), left) && near(pixel(27, 3), right), "{:?} {:?}", pixel(4, 8), pixel(27, 3));
        }
    }

    #[test]
    fn png_pictures_are_what_was_taken() {
        let rgb: Vec<u8> = (0..24).collect();
        let frame = Frame::decode(&encode(ColorType::Rgb, png::BitDepth::Eight, (4, 2), &rgb)).unwrap();
        assert_eq!((frame.encoding(), frame.data()), (Encoding::Rgb8, &rgb[..]));
        let rgba: Vec<u8> = (0..32).collect();
        let frame = Frame::decode(&encode(ColorType::Rgba, png::BitDepth::Eight, (4, 2), &rgba)).unwrap();
        assert_eq!((frame.encoding(), frame.data()), (Encoding::Rgba8, &rgba[..]));
        let frame =
            Frame::decode(&encode(ColorType::Grayscale, png::BitDepth::Sixteen, (2, 1), &[9, 1, 7, 2])).unwrap();
        assert_eq!((frame.encoding(), frame.data()), (Encoding::Mono8, &[9, 7][..]));
        let frame =
            Frame::decode(&encode(ColorType::GrayscaleAlpha, png::BitDepth::Eight, (2, 1), &[9, 1, 7, 2])).unwrap();
        assert_eq!((frame.encoding(), frame.data()), (Encoding::Mono8, &[9, 7][..]));
    }

    #[test]
    fn what_is_no_picture_is_named() {
        let png = encode(ColorType::Rgb, png::BitDepth::Eight, (4, 2), &[7; 24]);
        let mut huge = png.clone();
        huge[16..20].copy_from_slice(&100_000u32.to_be_bytes());
        for (data, says) in [
            (&b"GIF89a"[..], "6 compressed bytes that begin with '47 49 46 38' are neither JPEG nor PNG"),
            (&[], "0 compressed bytes"),
            (&BASELINE[..BASELINE.len() / 2], "its end is missing"),
            (&png[..png.len() / 2], "of PNG cannot be decoded"),
            (&huge, "of PNG cannot be decoded"),
        ] {
            let e = Frame::decode(data).unwrap_err().to_string();
            assert!(e.contains(says), "{e}");
        }
    }

    #[test]
    fn no_damage_makes_a_decoder_panic() {
        let png = encode(ColorType::Rgb, png::BitDepth::Eight, (16, 8), &[99; 384]);
        let mut rng = ChaCha8Rng::seed_from_u64(1);
        let mut refused = 0;
        for original in [BASELINE, PROGRESSIVE, GREY, &png] {
            for _ in 0..1000 {
                let mut data = original.to_vec();
                for _ in 0..rng.random_range(1..8) {
                    let at = rng.random_range(3..data.len() - 2);
                    data[at] = rng.random();
                }
                refused += usize::from(Frame::decode(&data).is_err());
            }
        }
        assert!(refused > 1000, "{refused} of 4000 were refused");
    }
}
