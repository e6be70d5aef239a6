//! A checkpoint on the device: bf16 matrices in the layouts the kernels want, norms and biases in float32.

use std::sync::Arc;

use super::device::{Buffer, Device, ROOM_STEP, Room, room_bytes};
use super::faults;
use super::kernels::{CopyArgs, PackArgs, TowerFoldArgs};
use super::load::{Loader, Source};
use super::plan::{self, Packing, STEP_K, TILE, TOWER_K, TOWER_TILE, pad};
use crate::engine::EngineError;
use crate::model::{Dims, EXPERT, Family, PROJECTOR, StackDims, TRUNK, Tensor, VISION, VisionDims};

/// Views one encode may hold.
pub(super) const MAX_VIEWS: usize = 8;

/// Scale and shift of a LayerNorm, `[width]` each.
pub(super) struct LayerNorm {
    pub scale: Buffer<f32>,
    pub shift: Buffer<f32>,
}

/// One SigLIP layer. Matrices are `[outputs, inputs]`.
pub(super) struct VisionLayer {
    pub norm1: LayerNorm,
    pub qkv: Buffer<u16>,
    pub qkv_bias: Buffer<u16>,
    pub out: Buffer<u16>,
    pub out_bias: Buffer<f32>,
    pub norm2: LayerNorm,
    pub fc1: Buffer<u16>,
    pub fc1_bias: Buffer<u16>,
    pub fc2: Buffer<u16>,
    pub fc2_bias: Buffer<f32>,
}

/// One SigLIP layer for tower.cu. Matrices are packed.
pub(super) struct TowerLayer {
    pub norm1: LayerNorm,
    pub qkv: Folded,
    pub out: Buffer<u16>,
    pub out_bias: Buffer<f32>,
    pub norm2: LayerNorm,
    pub fc1: Folded,
    pub fc2: Buffer<u16>,
    pub fc2_bias: Buffer<f32>,
}

/// A matrix with the norm in front of it folded in: the product takes rows times the norm's scale, and its sums get the
/// row's mean and deviation.
pub(super) struct Folded {
    pub w: Buffer<u16>,
    /// Of every output, the weights times the norm's scale, summed.
    pub fold: Buffer<f32>,
    /// The bias, and the weights times the norm's shift, summed.
    pub bias: Buffer<f32>,
}

/// SigLIP's layers: packed where [`Packing::tower`] says so.
pub(super) enum Tower {
    Rows(Vec<VisionLayer>),
    Packed(Vec<TowerLayer>),
}

/// The part of a trunk layer after its keys and values; the last layer has none.
pub(super) struct TrunkRest {
    pub out: Buffer<u16>,
    pub norm2: Buffer<f32>,
    /// Packed where [`EncoderWeights::wide_trunk`] says so.
    pub gate_up: Buffer<u16>,
    pub down: Buffer<u16>,
}

/// One trunk layer. Norms hold 1 + weight.
pub(super) struct TrunkLayer {
    pub norm1: Buffer<f32>,
    /// Queries, keys, values; only keys and values in the last layer. Packed where [`EncoderWeights::wide_trunk`] says so.
    pub qkv: Buffer<u16>,
    pub rest: Option<TrunkRest>,
}

/// Everything the encoder reads.
pub(super) struct EncoderWeights {
    /// `[width, patch_stride]`.
    pub patch: Buffer<u16>,
    /// Position embedding plus patch bias, once per view: `[MAX_VIEWS, tokens, width]`.
    pub position: Buffer<f32>,
    pub tower: Tower,
    /// What the matrices of the tower lie in.
    pub tower_room: Room,
    pub post_norm: LayerNorm,
    pub projector: Buffer<u16>,
    pub projector_bias: Buffer<f32>,
    pub trunk: Vec<TrunkLayer>,
    /// The projections around the attention are packed for tower.cu, gate and up projections for geglu_wide.cu; or they are
    /// as in the checkpoint, gate above up.
    pub wide_trunk: bool,
    pub tokens: TokenTable,
}

impl EncoderWeights {
    /// Whether SigLIP's layers are packed for tower.cu.
    pub fn tower_packed(&self) -> bool {
        matches!(self.tower, Tower::Packed(_))
    }
}

/// Where prompt embeddings come from: the table stays on the host, a prompt needs a few rows of it.
pub(super) enum TokenTable {
    File(Tensor),
    Random(u64),
}

