//! Large matrix products through cuBLASLt: y = x·wᵀ with bf16 operands and float32 sums.
//!
//! A plan (descriptors and algorithm) is made once per shape and kept. Which of the library's algorithms is fastest is
//! measured when a shape is first seen, with weights that come from memory as they do in the model. A stage on another
//! share of the GPU takes the fastest there of those that give the same bits: tiles that fill one share in whole rounds
//! leave much of another idle. Measuring takes memory that is there already, where that is enough.
//!
//! Where the rest of the GPU belongs to another stage and nothing works yet, that share is kept as busy as the stage will
//! keep it. What is fastest alone need not be fastest then: it may ask too much of L2, and under MPS clusters of blocks
//! spread to SMs of the other share while those are idle.

use std::collections::{HashMap, HashSet};
use std::ffi::c_void;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use cudarc::cublaslt::{result, sys};

use super::device::{Buffer, Device, Pinned, Span};
use super::kernels::{DifferArgs, RandomArgs, Shape, TrafficArgs};
use super::lane::Lane;
use super::plan;
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

/// Of what was measured beside a busy share, so many are tried on other shares, if they take less than so many times as long
/// as the fastest.
const KEPT: usize = 4;
const FAIR: f32 = 1.06;
/// Of what takes up to so many times as long as the fastest beside a busy share, the one of the largest clusters is taken:
/// their blocks share what they read, and leave more of L2 to the other stage.
const TIE: f32 = 1.02;
/// The traffic on the other share ends by itself after this time, in ns.
const TRAFFIC_NS: i64 = 50_000_000;

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

type Algorithm = sys::cublasLtMatmulAlgo_t;

/// The fastest algorithms of each shape seen so far, rows rounded up to their class.
#[derive(Default)]
pub(super) struct Algorithms {
    /// Held while a shape is measured: two stages that meet it at once must not each choose a first.
    measuring: Mutex<()>,
    /// Of the same bits: those of the first, which was the fastest on the share that saw the class first.
    alike: Mutex<HashMap<Key, Vec<Algorithm>>>,
    /// The fastest of each number of SMs.
    on_share: Mutex<HashMap<(Key, usize), Algorithm>>,
}

impl Algorithms {
    /// How many were measured.
    pub fn measured(&self) -> usize {
        self.on_share.lock().unwrap_or_else(PoisonError::into_inner).len()
    }

    fn class(key: Key) -> Key {
        Key { rows: key.rows.next_multiple_of(ROW_CLASS), ..key }
    }

    fn alike(&self, key: Key) -> Vec<Algorithm> {
        let alike = self.alike.lock().unwrap_or_else(PoisonError::into_inner);
        alike.get(&Self::class(key)).cloned().unwrap_or_default()
    }

    /// The same of products that differ in their rows only.
    fn related(&self, key: Key) -> Vec<Algorithm> {
        let alike = self.alike.lock().unwrap_or_else(PoisonError::into_inner);
        let related = |k: &Key| Key { rows: key.rows, ..*k } == key;
        alike.iter().filter(|(k, _)| related(k)).flat_map(|(_, found)| found).copied().collect()
    }

    /// What is fastest on the share, with `any` else on the one that saw the class first.
    fn known(&self, key: Key, sms: usize, any: bool) -> Option<Algorithm> {
        let first = || self.alike(key).first().copied();
        self.on_share(key, sms).or_else(|| first().filter(|_| any))
    }

    fn on_share(&self, key: Key, sms: usize) -> Option<Algorithm> {
        self.on_share.lock().unwrap_or_else(PoisonError::into_inner).get(&(Self::class(key), sms)).copied()
    }

    /// The fastest on a share, and what may be tried on others.
    fn put(&self, key: Key, sms: usize, fastest: Algorithm, fair: &[Algorithm]) {
        let class = Self::class(key);
        self.on_share.lock().unwrap_or_else(PoisonError::into_inner).insert((class, sms), fastest);
        let mut alike = self.alike.lock().unwrap_or_else(PoisonError::into_inner);
        let known = alike.entry(class).or_default();
        for algorithm in fair {
            if known.len() < KEPT && !known.iter().any(|k| k.data == algorithm.data) {
                known.push(*algorithm);
            }
        }
    }
}

