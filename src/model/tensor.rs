//! Tensors as views of a memory-mapped file.

use std::ops::{Deref, Range};
use std::path::Path;
use std::sync::Arc;

use half::{bf16, f16};
use memmap2::Mmap;

use super::ModelError;

/// Element types a weight may have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Dtype {
    /// IEEE single precision.
    F32,
    /// Brain float.
    Bf16,
    /// IEEE half precision.
    F16,
}

impl Dtype {
    /// Bytes of one element.
    pub fn size(self) -> usize {
        match self {
            Dtype::F32 => 4,
            Dtype::Bf16 | Dtype::F16 => 2,
        }
    }

    pub(super) fn of(dtype: safetensors::Dtype) -> Option<Self> {
        match dtype {
            safetensors::Dtype::F32 => Some(Dtype::F32),
            safetensors::Dtype::BF16 => Some(Dtype::Bf16),
            safetensors::Dtype::F16 => Some(Dtype::F16),
            _ => None,
        }
    }
}

/// A memory-mapped file and where it lies; tensors keep it alive.
#[derive(Debug)]
pub(super) struct Mapped {
    pub(super) path: Box<Path>,
    pub(super) map: Mmap,
}

/// A tensor of a checkpoint: little-endian elements, row-major, in the mapped file. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Tensor {
    file: Arc<Mapped>,
    name: Arc<str>,
    dtype: Dtype,
    shape: Vec<usize>,
    range: Range<usize>,
}

impl Tensor {
    /// `range` must lie in the map and hold `shape` elements; the checkpoint has checked both.
    pub(super) fn new(file: Arc<Mapped>, name: &str, dtype: Dtype, shape: Vec<usize>, range: Range<usize>) -> Self {
        Self { file, name: name.into(), dtype, shape, range }
    }

    /// Dimensions, outermost first.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// Element type in the file.
    pub fn dtype(&self) -> Dtype {
        self.dtype
    }

    /// The elements as they lie in the file.
    pub fn bytes(&self) -> &[u8] {
        &self.file.map[self.range.clone()]
    }

    /// All elements as f32: a view of the file where it holds aligned F32, a converted copy otherwise.
    pub fn to_f32(&self) -> Weight {
        let in_place = self.dtype == Dtype::F32
            && cfg!(target_endian = "little")
            && bytemuck::try_cast_slice::<u8, f32>(self.bytes()).is_ok();
        if in_place {
            return Weight(Values::Mapped { file: Arc::clone(&self.file), range: self.range.clone() });
        }
        let mut values = vec![0.0; self.bytes().len() / self.dtype.size()];
        convert(self.dtype, self.bytes(), &mut values);
        values.into()
    }

    /// Row `row` of a matrix `[rows, out.len()]`: an embedding look-up that touches only that row of the file.
    pub fn row_f32(&self, row: usize, out: &mut [f32]) -> Result<(), ModelError> {
        let refuse = |expected: String, found: String| ModelError::Tensor {
            path: self.file.path.to_path_buf(),
            tensor: self.name.to_string(),
            expected,
            found,
        };
        let [rows, width] = self.shape[..] else {
            return Err(refuse("a matrix".into(), format!("shape {:?}", self.shape)));
        };
        if row >= rows || out.len() != width {
            let expected = format!("a row below {rows} of {width} values");
            return Err(refuse(expected, format!("row {row} of {} values", out.len())));
        }
        let bytes = width * self.dtype.size();
        convert(self.dtype, &self.bytes()[row * bytes..(row + 1) * bytes], out);
        Ok(())
    }
}

fn convert(dtype: Dtype, bytes: &[u8], out: &mut [f32]) {
    match dtype {
        Dtype::F32 => {
            for (o, b) in out.iter_mut().zip(bytes.as_chunks::<4>().0) {
                *o = f32::from_le_bytes(*b);
            }
        }
        Dtype::Bf16 => {
            for (o, b) in out.iter_mut().zip(bytes.as_chunks::<2>().0) {
                *o = bf16::from_le_bytes(*b).to_f32();
            }
        }
        Dtype::F16 => {
            for (o, b) in out.iter_mut().zip(bytes.as_chunks::<2>().0) {
                *o = f16::from_le_bytes(*b).to_f32();
            }
        }
    }
}

/// f32 values that either borrow a mapped file or own their memory. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Weight(Values);

#[derive(Debug, Clone)]
enum Values {
    Mapped { file: Arc<Mapped>, range: Range<usize> },
    Owned(Arc<Vec<f32>>),
}

impl Weight {
    /// Whether the values are read from the mapped file in place.
    pub fn is_mapped(&self) -> bool {
        matches!(self.0, Values::Mapped { .. })
    }
}

impl From<Vec<f32>> for Weight {
    fn from(values: Vec<f32>) -> Self {
        Self(Values::Owned(Arc::new(values)))
    }
}

impl Deref for Weight {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        match &self.0 {
            // Size and alignment were checked in `to_f32`, and a map does not move.
            Values::Mapped { file, range } => bytemuck::cast_slice(&file.map[range.clone()]),
            Values::Owned(values) => values,
        }
    }
}