impl TokenTable {
    /// Writes row `token` of the table into `out`, scaled by √width (spec section 3).
    pub fn embed(&self, token: u32, out: &mut [f32]) -> Result<(), EngineError> {
        match self {
            TokenTable::File(table) => table.row_f32(token as usize, out)?,
            TokenTable::Random(seed) => Source::random_host(seed ^ u64::from(token), 1.0, out),
        }
        let scale = (out.len() as f32).sqrt();
        out.iter_mut().for_each(|v| *v *= scale);
        Ok(())
    }
}

/// A norm of the expert.
pub(super) enum ExpertNorm {
    /// 1 + weight, `[padded width]`.
    Plain(Buffer<f32>),
    /// The dense layer `[3·width, width]` as the file has it, its element type, and its bias.
    Adaptive { weight: Buffer<u8>, dtype: i32, bias: Buffer<f32> },
}

/// One expert layer; matrices are packed for the decoder's path.
pub(super) struct ExpertLayer {
    pub norm1: ExpertNorm,
    pub qkv: Buffer<u16>,
    pub out: Buffer<u16>,
    pub norm2: ExpertNorm,
    pub gate_up: Buffer<u16>,
    pub down: Buffer<u16>,
}

/// How actions become tokens, folded where that is exact (spec section 5). Host values, float32.
pub(super) enum Suffix {
    /// token = out·SiLU(fold·x + bias(t)) + out_bias.
    Pi0 {
        /// Action half of the first time layer times the action projection, `[action_dim, padded width]`.
        fold: Buffer<f32>,
        /// What of the first layer's bias does not depend on time, `[width]`.
        constant: Vec<f32>,
        /// Time half of the first layer, `[width, width]`.
        time: Vec<f32>,
        out: Buffer<u16>,
        out_bias: Buffer<f32>,
        /// `[state_dim, padded width]`.
        state: Buffer<f32>,
        state_bias: Buffer<f32>,
    },
    /// token = action·x + bias; time acts through the norms.
    Pi05 {
        action: Buffer<f32>,
        action_bias: Buffer<f32>,
        /// Weight and bias of the two layers of the condition.
        mlp: [(Vec<f32>, Vec<f32>); 2],
    },
}

/// Everything the decoder reads.
pub(super) struct DecoderWeights {
    /// What the matrices are packed for.
    pub packing: Packing,
    pub layers: Vec<ExpertLayer>,
    pub final_norm: ExpertNorm,
    pub suffix: Suffix,
    /// `[action_dim, padded width]` and `[action_dim]`.
    pub out: Buffer<f32>,
    pub out_bias: Vec<f32>,
}

/// Sizes of the decoder's padded matrices.
#[derive(Debug, Clone, Copy)]
pub(super) struct ExpertSizes {
    /// Width padded to a step of K; also the row stride of the residual.
    pub width: usize,
    pub attention: usize,
    pub mlp: usize,
    /// Rows of each packed matrix, padded to whole tiles.
    pub qkv_rows: usize,
    pub gate_up_rows: usize,
    pub width_rows: usize,
}

impl ExpertSizes {
    pub fn new(s: &StackDims) -> Self {
        Self {
            width: pad(s.width, STEP_K),
            attention: pad(s.heads * s.head_dim, STEP_K),
            mlp: pad(s.mlp, STEP_K),
            qkv_rows: pad((s.heads + 2) * s.head_dim, TILE),
            gate_up_rows: pad(s.mlp, TILE / 2) * 2,
            width_rows: pad(s.width, TILE),
        }
    }

    /// Elements of the matrices of one layer: QKV, O, gate and up, down.
    fn matrices(self) -> [usize; 4] {
        [
            self.qkv_rows * self.width,
            self.width_rows * self.attention,
            self.gate_up_rows * self.width,
            self.width_rows * self.mlp,
        ]
    }
}

/// Elements of the matrices of one SigLIP layer, packed or not: QKV, O, first and second of the MLP.
fn tower_matrices(v: &VisionDims, packed: bool) -> [usize; 4] {
    let padded = |n: usize| if packed { plan::tower_pad(n) } else { n };
    let [width, mlp] = [v.width, v.mlp].map(padded);
    [padded(3 * v.width) * width, width * width, mlp * width, width * mlp]
}