/// Blocks of a cluster of it.
fn cluster(algorithm: &Algorithm) -> usize {
    use sys::cublasLtClusterShape_t as S;
    let (mut shape, attribute) =
        (0u16, sys::cublasLtMatmulAlgoConfigAttributes_t::CUBLASLT_ALGO_CONFIG_CLUSTER_SHAPE_ID);
    let to: *mut u16 = &mut shape;
    // SAFETY: an algorithm that the library made, and room for this attribute, which stays 0 where it is not known.
    unsafe {
        let _ = sys::cublasLtMatmulAlgoConfigGetAttribute(algorithm, attribute, to.cast(), 2, &mut 0);
    }
    let is = |shapes: &[S]| shapes.iter().any(|s| *s as u16 == shape);
    if is(&[S::CUBLASLT_CLUSTER_SHAPE_4x2x1, S::CUBLASLT_CLUSTER_SHAPE_2x4x1]) {
        8
    } else if is(&[S::CUBLASLT_CLUSTER_SHAPE_4x1x1, S::CUBLASLT_CLUSTER_SHAPE_2x2x1, S::CUBLASLT_CLUSTER_SHAPE_1x4x1]) {
        4
    } else if is(&[S::CUBLASLT_CLUSTER_SHAPE_2x1x1, S::CUBLASLT_CLUSTER_SHAPE_1x2x1]) {
        2
    } else {
        1
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

/// How products are measured.
#[derive(Debug, Clone, Copy)]
struct Effort {
    /// Nothing works on the device.
    idle: bool,
    /// Only a few algorithms are timed, and none where the class was met anywhere.
    few: bool,
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
        self.find(stream, &unmet, scratch, Effort { idle: false, few: false })
    }

    /// As [`plan`](Self::plan), with what is fastest on this share. The stream is one of the stage's; nothing else should run
    /// meanwhile, for algorithms are timed, on `scratch`: beside traffic on the other stage's share if `idle` says that nothing
    /// does. Those that are known run once, which loads their kernels into this context: not when a frame is waiting.
    pub fn prepare(
        &mut self,
        stream: &Stream,
        keys: &[Key],
        scratch: &Scratch<'_>,
        idle: bool,
    ) -> Result<(), EngineError> {
        self.find(stream, keys, scratch, Effort { idle, few: false })
    }

    /// The same for shapes that may be wanted some day: what is fast elsewhere is good enough, and of a class that was met
    /// nowhere only a few algorithms are timed.
    pub fn prepare_roughly(
        &mut self,
        stream: &Stream,
        keys: &[Key],
        scratch: &Scratch<'_>,
        idle: bool,
    ) -> Result<(), EngineError> {
        self.find(stream, keys, scratch, Effort { idle, few: true })
    }

    fn find(
        &mut self,
        stream: &Stream,
        keys: &[Key],
        scratch: &Scratch<'_>,
        effort: Effort,
    ) -> Result<(), EngineError> {
        let (sms, algorithms) = (self.lane.sms(), Arc::clone(&self.algorithms));
        let mut classes: Vec<Key> = Vec::new();
        for class in keys.iter().map(|key| Algorithms::class(*key)) {
            if !self.ready.contains(&class) && !classes.contains(&class) {
                classes.push(class);
            }
        }
        if !classes.is_empty() {
            let all_known = classes.iter().all(|c| algorithms.known(*c, sms, effort.few).is_some());
            let other = self.other.as_ref().filter(|_| effort.idle && !all_known);
            let cold = if all_known { 0 } else { COLD_BYTES };
            let mut bench = Bench::new(&self.lane, other, stream, &classes, scratch, cold)?;
            for class in classes {
                self.measure(stream, class, &mut bench, effort.few)?;
                if algorithms.on_share(class, sms).is_some() {
                    self.ready.insert(class);
                }
            }
            // What it lies on may go.
            stream.synchronize()?;
        }
        for key in keys {
            if let Some(algorithm) = algorithms.known(*key, sms, true) {
                self.keep(*key, algorithm)?;
            }
        }
        Ok(())
    }

    /// Finds the fastest algorithm of a class on this share, or runs the one that is known.
    fn measure(&self, stream: &Stream, class: Key, bench: &mut Bench, few: bool) -> Result<(), EngineError> {
        let (sms, algorithms) = (self.lane.sms(), &self.algorithms);
        let plan = Plan::new(class, self.workspace.pointer())?;
        let known = || algorithms.known(class, sms, few).filter(|a| self.runs(&plan, a));
        let _alone = known().is_none().then(|| algorithms.measuring.lock().unwrap_or_else(PoisonError::into_inner));
        if let Some(known) = known() {
            return self.queue(stream, &plan, &known, bench.operands(class));
        }
        let met = self.running(&plan, algorithms.alike(class));
        let candidates = match met.first() {
            None if few => {
                let related = self.running(&plan, algorithms.related(class));
                [related, self.proposed(&plan, 0, SHARE_CANDIDATES)?, self.proposed_for_share(&plan)?].concat()
            }
            None => [self.proposed(&plan, 0, CANDIDATES)?, self.proposed_for_share(&plan)?].concat(),
            // Without traffic the share's own proposals would seem faster than they are.
            Some(_) if self.lane.spreads() && bench.traffic.is_none() => met.clone(),
            Some(first) => {
                [&met[..], &self.alike(stream, &plan, first, &self.proposed_for_share(&plan)?, bench)?].concat()
            }
        };
        let fast = self.fastest(stream, &plan, &candidates, bench)?;
        let fair = match (met.is_empty(), bench.traffic.is_some()) {
            (true, false) => vec![fast[0]],
            (true, true) => [&fast[..1], &self.alike(stream, &plan, &fast[0], &fast[1..], bench)?].concat(),
            (false, false) => Vec::new(),
            (false, true) => fast.clone(),
        };
        algorithms.put(class, sms, fast[0], &fair);
        Ok(())
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

    /// Those of `algorithms` that can.
    fn running(&self, plan: &Plan, mut algorithms: Vec<Algorithm>) -> Vec<Algorithm> {
        algorithms.retain(|a| self.runs(plan, a));
        algorithms
    }

    /// What the library proposes for a share.
    fn proposed_for_share(&self, plan: &Plan) -> Result<Vec<Algorithm>, EngineError> {
        let sms = self.lane.sms();
        if sms >= self.lane.device().sms() {
            return Ok(Vec::new());
        }
        let mut found = self.proposed(plan, sms, SHARE_CANDIDATES)?;
        found.extend(self.proposed(plan, sms.saturating_sub(FEWER_SMS), SHARE_CANDIDATES)?);
        Ok(found)
    }

    /// Up to `most` algorithms that the library proposes for `sms` SMs; 0: for all.
    fn proposed(&self, plan: &Plan, sms: usize, most: usize) -> Result<Vec<Algorithm>, EngineError> {
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

    /// Those of `candidates` that give the bits of `first`.
    fn alike(
        &self,
        stream: &Stream,
        plan: &Plan,
        first: &Algorithm,
        candidates: &[Algorithm],
        bench: &mut Bench,
    ) -> Result<Vec<Algorithm>, EngineError> {
        // What adds would be compared on what it has added to.
        if plan.key.epilogue.adds() {
            return Ok(Vec::new());
        }
        // A bias that no result overwrites.
        let operands = Operands { bias: bench.rows.at, ..bench.operands(plan.key) };
        self.queue(stream, plan, first, operands)?;
        let mut alike = Vec::new();
        for candidate in candidates.iter().filter(|c| c.data != first.data && self.runs(plan, c)) {
            self.queue(stream, plan, candidate, Operands { d: bench.second(plan.key), ..operands })?;
            if bench.same(stream, plan.key)? {
                alike.push(*candidate);
            }
        }
        Ok(alike)
    }

    /// The candidate that takes the least time, and those that take little more.
    fn fastest(
        &self,
        stream: &Stream,
        plan: &Plan,
        candidates: &[Algorithm],
        bench: &mut Bench,
    ) -> Result<Vec<Algorithm>, EngineError> {
        let mut times = vec![f32::INFINITY; candidates.len()];
        // The first round may load kernels, and does not count.
        for round in 0..=TIMED_ROUNDS {
            let hopeless = times.iter().copied().fold(f32::INFINITY, f32::min) * HOPELESS;
            for (algorithm, time) in
                candidates.iter().zip(&mut times).filter(|(_, time)| round < 2 || **time <= hopeless)
            {
                bench.begin(stream)?;
                for _ in 0..TIMED_RUNS {
                    self.queue(stream, plan, algorithm, bench.operands(plan.key))?;
                }
                let ms = bench.end(stream)?;
                if round > 0 {
                    *time = time.min(ms);
                }
            }
        }
        let mut best = 0;
        for (i, time) in times.iter().enumerate() {
            if *time < if best == 0 { times[0] * WORTH_IT } else { times[best] } {
                best = i;
            }
        }
        if bench.traffic.is_some() {
            let tied = (0..times.len()).filter(|i| times[*i] <= times[best] * TIE);
            let size = |i: usize| cluster(&candidates[i]);
            let larger = |a: &usize, b: &usize| size(*a).cmp(&size(*b)).then(times[*b].total_cmp(&times[*a]));
            best = tied.max_by(larger).unwrap_or(best);
        }
        let per_run = |ms: f32| ms * 1e3 / TIMED_RUNS as f32;
        tracing::debug!(
            "{:?} on {} SMs{}: {:.1} µs, the first of {} candidates {:.1} µs",
            plan.key,
            self.lane.sms(),
            if bench.traffic.is_some() { " beside traffic" } else { "" },
            per_run(times[best]),
            candidates.len(),
            per_run(times[0])
        );
        self.lane.device().log_memory("product measured");
        let mut fair: Vec<_> =
            (0..candidates.len()).filter(|i| *i != best && times[*i] <= times[best] * FAIR).collect();
        fair.sort_by(|a, b| times[*a].total_cmp(&times[*b]));
        Ok(std::iter::once(best).chain(fair).map(|i| candidates[i]).collect())
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
    traffic: Option<Traffic>,
}

impl Bench {
    /// With weights of `cold` bytes at least, and traffic on the SMs of `other`.
    fn new(
        lane: &Arc<Lane>,
        other: Option<&Arc<Lane>>,
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
            traffic: other.map(Traffic::new).transpose()?,
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

    /// What is queued from now on is timed.
    fn begin(&mut self, stream: &Stream) -> Result<(), EngineError> {
        if let Some(traffic) = &mut self.traffic {
            traffic.begin(&self.weights)?;
        }
        // Keeps the share busy while the runs are queued: draws the first of the rows' numbers once more.
        self.draw(stream, self.rows.at, HELD, 1)?;
        stream.record(&self.events[0])
    }

    /// Waits for it; how long it took, in ms.
    fn end(&mut self, stream: &Stream) -> Result<f32, EngineError> {
        stream.record(&self.events[1])?;
        if let Some(traffic) = &self.traffic {
            stream.fill(&traffic.stop, 1)?;
        }
        stream.synchronize()?;
        if let Some(traffic) = &self.traffic {
            traffic.wait()?;
        }
        self.events[1].ms_since(&self.events[0])
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

/// A kernel that reads memory on every SM of another stage's share, and leaves no room on them.
struct Traffic {
    lane: Arc<Lane>,
    stream: Stream,
    /// Whether it should stop.
    stop: Buffer<u8>,
    /// Whether each block has begun.
    began: Pinned<u8>,
}

impl Traffic {
    fn new(lane: &Arc<Lane>) -> Result<Self, EngineError> {
        let (stop, began) = (Buffer::zeroed(lane.device(), 1)?, Pinned::zeroed(lane.device(), lane.sms())?);
        Ok(Self { lane: Arc::clone(lane), stream: Stream::new(lane)?, stop, began })
    }

    /// Returns when every block runs, or soon after.
    fn begin(&mut self, weights: &Piece) -> Result<(), EngineError> {
        let _current = self.lane.enter()?;
        self.stream.fill(&self.stop, 0)?;
        let began = self.began.as_mut_slice();
        began.fill(0);
        let began = began.as_ptr();
        let args = TrafficArgs {
            from: weights.at,
            count: (weights.bytes / 16) as i64,
            stop: self.stop.pointer(),
            began: began as u64,
            most_ns: TRAFFIC_NS,
            never: self.stop.pointer(),
        };
        let shape =
            Shape { shared: plan::TRAFFIC_SHARED as u32, dependent: false, ..Shape::blocks(self.lane.sms(), 256) };
        self.lane.kernels().traffic.launch(&self.stream, shape, &args)?;
        let deadline = Instant::now() + Duration::from_nanos(TRAFFIC_NS as u64 / 2);
        // SAFETY: a live allocation of so many bytes, which the device writes meanwhile.
        let runs = |block| unsafe { began.add(block).read_volatile() } != 0;
        while Instant::now() < deadline && !(0..self.lane.sms()).all(runs) {
            std::hint::spin_loop();
        }
        Ok(())
    }

    fn wait(&self) -> Result<(), EngineError> {
        let _current = self.lane.enter()?;
        self.stream.synchronize()
    }
}

impl Drop for Traffic {
    fn drop(&mut self) {
        // Where timing failed halfway: what it reads may go.
        let _ = self.wait();
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
