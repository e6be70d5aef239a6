//! Large matrix products through cuBLASLt: y = x·wᵀ with bf16 operands and float32 sums.
//!
//! A plan (descriptors and algorithm) is made once per shape and kept. Which of the library's algorithms is fastest is
//! measured when a shape is first seen, with weights that come from memory as they do in the model. A stage on another
//! share of the GPU takes the fastest there of those that give the same bits: tiles that fill one share in whole rounds
//! leave much of another idle. Measuring takes memory that is there already, where that is enough.

use std::collections::{HashMap, HashSet};
use std::ffi::c_void;
use std::sync::{Arc, Mutex, PoisonError};

use cudarc::cublaslt::{result, sys};

use super::device::{Buffer, Device, Pinned, Span};
use super::kernels::{DifferArgs, RandomArgs, Shape};
use super::lane::Lane;
use super::stream::{Event, Stream};
use crate::engine::EngineError;

/// Bytes of scratch memory one stage lends to the library (NVIDIA's advice for Hopper).
pub(super) const WORKSPACE: usize = 32 << 20;

/// Algorithms asked for and tried. The library loads the kernels of those that are tried, and keeps them.
const CANDIDATES: usize = 32;

/// Of what the library proposes for a share, so many are tried: a share may be made while another one works.
const SHARE_CANDIDATES: usize = 4;
/// And of what it proposes for so many SMs fewer: clusters leave SMs of a share idle, of which the library knows nothing.
const FEWER_SMS: usize = 8;
/// What takes so many times as long as the best is not timed again.
const HOPELESS: f32 = 1.2;

/// Runs that are timed of each candidate, and how often: the best time counts.
const TIMED_RUNS: usize = 6;
const TIMED_ROUNDS: usize = 3;

/// Weights are read from this much memory in turn while candidates are timed, or more: more than any L2.
pub(super) const COLD_BYTES: usize = 192 << 20;

/// Numbers that one block draws while the timed runs are queued: about 0.1 ms.
const HELD: usize = 1 << 18;

/// A candidate replaces the library's first choice when it takes less than this part of its time.
const WORTH_IT: f32 = 0.99;

/// Products of about as many rows share what was measured, at the most of them: rows rounded up to a multiple of this. A wider
/// class would do worse: with what is fastest at 532 rows an encode of 545 takes a fifth longer.
const ROW_CLASS: usize = 32;

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

/// The fastest algorithm of each shape seen so far, rows rounded up to their class: on the share that saw it first, whose bits
/// hold for all, and on each share.
#[derive(Default)]
pub(super) struct Algorithms {
    /// Held while a shape is measured: two stages that meet it at once must not each choose a first.
    measuring: Mutex<()>,
    first: Mutex<HashMap<Key, sys::cublasLtMatmulAlgo_t>>,
    on_share: Mutex<HashMap<(Key, usize), sys::cublasLtMatmulAlgo_t>>,
}

impl Algorithms {
    /// How many were measured.
    pub fn measured(&self) -> usize {
        self.on_share.lock().unwrap_or_else(PoisonError::into_inner).len()
    }

    fn class(key: Key) -> Key {
        Key { rows: key.rows.next_multiple_of(ROW_CLASS), ..key }
    }

    fn first(&self, key: Key) -> Option<sys::cublasLtMatmulAlgo_t> {
        self.first.lock().unwrap_or_else(PoisonError::into_inner).get(&Self::class(key)).copied()
    }

    fn on_share(&self, key: Key, sms: usize) -> Option<sys::cublasLtMatmulAlgo_t> {
        self.on_share.lock().unwrap_or_else(PoisonError::into_inner).get(&(Self::class(key), sms)).copied()
    }

    fn put_first(&self, key: Key, sms: usize, algorithm: sys::cublasLtMatmulAlgo_t) {
        self.first.lock().unwrap_or_else(PoisonError::into_inner).insert(Self::class(key), algorithm);
        self.put(key, sms, algorithm);
    }

