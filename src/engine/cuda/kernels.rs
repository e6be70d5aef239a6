//! The kernels of `kernels/*.cu`: their argument blocks, and how each is launched.
//!
//! Every block mirrors the C struct of the same name; its size is compared with the compiled kernel's when it is
//! loaded. Addresses are device addresses, 0 for null.

use std::ffi::{CString, c_void};
use std::marker::PhantomData;
use std::sync::OnceLock;

use cudarc::driver::sys;

use super::device::check;
use super::plan::{self, CLUSTERS, DECODE_HEAD_DIMS, HEAD_DIMS, HOPPER_SHARED, NORM_PARTS, TOKEN_TILES};
use super::portable::Portable;
use super::stream::Stream;
use super::weights::MAX_VIEWS;
use crate::engine::EngineError;

include!(concat!(env!("OUT_DIR"), "/kernels.rs"));

/// `SkinnyArgs` of skinny.cu.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct SkinnyArgs {
    pub w: u64,
    pub x: u64,
    pub squares: u64,
    pub bias: u64,
    pub next: u64,
    pub next_bytes: u64,
    pub square_tiles: i32,
    pub inv_width: f32,
    pub rows: i32,
    pub k: i32,
    pub slice: i32,
    pub q: u64,
    pub suffix_keys: u64,
    pub suffix_values: u64,
    pub rope: u64,
    pub params: u64,
    pub q_stride: i32,
    pub heads: i32,
    pub head_dim: i32,
    pub horizon: i32,
    pub has_state: i32,
    pub y: u64,
    pub h: u64,
    pub hb: u64,
    pub scale: u64,
    pub gate: u64,
    pub squares_out: u64,
    pub h_stride: i32,
    pub init: i32,
}

/// `DecodeAttentionArgs` of decode_attention.cu.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct DecodeAttentionArgs {
    pub q: u64,
    pub suffix_keys: u64,
    pub suffix_values: u64,
    pub out: u64,
    pub params: u64,
    pub next: u64,
    pub next_bytes: u64,
    pub scale: f32,
    pub layer: i32,
    pub heads: i32,
    pub head_dim: i32,
    pub rows: i32,
    pub suffix: i32,
    pub horizon: i32,
    pub stride: i32,
    pub tile: i32,
}

/// `FlowArgs` of flow.cu.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct FlowArgs {
    pub x: u64,
    pub velocities: u64,
    pub noise: u64,
    pub previous: u64,
    pub weights: u64,
    pub gains: u64,
    pub state: u64,
    pub params: u64,
    pub h: u64,
    pub hb: u64,
    pub u: u64,
    pub squares: u64,
    pub out_w: u64,
    pub out_b: u64,
    pub out_scale: u64,
    pub in_w: u64,
    pub in_b: u64,
    pub state_w: u64,
    pub state_b: u64,
    pub scale: u64,
    pub inv_width: f32,
    pub time: f32,
    pub dt: f32,
    pub width: i32,
    pub horizon: i32,
    pub action_dim: i32,
    pub state_dim: i32,
    pub stride: i32,
    pub square_tiles: i32,
    pub step: i32,
    pub last: i32,
    pub direct: i32,
}

/// `PersistentArgs` of persistent.cu.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct PersistentArgs {
    pub layers: u64,
    pub steps: u64,
    pub params: u64,
    pub x: u64,
    pub velocities: u64,
    pub noise: u64,
    pub previous: u64,
    pub guidance: u64,
    pub gains: u64,
    pub state: u64,
    pub out_w: u64,
    pub in_w: u64,
    pub state_w: u64,
    pub state_b: u64,
    pub rope: u64,
    pub time_w: u64,
    pub time_bias: u64,
    pub u: u64,
    pub hb: [u64; 2],
    pub q: u64,
    pub suffix_keys: u64,
    pub suffix_values: u64,
    pub attended: u64,
    pub gated: u64,
    pub h: u64,
    pub squares: [u64; 2],
    pub arrived: u64,
    pub error: u64,
    pub scale: f32,
    pub inv_width: f32,
    pub dt: f32,
    pub step_count: i32,
    pub layer_count: i32,
    pub horizon: i32,
    pub has_state: i32,
    pub suffix: i32,
    pub action_dim: i32,
    pub state_dim: i32,
    pub delay: i32,
}

