"""What the demo and the black-box tests share: a ROS domain of one's own, child processes with logs, the node's status."""

from __future__ import annotations

import fcntl
import os
import random
import signal
import subprocess
import tempfile
import time
from pathlib import Path

from diagnostic_msgs.msg import DiagnosticStatus

ROOT = Path(__file__).resolve().parent.parent
MOVING_MODES = ("ramp", "run", "coast")
# Fast DDS derives its ports from the domain; beyond 101 they fall into Linux's range for outgoing connections.
DOMAINS = range(1, 102)


def claim_domain() -> int:
    """Put this process and its children on a ROS domain that no other run here uses, kept to this machine."""
    for domain in random.sample(DOMAINS, len(DOMAINS)):
        path = Path(tempfile.gettempdir()) / f"pi0_mps-domain-{domain}.lock"
        try:
            lock = os.open(path, os.O_CREAT | os.O_RDWR, 0o666)
        except PermissionError:
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            continue
        # The descriptor stays open, and the lock with it, until this process ends.
        os.environ["ROS_DOMAIN_ID"] = str(domain)
        os.environ["ROS_AUTOMATIC_DISCOVERY_RANGE"] = "LOCALHOST"
        return domain
    raise RuntimeError(f"every ROS domain of {DOMAINS} is taken; remove stale {tempfile.gettempdir()}/pi0_mps-domain-*.lock")


class Process:
    """A child process with its output in a file. It has a session of its own: Ctrl-C reaches the parent alone, which
    then ends its children in order."""

    def __init__(self, name: str, command: list[str], log: Path):
        self.name = name
        self.log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("wb") as output:
            self._child = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
            )
        # Where Linux groups tasks by session, nice(1) says nothing across sessions: the new one gets it as its own.
        try:
            Path(f"/proc/{self._child.pid}/autogroup").write_text(str(os.nice(0)))
        except OSError:
            pass

    @property
    def returncode(self) -> int | None:
        """None while it runs; negative: ended by that signal."""
        return self._child.poll()

    def interrupt(self, number: int = signal.SIGINT) -> None:
        if self.returncode is None:
            self._child.send_signal(number)

    def wait(self, timeout: float) -> int | None:
        """The exit code, or None if it still runs after `timeout` seconds."""
        try:
            return self._child.wait(timeout)
        except subprocess.TimeoutExpired:
            return None

    def end(self, timeout: float = 10.0) -> int | None:
        """SIGINT, then SIGKILL for one that does not listen. None: it had to be killed."""
        self.interrupt()
        code = self.wait(timeout)
        if code is None:
            self._child.kill()
            self._child.wait()
        return code

    def text(self) -> str:
        return self.log.read_text(errors="replace")

    def tail(self, lines: int = 25) -> str:
        return "\n".join(self.text().splitlines()[-lines:])


def status_values(msg: DiagnosticStatus) -> dict[str, str]:
    """The key/value pairs of a status, with its text as `message`."""
    return {"message": msg.message, **{pair.key: pair.value for pair in msg.values}}


def number(values: dict[str, str], key: str) -> float | None:
    """A figure of a status; None where the node has none yet."""
    try:
        value = float(values[key])
    except (KeyError, ValueError):
        return None
    return value if value == value else None


def count(values: dict[str, str], key: str) -> int:
    """A counter of a status."""
    return int(values[key])


def wait_until(condition, timeout: float, step) -> bool:
    """Call `step` until `condition` holds; False after `timeout` seconds."""
    end = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > end:
            return False
        step()
    return True
