//! Settings to the configurations of the layers below.

use super::NodeError;
use crate::control::{ControlConfig, JointConfig, Names, OutputNames, Seam};
use crate::model::{Checkpoint, Policy, PolicyOptions};
use crate::params::Settings;
use crate::params::choice::{Noise, OnCameraLoss};
use crate::pipeline::inputs::FUTURE_STAMP_TOLERANCE;
use crate::pipeline::joint_map::JointBinding;
use crate::pipeline::{CameraBinding, LiveConfig, PipelineConfig, RtcConfig};

/// The policy of a checkpoint as these settings have it, which must fit its cameras and joints.
pub(super) fn policy(s: &Settings, checkpoint: &Checkpoint) -> Result<Policy, NodeError> {
    let options = PolicyOptions {
        tokenizer: s.model.tokenizer.clone(),
        norm_stats: s.model.norm_stats.clone(),
        action_mode: s.chunks.action_mode,
        absolute_actions: s.joints.iter().filter(|j| j.action_absolute).map(|j| j.index).collect(),
    };
    let policy = Policy::open(checkpoint, &s.model.checkpoint, &options)?;
    pipeline(s).fits(&policy)?;
    Ok(policy)
}

pub(super) fn names(s: &Settings) -> Names {
    Names {
        joints: s.joints.iter().map(|j| j.name.clone()).collect(),
        cameras: s.inputs.cameras.iter().map(|c| c.name.clone()).collect(),
        outputs: (s.outputs.iter())
            .map(|o| OutputNames { name: o.name.clone(), topic: o.topic.clone(), others: Vec::new() })
            .collect(),
    }
}

/// For chunks of `horizon` actions.
pub(super) fn control(s: &Settings, horizon: usize) -> ControlConfig {
    let base = ControlConfig::new(
        s.joints.iter().map(|j| j.name.clone()),
        s.timing.period().as_secs_f64(),
        s.timing.dt(),
        horizon,
    );
    ControlConfig {
        joints: s
            .joints
            .iter()
            .map(|j| JointConfig { name: j.name.clone(), limits: j.limits, max_tracking_error: j.max_tracking_error })
            .collect(),
        stop_time: s.safety.stop_time.as_secs_f64(),
        ramp_time: s.safety.ramp_time.as_secs_f64(),
        output_window: s.output_window.as_secs_f64(),
        replan_steps: s.chunks.replan_steps,
        seam: s.chunks.seam,
        // A chunk within its budget is never too old to be adopted.
        max_chunk_age: base.max_chunk_age.max(s.timing.chunk_budget.as_secs_f64()),
        max_image_age: s.inputs.cameras.iter().map(|c| c.max_age.as_secs_f64()).fold(0.0, f64::max)
            + base.max_chunk_age.max(s.timing.chunk_budget.as_secs_f64()),
        max_joint_state_age: s.inputs.max_joint_state_age.as_secs_f64(),
        // What inputs take for a stamp, chunks made of them do, too.
        future_tolerance: FUTURE_STAMP_TOLERANCE.as_secs_f64(),
        miss_policy: s.timing.miss_policy,
        deadline: s.timing.deadline.as_secs_f64(),
        ..base
    }
}

pub(super) fn live(s: &Settings) -> LiveConfig {
    LiveConfig {
        camera_max_age_ms: s.inputs.cameras.iter().map(|c| c.max_age.as_secs_f64() * 1e3).collect(),
        drop_lost_views: s.inputs.on_camera_loss == OnCameraLoss::DropView,
        max_camera_skew_ms: s.inputs.max_camera_skew.as_secs_f64() * 1e3,
        max_joint_state_age_ms: s.inputs.max_joint_state_age.as_secs_f64() * 1e3,
        hold_noise: s.model.noise == Noise::Held,
        replan_steps: s.chunks.replan_steps,
        rtc: (s.chunks.seam == Seam::Rtc).then_some(RtcConfig {
            schedule: s.chunks.rtc_schedule,
            execution_horizon: s.chunks.rtc_execution_horizon,
            max_weight: s.chunks.rtc_max_guidance_weight as f32,
        }),
        steps: s.model.num_inference_steps,
        chunk_budget_ms: s.timing.chunk_budget.as_secs_f64() * 1e3,
    }
}

pub(super) fn pipeline(s: &Settings) -> PipelineConfig {
    PipelineConfig {
        mode: s.gpu.pipeline_mode,
        split: s.gpu.split,
        cameras: s
            .inputs
            .cameras
            .iter()
            .map(|c| CameraBinding { name: c.name.clone(), model_key: c.model_key.clone() })
            .collect(),
        joint_names: s.joints.iter().map(|j| j.name.clone()).collect(),
        joints: s.joints.iter().map(|j| JointBinding { index: j.index, scale: j.scale, offset: j.offset }).collect(),
        dt: s.timing.dt(),
        seed: s.model.seed,
        cpus: [1, 2].map(|i| s.process.cpu_affinity.get(i).copied()),
        paused: true,
        live: live(s),
    }
}