/// Bytes of the room for the bf16 matrices of `layers` layers.
fn layers_room(layers: usize, matrices: [usize; 4]) -> usize {
    layers * room_bytes(matrices.map(|elements| 2 * elements))
}

/// Elements of all matrices that the device holds.
fn elements(dims: &Dims) -> usize {
    let (v, t, e) = (&dims.vision, &dims.trunk, &dims.expert);
    let vision =
        v.layers * (4 * v.width * v.width + 2 * v.width * v.mlp) + v.width * (plan::patch_stride(dims) + t.width);
    let stack = |s: &StackDims| (2 * s.heads + 2) * s.head_dim * s.width + 3 * s.width * s.mlp;
    let adaptive = if dims.family == Family::Pi05 { (2 * e.layers + 1) * 3 * e.width * e.width } else { 0 };
    vision + t.layers.saturating_sub(1) * stack(t) + e.layers * stack(e) + e.width * e.width + adaptive
}

/// Bytes that an engine of two views takes on the device, for a check before anything is allocated: weights, what the
/// stages work with, and what measuring the products takes for a moment. Small buffers are left out, and the library's
/// kernels.
pub(super) fn device_bytes(dims: &Dims) -> usize {
    let (v, t) = (&dims.vision, &dims.trunk);
    let weights = 2 * elements(dims) + MAX_VIEWS * v.tokens() * v.width * 4;
    let rows = 2 * v.tokens() + dims.max_tokens;
    let tower = 2 * v.tokens() * (12 * v.width + 2 * v.mlp + 2 * plan::patch_stride(dims));
    let trunk = rows * (6 * t.width + (4 * t.heads + 4) * t.head_dim + 6 * t.mlp)
        + plan::part_rows(rows, t.mlp, t.width) * t.width * 4;
    let widest = (2 * t.mlp * t.width).max(v.mlp * v.width) * 2;
    let cache = 2 * 2 * t.layers * rows * t.head_dim;
    // Measured on the tower's matrices where those are enough, and on what the encoder works with.
    let cold = super::lt::COLD_BYTES.max(widest);
    let measuring = if layers_room(v.layers, tower_matrices(v, false)) < cold { cold } else { 0 };
    weights + tower + trunk + 3 * cache + (super::lt::WORKSPACE + measuring).max(widest)
}

/// What a matrix row becomes in packed order; the numbers are those of load.cu.
#[derive(Debug, Clone, Copy)]
enum Order {
    Natural,
    /// Pairs of the rotation, from that head on.
    Heads(usize),
    Gate,
    Up,
    /// Gate and up of the trunk, in the layout of geglu_wide.cu whatever the packing.
    WideGate,
    WideUp,
}

/// Reads tensors through the loader into buffers.
struct Reader<'a, 'b> {
    loader: &'a mut Loader<'b>,
    device: Arc<Device>,
    packing: Packing,
    /// Where matrices go while they fit: each of [`Reader::tower`] and [`Reader::decoder`] makes one of the size it needs.
    room: Room,
}

impl Reader<'_, '_> {
    /// The room, which nothing goes to from now on.
    fn leave_room(&mut self) -> Result<Room, EngineError> {
        debug_assert!(self.room.left() < ROOM_STEP, "{} bytes of the room were not needed", self.room.left());
        Ok(std::mem::replace(&mut self.room, Room::new(&self.device, 0)?))
    }

    /// Converts tensor `name` `[rows, cols]` into `to` from element `at` on, rows `stride` apart.
    fn place<T: super::device::Plain>(
        &mut self,
        name: &str,
        shape: &[usize],
        to: &Buffer<T>,
        at: usize,
        stride: usize,
        add: f32,
    ) -> Result<(), EngineError> {
        let (from, dtype) = self.loader.stage(name, shape)?;
        let cols: usize = shape.iter().skip(1).product();
        let (rows, cols) = if shape.len() == 1 { (1, shape[0]) } else { (shape[0], cols) };
        let args = CopyArgs {
            from,
            to: to.at(at),
            rows: rows as i64,
            cols: cols as i64,
            stride: stride as i64,
            dtype,
            to_f32: i32::from(size_of::<T>() == 4),
            transpose: 0,
            add,
            factor: 1.0,
        };
        self.loader.convert(&self.device.kernels().copy, rows * cols, &args)
    }

