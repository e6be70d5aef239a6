//! Large matrix products through cuBLASLt: y = x·wᵀ with bf16 operands and float32 sums.
//!
//! A plan (descriptors and algorithm) is made once per shape and kept. Which of the library's algorithms is fastest is
//! measured when a shape is first seen, with weights that come from memory as they do in the model. A stage on another
//! share of the GPU takes the fastest there of those that give the same bits: tiles that fill one share in whole rounds
//! leave much of another idle. Measuring takes memory that is there already, where that is enough.
//!
//! Where the rest of the GPU belongs to another stage and nothing works yet, that share is kept as busy as the stage will
//! keep it. What is fastest alone need not be fastest then: under MPS a kernel in clusters of blocks may be much faster while the
//! other share's SMs are idle.

mod bench;
mod choice;

use std::collections::{HashMap, HashSet};
use std::ffi::c_void;
use std::sync::Arc;

use cudarc::cublaslt::{result, sys};

use super::device::Buffer;
use super::lane::Lane;
use super::stream::Stream;
use crate::engine::EngineError;

pub(super) use bench::{COLD_BYTES, Scratch};
pub(super) use choice::{Algorithms, Effort};

/// Bytes of scratch memory one stage lends to the library (NVIDIA's advice for Hopper).
pub(super) const WORKSPACE: usize = 32 << 20;

/// `CUBLAS_OP_T` of cublas_api.h, which these bindings leave out.
const OP_T: i32 = 1;

/// What becomes of the sums.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Epilogue {
    /// bf16.
    Store,
    /// bf16 after a bf16 bias.
    Bias,
    /// bf16 after a bf16 bias and GELU in its tanh form.
    BiasGelu,
    /// float32, added to what `c` holds.
    Add,
    /// float32, added to what `c` holds, after a float32 bias.
    AddBias,
    /// float32 after a float32 bias.
    WideBias,
    /// float32, of as many equal slices of K each by itself: `[slices, rows, outputs]`.
    Parts(usize),
}

impl Epilogue {
    fn wide(self) -> bool {
        matches!(self, Epilogue::Add | Epilogue::AddBias | Epilogue::WideBias | Epilogue::Parts(_))
    }

    fn adds(self) -> bool {
        matches!(self, Epilogue::Add | Epilogue::AddBias)
    }

    fn biased(self) -> bool {
        !matches!(self, Epilogue::Store | Epilogue::Add | Epilogue::Parts(_))
    }

    /// Slices of K whose sums stay apart.
    fn parts(self) -> usize {
        if let Epilogue::Parts(parts) = self { parts } else { 1 }
    }
}

/// Rows of x, rows of w, common dimension.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Key {
    pub rows: usize,
    pub outputs: usize,
    pub k: usize,
    pub epilogue: Epilogue,
}

/// Device addresses of one product. `c` is read where the epilogue adds; it may be `d`.
#[derive(Debug, Clone, Copy)]
pub(super) struct Operands {
    pub w: u64,
    pub x: u64,
    pub bias: u64,
    pub c: u64,
    pub d: u64,
}

fn check(result: Result<(), result::CublasError>, what: &'static str) -> Result<(), EngineError> {
    result.map_err(|e| fail(what, e))
}

fn fail(what: &'static str, e: result::CublasError) -> EngineError {
    EngineError::Device {
        what,
        reason: format!("cuBLASLt: {e}"),
        remedy: "check that the installed cuBLAS belongs to CUDA 13 and supports this GPU".into(),
    }
}

type Algorithm = sys::cublasLtMatmulAlgo_t;

struct Layout(sys::cublasLtMatrixLayout_t);

impl Layout {
    fn new(kind: sys::cudaDataType, rows: usize, cols: usize, ld: usize) -> Result<Self, EngineError> {
        result::create_matrix_layout(kind, rows as u64, cols as u64, ld as i64)
            .map(Self)
            .map_err(|e| fail("describing a matrix", e))
    }

    /// `count` matrices of that layout, each `stride` elements behind the one before.
    fn batch(self, count: usize, stride: usize) -> Result<Self, EngineError> {
        use sys::cublasLtMatrixLayoutAttribute_t as A;
        if count == 1 {
            return Ok(self);
        }
        self.set(A::CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT, &(count as i32))?;
        self.set(A::CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET, &(stride as i64))?;
        Ok(self)
    }

