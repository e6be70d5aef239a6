"""Episodes in real time through the whole node: the simulated robot and control_node as processes, scene after scene."""

from __future__ import annotations

import argparse
import json
import sys
import time

from rcl_interfaces.msg import Parameter, ParameterType, ParameterValue
from rcl_interfaces.srv import SetParameters
from std_srvs.srv import Trigger
from trajectory_msgs.msg import JointTrajectory

from harness import MOVING_MODES, ROOT, count, number
from pair import Pair, PairError
from touch import COLOURS, PROMPT, TIME_LIMIT_S

STATUS_LAG_S = 1.0
REST_TIMEOUT_S = 10.0  # to be at rest after disarming
# In a pipeline two observations may be older than the scene when a chunk comes; the one after that is new.
FRESH_CHUNKS = 3
COUNTERS = ("ticks", "published", "skipped", "unarmed", "deadline_misses")
TIMES = ("chunk_age_ms", "encode_ms", "decode_ms")


class Live(Pair):
    """Both processes, for as many episodes as one likes."""

    def __init__(self, parameters: dict[str, str], first_seed: int, options: argparse.Namespace):
        logs = ROOT / ".local/log/evaluate"
        parameters = {"recorder.folder": str(logs / "recordings"), **parameters}
        robot = ["--seed", str(first_seed), "--camera-rate", str(options.camera_rate)]
        super().__init__(options.control_node, options.checkpoint, logs, robot, parameters)
        self._chunks, self._seed = 0, first_seed
        self._report: dict[str, str] = {}
        self._set = self.watcher.create_client(SetParameters, "/sim_robot/set_parameters")
        self._scene = self.watcher.create_client(Trigger, "/sim_robot/reset")
        self._release = self.watcher.create_client(Trigger, "/pi0_mps/reset")
        self.watcher.create_subscription(JointTrajectory, "/pi0_mps/action_chunk", self._on_chunk, 10)
        self.wait(self.ready, "mode 'active' with an action chunk")

    def _on_chunk(self, _: JointTrajectory) -> None:
        self._chunks += 1

    def on_report(self, report: dict[str, str]) -> None:
        # One of the scene before may still come in.
        if report["seed"] == str(self._seed):
            self._report = report

    def _touched(self) -> list:
        return json.loads(self._report.get("touched", "[]"))

    def _rest(self) -> None:
        """Disarmed and at rest, whatever was before."""
        if self.mode in MOVING_MODES:
            self.disarm()
        self.wait(lambda: self.mode in ("active", "stopped", "fault"), "rest", REST_TIMEOUT_S)
        if self.mode != "active":
            self.call(self._release, Trigger.Request(), "from /pi0_mps/reset")
            self.wait(lambda: self.mode == "active", "mode 'active' after ~/reset", REST_TIMEOUT_S)

    def _show(self, seed: int, prompt: str) -> float:
        """The scene and the sentence, with chunks that know both; when the robot was in the scene (monotonic)."""
        value = ParameterValue(type=ParameterType.PARAMETER_INTEGER, integer_value=seed)
        request = SetParameters.Request(parameters=[Parameter(name="seed", value=value)])
        results = self.call(self._set, request, "about the seed").results
        answer = self.call(self._scene, Trigger.Request(), "from /sim_robot/reset")
        begun = time.monotonic()
        if not (results[0].successful and answer.success):
            raise PairError(f"the robot did not take seed {seed}: {results[0].reason} {answer.message}")
        self._seed, self._report = seed, {}
        self.say(prompt)
        self.wait(lambda: self.status.get("prompt") == prompt, f"status with the prompt '{prompt}'")
        fresh = self._chunks + FRESH_CHUNKS
        self.wait(lambda: self._chunks >= fresh and self._report, "new chunks after a new scene")
        return begun

    def run(self, seed: int, colour: str) -> dict:
        """One episode, in the form that evaluate.py has for its own."""
        self._rest()
        begun = self._show(seed, PROMPT.format(colour))
        before = self.status
        self.enable()
        armed = time.monotonic()
        # The status lags behind the answer.
        self.wait(lambda: self.mode in MOVING_MODES or time.monotonic() - armed > STATUS_LAG_S, "mode after arming")

        def over() -> bool:
            return bool(self._touched()) or self.mode not in MOVING_MODES or time.monotonic() - armed > TIME_LIMIT_S

        self.wait(over, "end of an episode")
        mode, reason, touched, report = self.mode, self.status.get("reason"), self._touched(), self._report
        self._rest()
        after = self.status
        in_time = touched and touched[0][1] - (armed - begun) <= TIME_LIMIT_S
        return {
            "seed": seed,
            "wanted": colour,
            "touched": touched[0][0] if in_time else None,
            "seconds": touched[0][1] - (armed - begun) if in_time else None,
            "jerk_rms": number(report, "jerk_rms_rad_s3"),
            "jumps": [],
            "published_jump": number(report, "max_jump_rad"),
            "tracking": number(report, "max_tracking_error_rad"),
            "refused": count(report, "refused"),
            "dropped_s": number(report, "dropped_s"),
            "interventions": count(after, "interventions") - count(before, "interventions"),
            "starved": count(after, "starved") - count(before, "starved"),
            "mode": mode,
            "reason": reason,
        }

    def about(self) -> dict:
        """Counters and times of the node since its start."""
        status = self.status
        times = {name: [number(status, f"{name}_{q}") for q in ("p50", "p99", "max")] for name in TIMES}
        return {"device": status.get("device"), **{name: count(status, name) for name in COUNTERS}, **times,
                "max_seam_jump_rad": number(status, "max_seam_jump_rad")}


def play(parameters: dict[str, str], seeds: list[int], options: argparse.Namespace, tell) -> tuple[list[dict], dict]:
    """What became of every seed, and what the node says of itself at the end; `tell` hears each result when it is there.
    If it cannot go on, the results are those of the seeds before."""
    live = Live(parameters, seeds[0], options)
    results: list[dict] = []
    try:
        for seed in seeds:
            results.append(live.run(seed, COLOURS[seed % len(COLOURS)]))
            tell(results[-1])
    except PairError as error:
        if not results:
            raise
        print(f"error: {error}", file=sys.stderr)
    finally:
        live.shutdown()
    return results, live.about()