/// `AttentionArgs` of attention.cu, attention_wide.cu and attention_vision.cu.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct AttentionArgs {
    pub q: u64,
    pub k: u64,
    pub v: u64,
    pub out: u64,
    pub params: u64,
    pub q_batch: i64,
    pub kv_batch: i64,
    pub out_batch: i64,
    pub q_row: i32,
    pub kv_row: i32,
    pub kv_head: i32,
    pub out_row: i32,
    pub rows: i32,
    pub keys: i32,
    pub head_dim: i32,
    pub layer: i32,
    pub scale: f32,
    /// For attention_wide.cu.
    pub heads: i32,
    /// For attention_vision.cu and attention_wide.cu: of the packed form of tower.cu, or 0 for rows.
    pub out_octets: i32,
}

/// `NormArgs` of pointwise.cu.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct NormArgs {
    pub x: u64,
    pub parts: u64,
    pub y: u64,
    pub scale: u64,
    pub shift: u64,
    pub width: i32,
    pub inv_width: f32,
    pub eps: f32,
    pub moments: u64,
    pub octets: i32,
}

/// `RopeArgs` of pointwise.cu.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct RopeArgs {
    pub qkv: u64,
    pub rope: u64,
    pub params: u64,
    pub rows: i32,
    pub heads: i32,
    pub head_dim: i32,
    pub layer: i32,
    pub cache_row: i32,
}

/// `GegluWideArgs` of geglu_wide.cu.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct GegluWideArgs {
    pub w: u64,
    pub x: u64,
    pub moments: u64,
    pub y: u64,
    pub tokens: i32,
    pub octets: i32,
    pub token_tiles: i32,
    pub short_tiles: i32,
    pub weight_tiles: i32,
    pub first_short: i32,
    pub k_blocks: i32,
    pub lead: i32,
    pub width_tiles: i32,
    pub inv_width: f32,
    pub eps: f32,
}

/// `TowerArgs` of tower.cu.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct TowerArgs {
    pub w: u64,
    pub x: u64,
    pub moments: u64,
    pub fold: u64,
    pub bias: u64,
    pub residual: u64,
    pub scale: u64,
    pub y: u64,
    pub left: u64,
    pub tokens: i32,
    pub octets: i32,
    pub token_tiles: i32,
    pub tiles: i32,
    pub weight_tiles: i32,
    pub k_blocks: i32,
    pub width_tiles: i32,
    pub inv_width: f32,
    pub eps: f32,
    pub heads: i32,
    pub layer: i32,
    pub cache_row: i32,
    pub rope: u64,
    pub params: u64,
}

/// `TowerBeginArgs` of tower.cu.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct TowerBeginArgs {
    pub x: u64,
    pub scale: u64,
    pub y: u64,
    pub moments: u64,
    pub tokens: i32,
    pub width: i32,
}

/// `TowerFoldArgs` of tower.cu.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct TowerFoldArgs {
    pub w: u64,
    pub scale: u64,
    pub shift: u64,
    pub bias: u64,
    pub fold: u64,
    pub folded_bias: u64,
    pub outputs: i32,
    pub tiles: i32,
    pub k_blocks: i32,
}

/// `GegluArgs` of pointwise.cu.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct GegluArgs {
    pub gate_up: u64,
    pub y: u64,
    pub rows: i32,
    pub mlp: i32,
}

/// `ImageArgs` of image.cu.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct ImageArgs {
    pub bytes: u64,
    pub first: u64,
    pub count: u64,
    pub weights: u64,
    pub patches: u64,
    pub planes: u64,
    pub width: i32,
    pub height: i32,
    pub step: i32,
    pub pixel: i32,
    pub red: i32,
    pub green: i32,
    pub blue: i32,
    pub size: i32,
    pub resized_w: i32,
    pub resized_h: i32,
    pub left: i32,
    pub top: i32,
    pub patch: i32,
    pub patch_stride: i32,
    pub taps: i32,
    pub resampler: i32,
}

/// `ImagesArgs` of image.cu.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct ImagesArgs {
    pub views: [ImageArgs; MAX_VIEWS],
    pub placed: PlacedArgs,
}

/// The rest of `ImagesArgs`: the prompt, by four floats, and the addresses of the cache.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct PlacedArgs {
    pub prompt: u64,
    pub prompt_to: u64,
    pub prompt_count: i64,
    pub params: u64,
    pub words: [u64; 3],
}

