//! The motion a synthetic policy is built to make: each pair of joints circles a centre, the gripper follows the first.
//!
//! With s the normalised state, c the centre, s̃ = s − c and G the generator of the circles, action i of a chunk is
//!
//! a_i = c + exp(i·G) · (s̃ + i·(ε·s̃ + N(s̃)))
//!
//! where ε lets small circles grow and N, cubic in spirit, holds large ones back. Action 0 is the state, and a chunk
//! begun where an older one is executed runs on as the older one would have: plans agree where they overlap.

use rand::Rng;
use rand::seq::IndexedRandom;

/// Joints of the synthetic robot: three pairs and a gripper.
pub(super) const JOINTS: usize = 7;
/// Joints in pairs.
pub(super) const PAIRED: usize = 6;
/// Features that a chunk is linear in: the state, a one, and N.
pub(super) const FEATURES: usize = JOINTS + 1 + PAIRED;
/// Index of the feature that is always one.
pub(super) const ONE: usize = JOINTS;

/// Growth of a small circle per action: it doubles in about two seconds at 30 Hz.
const GROWTH: f64 = 0.012;
/// Share of its way that the gripper goes per action.
const GRIPPER_RATE: f64 = 0.03;
/// How far the gripper follows the first joint.
const GRIPPER_FOLLOWS: f64 = 0.5;
/// Sharpness of [`brake`].
pub(super) const BRAKE_SHARPNESS: f64 = 1.5;
/// Directions of a pair's plane in which N looks, as (first, second): enough that it is nearly round.
pub(super) const DIRECTIONS: [(f64, f64); 4] = [
    (1.0, 0.0),
    (0.0, 1.0),
    (std::f64::consts::FRAC_1_SQRT_2, std::f64::consts::FRAC_1_SQRT_2),
    (std::f64::consts::FRAC_1_SQRT_2, -std::f64::consts::FRAC_1_SQRT_2),
];

/// One seed's motion, in normalised units.
pub(super) struct Orbit {
    /// Radius of each joint's swing.
    pub(super) radius: [f64; JOINTS],
    /// Centre of each joint's swing.
    pub(super) centre: [f64; JOINTS],
    /// Radians per action of each pair.
    turn: [f64; PAIRED / 2],
    /// Weight of N's every term.
    pub(super) brake: f64,
}

impl Orbit {
    /// Draws one: swings of 0.22 to 0.55 rad, 6 to 10 s a turn at 30 Hz, either way round.
    pub(super) fn draw(rng: &mut impl Rng, std: &[f64; JOINTS]) -> Self {
        const SWING_RAD: [f64; PAIRED] = [0.50, 0.24, 0.24, 0.30, 0.40, 0.50];
        const CENTRE_RAD: f64 = 0.04;
        let mut radius = [1.0; JOINTS];
        let mut centre = [0.0; JOINTS];
        for k in 0..PAIRED {
            radius[k] = SWING_RAD[k] * rng.random_range(0.9..1.1) / std[k];
            centre[k] = [-1.0, 1.0].choose(rng).unwrap_or(&1.0) * rng.random_range(0.5..1.0) * CENTRE_RAD / std[k];
        }
        let turn = std::array::from_fn(|_| {
            let seconds: f64 = rng.random_range(6.0..10.0);
            [-1.0, 1.0].choose(rng).unwrap_or(&1.0) * std::f64::consts::TAU / (30.0 * seconds)
        });
        // On the unit circle growth and brake cancel on average.
        let angles = (0..360).map(|d| f64::from(d).to_radians());
        let on_circle: f64 =
            angles.map(|a| DIRECTIONS.iter().map(|(x, y)| brake(x * a.cos() + y * a.sin())).sum::<f64>()).sum::<f64>()
                / 360.0;
        Self { radius, centre, turn, brake: GROWTH / on_circle }
    }

    /// Coefficients of action `i` on the features: `[joint][feature]`.
    pub(super) fn action(&self, i: usize) -> [[f64; FEATURES]; JOINTS] {
        let flow = power(&self.one_action(), i);
        let i = i as f64;
        std::array::from_fn(|joint| {
            let mut row = [0.0; FEATURES];
            row[ONE] = self.centre[joint];
            for from in 0..JOINTS {
                let grown = if from < PAIRED { 1.0 + i * GROWTH } else { 1.0 };
                row[from] = flow[joint][from] * grown;
                row[ONE] -= row[from] * self.centre[from];
                if from < PAIRED {
                    row[ONE + 1 + from] = flow[joint][from] * i;
                }
            }
            row
        })
    }