    fn matrix(&mut self, name: &str, rows: usize, cols: usize) -> Result<Buffer<u16>, EngineError> {
        let to = self.room.buffer(rows * cols)?;
        self.place(name, &[rows, cols], &to, 0, cols, 0.0)?;
        Ok(to)
    }

    /// Several matrices of `cols` columns, one below the other.
    fn stacked(&mut self, parts: &[(String, usize)], cols: usize) -> Result<Buffer<u16>, EngineError> {
        let to = self.room.buffer(parts.iter().map(|p| p.1).sum::<usize>() * cols)?;
        let mut at = 0;
        for (name, rows) in parts {
            self.place(name, &[*rows, cols], &to, at * cols, cols, 0.0)?;
            at += rows;
        }
        Ok(to)
    }

    fn vector<T: super::device::Plain>(
        &mut self,
        name: &str,
        len: usize,
        padded: usize,
        add: f32,
    ) -> Result<Buffer<T>, EngineError> {
        let to = Buffer::zeroed(&self.device, padded)?;
        self.place(name, &[len], &to, 0, len, add)?;
        Ok(to)
    }

    fn layer_norm(&mut self, name: &str, len: usize) -> Result<LayerNorm, EngineError> {
        Ok(LayerNorm {
            scale: self.vector(&format!("{name}.weight"), len, len, 0.0)?,
            shift: self.vector(&format!("{name}.bias"), len, len, 0.0)?,
        })
    }

    fn pack(
        &mut self,
        name: &str,
        rows: usize,
        cols: usize,
        order: Order,
        head_dim: usize,
        to: &Buffer<u16>,
    ) -> Result<(), EngineError> {
        let (from, dtype) = self.loader.stage(name, &[rows, cols])?;
        let ours = self.packing.layout();
        let (order, first, layout) = match order {
            Order::Natural => (0, 0, ours),
            Order::Heads(h) => (1, h, ours),
            Order::Gate => (2, 0, ours),
            Order::Up => (3, 0, ours),
            Order::WideGate => (2, 0, 2),
            Order::WideUp => (3, 0, 2),
        };
        let args = PackArgs {
            from,
            to: to.pointer(),
            rows: rows as i64,
            cols: cols as i64,
            padded_k: pad(cols, STEP_K) as i64,
            packed_rows: (to.len() / pad(cols, STEP_K)) as i64,
            dtype,
            order,
            first: first as i32,
            head_dim: head_dim as i32,
            layout,
        };
        self.loader.convert(&self.device.kernels().pack, rows * cols, &args)
    }

    fn expert_norm(&mut self, name: &str, dims: &Dims) -> Result<ExpertNorm, EngineError> {
        let (width, padded) = (dims.expert.width, pad(dims.expert.width, STEP_K));
        match dims.family {
            Family::Pi0 => Ok(ExpertNorm::Plain(self.vector(&format!("{name}.weight"), width, padded, 1.0)?)),
            Family::Pi05 => {
                let (weight, dtype) = self.loader.keep(&format!("{name}.dense.weight"), &[3 * width, width])?;
                let bias = self.vector(&format!("{name}.dense.bias"), 3 * width, 3 * width, 0.0)?;
                Ok(ExpertNorm::Adaptive { weight, dtype, bias })
            }
        }
    }

    fn expert_layer(&mut self, i: usize, dims: &Dims) -> Result<ExpertLayer, EngineError> {
        let (e, n) = (&dims.expert, ExpertSizes::new(&dims.expert));
        let layer = format!("{EXPERT}.layers.{i}");
        let name = |module: &str| format!("{layer}.{module}_proj.weight");
        let [qkv, out, gate_up, down] = n.matrices();
        let qkv = self.room.buffer(qkv)?;
        self.pack(&name("self_attn.q"), e.heads * e.head_dim, e.width, Order::Heads(0), e.head_dim, &qkv)?;
        self.pack(&name("self_attn.k"), e.head_dim, e.width, Order::Heads(e.heads), e.head_dim, &qkv)?;
        self.pack(&name("self_attn.v"), e.head_dim, e.width, Order::Heads(e.heads + 1), e.head_dim, &qkv)?;
        let out = self.room.buffer(out)?;
        self.pack(&name("self_attn.o"), e.width, e.heads * e.head_dim, Order::Natural, 2, &out)?;
        let gate_up = self.room.buffer(gate_up)?;
        self.pack(&name("mlp.gate"), e.mlp, e.width, Order::Gate, 2, &gate_up)?;
        self.pack(&name("mlp.up"), e.mlp, e.width, Order::Up, 2, &gate_up)?;
        let down = self.room.buffer(down)?;
        self.pack(&name("mlp.down"), e.width, e.mlp, Order::Natural, 2, &down)?;
        let norm1 = self.expert_norm(&format!("{layer}.input_layernorm"), dims)?;
        let norm2 = self.expert_norm(&format!("{layer}.post_attention_layernorm"), dims)?;
        Ok(ExpertLayer { norm1, qkv, out, norm2, gate_up, down })
    }

