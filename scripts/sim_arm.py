"""The simulated arm without a middleware: MuJoCo physics, cameras, pictures."""

from __future__ import annotations

import os
import struct
import zlib
from pathlib import Path

os.environ.setdefault("MUJOCO_GL", "osmesa")

import mujoco
import numpy as np

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "config/robots/sim_arm.xml"
JOINTS = ["shoulder_pan", "shoulder_lift", "elbow", "wrist_pitch", "wrist_yaw", "wrist_roll", "gripper"]
CAMERAS = ["base", "wrist"]


class Arm:
    """The physics and the cameras."""

    def __init__(self, model_path: Path = MODEL, width: int = 224, height: int = 224):
        self.model = mujoco.MjModel.from_xml_path(str(model_path))
        self.data = mujoco.MjData(self.model)
        joints = [self.model.joint(name) for name in JOINTS]
        self._qpos = np.array([j.qposadr[0] for j in joints])
        self._qvel = np.array([j.dofadr[0] for j in joints])
        self._mirror = self.model.joint("gripper_mirror").qposadr[0]
        self._ctrl = np.array([self.model.actuator(name).id for name in JOINTS])
        # Force of a MuJoCo position actuator: gain·ctrl + bias·(1, q, q̇); the joint adds damping of its own.
        stiffness = self.model.actuator_gainprm[self._ctrl, 0]
        # A column per polynomial order from MuJoCo 4 on, one number before.
        damping = self.model.dof_damping.reshape(self.model.nv, -1)[self._qvel, 0]
        drag = damping - self.model.actuator_biasprm[self._ctrl, 2]
        self._feed_forward = drag / stiffness
        self.step_s = self.model.opt.timestep
        mujoco.mj_resetDataKeyframe(self.model, self.data, self.model.key("home").id)
        mujoco.mj_forward(self.model, self.data)
        self.renderer = mujoco.Renderer(self.model, height, width)

    def place(self, position: np.ndarray) -> None:
        """Puts the joints at `position`, at rest and commanded to stay there; nothing else moves."""
        self.data.qpos[self._qpos] = position
        self.data.qpos[self._mirror] = position[-1]
        self.data.qvel[:] = 0.0
        self.data.ctrl[self._ctrl] = position
        mujoco.mj_forward(self.model, self.data)

    def command(self, position: np.ndarray, velocity: np.ndarray) -> None:
        """Position loop with velocity feed-forward, as servo drives have it: no lag at constant speed."""
        self.data.ctrl[self._ctrl] = position + self._feed_forward * velocity

    def step(self) -> None:
        mujoco.mj_step(self.model, self.data)

    def position(self) -> np.ndarray:
        return self.data.qpos[self._qpos]

    def velocity(self) -> np.ndarray:
        return self.data.qvel[self._qvel]

    def fingertip(self) -> np.ndarray:
        """Where the fingers end, between the two, m."""
        return self.data.site("grasp").xpos

    def image(self, camera: str) -> np.ndarray:
        self.renderer.update_scene(self.data, camera)
        return self.renderer.render()


def picture_model(model_path: Path, width: int, height: int, shadows: int = 4096, samples: int = 8) -> mujoco.MjModel:
    """The model with shadows and smooth edges, which the policy's cameras do without."""
    spec = mujoco.MjSpec.from_file(str(model_path))
    spec.visual.quality.shadowsize = shadows
    spec.visual.quality.offsamples = samples
    spec.visual.global_.offwidth, spec.visual.global_.offheight = width, height
    return spec.compile()


def write_picture(path: Path, model_path: Path, data: mujoco.MjData, width: int = 1280, height: int = 960) -> None:
    """The scene from outside."""
    model = picture_model(model_path, width, height)
    scene = mujoco.MjData(model)
    scene.qpos[:] = data.qpos
    mujoco.mj_forward(model, scene)
    with mujoco.Renderer(model, height, width) as renderer:
        renderer.update_scene(scene, "scene")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(renderer.render()))


def png(image: np.ndarray) -> bytes:
    """An rgb8 image as PNG."""
    height, width, _ = image.shape
    # Filter 2 (difference to the row above) compresses rendered images well.
    rows = np.diff(image.astype(np.int16), axis=0, prepend=0).astype(np.uint8).reshape(height, -1)
    raw = np.hstack([np.full((height, 1), 2, np.uint8), rows]).tobytes()
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = png_chunk(b"IHDR", header), png_chunk(b"IDAT", zlib.compress(raw, 9)), png_chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def png_chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
