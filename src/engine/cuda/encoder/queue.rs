//! The encoder's kernels, in their order.

use super::super::Model;
use super::super::device::Buffer;
use super::super::kernels::{
    AttentionArgs, GegluArgs, GegluWideArgs, Hopper, Kernels, NormArgs, RopeArgs, Shape, TowerArgs, TowerBeginArgs,
};
use super::super::lt::{Effort, Epilogue, Key, Lt, Operands};
use super::super::plan::{self, Path, TOWER_K, TOWER_TILE, TowerKind};
use super::super::stream::Stream;
use super::super::weights::{EncoderWeights, Folded, LayerNorm, Tower, TowerLayer, TrunkLayer, TrunkRest, VisionLayer};
use super::Workspace;
use crate::engine::EngineError;

/// What norms add to the variance.
const EPSILON: f32 = 1e-6;

/// Queues the stage's kernels on a stream, captured or not.
pub(super) struct Queue<'a> {
    pub model: &'a Model,
    pub weights: &'a EncoderWeights,
    pub path: Path,
    /// Multiprocessors of the stage's share.
    pub sms: usize,
    pub stream: &'a Stream,
    pub kernels: &'a Kernels,
    pub lt: &'a mut Lt,
    pub w: &'a Workspace,
    pub params: u64,
    /// Where the residual goes after every layer; none but for comparison with an oracle.
    pub taps: Option<&'a mut Vec<Vec<f32>>>,
}

