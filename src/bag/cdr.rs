//! CDR as ROS 2 puts it on the wire and into bags: XCDR version 1, either byte order on reading, little-endian on writing.
//!
//! Four bytes name the encoding; every number after them is aligned to its size, counted from there.

/// Encoding header of little-endian XCDR1.
const LITTLE: [u8; 4] = [0, 1, 0, 0];

/// Why bytes are not the message they should be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CdrError {
    /// The first four bytes.
    #[error("encoding {0:02x} {1:02x} is not plain CDR")]
    Encoding(u8, u8),
    /// Fewer bytes than the message needs.
    #[error("{need} bytes needed at byte {at}, {left} left")]
    Short {
        /// Where.
        at: usize,
        /// For what comes next.
        need: usize,
        /// There.
        left: usize,
    },
    /// Text that is not UTF-8.
    #[error("text at byte {at} is not UTF-8")]
    Text {
        /// Where.
        at: usize,
    },
}

/// Writes one message.
#[derive(Debug)]
pub struct CdrWriter(Vec<u8>);

impl Default for CdrWriter {
    fn default() -> Self {
        Self(LITTLE.to_vec())
    }
}

macro_rules! numbers {
    ($($name:ident: $t:ty),*) => {
        impl CdrWriter {
            $(
                #[doc = concat!("One `", stringify!($t), "`.")]
                pub fn $name(&mut self, x: $t) {
                    self.align(size_of::<$t>());
                    self.0.extend_from_slice(&x.to_le_bytes());
                }
            )*
        }

        impl CdrReader<'_> {
            $(
                #[doc = concat!("One `", stringify!($t), "`.")]
                pub fn $name(&mut self) -> Result<$t, CdrError> {
                    self.align(size_of::<$t>());
                    let mut bytes = [0; size_of::<$t>()];
                    bytes.copy_from_slice(self.take(size_of::<$t>())?);
                    Ok(if self.big { <$t>::from_be_bytes(bytes) } else { <$t>::from_le_bytes(bytes) })
                }
            )*
        }
    };
}
numbers!(u8: u8, u32: u32, i32: i32, u64: u64, f64: f64);

impl CdrWriter {
    fn align(&mut self, to: usize) {
        let body = self.0.len() - LITTLE.len();
        self.0.resize(LITTLE.len() + body.next_multiple_of(to), 0);
    }

    /// Length of a sequence whose items follow; more than 2³² items cannot be said and are cut off by the caller.
    pub fn length(&mut self, items: usize) {
        self.u32(u32::try_from(items).unwrap_or(u32::MAX));
    }

    /// Text; what follows a NUL could not be read back and is left out.
    pub fn text(&mut self, s: &str) {
        let s = s.split('\0').next().unwrap_or_default();
        self.length(s.len() + 1);
        self.0.extend_from_slice(s.as_bytes());
        self.0.push(0);
    }

    /// Texts.
    pub fn texts<S: AsRef<str>>(&mut self, items: impl ExactSizeIterator<Item = S>) {
        self.length(items.len());
        items.for_each(|s| self.text(s.as_ref()));
    }

    /// Doubles.
    pub fn doubles(&mut self, items: &[f64]) {
        self.length(items.len());
        if !items.is_empty() {
            self.align(8);
            self.0.extend(items.iter().flat_map(|x| x.to_le_bytes()));
        }
    }

    /// Bytes.
    pub fn bytes(&mut self, items: &[u8]) {
        self.length(items.len());
        self.0.extend_from_slice(items);
    }

    /// The message.
    pub fn finish(self) -> Vec<u8> {
        self.0
    }
}

/// Reads one message.
#[derive(Debug)]
pub struct CdrReader<'a> {
    body: &'a [u8],
    at: usize,
    big: bool,
}

impl<'a> CdrReader<'a> {
    /// A reader behind the encoding header.
    pub fn new(data: &'a [u8]) -> Result<Self, CdrError> {
        let Some((head, body)) = data.split_at_checked(LITTLE.len()) else {
            return Err(CdrError::Short { at: 0, need: LITTLE.len(), left: data.len() });
        };
        match head {
            [0, 0 | 1, ..] => Ok(Self { body, at: 0, big: head[1] == 0 }),
            _ => Err(CdrError::Encoding(head[0], head[1])),
        }
    }

