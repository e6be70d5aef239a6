//! The model's action chunk to robot units and back: absolute, or relative to the state at the chunk's start.

use super::norm::Normalizer;
use super::stats::Processors;
use super::{ModelError, Origin, PolicyConfig};
use crate::choice::choice;

choice! {
    /// Whether the policy's actions are positions or differences from the state.
    #[derive(Default)]
    ActionMode {
        /// As the checkpoint says. openpi's do not say: they need one of the others.
        #[default]
        Auto = "auto",
        /// All positions.
        Absolute = "absolute",
        /// Differences from the state at the chunk's start, the same state for every action of the chunk.
        Delta = "delta",
    }
}

/// LeRobot's default of `relative_exclude_joints`.
const EXCLUDED: &str = "gripper";

/// Which action dimensions are relative: by the mode, else by what the checkpoint says, and never those of `absolute`.
pub(super) fn relative_mask(
    config: &PolicyConfig,
    processors: &Processors,
    origin: Origin,
    mode: ActionMode,
    absolute: &[usize],
    len: usize,
) -> Result<Vec<bool>, ModelError> {
    let configured = processors.relative.as_ref().map_or(config.use_relative_actions, |r| r.enabled);
    let mut relative = match (mode, origin) {
        (ActionMode::Absolute, _) => vec![false; len],
        (ActionMode::Auto, Origin::LeRobot) if !configured => vec![false; len],
        (ActionMode::Auto, Origin::OpenPi) => {
            return Err(ModelError::Setting {
                setting: "action_mode",
                reason: "an openpi checkpoint does not say whether its actions are positions or differences from the \
                         state; give 'absolute' or 'delta', as in its training configuration"
                    .into(),
            });
        }
        (ActionMode::Delta, Origin::OpenPi) => {
            if absolute.is_empty() {
                tracing::warn!(
                    "action_mode 'delta' without action_absolute_joints: every joint is relative. openpi's training \
                     configurations leave grippers absolute most often: name them if this one did"
                );
            }
            vec![true; len]
        }
        (ActionMode::Auto | ActionMode::Delta, Origin::LeRobot) => not_excluded(config, processors, absolute, len),
    };
    for i in absolute {
        // An index past the actions is refused where joints are bound to them.
        if let Some(r) = relative.get_mut(*i) {
            *r = false;
        }
    }
    Ok(relative)
}

/// LeRobot's mask: all but those whose names hold an excluded word.
fn not_excluded(config: &PolicyConfig, processors: &Processors, absolute: &[usize], len: usize) -> Vec<bool> {
    let step = processors.relative.as_ref();
    let names = action_names(config, processors);
    let excluded = step.map(|r| &r.exclude_joints).or(config.relative_exclude_joints.as_ref());
    let excluded = excluded.cloned().unwrap_or_else(|| vec![EXCLUDED.into()]);
    let excluded: Vec<String> = excluded.into_iter().filter(|e| !e.is_empty()).map(|e| e.to_lowercase()).collect();
    let Some(names) = names else {
        if !excluded.is_empty() && absolute.is_empty() {
            tracing::warn!(
                "relative actions: {excluded:?} should stay absolute, but the checkpoint has no 'action_feature_names': \
                 every joint is relative, as in LeRobot; if that is wrong, name them in action_absolute_joints"
            );
        }
        return vec![true; len];
    };
    let relative = |i| {
        names.get(i).is_none_or(|n: &String| {
            let n = n.to_lowercase();
            !excluded.iter().any(|e| n.contains(e.as_str()))
        })
    };
    (0..len).map(relative).collect()
}

/// Names of the action dimensions, where the checkpoint has them.
pub(super) fn action_names<'a>(config: &'a PolicyConfig, processors: &'a Processors) -> Option<&'a [String]> {
    let step = processors.relative.as_ref().and_then(|r| r.action_names.as_deref());
    step.or(config.action_feature_names.as_deref())
}

/// The map between a chunk of the model and a chunk of the robot.
#[derive(Debug, Clone, PartialEq)]
pub struct ActionTransform {
    norm: Normalizer,
    relative: Vec<bool>,
    padded: usize,
}

