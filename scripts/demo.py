"""The demo: a simulated arm, the control node with a small trained policy, a live line a second, a summary.

It says which of three blocks to touch, and names the next one when that is done or eight seconds are over. Started by
scripts/demo, which sets up ROS 2 and builds the node.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import time
from pathlib import Path

from harness import MOVING_MODES, ROOT, count, number
from pair import Pair, PairError
from touch import COLOURS, PROMPT, TIME_LIMIT_S

# Longer than stop_time_ms of the robot's parameters plus the way there.
STANDSTILL_S = 1.0
COUNTERS = ["ticks", "published", "skipped", "unarmed", "deadline_misses", "chunks", "interventions"]
QUANTILES = ["p50", "p99", "max"]
PIPELINE_MODES = ["sequential", "pipelined", "dual_rate"]


class Task:
    """Which block is asked for, and what became of it."""

    def __init__(self):
        self.turns: list[dict] = []
        self._seen = 0

    def hear(self, touched: list, now: float) -> str | None:
        """What the robot says of contacts so far; a line to print when that settles the running turn."""
        new, self._seen = touched[self._seen :], len(touched)
        turn = self.turns[-1] if self.turns else None
        if not turn or turn["touched"] is not None:
            return None
        for colour, _ in new:
            turn["touched"] = colour
            turn["seconds"] = round(now - turn["asked_at"], 1)
            return f"  touched the {colour} block after {turn['seconds']:.1f} s" + ("" if colour == turn["colour"] else ": the wrong one")
        return None

    def next_prompt(self, now: float) -> str | None:
        """The next sentence, when the running turn is settled or its time is over."""
        if self.turns and self.turns[-1]["touched"] is None and now - self.turns[-1]["asked_at"] < TIME_LIMIT_S:
            return None
        colour = COLOURS[len(self.turns) % len(COLOURS)]
        self.turns.append({"colour": colour, "asked_at": now, "touched": None, "seconds": None})
        return PROMPT.format(colour)

    def summary(self) -> dict:
        """The last turn counts only once it is settled."""
        over = [t for i, t in enumerate(self.turns) if i + 1 < len(self.turns) or t["touched"]]
        right = [t for t in over if t["touched"] == t["colour"]]
        wrong = sum(t["touched"] not in (None, t["colour"]) for t in over)
        return {"asked": len(over), "touched": len(right), "wrong": wrong, "seconds": [t["seconds"] for t in right]}


class Demo(Pair):
    """The two processes, and the task that they are given."""

    def __init__(self, options: argparse.Namespace):
        self.options, self.task = options, Task()
        for number_ in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number_, self._on_signal)
        robot = ["--seed", str(options.seed)]
        for name in ("picture", "film"):
            if path := getattr(options, name):
                robot += [f"--{name}", str(path.resolve())]
        parameters = {"pipeline_mode": options.pipeline_mode} if options.pipeline_mode else {}
        super().__init__(options.control_node, options.checkpoint, options.log_folder, robot, parameters)

    def _on_signal(self, *_) -> None:
        self.interrupted = True

    def on_report(self, report: dict[str, str]) -> None:
        touched = json.loads(report.get("touched", "[]"))
        if line := self.task.hear(touched, time.monotonic()):
            self.options.say(line)

    def run(self) -> None:
        """Until the duration is over, or Ctrl-C."""
        end = time.monotonic() + self.options.duration
        next_line = time.monotonic() + 1.0
        shown = None
        while not self.interrupted and time.monotonic() < end:
            self.spin()
            if prompt := self.task.next_prompt(time.monotonic()):
                self.options.say(f"  \"{prompt}\"")
                self.say(prompt)
            if time.monotonic() >= next_line and self.statuses and self.statuses[-1] is not shown:
                next_line += 1.0
                shown = self.statuses[-1]
                self.options.say(live_line(self.moving()))
            if self.moving() and self.mode not in MOVING_MODES:
                raise PairError(f"the node stopped the arm: {self.statuses[-1].get('reason')}")

    def moving(self) -> list[dict[str, str]]:
        """The statuses while armed, without the ones of a stop."""
        return [s for s in self.statuses if s.get("mode") in MOVING_MODES]

    def close(self) -> tuple[int | None, dict | None]:
        """The exit code of the node and the robot's report. The robot outlives the node, to see its last trajectory."""
        code = self.shutdown(600.0 if self.options.film else 30.0, STANDSTILL_S)
        lines = [line for line in self.robot.text().splitlines() if line.startswith("{")]
        return code, json.loads(lines[-1]) if lines else None


def live_line(statuses: list[dict[str, str]]) -> str:
    if not statuses:
        return "armed, nothing published yet"
    first, last = statuses[0], statuses[-1]
    before = statuses[-2] if len(statuses) > 1 else first
    span = number(last, "seconds") - number(before, "seconds")
    rate = (count(last, "published") - count(before, "published")) / span if span > 0 else 0.0
    return (
        f"{number(last, 'seconds') - number(first, 'seconds'):6.1f} s  {rate:5.1f} Hz  {last['mode']:<5}  "
        f"chunk age {text(last, 'chunk_age_ms_p50')} ms  encode {text(last, 'encode_ms_p50')} ms  "
        f"decode {text(last, 'decode_ms_p50')} ms  chunks {last['chunks']}  misses {last['deadline_misses']}  "
        f"interventions {last['interventions']}"
    )


def text(values: dict[str, str], key: str) -> str:
    value = number(values, key)
    return "    -" if value is None else f"{value:5.1f}"


