"""The MPS daemon that lets two contexts of one process have their own multiprocessors.

One that already answers is used and left alone; otherwise one is started with directories of its own and ended with the
process that started it.
"""

from __future__ import annotations

import atexit
import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

CONTROL = "nvidia-cuda-mps-control"
ANSWER_S = 5.0
READY_S = 10.0
DIRECTORIES = ["CUDA_MPS_PIPE_DIRECTORY", "CUDA_MPS_LOG_DIRECTORY"]


def ask(command: str, environment: dict[str, str]) -> str | None:
    """The daemon's answer; None if there is no daemon, or none that answers."""
    try:
        done = subprocess.run(
            [CONTROL], input=command + "\n", env=environment, text=True, capture_output=True, timeout=ANSWER_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def answers(environment: dict[str, str]) -> bool:
    """Whether a daemon serves this environment."""
    return ask("get_server_list", environment) is not None


def ensure() -> dict[str, str]:
    """A daemon that answers, and the variables by which a client finds it; RuntimeError if there can be none."""
    if shutil.which(CONTROL) is None:
        raise RuntimeError(f"mps:=true needs {CONTROL}, which comes with the NVIDIA driver; it is not in PATH")
    environment = dict(os.environ)
    if answers(environment):
        return {name: environment[name] for name in DIRECTORIES if name in environment}
    folder = Path(tempfile.mkdtemp(prefix="pi0_mps-"))
    own = dict.fromkeys(DIRECTORIES, str(folder))
    environment |= own
    # Before it is started: also if it never answers, it may run all the same.
    atexit.register(end, environment, folder)
    try:
        start(environment, folder / "start.log")
        deadline = time.monotonic() + READY_S
        while not answers(environment):
            if time.monotonic() > deadline:
                raise RuntimeError(f"no answer within {READY_S:.0f} s")
            time.sleep(0.1)
    except (OSError, RuntimeError, subprocess.SubprocessError) as e:
        said = [log.read_text(errors="replace")[-500:].strip() for log in sorted(folder.glob("*.log"))]
        end(environment, folder)
        raise RuntimeError(f"mps:=true: the MPS daemon does not answer: {'; '.join(filter(None, [*said, str(e)]))}") from e
    return own


def start(environment: dict[str, str], said: Path) -> None:
    """Starts the daemon, its words in that file: it keeps open what it is given, and a pipe would never end."""
    with said.open("wb") as output:
        subprocess.run(
            [CONTROL, "-d"], env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output, timeout=READY_S, check=True
        )


def end(environment: dict[str, str], folder: Path) -> None:
    """Ends the daemon of that folder, which this process started."""
    ask("quit", environment)
    shutil.rmtree(folder, ignore_errors=True)
