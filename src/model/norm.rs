//! Robot units to the model's and back, with the exact rules of the stack that trained the checkpoint.

use super::stats::FeatureStats;
use super::{ModelError, Origin};

/// What maps a value to the model's range.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NormMode {
    /// Taken as it is.
    Identity,
    /// Mean to 0, standard deviation to 1.
    MeanStd,
    /// Least to -1, greatest to 1.
    MinMax,
    /// 1st percentile to -1, 99th to 1.
    Quantiles,
    /// 10th percentile to -1, 90th to 1.
    Quantile10,
}

impl NormMode {
    /// The mode of LeRobot's name.
    pub fn from_name(name: &str) -> Option<Self> {
        match name {
            "IDENTITY" => Some(Self::Identity),
            "MEAN_STD" => Some(Self::MeanStd),
            "MIN_MAX" => Some(Self::MinMax),
            "QUANTILES" => Some(Self::Quantiles),
            "QUANTILE10" => Some(Self::Quantile10),
            _ => None,
        }
    }

    /// Names of the two statistics it needs.
    pub(super) fn statistics(self) -> Option<[&'static str; 2]> {
        match self {
            Self::Identity => None,
            Self::MeanStd => Some(["mean", "std"]),
            Self::MinMax => Some(["min", "max"]),
            Self::Quantiles => Some(["q01", "q99"]),
            Self::Quantile10 => Some(["q10", "q90"]),
        }
    }
}

/// openpi's guard against a division by zero, added always.
const OPENPI_EPS: f64 = 1e-6;
/// LeRobot's, unless its processor says otherwise.
pub(super) const LEROBOT_EPS: f64 = 1e-8;

/// The map of one feature, ready to apply: `y = (x - low) / forward` and `x = y · inverse + low`, or, for a range,
/// `y = 2 (x - low) / forward - 1` and `x = (y + 1) / 2 · inverse + low`. No clipping, as in both references.
#[derive(Debug, Clone, PartialEq)]
pub struct Normalizer {
    mode: NormMode,
    low: Vec<f64>,
    forward: Vec<f64>,
    inverse: Vec<f64>,
}

impl Normalizer {
    /// The map of `len` values. Statistics that are longer are cut; shorter ones, missing ones, non-finite ones and
    /// ranges that run backwards are refused. `eps` is LeRobot's.
    pub fn new(stats: &FeatureStats, mode: NormMode, len: usize, origin: Origin, eps: f64) -> Result<Self, ModelError> {
        let Some([first, second]) = mode.statistics() else { return Ok(Self::identity(len)) };
        let (low, high) = (stats.finite(first, len)?, stats.finite(second, len)?);
        let span: Vec<f64> = match mode {
            NormMode::MeanStd => high.to_vec(),
            _ => low.iter().zip(high).map(|(l, h)| h - l).collect(),
        };
        if let Some(i) = span.iter().position(|s| *s < 0.0) {
            let reason = if mode == NormMode::MeanStd {
                format!("{}.std[{i}] is {}: expected zero or more", stats.name, high[i])
            } else {
                format!("{0}.{second}[{i}] {1} is below {0}.{first}[{i}] {2}", stats.name, high[i], low[i])
            };
            return Err(ModelError::File { path: stats.source.clone(), reason });
        }
        let add = |s: &f64, e: f64| s + e;
        let unless_zero = |s: &f64| if *s == 0.0 { eps } else { *s };
        let (forward, inverse): (Vec<f64>, Vec<f64>) = match (origin, mode) {
            (Origin::OpenPi, _) => span.iter().map(|s| (add(s, OPENPI_EPS), add(s, OPENPI_EPS))).unzip(),
            // LeRobot adds its guard only on the way in.
            (Origin::LeRobot, NormMode::MeanStd) => span.iter().map(|s| (add(s, eps), *s)).unzip(),
            (Origin::LeRobot, _) => span.iter().map(|s| (unless_zero(s), unless_zero(s))).unzip(),
        };
        Ok(Self { mode, low: low.to_vec(), forward, inverse })
    }

    /// Leaves `len` values as they are.
    pub fn identity(len: usize) -> Self {
        Self { mode: NormMode::Identity, low: vec![0.0; len], forward: vec![1.0; len], inverse: vec![1.0; len] }
    }

    /// Values it maps.
    pub fn len(&self) -> usize {
        self.low.len()
    }

    /// Whether it maps nothing.
    pub fn is_empty(&self) -> bool {
        self.low.is_empty()
    }