    /// exp(G), by its series.
    fn one_action(&self) -> Matrix {
        let mut g = [[0.0; JOINTS]; JOINTS];
        for (pair, turn) in self.turn.iter().enumerate() {
            let (a, b) = (2 * pair, 2 * pair + 1);
            g[a][b] = -turn * self.radius[a] / self.radius[b];
            g[b][a] = turn * self.radius[b] / self.radius[a];
        }
        g[PAIRED][PAIRED] = -GRIPPER_RATE;
        g[PAIRED][0] = GRIPPER_RATE * GRIPPER_FOLLOWS / self.radius[0];
        let (mut sum, mut term) = (identity(), identity());
        for n in 1..12 {
            term = product(&term, &g);
            term.iter_mut().flatten().for_each(|v| *v /= f64::from(n));
            sum.iter_mut().flatten().zip(term.iter().flatten()).for_each(|(s, t)| *s += t);
        }
        sum
    }
}

/// gelu(κx) + gelu(−κx): even, flat at zero, rising like κ|x|. What two units of the MLP make.
pub(super) fn brake(x: f64) -> f64 {
    let x = BRAKE_SHARPNESS * x;
    x * ((2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x.powi(3))).tanh()
}

type Matrix = [[f64; JOINTS]; JOINTS];

fn identity() -> Matrix {
    std::array::from_fn(|r| std::array::from_fn(|c| f64::from(u8::from(r == c))))
}

fn product(a: &Matrix, b: &Matrix) -> Matrix {
    std::array::from_fn(|r| std::array::from_fn(|c| (0..JOINTS).map(|k| a[r][k] * b[k][c]).sum()))
}

fn power(a: &Matrix, n: usize) -> Matrix {
    (0..n).fold(identity(), |m, _| product(&m, a))
}

/// Ridge least squares: for every column t of `targets` (one value per row of `basis`) the coefficients x that
/// minimise Σ weight·(basis·x − t)² + ridge·|x|². Returns `[target][basis column]`.
pub(super) fn fit(basis: &[Vec<f64>], weights: &[f64], targets: &[Vec<f64>], ridge: f64) -> Vec<Vec<f64>> {
    let n = basis.first().map_or(0, Vec::len);
    let mut normal = vec![vec![0.0; n]; n];
    for (row, w) in basis.iter().zip(weights) {
        for r in 0..n {
            for c in 0..n {
                normal[r][c] += w * row[r] * row[c];
            }
        }
    }
    (0..n).for_each(|k| normal[k][k] += ridge);
    let right_hand_side = |target: &Vec<f64>| {
        (0..n).map(|k| basis.iter().zip(weights).zip(target).map(|((row, w), t)| w * row[k] * t).sum()).collect()
    };
    let mut columns: Vec<Vec<f64>> = targets.iter().map(right_hand_side).collect();
    // The matrix is symmetric and positive definite: elimination needs no pivoting.
    for k in 0..n {
        for r in k + 1..n {
            let factor = normal[r][k] / normal[k][k];
            let (above, below) = normal.split_at_mut(r);
            below[0].iter_mut().zip(&above[k]).skip(k).for_each(|(v, a)| *v -= factor * a);
            columns.iter_mut().for_each(|b| b[r] -= factor * b[k]);
        }
    }
    for b in &mut columns {
        for k in (0..n).rev() {
            let known: f64 = (k + 1..n).map(|c| normal[k][c] * b[c]).sum();
            b[k] = (b[k] - known) / normal[k][k];
        }
    }
    columns
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_fit_recovers_what_the_basis_can_say() {
        let basis: Vec<Vec<f64>> =
            (0..30).map(|i| (0..4).map(|k| (f64::from(i) * 0.1 * f64::from(k)).cos()).collect()).collect();
        let target: Vec<f64> = basis.iter().map(|r| 2.0 * r[0] - 0.5 * r[3]).collect();
        let x = &fit(&basis, &[1.0; 30], &[target], 1e-12)[0];
        for (found, expected) in x.iter().zip([2.0, 0.0, 0.0, -0.5]) {
            assert!((found - expected).abs() < 1e-6, "{x:?}");
        }
    }

    #[test]
    fn action_zero_is_the_state() {
        let orbit = Orbit::draw(&mut rand::rng(), &[0.35; JOINTS]);
        for (joint, row) in orbit.action(0).iter().enumerate() {
            for (column, v) in row.iter().enumerate() {
                assert!((v - f64::from(u8::from(column == joint))).abs() < 1e-12, "{joint} {column}");
            }
        }
    }
}
