"""The task of the shipped policy: three coloured blocks on the table, a sentence names one, the fingertip touches it.

Everything random about a scene follows from its seed: where the blocks lie, where the arm starts, how light, colours
and cameras differ from the model's. Seeds below `TRAINING_SEEDS` were never trained on.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import mujoco
import numpy as np

from sim_arm import Arm

COLOURS = ("red", "green", "blue")
PROMPT = "touch the {} block"
TIME_LIMIT_S = 8.0
TRAINING_SEEDS = 1_000_000

HALF_BLOCK = 0.0225  # m, as in sim_arm.xml
RADIUS = (0.27, 0.44)  # of a block's centre from the shoulder's axis, m
BEARING = 0.55  # rad to either side
APART = 0.10  # between the centres of two blocks, m
HOME = np.array([0.0, -0.1, 1.65, 1.1, 0.0, 0.0, 0.02])
START = np.array([0.5, 0.2, 0.2, 0.25, 0.15, 0.4, 0.012])  # how far from HOME the arm starts, either way
CONTACT_GAP_S = 0.4  # a shorter one does not make two contacts of one
LOWEST_START = 0.13  # fingertip above the table, m


@dataclass(frozen=True)
class Scene:
    """What one seed draws; `noise` holds standard normal numbers for light, colours and cameras."""

    seed: int
    blocks: np.ndarray  # [3, 2], centres in the order of COLOURS, m
    turns: np.ndarray  # [3], rad about the vertical
    start: np.ndarray  # [7]
    noise: np.ndarray

    @classmethod
    def draw(cls, seed: int, fingertip_height) -> Scene:
        """`fingertip_height` gives the height of the fingertip in a pose, m."""
        random = np.random.default_rng(seed)
        blocks = np.empty((0, 2))
        while len(blocks) < len(COLOURS):
            radius, bearing = random.uniform(*RADIUS), random.uniform(-BEARING, BEARING)
            centre = radius * np.array([np.cos(bearing), np.sin(bearing)])
            if np.all(np.hypot(*(blocks - centre).T) > APART):
                blocks = np.vstack([blocks, centre])
        turns = random.uniform(-np.pi / 4, np.pi / 4, len(COLOURS))
        start = HOME + random.uniform(-1, 1, HOME.size) * START
        while fingertip_height(start) < LOWEST_START:
            start = HOME + random.uniform(-1, 1, HOME.size) * START
        return cls(seed, blocks, turns, start, random.standard_normal(40))


@dataclass
class Touches:
    """What the fingers have touched since the last reset: colour and seconds of every contact that began."""

    order: list[tuple[str, float]] = field(default_factory=list)
    last: dict[str, float] = field(default_factory=dict)  # when each colour was seen touched

    def first(self) -> tuple[str, float] | None:
        return self.order[0] if self.order else None


class Touch:
    """The task on an arm."""

    def __init__(self, arm: Arm):
        self.arm = arm
        model = arm.model
        self._blocks = [model.joint(f"{colour}_block").qposadr[0] for colour in COLOURS]
        bodies = [model.body(f"{colour}_block").id for colour in COLOURS]
        self._geoms = [int(np.flatnonzero(model.geom_bodyid == body)[0]) for body in bodies]
        hand = [model.body(name).id for name in ("hand", "finger_left", "finger_right")]
        self._fingers = set(np.flatnonzero(np.isin(model.geom_bodyid, hand)).tolist())
        self._materials = [model.material(colour).id for colour in COLOURS]
        # What a seed varies, as the model has it.
        self._as_built = {
            name: np.copy(getattr(model, name)) for name in ("cam_pos", "cam_quat", "light_diffuse", "light_dir", "mat_rgba")
        }
        self._headlight = np.copy(model.vis.headlight.diffuse), np.copy(model.vis.headlight.ambient)
        self.touches = Touches()
        self.scene: Scene | None = None

    def height(self, pose: np.ndarray) -> float:
        self.arm.place(pose)
        return float(self.arm.fingertip()[2])

    def reset(self, seed: int) -> Scene:
        """The scene of a seed, with nothing touched yet."""
        self.show(Scene.draw(seed, self.height))
        return self.scene

    def show(self, scene: Scene) -> None:
        """Puts everything where the scene has it."""
        model, data = self.arm.model, self.arm.data
        mujoco.mj_resetData(model, data)
        for address, centre, turn in zip(self._blocks, scene.blocks, scene.turns):
            data.qpos[address : address + 7] = [*centre, HALF_BLOCK, np.cos(turn / 2), 0, 0, np.sin(turn / 2)]
        noise = iter(scene.noise)

        def draw(scale: float, *shape: int) -> np.ndarray:
            count = int(np.prod(shape))
            return scale * np.clip([next(noise) for _ in range(count)], -2, 2).reshape(shape)

        for name, value in self._as_built.items():
            getattr(model, name)[:] = value
        model.cam_pos[model.camera("base").id] += draw(0.005, 3)
        for camera in ("base", "wrist"):
            quat = model.cam_quat[model.camera(camera).id]
            mujoco.mju_quatIntegrate(quat, draw(0.008, 3).ravel(), 1.0)
        model.light_diffuse[:] *= 1 + draw(0.12, model.nlight, 1)
        model.light_dir[:] += draw(0.1, model.nlight, 3)
        model.mat_rgba[self._materials, :3] *= 1 + draw(0.05, len(COLOURS), 3)
        diffuse, ambient = self._headlight
        model.vis.headlight.diffuse[:] = diffuse * (1 + draw(0.12, 1))
        model.vis.headlight.ambient[:] = ambient * (1 + draw(0.12, 1))
        self.arm.place(scene.start)
        self.touches = Touches()
        self.scene = scene

    def judge(self, seconds: float) -> None:
        """Notes blocks that the fingers touch now and did not a moment ago; to be called after every physics step, or
        often."""
        data = self.arm.data
        for a, b in data.contact.geom[: data.ncon]:
            a, b = int(a), int(b)
            block = b if a in self._fingers else a if b in self._fingers else None
            if block in self._geoms:
                colour = COLOURS[self._geoms.index(block)]
                if seconds - self.touches.last.get(colour, -CONTACT_GAP_S) >= CONTACT_GAP_S:
                    self.touches.order.append((colour, seconds))
                self.touches.last[colour] = seconds