    fn set<T>(&self, attribute: sys::cublasLtMatrixLayoutAttribute_t, value: &T) -> Result<(), EngineError> {
        let value: *const T = value;
        // SAFETY: a live layout; the value is copied before the call returns.
        let done = unsafe { result::set_matrix_layout_attribute(self.0, attribute, value.cast(), size_of::<T>()) };
        check(done, "describing a matrix")
    }
}

impl Drop for Layout {
    fn drop(&mut self) {
        // SAFETY: created in `new`, destroyed once.
        let _ = unsafe { result::destroy_matrix_layout(self.0) };
    }
}

struct Descriptor(sys::cublasLtMatmulDesc_t);

impl Descriptor {
    fn set<T>(&self, attribute: sys::cublasLtMatmulDescAttributes_t, value: &T) -> Result<(), EngineError> {
        let value: *const T = value;
        // SAFETY: a live descriptor; the value is copied before the call returns.
        let done = unsafe { result::set_matmul_desc_attribute(self.0, attribute, value.cast(), size_of::<T>()) };
        check(done, "describing a product")
    }
}

impl Drop for Descriptor {
    fn drop(&mut self) {
        // SAFETY: created once, destroyed once.
        let _ = unsafe { result::destroy_matmul_desc(self.0) };
    }
}

struct Plan {
    key: Key,
    descriptor: Descriptor,
    w: Layout,
    x: Layout,
    d: Layout,
}

impl Plan {
    fn new(key: Key, any_address: u64) -> Result<Self, EngineError> {
        use sys::cublasLtMatmulDescAttributes_t as D;
        let half = sys::cudaDataType_t::CUDA_R_16BF;
        let single = sys::cudaDataType_t::CUDA_R_32F;
        let out = if key.epilogue.wide() { single } else { half };
        let descriptor = result::create_matmul_desc(sys::cublasComputeType_t::CUBLAS_COMPUTE_32F, single)
            .map(Descriptor)
            .map_err(|e| fail("describing a product", e))?;
        // Row-major y = x·wᵀ is column-major yᵀ = w·xᵀ: w transposed, x as it lies.
        descriptor.set(D::CUBLASLT_MATMUL_DESC_TRANSA, &OP_T)?;
        use sys::cublasLtEpilogue_t as E;
        let epilogue = match key.epilogue {
            Epilogue::Store | Epilogue::Add | Epilogue::Parts(_) => E::CUBLASLT_EPILOGUE_DEFAULT,
            Epilogue::Bias | Epilogue::AddBias | Epilogue::WideBias => E::CUBLASLT_EPILOGUE_BIAS,
            Epilogue::BiasGelu => E::CUBLASLT_EPILOGUE_GELU_BIAS,
        };
        descriptor.set(D::CUBLASLT_MATMUL_DESC_EPILOGUE, &epilogue)?;
        if key.epilogue.biased() {
            // Any address will do until the product runs.
            descriptor.set(D::CUBLASLT_MATMUL_DESC_BIAS_POINTER, &any_address)?;
            descriptor.set(D::CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE, &out)?;
        }
        let parts = key.epilogue.parts();
        let slice = key.k / parts;
        Ok(Self {
            key,
            descriptor,
            w: Layout::new(half, slice, key.outputs, key.k)?.batch(parts, slice)?,
            x: Layout::new(half, slice, key.rows, key.k)?.batch(parts, slice)?,
            d: Layout::new(out, key.outputs, key.rows, key.outputs)?.batch(parts, key.rows * key.outputs)?,
        })
    }
}

/// A handle, its workspace and the plans made so far. One per stage.
pub(super) struct Lt {
    handle: sys::cublasLtHandle_t,
    workspace: Buffer<u8>,
    plans: HashMap<Key, (Plan, Algorithm)>,
    /// Classes whose algorithm for this share is known, with its kernels loaded.
    ready: HashSet<Key>,
    algorithms: Arc<Algorithms>,
    lane: Arc<Lane>,
    /// Where the other stage works, if not on the same SMs.
    other: Option<Arc<Lane>>,
}

// SAFETY: handle and plans are used by one thread at a time: every method that uses them takes `&mut self`.
unsafe impl Send for Lt {}