/// `CopyArgs` of load.cu.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct CopyArgs {
    pub from: u64,
    pub to: u64,
    pub rows: i64,
    pub cols: i64,
    pub stride: i64,
    pub dtype: i32,
    pub to_f32: i32,
    pub transpose: i32,
    pub add: f32,
    pub factor: f32,
}

/// `PackArgs` of load.cu.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct PackArgs {
    pub from: u64,
    pub to: u64,
    pub rows: i64,
    pub cols: i64,
    pub padded_k: i64,
    pub packed_rows: i64,
    pub dtype: i32,
    pub order: i32,
    pub first: i32,
    pub head_dim: i32,
    pub layout: i32,
}

/// `ProductArgs` of load.cu.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct ProductArgs {
    pub w: u64,
    pub x: u64,
    pub bias: u64,
    pub y: u64,
    pub rows: i64,
    pub k: i64,
    pub padded_k: i64,
    pub x_stride: i64,
    pub y_stride: i64,
    pub dtype: i32,
    pub count: i32,
    pub silu: i32,
    pub layout: i32,
    pub add: f32,
}

/// `RandomArgs` of load.cu.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct RandomArgs {
    pub to: u64,
    pub count: i64,
    pub seed: u64,
    pub deviation: f32,
    pub to_f32: i32,
}

/// `DifferArgs` of load.cu.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct DifferArgs {
    pub a: u64,
    pub b: u64,
    pub differ: u64,
    pub count: i64,
}

/// `TrafficArgs` of traffic.cu.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct TrafficArgs {
    pub from: u64,
    pub count: i64,
    pub stop: u64,
    pub began: u64,
    pub most_ns: i64,
    pub never: u64,
}

/// Grid, block, shared memory and cluster of one launch.
#[derive(Debug, Clone, Copy)]
pub(super) struct Shape {
    pub grid: [u32; 3],
    pub threads: u32,
    pub shared: u32,
    /// Blocks along x that form a cluster; 1 for none.
    pub cluster: u32,
    /// Whether it may start before the kernel in front of it ends, where the stream allows that; such a kernel waits by
    /// itself.
    pub dependent: bool,
}

impl Shape {
    pub fn blocks(count: usize, threads: u32) -> Self {
        let grid = [u32::try_from(count).unwrap_or(u32::MAX), 1, 1];
        Self { grid, threads, shared: 0, cluster: 1, dependent: true }
    }

    /// Enough blocks of `threads` for one thread per item.
    pub fn items(count: usize, threads: u32) -> Self {
        Self::blocks(count.div_ceil(threads as usize), threads)
    }
}

/// A kernel that takes one argument block `A`.
pub(super) struct Kernel<A> {
    function: sys::CUfunction,
    name: Box<str>,
    takes: PhantomData<fn(A)>,
}

// SAFETY: a driver handle that lives as long as its module, which `Kernels` owns beside it.
unsafe impl<A> Send for Kernel<A> {}
// SAFETY: as above.
unsafe impl<A> Sync for Kernel<A> {}

impl<A: Copy> Kernel<A> {
    /// Queues one launch. What `args` points at must be live and large enough until it has run: the launchers in
    /// encoder.rs and decoder.rs compute both from the same dimensions.
    pub fn launch(&self, stream: &Stream, shape: Shape, args: &A) -> Result<(), EngineError> {
        self.queue(stream, shape, false, args)
    }

    /// As [`launch`](Self::launch), for blocks that wait for each other: all run at once, or the launch is refused.
    pub fn launch_together(&self, stream: &Stream, shape: Shape, args: &A) -> Result<(), EngineError> {
        self.queue(stream, shape, true, args)
    }

    /// Clusters of `shape` that fit what `stream` runs on at once, as the driver sees it.
    pub fn clusters_at_once(&self, stream: &Stream, shape: Shape) -> Result<usize, EngineError> {
        let mut attributes = Vec::with_capacity(1);
        let config = Self::config(stream, shape, false, &mut attributes);
        let mut found = 0;
        // SAFETY: a loaded function, a configuration whose attributes live until the call returns, an out-parameter.
        let code = unsafe { sys::cuOccupancyMaxActiveClusters(&mut found, self.function, &config) };
        check(code, "asking how many clusters fit")?;
        Ok(found.unsigned_abs() as usize)
    }