    /// `[rows, cols]` host values as the float32 matrix `[cols, padded rows]`.
    fn transposed(&self, values: &[f32], rows: usize, cols: usize, padded: usize) -> Result<Buffer<f32>, EngineError> {
        let mut t = vec![0.0; cols * padded];
        for (r, row) in values.chunks_exact(cols).enumerate() {
            for (c, v) in row.iter().enumerate() {
                t[c * padded + r] = *v;
            }
        }
        debug_assert_eq!(values.len(), rows * cols);
        Buffer::from_slice(&self.device, &t)
    }

    fn padded(&self, values: &[f32], len: usize) -> Result<Buffer<f32>, EngineError> {
        let to = Buffer::zeroed(&self.device, len)?;
        to.write(0, values)?;
        Ok(to)
    }

    fn suffix(&mut self, dims: &Dims) -> Result<Suffix, EngineError> {
        let (w, a) = (dims.expert.width, dims.action_dim);
        let n = ExpertSizes::new(&dims.expert);
        let action = self.loader.host("action_in_proj.weight", &[w, a])?;
        let action_bias = self.loader.host("action_in_proj.bias", &[w])?;
        if dims.family == Family::Pi05 {
            let mut layer = |name: &str| -> Result<(Vec<f32>, Vec<f32>), EngineError> {
                Ok((
                    self.loader.host(&format!("{name}.weight"), &[w, w])?,
                    self.loader.host(&format!("{name}.bias"), &[w])?,
                ))
            };
            let mlp = [layer("time_mlp_in")?, layer("time_mlp_out")?];
            return Ok(Suffix::Pi05 {
                action: self.transposed(&action, w, a, n.width)?,
                action_bias: self.padded(&action_bias, n.width)?,
                mlp,
            });
        }
        let first = self.loader.host("action_time_mlp_in.weight", &[w, 2 * w])?;
        let mut constant = self.loader.host("action_time_mlp_in.bias", &[w])?;
        let mut fold = vec![0.0; w * a];
        let mut time = vec![0.0; w * w];
        for (r, row) in first.chunks_exact(2 * w).enumerate() {
            let (on_action, on_time) = row.split_at(w);
            time[r * w..(r + 1) * w].copy_from_slice(on_time);
            let mut sums = vec![0.0f64; a];
            let mut bias = f64::from(constant[r]);
            for ((weight, projection), b) in on_action.iter().zip(action.chunks_exact(a)).zip(&action_bias) {
                for (s, p) in sums.iter_mut().zip(projection) {
                    *s += f64::from(*weight) * f64::from(*p);
                }
                bias += f64::from(*weight) * f64::from(*b);
            }
            for (f, s) in fold[r * a..(r + 1) * a].iter_mut().zip(&sums) {
                *f = *s as f32;
            }
            constant[r] = bias as f32;
        }
        let out = Buffer::zeroed(&self.device, n.width_rows * n.width)?;
        self.pack("action_time_mlp_out.weight", w, w, Order::Natural, 2, &out)?;
        let out_bias = self.vector("action_time_mlp_out.bias", w, n.width, 0.0)?;
        let state = self.loader.host("state_proj.weight", &[w, dims.state_dim])?;
        let state_bias = self.loader.host("state_proj.bias", &[w])?;
        Ok(Suffix::Pi0 {
            fold: self.transposed(&fold, w, a, n.width)?,
            constant,
            time,
            out,
            out_bias,
            state: self.transposed(&state, w, dims.state_dim, n.width)?,
            state_bias: self.padded(&state_bias, n.width)?,
        })
    }

