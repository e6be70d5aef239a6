"""Writes the policy as a LeRobot checkpoint in half precision, with tokenizer and statistics."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import save_file as save_arrays
from safetensors.torch import save_file

from model import Pi0

NORM = {"VISUAL": "IDENTITY", "STATE": "MEAN_STD", "ACTION": "MEAN_STD"}
STATS = (
    "policy_preprocessor_step_6_normalizer_processor.safetensors",
    "policy_postprocessor_step_0_unnormalizer_processor.safetensors",
)
MAX_TOKENS = 48


def write(folder: Path, model: Pi0, stats: dict[str, np.ndarray], tokenizer: str, joints: list[str], cameras: list[str],
          rate_hz: float) -> None:
    """`stats` holds mean and std of `observation.state` and of `action` (relative to the state but for the gripper)."""
    folder.mkdir(parents=True, exist_ok=True)
    size = model.size
    tensors = {f"model.{name}": t.detach().cpu().to(torch.float16).contiguous() for name, t in model.state_dict().items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    for name in STATS:
        save_arrays({k: np.ascontiguousarray(v, np.float32) for k, v in stats.items()}, folder / name)
    (folder / "tokenizer.json").write_text(tokenizer)
    image = {"type": "VISUAL", "shape": [3, size.image, size.image]}
    state = {"type": "STATE", "shape": [len(joints)]}
    action = {"type": "ACTION", "shape": [len(joints)]}
    config = {
        "type": "pi0",
        "n_obs_steps": 1,
        "chunk_size": size.horizon,
        "n_action_steps": size.horizon,
        "policy_rate_hz": rate_hz,
        "max_state_dim": size.state_dim,
        "max_action_dim": size.action_dim,
        "num_inference_steps": 10,
        "min_period": size.min_period,
        "max_period": size.max_period,
        "image_resolution": [size.image, size.image],
        "empty_cameras": 0,
        "tokenizer_max_length": MAX_TOKENS,
        "vision_num_attention_heads": size.vision_heads,
        "dtype": "float16",
        "normalization_mapping": NORM,
        "input_features": {f"observation.images.{camera}": image for camera in cameras} | {"observation.state": state},
        "output_features": {"action": action},
        "use_relative_actions": True,
        "relative_exclude_joints": ["gripper"],
        "action_feature_names": joints,
    }
    features = {"observation.state": state, "action": action}
    tokens = {
        "max_length": MAX_TOKENS,
        "task_key": "task",
        "padding_side": "right",
        "padding": "max_length",
        "truncation": True,
        "tokenizer_name": "tokenizer.json",
    }
    relative = {"enabled": True, "exclude_joints": ["gripper"], "action_names": joints}
    before = [
        ("rename_observations_processor", {"rename_map": {}}),
        ("to_batch_processor", {}),
        ("pi0_new_line_processor", {}),
        ("tokenizer_processor", tokens),
        ("device_processor", {"device": "cpu", "float_dtype": None}),
        ("relative_actions_processor", relative),
        ("normalizer_processor", {"eps": 1e-8, "features": features, "norm_map": NORM}),
    ]
    after = [
        ("unnormalizer_processor", {"eps": 1e-8, "features": {"action": action}, "norm_map": NORM}),
        ("absolute_actions_processor", {"enabled": True}),
        ("device_processor", {"device": "cpu", "float_dtype": None}),
    ]
    for name, steps, file in (("policy_preprocessor", before, STATS[0]), ("policy_postprocessor", after, STATS[1])):
        steps = [{"registry_name": kind, "config": given} | ({"state_file": file} if "normalizer" in kind else {}) for kind, given in steps]
        dump(folder / f"{name}.json", {"name": name, "steps": steps})
    dump(folder / "config.json", config)


def dump(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n")