    fn config(
        stream: &Stream,
        shape: Shape,
        together: bool,
        attributes: &mut Vec<sys::CUlaunchAttribute>,
    ) -> sys::CUlaunchConfig {
        // SAFETY: all-zero is a valid launch attribute (IGNORE).
        let blank: sys::CUlaunchAttribute = unsafe { std::mem::zeroed() };
        if shape.cluster > 1 {
            let mut a = blank;
            a.id = sys::CUlaunchAttributeID_enum::CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION;
            a.value.clusterDim.x = shape.cluster;
            a.value.clusterDim.y = 1;
            a.value.clusterDim.z = 1;
            attributes.push(a);
        }
        if shape.dependent && stream.may_depend() {
            let mut a = blank;
            a.id = sys::CUlaunchAttributeID_enum::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION;
            a.value.programmaticStreamSerializationAllowed = 1;
            attributes.push(a);
        }
        if together {
            let mut a = blank;
            a.id = sys::CUlaunchAttributeID_enum::CU_LAUNCH_ATTRIBUTE_COOPERATIVE;
            a.value.cooperative = 1;
            attributes.push(a);
        }
        sys::CUlaunchConfig {
            gridDimX: shape.grid[0],
            gridDimY: shape.grid[1],
            gridDimZ: shape.grid[2],
            blockDimX: shape.threads,
            blockDimY: 1,
            blockDimZ: 1,
            sharedMemBytes: shape.shared,
            hStream: stream.raw(),
            attrs: attributes.as_mut_ptr(),
            numAttrs: attributes.len() as u32,
        }
    }

    fn queue(&self, stream: &Stream, shape: Shape, together: bool, args: &A) -> Result<(), EngineError> {
        let mut args = *args;
        let mut parameters = [(&raw mut args).cast::<c_void>()];
        let mut attributes = Vec::with_capacity(3);
        let config = Self::config(stream, shape, together, &mut attributes);
        // SAFETY: the function is loaded, its one parameter has this type's size (checked at load), and the driver
        // copies parameters and attributes before it returns.
        let code =
            unsafe { sys::cuLaunchKernelEx(&config, self.function, parameters.as_mut_ptr(), std::ptr::null_mut()) };
        check(code, "launching a kernel").map_err(|e| match e {
            EngineError::Device { what, reason, remedy } => {
                EngineError::Device { what, reason: format!("{}: {reason}", self.name), remedy }
            }
            other => other,
        })
    }
}

/// The kernels of one file.
pub(super) struct Module(sys::CUmodule);

impl Module {
    /// Those of kernels/`name`.cu, into the current context; none if this build has no code for this chip.
    fn load_if_there(name: &str) -> Result<Option<Self>, EngineError> {
        let Some((_, image)) = IMAGES.iter().find(|(n, _)| *n == name) else { return Ok(None) };
        let mut raw = std::ptr::null_mut();
        // SAFETY: a whole fat binary made by nvcc; it carries its own length.
        let code = unsafe { sys::cuModuleLoadData(&mut raw, image.as_ptr().cast()) };
        if code == sys::CUresult::CUDA_ERROR_NO_BINARY_FOR_GPU {
            return Ok(None);
        }
        check(code, "loading kernels").map(|()| Some(Self(raw)))
    }

    /// Those of kernels/`name`.cu, into the current context.
    pub fn load(name: &str) -> Result<Self, EngineError> {
        let code = sys::CUresult::CUDA_ERROR_NO_BINARY_FOR_GPU;
        Self::load_if_there(name)?.ok_or_else(|| super::faults::call("loading kernels", code, name))
    }

    /// The kernel `name`, allowed to use `shared` bytes of dynamic shared memory.
    pub fn kernel<A>(&self, name: &str, shared: usize) -> Result<Kernel<A>, EngineError> {
        let internal = |reason: String| EngineError::Device {
            what: "loading kernels",
            reason: format!("{name}: {reason}"),
            remedy: "rebuild: the kernels and the program do not belong together".into(),
        };
        let symbol = CString::new(name).map_err(|e| internal(e.to_string()))?;
        let mut function = std::ptr::null_mut();
        let (mut offset, mut size) = (0, 0);
        // SAFETY: a loaded module, a C string and out-parameters on this stack.
        unsafe {
            check(sys::cuModuleGetFunction(&mut function, self.0, symbol.as_ptr()), "finding a kernel")?;
            // None is loaded between two frames, as the driver would do by itself.
            check(sys::cuFuncLoad(function), "loading a kernel")?;
            check(sys::cuFuncGetParamInfo(function, 0, &mut offset, &mut size), "reading a kernel's parameters")?;
        }
        if size != size_of::<A>() {
            return Err(internal(format!("takes {size} bytes, the program gives {}", size_of::<A>())));
        }
        if shared > 48 * 1024 {
            let attribute = sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            // SAFETY: a loaded function.
            let set = unsafe { sys::cuFuncSetAttribute(function, attribute, shared as i32) };
            check(set, "raising a kernel's shared memory")?;
        }
        // The same split of L1 and shared memory for every kernel: a change of it would drain the SMs in between.
        let carveout = sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT;
        // SAFETY: a loaded function; 100 asks for as much shared memory as there is.
        let set = unsafe { sys::cuFuncSetAttribute(function, carveout, 100) };
        check(set, "choosing a kernel's shared memory")?;
        Ok(Kernel { function, name: name.into(), takes: PhantomData })
    }
}

