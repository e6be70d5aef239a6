"""The task in closed loop with a PyTorch policy, one simulated arm a process: to see during training whether it learns.

Time stands still while the policy thinks; instead every chunk takes effect `LATENCY` actions after its observation, and
a new one is asked for every `REPLAN` actions. What counts is scripts/evaluate, which runs the node itself.
"""

from __future__ import annotations

import multiprocessing
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))

import expert  # noqa: E402
from data import RENDER, halved  # noqa: E402
from sim_arm import CAMERAS, Arm  # noqa: E402
from touch import COLOURS, TIME_LIMIT_S, Touch  # noqa: E402

LATENCY, REPLAN = 2, 8  # actions


class Episode:
    """One arm and one task, advanced chunk by chunk."""

    def __init__(self):
        self.touch = Touch(Arm(width=RENDER, height=RENDER))
        self.clock, self.chunk, self.at = 0.0, None, 0

    def observe(self) -> tuple[np.ndarray, np.ndarray, list, float]:
        arm = self.touch.arm
        images = np.stack([halved(arm.image(camera)) for camera in CAMERAS])
        return images, arm.position().astype(np.float32), self.touch.touches.order, self.clock

    def reset(self, seed: int):
        self.touch.reset(seed)
        self.clock, self.at = 0.0, 0
        self.chunk = np.repeat(self.touch.arm.position()[None], 64, 0)
        return self.observe()

    def go(self, chunk: np.ndarray):
        """The old chunk while the new one is being thought of, then the new one."""
        for _ in range(LATENCY):
            self._step()
        self.chunk, self.at = chunk, LATENCY
        for _ in range(REPLAN - LATENCY):
            self._step()
        return self.observe()

    def _step(self) -> None:
        arm, last = self.touch.arm, len(self.chunk) - 1
        a, b = self.chunk[min(self.at, last)], self.chunk[min(self.at + 1, last)]
        count = round(1 / expert.RATE_HZ / arm.step_s)
        # From where it was commanded to, so that a seam is a fast step and not a jump.
        begin = arm.data.ctrl[: len(b)].copy() if self.at == LATENCY else a
        for i in range(count):
            u = (i + 1) / count
            arm.command(begin + u * (b - begin), (b - a) * expert.RATE_HZ)
            arm.step()
            self.clock += arm.step_s
            self.touch.judge(self.clock)
        self.at += 1


def serve(pipe) -> None:
    episode = Episode()
    while (order := pipe.recv()) is not None:
        what, argument = order
        pipe.send(getattr(episode, what)(argument))


class Arms:
    """Several episodes at once."""

    def __init__(self, count: int):
        context = multiprocessing.get_context("spawn")
        self.pipes, self.processes = [], []
        for _ in range(count):
            here, there = context.Pipe()
            process = context.Process(target=serve, args=(there,), daemon=True)
            process.start()
            self.pipes.append(here)
            self.processes.append(process)

    def run(self, seeds: list[int], act: Callable[[np.ndarray, np.ndarray, list[str]], np.ndarray]) -> list[dict]:
        """`act(images, states, colours)` gives chunks of joint positions. The colour asked for is that of seed mod 3."""
        results = []
        for first in range(0, len(seeds), len(self.pipes)):
            part = seeds[first : first + len(self.pipes)]
            pipes = self.pipes[: len(part)]
            colours = [COLOURS[seed % 3] for seed in part]
            for pipe, seed in zip(pipes, part):
                pipe.send(("reset", seed))
            seen = [pipe.recv() for pipe in pipes]
            while min(s[3] for s in seen) < TIME_LIMIT_S and not all(s[2] for s in seen):
                chunks = act(np.stack([s[0] for s in seen]), np.stack([s[1] for s in seen]), colours)
                for pipe, chunk in zip(pipes, chunks):
                    pipe.send(("go", chunk))
                seen = [pipe.recv() for pipe in pipes]
            for seed, colour, (_, _, order, _) in zip(part, colours, seen):
                in_time = [(c, t) for c, t in order if t <= TIME_LIMIT_S]
                touched = in_time[0][0] if in_time else None
                results.append({"seed": seed, "colour": colour, "touched": touched, "seconds": in_time[0][1] if in_time else None})
        return results

    def close(self) -> None:
        for pipe in self.pipes:
            pipe.send(None)
        for process in self.processes:
            process.join(5)


def summary(results: list[dict]) -> str:
    right = [r for r in results if r["touched"] == r["colour"]]
    wrong = sum(r["touched"] not in (None, r["colour"]) for r in results)
    middle = np.median([r["seconds"] for r in right]) if right else float("nan")
    n = len(results)
    return f"{len(right)}/{n} touched ({100 * len(right) / n:.1f}%), wrong block {wrong}, none {n - len(right) - wrong}, median {middle:.2f} s"
