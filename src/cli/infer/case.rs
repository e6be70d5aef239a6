//! The safetensors layout of a case: inputs of one inference and, where there are, the outputs of a reference.

use std::path::Path;

use safetensors::tensor::{Dtype, SafeTensors, TensorView};

use super::CliError;
use crate::engine::GuidanceSchedule;
use crate::model::{Dims, ModelError};

/// Inputs packed to what is valid: masked views and padding are left out.
pub(super) struct Case {
    /// `[3, size, size]` each.
    pub(super) views: Vec<Vec<f32>>,
    pub(super) tokens: Vec<u32>,
    pub(super) state: Vec<f32>,
    pub(super) noise: Vec<f32>,
    /// What is left of the previous chunk, `[rows, action_dim]`.
    pub(super) previous: Option<Vec<f32>>,
    pub(super) reference: Reference,
}

/// Outputs of the policy that made the case.
pub(super) struct Reference {
    /// Valid rows only.
    pub(super) prefix_embs: Option<Vec<f32>>,
    pub(super) velocities: Option<Vec<f32>>,
    pub(super) actions: Option<Vec<f32>>,
    /// In the order of [`GuidanceSchedule::NAMES`].
    guided: Vec<Option<Vec<f32>>>,
}

impl Reference {
    /// The guided actions of one schedule.
    pub(super) fn guided(&self, schedule: GuidanceSchedule) -> Option<&[f32]> {
        self.guided.get(schedule as usize)?.as_deref()
    }
}

impl Case {
    pub(super) fn read(path: &Path, dims: &Dims) -> Result<Self, CliError> {
        let bytes = std::fs::read(path).map_err(|source| ModelError::Io { path: path.into(), source })?;
        let file = SafeTensors::deserialize(&bytes)
            .map_err(|e| ModelError::File { path: path.into(), reason: format!("not a safetensors file: {e}") })?;
        let file = Tensors { path, file };

        let views_valid = file.mask("in.image_mask")?;
        let size = dims.vision.image;
        let mut views = Vec::new();
        for (n, valid) in views_valid.iter().enumerate() {
            if *valid {
                views.push(file.floats(&format!("in.image.{n}"), &[Some(3), Some(size), Some(size)])?);
            }
        }
        let ids = file.integers("in.tokens")?;
        let tokens_valid = file.mask("in.token_mask")?;
        if ids.len() != tokens_valid.len() {
            return Err(file.refuse("in.token_mask", format!("{} values", ids.len()), tokens_valid.len().to_string()));
        }
        let valid_ids = ids.iter().zip(&tokens_valid).filter(|(_, valid)| **valid);
        let tokens = valid_ids
            .map(|(id, _)| {
                u32::try_from(*id).map_err(|_| file.refuse("in.tokens", "ids from 0".into(), id.to_string()))
            })
            .collect::<Result<Vec<_>, _>>()?;

        let chunk = [Some(dims.horizon), Some(dims.action_dim)];
        let rows = [None, Some(dims.action_dim)];
        let guided = GuidanceSchedule::NAMES.iter().map(|name| file.maybe(&format!("out.rtc.{name}"), &chunk));
        let row_valid: Vec<bool> = views_valid
            .iter()
            .flat_map(|valid| std::iter::repeat_n(*valid, dims.vision.tokens()))
            .chain(tokens_valid)
            .collect();
        let width = dims.trunk.width;
        let prefix_embs = file.maybe("out.prefix_embs", &[Some(row_valid.len()), Some(width)])?.map(|all| {
            let rows = all.chunks_exact(width).zip(&row_valid).filter(|(_, valid)| **valid);
            rows.flat_map(|(row, _)| row.iter().copied()).collect()
        });
        Ok(Self {
            views,
            tokens,
            state: file.floats("in.state", &[Some(dims.state_dim)])?,
            noise: file.floats("in.noise", &chunk)?,
            previous: file.maybe("in.rtc.prev_chunk_left_over", &rows)?,
            reference: Reference {
                prefix_embs,
                velocities: file.maybe("out.v", &[None, chunk[0], chunk[1]])?,
                actions: file.maybe("out.actions", &chunk)?,
                guided: guided.collect::<Result<_, _>>()?,
            },
        })
    }
}