impl Drop for Module {
    fn drop(&mut self) {
        // SAFETY: loaded once; its kernels are gone with `Kernels`.
        unsafe { sys::cuModuleUnload(self.0) };
    }
}

/// The three products of skinny.cu for one number of token tiles, each by cluster size ([`CLUSTERS`]).
pub(super) struct Skinny {
    pub qkv: [Kernel<SkinnyArgs>; 4],
    pub geglu: [Kernel<SkinnyArgs>; 4],
    pub residual: [Kernel<SkinnyArgs>; 4],
}

/// What only sm_90a can run.
pub(super) struct Hopper {
    /// By token tiles, see [`TOKEN_TILES`].
    pub skinny: [Skinny; 4],
    /// By padded head dimension, see [`DECODE_HEAD_DIMS`].
    pub decode_attention: [Kernel<DecodeAttentionArgs>; 4],
    /// For heads of [`plan::WIDE_HEAD`], by rows of a cluster, see [`plan::WIDE_ROWS`].
    pub attention_wide: Vec<Kernel<AttentionArgs>>,
    /// For heads and key counts that [`plan::attention_vision`] covers.
    pub attention_vision: Kernel<AttentionArgs>,
    /// By tokens of a tile and of a short one, see [`plan::GEGLU_TOKENS`].
    pub geglu_wide: Vec<Kernel<GegluWideArgs>>,
    /// For the published action expert, by pieces of keys and tiles of columns, see [`plan::PERSISTENT_VARIANTS`].
    pub persistent: Vec<Kernel<PersistentArgs>>,
    /// Every product of the tower's layers, and those around the trunk's attention, by block, see
    /// [`plan::TOWER_VARIANTS`].
    pub tower: Vec<Kernel<TowerArgs>>,
    pub tower_begin: Kernel<TowerBeginArgs>,
    pub tower_fold: Kernel<TowerFoldArgs>,
    _modules: [Module; 7],
}

impl Hopper {
    /// Into the current context; none on another chip, or in a build without.
    fn load() -> Result<Option<Self>, EngineError> {
        let Some(skinny) = Module::load_if_there("skinny")? else { return Ok(None) };
        let (decode, wide) = (Module::load("decode_attention")?, Module::load("attention_wide")?);
        let (geglu, persistent) = (Module::load("geglu_wide")?, Module::load("persistent")?);
        let (vision, tower) = (Module::load("attention_vision")?, Module::load("tower")?);
        let family = |tiles: usize| -> Result<Skinny, EngineError> {
            let by_cluster = |kind: &str| {
                by(CLUSTERS, |c| skinny.kernel::<SkinnyArgs>(&format!("skinny_{kind}_{tiles}_{c}"), HOPPER_SHARED))
            };
            Ok(Skinny { qkv: by_cluster("qkv")?, geglu: by_cluster("geglu")?, residual: by_cluster("residual")? })
        };
        Ok(Some(Self {
            skinny: by(TOKEN_TILES, family)?,
            decode_attention: by(DECODE_HEAD_DIMS, |d| decode.kernel(&format!("decode_attention_{d}"), HOPPER_SHARED))?,
            attention_wide: plan::WIDE_ROWS
                .iter()
                .map(|n| wide.kernel(&format!("attention_wide_{n}"), plan::wide_shared(*n)))
                .collect::<Result<_, _>>()?,
            attention_vision: vision.kernel("attention_vision", plan::VISION_SHARED)?,
            geglu_wide: plan::GEGLU_TOKENS
                .iter()
                .map(|(n, short)| geglu.kernel(&format!("geglu_wide_{n}_{short}"), plan::geglu_shared(*n)))
                .collect::<Result<_, _>>()?,
            persistent: plan::PERSISTENT_VARIANTS
                .iter()
                .map(|(pieces, tiles)| {
                    persistent.kernel(&format!("persistent_decode_{pieces}_{tiles}"), plan::PERSISTENT_SHARED)
                })
                .collect::<Result<_, _>>()?,
            tower: plan::TOWER_VARIANTS
                .iter()
                .map(|(kind, g, n)| {
                    let name = format!("tower_{kind:?}_{g}_{n}").to_lowercase();
                    tower.kernel(&name, plan::tower_shared((*kind, *g, *n)))
                })
                .collect::<Result<_, _>>()?,
            tower_begin: tower.kernel("tower_begin", 0)?,
            tower_fold: tower.kernel("tower_fold", 0)?,
            _modules: [skinny, decode, wide, geglu, persistent, vision, tower],
        }))
    }
}