    fn align(&mut self, to: usize) {
        self.at = self.at.next_multiple_of(to);
    }

    fn take(&mut self, n: usize) -> Result<&'a [u8], CdrError> {
        let left = self.body.len().saturating_sub(self.at);
        let short = CdrError::Short { at: self.at, need: n, left };
        let bytes = self.body.get(self.at..).and_then(|b| b.get(..n)).ok_or(short)?;
        self.at += n;
        Ok(bytes)
    }

    /// Length of a sequence of items of at least `size` bytes each: a corrupt length is found before memory is asked for.
    pub fn length(&mut self, size: usize) -> Result<usize, CdrError> {
        let n = self.u32()? as usize;
        let left = self.body.len().saturating_sub(self.at);
        match n.checked_mul(size) {
            Some(need) if need <= left => Ok(n),
            need => Err(CdrError::Short { at: self.at, need: need.unwrap_or(usize::MAX), left }),
        }
    }

    /// Text.
    pub fn text(&mut self) -> Result<String, CdrError> {
        let n = self.length(1)?;
        let at = self.at;
        let bytes = self.take(n)?;
        let text = bytes.strip_suffix(&[0]).unwrap_or(bytes);
        std::str::from_utf8(text).map(str::to_owned).map_err(|_| CdrError::Text { at })
    }

    /// Texts.
    pub fn texts(&mut self) -> Result<Vec<String>, CdrError> {
        (0..self.length(4)?).map(|_| self.text()).collect()
    }

    /// Doubles.
    pub fn doubles(&mut self) -> Result<Vec<f64>, CdrError> {
        (0..self.length(8)?).map(|_| self.f64()).collect()
    }

    /// Bytes.
    pub fn bytes(&mut self) -> Result<&'a [u8], CdrError> {
        let n = self.length(1)?;
        self.take(n)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn numbers_are_aligned_from_behind_the_header() {
        let mut w = CdrWriter::default();
        w.u8(7);
        w.f64(1.5);
        w.text("ab");
        w.u32(9);
        let data = w.finish();
        assert_eq!(data[4..12], [7, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(data[20..28], [3, 0, 0, 0, b'a', b'b', 0, 0]);
        assert_eq!(data.len(), 32);
        let mut r = CdrReader::new(&data).unwrap();
        assert_eq!((r.u8(), r.f64(), r.text(), r.u32()), (Ok(7), Ok(1.5), Ok("ab".into()), Ok(9)));
        assert!(matches!(r.u8(), Err(CdrError::Short { left: 0, .. })));
    }

    #[test]
    fn big_endian_is_read_and_other_encodings_are_refused() {
        let mut r = CdrReader::new(&[0, 0, 0, 0, 0, 0, 0, 5]).unwrap();
        assert_eq!(r.u32(), Ok(5));
        assert_eq!(CdrReader::new(&[0, 3, 0, 0]).unwrap_err(), CdrError::Encoding(0, 3));
        assert!(CdrReader::new(&[0, 1]).is_err());
    }

    #[test]
    fn a_corrupt_length_asks_for_no_memory() {
        let mut r = CdrReader::new(&[0, 1, 0, 0, 255, 255, 255, 255]).unwrap();
        assert!(matches!(r.doubles(), Err(CdrError::Short { .. })));
    }

    proptest! {
        #[test]
        fn what_is_written_is_read(a in any::<u8>(), texts in prop::collection::vec("[^\0]{0,9}", 0..5),
                                   doubles in prop::collection::vec(any::<f64>(), 0..9), b in any::<u64>()) {
            let mut w = CdrWriter::default();
            w.u8(a);
            w.texts(texts.iter());
            w.doubles(&doubles);
            w.u64(b);
            let data = w.finish();
            let mut r = CdrReader::new(&data).unwrap();
            prop_assert_eq!(r.u8().unwrap(), a);
            prop_assert_eq!(r.texts().unwrap(), texts);
            let bits = |v: &[f64]| v.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
            prop_assert_eq!(bits(&r.doubles().unwrap()), bits(&doubles));
            prop_assert_eq!(r.u64().unwrap(), b);
        }

        #[test]
        fn garbage_never_panics(data in prop::collection::vec(any::<u8>(), 0..64)) {
            if let Ok(mut r) = CdrReader::new(&data) {
                let _ = (r.texts(), r.doubles(), r.bytes(), r.text());
            }
        }
    }
}
