//! Fixed-capacity vectors with one value per joint: no allocation on the control thread.

use std::ops::{Deref, DerefMut};

/// Most joints one controller drives.
pub const MAX_JOINTS: usize = 32;

/// One value per joint, in the controller's joint order; units are those of the joint (rad or m, and per second).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct JointVector {
    len: usize,
    values: [f64; MAX_JOINTS],
}

impl JointVector {
    /// No joints.
    pub const NONE: Self = Self { len: 0, values: [0.0; MAX_JOINTS] };

    /// `len` joints (at most [`MAX_JOINTS`]), all with `value`.
    pub fn filled(len: usize, value: f64) -> Self {
        Self { len: len.min(MAX_JOINTS), values: [value; MAX_JOINTS] }
    }

    /// `len` joints (at most [`MAX_JOINTS`]), all zero.
    pub fn zeros(len: usize) -> Self {
        Self::filled(len, 0.0)
    }

    /// The values given, or `None` if there are more than [`MAX_JOINTS`].
    pub fn from_slice(values: &[f64]) -> Option<Self> {
        let mut v = Self::zeros(values.len());
        (values.len() <= MAX_JOINTS).then(|| {
            v.copy_from_slice(values);
            v
        })
    }
}

impl Default for JointVector {
    fn default() -> Self {
        Self::zeros(0)
    }
}

impl Deref for JointVector {
    type Target = [f64];
    fn deref(&self) -> &[f64] {
        &self.values[..self.len]
    }
}

impl DerefMut for JointVector {
    fn deref_mut(&mut self) -> &mut [f64] {
        &mut self.values[..self.len]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn more_joints_than_fit_are_refused() {
        assert_eq!(JointVector::from_slice(&[1.0, 2.0]).as_deref(), Some(&[1.0, 2.0][..]));
        assert!(JointVector::from_slice(&[0.0; MAX_JOINTS]).is_some());
        assert!(JointVector::from_slice(&[0.0; MAX_JOINTS + 1]).is_none());
    }
}