    fn put(&self, key: Key, sms: usize, algorithm: sys::cublasLtMatmulAlgo_t) {
        self.on_share.lock().unwrap_or_else(PoisonError::into_inner).insert((Self::class(key), sms), algorithm);
    }
}

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
    plans: HashMap<Key, (Plan, sys::cublasLtMatmulAlgo_t)>,
    /// Classes whose algorithm for this share is known, with its kernels loaded.
    ready: HashSet<Key>,
    algorithms: Arc<Algorithms>,
    lane: Arc<Lane>,
}

// SAFETY: handle and plans are used by one thread at a time: every method that uses them takes `&mut self`.
unsafe impl Send for Lt {}

impl Lt {
    /// A handle of the lane's context.
    pub fn new(lane: &Arc<Lane>, algorithms: Arc<Algorithms>) -> Result<Self, EngineError> {
        let _current = lane.enter()?;
        let workspace = Buffer::zeroed(lane.device(), WORKSPACE)?;
        let handle = result::create_handle().map_err(|e| fail("opening cuBLASLt", e))?;
        Ok(Self { handle, workspace, plans: HashMap::new(), ready: HashSet::new(), algorithms, lane: Arc::clone(lane) })
    }

    /// Makes the plans of `keys` that there are none of, in no time where their class has been met anywhere: not while a graph
    /// is being captured.
    pub fn plan(&mut self, stream: &Stream, keys: &[Key], scratch: &Scratch<'_>) -> Result<(), EngineError> {
        let mut unmet = Vec::new();
        for key in keys {
            if self.plans.contains_key(key) {
                continue;
            }
            let known = self.algorithms.on_share(*key, self.lane.sms()).or_else(|| self.algorithms.first(*key));
            match known {
                Some(algorithm) => self.keep(*key, algorithm)?,
                None => unmet.push(*key),
            }
        }
        self.prepare(stream, &unmet, scratch)
    }

    /// As [`plan`](Self::plan), with what is fastest on this share. The stream is one of the stage's; nothing else should run
    /// meanwhile, for algorithms are timed, on `scratch`. Those that are known run once, which loads their kernels into this
    /// context: not when a frame is waiting.
    pub fn prepare(&mut self, stream: &Stream, keys: &[Key], scratch: &Scratch<'_>) -> Result<(), EngineError> {
        let sms = self.lane.sms();
        let mut classes: Vec<Key> = Vec::new();
        for class in keys.iter().map(|key| Algorithms::class(*key)) {
            if !self.ready.contains(&class) && !classes.contains(&class) {
                classes.push(class);
            }
        }
        if !classes.is_empty() {
            let cold = if classes.iter().all(|c| self.algorithms.on_share(*c, sms).is_some()) { 0 } else { COLD_BYTES };
            let mut bench = Bench::new(&self.lane, stream, &classes, scratch, cold)?;
            for class in classes {
                self.measure(stream, class, &mut bench)?;
                self.ready.insert(class);
            }
            // What it lies on may go.
            stream.synchronize()?;
        }
        for key in keys {
            if let Some(algorithm) = self.algorithms.on_share(*key, sms) {
                self.keep(*key, algorithm)?;
            }
        }
        Ok(())
    }

    /// Finds the fastest algorithm of a class on this share, or runs the one that is known.
    fn measure(&self, stream: &Stream, class: Key, bench: &mut Bench) -> Result<(), EngineError> {
        let (sms, algorithms) = (self.lane.sms(), &self.algorithms);
        let plan = Plan::new(class, self.workspace.pointer())?;
        let known = || algorithms.on_share(class, sms).filter(|a| self.runs(&plan, a));
        let _alone = known().is_none().then(|| algorithms.measuring.lock().unwrap_or_else(PoisonError::into_inner));
        match (algorithms.first(class).filter(|a| self.runs(&plan, a)), known()) {
            (_, Some(known)) => self.queue(stream, &plan, &known, bench.operands(class))?,
            (Some(first), None) => {
                let candidates = self.alike(stream, &plan, &first, bench)?;
                algorithms.put(class, sms, self.fastest(stream, &plan, &candidates, bench)?);
            }
            (None, None) => {
                let mut candidates = self.proposed(&plan, 0, CANDIDATES)?;
                candidates.extend(self.proposed_for_share(&plan)?);
                algorithms.put_first(class, sms, self.fastest(stream, &plan, &candidates, bench)?);
            }
        }
        Ok(())
    }