impl ActionTransform {
    /// `relative` has one entry for each value of `norm`; `padded` is the model's action dimension; relative
    /// dimensions take the state value of the same index, so the state must be long enough.
    pub fn new(norm: Normalizer, relative: Vec<bool>, padded: usize, state_len: usize) -> Result<Self, ModelError> {
        if relative.len() != norm.len() {
            return Err(ModelError::Length { what: "action mask", expected: norm.len(), found: relative.len() });
        }
        if let Some(i) = relative.iter().rposition(|r| *r).filter(|i| *i >= state_len) {
            let reason = format!("action {i} is relative, but the state has only {state_len} values");
            return Err(ModelError::Setting { setting: "action_mode", reason });
        }
        if norm.len() > padded {
            return Err(ModelError::Length { what: "actions", expected: padded, found: norm.len() });
        }
        Ok(Self { norm, relative, padded })
    }

    /// Real action values.
    pub fn len(&self) -> usize {
        self.norm.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.norm.is_empty()
    }

    /// Which of them are relative to the state.
    pub fn relative(&self) -> &[bool] {
        &self.relative
    }

    /// `[n, padded]` of the model to `[n, len]` of the robot: un-normalise, then add the state where relative.
    pub fn to_robot(&self, actions: &[f32], state: &[f64], out: &mut [f64]) -> Result<(), ModelError> {
        let rows = self.rows(actions.len(), self.padded, "model actions", state)?;
        self.check("robot actions", rows * self.len(), out.len())?;
        for (action, out) in actions.chunks_exact(self.padded).zip(out.chunks_exact_mut(self.len())) {
            for (i, (y, x)) in action.iter().zip(out).enumerate() {
                *x = self.norm.unnormalize(i, f64::from(*y)) + self.offset(i, state);
            }
        }
        Ok(())
    }

    /// `[n, len]` of the robot to `[n, padded]` of the model, padded with zeros: subtract the state where relative,
    /// then normalise. With another state than the one of `to_robot` this re-anchors a chunk.
    pub fn to_model(&self, actions: &[f64], state: &[f64], out: &mut [f32]) -> Result<(), ModelError> {
        let rows = self.rows(actions.len(), self.len(), "robot actions", state)?;
        self.check("model actions", rows * self.padded, out.len())?;
        for (action, out) in actions.chunks_exact(self.len()).zip(out.chunks_exact_mut(self.padded)) {
            out.fill(0.0);
            for (i, (x, y)) in action.iter().zip(out).enumerate() {
                *y = self.norm.normalize(i, x - self.offset(i, state)) as f32;
            }
        }
        Ok(())
    }

    fn offset(&self, i: usize, state: &[f64]) -> f64 {
        if self.relative[i] { state[i] } else { 0.0 }
    }

    /// Whole rows of `width` in `len`; also that the state reaches every relative dimension.
    fn rows(&self, len: usize, width: usize, what: &'static str, state: &[f64]) -> Result<usize, ModelError> {
        let needed = self.relative.iter().rposition(|r| *r).map_or(0, |i| i + 1);
        if state.len() < needed {
            return Err(ModelError::Length { what: "state", expected: needed, found: state.len() });
        }
        if width == 0 || !len.is_multiple_of(width) {
            return Err(ModelError::Length { what, expected: len.next_multiple_of(width.max(1)), found: len });
        }
        Ok(len / width)
    }