def summarise(moving: list[dict[str, str]], robot: dict | None, task: dict) -> dict:
    """Counters as differences between the first status after arming and the last one before the stop."""
    first, last = moving[0], moving[-1]
    summary = {"seconds": round(number(last, "seconds") - number(first, "seconds"), 4)}
    summary |= {key: count(last, key) - count(first, key) for key in COUNTERS}
    for name in ("chunk_age_ms", "encode_ms", "decode_ms"):
        summary[name] = {q: number(last, f"{name}_{q}") for q in QUANTILES}
    summary |= {key: number(last, key) for key in ("max_seam_jump_rad", "max_tracking_error_rad")}
    summary |= {"mode": last["mode"], "pipeline_mode": last["pipeline_mode"]}
    summary["task"] = task
    keys = ("max_tracking_error_rad", "max_jump_rad", "refused", "accepted", "at_rest", "camera_frames")
    summary["sim"] = {key: robot[key] for key in keys} if robot else None
    return summary


def problems(code: int | None, summary: dict | None, robot: dict | None) -> list[str]:
    """What must not be so after a run."""
    found = []
    if code != 0:
        found.append("the node did not end on SIGINT and was killed" if code is None else f"the node's exit code is {code}")
    if summary and summary["ticks"] != summary["published"] + summary["skipped"] + summary["unarmed"]:
        found.append("ticks are not published + skipped + unarmed")
    if robot is None:
        found.append("the simulated robot left no report")
    else:
        if robot["refused"]:
            found.append(f"the robot refused trajectories: {robot['refused_reasons']}")
        if summary and not robot["last_trajectory_brakes"]:
            found.append("the last published trajectory does not brake")
        if not robot["at_rest"]:
            found.append("the arm was not at rest at the end")
    return found


def table(summary: dict) -> str:
    def quantiles(name: str) -> str:
        values = ("-" if summary[name][q] is None else f"{summary[name][q]:.1f}" for q in QUANTILES)
        return " / ".join(values) + " ms"

    sim, task = summary["sim"] or {}, summary["task"]
    took = ", ".join(f"{s:.1f}" for s in task["seconds"])
    rows = [
        ("blocks touched", f"{task['touched']} of {task['asked']} asked for, {task['wrong']} wrong" + (f"; after {took} s" if took else "")),
        ("ran", f"{summary['seconds']:.1f} s in mode {summary['mode']}, {summary['pipeline_mode']}"),
        ("ticks", f"{summary['ticks']}: {summary['published']} published, {summary['skipped']} skipped"),
        ("deadline misses", summary["deadline_misses"]),
        ("chunks", summary["chunks"]),
        ("chunk age p50 / p99 / max", quantiles("chunk_age_ms")),
        ("encode p50 / p99 / max", quantiles("encode_ms")),
        ("decode p50 / p99 / max", quantiles("decode_ms")),
        ("limit interventions", summary["interventions"]),
        ("largest jump at a seam", f"{summary['max_seam_jump_rad']} rad"),
        ("tracking error, seen by the node", f"{summary['max_tracking_error_rad']} rad"),
        ("tracking error in physics", f"{sim.get('max_tracking_error_rad')} rad"),
        ("largest jump between trajectories", f"{sim.get('max_jump_rad')} rad"),
        ("trajectories refused", f"{sim.get('refused')} of {sim.get('accepted', 0) + sim.get('refused', 0)}"),
    ]
    return "\n".join(f"  {name:<34} {value}" for name, value in rows)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts/demo", description=__doc__.split("\n")[0])
    parser.add_argument("--duration", type=float, default=30.0, metavar="S", help="seconds to run armed (default 30)")
    parser.add_argument("--json", action="store_true", help="print the summary as one line of JSON, the last on stdout")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="write a PNG of the scene")
    parser.add_argument("--film", type=Path, metavar="FILE", help="write an animated PNG of the run, which takes a while at the end")
    parser.add_argument("--pipeline-mode", choices=PIPELINE_MODES, help="instead of the one in config/robots/sim_arm.yaml")
    parser.add_argument("--checkpoint", type=Path, metavar="DIR", default=ROOT / "checkpoints/touch",
                        help="checkpoint of a π0 policy for this robot (default: the trained one of this repository)")
    parser.add_argument("--seed", type=int, default=7, help="where blocks and arm are at the start")
    parser.add_argument("--control-node", type=Path, default=ROOT / "target/ros/release/control_node", help=argparse.SUPPRESS)
    parser.add_argument("--log-folder", type=Path, default=ROOT / ".local/log/demo", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not options.duration > 0:
        parser.error(f"--duration is {options.duration}; it must be more than 0")
    if not options.checkpoint.is_dir():
        parser.error(f"--checkpoint {options.checkpoint} is not a folder; give one that holds config.json and model.safetensors")
    stream = sys.stderr if options.json else sys.stdout
    options.say = lambda line: print(line, file=stream, flush=True)
    return options


def main() -> int:
    options = parse_arguments()
    say = options.say
    demo = Demo(options)
    found = []
    try:
        say("waiting for the node: it loads the policy and warms up")
        if demo.wait(demo.ready, "mode 'active' with an action chunk") and demo.enable():
            say("armed; Ctrl-C ends the demo")
            demo.run()
    except PairError as error:
        found.append(str(error))
    code, robot = demo.close()
    moving = demo.moving()
    summary = summarise(moving, robot, demo.task.summary()) if moving else None
    # After a failure the rest only follows from it.
    found = found or problems(code, summary, robot)
    if summary:
        say("\nsummary\n" + table(summary))
    for name, path in (("picture", options.picture), ("film", options.film)):
        if path and path.exists():
            say(f"  {name}: {path}")
    for problem in found:
        print(f"error: {problem}", file=sys.stderr, flush=True)
    if options.json and summary:
        print(json.dumps(summary), flush=True)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
