//! Large matrix products through cuBLASLt: y = x·wᵀ with bf16 operands and float32 sums.
//!
//! A plan (descriptors and algorithm) is made once per shape and kept; the library's first choice is taken, so that
//! the same shape always runs the same algorithm.

use std::collections::HashMap;
use std::ffi::c_void;
use std::sync::Arc;

use cudarc::cublaslt::{result, sys};

use super::device::Buffer;
use super::lane::Lane;
use super::stream::Stream;
use crate::engine::EngineError;

/// Bytes of scratch memory one stage lends to the library (NVIDIA's advice for Hopper).
const WORKSPACE: usize = 32 << 20;

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
}

impl Epilogue {
    fn wide(self) -> bool {
        matches!(self, Epilogue::Add | Epilogue::AddBias | Epilogue::WideBias)
    }

    fn adds(self) -> bool {
        matches!(self, Epilogue::Add | Epilogue::AddBias)
    }

    fn biased(self) -> bool {
        !matches!(self, Epilogue::Store | Epilogue::Add)
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

struct Layout(sys::cublasLtMatrixLayout_t);

impl Layout {
    fn new(kind: sys::cudaDataType, rows: usize, cols: usize, ld: usize) -> Result<Self, EngineError> {
        result::create_matrix_layout(kind, rows as u64, cols as u64, ld as i64)
            .map(Self)
            .map_err(|e| fail("describing a matrix", e))
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
    descriptor: Descriptor,
    w: Layout,
    x: Layout,
    d: Layout,
    algorithm: sys::cublasLtMatmulAlgo_t,
}

/// A handle, its workspace and the plans made so far. One per stage.
pub(super) struct Lt {
    handle: sys::cublasLtHandle_t,
    workspace: Buffer<u8>,
    plans: HashMap<Key, Plan>,
    lane: Arc<Lane>,
}

// SAFETY: handle and plans are used by one thread at a time: every method that uses them takes `&mut self`.
unsafe impl Send for Lt {}

impl Lt {
    /// A handle of the lane's context.
    pub fn new(lane: &Arc<Lane>) -> Result<Self, EngineError> {
        let _current = lane.enter()?;
        let workspace = Buffer::zeroed(lane.device(), WORKSPACE)?;
        let handle = result::create_handle().map_err(|e| fail("opening cuBLASLt", e))?;
        Ok(Self { handle, workspace, plans: HashMap::new(), lane: Arc::clone(lane) })
    }

    /// Makes the plan of `key` if there is none: not while a graph is being captured.
    pub fn prepare(&mut self, key: Key) -> Result<(), EngineError> {
        if self.plans.contains_key(&key) {
            return Ok(());
        }
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
            Epilogue::Store | Epilogue::Add => E::CUBLASLT_EPILOGUE_DEFAULT,
            Epilogue::Bias | Epilogue::AddBias | Epilogue::WideBias => E::CUBLASLT_EPILOGUE_BIAS,
            Epilogue::BiasGelu => E::CUBLASLT_EPILOGUE_GELU_BIAS,
        };
        descriptor.set(D::CUBLASLT_MATMUL_DESC_EPILOGUE, &epilogue)?;
        if key.epilogue.biased() {
            // Any address will do until the product runs.
            descriptor.set(D::CUBLASLT_MATMUL_DESC_BIAS_POINTER, &self.workspace.pointer())?;
            descriptor.set(D::CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE, &out)?;
        }
        let w = Layout::new(half, key.k, key.outputs, key.k)?;
        let x = Layout::new(half, key.k, key.rows, key.k)?;
        let d = Layout::new(out, key.outputs, key.rows, key.outputs)?;
        let preference = result::create_matmul_pref().map_err(|e| fail("choosing an algorithm", e))?;
        let bytes = WORKSPACE;
        let limit: *const usize = &bytes;
        // SAFETY: live descriptors and an out-value returned by the call; the preference is destroyed once.
        let found = unsafe {
            let set = result::set_matmul_pref_attribute(
                preference,
                sys::cublasLtMatmulPreferenceAttributes_t::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
                limit.cast(),
                size_of::<usize>(),
            );
            let found = set.and_then(|()| {
                result::get_matmul_algo_heuristic(self.handle, descriptor.0, w.0, x.0, d.0, d.0, preference)
            });
            let _ = result::destroy_matmul_pref(preference);
            found
        };
        let found = found.map_err(|e| EngineError::Device {
            what: "choosing a GEMM algorithm",
            reason: format!("cuBLASLt has none for {key:?}: {e}"),
            remedy: "install the cuBLAS of CUDA 13".into(),
        })?;
        self.plans.insert(key, Plan { descriptor, w, x, d, algorithm: found.algo });
        Ok(())
    }

    /// Queues one product.
    pub fn run(&mut self, stream: &Stream, key: Key, o: Operands) -> Result<(), EngineError> {
        self.prepare(key)?;
        let Some(plan) = self.plans.get(&key) else { return Ok(()) };
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
                &plan.algorithm,
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
