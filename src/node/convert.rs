//! Settings to the configurations of the layers below.

use crate::control::{ControlConfig, JointConfig, JointLimits, MissPolicy, Names, Seam};
use crate::engine::{Device, GuidanceSchedule};
use crate::model::{ActionMode, Dims, PolicyOptions};
use crate::params::{self, Settings, choice};
use crate::pipeline::joint_map::JointBinding;
use crate::pipeline::{CameraBinding, LiveConfig, PipelineConfig, PipelineMode, RtcConfig};

pub(super) fn device(s: &Settings) -> Device {
    match s.model.device {
        choice::Device::Auto => Device::Auto,
        choice::Device::Cpu => Device::Cpu,
        choice::Device::Cuda(n) => Device::Cuda(n),
    }
}

pub(super) fn policy_options(s: &Settings) -> PolicyOptions {
    let mask = s.joints.iter().any(|j| j.action_absolute).then(|| {
        let mut relative = vec![true; s.joints.len()];
        for j in &s.joints {
            if let Some(r) = relative.get_mut(j.index) {
                *r = !j.action_absolute;
            }
        }
        relative
    });
    PolicyOptions {
        tokenizer: s.model.tokenizer.clone(),
        norm_stats: s.model.norm_stats.clone(),
        action_mode: match s.chunks.action_mode {
            choice::ActionMode::Auto => ActionMode::Auto,
            choice::ActionMode::Absolute => ActionMode::Absolute,
            choice::ActionMode::Delta => ActionMode::Delta,
        },
        action_mask: mask,
    }
}

pub(super) fn names(s: &Settings) -> Names {
    Names {
        joints: s.joints.iter().map(|j| j.name.clone()).collect(),
        cameras: s.inputs.cameras.iter().map(|c| c.name.clone()).collect(),
        outputs: s.outputs.iter().map(|o| o.name.clone()).collect(),
    }
}

pub(super) fn limits(l: &params::Limits) -> JointLimits {
    JointLimits {
        min_position: l.min_position,
        max_position: l.max_position,
        max_velocity: l.max_velocity,
        max_acceleration: l.max_acceleration,
    }
}

pub(super) fn control(s: &Settings, dims: &Dims) -> ControlConfig {
    let base = ControlConfig::new(
        s.joints.iter().map(|j| j.name.clone()),
        s.timing.period().as_secs_f64(),
        s.timing.dt(),
        dims.horizon,
    );
    ControlConfig {
        joints: s
            .joints
            .iter()
            .map(|j| JointConfig {
                name: j.name.clone(),
                limits: j.limits.as_ref().map(limits),
                max_tracking_error: s.safety.max_tracking_error,
            })
            .collect(),
        stop_time: s.safety.stop_time.as_secs_f64(),
        ramp_time: s.safety.ramp_time.as_secs_f64(),
        output_window: s.output_window.as_secs_f64(),
        replan_steps: s.chunks.replan_steps,
        seam: match s.chunks.seam {
            choice::Seam::None => Seam::None,
            choice::Seam::Crossfade => Seam::Crossfade,
            choice::Seam::Rtc => Seam::Rtc,
        },
        max_joint_state_age: s.inputs.max_joint_state_age.as_secs_f64(),
        miss_policy: match s.timing.miss_policy {
            choice::MissPolicy::Coast => MissPolicy::Coast,
            choice::MissPolicy::Stop => MissPolicy::Stop,
        },
        deadline: s.timing.deadline.as_secs_f64(),
        ..base
    }
}

pub(super) fn live(s: &Settings) -> LiveConfig {
    LiveConfig {
        camera_max_age_ms: s.inputs.cameras.iter().map(|c| c.max_age.as_secs_f64() * 1e3).collect(),
        drop_lost_views: s.inputs.on_camera_loss == choice::OnCameraLoss::DropView,
        max_camera_skew_ms: s.inputs.max_camera_skew.as_secs_f64() * 1e3,
        max_joint_state_age_ms: s.inputs.max_joint_state_age.as_secs_f64() * 1e3,
        hold_noise: s.model.noise == choice::Noise::Held,
        replan_steps: s.chunks.replan_steps,
        rtc: (s.chunks.seam == choice::Seam::Rtc).then_some(RtcConfig {
            schedule: match s.chunks.rtc_schedule {
                choice::RtcSchedule::Linear => GuidanceSchedule::Linear,
                choice::RtcSchedule::Exp => GuidanceSchedule::Exp,
                choice::RtcSchedule::Ones => GuidanceSchedule::Ones,
                choice::RtcSchedule::Zeros => GuidanceSchedule::Zeros,
            },
            execution_horizon: s.chunks.rtc_execution_horizon,
            max_weight: s.chunks.rtc_max_guidance_weight as f32,
        }),
        steps: s.model.num_inference_steps,
        chunk_budget_ms: s.timing.chunk_budget.as_secs_f64() * 1e3,
    }
}

pub(super) fn pipeline(s: &Settings) -> PipelineConfig {
    PipelineConfig {
        mode: match s.gpu.pipeline_mode {
            choice::PipelineMode::Sequential => PipelineMode::Sequential,
            choice::PipelineMode::Pipelined => PipelineMode::Pipelined,
            choice::PipelineMode::DualRate => PipelineMode::DualRate,
        },
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
        live: live(s),
    }
}