    fn vision_layer(&mut self, i: usize, dims: &Dims) -> Result<VisionLayer, EngineError> {
        let v = &dims.vision;
        let layer = format!("{VISION}.encoder.layers.{i}");
        let attention = |part: &str, kind: &str| format!("{layer}.self_attn.{part}_proj.{kind}");
        let parts = ["q", "k", "v"];
        let qkv = self.stacked(&parts.map(|p| (attention(p, "weight"), v.width)), v.width)?;
        let qkv_bias = Buffer::zeroed(&self.device, 3 * v.width)?;
        for (at, p) in parts.iter().enumerate() {
            self.place(&attention(p, "bias"), &[v.width], &qkv_bias, at * v.width, v.width, 0.0)?;
        }
        Ok(VisionLayer {
            norm1: self.layer_norm(&format!("{layer}.layer_norm1"), v.width)?,
            qkv,
            qkv_bias,
            out: self.matrix(&attention("out", "weight"), v.width, v.width)?,
            out_bias: self.vector(&attention("out", "bias"), v.width, v.width, 0.0)?,
            norm2: self.layer_norm(&format!("{layer}.layer_norm2"), v.width)?,
            fc1: self.matrix(&format!("{layer}.mlp.fc1.weight"), v.mlp, v.width)?,
            fc1_bias: self.vector(&format!("{layer}.mlp.fc1.bias"), v.mlp, v.mlp, 0.0)?,
            fc2: self.matrix(&format!("{layer}.mlp.fc2.weight"), v.width, v.mlp)?,
            fc2_bias: self.vector(&format!("{layer}.mlp.fc2.bias"), v.width, v.width, 0.0)?,
        })
    }

    /// Matrices of `cols` columns, one below the other, packed for tower.cu; all but the last are whole tiles. `rotated`:
    /// they are heads of that dimension, whose halves are to lie side by side.
    fn tower_matrix(
        &mut self,
        parts: &[(String, usize)],
        cols: usize,
        rotated: Option<usize>,
    ) -> Result<Buffer<u16>, EngineError> {
        let k = plan::tower_pad(cols);
        let rows = parts.iter().map(|p| p.1).sum();
        let to = self.room.buffer(plan::tower_pad(rows) * k)?;
        let mut at = 0;
        for (name, rows) in parts {
            let (from, dtype) = self.loader.stage(name, &[*rows, cols])?;
            let args = PackArgs {
                from,
                to: to.at(at * k),
                rows: *rows as i64,
                cols: cols as i64,
                padded_k: k as i64,
                packed_rows: 0,
                dtype,
                order: i32::from(rotated.is_some()),
                first: 0,
                head_dim: rotated.unwrap_or(0) as i32,
                layout: 3,
            };
            self.loader.convert(&self.device.kernels().pack, rows * cols, &args)?;
            at += rows;
        }
        Ok(to)
    }

    /// The layers `names` of `rows` outputs each, one below the other, behind `norm`.
    fn folded(&mut self, names: &[String], rows: usize, norm: &LayerNorm) -> Result<Folded, EngineError> {
        let (width, outputs) = (norm.scale.len(), names.len() * rows);
        let parts: Vec<_> = names.iter().map(|n| (format!("{n}.weight"), rows)).collect();
        let w = self.tower_matrix(&parts, width, None)?;
        let padded = plan::tower_pad(outputs);
        let [fold, bias] = [Buffer::zeroed(&self.device, padded)?, Buffer::zeroed(&self.device, padded)?];
        for (part, name) in names.iter().enumerate() {
            self.place(&format!("{name}.bias"), &[rows], &bias, part * rows, rows, 0.0)?;
        }
        let hopper = self.device.kernels().hopper().ok_or_else(plan::packed_for_hopper)?;
        let args = TowerFoldArgs {
            w: w.pointer(),
            scale: norm.scale.pointer(),
            shift: norm.shift.pointer(),
            bias: bias.pointer(),
            fold: fold.pointer(),
            folded_bias: bias.pointer(),
            outputs: outputs as i32,
            tiles: (padded / TOWER_TILE) as i32,
            k_blocks: (plan::tower_pad(width) / TOWER_K) as i32,
        };
        self.loader.per_warp(&hopper.tower_fold, padded, &args)?;
        Ok(Folded { w, fold, bias })
    }

