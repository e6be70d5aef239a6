//! One measured series and how it is written.

use serde_json::{Value, json};

/// One measured series in milliseconds.
pub struct Series {
    name: String,
    /// Sorted.
    ms: Vec<f64>,
    floor: Option<f64>,
}

impl Series {
    /// The series of that name; `floor` is the least it could be.
    pub fn new(name: impl Into<String>, mut ms: Vec<f64>, floor: Option<f64>) -> Self {
        ms.sort_by(f64::total_cmp);
        Self { name: name.into(), ms, floor }
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The value below which that part of all lies.
    pub fn quantile(&self, q: f64) -> f64 {
        let last = self.ms.len().saturating_sub(1);
        self.ms.get((last as f64 * q).round() as usize).copied().unwrap_or(f64::NAN)
    }

    /// The middle one.
    pub fn median(&self) -> f64 {
        self.quantile(0.5)
    }

    fn mean(&self) -> f64 {
        self.ms.iter().sum::<f64>() / self.ms.len() as f64
    }

    fn deviation(&self) -> f64 {
        let mean = self.mean();
        (self.ms.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / self.ms.len() as f64).sqrt()
    }

    /// Every figure of it.
    pub fn json(&self) -> Value {
        json!({
            "mean": self.mean(), "median": self.median(), "min": self.quantile(0.0), "max": self.quantile(1.0),
            "p95": self.quantile(0.95), "p99": self.quantile(0.99), "deviation": self.deviation(),
            "floor": self.floor, "ratio": self.floor.map(|f| self.median() / f),
        })
    }

    /// What stands above the lines.
    pub fn head() -> String {
        format!(
            "{:38} {:>8} {:>8} {:>8} {:>8} {:>8} {:>8} {:>8} {:>8} {:>6}",
            "ms", "mean", "median", "min", "max", "p95", "p99", "std dev", "floor", "ratio"
        )
    }

    /// One line of the table.
    pub fn line(&self) -> String {
        let floor = self.floor.map_or(String::new(), |f| format!("{f:8.3} {:6.2}", self.median() / f));
        format!(
            "{:38} {:8.3} {:8.3} {:8.3} {:8.3} {:8.3} {:8.3} {:8.3} {floor}",
            self.name,
            self.mean(),
            self.median(),
            self.quantile(0.0),
            self.quantile(1.0),
            self.quantile(0.95),
            self.quantile(0.99),
            self.deviation()
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_of_the_sorted_series() {
        let s = Series::new("x", vec![3.0, 1.0, 2.0], Some(1.0));
        assert_eq!((s.quantile(0.0), s.median(), s.quantile(1.0)), (1.0, 2.0, 3.0));
        assert_eq!(s.json()["ratio"], 2.0);
        assert!(Series::new("none", Vec::new(), None).median().is_nan());
    }
}
