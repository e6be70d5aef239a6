//! Which kernel, how many blocks and how much shared memory: pure functions of the dimensions, tested without a GPU.
//!
//! No sum here depends on the number of SMs: slices of K and the order of their sums are fixed by the shape, so results
//! are bitwise equal whatever share of the GPU runs them.

use super::device::Capability;
use super::weights::MAX_VIEWS;
use crate::engine::EngineError;
use crate::model::{Dims, Family, StackDims, VisionDims};

/// Which kernels the stages run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Path {
    /// Clusters, bulk copies, dependent launch and matrix instructions of sm_90a.
    Hopper,
    /// What every chip from sm_80 on can run.
    Portable,
}

impl Path {
    /// The one for a chip. `built`: whether this build has machine code for sm_90a; `portable`: whether the portable
    /// kernels are asked for on any chip.
    pub fn of(capability: Capability, built: bool, portable: bool) -> Self {
        if capability == (9, 0) && built && !portable { Path::Hopper } else { Path::Portable }
    }

    /// As users read it.
    pub fn name(self) -> &'static str {
        match self {
            Path::Hopper => "kernels for sm_90a",
            Path::Portable => "portable kernels",
        }
    }
}

/// Dynamic shared memory of one block on sm_90, less what kernels declare themselves.
pub(super) const HOPPER_SHARED: usize = 224 * 1024;
/// Shared memory of one block on every chip from sm_80 on: sm_86, sm_89 and sm_120 have no more, sm_80 and sm_87 163 KB.
pub(super) const PORTABLE_SHARED: usize = 99 * 1024;

/// Weight rows a block of the skinny product owns.
pub(super) const TILE: usize = 64;
/// K of one step of it.
pub(super) const STEP_K: usize = 128;
/// Token tiles of 8 rows it is compiled for.
pub(super) const TOKEN_TILES: [usize; 4] = [2, 4, 7, 8];
/// Padded head dimensions the decoder's attention is compiled for.
pub(super) const DECODE_HEAD_DIMS: [usize; 4] = [32, 64, 128, 256];
/// Padded head dimensions the encoder's attention is compiled for.
pub(super) const HEAD_DIMS: [usize; 4] = [32, 80, 128, 256];
/// Blocks over which the decoder's attention splits the keys.
pub(super) const KEY_SPLITS: usize = 8;
/// Query rows of one block of it.
pub(super) const QUERY_ROWS: usize = 32;
/// Most keys one pass of it holds.
const MAX_KEY_TILE: usize = 128;
/// Cluster sizes the skinny product is compiled for; every chip schedules up to 8.
pub(super) const CLUSTERS: [usize; 4] = [1, 2, 4, 8];
/// Bytes of sums in shared memory: 68 floats a token row.
const SUMS_PER_ROW: usize = 68 * 4;

/// `n` rounded up to a multiple of `to`.
pub(super) fn pad(n: usize, to: usize) -> usize {
    n.div_ceil(to) * to
}

/// One skinny product: `tiles` of 64 weight rows by `cluster` slices of K.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct SkinnyPlan {
    pub tiles: usize,
    pub k: usize,
    pub slice: usize,
    pub cluster: usize,
    pub shared: usize,
}

/// The plan of a product of `rows` weight rows over `k`, with `token_tiles` tiles of 8 tokens. `slice` is the K of one
/// block wished for; it grows until the slices of one tile fit a cluster.
pub(super) fn skinny(rows: usize, k: usize, token_tiles: usize, slice: usize) -> SkinnyPlan {
    let k = pad(k, STEP_K);
    let steps = k / STEP_K;
    // The number of slices must divide the steps, so that all are equal.
    let wished = (k / slice.max(STEP_K)).max(1);
    let cluster = CLUSTERS.into_iter().rev().find(|c| *c <= wished && steps.is_multiple_of(*c)).unwrap_or(1);
    let slice = k / cluster;
    let own = slice / STEP_K;
    let stage = STEP_K / 8 * (8 * token_tiles + 2) * 16;
    let ring = own * TILE * STEP_K * 2 + stage * own.min(3);
    // Partial sums, and behind them what the peers send: 64 floats a token row and slice.
    let rows_in = 8 * token_tiles;
    let sums = SUMS_PER_ROW * rows_in + cluster * rows_in.div_ceil(cluster) * TILE * 4;
    SkinnyPlan { tiles: rows.div_ceil(TILE), k, slice, cluster, shared: ring.max(sums) }
}

impl SkinnyPlan {
    /// Refuses a product whose slice is more than a block holds: K has too few divisors to be cut smaller.
    pub fn check(&self) -> Result<(), EngineError> {
        if self.shared <= HOPPER_SHARED {
            return Ok(());
        }
        Err(EngineError::Shape {
            what: "action expert",
            expected: format!(
                "products over a K that is cut into slices of {HOPPER_SHARED} bytes (device:=cpu cuts none)"
            ),
            found: format!("K = {} in {} slices of {} bytes", self.k, self.cluster, self.shared),
        })
    }
}

/// Index into [`TOKEN_TILES`] for `rows` tokens.
pub(super) fn token_tiles(rows: usize) -> Option<usize> {
    TOKEN_TILES.iter().position(|t| 8 * t >= rows)
}

/// Token rows of the largest step: the actions and, for π0, the state.
pub(super) fn suffix_rows(dims: &Dims) -> usize {
    dims.horizon + usize::from(dims.family == Family::Pi0)
}

/// Keys a pass of the decoder's attention and its shared memory, for `keys` in all.
pub(super) fn decode_attention(keys: usize, head_dim: usize) -> (usize, usize) {
    let tile = pad(keys.div_ceil(KEY_SPLITS), 16).clamp(16, MAX_KEY_TILE);
    let row = (head_dim + 8) * 2;
    let queries = QUERY_ROWS * row;
    // What the other ranks send lies over the keys.
    let inbox = QUERY_ROWS * head_dim * 4;
    let scores = QUERY_ROWS * (tile + 4) * 4;
    (tile, queries + inbox.max(tile * row) + tile * row + scores)
}

/// Query rows of a block of attention.cuh.
pub(super) const ATTENTION_ROWS: usize = 64;