    fn tower_layer(&mut self, i: usize, dims: &Dims) -> Result<TowerLayer, EngineError> {
        let v = &dims.vision;
        let layer = format!("{VISION}.encoder.layers.{i}");
        let norm1 = self.layer_norm(&format!("{layer}.layer_norm1"), v.width)?;
        let norm2 = self.layer_norm(&format!("{layer}.layer_norm2"), v.width)?;
        let attention = |part: &str| format!("{layer}.self_attn.{part}_proj");
        let (out, fc1, fc2) = (attention("out"), format!("{layer}.mlp.fc1"), format!("{layer}.mlp.fc2"));
        Ok(TowerLayer {
            qkv: self.folded(&["q", "k", "v"].map(attention), v.width, &norm1)?,
            out: self.tower_matrix(&[(format!("{out}.weight"), v.width)], v.width, None)?,
            out_bias: self.vector(&format!("{out}.bias"), v.width, v.width, 0.0)?,
            fc1: self.folded(&[fc1], v.mlp, &norm2)?,
            fc2: self.tower_matrix(&[(format!("{fc2}.weight"), v.width)], v.mlp, None)?,
            fc2_bias: self.vector(&format!("{fc2}.bias"), v.width, v.width, 0.0)?,
            norm1,
            norm2,
        })
    }

    /// SigLIP's layers, and the room that their matrices are in.
    fn tower(&mut self, dims: &Dims) -> Result<(Tower, Room), EngineError> {
        let v = &dims.vision;
        let (layers, packed) = (0..v.layers, self.packing.tower(v));
        self.room = Room::new(&self.device, layers_room(v.layers, tower_matrices(v, packed)))?;
        let tower = if packed {
            Tower::Packed(layers.map(|i| self.tower_layer(i, dims)).collect::<Result<_, _>>()?)
        } else {
            Tower::Rows(layers.map(|i| self.vision_layer(i, dims)).collect::<Result<_, _>>()?)
        };
        Ok((tower, self.leave_room()?))
    }

    fn trunk_out(&mut self, name: &str, t: &StackDims) -> Result<Buffer<u16>, EngineError> {
        if self.packing.wide_trunk(t) {
            return self.tower_matrix(&[(name.into(), t.width)], t.heads * t.head_dim, None);
        }
        self.matrix(name, t.width, t.heads * t.head_dim)
    }

    fn gate_up(&mut self, gate: &str, up: &str, t: &StackDims) -> Result<Buffer<u16>, EngineError> {
        if !self.packing.wide_trunk(t) {
            return self.stacked(&[(gate.into(), t.mlp), (up.into(), t.mlp)], t.width);
        }
        let to = Buffer::zeroed(&self.device, 2 * t.mlp * t.width)?;
        self.pack(gate, t.mlp, t.width, Order::WideGate, 2, &to)?;
        self.pack(up, t.mlp, t.width, Order::WideUp, 2, &to)?;
        Ok(to)
    }

    fn trunk_layer(&mut self, i: usize, dims: &Dims) -> Result<TrunkLayer, EngineError> {
        let t = &dims.trunk;
        let layer = format!("{TRUNK}.layers.{i}");
        let name = |module: &str| format!("{layer}.{module}_proj.weight");
        let last = i + 1 == t.layers;
        let mut parts = vec![(name("self_attn.k"), t.head_dim), (name("self_attn.v"), t.head_dim)];
        if !last {
            parts.insert(0, (name("self_attn.q"), t.heads * t.head_dim));
        }
        let norm1 = self.vector(&format!("{layer}.input_layernorm.weight"), t.width, t.width, 1.0)?;
        let qkv = if self.packing.wide_trunk(t) {
            self.tower_matrix(&parts, t.width, Some(t.head_dim))?
        } else {
            self.stacked(&parts, t.width)?
        };
        let rest = if last {
            None
        } else {
            Some(TrunkRest {
                out: self.trunk_out(&name("self_attn.o"), t)?,
                norm2: self.vector(&format!("{layer}.post_attention_layernorm.weight"), t.width, t.width, 1.0)?,
                gate_up: self.gate_up(&name("mlp.gate"), &name("mlp.up"), t)?,
                down: self.matrix(&name("mlp.down"), t.width, t.mlp)?,
            })
        };
        Ok(TrunkLayer { norm1, qkv, rest })
    }

