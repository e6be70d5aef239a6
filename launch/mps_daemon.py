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
    started = subprocess.run([CONTROL, "-d"], env=environment, text=True, capture_output=True, timeout=READY_S, check=False)
    # Also if it never answers: it may have been started all the same.
    atexit.register(end, environment, folder)
    deadline = time.monotonic() + READY_S
    while not answers(environment):
        if started.returncode != 0 or time.monotonic() > deadline:
            said = "\n".join([started.stderr.strip(), *(log.read_text()[-500:] for log in folder.glob("*.log"))]).strip()
            raise RuntimeError(f"mps:=true: the MPS daemon does not answer: {said or 'it says nothing'}")
        time.sleep(0.1)
    return own


def end(environment: dict[str, str], folder: Path) -> None:
    """Ends the daemon of that folder, which this process started."""
    ask("quit", environment)
    shutil.rmtree(folder, ignore_errors=True)
