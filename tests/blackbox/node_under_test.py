"""The node as a user sees it: a process, its status and diagnostics, its services and parameters."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from pathlib import Path

from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus
from lifecycle_msgs.msg import Transition, TransitionEvent
from lifecycle_msgs.srv import ChangeState, GetState
from rcl_interfaces.msg import Parameter, ParameterValue, SetParametersResult
from rcl_interfaces.srv import GetParameters, SetParameters
from std_msgs.msg import String
from std_srvs.srv import SetBool, Trigger

from harness import MOVING_MODES, Process, count, status_values
from robot import IdealRobot

TIMEOUT_S = 60.0


class NodeUnderTest:
    """One run of control_node. Topics are read through the robot's rclpy node, which spins in its own thread."""

    def __init__(self, command: list[str], log: Path, robot: IdealRobot, name: str = "/pi0_mps"):
        self.robot = robot
        self.name = name
        self.expected_exit = 0
        self.statuses: list[dict[str, str]] = []
        self.diagnostics: dict[str, list[DiagnosticStatus]] = {}
        self.transitions: list[tuple[str, str, str]] = []
        ros = robot.node
        ros.create_subscription(DiagnosticStatus, f"{name}/status", self._on_status, 100)
        ros.create_subscription(DiagnosticArray, "/diagnostics", self._on_diagnostics, 100)
        ros.create_subscription(TransitionEvent, f"{name}/transition_event", self._on_transition, 100)
        self._prompt = ros.create_publisher(String, f"{name}/prompt", 10)
        self._enable = ros.create_client(SetBool, f"{name}/enable")
        self._stop = ros.create_client(Trigger, f"{name}/stop")
        self._reset = ros.create_client(Trigger, f"{name}/reset")
        self._save_recording = ros.create_client(Trigger, f"{name}/save_recording")
        self._set = ros.create_client(SetParameters, f"{name}/set_parameters")
        self._get = ros.create_client(GetParameters, f"{name}/get_parameters")
        self._change_state = ros.create_client(ChangeState, f"{name}/change_state")
        self._get_state = ros.create_client(GetState, f"{name}/get_state")
        self.process = Process("control_node", command, log)

    def _on_status(self, msg: DiagnosticStatus) -> None:
        self.statuses.append({**status_values(msg), "level": msg.level})

    def _on_diagnostics(self, msg: DiagnosticArray) -> None:
        for status in msg.status:
            self.diagnostics.setdefault(status.name, []).append(status)

    def _on_transition(self, msg: TransitionEvent) -> None:
        self.transitions.append((msg.start_state.label, msg.transition.label, msg.goal_state.label))

    @property
    def status(self) -> dict[str, str]:
        return self.statuses[-1] if self.statuses else {}

    def wait(self, condition: Callable[[], object], what: str, timeout: float = TIMEOUT_S) -> None:
        end = time.monotonic() + timeout
        while not condition():
            code = self.process.returncode
            assert code is None, f"the node ended with {code} before {what}; its log:\n{self.process.tail()}"
            assert time.monotonic() < end, f"no {what} within {timeout} s; status {self.status}\n{self.process.tail()}"
            time.sleep(0.02)

    def wait_for_mode(self, *modes: str) -> None:
        self.wait(lambda: self.status.get("mode") in modes, f"mode {' or '.join(modes)}")

    def wait_for_text(self, *parts: str, key: str = "message") -> str:
        """Until a status says all `parts`; its text."""
        found: list[str] = []

        def said() -> bool:
            found[:] = [s[key] for s in self.statuses if all(p in s.get(key, "") for p in parts)]
            return bool(found)

        self.wait(said, f"status that says {parts}")
        return found[-1]

    def wait_for_diagnostic(self, group: str, level: bytes, *parts: str) -> None:
        """Until /diagnostics shows `group` at `level` with all `parts` in its text or values."""

        def seen() -> bool:
            for name, history in list(self.diagnostics.items()):
                for status in list(history) if name.endswith(group) else []:
                    words = status.message + " " + " ".join(f"{v.key} {v.value}" for v in status.values)
                    if status.level == level and all(p in words for p in parts):
                        return True
            return False

        self.wait(seen, f"diagnostic '{group}' at level {level!r} with {parts}")

    def call(self, client, request):
        self.wait(client.service_is_ready, f"service {client.srv_name}")
        answer = client.call_async(request)
        self.wait(answer.done, f"answer of {client.srv_name}")
        return answer.result()

    def enable(self, on: bool = True) -> SetBool.Response:
        return self.call(self._enable, SetBool.Request(data=on))

    def ask_to_enable(self):
        """Without waiting for the answer."""
        return self._enable.call_async(SetBool.Request(data=True))

    def stop(self) -> Trigger.Response:
        return self.call(self._stop, Trigger.Request())

    def reset(self) -> Trigger.Response:
        return self.call(self._reset, Trigger.Request())

    def save_recording(self) -> Trigger.Response:
        return self.call(self._save_recording, Trigger.Request())

    def change_state(self, label: str) -> bool:
        return self.call(self._change_state, ChangeState.Request(transition=Transition(label=label))).success

    def lifecycle_state(self) -> str:
        return self.call(self._get_state, GetState.Request()).current_state.label

    def say(self, prompt: str) -> None:
        self.wait(lambda: self._prompt.get_subscription_count() > 0, "subscription of ~/prompt")
        self._prompt.publish(String(data=prompt))

    def set_parameter(self, name: str, value: ParameterValue) -> SetParametersResult:
        request = SetParameters.Request(parameters=[Parameter(name=name, value=value)])
        return self.call(self._set, request).results[0]

    def get_parameter(self, name: str) -> ParameterValue:
        return self.call(self._get, GetParameters.Request(names=[name])).values[0]

    def run_armed(self, trajectories: int = 30) -> None:
        """Armed, and moving for so many trajectories. Without a chunk the node refuses to arm."""
        self.wait_for_mode("active")
        chunks = count(self.status, "chunks")
        self.wait(lambda: count(self.status, "chunks") > chunks, "a new chunk")
        # What the node is still discovering, it refuses at first.
        end = time.monotonic() + 5.0
        while not (answer := self.enable()).success:
            assert time.monotonic() < end, answer.message
            time.sleep(0.1)
        self.robot.wait_for(self.robot.count() + trajectories)
        self.wait_for_mode(*MOVING_MODES)

    def kill(self) -> None:
        """Ends it as the kernel does when memory is short."""
        self.expected_exit = -signal.SIGKILL
        self.process.interrupt(signal.SIGKILL)
        assert self.process.wait(10.0) == self.expected_exit

    def close(self) -> int | None:
        return self.process.end(timeout=30.0)

    def check_accounting(self) -> None:
        for status in self.statuses:
            if "ticks" in status:
                parts = [count(status, key) for key in ("published", "skipped", "unarmed")]
                assert count(status, "ticks") == sum(parts), f"ticks {status['ticks']} are not {parts}"
