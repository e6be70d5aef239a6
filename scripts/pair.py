"""The simulated robot and the node as two processes on a ROS domain of their own, and what they say on their topics."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path

import rclpy
from diagnostic_msgs.msg import DiagnosticStatus
from rclpy.executors import SingleThreadedExecutor
from rclpy.signals import SignalHandlerOptions
from std_msgs.msg import String
from std_srvs.srv import SetBool

from harness import ROOT, Process, claim_domain, count, status_values, wait_until

START_TIMEOUT_S = 120.0
ENABLE_TIMEOUT_S = 5.0


class PairError(Exception):
    """It cannot go on; the text says why."""


class Pair:
    """`robot` are arguments of sim_robot.py, `parameters` go on top of the robot's files. Everything waits by spinning,
    so callbacks come while one waits and never else."""

    interrupted = False

    def __init__(self, control_node: Path, checkpoint: Path, log_folder: Path, robot: list[str], parameters: dict[str, str]):
        self.statuses: list[dict[str, str]] = []
        claim_domain()
        command = [sys.executable, str(ROOT / "scripts/sim_robot.py"), "--json", *robot]
        self.robot = Process("simulated robot", command, log_folder / "robot.log")
        command = [str(control_node), "--ros-args"]
        for name in ("sim_arm.yaml", "sim_arm_touch.yaml"):
            command += ["--params-file", str(ROOT / "config/robots" / name)]
        for name, value in {"checkpoint": checkpoint, **parameters}.items():
            command += ["-p", f"{name}:={value}"]
        self.policy = Process("control_node", command, log_folder / "control_node.log")
        rclpy.init(args=[], signal_handler_options=SignalHandlerOptions.NO)
        self.watcher = rclpy.create_node("watcher")
        self.watcher.create_subscription(DiagnosticStatus, "/pi0_mps/status", self._on_status, 50)
        self.watcher.create_subscription(DiagnosticStatus, "/sim_robot/report", self._on_report, 1)
        self._prompt = self.watcher.create_publisher(String, "/pi0_mps/prompt", 1)
        self._enable = self.watcher.create_client(SetBool, "/pi0_mps/enable")
        self._executor = SingleThreadedExecutor()
        self._executor.add_node(self.watcher)

    def _on_status(self, msg: DiagnosticStatus) -> None:
        self.statuses.append(status_values(msg))

    def _on_report(self, msg: DiagnosticStatus) -> None:
        self.on_report(status_values(msg))

    def on_report(self, report: dict[str, str]) -> None:
        """What the robot says of its trajectories and of what it touched."""

    @property
    def status(self) -> dict[str, str]:
        return self.statuses[-1] if self.statuses else {}

    @property
    def mode(self) -> str:
        return self.status.get("mode", "")

    def ready(self) -> bool:
        """Warmed up, and a first chunk is there: without one the node refuses to arm."""
        return self.mode == "active" and count(self.status, "chunks") > 0

    def say(self, prompt: str) -> None:
        self._prompt.publish(String(data=prompt))

    def spin(self) -> None:
        """Take what came in; raise if a process is gone."""
        self._executor.spin_once(timeout_sec=0.1)
        for process in (self.policy, self.robot):
            if process.returncode is not None:
                raise PairError(f"the {process.name} ended with exit code {process.returncode}; its log:\n{process.tail()}")

    def wait(self, condition: Callable[[], object], what: str, timeout: float = START_TIMEOUT_S) -> bool:
        """False when interrupted."""
        if wait_until(lambda: self.interrupted or condition(), timeout, self.spin):
            return not self.interrupted
        reason = self.status.get("reason", "no status came at all")
        raise PairError(f"no {what} within {timeout:.0f} s (mode '{self.mode}', {reason}); log:\n{self.policy.tail()}")

    def call(self, client, request, what: str):
        """The answer; None when interrupted."""
        if not self.wait(client.service_is_ready, f"service {client.srv_name}"):
            return None
        answer = client.call_async(request)
        return answer.result() if self.wait(answer.done, f"answer {what}") else None

    def enable(self) -> bool:
        """False when interrupted. What the node is still discovering, it refuses at first."""
        end = time.monotonic() + ENABLE_TIMEOUT_S
        while answer := self.call(self._enable, SetBool.Request(data=True), "from /pi0_mps/enable"):
            if answer.success:
                return True
            if time.monotonic() > end:
                raise PairError(f"the node refused to arm: {answer.message}")
            self.wait(lambda again=time.monotonic() + 0.2: time.monotonic() > again, "time")
        return False

    def disarm(self) -> None:
        self.call(self._enable, SetBool.Request(data=False), "from /pi0_mps/enable")

    def shutdown(self, robot_timeout: float = 30.0, standstill_s: float = 0.0) -> int | None:
        """Ends both and gives the node's exit code. The robot outlives the node by `standstill_s`, to see its last
        trajectory."""
        code = self.policy.end()
        if code is not None:
            time.sleep(standstill_s)
        self.robot.end(robot_timeout)
        self._executor.shutdown()
        self.watcher.destroy_node()
        rclpy.try_shutdown()
        return code
