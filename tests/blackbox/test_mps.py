"""The launch argument mps:=true against a stand-in for nvidia-cuda-mps-control that keeps its state in the pipe directory.

The real daemon needs a GPU: scripts/gpu-check partition runs under one.
"""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent

STAND_IN = """\
    #!/bin/sh
    dir=${CUDA_MPS_PIPE_DIRECTORY:-$DEFAULT_PIPE}
    echo "$* in $dir" >> "$JOURNAL"
    if [ "$1" = -d ]; then
        [ "$REFUSE" ] && echo "no such device" >&2 && exit 1
        [ "$HOLD" ] && sleep 20 &
        touch "$dir/running"; exit 0
    fi
    [ -e "$dir/running" ] || exit 1
    read -r command
    echo "$command" >> "$JOURNAL"
    [ "$command" = quit ] && rm "$dir/running"
    [ "$MUTE" ] && exit 1
    exit 0
"""


@pytest.fixture()
def machine(tmp_path: Path) -> dict[str, str]:
    """An environment with the stand-in in PATH and no daemon."""
    control = tmp_path / "bin/nvidia-cuda-mps-control"
    control.parent.mkdir()
    control.write_text(textwrap.dedent(STAND_IN))
    control.chmod(0o755)
    (tmp_path / "default").mkdir()
    return {
        "PATH": f"{control.parent}:/usr/bin:/bin",
        "JOURNAL": str(tmp_path / "journal"),
        "DEFAULT_PIPE": str(tmp_path / "default"),
        "TMPDIR": str(tmp_path),
        "PYTHONPATH": str(ROOT / "launch"),
        "PYTHONDONTWRITEBYTECODE": "1",
    }


def launch(environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    code = "import mps_daemon; mps_daemon.READY_S = 3.0; print(mps_daemon.ensure())"
    return subprocess.run([sys.executable, "-c", code], env=environment, text=True, capture_output=True, timeout=60, check=False)


def test_starts_a_daemon_and_ends_it_with_itself(machine: dict[str, str]) -> None:
    done = launch(machine)
    assert done.returncode == 0, done.stderr
    folder = done.stdout.split("'")[3]
    assert "pi0_mps-" in folder and done.stdout.count(folder) == 2
    journal = Path(machine["JOURNAL"]).read_text()
    assert f"-d in {folder}" in journal and journal.endswith("quit\n")
    assert not Path(folder).exists()


def test_leaves_a_daemon_alone_that_was_there(machine: dict[str, str]) -> None:
    running = Path(machine["DEFAULT_PIPE"]) / "running"
    running.touch()
    done = launch(machine)
    assert done.stdout == "{}\n", done.stderr
    assert running.exists() and "-d" not in Path(machine["JOURNAL"]).read_text()


def test_says_why_there_is_none(machine: dict[str, str]) -> None:
    refused = launch(machine | {"REFUSE": "1"})
    assert refused.returncode != 0 and "does not answer: no such device" in refused.stderr
    absent = launch(machine | {"PATH": "/usr/bin:/bin"})
    assert "which comes with the NVIDIA driver; it is not in PATH" in absent.stderr


def test_a_daemon_that_keeps_what_it_is_given_open_is_started_all_the_same(machine: dict[str, str]) -> None:
    done = launch(machine | {"HOLD": "1"})
    assert done.returncode == 0, done.stderr
    assert Path(machine["JOURNAL"]).read_text().endswith("quit\n")


def test_a_daemon_that_does_not_answer_is_ended(machine: dict[str, str]) -> None:
    refused = launch(machine | {"MUTE": "1"})
    assert refused.returncode != 0 and "does not answer: no answer within 3 s" in refused.stderr, refused.stderr
    assert "quit" in Path(machine["JOURNAL"]).read_text()
    assert not list(Path(machine["TMPDIR"]).glob("pi0_mps-*"))
