//! Which of the library's algorithms a product takes.

use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use cudarc::cublaslt::{result, sys};

use super::super::stream::Stream;
use super::bench::{Bench, COLD_BYTES, Scratch};
use super::{Algorithm, Epilogue, Key, Lt, Operands, Plan, WORKSPACE, check, fail};
use crate::engine::EngineError;

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

/// Of what was measured beside a busy share, so many are tried on other shares: those that take up to so many times as long
/// as the fastest.
const KEPT: usize = 4;
const FAIR: f32 = 1.06;
/// Of what takes up to so many times as long as the fastest beside a busy share, the one of the largest clusters is taken,
/// whose blocks share what they read: the pipeline is faster with it (docs/performance.md).
const TIE: f32 = 1.02;
/// A candidate replaces the library's first choice when it takes less than this part of its time.
const WORTH_IT: f32 = 0.99;

/// Products of about as many rows share what was measured, at the most of them: rows rounded up to a multiple of this. A wider
/// class would do worse: with what is fastest at 532 rows an encode of 545 takes a fifth longer.
const ROW_CLASS: usize = 32;

/// The fastest algorithms of each shape seen so far, rows rounded up to their class.
#[derive(Default)]
pub(in super::super) struct Algorithms {
    /// Held while a shape is measured: two stages that meet it at once must not each choose a first.
    measuring: Mutex<()>,
    /// Of the same bits: those of the first, which was the fastest on the share that saw the class first.
    alike: Mutex<HashMap<Key, Vec<Algorithm>>>,
    /// The fastest of each number of SMs.
    on_share: Mutex<HashMap<(Key, usize), Algorithm>>,
    /// Times taken while the other stage's share was busy.
    beside: AtomicUsize,
}

impl Algorithms {
    /// How many were measured.
    pub fn measured(&self) -> usize {
        self.on_share.lock().unwrap_or_else(PoisonError::into_inner).len()
    }