    fn encoder(&mut self, dims: &Dims) -> Result<EncoderWeights, EngineError> {
        let v = &dims.vision;
        let (stride, tokens) = (plan::patch_stride(dims), v.tokens());
        let patch = Buffer::zeroed(&self.device, v.width * stride)?;
        let embeddings = format!("{VISION}.embeddings");
        let shape = [v.width, 3, v.patch, v.patch];
        self.place(&format!("{embeddings}.patch_embedding.weight"), &shape, &patch, 0, stride, 0.0)?;
        let bias = self.loader.host(&format!("{embeddings}.patch_embedding.bias"), &[v.width])?;
        let mut position = self.loader.host(&format!("{embeddings}.position_embedding.weight"), &[tokens, v.width])?;
        for row in position.chunks_exact_mut(v.width) {
            row.iter_mut().zip(&bias).for_each(|(p, b)| *p += b);
        }
        let (tower, tower_room) = self.tower(dims)?;
        Ok(EncoderWeights {
            patch,
            position: Buffer::from_slice(&self.device, &position.repeat(MAX_VIEWS))?,
            tower,
            tower_room,
            post_norm: self.layer_norm(&format!("{VISION}.post_layernorm"), v.width)?,
            projector: self.matrix(&format!("{PROJECTOR}.weight"), dims.trunk.width, v.width)?,
            projector_bias: self.vector(&format!("{PROJECTOR}.bias"), dims.trunk.width, dims.trunk.width, 0.0)?,
            trunk: (0..dims.trunk.layers).map(|i| self.trunk_layer(i, dims)).collect::<Result<_, _>>()?,
            wide_trunk: self.packing.wide_trunk(&dims.trunk),
            tokens: self.loader.token_table()?,
        })
    }

    fn decoder(&mut self, dims: &Dims) -> Result<DecoderWeights, EngineError> {
        let padded = pad(dims.expert.width, STEP_K);
        let to = Buffer::zeroed(&self.device, dims.action_dim * padded)?;
        self.place("action_out_proj.weight", &[dims.action_dim, dims.expert.width], &to, 0, padded, 0.0)?;
        let matrices = ExpertSizes::new(&dims.expert).matrices();
        self.room = Room::new(&self.device, layers_room(dims.expert.layers, matrices))?;
        let layers = (0..dims.expert.layers).map(|i| self.expert_layer(i, dims)).collect::<Result<_, _>>()?;
        self.leave_room()?;
        Ok(DecoderWeights {
            packing: self.packing,
            layers,
            final_norm: self.expert_norm(&format!("{EXPERT}.norm"), dims)?,
            suffix: self.suffix(dims)?,
            out: to,
            out_bias: self.loader.host("action_out_proj.bias", &[dims.action_dim])?,
        })
    }
}

/// Brings all weights of `source` to `device`, packed for `packing`.
pub(super) fn load(
    device: &Arc<Device>,
    dims: &Dims,
    source: Source<'_>,
    packing: Packing,
) -> Result<(EncoderWeights, DecoderWeights), EngineError> {
    let (free, _) = device.memory()?;
    faults::room(device.name(), device_bytes(dims), free)?;
    let mut loader = Loader::new(device, source, elements(dims))?;
    let room = Room::new(device, 0)?;
    let mut reader = Reader { loader: &mut loader, device: Arc::clone(device), packing, room };
    let weights = (reader.encoder(dims)?, reader.decoder(dims)?);
    loader.finish()?;
    Ok(weights)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rooms_of_the_published_model_hold_its_matrices_and_no_more() {
        let dims = Dims::published(50);
        let (v, e) = (&dims.vision, &dims.expert);
        // 3456, 1152 and 4352 rows (4304, padded) of 1152 bf16, and 1152 of 4352.
        let layer = (3456 + 1152 + 4352 + 4352) * 1152 * 2;
        assert_eq!(layers_room(v.layers, tower_matrices(v, true)), 27 * layer);
        let layer = (3456 + 1152 + 4304 + 4304) * 1152 * 2;
        assert_eq!(layers_room(v.layers, tower_matrices(v, false)), 27 * layer);
        let layer = (2560 + 8192) * 1024 * 2 + 1024 * (2048 + 4096) * 2;
        assert_eq!(layers_room(e.layers, ExpertSizes::new(e).matrices()), 18 * layer);
    }

    #[test]
    fn buffers_of_a_room_begin_at_whole_steps() {
        assert_eq!(room_bytes([1, 256, 257, 0]), 256 + 256 + 512);
    }
}
