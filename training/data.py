"""Demonstrations: poses along the expert's ways and beside them, what the cameras see there, what to do next.

Every sample has its own scene-dependent target, start, moment and error, so a few thousand scenes give many different
samples. Several processes render at once; the result is one folder of .npy files.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))

import expert  # noqa: E402
from sim_arm import CAMERAS, Arm  # noqa: E402
from touch import COLOURS, HALF_BLOCK, TRAINING_SEEDS, Scene, Touch  # noqa: E402

RENDER = 224  # pixels a side, as the simulated cameras send
IMAGE = 112  # as the policy sees
HORIZON = 32
SAMPLES = 8  # a scene
PART = 50  # scenes at a time
LONGEST_S = 4.0  # of the way before a sample
IMAGE_LAG_S = 0.25  # an image may be so much older than the joint state beside it


def halved(image: np.ndarray) -> np.ndarray:
    """What bilinear interpolation without antialiasing makes of an image at half its size: means of 2x2 pixels."""
    wide = image.astype(np.uint16)
    return ((wide[::2, ::2] + wide[1::2, ::2] + wide[::2, 1::2] + wide[1::2, 1::2] + 2) // 4).astype(np.uint8)


def starts(random: np.random.Generator, start: np.ndarray, blocks: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Where the ways to `target` [n] begin, as hands: where the arm starts, above the table anywhere, on a block."""
    n = len(target)
    hand = expert.hand_of(start)
    kind = random.random(n)
    # Anywhere the arm goes.
    radius, bearing = random.uniform(0.24, 0.46, n), random.uniform(-0.65, 0.65, n)
    away = kind < 0.35
    hand[away, 0], hand[away, 1] = (radius * np.cos(bearing))[away], (radius * np.sin(bearing))[away]
    hand[away, 2] = random.uniform(0.06, 0.24, n)[away]
    hand[away, 3] = random.uniform(2.6, 3.2, n)[away]
    # On a block that was touched before, most often another one.
    on = kind > 0.65
    last = (target + random.integers(0, len(COLOURS), n)) % len(COLOURS)
    hand[on, :2] = blocks[np.arange(n), last][on] + random.normal(0, 0.006, (on.sum(), 2))
    hand[on, 2] = 2 * HALF_BLOCK + random.uniform(-0.004, 0.006, on.sum())
    hand[on, 3] = expert.TILT + random.normal(0, 0.03, on.sum())
    hand[away | on, 4:6] = random.normal(0, 0.05, ((away | on).sum(), 2))
    hand[away | on, 6] = random.uniform(0.001, 0.02, (away | on).sum())
    return hand


def samples(random: np.random.Generator, scenes: list[Scene]) -> dict[str, np.ndarray]:
    """SAMPLES of each scene: joint states, the poses that the images beside them show, and the actions from there on."""
    n = SAMPLES * len(scenes)
    blocks = np.repeat([scene.blocks for scene in scenes], SAMPLES, 0)
    target = random.integers(0, len(COLOURS), n)
    block = blocks[np.arange(n), target]
    pace = random.uniform(0.85, 1.15, n)
    hand = starts(random, np.repeat([scene.start for scene in scenes], SAMPLES, 0), blocks, target)
    steps = random.integers(0, int(LONGEST_S * expert.RATE_HZ * expert.SUBSTEPS), n)
    # Half of the samples are from the first second and a half, in which most of the way is made.
    early = random.random(n) < 0.5
    steps[early] = (steps[early] * 0.375).astype(int)
    lag = (random.uniform(0, IMAGE_LAG_S, n) * (random.random(n) < 0.7) * expert.RATE_HZ * expert.SUBSTEPS).astype(int)
    seen = hand.copy()
    for i in range(int(steps.max())):
        seen = np.where((i < steps - lag)[:, None], hand, seen)
        step = expert.velocity(hand, block, pace) / (expert.RATE_HZ * expert.SUBSTEPS)
        hand = np.where((i < steps)[:, None], hand + step, hand)
    seen = np.where((lag == 0)[:, None], hand, seen)
    # Beside the way, as a policy that errs gets there.
    scale = np.array([0.015, 0.015, 0.010, 0.06, 0.03, 0.05, 0.002]) * (random.random((n, 1)) < 0.7)
    error = random.normal(0, 1, hand.shape) * scale
    hand, seen = hand + error, seen + error
    for pose in (hand, seen):
        # Nothing goes below the table, and a block does not give way.
        on = np.min(np.linalg.norm(pose[:, None, :2] - blocks, axis=-1), 1) < HALF_BLOCK + 0.008
        pose[:, 2] = np.maximum(pose[:, 2], np.where(on, 2 * HALF_BLOCK - 0.005, 0.012))
        pose[:, 6] = np.clip(pose[:, 6], 0.0, 0.03)
    joints = expert.joints_of(hand)
    return {
        "state": joints,
        "seen": expert.joints_of(seen),
        "action": expert.demonstrate(joints, block, pace, HORIZON),
        "colour": target,
        "target": block,
    }