    /// The plan of `key` is that algorithm, or the library's first choice where it cannot run so many rows.
    fn keep(&mut self, key: Key, algorithm: sys::cublasLtMatmulAlgo_t) -> Result<(), EngineError> {
        let plan = Plan::new(key, self.workspace.pointer())?;
        let algorithm = match self.runs(&plan, &algorithm) {
            true => algorithm,
            false => self.proposed(&plan, 0, 1)?[0],
        };
        self.plans.insert(key, (plan, algorithm));
        Ok(())
    }

    /// Whether an algorithm measured at another number of rows can run this plan.
    fn runs(&self, plan: &Plan, algorithm: &sys::cublasLtMatmulAlgo_t) -> bool {
        // SAFETY: all-zero is a valid value of this plain struct.
        let mut result: sys::cublasLtMatmulHeuristicResult_t = unsafe { std::mem::zeroed() };
        let (d, w, x, y) = (plan.descriptor.0, plan.w.0, plan.x.0, plan.d.0);
        // SAFETY: live handle and descriptors, and an out-parameter on this stack.
        let status = unsafe { sys::cublasLtMatmulAlgoCheck(self.handle, d, w, x, y, y, algorithm, &mut result) };
        status == sys::cublasStatus_t::CUBLAS_STATUS_SUCCESS && result.workspaceSize <= WORKSPACE
    }

    /// What the library proposes for a share.
    fn proposed_for_share(&self, plan: &Plan) -> Result<Vec<sys::cublasLtMatmulAlgo_t>, EngineError> {
        let sms = self.lane.sms();
        if sms >= self.lane.device().sms() {
            return Ok(Vec::new());
        }
        let mut found = self.proposed(plan, sms, SHARE_CANDIDATES)?;
        found.extend(self.proposed(plan, sms.saturating_sub(FEWER_SMS), SHARE_CANDIDATES)?);
        Ok(found)
    }

    /// Up to `most` algorithms that the library proposes for `sms` SMs; 0: for all.
    fn proposed(&self, plan: &Plan, sms: usize, most: usize) -> Result<Vec<sys::cublasLtMatmulAlgo_t>, EngineError> {
        let preference = result::create_matmul_pref().map_err(|e| fail("choosing an algorithm", e))?;
        let limit: *const usize = &WORKSPACE;
        // Slices whose sums stay apart are not sliced again: that would take a kernel more to add them.
        use sys::cublasLtReductionScheme_t as R;
        let reductions = match plan.key.epilogue {
            Epilogue::Parts(_) => R::CUBLASLT_REDUCTION_SCHEME_NONE,
            _ => R::CUBLASLT_REDUCTION_SCHEME_MASK,
        };
        let reductions: *const R = &reductions;
        // SAFETY: all-zero is a valid value of this plain struct.
        let mut found: Vec<sys::cublasLtMatmulHeuristicResult_t> = vec![unsafe { std::mem::zeroed() }; most];
        let mut count = 0;
        let (d, w, x, y) = (plan.descriptor.0, plan.w.0, plan.x.0, plan.d.0);
        // Only asked with: what runs is the same as on the whole GPU.
        use sys::cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_SM_COUNT_TARGET as SMS;
        plan.descriptor.set(SMS, &(sms as i32))?;
        use sys::cublasLtMatmulPreferenceAttributes_t as P;
        // SAFETY: live descriptors and room for as many results as are asked for; the preference is destroyed once.
        let status = unsafe {
            let set = |attribute, value, bytes| result::set_matmul_pref_attribute(preference, attribute, value, bytes);
            let limited = set(P::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, limit.cast(), size_of::<usize>())
                .and_then(|()| set(P::CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, reductions.cast(), size_of::<R>()));
            let asked = limited.and_then(|()| {
                let to = found.as_mut_ptr();
                let wanted = most as i32;
                sys::cublasLtMatmulAlgoGetHeuristic(self.handle, d, w, x, y, y, preference, wanted, to, &mut count)
                    .result()
            });
            let _ = result::destroy_matmul_pref(preference);
            asked
        };
        plan.descriptor.set(SMS, &0i32)?;
        check(status, "choosing an algorithm")?;
        found.truncate(count.max(0) as usize);
        found.retain(|f| f.state == sys::cublasStatus_t::CUBLAS_STATUS_SUCCESS);
        if found.is_empty() {
            return Err(EngineError::Device {
                what: "choosing a GEMM algorithm",
                reason: format!("cuBLASLt has none for {:?}", plan.key),
                remedy: "install the cuBLAS of CUDA 13".into(),
            });
        }
        Ok(found.into_iter().map(|f| f.algo).collect())
    }