/// Shared memory of a block of attention.cuh: queries, and two stages of `keys` keys and values.
fn attend_shared(head_dim: usize, keys: usize) -> usize {
    (ATTENTION_ROWS + 4 * keys) * (head_dim + 8) * 2
}

/// Shared memory of the encoder's attention. It is compiled for tiles of 64 keys, or of 32 where those do not fit every
/// chip.
pub(super) fn attention_shared(head_dim: usize) -> usize {
    let wide = attend_shared(head_dim, 64);
    if wide <= PORTABLE_SHARED { wide } else { attend_shared(head_dim, 32) }
}

/// Shared memory of a block of traffic.cu: on Hopper that of the persistent decoder, else as much as every chip has.
pub(super) fn traffic_shared(hopper: bool) -> usize {
    if hopper { PERSISTENT_SHARED } else { PORTABLE_SHARED }
}

/// Most parts that the portable attention splits the keys into; a part is a multiple of 32 keys.
pub(super) const PARTS: usize = 16;

/// Shared memory of the portable decoder's attention.
pub(super) fn portable_attention_shared(head_dim: usize) -> usize {
    attend_shared(head_dim, 32)
}

/// Weight rows of one block of a portable product whose sums join the residual; their squares are summed over as many.
pub(super) const PORTABLE_ROWS: usize = 16;

/// Blocks, threads and shared memory of a portable product.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct PortablePlan {
    pub blocks: usize,
    pub threads: usize,
    pub shared: usize,
}

/// The plan of a portable product of `tiles` packed tiles. `pairs`: its sums are finished in pairs, so a block takes the
/// rows of both; otherwise they join the residual, over a K so long that twice the warps share it.
pub(super) fn portable(tiles: usize, token_tiles: usize, pairs: bool) -> PortablePlan {
    let (rows, warps) = if pairs { (2 * PORTABLE_ROWS, 8) } else { (PORTABLE_ROWS, 16) };
    // Each warp's sums, every row of them padded by four floats.
    let shared = warps * 8 * token_tiles * (rows + 4) * 4;
    PortablePlan { blocks: tiles * (TILE / rows), threads: 32 * warps, shared }
}

/// Head dimension that attention_wide.cu is for.
pub(super) const WIDE_HEAD: usize = 256;
/// Query rows, of all heads together, that a cluster of it takes: what it is compiled for.
pub(super) const WIDE_ROWS: [usize; 4] = [40, 72, 96, 104];
/// Blocks of a cluster.
const WIDE_BLOCKS: usize = 2;
/// What a cluster's keys and values cost, in query rows.
const WIDE_KEYS_COST: usize = 100;

/// Shared memory of a block with `rows` queries: `Wide` of attention_wide.cu, and what aligns it.
pub(super) fn wide_shared(rows: usize) -> usize {
    let (row, keys, weights) = (WIDE_HEAD * 2, 64 * WIDE_HEAD * 2, 9 * rows * 64 * 2);
    let late = match rows {
        ..=72 => 4,
        73..=96 => 3,
        _ => 2,
    };
    let queries_end = 5 * keys + rows * row;
    let late_end = 2 * keys + weights + 2 * late * 64 * 64 * 2;
    queries_end.max(late_end) + 1024
}

/// One launch of attention_wide.cu, of 256 threads a block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct WidePlan {
    /// Index into [`WIDE_ROWS`].
    pub variant: usize,
    pub blocks: usize,
    pub cluster: usize,
    pub shared: usize,
}

/// The plan for `rows` queries of all heads on `sms` SMs. Only the cut into clusters follows the SMs: what is worked out
/// for a row is the same in all.
pub(super) fn attention_wide(rows: usize, sms: usize) -> WidePlan {
    let clusters = |n: usize| rows.div_ceil(n);
    let cost = |n: usize| clusters(n).div_ceil((sms / WIDE_BLOCKS).max(1)) * (n + WIDE_KEYS_COST);
    let variant = (0..WIDE_ROWS.len()).min_by_key(|i| cost(WIDE_ROWS[*i])).unwrap_or(0);
    let n = WIDE_ROWS[variant];
    WidePlan { variant, blocks: WIDE_BLOCKS * clusters(n), cluster: WIDE_BLOCKS, shared: wide_shared(n) }
}

/// Head dimension and keys that attention_vision.cu is for, at most.
const VISION_HEAD: usize = 72;
const VISION_KEYS: usize = 256;

/// Query rows of a block of it.
pub(super) const VISION_ROWS: usize = 128;
/// Shared memory of a block: queries, keys and values, rows of 80.
pub(super) const VISION_SHARED: usize = (VISION_ROWS + 2 * VISION_KEYS) * 80 * 2;

/// Whether it covers a shape.
pub(super) fn attention_vision(head_dim: usize, keys: usize) -> bool {
    head_dim <= VISION_HEAD && head_dim.is_multiple_of(8) && (1..=VISION_KEYS).contains(&keys)
}

/// Tokens of a tile, and of a short one, that geglu_wide.cu is compiled for.
pub(super) const GEGLU_TOKENS: [(usize, usize); 8] =
    [(96, 72), (128, 72), (144, 72), (160, 72), (176, 72), (184, 72), (184, 112), (192, 72)];
/// Hidden units of a tile of it: as many rows of the gate and as many of the up projection.
const GEGLU_UNITS: usize = 128;
/// K of one stage of its ring.
const GEGLU_K: usize = 64;
/// What starting and finishing a tile costs, in cycles.
const GEGLU_TILE_COST: usize = 3000;

/// Stages of its ring at most.
const GEGLU_STAGES: usize = 5;

/// Shared memory of a block for tiles of `tokens`: the ring, and what aligns it.
pub(super) fn geglu_shared(tokens: usize) -> usize {
    let stage = (2 * GEGLU_UNITS + tokens) * GEGLU_K * 2;
    HOPPER_SHARED / stage * stage + 1024
}

/// One launch of geglu_wide.cu, of 384 threads a block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct GegluPlan {
    /// Index into [`GEGLU_TOKENS`].
    pub variant: usize,
    pub token_tiles: usize,
    pub short_tiles: usize,
    pub weight_tiles: usize,
    /// The weight tile from which on tiles of tokens are short.
    pub first_short: usize,
    pub k_blocks: usize,
    pub blocks: usize,
    pub shared: usize,
    /// K blocks that one group of warps is ahead of the other.
    pub lead: usize,
}

