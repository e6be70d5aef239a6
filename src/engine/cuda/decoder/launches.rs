//! The decoder by launches: five kernels a layer, for any dimensions and chip.

use super::super::kernels::{DecodeAttentionArgs, Hopper, Kernels, Shape, SkinnyArgs};
use super::super::plan::{self, CLUSTERS, EXCLUSIVE_SHARED, KEY_SPLITS, Path, QUERY_ROWS, SkinnyPlan, Stage};
use super::super::portable::{PortableAttentionArgs, Product};
use super::super::time::Tables;
use super::super::weights::{ExpertLayer, Suffix};
use super::{Buffer, CudaDecoder, EngineError, Key};

impl CudaDecoder {
    /// Queues all layers of step `step`, and before them what makes the residual.
    pub(super) fn launches(&self, tables: &Tables, key: Key, step: usize, rows: usize) -> Result<(), EngineError> {
        let dims = &self.model.dims;
        if let Suffix::Pi0 { out, out_bias, .. } = &self.weights.suffix {
            let args = SkinnyArgs {
                w: out.pointer(),
                x: self.u.pointer(),
                bias: out_bias.pointer(),
                rows: dims.horizon as i32,
                scale: tables.scale(&self.weights.layers[0].norm1, step, 0),
                init: 1,
                ..self.residual(&self.plans.time)
            };
            self.product(Stage::Out, Product::Residual, &self.plans.time, &args)?;
        }
        for (l, layer) in self.weights.layers.iter().enumerate() {
            self.layer(tables, key, step, rows, l, layer)?;
        }
        Ok(())
    }

    /// Weights that kernel `from` of layer `layer` moves into L2 for a later one.
    fn next(&self, from: Stage, layer: usize) -> (u64, u64) {
        let Some((_, to)) = self.tuning.prefetch.iter().flatten().find(|(f, _)| *f == from) else { return (0, 0) };
        // A stage at or before this one means that of the next layer; after the last layer the first one follows.
        let layers = &self.weights.layers;
        let at = if (*to as usize) <= (from as usize) { (layer + 1) % layers.len() } else { layer };
        let Some(l) = layers.get(at) else { return (0, 0) };
        let matrix: &Buffer<u16> = match to {
            Stage::Qkv => &l.qkv,
            Stage::Attention => return (0, 0),
            Stage::Out => &l.out,
            Stage::GateUp => &l.gate_up,
            Stage::Down => &l.down,
        };
        (matrix.pointer(), matrix.len() as u64 * 2)
    }

    /// Shared memory to ask for.
    fn shared(&self, stage: Stage, needed: usize) -> u32 {
        let least = if self.tuning.exclusive[stage as usize] { EXCLUSIVE_SHARED } else { 0 };
        needed.max(least) as u32
    }

    /// How often a kernel is launched: once, but for timing by difference.
    fn times(&self, stage: Stage) -> usize {
        1 + usize::from(self.tuning.twice == Some(stage))
    }

    fn product(&self, stage: Stage, product: Product, p: &SkinnyPlan, args: &SkinnyArgs) -> Result<(), EngineError> {
        let kernels = self.lane.kernels();
        let Some(hopper) = self.hopper(kernels) else {
            return kernels.portable()?.product(&self.stream, product, self.tokens, p.tiles, args);
        };
        let skinny = &hopper.skinny[self.tokens];
        let clusters = match product {
            Product::Qkv => &skinny.qkv,
            Product::Geglu => &skinny.geglu,
            Product::Residual => &skinny.residual,
        };
        let shape = Shape {
            grid: [p.cluster as u32, p.tiles as u32, 1],
            threads: 128,
            shared: self.shared(stage, p.shared),
            cluster: p.cluster as u32,
            dependent: self.tuning.dependent,
        };
        let variant = CLUSTERS.iter().position(|c| *c == p.cluster).unwrap_or(0);
        clusters[variant].launch(&self.stream, shape, args)
    }