impl Queue<'_> {
    fn tap(&mut self, residual: &Buffer<f32>, len: usize) -> Result<(), EngineError> {
        let Some(taps) = &mut self.taps else { return Ok(()) };
        self.stream.synchronize()?;
        let mut values = vec![0.0; len];
        residual.read(0, &mut values)?;
        taps.push(values);
        Ok(())
    }

    fn product(
        &mut self,
        rows: usize,
        outputs: usize,
        k: usize,
        epilogue: Epilogue,
        o: Operands,
    ) -> Result<(), EngineError> {
        self.lt.run(self.stream, Key { rows, outputs, k, epilogue }, o)
    }

    /// Plans for every product of the tower that is the library's: it may not be asked during a capture.
    pub fn prepare_vision(&mut self, views: usize, idle: bool) -> Result<(), EngineError> {
        let v = &self.model.dims.vision;
        let rows = views * v.tokens();
        let keys = [
            (v.width, plan::patch_stride(&self.model.dims), Epilogue::Add),
            (self.model.dims.trunk.width, v.width, Epilogue::WideBias),
            (3 * v.width, v.width, Epilogue::Bias),
            (v.width, v.width, Epilogue::AddBias),
            (v.mlp, v.width, Epilogue::BiasGelu),
            (v.width, v.mlp, Epilogue::AddBias),
        ]
        .map(|(outputs, k, epilogue)| Key { rows, outputs, k, epilogue });
        let own = if self.weights.tower_packed() { 4 } else { 0 };
        self.lt.prepare(
            self.stream,
            &keys[..keys.len() - own],
            &self.w.scratch(self.weights),
            Effort { idle, few: false },
        )
    }

    /// The products of the trunk that are the library's.
    pub fn trunk_keys(&self, rows: usize) -> Vec<Key> {
        let t = &self.model.dims.trunk;
        let attention = t.heads * t.head_dim;
        let (_, down) = self.down(rows);
        let keys = [
            (t.width, t.mlp, down),
            (attention + 2 * t.head_dim, t.width, Epilogue::Store),
            (2 * t.head_dim, t.width, Epilogue::Store),
            (t.width, attention, Epilogue::Add),
            (2 * t.mlp, t.width, Epilogue::Store),
        ]
        .map(|(outputs, k, epilogue)| Key { rows, outputs, k, epilogue });
        let own = if self.weights.wide_trunk { 4 } else { 0 };
        keys[..keys.len() - own].to_vec()
    }

    /// How the down product of a trunk layer and the norm behind it share the work: index into [`plan::NORM_PARTS`].
    fn down(&self, rows: usize) -> (usize, Epilogue) {
        let t = &self.model.dims.trunk;
        let variant = plan::norm_parts(rows, t.mlp, t.width);
        match plan::NORM_PARTS[variant] {
            0 => (variant, Epilogue::Add),
            parts => (variant, Epilogue::Parts(parts)),
        }
    }

    fn layer_norm(
        &self,
        x: &Buffer<f32>,
        y: &Buffer<u16>,
        norm: &LayerNorm,
        rows: usize,
        width: usize,
    ) -> Result<(), EngineError> {
        let args = NormArgs {
            x: x.pointer(),
            parts: 0,
            y: y.pointer(),
            scale: norm.scale.pointer(),
            shift: norm.shift.pointer(),
            width: width as i32,
            inv_width: 1.0 / width as f32,
            eps: EPSILON,
            ..NormArgs::default()
        };
        self.kernels.norm[0].launch(self.stream, Shape::blocks(rows, plan::norm_threads(width)), &args)
    }

    /// The trunk's norm, behind the sum of x and the parts of `variant` of [`plan::NORM_PARTS`]; or what is left of it where
    /// tower.cu folds it in.
    fn rms_norm(&self, scale: &Buffer<f32>, rows: usize, variant: usize) -> Result<(), EngineError> {
        let width = self.model.dims.trunk.width;
        let args = NormArgs {
            x: self.w.x.pointer(),
            parts: self.w.parts.pointer(),
            y: self.w.normed.pointer(),
            scale: scale.pointer(),
            shift: 0,
            width: width as i32,
            inv_width: 1.0 / width as f32,
            eps: EPSILON,
            moments: self.w.moments.pointer(),
            octets: rows.div_ceil(8) as i32,
        };
        let kernels = if self.weights.wide_trunk { &self.kernels.packed } else { &self.kernels.norm };
        kernels[variant].launch(self.stream, Shape::blocks(rows, plan::norm_threads(width)), &args)
    }

    /// Queries of a trunk layer to qkv, its keys and values to the cache; the last layer has no queries.
    fn projected(&mut self, layer: &TrunkLayer, l: usize, rows: usize) -> Result<(), EngineError> {
        let (t, w) = (self.model.dims.trunk, self.w);
        let (x, qkv, rope) = (w.normed.pointer(), w.qkv.pointer(), self.model.rope.pointer());
        let heads = if layer.rest.is_some() { t.heads } else { 0 };
        let outputs = (heads + 2) * t.head_dim;
        if self.weights.wide_trunk {
            let Some(hopper) = self.kernels.hopper() else { return Err(plan::packed_for_hopper()) };
            let args = TowerArgs {
                w: layer.qkv.pointer(),
                x,
                moments: w.moments.pointer(),
                y: qkv,
                heads: heads as i32,
                layer: l as i32,
                cache_row: self.model.cache_row as i32,
                rope,
                params: self.params,
                ..TowerArgs::default()
            };
            return self.tower_product(hopper, TowerKind::Rotated, [rows, outputs, t.width], args);
        }
        let o = Operands { w: layer.qkv.pointer(), x, bias: 0, c: qkv, d: qkv };
        self.product(rows, outputs, t.width, Epilogue::Store, o)?;
        let args = RopeArgs {
            qkv,
            rope,
            params: self.params,
            rows: rows as i32,
            heads: heads as i32,
            head_dim: t.head_dim as i32,
            layer: l as i32,
            cache_row: self.model.cache_row as i32,
        };
        self.kernels.rope.launch(self.stream, Shape::items(rows * outputs / 8, 256), &args)
    }

    /// What follows the trunk's attention up to the MLP's hidden layer: x += out·attended, mlp = gelu(gate) ⊙ up of x
    /// behind its norm.
    fn gated(&mut self, rest: &TrunkRest, rows: usize) -> Result<(), EngineError> {
        let (t, w) = (self.model.dims.trunk, self.w);
        let (x, attention) = (w.x.pointer(), t.heads * t.head_dim);
        let o = Operands { w: rest.out.pointer(), x: w.attended.pointer(), bias: 0, c: x, d: x };
        self.product(rows, t.width, attention, Epilogue::Add, o)?;
        self.rms_norm(&rest.norm2, rows, 0)?;
        let gate_up = w.gate_up.pointer();
        let o = Operands { w: rest.gate_up.pointer(), x: w.normed.pointer(), bias: 0, c: gate_up, d: gate_up };
        self.product(rows, 2 * t.mlp, t.width, Epilogue::Store, o)?;
        let geglu = GegluArgs { gate_up, y: w.mlp.pointer(), rows: rows as i32, mlp: t.mlp as i32 };
        self.kernels.geglu.launch(self.stream, Shape::items(rows * t.mlp / 8, 256), &geglu)
    }

    /// The same by tower.cu and geglu_wide.cu, which fold the norm in; attention has left its result packed.
    fn gated_wide(&mut self, rest: &TrunkRest, rows: usize) -> Result<(), EngineError> {
        let (t, w) = (self.model.dims.trunk, self.w);
        let wide = plan::geglu_wide(rows, t.mlp, t.width, self.sms);
        let (Some(plan), Some(hopper)) = (wide, self.kernels.hopper()) else {
            return Err(plan::packed_for_hopper());
        };
        let (normed, moments) = (w.normed.pointer(), w.moments.pointer());
        let out = TowerArgs {
            w: rest.out.pointer(),
            x: w.attended.pointer(),
            residual: w.x.pointer(),
            scale: rest.norm2.pointer(),
            y: normed,
            left: moments,
            ..TowerArgs::default()
        };
        self.tower_product(hopper, TowerKind::Add, [rows, t.width, t.heads * t.head_dim], out)?;
        let [tokens, octets, token_tiles, short_tiles] =
            [rows, rows.div_ceil(8), plan.token_tiles, plan.short_tiles].map(|n| n as i32);
        let [weight_tiles, first_short, k_blocks, lead] =
            [plan.weight_tiles, plan.first_short, plan.k_blocks, plan.lead].map(|n| n as i32);
        let args = GegluWideArgs {
            w: rest.gate_up.pointer(),
            x: normed,
            moments,
            y: w.mlp.pointer(),
            tokens,
            octets,
            token_tiles,
            short_tiles,
            weight_tiles,
            first_short,
            k_blocks,
            lead,
            width_tiles: (t.width / TOWER_TILE) as i32,
            inv_width: 1.0 / t.width as f32,
            eps: EPSILON,
        };
        let shape = Shape { shared: plan.shared as u32, dependent: true, ..Shape::blocks(plan.blocks, 384) };
        hopper.geglu_wide[plan.variant].launch(self.stream, shape, &args)
    }

    fn attention(
        &self,
        heads: usize,
        batch: usize,
        variant: (usize, usize),
        args: &AttentionArgs,
    ) -> Result<(), EngineError> {
        let (rows, hopper) = (args.rows as usize, self.kernels.hopper().filter(|_| self.path == Path::Hopper));
        let blocks = |rows_each: usize, shared: usize| Shape {
            grid: [rows.div_ceil(rows_each) as u32, heads as u32, batch as u32],
            threads: 256,
            shared: shared as u32,
            cluster: 1,
            dependent: true,
        };
        // The heads share their keys and values where those of the next head are no further on.
        if let Some(hopper) = hopper.filter(|_| args.head_dim as usize == plan::WIDE_HEAD && args.kv_head == 0) {
            let plan = plan::attention_wide(rows * heads, self.sms);
            let shape = Shape {
                grid: [plan.blocks as u32, 1, batch as u32],
                cluster: plan.cluster as u32,
                ..blocks(rows, plan.shared)
            };
            let args = AttentionArgs { heads: heads as i32, ..*args };
            return hopper.attention_wide[plan.variant].launch(self.stream, shape, &args);
        }
        if let Some(hopper) = hopper.filter(|_| plan::attention_vision(args.head_dim as usize, args.keys as usize)) {
            return hopper.attention_vision.launch(self.stream, blocks(plan::VISION_ROWS, plan::VISION_SHARED), args);
        }
        let shape = blocks(plan::ATTENTION_ROWS, plan::attention_shared(variant.1));
        self.kernels.attention[variant.0].launch(self.stream, shape, args)
    }

    /// SigLIP's attention within each view; `octets` groups of 8 tokens where the result is wanted packed.
    fn vision_attention(&self, views: usize, octets: usize) -> Result<(), EngineError> {
        let (v, w) = (self.model.dims.vision, self.w);
        let (tokens, head_dim) = (v.tokens(), v.width / v.heads);
        let args = AttentionArgs {
            q: w.vision_qkv.pointer(),
            k: w.vision_qkv.at(v.width),
            v: w.vision_qkv.at(2 * v.width),
            out: w.vision_attended.pointer(),
            q_batch: (tokens * 3 * v.width) as i64,
            kv_batch: (tokens * 3 * v.width) as i64,
            out_batch: (tokens * v.width) as i64,
            q_row: 3 * v.width as i32,
            kv_row: 3 * v.width as i32,
            kv_head: head_dim as i32,
            out_row: v.width as i32,
            rows: tokens as i32,
            keys: tokens as i32,
            head_dim: head_dim as i32,
            scale: std::f32::consts::LOG2_E / (head_dim as f32).sqrt(),
            out_octets: octets as i32,
            ..AttentionArgs::default()
        };
        self.attention(v.heads, views, self.model.vision_head, &args)
    }

    /// SigLIP's layers on the residual of `views`, products by the library.
    fn tower_of_rows(&mut self, layers: &[VisionLayer], views: usize) -> Result<(), EngineError> {
        let (v, w) = (self.model.dims.vision, self.w);
        let rows = views * v.tokens();
        let [normed, qkv, attended, mlp] =
            [&w.vision_normed, &w.vision_qkv, &w.vision_attended, &w.vision_mlp].map(Buffer::pointer);
        let h = w.vision.pointer();
        for layer in layers {
            self.layer_norm(&w.vision, &w.vision_normed, &layer.norm1, rows, v.width)?;
            let o = Operands { w: layer.qkv.pointer(), x: normed, bias: layer.qkv_bias.pointer(), c: qkv, d: qkv };
            self.product(rows, 3 * v.width, v.width, Epilogue::Bias, o)?;
            self.vision_attention(views, 0)?;
            let o = Operands { w: layer.out.pointer(), x: attended, bias: layer.out_bias.pointer(), c: h, d: h };
            self.product(rows, v.width, v.width, Epilogue::AddBias, o)?;
            self.layer_norm(&w.vision, &w.vision_normed, &layer.norm2, rows, v.width)?;
            let o = Operands { w: layer.fc1.pointer(), x: normed, bias: layer.fc1_bias.pointer(), c: mlp, d: mlp };
            self.product(rows, v.mlp, v.width, Epilogue::BiasGelu, o)?;
            let o = Operands { w: layer.fc2.pointer(), x: mlp, bias: layer.fc2_bias.pointer(), c: h, d: h };
            self.product(rows, v.width, v.mlp, Epilogue::AddBias, o)?;
            self.tap(&w.vision, rows * v.width)?;
        }
        Ok(())
    }

    /// The same by tower.cu: a product that adds to the residual leaves it times the scale of the norm behind, and that
    /// norm's sums.
    fn packed_tower(&mut self, layers: &[TowerLayer], views: usize) -> Result<(), EngineError> {
        let (v, w) = (self.model.dims.vision, self.w);
        let rows = views * v.tokens();
        let [normed, qkv, attended, mlp] =
            [&w.vision_normed, &w.vision_qkv, &w.vision_attended, &w.vision_mlp].map(Buffer::pointer);
        let [attention_left, mlp_left] = w.vision_moments.each_ref().map(Buffer::pointer);
        let (residual, mlp_width) = (w.vision.pointer(), plan::tower_pad(v.mlp));
        let Some(hopper) = self.kernels.hopper() else { return Err(plan::packed_for_hopper()) };
        let Some(first) = layers.first() else { return Ok(()) };
        let begin = TowerBeginArgs {
            x: residual,
            scale: first.norm1.scale.pointer(),
            y: normed,
            moments: mlp_left,
            tokens: rows as i32,
            width: v.width as i32,
        };
        hopper.tower_begin.launch(self.stream, Shape::blocks(rows, 256), &begin)?;
        for (l, layer) in layers.iter().enumerate() {
            let next = layers.get(l + 1).map_or(0, |next| next.norm1.scale.pointer());
            let folded = |weights: &Folded, moments: u64, y: u64| TowerArgs {
                w: weights.w.pointer(),
                x: normed,
                moments,
                fold: weights.fold.pointer(),
                bias: weights.bias.pointer(),
                y,
                ..TowerArgs::default()
            };
            let added = |w: &Buffer<u16>, bias: &Buffer<f32>, x: u64, scale: u64, left: u64| TowerArgs {
                w: w.pointer(),
                x,
                bias: bias.pointer(),
                residual,
                scale,
                y: normed,
                left,
                ..TowerArgs::default()
            };
            self.tower_product(
                hopper,
                TowerKind::Rows,
                [rows, 3 * v.width, v.width],
                folded(&layer.qkv, mlp_left, qkv),
            )?;
            self.vision_attention(views, rows / 8)?;
            let out = added(&layer.out, &layer.out_bias, attended, layer.norm2.scale.pointer(), attention_left);
            self.tower_product(hopper, TowerKind::Add, [rows, v.width, v.width], out)?;
            let fc1 = folded(&layer.fc1, attention_left, mlp);
            self.tower_product(hopper, TowerKind::Gelu, [rows, mlp_width, v.width], fc1)?;
            let fc2 = added(&layer.fc2, &layer.fc2_bias, mlp, next, mlp_left);
            self.tower_product(hopper, TowerKind::Add, [rows, v.width, mlp_width], fc2)?;
            self.tap(&w.vision, rows * v.width)?;
        }
        Ok(())
    }

    /// A product of tower.cu of `[rows, outputs, k]`, whole tiles all; `args` says what it reads and writes. A norm that is
    /// folded in is over k.
    fn tower_product(
        &self,
        hopper: &Hopper,
        kind: TowerKind,
        [rows, outputs, k]: [usize; 3],
        args: TowerArgs,
    ) -> Result<(), EngineError> {
        let (tiles, k_blocks) = (outputs / TOWER_TILE, k / TOWER_K);
        // Of the squares, one sum for each warp of the trunk's norm, or for each tile of a product of tower.cu.
        let sums = if kind == TowerKind::Rotated { plan::norm_threads(k) as usize / 32 } else { k / TOWER_TILE };
        let plan = plan::tower(kind, tiles, k_blocks, rows, self.sms);
        let args = TowerArgs {
            tokens: rows as i32,
            octets: rows.div_ceil(8) as i32,
            token_tiles: plan.token_tiles as i32,
            tiles: tiles as i32,
            weight_tiles: plan.weight_tiles as i32,
            k_blocks: k_blocks as i32,
            width_tiles: sums as i32,
            inv_width: 1.0 / k as f32,
            eps: EPSILON,
            ..args
        };
        let shape = Shape { shared: plan.shared as u32, ..Shape::blocks(plan.blocks, plan.threads as u32) };
        hopper.tower[plan.variant].launch(self.stream, shape, &args)
    }

    /// Patches to the first rows of x.
    pub fn vision(&mut self, views: usize) -> Result<(), EngineError> {
        let dims = self.model.dims;
        let v = dims.vision;
        let w = self.w;
        let rows = views * v.tokens();
        let weights = self.weights;
        let h = w.vision.pointer();
        let patch = Operands {
            w: weights.patch.pointer(),
            x: w.patches.pointer(),
            bias: 0,
            c: weights.position.pointer(),
            d: h,
        };
        self.product(rows, v.width, plan::patch_stride(&dims), Epilogue::Add, patch)?;
        match &weights.tower {
            Tower::Rows(layers) => self.tower_of_rows(layers, views)?,
            Tower::Packed(layers) => self.packed_tower(layers, views)?,
        }
        self.layer_norm(&w.vision, &w.vision_normed, &weights.post_norm, rows, v.width)?;
        let x = w.x.pointer();
        let o = Operands {
            w: weights.projector.pointer(),
            x: w.vision_normed.pointer(),
            bias: weights.projector_bias.pointer(),
            c: x,
            d: x,
        };
        self.product(rows, dims.trunk.width, v.width, Epilogue::WideBias, o)
    }

    /// x to keys and values of every layer.
    pub fn trunk(&mut self, rows: usize) -> Result<(), EngineError> {
        let t = self.model.dims.trunk;
        let w = self.w;
        let weights = self.weights;
        let (x, qkv) = (w.x.pointer(), w.qkv.pointer());
        let attention = t.heads * t.head_dim;
        let (variant, down) = self.down(rows);
        let sums = if down == Epilogue::Add { x } else { w.parts.pointer() };
        for (l, layer) in weights.trunk.iter().enumerate() {
            if l == 0 {
                self.rms_norm(&layer.norm1, rows, 0)?;
            }
            self.projected(layer, l, rows)?;
            let (Some(rest), Some(next)) = (&layer.rest, weights.trunk.get(l + 1)) else { break };
            let args = AttentionArgs {
                q: qkv,
                out: w.attended.pointer(),
                params: self.params,
                q_row: (attention + 2 * t.head_dim) as i32,
                kv_row: self.model.cache_row as i32,
                out_row: attention as i32,
                rows: rows as i32,
                keys: rows as i32,
                head_dim: t.head_dim as i32,
                layer: l as i32,
                scale: std::f32::consts::LOG2_E / (t.head_dim as f32).sqrt(),
                out_octets: if weights.wide_trunk { rows.div_ceil(8) as i32 } else { 0 },
                ..AttentionArgs::default()
            };
            self.attention(t.heads, 1, self.model.trunk_head, &args)?;
            if weights.wide_trunk {
                self.gated_wide(rest, rows)?;
            } else {
                self.gated(rest, rows)?;
            }
            let o = Operands { w: rest.down.pointer(), x: w.mlp.pointer(), bias: 0, c: sums, d: sums };
            self.product(rows, t.width, t.mlp, down, o)?;
            self.rms_norm(&next.norm1, rows, variant)?;
            self.tap(&w.x, rows * t.width)?;
        }
        Ok(())
    }
}