/// The plan of the gated product of `tokens` with `mlp` hidden units over `k`, on `sms` SMs; none where it does not
/// cover the shape. Only the cut into tiles follows the SMs: what a sum adds, and in which order, is the same for all.
pub(super) fn geglu_wide(tokens: usize, mlp: usize, k: usize, sms: usize) -> Option<GegluPlan> {
    if tokens == 0 || sms == 0 || !mlp.is_multiple_of(GEGLU_UNITS) || !k.is_multiple_of(GEGLU_K) {
        return None;
    }
    let weight_tiles = mlp / GEGLU_UNITS;
    // By what shared memory writes and reads at 128 bytes a cycle, or the matrix unit multiplies.
    let tile = |n: usize| k / GEGLU_K * (4 * GEGLU_UNITS + 5 * n).max(8 * n) + GEGLU_TILE_COST;
    // Of the block that takes longest: the first, or the first of those that have one long tile less.
    let cost = |(n, short): (usize, usize), first_short: usize| {
        let long = first_short * tokens.div_ceil(n);
        let all = long + (weight_tiles - first_short) * tokens.div_ceil(short);
        let of = |block: usize| {
            let [long, all] = [long, all].map(|units| (units + sms - 1 - block) / sms);
            long * tile(n) + (all - long) * tile(short)
        };
        of(0).max(of(long % sms))
    };
    let cuts = (0..GEGLU_TOKENS.len()).flat_map(|v| (0..=weight_tiles).rev().map(move |first| (v, first)));
    let (variant, first_short) = cuts.min_by_key(|(v, first)| cost(GEGLU_TOKENS[*v], *first))?;
    let (n, short) = GEGLU_TOKENS[variant];
    let plan = GegluPlan {
        variant,
        token_tiles: tokens.div_ceil(n),
        short_tiles: tokens.div_ceil(short),
        weight_tiles,
        first_short,
        k_blocks: k / GEGLU_K,
        blocks: sms,
        shared: geglu_shared(n),
        lead: 2,
    };
    (plan.k_blocks >= GEGLU_STAGES).then_some(plan)
}

/// What becomes of the sums of a product of tower.cu.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum TowerKind {
    /// They are those of rows behind a norm.
    Rows,
    /// The same, then GELU.
    Gelu,
    /// They are added to the residual.
    Add,
    /// Queries, keys and values behind a norm: rotated, keys and values to the cache.
    Rotated,
}

/// What tower.cu is compiled for: groups of 64 outputs of a block, and tokens.
pub(super) const TOWER_VARIANTS: [(TowerKind, usize, usize); 23] = [
    (TowerKind::Rows, 2, 64),
    (TowerKind::Rows, 2, 128),
    (TowerKind::Rows, 3, 80),
    (TowerKind::Rows, 3, 112),
    (TowerKind::Rows, 3, 128),
    (TowerKind::Gelu, 2, 88),
    (TowerKind::Gelu, 2, 128),
    (TowerKind::Gelu, 3, 104),
    (TowerKind::Gelu, 3, 160),
    (TowerKind::Gelu, 3, 176),
    (TowerKind::Add, 1, 48),
    (TowerKind::Add, 1, 80),
    (TowerKind::Add, 1, 112),
    (TowerKind::Add, 1, 72),
    (TowerKind::Add, 1, 128),
    (TowerKind::Add, 1, 136),
    (TowerKind::Add, 1, 200),
    (TowerKind::Add, 2, 112),
    (TowerKind::Rotated, 1, 48),
    (TowerKind::Rotated, 1, 96),
    (TowerKind::Rotated, 1, 184),
    (TowerKind::Rotated, 2, 136),
    (TowerKind::Rotated, 2, 184),
];
/// Outputs of a tile of it.
pub(super) const TOWER_TILE: usize = 64;
/// K of a block of its packed matrices.
pub(super) const TOWER_K: usize = 64;
/// Outputs or K of a product, padded so that tiles are whole and any stage of a ring, of this product or of the one that
/// takes its outputs, is full.
pub(super) fn tower_pad(n: usize) -> usize {
    pad(n, TOWER_TILE.max(TOWER_K * TOWER_DEEP))
}

/// Blocks of K of a stage at most.
const TOWER_DEEP: usize = 2;
/// Stages of its ring at most.
const TOWER_STAGES: usize = 8;
/// Shared memory of a block but for what aligns it.
const TOWER_SHARED: usize = 225 * 1024;

/// What starting and finishing a unit of work costs, in cycles.
const TOWER_UNIT_COST: usize = 3000;

/// Blocks of K that a stage of its ring holds: with one group and few tokens they are short.
fn tower_deep(groups: usize, tokens: usize) -> usize {
    if groups == 1 && tokens <= 136 { TOWER_DEEP } else { 1 }
}

/// Bytes of a stage of the ring of a block, and of what else it keeps in shared memory: results, and norms or sums.
fn tower_stage((kind, groups, tokens): (TowerKind, usize, usize)) -> (usize, usize) {
    let stage = (TOWER_TILE * groups + tokens) * TOWER_K * 2 * tower_deep(groups, tokens);
    let small = if kind == TowerKind::Add { 4 * groups } else { 1 } * tokens * 8;
    (stage, groups * tokens * TOWER_TILE * 2 + small)
}

/// Shared memory of a block: the ring, the rest, and what aligns both; so much that an SM holds one block.
pub(super) fn tower_shared(variant: (TowerKind, usize, usize)) -> usize {
    let (stage, rest) = tower_stage(variant);
    let stages = ((TOWER_SHARED - rest) / stage).min(TOWER_STAGES);
    (stages * stage + rest + 1024).max(EXCLUSIVE_SHARED)
}

/// One launch of tower.cu.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct TowerPlan {
    /// Index into [`TOWER_VARIANTS`].
    pub variant: usize,
    pub token_tiles: usize,
    pub weight_tiles: usize,
    pub blocks: usize,
    pub threads: usize,
    pub shared: usize,
}

