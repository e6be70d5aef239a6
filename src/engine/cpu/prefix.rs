//! The encoder: views and prompt to the keys and values of every trunk layer.

use std::sync::Arc;

use super::gemma::{LayerKv, Rows, Scratch};
use super::vision::Vision;
use super::weights::EncoderWeights;
use super::workers::Workers;
use super::{check_finite, check_len, grow};
use crate::engine::{EncodeInput, Encoder, EngineError, KvCache, View};
use crate::model::{Dims, Preprocessor};

/// Keys (after rotation) and values of the prefix, per layer `[rows, head_dim]`.
#[derive(Clone)]
pub struct CpuCache {
    pub(super) layers: Vec<LayerKv>,
    pub(super) head_dim: usize,
    pub(super) capacity: usize,
    pub(super) rows: usize,
}

impl CpuCache {
    pub(super) fn new(dims: &Dims, capacity: usize) -> Self {
        let head_dim = dims.trunk.head_dim;
        Self { layers: vec![LayerKv::new(capacity, head_dim); dims.trunk.layers], head_dim, capacity, rows: 0 }
    }

    /// Whether this slot has the shape that an engine of these dimensions needs.
    pub(super) fn check(&self, dims: &Dims) -> Result<(), EngineError> {
        if (self.layers.len(), self.head_dim) == (dims.trunk.layers, dims.trunk.head_dim) {
            return Ok(());
        }
        Err(EngineError::Shape {
            what: "cache slot",
            expected: format!("{} layers with heads of {}", dims.trunk.layers, dims.trunk.head_dim),
            found: format!("{} layers with heads of {} (made by another engine)", self.layers.len(), self.head_dim),
        })
    }
}

impl KvCache for CpuCache {
    fn len(&self) -> usize {
        self.rows
    }
}

/// The first stage on the CPU, with its own threads and scratch memory.
pub struct CpuEncoder {
    dims: Dims,
    weights: Arc<EncoderWeights>,
    workers: Workers,
    preprocessor: Preprocessor,
    planes: Vec<f32>,
    vision: Vision,
    scratch: Scratch,
    hidden: Vec<f32>,
}

impl CpuEncoder {
    pub(super) fn new(
        dims: Dims,
        weights: Arc<EncoderWeights>,
        preprocessor: Preprocessor,
        threads: usize,
    ) -> Result<Self, EngineError> {
        Ok(Self {
            dims,
            weights,
            workers: Workers::new("encoder", threads)?,
            preprocessor,
            planes: vec![0.0; 3 * dims.vision.image * dims.vision.image],
            vision: Vision::new(dims.vision),
            scratch: Scratch::new(dims.trunk),
            hidden: Vec::new(),
        })
    }

    /// Valid rows of the prefix, once the input is known to fit the model and the slot.
    fn check(&self, input: &EncodeInput<'_>, cache: &CpuCache) -> Result<usize, EngineError> {
        cache.check(&self.dims)?;
        let refuse = |what, expected: String, found: String| Err(EngineError::Shape { what, expected, found });
        if input.views.is_empty() {
            return refuse("views", "at least 1".into(), "0".into());
        }
        if input.tokens.is_empty() {
            return refuse("prompt tokens", "at least 1".into(), "0".into());
        }
        if let Some(id) = input.tokens.iter().find(|id| **id as usize >= self.dims.vocab) {
            return refuse("prompt token", format!("an id below {} (the vocabulary)", self.dims.vocab), id.to_string());
        }
        for view in input.views {
            if let View::Planes(planes) = view {
                check_len("image planes", planes, self.planes.len())?;
                check_finite("image planes", planes)?;
            }
        }
        let rows = input.views.len() * self.dims.vision.tokens() + input.tokens.len();
        if rows > cache.capacity {
            return refuse(
                "prefix",
                format!("at most {} rows, the size of the cache slot", cache.capacity),
                format!("{rows} ({} views and {} prompt tokens)", input.views.len(), input.tokens.len()),
            );
        }
        Ok(rows)
    }

    /// Fills `hidden` with the prefix embeddings `[rows, width]`: the views' tokens, then the prompt's.
    fn embed(&mut self, input: &EncodeInput<'_>, rows: usize) -> Result<(), EngineError> {
        let width = self.dims.trunk.width;
        let views = input.views.len();
        self.vision.reserve(views);
        grow(&mut self.hidden, rows * width);
        for (i, view) in input.views.iter().enumerate() {
            match view {
                View::Planes(planes) => self.vision.set_view(i, planes),
                View::Frame(frame) => {
                    self.preprocessor.planes(frame, &mut self.planes)?;
                    self.vision.set_view(i, &self.planes);
                }
            }
        }
        let (images, prompt) = self.hidden[..rows * width].split_at_mut(views * self.dims.vision.tokens() * width);
        for (id, row) in input.tokens.iter().zip(prompt.chunks_exact_mut(width)) {
            self.weights.token_table.row_f32(*id as usize, row)?;
            // Text is scaled by √width, image tokens are not.
            let scale = (width as f32).sqrt();
            row.iter_mut().for_each(|v| *v *= scale);
        }
        let (vision, weights) = (&mut self.vision, &self.weights.vision);
        self.workers.run(|threads| vision.forward(threads, weights, views, images));
        Ok(())
    }

    /// The trunk: every layer's keys and values; of the last layer nothing else is needed.
    fn fill(&mut self, rows: usize, cache: &mut CpuCache) {
        let d = self.dims.trunk;
        self.scratch.reserve(rows, rows);
        let mut rows_in = Rows { hidden: &mut self.hidden[..rows * d.width], position: 0 };
        let (scratch, layers) = (&mut self.scratch, &self.weights.trunk);
        self.workers.run(|threads| {
            for (n, (layer, kv)) in layers.iter().zip(&mut cache.layers).enumerate() {
                let norms = [layer.input_norm.modulation(&[]), layer.post_norm.modulation(&[])];
                layer.write_keys_values(threads, &rows_in, norms[0], kv, 0, scratch);
                if n + 1 < d.layers {
                    layer.attend_and_feed(threads, &mut rows_in, norms, &[kv.first(rows, d.head_dim)], scratch);
                }
            }
        });
        cache.rows = rows;
    }
}

impl Encoder for CpuEncoder {
    type Cache = CpuCache;

    fn encode(&mut self, input: &EncodeInput<'_>, cache: &mut CpuCache) -> Result<(), EngineError> {
        // A slot that could not be filled must not be read as the old observation.
        cache.rows = 0;
        let rows = self.check(input, cache)?;
        self.embed(input, rows)?;
        self.fill(rows, cache);
        Ok(())
    }

    fn encode_with_embeddings(
        &mut self,
        input: &EncodeInput<'_>,
        cache: &mut CpuCache,
    ) -> Result<Vec<f32>, EngineError> {
        cache.rows = 0;
        let rows = self.check(input, cache)?;
        self.embed(input, rows)?;
        let embeddings = self.hidden[..rows * self.dims.trunk.width].to_vec();
        self.fill(rows, cache);
        Ok(embeddings)
    }
}