    fn hopper<'a>(&self, kernels: &'a Kernels) -> Option<&'a Hopper> {
        kernels.hopper().filter(|_| self.path == Path::Hopper)
    }

    /// The output side of a product that adds to the residual.
    fn residual(&self, p: &SkinnyPlan) -> SkinnyArgs {
        SkinnyArgs {
            k: p.k as i32,
            slice: p.slice as i32,
            inv_width: 1.0 / self.model.dims.expert.width as f32,
            h: self.h.pointer(),
            hb: self.hb[0].pointer(),
            squares_out: self.squares[0].pointer(),
            h_stride: self.sizes.width as i32,
            ..SkinnyArgs::default()
        }
    }

    /// The input side of a product over the normalised residual.
    fn normalised(&self, p: &SkinnyPlan, rows: usize) -> SkinnyArgs {
        SkinnyArgs {
            x: self.hb[0].pointer(),
            squares: self.squares[0].pointer(),
            square_tiles: self.square_tiles(),
            inv_width: 1.0 / self.model.dims.expert.width as f32,
            rows: rows as i32,
            k: p.k as i32,
            slice: p.slice as i32,
            ..SkinnyArgs::default()
        }
    }

    fn layer(
        &self,
        tables: &Tables,
        key: Key,
        step: usize,
        rows: usize,
        l: usize,
        layer: &ExpertLayer,
    ) -> Result<(), EngineError> {
        let e = &self.model.dims.expert;
        let suffix = plan::suffix_rows(&self.model.dims);
        let (qkv_bias, gate_up_bias) = tables.biases(step, l);
        let suffix_at = l * suffix * self.model.cache_row;
        let (suffix_keys, suffix_values) = (self.suffix_keys.at(suffix_at), self.suffix_values.at(suffix_at));
        let params = self.inputs.pointer();
        let horizon = self.model.dims.horizon as i32;
        let q_stride = (e.heads * e.head_dim) as i32;

        let (next, next_bytes) = self.next(Stage::Qkv, l);
        let args = SkinnyArgs {
            w: layer.qkv.pointer(),
            bias: qkv_bias,
            next,
            next_bytes,
            q: self.q.pointer(),
            suffix_keys,
            suffix_values,
            rope: self.model.rope.pointer(),
            params,
            q_stride,
            heads: e.heads as i32,
            head_dim: e.head_dim as i32,
            horizon,
            has_state: self.has_state() as i32,
            ..self.normalised(&self.plans.qkv, rows)
        };
        for _ in 0..self.times(Stage::Qkv) {
            self.product(Stage::Qkv, Product::Qkv, &self.plans.qkv, &args)?;
        }

        for _ in 0..self.times(Stage::Attention) {
            self.attention(key, rows, l)?;
        }

        let (next, next_bytes) = self.next(Stage::Out, l);
        let args = SkinnyArgs {
            w: layer.out.pointer(),
            x: self.attended.pointer(),
            next,
            next_bytes,
            rows: rows as i32,
            scale: tables.scale(&layer.norm2, step, 2 * l + 1),
            gate: tables.gate(step, 2 * l),
            ..self.residual(&self.plans.out)
        };
        for _ in 0..self.times(Stage::Out) {
            self.product(Stage::Out, Product::Residual, &self.plans.out, &args)?;
        }

        let (next, next_bytes) = self.next(Stage::GateUp, l);
        let args = SkinnyArgs {
            w: layer.gate_up.pointer(),
            bias: gate_up_bias,
            next,
            next_bytes,
            y: self.gated.pointer(),
            ..self.normalised(&self.plans.gate_up, rows)
        };
        for _ in 0..self.times(Stage::GateUp) {
            self.product(Stage::GateUp, Product::Geglu, &self.plans.gate_up, &args)?;
        }

        let (next, next_bytes) = self.next(Stage::Down, l);
        let after = self.weights.layers.get(l + 1).map_or(&self.weights.final_norm, |n| &n.norm1);
        let args = SkinnyArgs {
            w: layer.down.pointer(),
            x: self.gated.pointer(),
            next,
            next_bytes,
            rows: rows as i32,
            scale: tables.scale(after, step, 2 * l + 2),
            gate: tables.gate(step, 2 * l + 1),
            ..self.residual(&self.plans.down)
        };
        for _ in 0..self.times(Stage::Down) {
            self.product(Stage::Down, Product::Residual, &self.plans.down, &args)?;
        }
        Ok(())
    }

    /// Queues the attention of layer `l`.
    fn attention(&self, key: Key, rows: usize, l: usize) -> Result<(), EngineError> {
        let e = &self.model.dims.expert;
        let suffix = plan::suffix_rows(&self.model.dims);
        let suffix_at = l * suffix * self.model.cache_row;
        let (q, params, out) = (self.q.pointer(), self.inputs.pointer(), self.attended.pointer());
        let (suffix_keys, suffix_values) = (self.suffix_keys.at(suffix_at), self.suffix_values.at(suffix_at));
        let scale = std::f32::consts::LOG2_E / (e.head_dim as f32).sqrt();
        let [layer, heads, head_dim, rows] = [l, e.heads, e.head_dim, rows * e.heads].map(|n| n as i32);
        let [suffix, horizon] = [suffix, self.model.dims.horizon].map(|n| n as i32);
        let stride = self.stride();
        let kernels = self.lane.kernels();
        let Some(hopper) = self.hopper(kernels) else {
            let args = PortableAttentionArgs {
                q,
                suffix_keys,
                suffix_values,
                out,
                parts: self.parts.pointer(),
                tops: self.tops.pointer(),
                params,
                scale,
                layer,
                heads,
                head_dim,
                rows,
                suffix,
                horizon,
                stride,
                ..PortableAttentionArgs::default()
            };
            return kernels.portable()?.attention(&self.stream, self.model.trunk_head.0, &args);
        };
        let (variant, padded) = self.model.decode_head;
        let (_, shared) = plan::decode_attention(key.attention * KEY_SPLITS, padded);
        let (next, next_bytes) = self.next(Stage::Attention, l);
        let args = DecodeAttentionArgs {
            q,
            suffix_keys,
            suffix_values,
            out,
            params,
            next,
            next_bytes,
            scale,
            layer,
            heads,
            head_dim,
            rows,
            suffix,
            horizon,
            stride,
            tile: key.attention as i32,
        };
        let shape = Shape {
            grid: [KEY_SPLITS as u32, (rows as u32).div_ceil(QUERY_ROWS as u32), 1],
            threads: 256,
            shared: self.shared(Stage::Attention, shared),
            cluster: KEY_SPLITS as u32,
            dependent: self.tuning.dependent,
        };
        hopper.decode_attention[variant].launch(&self.stream, shape, &args)
    }
}