    /// Robot units to the model's, for value `i` (below [`len`](Self::len)).
    pub fn normalize(&self, i: usize, x: f64) -> f64 {
        let y = (x - self.low[i]) / self.forward[i];
        match self.mode {
            NormMode::Identity | NormMode::MeanStd => y,
            NormMode::MinMax | NormMode::Quantiles | NormMode::Quantile10 => 2.0 * y - 1.0,
        }
    }

    /// The model's units to the robot's, for value `i` (below [`len`](Self::len)).
    pub fn unnormalize(&self, i: usize, y: f64) -> f64 {
        let y = match self.mode {
            NormMode::Identity | NormMode::MeanStd => y,
            NormMode::MinMax | NormMode::Quantiles | NormMode::Quantile10 => (y + 1.0) / 2.0,
        };
        y * self.inverse[i] + self.low[i]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stats(values: &[(&str, &[f64])]) -> FeatureStats {
        let values = values.iter().map(|(k, v)| (k.to_string(), v.to_vec())).collect();
        FeatureStats { source: "stats.json".into(), name: "state".into(), values }
    }

    /// Each row: origin, mode, the two statistics, a value, its image, and the image's way back.
    #[test]
    fn the_formulas_are_those_of_each_stack() {
        use NormMode::*;
        use Origin::*;
        for (origin, mode, a, b, x, y, back) in [
            (OpenPi, MeanStd, 2.0, 0.5, 3.0, 1.0 / (0.5 + 1e-6), 3.0),
            (LeRobot, MeanStd, 2.0, 0.5, 3.0, 1.0 / (0.5 + 1e-8), 1.0 / (0.5 + 1e-8) * 0.5 + 2.0),
            (OpenPi, Quantiles, -1.0, 3.0, 0.0, 1.0 / (4.0 + 1e-6) * 2.0 - 1.0, 0.0),
            (LeRobot, Quantiles, -1.0, 3.0, 0.0, -0.5, 0.0),
            (LeRobot, MinMax, -1.0, 3.0, 4.0, 1.5, 4.0),
            // A joint that never moved.
            (OpenPi, MeanStd, 2.0, 0.0, 2.5, 0.5 / 1e-6, 2.5),
            (LeRobot, MeanStd, 2.0, 0.0, 2.5, 0.5 / 1e-8, 2.0),
            (OpenPi, Quantiles, 2.0, 2.0, 2.0, -1.0, 2.0),
            (LeRobot, Quantiles, 2.0, 2.0, 2.0, -1.0, 2.0),
        ] {
            let [first, second] = mode.statistics().unwrap();
            let n = Normalizer::new(&stats(&[(first, &[a]), (second, &[b])]), mode, 1, origin, LEROBOT_EPS).unwrap();
            let found = n.normalize(0, x);
            assert!((found - y).abs() <= 1e-12 * y.abs().max(1.0), "{origin:?} {mode:?}: {found} for {y}");
            let found = n.unnormalize(0, found);
            assert!((found - back).abs() < 1e-9, "{origin:?} {mode:?}: back to {found} for {back}");
        }
    }

    #[test]
    fn statistics_that_cannot_be_used_are_refused_by_name() {
        for (values, len, says) in [
            (&[("mean", &[0.0, 1.0][..]), ("std", &[1.0, f64::INFINITY])][..], 2, "state.std[1] is inf"),
            (&[("mean", &[0.0, f64::NAN]), ("std", &[1.0, 1.0])], 2, "state.mean[1] is NaN"),
            (&[("mean", &[0.0]), ("std", &[-1.0])], 1, "state.std[0] is -1"),
            (&[("mean", &[0.0]), ("std", &[1.0])], 2, "state.mean: expected at least 2 values, found 1"),
            (&[("mean", &[0.0])], 1, "state.std is missing"),
        ] {
            let e = Normalizer::new(&stats(values), NormMode::MeanStd, len, Origin::OpenPi, 0.0).unwrap_err();
            assert!(e.to_string().contains(says) && e.to_string().contains("stats.json"), "{e}");
        }
        let backwards = stats(&[("q01", &[1.0]), ("q99", &[0.5])]);
        let e = Normalizer::new(&backwards, NormMode::Quantiles, 1, Origin::LeRobot, 1e-8).unwrap_err().to_string();
        assert!(e.contains("state.q99[0] 0.5 is below state.q01[0] 1"), "{e}");
        let longer = stats(&[("mean", &[0.0, f64::NAN]), ("std", &[1.0, 1.0])]);
        let cut = Normalizer::new(&longer, NormMode::MeanStd, 1, Origin::OpenPi, 0.0);
        assert_eq!(cut.map(|n| n.len()).unwrap(), 1, "what is cut off does not matter");
    }
}