/// One thing for each of four sizes.
pub(super) fn by<T>(
    [a, b, c, d]: [usize; 4],
    make: impl Fn(usize) -> Result<T, EngineError>,
) -> Result<[T; 4], EngineError> {
    Ok([make(a)?, make(b)?, make(c)?, make(d)?])
}

/// Every kernel, loaded.
pub(super) struct Kernels {
    hopper: Option<Hopper>,
    portable: OnceLock<Portable>,
    /// By padded head dimension, see [`HEAD_DIMS`].
    pub attention: [Kernel<AttentionArgs>; 4],
    pub flow: Kernel<FlowArgs>,
    /// By the parts that it joins, see [`NORM_PARTS`].
    pub norm: Vec<Kernel<NormArgs>>,
    /// The same where tower.cu does the rest of the norm.
    pub packed: Vec<Kernel<NormArgs>>,
    pub rope: Kernel<RopeArgs>,
    pub geglu: Kernel<GegluArgs>,
    pub images: Kernel<ImagesArgs>,
    pub copy: Kernel<CopyArgs>,
    pub pack: Kernel<PackArgs>,
    pub product: Kernel<ProductArgs>,
    pub random: Kernel<RandomArgs>,
    pub differ: Kernel<DifferArgs>,
    pub traffic: Kernel<TrafficArgs>,
    _modules: [Module; 6],
}

impl Kernels {
    /// Loads everything into the current context but [`portable`](Self::portable), which may not be needed.
    pub fn load() -> Result<Self, EngineError> {
        let (attention, flow, pointwise) =
            (Module::load("attention")?, Module::load("flow")?, Module::load("pointwise")?);
        let (image, load, traffic) = (Module::load("image")?, Module::load("load")?, Module::load("traffic")?);
        let hopper = Hopper::load()?;
        let by_parts = |kind: &str| -> Result<Vec<_>, EngineError> {
            NORM_PARTS.iter().map(|parts| pointwise.kernel(&format!("row_{kind}_{parts}"), 0)).collect()
        };
        Ok(Self {
            traffic: traffic.kernel("traffic", plan::traffic_shared(hopper.is_some()))?,
            hopper,
            portable: OnceLock::new(),
            attention: by(HEAD_DIMS, |d| attention.kernel(&format!("attention_{d}"), plan::attention_shared(d)))?,
            flow: flow.kernel("flow_step", 0)?,
            norm: by_parts("norm")?,
            packed: by_parts("packed")?,
            rope: pointwise.kernel("rope_cache", 0)?,
            geglu: pointwise.kernel("geglu", 0)?,
            images: image.kernel("image_patches", 0)?,
            copy: load.kernel("load_copy", 0)?,
            pack: load.kernel("load_pack", 0)?,
            product: load.kernel("load_product", 0)?,
            random: load.kernel("load_random", 0)?,
            differ: load.kernel("load_differ", 0)?,
            _modules: [attention, flow, pointwise, image, load, traffic],
        })
    }

    /// What only sm_90a can run, where this is one.
    pub fn hopper(&self) -> Option<&Hopper> {
        self.hopper.as_ref()
    }

    /// The decoder of every other chip; the first call loads it into the current context, which must be that of
    /// [`load`](Self::load).
    pub fn portable(&self) -> Result<&Portable, EngineError> {
        if let Some(loaded) = self.portable.get() {
            return Ok(loaded);
        }
        // Where two threads get here at once, one copy stays.
        let loaded = Portable::load()?;
        Ok(self.portable.get_or_init(|| loaded))
    }
}