/// The plan of a product with `tiles` tiles of 64 outputs and `k_blocks` blocks of K for `tokens` on `sms` SMs. Only the
/// cut into blocks follows the SMs: what a sum adds, and in which order, is the same for all.
pub(super) fn tower(kind: TowerKind, tiles: usize, k_blocks: usize, tokens: usize, sms: usize) -> TowerPlan {
    let units = |(_, g, n): (TowerKind, usize, usize)| tiles.div_ceil(g) * tokens.div_ceil(n);
    // Shared memory moves 128 bytes a cycle: what comes in, and what the matrix unit reads for each group.
    let cost = |(kind, g, n): (TowerKind, usize, usize)| {
        let unit = k_blocks * (2 * TOWER_TILE * g + n + g * n) + TOWER_UNIT_COST;
        units((kind, g, n)).div_ceil(sms.max(1)) * unit
    };
    let fit = (0..TOWER_VARIANTS.len()).filter(|i| TOWER_VARIANTS[*i].0 == kind);
    let variant = fit.min_by_key(|i| cost(TOWER_VARIANTS[*i])).unwrap_or(0);
    let chosen @ (_, g, n) = TOWER_VARIANTS[variant];
    TowerPlan {
        variant,
        token_tiles: tokens.div_ceil(n),
        weight_tiles: tiles.div_ceil(g),
        blocks: units(chosen).min(sms),
        // One warp fetches; where there are norms another one measures.
        threads: 128 * g + if kind == TowerKind::Add { 32 } else { 64 },
        shared: tower_shared(chosen),
    }
}

/// Parts that the norm of pointwise.cu is compiled to add to the residual first; 0: the product in front did that itself.
pub(super) const NORM_PARTS: [usize; 2] = [0, K_PARTS];
/// Parts of a long product that is cut along K, so that its tiles fill the SMs.
const K_PARTS: usize = 2;
/// Rows up to which it is.
const SPLIT_ROWS: usize = 1088;
/// A product is long where K is so many times its outputs.
const SPLIT_K: usize = 4;

/// In how many parts along K the product in front of a norm is worked out, each with sums of its own: index into
/// [`NORM_PARTS`].
pub(super) fn norm_parts(rows: usize, k: usize, outputs: usize) -> usize {
    usize::from(rows <= SPLIT_ROWS && k >= SPLIT_K * outputs && k.is_multiple_of(K_PARTS * STEP_K))
}

/// Rows of all parts of such a product, at most, where it has up to `rows` rows.
pub(super) fn part_rows(rows: usize, k: usize, outputs: usize) -> usize {
    (0..=rows).map(|n| n * NORM_PARTS[norm_parts(n, k, outputs)]).max().unwrap_or(0)
}

/// Warps of a block of pointwise.cu's norm, and pieces of four columns that a thread takes, at most.
const NORM_WARPS: usize = 8;
const NORM_PIECES: usize = 4;

/// Threads of a block of it: as few as leave the fewest idle.
pub(super) fn norm_threads(width: usize) -> u32 {
    let pieces = width.div_ceil(4);
    let threads = (1..=NORM_WARPS).map(|w| 32 * w).filter(|t| pieces <= NORM_PIECES * t);
    threads.min_by_key(|t| pieces.next_multiple_of(*t)).unwrap_or(32 * NORM_WARPS) as u32
}

/// Index and padded size of the smallest compiled head dimension that holds `head_dim`.
pub(super) fn head_dim(compiled: &[usize], head_dim: usize) -> Option<(usize, usize)> {
    compiled.iter().position(|d| *d >= head_dim).map(|i| (i, compiled[i]))
}

/// Patch columns as the tower's first product wants them: 16-byte rows.
pub(super) fn patch_stride(dims: &Dims) -> usize {
    pad(3 * dims.vision.patch * dims.vision.patch, 8)
}

/// K slices of the decoder's products, chosen on an H200 (docs/performance.md).
#[derive(Debug, Clone, Copy)]
pub(super) struct Slices {
    pub qkv: usize,
    pub out: usize,
    pub gate_up: usize,
    pub down: usize,
}

/// The default of [`Slices`].
pub(super) const SLICES: Slices = Slices { qkv: 256, out: 256, gate_up: 512, down: 512 };

/// The kernels of one layer, in order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stage {
    /// Norm and attention projections.
    Qkv,
    /// Attention.
    Attention,
    /// Output projection of the attention.
    Out,
    /// Norm, gate and up projections.
    GateUp,
    /// Down projection.
    Down,
}

/// Which kernel moves the weights of which later one into L2, chosen with [`SLICES`].
pub(super) const PREFETCH: [Option<(Stage, Stage)>; 5] = [None; 5];

/// Kernels that ask for so much shared memory that an SM holds one of their blocks at most. A kernel that starts early
/// goes wherever there is room, and two of its blocks on one SM while others stand empty cost more than prefetching
/// saves. In the order of [`Stage`]; chosen with [`SLICES`].
pub(super) const EXCLUSIVE: [bool; 5] = [false, true, false, false, false];
/// More than half of what an SM has.
pub(super) const EXCLUSIVE_SHARED: usize = 116 * 1024;

/// What weights are packed for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Packing {
    /// The published model on sm_90a: one cooperative kernel a decode (persistent.cu), the trunk's gated product
    /// (geglu_wide.cu), the products of SigLIP's layers, and those around the trunk's attention (tower.cu).
    Published,
    /// Any dimensions and chip: five kernels a layer of the decoder, and GEMMs of cuBLASLt.
    General,
}

impl Packing {
    /// Layout of packed weights, as load.cu numbers them.
    pub(super) fn layout(self) -> i32 {
        match self {
            Self::General => 0,
            Self::Published => 1,
        }
    }

    /// Whether the projections around the trunk's attention are packed for tower.cu, and its gate and up projections for
    /// geglu_wide.cu, with the norms in front of products folded in.
    pub(super) fn wide_trunk(self, trunk: &StackDims) -> bool {
        let whole = |n: usize| n.is_multiple_of(TOWER_K * TOWER_DEEP);
        self == Self::Published
            && geglu_wide(1, trunk.mlp, trunk.width, 1).is_some()
            && trunk.head_dim == WIDE_HEAD
            && whole(trunk.width)
            && whole(trunk.heads * trunk.head_dim)
    }

