//! A log-linear histogram of fixed size: recording allocates nothing and takes a few nanoseconds.

/// Buckets per power of two: a bucket is at most 1/128 of its value wide, so a quantile is within 0.8 %.
const SUB: u64 = 128;
const SUB_BITS: u32 = SUB.ilog2();
/// Values from `2^MAX_BITS` share the last bucket: 2^42 ns is 73 minutes.
const MAX_BITS: u32 = 42;
const BUCKETS: usize = ((MAX_BITS - SUB_BITS + 1) as usize) * SUB as usize;

/// Counts of values such as nanoseconds. Values below 128 are exact; up to 2^42 quantiles are within 1 % (and never
/// below the true value); beyond that only count, sum, minimum and maximum are exact.
#[derive(Debug, Clone)]
pub struct Histogram {
    buckets: Box<[u64]>,
    count: u64,
    sum: u128,
    min: u64,
    max: u64,
}

/// A copy of a histogram's figures, in the unit that was recorded. All zero when nothing was.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Stats {
    /// Values recorded.
    pub count: u64,
    /// Smallest.
    pub min: u64,
    /// Largest.
    pub max: u64,
    /// Mean.
    pub mean: f64,
    /// Median.
    pub p50: u64,
    /// 95th percentile.
    pub p95: u64,
    /// 99th percentile.
    pub p99: u64,
}

impl Default for Histogram {
    fn default() -> Self {
        Self::new()
    }
}

impl Histogram {
    /// An empty histogram; all its memory is reserved here (36 KiB).
    pub fn new() -> Self {
        Self { buckets: vec![0; BUCKETS].into_boxed_slice(), count: 0, sum: 0, min: u64::MAX, max: 0 }
    }

    fn bucket(value: u64) -> usize {
        if value < SUB {
            return value as usize;
        }
        let shift = value.ilog2() - SUB_BITS;
        let group = (shift + 1) as usize;
        (group * SUB as usize + ((value >> shift) - SUB) as usize).min(BUCKETS - 1)
    }

    /// Largest value of a bucket.
    fn top(bucket: usize) -> u64 {
        let (group, sub) = (bucket as u64 / SUB, bucket as u64 % SUB);
        if group == 0 { sub } else { ((SUB + sub + 1) << (group - 1)) - 1 }
    }

    /// Adds one value.
    pub fn record(&mut self, value: u64) {
        self.buckets[Self::bucket(value)] += 1;
        self.count += 1;
        self.sum += u128::from(value);
        self.min = self.min.min(value);
        self.max = self.max.max(value);
    }

    /// Adds all values of another histogram.
    pub fn merge(&mut self, other: &Histogram) {
        for (a, b) in self.buckets.iter_mut().zip(&other.buckets) {
            *a += b;
        }
        self.count += other.count;
        self.sum += other.sum;
        self.min = self.min.min(other.min);
        self.max = self.max.max(other.max);
    }

    /// Forgets everything.
    pub fn clear(&mut self) {
        self.buckets.fill(0);
        (self.count, self.sum, self.min, self.max) = (0, 0, u64::MAX, 0);
    }

    /// Values recorded.
    pub fn count(&self) -> u64 {
        self.count
    }

    /// Smallest value that at least the share `q` (0 to 1) of all values does not exceed; 0 when empty.
    pub fn quantile(&self, q: f64) -> u64 {
        let rank = ((q.clamp(0.0, 1.0) * self.count as f64).ceil() as u64).max(1);
        let mut seen = 0;
        for (i, n) in self.buckets.iter().enumerate() {
            seen += n;
            if seen >= rank && i + 1 < BUCKETS {
                return Self::top(i).min(self.max).max(self.min);
            }
        }
        self.max
    }

    /// The usual figures.
    pub fn stats(&self) -> Stats {
        if self.count == 0 {
            return Stats::default();
        }
        Stats {
            count: self.count,
            min: self.min,
            max: self.max,
            mean: self.sum as f64 / self.count as f64,
            p50: self.quantile(0.50),
            p95: self.quantile(0.95),
            p99: self.quantile(0.99),
        }
    }

    /// Non-empty buckets as `(largest value, count)`, smallest first: for plots and export.
    pub fn nonzero(&self) -> impl Iterator<Item = (u64, u64)> + '_ {
        self.buckets.iter().enumerate().filter(|(_, n)| **n > 0).map(|(i, n)| (Self::top(i), *n))
    }
}

#[cfg(test)]
mod tests {
    use rand::{Rng, SeedableRng};
    use rand_chacha::ChaCha8Rng;

    use super::*;

    #[test]
    fn quantiles_are_within_one_percent_of_the_sorted_values() {
        let mut rng = ChaCha8Rng::seed_from_u64(1);
        for _ in 0..20 {
            let mut h = Histogram::new();
            let scale = rng.random_range(1.0..35.0f64);
            let mut values: Vec<u64> =
                (0..5000).map(|_| rng.random_range(0.0..scale).exp2() as u64 + rng.random_range(0..3)).collect();
            values.iter().for_each(|v| h.record(*v));
            values.sort_unstable();
            let s = h.stats();
            assert_eq!((s.count, s.min, s.max), (5000, values[0], values[4999]));
            let mean = values.iter().map(|v| *v as f64).sum::<f64>() / 5000.0;
            assert!((s.mean - mean).abs() <= 1e-9 * mean);
            for (q, got) in [(0.5, s.p50), (0.95, s.p95), (0.99, s.p99)] {
                let exact = values[(q * 5000.0f64).ceil() as usize - 1];
                assert!(got >= exact && got as f64 <= exact as f64 * 1.01, "p{q}: {got} for {exact}");
            }
        }
    }

    #[test]
    fn every_value_has_a_bucket_and_the_buckets_have_no_gaps() {
        for i in 0..BUCKETS - 1 {
            assert_eq!(Histogram::bucket(Histogram::top(i)), i);
            assert_eq!(Histogram::bucket(Histogram::top(i) + 1), i + 1);
        }
        let mut h = Histogram::new();
        h.record(u64::MAX);
        h.record(0);
        assert_eq!((h.stats().min, h.stats().max, h.quantile(1.0)), (0, u64::MAX, u64::MAX));
        assert_eq!(Histogram::new().stats(), Stats::default());
    }

    #[test]
    fn merging_is_recording_all() {
        let (mut a, mut b, mut all) = (Histogram::new(), Histogram::new(), Histogram::new());
        for v in 0..1000 {
            if v % 3 == 0 {
                a.record(v * v)
            } else {
                b.record(v * v)
            }
            all.record(v * v);
        }
        a.merge(&b);
        assert_eq!(a.stats(), all.stats());
        assert!(a.nonzero().map(|(_, n)| n).sum::<u64>() == 1000);
        a.clear();
        assert_eq!(a.stats(), Stats::default());
    }
}
