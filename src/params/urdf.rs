//! Joint limits from a URDF, for joints whose parameters do not give them. Positions and velocities only: a URDF knows
//! no acceleration.

use std::collections::BTreeMap;

use roxmltree::{Document, Node};

/// What a URDF says of one joint; what it leaves out, or says nonsense about, is `None`.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct JointDescription {
    /// Lower and upper position limit, the tighter of `limit` and `safety_controller`; rad or m.
    pub positions: Option<[f64; 2]>,
    /// Velocity limit; rad/s or m/s.
    pub max_velocity: Option<f64>,
}

/// What is used of a robot description, and what is wrong with it.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Description {
    /// Every moving joint by its name.
    pub joints: BTreeMap<String, JointDescription>,
    /// What could not be used, one sentence each.
    pub problems: Vec<String>,
}

impl Description {
    /// Reads a URDF. A text that is none has no joints and says why.
    pub fn read(xml: &str) -> Self {
        let mut found = Self::default();
        let document = match Document::parse(xml) {
            Ok(document) => document,
            Err(e) => {
                found.problems.push(format!("robot_description is no XML: {e}"));
                return found;
            }
        };
        let root = document.root_element();
        if !root.has_tag_name("robot") {
            let tag = root.tag_name().name();
            found.problems.push(format!("robot_description begins with <{tag}>, not with <robot>: is it a URDF?"));
            return found;
        }
        for joint in root.children().filter(|n| n.has_tag_name("joint")) {
            found.joint(joint);
        }
        found
    }

    fn joint(&mut self, joint: Node<'_, '_>) {
        let Some(name) = joint.attribute("name") else {
            self.problems.push("robot_description: a joint has no name".into());
            return;
        };
        let kind = joint.attribute("type").unwrap_or_default();
        if !["revolute", "prismatic", "continuous"].contains(&kind) {
            return;
        }
        let mut described = JointDescription::default();
        let mut number = |node: Node<'_, '_>, what: &str| -> Option<f64> {
            let text = node.attribute(what)?;
            let value = text.trim().parse().ok().filter(|x: &f64| x.is_finite());
            if value.is_none() {
                self.problems.push(format!("robot_description: joint '{name}': {what} \"{text}\" is no number"));
            }
            value
        };
        let child = |tag: &str| joint.children().find(|n| n.has_tag_name(tag));
        if let Some(limit) = child("limit") {
            described.max_velocity = number(limit, "velocity");
            // A continuous joint turns without end, whatever stands there; what is left out is zero elsewhere.
            if kind != "continuous" {
                let bound = |n: Option<f64>, given: bool| if given { n } else { Some(0.0) };
                let lower = number(limit, "lower");
                let upper = number(limit, "upper");
                let hard = bound(lower, limit.has_attribute("lower")).zip(bound(upper, limit.has_attribute("upper")));
                described.positions = hard.map(|(lower, upper)| {
                    let soft = child("safety_controller");
                    let soft_lower = soft.and_then(|s| number(s, "soft_lower_limit"));
                    let soft_upper = soft.and_then(|s| number(s, "soft_upper_limit"));
                    [soft_lower.map_or(lower, |s| s.max(lower)), soft_upper.map_or(upper, |s| s.min(upper))]
                });
            }
        }
        if let Some([lower, upper]) = described.positions.filter(|[lower, upper]| lower >= upper) {
            self.problems.push(format!("robot_description: joint '{name}': lower limit {lower} is not below {upper}"));
            described.positions = None;
        }
        if let Some(v) = described.max_velocity.filter(|v| *v <= 0.0) {
            self.problems.push(format!("robot_description: joint '{name}': velocity limit {v} is not above zero"));
            described.max_velocity = None;
        }
        self.joints.insert(name.into(), described);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ARM: &str = r#"<?xml version="1.0"?>
        <robot name="arm">
          <link name="base"/>
          <joint name="elbow" type="revolute"><limit lower="-1.5" upper="2" velocity="3" effort="1"/>
            <safety_controller soft_lower_limit="-1.25" soft_upper_limit="2.5" k_velocity="1"/></joint>
          <joint name="wheel" type="continuous"><limit velocity="9" effort="1"/></joint>
          <joint name="slide" type="prismatic"><limit upper="0.04" velocity="0.1" effort="1"/></joint>
          <joint name="bolt" type="fixed"/>
          <joint name="bare" type="revolute"/>
          <joint name="odd" type="revolute"><limit lower="1" upper="0" velocity="0" effort="1"/></joint>
          <joint name="word" type="revolute"><limit lower="x" upper="1" velocity="nan"/></joint>
        </robot>"#;

    #[test]
    fn limits_are_read_and_nonsense_is_named() {
        let d = Description::read(ARM);
        let of = |joint: &str| d.joints[joint];
        assert_eq!(of("elbow"), JointDescription { positions: Some([-1.25, 2.0]), max_velocity: Some(3.0) });
        assert_eq!(of("wheel"), JointDescription { positions: None, max_velocity: Some(9.0) });
        assert_eq!(of("slide"), JointDescription { positions: Some([0.0, 0.04]), max_velocity: Some(0.1) });
        assert_eq!((of("bare"), of("odd"), of("word")), Default::default());
        assert!(!d.joints.contains_key("bolt"));
        let said = d.problems.join("\n");
        for what in [
            "'odd': lower limit 1 is not below 0",
            "'odd': velocity limit 0",
            "'word': lower \"x\"",
            "velocity \"nan\"",
        ] {
            assert!(said.contains(what), "{said}");
        }
        assert_eq!(d.problems.len(), 4, "{said}");
    }

    #[test]
    fn what_is_no_urdf_is_said() {
        for (text, says) in [("", "no XML"), ("<robot", "no XML"), ("<sdf/>", "<sdf>, not with <robot>")] {
            let d = Description::read(text);
            assert!(d.joints.is_empty() && d.problems[0].contains(says), "{:?}", d.problems);
        }
    }
}