    /// Whether the matrices of SigLIP's layers are packed for tower.cu: whole tiles and octets of tokens, attention that
    /// leaves packed rows, and a K that fills the ring.
    pub(super) fn tower(self, v: &VisionDims) -> bool {
        let longest_ring = TOWER_STAGES * TOWER_K * TOWER_DEEP;
        self == Self::Published
            && v.heads > 0
            && v.width.is_multiple_of(v.heads)
            && v.width.is_multiple_of(TOWER_K * TOWER_DEEP)
            && v.width.min(v.mlp) >= longest_ring
            && v.tokens().is_multiple_of(8)
            && attention_vision(v.width / v.heads, v.tokens())
    }

    /// Elements from one row of keys or values in the cache to the next: padded where the decoder takes many at once into
    /// shared memory.
    pub(super) fn cache_row(self, head_dim: usize) -> usize {
        match self {
            Self::General => head_dim,
            Self::Published => head_dim + 8,
        }
    }
}

/// Shared memory of a block of the persistent decoder (persistent.cu asserts that its struct fits).
pub(super) const PERSISTENT_SHARED: usize = 227 * 1024;
/// Blocks of one of its clusters.
pub(super) const RANKS: usize = 4;
/// Token rows of one of its activation panels.
pub(super) const PANEL_ROWS: usize = 52;
/// Partial sums of squares of a token row: one for eight columns.
pub(super) const SQUARES: usize = PUBLISHED.width / 8;
/// Token rows at most (kMostRows of persistent.cuh): one fewer than a panel has.
const PERSISTENT_ROWS: usize = PANEL_ROWS - 1;
/// Pieces of keys that a rank has at most.
const MOST_PIECES: usize = 23;
/// Variants of it: pieces of keys that a rank has at most, of which five fit its ring, and tiles of a unit of gate/up.
pub(super) const PERSISTENT_VARIANTS: [(usize, usize); 7] =
    [(3, 9), (5, 9), (MOST_PIECES, 9), (5, 10), (MOST_PIECES, 10), (5, 11), (MOST_PIECES, 11)];
/// Keys of a piece.
const PIECE_KEYS: usize = 32;
/// Rows of a prefix at most.
const PERSISTENT_PREFIX: usize = RANKS * MOST_PIECES * PIECE_KEYS;
/// The action expert it is compiled for.
const PUBLISHED: StackDims = StackDims { layers: 18, width: 1024, mlp: 4096, heads: 8, head_dim: 256 };

/// Positions that the model's tables cover.
pub(super) fn positions(dims: &Dims) -> usize {
    MAX_VIEWS * dims.vision.tokens() + dims.max_tokens.max(256) + 64
}

/// The packing for these dimensions, on a chip that has the kernels of sm_90a or not; `asked` overrides the choice.
pub(super) fn packing(dims: &Dims, hopper: bool, asked: Option<Packing>) -> Result<Packing, EngineError> {
    let e = &dims.expert;
    let fits = *e == StackDims { layers: e.layers, ..PUBLISHED }
        && e.layers > 0
        && suffix_rows(dims) <= PERSISTENT_ROWS
        && positions(dims) <= PERSISTENT_PREFIX;
    match asked {
        Some(Packing::Published) if !(fits && hopper) => Err(EngineError::Shape {
            what: "action expert",
            expected: format!(
                "the published one, at most {PERSISTENT_ROWS} rows of actions and state, and prefixes of {PERSISTENT_PREFIX} rows, on sm_90a"
            ),
            found: format!("{e:?}, {} actions, prefixes of {} rows", dims.horizon, positions(dims)),
        }),
        Some(packing) => Ok(packing),
        None if fits && hopper => Ok(Packing::Published),
        None => Ok(Packing::General),
    }
}

/// Variant of the persistent decoder for a prefix of so many rows on so many clusters, of [`PERSISTENT_VARIANTS`]. Sums and
/// their order are those of any other.
pub(super) fn persistent(prefix: usize, clusters: usize) -> usize {
    // As many as leave the fewest units. 12 clusters have 22 tiles of gate/up a block, which are two units of 11.
    let unit = match clusters {
        26.. => 9,
        12 => 11,
        _ => 10,
    };
    let fits = |&(pieces, tiles): &(usize, usize)| tiles == unit && prefix <= RANKS * pieces * PIECE_KEYS;
    PERSISTENT_VARIANTS.iter().position(fits).unwrap_or(PERSISTENT_VARIANTS.len() - 1)
}

/// SMs that the decoder needs at once, and whether its blocks wait for one another.
pub(super) fn decoder_share(packing: Packing, hopper: bool) -> (usize, bool) {
    match (packing, hopper) {
        (Packing::Published, _) => (RANKS, true),
        // One block an SM, in clusters over the keys.
        (Packing::General, true) => (KEY_SPLITS, false),
        (Packing::General, false) => (1, false),
    }
}

/// Clusters of the persistent decoder, of which `most` are wanted: each has some of the attention's query rows.
pub(super) fn clusters(dims: &Dims, most: usize) -> usize {
    most.min(dims.expert.heads * dims.horizon)
}

/// What the portable kernels say to weights that are not for them.
pub(super) fn packed_for_hopper() -> EngineError {
    EngineError::Device {
        what: "choosing kernels",
        reason: "the weights were packed for sm_90a, which the portable kernels cannot read".into(),
        remedy: "Load with Packing::General".into(),
    }
}