/// A case file whose errors name it.
struct Tensors<'a> {
    path: &'a Path,
    file: SafeTensors<'a>,
}

impl Tensors<'_> {
    fn refuse(&self, tensor: &str, expected: String, found: String) -> CliError {
        ModelError::Tensor { path: self.path.into(), tensor: tensor.into(), expected, found }.into()
    }

    fn view(&self, name: &str) -> Result<TensorView<'_>, CliError> {
        self.file.tensor(name).map_err(|_| {
            let mut names = self.file.names();
            names.sort_unstable();
            self.refuse(name, "to be there".into(), format!("only {}", names.join(", ")))
        })
    }

    /// An F32 tensor; `None` in `shape` is any size.
    fn floats(&self, name: &str, shape: &[Option<usize>]) -> Result<Vec<f32>, CliError> {
        let view = self.view(name)?;
        let fits = view.shape().len() == shape.len()
            && view.shape().iter().zip(shape).all(|(found, expected)| expected.is_none_or(|e| e == *found));
        if !fits || view.dtype() != Dtype::F32 {
            let shape: Vec<String> = shape.iter().map(|s| s.map_or("any".into(), |s| s.to_string())).collect();
            let expected = format!("F32 [{}]", shape.join(", "));
            return Err(self.refuse(name, expected, format!("{:?} {:?}", view.dtype(), view.shape())));
        }
        Ok(view.data().as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect())
    }

    fn maybe(&self, name: &str, shape: &[Option<usize>]) -> Result<Option<Vec<f32>>, CliError> {
        if self.file.tensor(name).is_err() { Ok(None) } else { self.floats(name, shape).map(Some) }
    }

    fn integers(&self, name: &str) -> Result<Vec<i64>, CliError> {
        let view = self.view(name)?;
        let data = view.data();
        match view.dtype() {
            Dtype::I32 => Ok(data.as_chunks::<4>().0.iter().map(|b| i32::from_le_bytes(*b).into()).collect()),
            Dtype::I64 => Ok(data.as_chunks::<8>().0.iter().map(|b| i64::from_le_bytes(*b)).collect()),
            other => Err(self.refuse(name, "I32 or I64".into(), format!("{other:?}"))),
        }
    }

    /// A mask of zeros and ones, as F32 or BOOL.
    fn mask(&self, name: &str) -> Result<Vec<bool>, CliError> {
        let view = self.view(name)?;
        if view.dtype() == Dtype::BOOL {
            return Ok(view.data().iter().map(|b| *b != 0).collect());
        }
        let as_bool = |v: f32| match v {
            0.0 => Ok(false),
            1.0 => Ok(true),
            other => Err(self.refuse(name, "zeros and ones".into(), other.to_string())),
        };
        self.floats(name, &[None])?.into_iter().map(as_bool).collect()
    }
}

/// Writes F32 tensors.
pub(super) fn write(path: &Path, tensors: &[(&str, &[usize], &[f32])]) -> Result<(), CliError> {
    let bytes: Vec<Vec<u8>> =
        tensors.iter().map(|(_, _, values)| values.iter().flat_map(|v| v.to_le_bytes()).collect()).collect();
    let fail = |reason: String| CliError::from(ModelError::File { path: path.into(), reason });
    let views = tensors
        .iter()
        .zip(&bytes)
        .map(|((name, shape, _), bytes)| Ok((*name, TensorView::new(Dtype::F32, shape.to_vec(), bytes)?)))
        .collect::<Result<Vec<_>, safetensors::SafeTensorError>>()
        .map_err(|e| fail(e.to_string()))?;
    let file = safetensors::serialize(views, None).map_err(|e| fail(e.to_string()))?;
    std::fs::write(path, file).map_err(|source| ModelError::Io { path: path.into(), source }.into())
}

/// ‖ours − reference‖ / ‖reference‖, or nothing where the sizes differ (another number of steps).
pub(super) fn relative_l2(ours: &[f32], reference: &[f32]) -> Option<f64> {
    if ours.len() != reference.len() {
        return None;
    }
    let square = |v: f64| v * v;
    let difference: f64 = ours.iter().zip(reference).map(|(a, b)| square(f64::from(*a) - f64::from(*b))).sum();
    let norm: f64 = reference.iter().map(|b| square(f64::from(*b))).sum();
    Some((difference / norm).sqrt())
}