def work(part: tuple[Path, int, int, int]) -> tuple[int, int]:
    """Draws and renders one part of the scenes into the shared files; the rows it filled."""
    folder, first, offset, count = part
    global touch
    if touch is None:
        touch = Touch(Arm(width=RENDER, height=RENDER))
    files = open_files(folder, 0, "r+")
    scenes = [Scene.draw(first + offset + i, touch.height) for i in range(count)]
    drawn = samples(np.random.default_rng([first + offset, 1]), scenes)
    for i, scene in enumerate(scenes):
        touch.show(scene)
        for k in range(i * SAMPLES, (i + 1) * SAMPLES):
            touch.arm.place(drawn["seen"][k])
            for view, camera in enumerate(CAMERAS):
                files["image"][offset * SAMPLES + k, view] = halved(touch.arm.image(camera))
    rows = slice(offset * SAMPLES, (offset + count) * SAMPLES)
    for name in ("state", "action", "colour", "target"):
        files[name][rows] = drawn[name]
    return rows.start, rows.stop


touch: Touch | None = None  # of this process


def open_files(folder: Path, rows: int, mode: str) -> dict[str, np.ndarray]:
    shapes = {
        "image": (np.uint8, (len(CAMERAS), IMAGE, IMAGE, 3)),
        "state": (np.float32, (7,)),
        "action": (np.float32, (HORIZON, 7)),
        "colour": (np.int64, ()),
        "target": (np.float32, (2,)),
    }
    made = {}
    for name, (dtype, shape) in shapes.items():
        path = folder / f"{name}.npy"
        made[name] = np.lib.format.open_memmap(path, mode, None if mode != "w+" else dtype, None if mode != "w+" else (rows, *shape))
    return made


def generate(folder: Path, scenes: int, processes: int, most_s: float = float("inf"), first: int = TRAINING_SEEDS) -> None:
    """Writes `scenes` scenes of `SAMPLES` samples each into `folder`, or what is done of them after `most_s` seconds;
    `rows.npy`, written last, lists the rows that are there."""
    folder.mkdir(parents=True, exist_ok=True)
    open_files(folder, scenes * SAMPLES, "w+")
    parts = [(folder, first, a, min(PART, scenes - a)) for a in range(0, scenes, PART)]
    begun, rows = time.monotonic(), []
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        for start, stop in pool.imap_unordered(work, parts):
            rows.append(np.arange(start, stop))
            if time.monotonic() - begun > most_s:
                pool.terminate()
                break
    rows = np.sort(np.concatenate(rows))
    np.save(folder / "rows.npy", rows)
    print(f"data: {len(rows)} samples in {time.monotonic() - begun:.1f} s with {processes} processes", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--scenes", type=int, default=15_000)
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--most-seconds", type=float, default=float("inf"), help="stop then with what is done")
    options = parser.parse_args()
    generate(options.folder, options.scenes, options.processes, options.most_seconds)
    return 0


if __name__ == "__main__":
    sys.exit(main())