/// Refuses dimensions the kernels cannot run, by name.
pub(super) fn check(dims: &Dims) -> Result<(), EngineError> {
    let refuse = |what: &'static str, expected: &str, found: usize| {
        Err(EngineError::Shape {
            what,
            expected: format!("{expected} on the GPU (device:=cpu has no such limit)"),
            found: found.to_string(),
        })
    };
    let v = &dims.vision;
    let vision_head = v.width / v.heads.max(1);
    if token_tiles(suffix_rows(dims)).is_none() {
        return refuse("action horizon", "at most 63", dims.horizon);
    }
    for (what, d) in [("vision head dimension", vision_head), ("head dimension", dims.trunk.head_dim)] {
        if d % 8 != 0 || d > 256 {
            return refuse(what, "a multiple of 8, at most 256", d);
        }
    }
    let even = |s: &StackDims| [s.width, s.mlp];
    for n in even(&dims.trunk).into_iter().chain(even(&dims.expert)).chain([v.width, v.mlp]) {
        if n % 8 != 0 {
            return refuse("model width", "a multiple of 8", n);
        }
    }
    for n in [v.width, dims.trunk.width] {
        if n > 4096 {
            return refuse("model width", "at most 4096", n);
        }
    }
    for (what, n) in [("action dimension", dims.action_dim), ("state dimension", dims.state_dim)] {
        if n > 128 {
            return refuse(what, "at most 128", n);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slices_cover_k_exactly_and_fit_a_cluster() {
        for (rows, k, slice) in [
            (2560, 1024, 512),
            (1024, 2048, 256),
            (8192, 1024, 512),
            (1024, 4096, 512),
            (64, 16, 512),
            (100, 33, 128),
            (1024, 1152, 256),
        ] {
            for tiles in TOKEN_TILES {
                let p = skinny(rows, k, tiles, slice);
                assert_eq!(p.slice * p.cluster, p.k, "{p:?}");
                assert!(p.k >= k && p.k - k < STEP_K && p.slice.is_multiple_of(STEP_K) && p.cluster <= 8, "{p:?}");
                assert!(p.tiles * TILE >= rows && (p.tiles - 1) * TILE < rows);
                assert!(p.shared <= HOPPER_SHARED, "{p:?}");
            }
        }
    }

    #[test]
    fn the_full_size_decoder_leaves_room_for_a_second_block() {
        for (rows, k, slice) in [
            (2560, 1024, SLICES.qkv),
            (1024, 2048, SLICES.out),
            (8192, 1024, SLICES.gate_up),
            (1024, 4096, SLICES.down),
        ] {
            let p = skinny(rows, k, 7, slice);
            assert!(
                2 * (p.shared + 1536) <= 227 * 1024,
                "prefetch under the kernel in front needs two blocks an SM: {p:?}"
            );
        }
    }

    #[test]
    fn attention_variants_are_the_smallest_that_fit() {
        assert_eq!(head_dim(&HEAD_DIMS, 72), Some((1, 80)));
        assert_eq!(head_dim(&HEAD_DIMS, 256), Some((3, 256)));
        assert_eq!(head_dim(&HEAD_DIMS, 8), Some((0, 32)));
        assert_eq!(head_dim(&HEAD_DIMS, 264), None);
        assert_eq!(token_tiles(51), Some(2));
        assert_eq!(token_tiles(9), Some(0));
        assert_eq!(token_tiles(65), None);
    }

    #[test]
    fn vision_attention_covers_siglip_and_what_is_smaller() {
        assert!(attention_vision(72, 256) && attention_vision(8, 1));
        for (head_dim, keys) in [(72, 257), (72, 0), (80, 256), (36, 256), (256, 256)] {
            assert!(!attention_vision(head_dim, keys), "{head_dim}, {keys} keys");
        }
    }

    #[test]
    fn an_expert_whose_slices_do_not_fit_is_refused_by_its_width() {
        // 17 steps of K cannot be cut into equal slices.
        let e = skinny(1024, 2176, 7, 1024).check().unwrap_err().to_string();
        assert!(e.contains("action expert") && e.contains("K = 2176 in 1 slices"), "{e}");
        skinny(1024, 4096, 7, 1024).check().unwrap();
    }

    #[test]
    fn the_decoder_says_what_share_it_needs() {
        assert_eq!(decoder_share(Packing::Published, true), (4, true), "a cluster, with barriers");
        assert_eq!(decoder_share(Packing::General, true), (8, false));
        assert_eq!(decoder_share(Packing::General, false), (1, false));
    }

    #[test]
    fn the_published_expert_gets_the_persistent_decoder_where_there_is_one() {
        let mut dims = Dims::published(50);
        let path = |d: &Dims, persistent, asked| packing(d, persistent, asked).ok();
        assert_eq!(path(&dims, true, None), Some(Packing::Published));
        assert_eq!(path(&dims, false, None), Some(Packing::General), "another chip");
        assert_eq!(path(&dims, true, Some(Packing::General)), Some(Packing::General));
        assert_eq!(path(&dims, false, Some(Packing::Published)), None);
        dims.horizon = 51;
        assert_eq!(path(&dims, true, None), Some(Packing::General), "52 rows with the state");
        dims.family = Family::Pi05;
        assert_eq!(path(&dims, true, None), Some(Packing::Published), "51 rows");
        dims.horizon = 52;
        assert_eq!(path(&dims, true, None), Some(Packing::General), "52 rows");
        dims.horizon = 50;
        dims.max_tokens = 1000;
        assert_eq!(path(&dims, true, None), Some(Packing::General), "prefixes of 3,048 rows");
        dims.max_tokens = 200;
        dims.expert.mlp = 2048;
        assert_eq!(path(&dims, true, None), Some(Packing::General));
        assert_eq!(clusters(&dims, 33), 33);
        let variants = |clusters| [1, 384, 385, 640, 641, PERSISTENT_PREFIX].map(|rows| persistent(rows, clusters));
        assert_eq!(variants(30), [0, 0, 1, 1, 2, 2], "rows that fit three and five pieces a rank");
        assert_eq!(variants(25), [3, 3, 3, 3, 4, 4], "six of the width's 128 tiles for some of 25 clusters");
        assert_eq!([26, 13, 12, 11, 1].map(|clusters| persistent(532, clusters)), [1, 3, 5, 3, 3]);
        assert_eq!(persistent(788, 12), 6);
        dims.horizon = 2;
        assert_eq!(clusters(&dims, 33), 16, "eight heads of two rows");
        // Rows of keys that go to shared memory many at once meet every bank once, and are whole 16-byte pieces.
        assert_eq!(Packing::Published.cache_row(256) * 2 % 128, 16);
    }

    #[test]
    fn keys_are_split_in_tiles_that_fit_shared_memory() {
        for keys in [9, 49, 327, 583, 839, 1100, 3000] {
            let (tile, shared) = decode_attention(keys, 256);
            assert!(tile.is_multiple_of(16) && shared <= HOPPER_SHARED, "{keys}: {tile} {shared}");
            assert!(tile == 128 || tile * KEY_SPLITS >= keys);
        }
    }

    #[test]
    fn only_hopper_runs_what_only_hopper_has() {
        assert_eq!(Path::of((9, 0), true, false), Path::Hopper);
        assert_eq!(Path::of((9, 0), true, true), Path::Portable, "asked for");
        assert_eq!(Path::of((9, 0), false, false), Path::Portable, "no machine code for sm_90a in this build");
        for capability in [(8, 0), (8, 6), (8, 7), (8, 9), (10, 0), (10, 3), (11, 0), (12, 0), (12, 1)] {
            assert_eq!(Path::of(capability, true, false), Path::Portable, "{capability:?}");
        }
    }

    #[test]
    fn portable_kernels_fit_every_chip() {
        for tiles in TOKEN_TILES {
            // What the products declare themselves: sums of squares of eight warps and 64 rows.
            assert!(portable(1, tiles, true).shared + 8 * 64 * 4 <= PORTABLE_SHARED, "{tiles}");
            assert!(portable(1, tiles, false).shared <= PORTABLE_SHARED, "{tiles}");
        }
        for head_dim in HEAD_DIMS {
            assert!(attention_shared(head_dim) <= PORTABLE_SHARED, "{head_dim}");
            assert!(portable_attention_shared(head_dim) <= PORTABLE_SHARED, "{head_dim}");
        }
        assert_eq!(attention_shared(256), PORTABLE_SHARED, "64 queries and 2 × 32 keys and values of 264");
        assert_eq!(attention_shared(80), 5 * 64 * 88 * 2, "tiles of 64 keys");
    }

    #[test]
    fn gated_products_keep_their_rounds_full() {
        let cut = |tokens, sms| {
            let p = geglu_wide(tokens, 16384, 2048, sms).unwrap();
            (GEGLU_TOKENS[p.variant].0, p.token_tiles, p.blocks)
        };
        assert_eq!(cut(532, 132), (184, 3, 132));
        assert_eq!(cut(276, 132), (144, 2, 132));
        assert_eq!(cut(788, 132), (160, 5, 132));
        assert_eq!(cut(20, 132), (96, 1, 132));
        assert_eq!(cut(532, 64), (184, 3, 64));
        // Not 144, whose smaller tiles read a fifth more in nearly the same time.
        assert_eq!([88, 92].map(|sms| cut(532, sms).0), [184, 184]);
        // Of 128 weight tiles those whose tiles of tokens are long: whole rounds of them, then one of short tiles.
        let plan = |tokens, sms| geglu_wide(tokens, 16384, 2048, sms).unwrap();
        let long = |tokens, sms| plan(tokens, sms).first_short;
        assert_eq!([276, 532, 788].map(|tokens| long(tokens, 132)), [128; 3], "full rounds as it is");
        assert_eq!([96, 92, 88, 84, 80].map(|sms| long(532, sms)), [128, 92, 117, 112, 128]);
        assert_eq!([92, 88].map(|sms| GEGLU_TOKENS[plan(532, sms).variant].1), [112, 72]);
    }

    #[test]
    fn gated_products_cover_every_token_and_fit() {
        for tokens in 1..2100 {
            for sms in [17, 64, 132] {
                let p = geglu_wide(tokens, 16384, 2048, sms).unwrap();
                let (n, short) = GEGLU_TOKENS[p.variant];
                for (tiles, n) in [(p.token_tiles, n), (p.short_tiles, short)] {
                    assert!((tiles - 1) * n < tokens && tokens <= tiles * n, "{tokens} on {sms}");
                }
                assert!(p.first_short <= p.weight_tiles, "{tokens} on {sms}");
                // 227 KB, less the barriers that the kernel declares.
                assert!(p.shared + 1024 <= 227 * 1024, "{tokens} on {sms}");
            }
        }
        for (tokens, mlp, k, sms) in [(0, 256, 256, 8), (1, 200, 256, 8), (1, 256, 100, 8), (1, 256, 128, 8)] {
            assert_eq!(geglu_wide(tokens, mlp, k, sms), None);
        }
        assert_eq!(geglu_wide(1, 256, 256, 0), None);
    }

    #[test]
    fn the_published_tower_is_packed_where_its_kernels_are() {
        let published = Dims::published(50).vision;
        assert!(Packing::Published.tower(&published));
        assert!(!Packing::General.tower(&published), "another chip");
        for other in [
            VisionDims { width: 1152 + 64, heads: 19, ..published },
            VisionDims { heads: 12, ..published },
            VisionDims { heads: 0, ..published },
            VisionDims { image: 14 * 15, ..published },
            VisionDims { image: 14 * 20, ..published },
            VisionDims { width: 128, heads: 16, ..published },
            VisionDims { mlp: 512, ..published },
        ] {
            assert!(!Packing::Published.tower(&other), "{other:?}");
        }
    }

    /// Of the published tower: kinds, tiles and blocks of K.
    const TOWER: [(TowerKind, usize, usize); 4] =
        [(TowerKind::Rows, 54, 18), (TowerKind::Add, 18, 18), (TowerKind::Gelu, 68, 18), (TowerKind::Add, 18, 68)];

    #[test]
    fn products_of_the_tower_cover_every_share_and_fit() {
        for (kind, tiles, k_blocks) in TOWER {
            for views in 1..=MAX_VIEWS {
                for sms in 1..=132 {
                    let (tokens, case) = (views * 256, format!("{kind:?}, {views} views on {sms}"));
                    let p = tower(kind, tiles, k_blocks, tokens, sms);
                    let (of, g, n) = TOWER_VARIANTS[p.variant];
                    assert_eq!(of, kind, "{case}");
                    assert!((p.token_tiles - 1) * n < tokens && tokens <= p.token_tiles * n, "{case}");
                    assert!((p.weight_tiles - 1) * g < tiles && tiles <= p.weight_tiles * g, "{case}");
                    assert!(p.blocks > 0 && p.blocks <= sms.min(p.token_tiles * p.weight_tiles), "{case}");
                }
            }
        }
        for variant in TOWER_VARIANTS {
            let (stage, rest) = tower_stage(variant);
            assert!(stage.is_multiple_of(1024) && (TOWER_SHARED - rest) / stage >= 3, "{variant:?}");
            // Barriers lie beside it.
            assert!(tower_shared(variant) + 16 * TOWER_STAGES <= 227 * 1024, "{variant:?}");
            assert!(2 * tower_shared(variant) > 227 * 1024, "an SM would hold two blocks: {variant:?}");
        }
    }

    #[test]
    fn the_down_product_is_cut_by_its_shape_alone() {
        let parts = |rows, k, outputs| NORM_PARTS[norm_parts(rows, k, outputs)];
        // One to four views with a prompt of 20 tokens, and where it changes.
        assert_eq!([276, 532, 788, 1044, 1088, 1089].map(|rows| parts(rows, 16384, 2048)), [2, 2, 2, 2, 2, 0]);
        assert_eq!(parts(532, 2048, 2048), 0, "too short");
        assert_eq!(parts(532, 16384 + 128, 2048), 0, "not in two halves of whole steps");
        assert_eq!([276, 640, 1300].map(|rows| part_rows(rows, 16384, 2048)), [552, 1280, 2176]);
        assert_eq!(part_rows(532, 2048, 2048), 0);
    }

    #[test]
    fn rotated_products_fill_one_round() {
        let cut = |heads: usize, rows, sms| {
            let p = tower(TowerKind::Rotated, (heads + 2) * WIDE_HEAD / TOWER_TILE, 32, rows, sms);
            let (kind, g, n) = TOWER_VARIANTS[p.variant];
            assert_eq!((kind, p.threads), (TowerKind::Rotated, 128 * g + 64));
            assert!(p.token_tiles * n >= rows && p.blocks <= sms);
            (g, n, p.blocks)
        };
        // One, two and three views with 20 tokens; keys and values alone; shares.
        assert_eq!([276, 532, 788].map(|rows| cut(8, rows, 132)), [(1, 96, 120), (1, 184, 120), (2, 136, 120)]);
        assert_eq!([276, 532, 788].map(|rows| cut(0, rows, 132)), [(1, 48, 48), (1, 48, 96), (1, 96, 72)]);
        assert_eq!([92, 80, 66, 40].map(|sms| cut(8, 532, sms).0), [2, 2, 2, 2]);
        for rows in 1..2100 {
            for sms in [1, 17, 64, 132] {
                cut(8, rows, sms);
            }
        }
    }

    #[test]
    fn a_norm_takes_its_whole_row() {
        assert_eq!([16, 1152, 2048, 4096].map(norm_threads), [32, 96, 128, 256]);
        for width in (8..=4096).step_by(8) {
            let threads = norm_threads(width);
            assert!(
                threads.is_multiple_of(32) && threads <= 256 && 4 * NORM_PIECES * threads as usize >= width,
                "{width}"
            );
            // Where it leaves sums to tower.cu, there is room for one of each tile.
            assert!(!width.is_multiple_of(TOWER_TILE) || threads as usize / 32 <= width / TOWER_TILE, "{width}");
        }
    }

    #[test]
    fn products_of_the_tower_are_cut_as_was_fastest() {
        // Blocks measured on an H200; those of smaller shares follow from them.
        let cut = |views: usize, sms| {
            TOWER.map(|(kind, tiles, k_blocks)| {
                let p = tower(kind, tiles, k_blocks, views * 256, sms);
                let (_, g, n) = TOWER_VARIANTS[p.variant];
                (g, n, p.blocks)
            })
        };
        assert_eq!(cut(1, 132), [(2, 64, 108), (1, 48, 108), (2, 88, 102), (1, 48, 108)]);
        assert_eq!(cut(2, 132), [(2, 128, 108), (1, 80, 126), (3, 104, 115), (1, 80, 126)]);
        assert_eq!(cut(3, 132), [(3, 112, 126), (1, 112, 126), (3, 160, 115), (1, 112, 126)]);
        assert_eq!(cut(2, 92), [(3, 112, 90), (1, 112, 90), (3, 160, 92), (1, 112, 90)]);
        assert_eq!(cut(2, 80), [(3, 128, 72), (1, 128, 72), (3, 176, 69), (1, 128, 72)]);
        // The trunk's output projection behind one, two and three views with 20 tokens.
        let out = |(rows, sms)| {
            let p = tower(TowerKind::Add, 32, 32, rows, sms);
            (TOWER_VARIANTS[p.variant].2, p.blocks)
        };
        assert_eq!([276, 532, 788].map(|rows| out((rows, 132))), [(72, 128), (136, 128), (200, 128)]);
        assert_eq!([96, 92, 80].map(|sms| out((532, sms))), [(200, 96), (112, 80), (112, 80)]);
    }

    #[test]
    fn wide_attention_fits_one_round() {
        let cut = |tokens: usize, sms| {
            let p = attention_wide(tokens * 8, sms);
            (WIDE_ROWS[p.variant], p.blocks)
        };
        assert_eq!(cut(276, 132), (40, 112));
        assert_eq!(cut(532, 132), (72, 120));
        assert_eq!(cut(788, 132), (96, 132));
        assert_eq!(cut(276, 92), (72, 62));
        assert_eq!(cut(532, 92), (96, 90));
        assert_eq!(cut(1, 1), (40, 2));
        assert_eq!([84, 80].map(|sms| cut(532, sms)), [(104, 82), (72, 120)]);
        assert_eq!(WIDE_ROWS.map(wide_shared), [185_344, 215_040, 226_304, 219_136]);
        for n in WIDE_ROWS {
            // 227 KB, less what the kernel declares.
            assert!(wide_shared(n) + 12 * n * 4 + 16 <= 227 * 1024, "{n}");
        }
    }

    #[test]
    fn portable_products_cover_the_full_size_decoder() {
        let blocks = |rows: usize, pairs| portable(rows / TILE, 7, pairs).blocks;
        assert_eq!([blocks(2560, true), blocks(1024, false), blocks(8192, true)], [80, 64, 256]);
        for (pairs, rows) in [(true, 32), (false, 16)] {
            assert_eq!(portable(3, 7, pairs).blocks * rows, 3 * TILE);
        }
    }
}