    /// `first`, and what the library proposes for this share that gives the same bits.
    fn alike(
        &self,
        stream: &Stream,
        plan: &Plan,
        first: &sys::cublasLtMatmulAlgo_t,
        bench: &mut Bench,
    ) -> Result<Vec<sys::cublasLtMatmulAlgo_t>, EngineError> {
        let mut alike = vec![*first];
        // What adds would be compared on what it has added to.
        if plan.key.epilogue.adds() {
            return Ok(alike);
        }
        // A bias that no result overwrites.
        let operands = Operands { bias: bench.rows.at, ..bench.operands(plan.key) };
        self.queue(stream, plan, first, operands)?;
        for candidate in self.proposed_for_share(plan)? {
            if alike.iter().any(|a| a.data == candidate.data) || !self.runs(plan, &candidate) {
                continue;
            }
            self.queue(stream, plan, &candidate, Operands { d: bench.second(plan.key), ..operands })?;
            if bench.same(stream, plan.key)? {
                alike.push(candidate);
            }
        }
        Ok(alike)
    }

    /// The candidate that takes the least time.
    fn fastest(
        &self,
        stream: &Stream,
        plan: &Plan,
        candidates: &[sys::cublasLtMatmulAlgo_t],
        bench: &mut Bench,
    ) -> Result<sys::cublasLtMatmulAlgo_t, EngineError> {
        let mut times = vec![f32::INFINITY; candidates.len()];
        // The first round may load kernels, and does not count.
        for round in 0..=TIMED_ROUNDS {
            let hopeless = times.iter().copied().fold(f32::INFINITY, f32::min) * HOPELESS;
            for (algorithm, time) in
                candidates.iter().zip(&mut times).filter(|(_, time)| round < 2 || **time <= hopeless)
            {
                bench.hold(stream)?;
                stream.record(&bench.events[0])?;
                for _ in 0..TIMED_RUNS {
                    self.queue(stream, plan, algorithm, bench.operands(plan.key))?;
                }
                stream.record(&bench.events[1])?;
                stream.synchronize()?;
                if round > 0 {
                    *time = time.min(bench.events[1].ms_since(&bench.events[0])?);
                }
            }
        }
        let mut best = 0;
        for (i, time) in times.iter().enumerate() {
            if *time < if best == 0 { times[0] * WORTH_IT } else { times[best] } {
                best = i;
            }
        }
        let per_run = |ms: f32| ms * 1e3 / TIMED_RUNS as f32;
        tracing::debug!(
            "{:?} on {} SMs: {:.1} µs, the first of {} candidates {:.1} µs",
            plan.key,
            self.lane.sms(),
            per_run(times[best]),
            candidates.len(),
            per_run(times[0])
        );
        self.lane.device().log_memory("product measured");
        Ok(candidates[best])
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

    fn queue(
        &self,
        stream: &Stream,
        plan: &Plan,
        algorithm: &sys::cublasLtMatmulAlgo_t,
        o: Operands,
    ) -> Result<(), EngineError> {
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

/// Memory of the stage on which candidates may be timed, while nothing else uses it.
pub(super) struct Scratch<'a> {
    /// Only read.
    pub weights: Span<'a>,
    /// Overwritten.
    pub rows: Span<'a>,
    /// Overwritten.
    pub out: Span<'a>,
}

/// Memory of the scratch, or of its own where that is too little.
struct Piece {
    at: u64,
    bytes: usize,
    own: Option<Buffer<u8>>,
}

impl Piece {
    fn new(device: &Arc<Device>, lent: Span<'_>, needed: usize) -> Result<Self, EngineError> {
        if lent.bytes >= needed {
            return Ok(Self { at: lent.at, bytes: lent.bytes, own: None });
        }
        let own = Buffer::zeroed(device, needed)?;
        Ok(Self { at: own.pointer(), bytes: needed, own: Some(own) })
    }
}

/// Of a product's result.
fn out_bytes(key: &Key) -> usize {
    key.epilogue.parts() * key.rows * key.outputs * if key.epilogue.wide() { 4 } else { 2 }
}

/// What candidates are timed on; it goes before the scratch does.
struct Bench {
    lane: Arc<Lane>,
    weights: Piece,
    /// Bytes of the weights read since they were last begun.
    read: usize,
    rows: Piece,
    /// Room for two results.
    out: Piece,
    /// Whether the last two results differed.
    differ: Pinned<u8>,
    events: [Event; 2],
}

impl Bench {
    /// With weights of `cold` bytes at least.
    fn new(
        lane: &Arc<Lane>,
        stream: &Stream,
        keys: &[Key],
        scratch: &Scratch<'_>,
        cold: usize,
    ) -> Result<Self, EngineError> {
        let device = lane.device();
        let most = |f: fn(&Key) -> usize| keys.iter().map(f).max().unwrap_or(0);
        let bench = Self {
            lane: Arc::clone(lane),
            weights: Piece::new(device, scratch.weights, cold.max(most(|k| k.outputs * k.k * 2)))?,
            read: 0,
            rows: Piece::new(device, scratch.rows, HELD.max(most(|k| k.rows * k.k)) * 2)?,
            out: Piece::new(device, scratch.out, 2 * most(out_bytes))?,
            differ: Pinned::zeroed(device, size_of::<u32>())?,
            events: [Event::new(lane)?, Event::new(lane)?],
        };
        // Zeros would draw less power than real numbers.
        if let Some(own) = &bench.weights.own {
            bench.draw(stream, own.pointer(), own.len() / 2, 1024)?;
        }
        bench.draw(stream, bench.rows.at, bench.rows.bytes / 2, 1024)?;
        bench.draw(stream, bench.out.at, bench.out.bytes / 2, 1024)?;
        Ok(bench)
    }

    /// Queues drawing `count` bf16 numbers, the same every time.
    fn draw(&self, stream: &Stream, to: u64, count: usize, blocks: usize) -> Result<(), EngineError> {
        let args = RandomArgs { to, count: count as i64, seed: 1, deviation: 1.0, to_f32: 0 };
        let shape = Shape { dependent: false, ..Shape::blocks(blocks, 256) };
        self.lane.kernels().random.launch(stream, shape, &args)
    }

    /// Keeps the GPU busy while the runs that are timed are queued: draws the first of the rows' numbers once more.
    fn hold(&self, stream: &Stream) -> Result<(), EngineError> {
        self.draw(stream, self.rows.at, HELD, 1)
    }

    /// Operands of the next run. Its weights lie behind those of the run before, so that they come back only after all
    /// others, when L2 has them no more.
    fn operands(&mut self, key: Key) -> Operands {
        let bytes = (key.outputs * key.k * 2).next_multiple_of(256);
        if self.read + bytes > self.weights.bytes {
            self.read = 0;
        }
        let w = self.weights.at + self.read as u64;
        self.read += bytes;
        Operands { w, x: self.rows.at, bias: self.out.at, c: self.out.at, d: self.out.at }
    }

    /// Where a result can be kept beside the one that [`operands`](Self::operands) names.
    fn second(&self, key: Key) -> u64 {
        self.out.at + out_bytes(&key) as u64
    }

    /// Whether both are the same.
    fn same(&mut self, stream: &Stream, key: Key) -> Result<bool, EngineError> {
        self.differ.as_mut_slice().fill(0);
        let (a, b, differ) = (self.out.at, self.second(key), self.differ.as_ptr() as u64);
        let args = DifferArgs { a, b, differ, count: (out_bytes(&key) / 4) as i64 };
        self.lane.kernels().differ.launch(stream, Shape { dependent: false, ..Shape::blocks(256, 256) }, &args)?;
        stream.synchronize()?;
        Ok(self.differ.as_slice().iter().all(|d| *d == 0))
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
