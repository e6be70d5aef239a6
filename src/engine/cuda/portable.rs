//! The decoder's kernels on chips that are not Hopper (kernels/portable.cu), and how each is launched.

use super::kernels::{Kernel, Module, Shape, SkinnyArgs, by};
use super::plan::{self, ATTENTION_ROWS, HEAD_DIMS, PARTS, PORTABLE_SHARED, TOKEN_TILES};
use super::stream::Stream;
use crate::engine::EngineError;

/// `PortableAttentionArgs` of portable.cu.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct PortableAttentionArgs {
    pub q: u64,
    pub suffix_keys: u64,
    pub suffix_values: u64,
    pub out: u64,
    pub parts: u64,
    pub tops: u64,
    pub params: u64,
    pub scale: f32,
    pub layer: i32,
    pub heads: i32,
    pub head_dim: i32,
    pub rows: i32,
    pub suffix: i32,
    pub horizon: i32,
    pub stride: i32,
    pub splits: i32,
}

/// What becomes of the sums of a product.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Product {
    Qkv,
    Geglu,
    Residual,
}

/// Every kernel, loaded. Those of the products by token tiles, see [`TOKEN_TILES`].
pub(super) struct Portable {
    qkv: [Kernel<SkinnyArgs>; 4],
    geglu: [Kernel<SkinnyArgs>; 4],
    residual: [Kernel<SkinnyArgs>; 4],
    /// By padded head dimension, see [`HEAD_DIMS`].
    attention: [Kernel<PortableAttentionArgs>; 4],
    join: Kernel<PortableAttentionArgs>,
    _module: Module,
}

impl Portable {
    /// Into the current context.
    pub fn load() -> Result<Self, EngineError> {
        let module = Module::load("portable")?;
        let products = |kind: &str, pairs: bool| {
            by(TOKEN_TILES, |t| module.kernel(&format!("portable_{kind}_{t}"), plan::portable(1, t, pairs).shared))
        };
        Ok(Self {
            qkv: products("qkv", true)?,
            geglu: products("geglu", true)?,
            residual: products("residual", false)?,
            attention: by(HEAD_DIMS, |d| module.kernel(&format!("portable_attention_{d}"), PORTABLE_SHARED))?,
            join: module.kernel("portable_join", 0)?,
            _module: module,
        })
    }

    /// Queues a product of `tiles` packed tiles; `tokens` is an index into [`TOKEN_TILES`].
    pub fn product(
        &self,
        stream: &Stream,
        product: Product,
        tokens: usize,
        tiles: usize,
        args: &SkinnyArgs,
    ) -> Result<(), EngineError> {
        let kernels = match product {
            Product::Qkv => &self.qkv,
            Product::Geglu => &self.geglu,
            Product::Residual => &self.residual,
        };
        let p = plan::portable(tiles, TOKEN_TILES[tokens], product != Product::Residual);
        let shape = Shape { shared: p.shared as u32, dependent: false, ..Shape::blocks(p.blocks, p.threads as u32) };
        kernels[tokens].launch(stream, shape, args)
    }

    /// Queues attention of packed rows; `head` is an index into [`HEAD_DIMS`].
    pub fn attention(&self, stream: &Stream, head: usize, args: &PortableAttentionArgs) -> Result<(), EngineError> {
        let rows = args.rows as usize;
        let shape = Shape {
            grid: [PARTS as u32, rows.div_ceil(ATTENTION_ROWS) as u32, 1],
            threads: 256,
            shared: plan::portable_attention_shared(HEAD_DIMS[head]) as u32,
            cluster: 1,
            dependent: false,
        };
        let args = PortableAttentionArgs { splits: PARTS as i32, ..*args };
        self.attention[head].launch(stream, shape, &args)?;
        let items = Shape { dependent: false, ..Shape::items(rows * args.head_dim as usize / 4, 256) };
        self.join.launch(stream, items, &args)
    }
}
