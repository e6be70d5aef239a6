//! Robot joints to policy vectors and back: order, scale and offset per joint.

use super::PipelineError;

/// How one joint of the robot appears in the policy's state and action vectors.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct JointBinding {
    /// Position in the policy's vectors.
    pub index: usize,
    /// Robot units = policy units · `scale` + `offset`.
    pub scale: f64,
    /// Robot units at policy zero.
    pub offset: f64,
}

/// The joints of the robot in their order.
#[derive(Debug, Clone, PartialEq)]
pub struct JointMap {
    bindings: Vec<JointBinding>,
}

impl JointMap {
    /// Checks that the joints cover the policy's `len` values, each once.
    pub fn new(names: &[String], bindings: Vec<JointBinding>, len: usize, what: &str) -> Result<Self, PipelineError> {
        if bindings.len() != len {
            return Err(PipelineError::Config(format!(
                "joint_names has {} joints ({}), but the policy's {what} has {len} values: list one joint for each, in its order",
                bindings.len(),
                names.join(", "),
            )));
        }
        for (i, (name, b)) in names.iter().zip(&bindings).enumerate() {
            if b.index >= len {
                return Err(PipelineError::Config(format!(
                    "joints.{name}.index is {}, but the policy's {what} has {len} values: use 0 to {}",
                    b.index,
                    len - 1
                )));
            }
            if let Some(j) = bindings[..i].iter().position(|o| o.index == b.index) {
                return Err(PipelineError::Config(format!(
                    "joints.{name}.index and joints.{}.index are both {}: give each joint its own",
                    names[j], b.index
                )));
            }
            if !(b.scale.is_finite() && b.scale != 0.0 && b.offset.is_finite()) {
                return Err(PipelineError::Config(format!(
                    "joints.{name}.scale {} and offset {} must be finite, and the scale not 0",
                    b.scale, b.offset
                )));
            }
        }
        Ok(Self { bindings })
    }

    /// Number of joints.
    pub fn len(&self) -> usize {
        self.bindings.len()
    }

    /// Whether there are no joints.
    pub fn is_empty(&self) -> bool {
        self.bindings.is_empty()
    }

    /// Robot order and units to the policy's.
    pub fn to_policy(&self, robot: &[f64], policy: &mut [f64]) {
        for (b, &x) in self.bindings.iter().zip(robot) {
            policy[b.index] = (x - b.offset) / b.scale;
        }
    }

    /// One row of the policy's order and units to the robot's.
    pub fn to_robot(&self, policy: &[f64], robot: &mut [f64]) {
        for (b, x) in self.bindings.iter().zip(robot) {
            *x = policy[b.index] * b.scale + b.offset;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn binding(index: usize, scale: f64) -> JointBinding {
        JointBinding { index, scale, offset: 0.5 }
    }

    fn names() -> Vec<String> {
        ["a", "b"].map(String::from).to_vec()
    }

    #[test]
    fn mapping_there_and_back_is_the_identity() {
        let map = JointMap::new(&names(), vec![binding(1, -2.0), binding(0, 0.25)], 2, "state").unwrap();
        let (mut policy, mut robot) = ([0.0; 2], [0.0; 2]);
        map.to_policy(&[1.0, 3.0], &mut policy);
        assert_eq!(policy, [10.0, -0.25]);
        map.to_robot(&policy, &mut robot);
        assert_eq!(robot, [1.0, 3.0]);
    }

    #[test]
    fn a_map_that_does_not_cover_the_policy_is_refused_by_name() {
        for (bindings, len, says) in [
            (vec![binding(0, 1.0), binding(1, 1.0)], 3, "joint_names has 2 joints (a, b)"),
            (vec![binding(0, 1.0), binding(2, 1.0)], 2, "joints.b.index is 2"),
            (vec![binding(0, 1.0), binding(0, 1.0)], 2, "joints.b.index and joints.a.index are both 0"),
            (vec![binding(0, 1.0), binding(1, 0.0)], 2, "joints.b.scale 0"),
        ] {
            let e = JointMap::new(&names(), bindings, len, "state").unwrap_err().to_string();
            assert!(e.contains(says), "{e}");
        }
    }
}