    fn check(&self, what: &'static str, expected: usize, found: usize) -> Result<(), ModelError> {
        if expected == found { Ok(()) } else { Err(ModelError::Length { what, expected, found }) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::stats::RelativeStep;

    fn mask(config: &PolicyConfig, processors: &Processors, mode: ActionMode) -> Result<Vec<bool>, ModelError> {
        relative_mask(config, processors, Origin::LeRobot, mode, &[], 3)
    }

    #[test]
    fn the_mask_follows_what_the_checkpoint_says() {
        let names: Vec<String> = ["shoulder.pos", "Left_Gripper.pos", "wrist.pos"].map(Into::into).into();
        let none = Processors::default();
        let mut c = PolicyConfig { action_feature_names: Some(names.clone()), ..PolicyConfig::default() };
        assert_eq!(mask(&c, &none, ActionMode::Auto).unwrap(), [false, false, false]);
        assert_eq!(mask(&c, &none, ActionMode::Delta).unwrap(), [true, false, true], "the default exclusion");
        c.use_relative_actions = true;
        assert_eq!(mask(&c, &none, ActionMode::Auto).unwrap(), [true, false, true]);
        assert_eq!(mask(&c, &none, ActionMode::Absolute).unwrap(), [false, false, false]);
        c.relative_exclude_joints = Some(vec!["wrist".into(), String::new()]);
        assert_eq!(mask(&c, &none, ActionMode::Auto).unwrap(), [true, true, false]);
        c.action_feature_names = None;
        assert_eq!(mask(&c, &none, ActionMode::Auto).unwrap(), [true, true, true], "LeRobot's rule without names");
        let step = RelativeStep { enabled: true, exclude_joints: vec!["gripper".into()], action_names: Some(names) };
        let processors = Processors { relative: Some(step), ..Processors::default() };
        assert_eq!(mask(&c, &processors, ActionMode::Auto).unwrap(), [true, false, true], "the processor decides");
    }

    #[test]
    fn openpi_must_be_told() {
        let ask = |mode, absolute: &[usize]| {
            let (c, p) = (PolicyConfig::default(), Processors::default());
            relative_mask(&c, &p, Origin::OpenPi, mode, absolute, 2).map_err(|e| e.to_string())
        };
        assert!(ask(ActionMode::Auto, &[]).unwrap_err().contains("action_mode"));
        assert!(ask(ActionMode::Auto, &[1]).unwrap_err().contains("action_mode"), "which are absolute is not whether");
        assert_eq!(ask(ActionMode::Absolute, &[]).unwrap(), [false, false]);
        assert_eq!(ask(ActionMode::Absolute, &[1]).unwrap(), [false, false]);
        assert_eq!(ask(ActionMode::Delta, &[]).unwrap(), [true, true]);
        assert_eq!(ask(ActionMode::Delta, &[1, 7]).unwrap(), [true, false]);
    }

    #[test]
    fn naming_a_joint_absolute_makes_no_other_relative() {
        let names = ["shoulder.pos", "gripper.pos", "wrist.pos"].map(Into::into).into();
        let mut c = PolicyConfig { action_feature_names: Some(names), ..PolicyConfig::default() };
        let ask = |c: &PolicyConfig, mode, absolute: &[usize]| {
            relative_mask(c, &Processors::default(), Origin::LeRobot, mode, absolute, 3).unwrap()
        };
        assert_eq!(ask(&c, ActionMode::Auto, &[1]), [false, false, false], "the policy is absolute");
        assert_eq!(ask(&c, ActionMode::Delta, &[2]), [true, false, false], "the checkpoint's exclusion holds, too");
        c.use_relative_actions = true;
        assert_eq!(ask(&c, ActionMode::Auto, &[2]), [true, false, false]);
    }

    #[test]
    fn every_action_adds_the_same_state() {
        let t = ActionTransform::new(Normalizer::identity(2), vec![true, false], 4, 2).unwrap();
        let mut out = [0.0; 4];
        t.to_robot(&[1.0, 2.0, 9.0, 9.0, 3.0, 4.0, 9.0, 9.0], &[10.0, 20.0], &mut out).unwrap();
        assert_eq!(out, [11.0, 2.0, 13.0, 4.0]);
        let mut back = [7.0; 8];
        t.to_model(&out, &[11.0, 20.0], &mut back).unwrap();
        assert_eq!(back, [0.0, 2.0, 0.0, 0.0, 2.0, 4.0, 0.0, 0.0], "re-anchored at another state");
        assert!(t.to_robot(&[0.0; 7], &[1.0], &mut out).unwrap_err().to_string().contains("model actions"));
        assert!(t.to_robot(&[0.0; 8], &[], &mut out).unwrap_err().to_string().contains("state"));
        assert!(t.to_robot(&[0.0; 8], &[1.0], &mut out[..3]).unwrap_err().to_string().contains("robot actions"));
        assert!(ActionTransform::new(Normalizer::identity(2), vec![false, true], 4, 1).is_err());
    }
}
