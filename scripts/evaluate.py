"""How well a policy touches the block that it is told to: many seeds through the node, in virtual time or live.

Physics, cameras and the node (`pi0 step`: its input slots, both stages, control loop, limits and published windows) take
turns by a virtual clock, so that a busy machine changes nothing: a stage takes --encode-ms and --decode-ms whatever it
really took. With --live the simulated robot and control_node run as two processes over real topics in real time
(live.py). Started by scripts/evaluate, which sets up Python and builds the binaries.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from sim_arm import CAMERAS, ROOT, Arm
from touch import COLOURS, PROMPT, TIME_LIMIT_S, Touch
from trajectory import Jerk, Trajectory

CONFIG = [ROOT / "config/robots/sim_arm.yaml", ROOT / "config/robots/sim_arm_touch.yaml"]
QUANTILES = {"median": 50, "p95": 95, "max": 100}
WARM_UP_S = 3.0  # until a first chunk must be there


@dataclass(frozen=True)
class Case:
    """One row of the table."""

    name: str
    parameters: dict = field(default_factory=dict)
    added_ms: float = 0.0
    blind: bool = False
    swap: bool = False  # another block is asked for when the arm is half-way


class Node:
    """`pi0 step` as a process."""

    def __init__(self, case: Case, options: argparse.Namespace):
        command = [str(options.pi0), "step", "--checkpoint", str(options.checkpoint)]
        for path in CONFIG:
            command += ["--params-file", str(path)]
        for name, value in {"device": options.device, **case.parameters}.items():
            command += ["-p", f"{name}:={value}"]
        for name in ("encode_ms", "decode_ms"):
            if getattr(options, name) is not None:
                command += [f"--{name.replace('_', '-')}", str(getattr(options, name))]
        command += ["--added-latency-ms", str(case.added_ms)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.about = self._answer()

    def _answer(self) -> dict:
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"error: pi0 step ended with exit code {self._process.wait()}; its message is above")
        return json.loads(line)

    def ask(self, images: tuple[tuple[int, np.ndarray], ...] = (), **request) -> dict:
        request["images"] = [[camera, image.shape[1], image.shape[0]] for camera, image in images]
        self._process.stdin.write(json.dumps(request).encode() + b"\n" + b"".join(image.tobytes() for _, image in images))
        self._process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait()


class Episode:
    """One seed: the arm, the blocks and the node until something is touched or the time is over."""

    def __init__(self, node: Node, touch: Touch, case: Case, options: argparse.Namespace):
        self.node, self.touch, self.case, self.options = node, touch, case, options
        self.period = node.about["period"]
        self.periods = 0  # since arming
        self.jerk = Jerk(self.period)
        self.jumps: list[float] = []
        self.published_jump, self.tracking = 0.0, 0.0

    def run(self, seed: int, colour: str) -> dict:
        arm = self.touch.arm
        self.touch.reset(seed)
        self.node.ask(new=True)
        trajectory, now, next_image, armed_at, answer = Trajectory.hold(arm.position()), 0.0, 0.0, None, {}
        wanted, swapped = colour, False
        start = self.touch.scene.start
        while armed_at is None or now - armed_at < TIME_LIMIT_S:
            if armed_at is None and now > WARM_UP_S:
                raise SystemExit(f"error: not armed after {WARM_UP_S} s: {answer}")
            images = ()
            if now >= next_image - 1e-9:
                images = tuple((i, self._image(camera)) for i, camera in enumerate(CAMERAS))
                next_image += 1.0 / self.options.camera_rate
            if self.case.swap and armed_at is not None and not swapped and self._halfway(start, wanted):
                wanted, swapped = COLOURS[(COLOURS.index(wanted) + 1) % len(COLOURS)], True
            arm_now = armed_at is None and answer.get("chunks", 0) > 0 and answer.get("mode") == "active"
            answer = self.node.ask(images, joints=arm.position().tolist(), prompt=PROMPT.format(wanted), enable=arm_now)
            if armed_at is None and answer["mode"] in ("ramp", "run"):
                armed_at = now
            # The arm goes on with what it had until the node's answer is there.
            end = answer["seconds"]
            while now < end - 1e-9:
                now += arm.step_s
                desired = trajectory.sample(now)
                arm.command(desired.position, desired.velocity)
                arm.step()
                if armed_at is not None:
                    self.touch.judge(now - armed_at)
            if armed_at is not None:
                self.periods += 1
                self.jerk.add(desired.position[:-1])
                if not self.touch.touches.order:
                    self.tracking = max(self.tracking, float(np.max(np.abs(arm.position() - desired.position))))
                if answer["mode"] not in ("ramp", "run", "coast"):
                    break
            if answer["seam_jump_rad"] is not None:
                self.jumps.append(answer["seam_jump_rad"])
            if window := answer["window"]:
                points = np.array(window["positions"])
                times = window["start"] + window["first"] + window["period"] * np.arange(len(points))
                jump = float(np.max(np.abs(points[0] - trajectory.sample(times[0]).position)))
                self.published_jump = max(self.published_jump, jump)
                trajectory = Trajectory(times, points, np.array(window["velocities"])).after(now, trajectory.sample(now))
            if self.touch.touches.order:
                break
        return self._result(seed, wanted, answer)

    def _halfway(self, start: np.ndarray, colour: str) -> bool:
        block = self.touch.scene.blocks[COLOURS.index(colour)]
        return float(np.hypot(*(self.touch.arm.fingertip()[:2] - block))) < 0.10 or self.periods > 1.5 / self.period

    def _image(self, camera: str) -> np.ndarray:
        image = self.touch.arm.image(camera)
        if self.case.blind:
            # Not the same bytes twice: a frozen camera is another fault.
            return np.random.default_rng(self.periods).integers(0, 2, image.shape, np.uint8)
        return image

    def _result(self, seed: int, wanted: str, answer: dict) -> dict:
        touched = self.touch.touches.first()
        return {
            "seed": seed,
            "wanted": wanted,
            "touched": touched[0] if touched else None,
            "seconds": touched[1] if touched else None,
            "jerk_rms": self.jerk.rms,
            "jumps": self.jumps,
            "published_jump": self.published_jump,
            "tracking": self.tracking,
            "interventions": answer["interventions"],
            "starved": answer["starved"],
            "mode": answer["mode"],
            "reason": answer["reason"],
        }


def play(work: tuple[Case, list[int], argparse.Namespace]) -> tuple[list[dict], dict]:
    case, seeds, options = work
    node, touch = Node(case, options), Touch(Arm())
    results = [Episode(node, touch, case, options).run(seed, COLOURS[seed % len(COLOURS)]) for seed in seeds]
    node.close()
    return results, node.about


def wilson(successes: int, n: int) -> tuple[float, float]:
    """The 95% interval of a rate."""
    z, p = 1.96, successes / n
    middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return (middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n)


def summary(case: Case, results: list[dict]) -> dict:
    n = len(results)
    right = [r for r in results if r["touched"] == r["wanted"]]
    jumps = np.array([j for r in results for j in r["jumps"]])
    return {
        "case": case.name,
        "episodes": n,
        "success": len(right) / n,
        "interval": wilson(len(right), n),
        "wrong": sum(r["touched"] not in (None, r["wanted"]) for r in results) / n,
        "seconds": float(np.median([r["seconds"] for r in right])) if right else None,
        # Of every seam; none are known where the node is looked at from outside.
        **{f"jump_{name}": float(np.percentile(jumps, q)) if len(jumps) else None for name, q in QUANTILES.items()},
        "published_jump": max(r["published_jump"] for r in results),
        "tracking": max(r["tracking"] for r in results),
        "jerk": float(np.median([r["jerk_rms"] for r in results])),
        "interventions": float(np.mean([r["interventions"] for r in results])),
        "starved": sum(r["starved"] for r in results),
        "stopped": sum(r["mode"] not in ("ramp", "run", "coast") for r in results),
    }


HEAD = (
    "| | success (95% interval) | wrong block | median time | seam jump median / p95 / largest | largest published jump "
    "| largest tracking error | jerk, rms | limit interventions an episode |\n" + "| --- " * 9 + "|"
)


def row(s: dict) -> str:
    low, high = s["interval"]
    took = "-" if s["seconds"] is None else f"{s['seconds']:.2f} s"
    jumps = "-" if s["jump_max"] is None else " / ".join(f"{1e3 * s[f'jump_{q}']:.1f}" for q in QUANTILES) + " mrad"
    return (
        f"| {s['case']} | {100 * s['success']:.1f}% ({100 * low:.0f}–{100 * high:.0f}) of {s['episodes']} | {100 * s['wrong']:.1f}% | {took} "
        f"| {jumps} | {1e3 * s['published_jump']:.1f} mrad | {1e3 * s['tracking']:.1f} mrad | {s['jerk']:.0f} rad/s³ "
        f"| {s['interventions']:.1f} |"
    )


def cases(options: argparse.Namespace) -> list[Case]:
    base = {"seam": options.seam, "pipeline_mode": options.pipeline_mode}
    if options.sweep is None:
        return [Case("as configured", base, options.added_latency_ms)]
    table = {
        "seam": [Case(f"seam {s}, {ms} ms added", {**base, "seam": s}, ms) for ms in (0, 100, 200, 400) for s in ("rtc", "crossfade", "none")],
        "pipeline": [Case(f"pipeline {m}", {**base, "pipeline_mode": m}) for m in ("sequential", "pipelined", "dual_rate")],
        "senses": [Case("black images", base, blind=True), Case("another block asked for on the way", base, swap=True)],
    }
    return [case for name in options.sweep for case in table[name]]


def plot(rows: list[dict], path: Path) -> None:
    """Success over added latency by seam, as SVG without a plotting library."""
    points: dict[str, list[tuple[float, dict]]] = {}
    for s in rows:
        words = s["case"].split()
        if words[0] == "seam":
            points.setdefault(words[1].rstrip(","), []).append((float(words[2]), s))
    if not points:
        return
    colours = {"rtc": "#0a7d4f", "crossfade": "#2a5bd7", "none": "#c23b22"}

    def x(ms: float) -> float:
        return 60 + 0.95 * ms

    def y(rate: float) -> float:
        return 220 - 190 * rate

    parts = ['<svg xmlns="http://www.w3.org/2000/svg" width="520" height="270" font-family="sans-serif" font-size="12">',
             '<rect width="520" height="270" fill="white"/>']
    for rate in (0, 0.25, 0.5, 0.75, 1):
        parts.append(f'<path d="M60 {y(rate)}H450" stroke="#ddd"/><text x="52" y="{y(rate) + 4}" text-anchor="end">{100 * rate:.0f}%</text>')
    for ms in (0, 100, 200, 400):
        parts.append(f'<text x="{x(ms)}" y="238" text-anchor="middle">{ms}</text>')
    parts.append('<text x="250" y="258" text-anchor="middle">added latency, ms; bars are 95% intervals</text>')
    for k, (seam, line) in enumerate(points.items()):
        colour, shift = colours.get(seam, "black"), 4 * (k - 1)
        way = " ".join(f"{x(ms) + shift},{y(s['success'])}" for ms, s in sorted(line, key=lambda p: p[0]))
        parts.append(f'<polyline points="{way}" fill="none" stroke="{colour}" stroke-width="2"/>')
        for ms, s in line:
            low, high = s["interval"]
            parts.append(f'<path d="M{x(ms) + shift} {y(low)}V{y(high)}" stroke="{colour}"/><circle cx="{x(ms) + shift}" cy="{y(s["success"])}" r="3" fill="{colour}"/>')
        parts.append(f'<text x="456" y="{60 + 18 * k}" fill="{colour}">{seam}</text>')
    path.write_text("\n".join(parts) + "\n</svg>\n")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts/evaluate", description=__doc__.split("\n")[0])
    parser.add_argument("--episodes", type=int, default=200, metavar="N", help="seeds a row (default 200)")
    parser.add_argument("--first-seed", type=int, default=0, metavar="SEED", help="seeds from 1000000 on were trained on")
    parser.add_argument("--live", action="store_true", help="in real time over real topics, instead of in virtual time")
    parser.add_argument("--sweep", nargs="+", choices=("seam", "pipeline", "senses"), help="rows of the table, instead of one")
    parser.add_argument("--seam", default="rtc", choices=("rtc", "crossfade", "none"))
    parser.add_argument("--pipeline-mode", default="pipelined", choices=("sequential", "pipelined", "dual_rate"))
    parser.add_argument("--added-latency-ms", type=float, default=0.0, metavar="MS", help="for every chunk")
    parser.add_argument("--encode-ms", type=float, default=40.0, metavar="MS", help="virtual time of an encode (default 40)")
    parser.add_argument("--decode-ms", type=float, default=40.0, metavar="MS", help="virtual time of a decode (default 40)")
    parser.add_argument("--camera-rate", type=float, default=15.0, metavar="HZ", help="images a second and camera")
    parser.add_argument("--device", default="cpu", help="cpu or cuda:N")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), metavar="N")
    parser.add_argument("--checkpoint", type=Path, default=ROOT / "checkpoints/touch", metavar="DIR")
    parser.add_argument("--at-least", type=float, metavar="RATE", help="exit code 1 if a row succeeds less often, for tests")
    parser.add_argument("--out", type=Path, metavar="DIR", help="write results.json, table.md and latency.svg there")
    parser.add_argument("--pi0", type=Path, default=ROOT / "target/ros/release/pi0", help=argparse.SUPPRESS)
    parser.add_argument("--control-node", type=Path, default=ROOT / "target/ros/release/control_node", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.live and (options.sweep or options.added_latency_ms):
        parser.error("--live goes without --sweep and --added-latency-ms: what it takes is what it takes")
    if options.episodes < 1:
        parser.error(f"--episodes is {options.episodes}; it must be at least 1")
    if not options.checkpoint.is_dir():
        parser.error(f"--checkpoint {options.checkpoint} is not a folder; give one that holds config.json and model.safetensors")
    return options


def write(folder: Path, rows: list[dict], kept: list[dict]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps(kept))
    (folder / "table.md").write_text(HEAD + "\n" + "\n".join(map(row, rows)) + "\n")
    plot(rows, folder / "latency.svg")


def tell(result: dict) -> None:
    took = "" if result["seconds"] is None else f" after {result['seconds']:.2f} s"
    why = "" if result["touched"] == result["wanted"] else f"; mode {result['mode']}, {result['reason']}"
    print(f"  seed {result['seed']}: asked for {result['wanted']}, touched {result['touched']}{took}{why}", file=sys.stderr, flush=True)


def in_virtual_time(case: Case, seeds: list[int], options: argparse.Namespace) -> tuple[list[dict], dict]:
    count = min(options.processes, len(seeds))
    with multiprocessing.get_context("spawn").Pool(count) as pool:
        parts = pool.map(play, [(case, seeds[i::count], options) for i in range(count)])
    return sorted((r for part, _ in parts for r in part), key=lambda r: r["seed"]), parts[0][1]


def over_topics(case: Case, seeds: list[int], options: argparse.Namespace) -> tuple[list[dict], dict]:
    import live  # needs ROS, which the rest does without

    return live.play({"device": options.device, **case.parameters}, seeds, options, tell)


def main() -> int:
    options = parse_arguments()
    seeds = list(range(options.first_seed, options.first_seed + options.episodes))
    rows, kept, failed = [], [], False
    for case in cases(options):
        begun = time.monotonic()
        results, about = (over_topics if options.live else in_virtual_time)(case, seeds, options)
        failed |= len(results) < len(seeds)
        rows.append(summary(case, results))
        kept.append({"summary": rows[-1], "about": about, "episodes": results})
        if len(rows) == 1:
            print(f"{', '.join(f'{k} {v}' for k, v in about.items())}\n\n{HEAD}")
        print(row(rows[-1]), flush=True)
        if options.out:
            # After every row: a long sweep may be ended early.
            write(options.out, rows, kept)
        print(f"{case.name}: {time.monotonic() - begun:.0f} s", file=sys.stderr, flush=True)
        for result in results:
            if not options.live and result["touched"] != result["wanted"]:
                tell(result)
    failed |= options.at_least is not None and any(s["success"] < options.at_least for s in rows)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