    /// How many times were taken while the other stage's share was busy.
    pub fn beside(&self) -> usize {
        self.beside.load(Ordering::Relaxed)
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
    pub(super) fn known(&self, key: Key, sms: usize, any: bool) -> Option<Algorithm> {
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

/// The candidate to take, then those that take little more time, the fastest first. Candidate 0 is the library's first choice;
/// `clusters`: blocks of a cluster of each, where they were timed beside a busy share.
fn ranked(times: &[f32], clusters: Option<&[usize]>) -> Vec<usize> {
    let mut best = 0;
    for (i, time) in times.iter().enumerate() {
        if *time < if best == 0 { times[0] * WORTH_IT } else { times[best] } {
            best = i;
        }
    }
    if let Some(clusters) = clusters {
        let tied = (0..times.len()).filter(|i| times[*i] <= times[best] * TIE);
        let better = |a: &usize, b: &usize| clusters[*a].cmp(&clusters[*b]).then(times[*b].total_cmp(&times[*a]));
        best = tied.max_by(better).unwrap_or(best);
    }
    let mut fair: Vec<_> = (0..times.len()).filter(|i| *i != best && times[*i] <= times[best] * FAIR).collect();
    fair.sort_by(|a, b| times[*a].total_cmp(&times[*b]));
    std::iter::once(best).chain(fair).collect()
}

/// How products are measured.
#[derive(Debug, Clone, Copy)]
pub(in super::super) struct Effort {
    /// Nothing works on the device: algorithms may be timed beside traffic on the other stage's share.
    pub idle: bool,
    /// For shapes that may be wanted some day: what is fast elsewhere is good enough, and of a class that was met nowhere only a
    /// few algorithms are timed.
    pub few: bool,
}

impl Lt {
    /// As [`plan`](Self::plan), with what is fastest on this share. The stream is one of the stage's; nothing else should run
    /// meanwhile, for algorithms are timed, on `scratch`. Those that are known run once, which loads their kernels into this
    /// context: not when a frame is waiting.
    pub fn prepare(
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
            algorithms.beside.fetch_add(bench.beside(), Ordering::Relaxed);
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
            // Without traffic the share's own proposals could seem faster than they are.
            Some(_) if !self.lane.fenced() && !bench.busy() => met.clone(),
            Some(first) => {
                [&met[..], &self.alike(stream, &plan, first, &self.proposed_for_share(&plan)?, bench)?].concat()
            }
        };
        let fast = self.fastest(stream, &plan, &candidates, bench)?;
        let fair = match (met.is_empty(), bench.busy()) {
            (true, false) => vec![fast[0]],
            (true, true) => [&fast[..1], &self.alike(stream, &plan, &fast[0], &fast[1..], bench)?].concat(),
            (false, false) => Vec::new(),
            (false, true) => fast.clone(),
        };
        algorithms.put(class, sms, fast[0], &fair);
        Ok(())
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
    pub(super) fn proposed(&self, plan: &Plan, sms: usize, most: usize) -> Result<Vec<Algorithm>, EngineError> {
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
        let operands = Operands { bias: bench.bias(), ..bench.operands(plan.key) };
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
        // The first round may load kernels, for which the driver may wait until what runs has ended: it has no traffic beside it,
        // and does not count.
        for round in 0..=TIMED_ROUNDS {
            let hopeless = times.iter().copied().fold(f32::INFINITY, f32::min) * HOPELESS;
            for (algorithm, time) in
                candidates.iter().zip(&mut times).filter(|(_, time)| round < 2 || **time <= hopeless)
            {
                bench.begin(stream, round > 0)?;
                for _ in 0..TIMED_RUNS {
                    self.queue(stream, plan, algorithm, bench.operands(plan.key))?;
                }
                let ms = bench.end(stream)?;
                if round > 0 {
                    *time = time.min(ms);
                }
            }
        }
        let clusters: Vec<_> = candidates.iter().map(cluster).collect();
        let ranked = ranked(&times, bench.busy().then_some(&clusters[..]));
        let best = ranked[0];
        let per_run = |ms: f32| ms * 1e3 / TIMED_RUNS as f32;
        tracing::debug!(
            "{:?} on {} SMs{}: {:.1} µs in clusters of {}, the first of {} candidates {:.1} µs",
            plan.key,
            self.lane.sms(),
            if bench.busy() { " beside traffic" } else { "" },
            per_run(times[best]),
            clusters[best],
            candidates.len(),
            per_run(times[0])
        );
        self.lane.device().log_memory("product measured");
        Ok(ranked.into_iter().map(|i| candidates[i]).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn algorithm(number: u64) -> Algorithm {
        Algorithm { data: [number; 8] }
    }

    fn key(rows: usize) -> Key {
        Key { rows, outputs: 2048, k: 16384, epilogue: Epilogue::Parts(2) }
    }

    fn numbers(found: &[Algorithm]) -> Vec<u64> {
        found.iter().map(|a| a.data[0]).collect()
    }

    #[test]
    fn the_fastest_is_taken_and_the_librarys_first_choice_where_it_is_as_good() {
        assert_eq!(ranked(&[100.0, 99.5, 130.0], None), [0, 1]);
        assert_eq!(ranked(&[100.0, 98.0, 97.0, 104.0, 102.0], None), [2, 1, 0, 4]);
        assert_eq!(ranked(&[50.0], None), [0]);
    }

    #[test]
    fn beside_a_busy_share_larger_clusters_break_a_tie_and_nothing_else() {
        assert_eq!(ranked(&[95.0, 90.0, 91.0], Some(&[16, 4, 8])), [2, 1, 0]);
        assert_eq!(ranked(&[95.0, 90.0, 92.0], Some(&[16, 4, 8])), [1, 2, 0], "2 % and more is no tie");
        assert_eq!(ranked(&[90.5, 90.0, 90.2], Some(&[4, 4, 4])), [1, 2, 0], "of equal ones the fastest");
    }

    #[test]
    fn what_was_met_on_one_share_is_known_on_others_and_its_bits_come_first() {
        let found = Algorithms::default();
        assert!(found.known(key(532), 84, true).is_none());
        found.put(key(532), 84, algorithm(1), &[1, 2].map(algorithm));
        found.put(key(530), 100, algorithm(3), &[3, 2, 4, 5].map(algorithm));
        let known = |sms, any| found.known(key(540), sms, any).map(|a| a.data[0]);
        assert_eq!((known(84, false), known(100, false), known(66, false)), (Some(1), Some(3), None), "one class");
        assert_eq!(known(66, true), Some(1));
        assert_eq!(numbers(&found.alike(key(532))), [1, 2, 3, 4], "each once, a few at most");
        assert_eq!(found.measured(), 2);
    }

    #[test]
    fn only_the_same_product_of_other_rows_is_related() {
        let found = Algorithms::default();
        found.put(key(532), 84, algorithm(1), &[algorithm(1)]);
        let other = Key { outputs: 1152, ..key(532) };
        found.put(other, 84, algorithm(2), &[algorithm(2)]);
        assert_eq!(numbers(&found.related(key(600))), [1]);
        assert!(found.related(Key { epilogue: Epilogue::Store, ..key(600) }).is_empty());
    }
}