impl Lt {
    /// A handle of the lane's context. `other`: the lane of the other stage, where it has SMs of its own.
    pub fn new(lane: &Arc<Lane>, other: Option<Arc<Lane>>, algorithms: Arc<Algorithms>) -> Result<Self, EngineError> {
        let _current = lane.enter()?;
        let workspace = Buffer::zeroed(lane.device(), WORKSPACE)?;
        let handle = result::create_handle().map_err(|e| fail("opening cuBLASLt", e))?;
        let (plans, ready) = (HashMap::new(), HashSet::new());
        Ok(Self { handle, workspace, plans, ready, algorithms, lane: Arc::clone(lane), other })
    }

    /// Makes the plans of `keys` that there are none of, in no time where their class has been met anywhere: not while a graph
    /// is being captured.
    pub fn plan(&mut self, stream: &Stream, keys: &[Key], scratch: &Scratch<'_>) -> Result<(), EngineError> {
        let mut unmet = Vec::new();
        for key in keys.iter().filter(|key| !self.plans.contains_key(key)).copied().collect::<Vec<_>>() {
            match self.algorithms.known(key, self.lane.sms(), true) {
                Some(algorithm) => self.keep(key, algorithm)?,
                None => unmet.push(key),
            }
        }
        self.prepare(stream, &unmet, scratch, Effort { idle: false, few: false })
    }

    /// The plan of `key` is that algorithm, or the library's first choice where it cannot run so many rows.
    fn keep(&mut self, key: Key, algorithm: Algorithm) -> Result<(), EngineError> {
        let plan = Plan::new(key, self.workspace.pointer())?;
        let algorithm = match self.runs(&plan, &algorithm) {
            true => algorithm,
            false => self.proposed(&plan, 0, 1)?[0],
        };
        self.plans.insert(key, (plan, algorithm));
        Ok(())
    }

    /// Whether an algorithm measured at another number of rows can run this plan.
    fn runs(&self, plan: &Plan, algorithm: &Algorithm) -> bool {
        // SAFETY: all-zero is a valid value of this plain struct.
        let mut result: sys::cublasLtMatmulHeuristicResult_t = unsafe { std::mem::zeroed() };
        let (d, w, x, y) = (plan.descriptor.0, plan.w.0, plan.x.0, plan.d.0);
        // SAFETY: live handle and descriptors, and an out-parameter on this stack.
        let status = unsafe { sys::cublasLtMatmulAlgoCheck(self.handle, d, w, x, y, y, algorithm, &mut result) };
        status == sys::cublasStatus_t::CUBLAS_STATUS_SUCCESS && result.workspaceSize <= WORKSPACE
    }

    /// Queues one product.
    pub fn run(&mut self, stream: &Stream, key: Key, o: Operands) -> Result<(), EngineError> {
        let Some((plan, algorithm)) = self.plans.get(&key) else {
            return Err(EngineError::Device {
                what: "queueing a product",
                reason: format!("no plan was made for {key:?}"),
                remedy: "report this".into(),
            });
        };
        self.queue(stream, plan, algorithm, o)
    }

    fn queue(&self, stream: &Stream, plan: &Plan, algorithm: &Algorithm, o: Operands) -> Result<(), EngineError> {
        let key = plan.key;
        if key.epilogue.biased() {
            plan.descriptor.set(sys::cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_BIAS_POINTER, &o.bias)?;
        }
        let alpha = 1.0f32;
        let beta = if key.epilogue.adds() { 1.0f32 } else { 0.0 };
        let scale = |v: &f32| -> *const c_void { std::ptr::from_ref(v).cast() };
        // SAFETY: the caller gives live device addresses of the sizes in `key`; descriptors live in `self.plans`.
        let done = unsafe {
            result::matmul(
                self.handle,
                plan.descriptor.0,
                scale(&alpha),
                scale(&beta),
                o.w as *const c_void,
                plan.w.0,
                o.x as *const c_void,
                plan.x.0,
                o.c as *const c_void,
                plan.d.0,
                o.d as *mut c_void,
                plan.d.0,
                algorithm,
                self.workspace.pointer() as *mut c_void,
                WORKSPACE,
                stream.raw().cast(),
            )
        };
        check(done, "queueing a product")
    }
}

impl Drop for Lt {
    fn drop(&mut self) {
        let _current = self.lane.enter();
        self.plans.clear();
        // SAFETY: created in `new`, destroyed once.
        let _ = unsafe { result::destroy_handle(self.handle) };
    }
}
