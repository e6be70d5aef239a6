"""A short run of the demo: the accounting of its summary, and the arm in physics."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from harness import ROOT


@pytest.fixture
def command(binaries: Path, tmp_path: Path) -> list[str]:
    return [
        sys.executable, str(ROOT / "scripts/demo.py"), "--json", "--log-folder", str(tmp_path),
        "--control-node", str(binaries / "control_node"),
    ]


def check(summary: dict) -> None:
    assert summary["ticks"] == summary["published"] + summary["skipped"] + summary["unarmed"]
    assert summary["unarmed"] == 0
    assert abs(summary["ticks"] - 50 * summary["seconds"]) <= 1
    assert summary["chunks"] > 0
    assert summary["sim"]["refused"] == 0
    assert summary["sim"]["at_rest"]
    for name in ("chunk_age_ms", "encode_ms", "decode_ms"):
        quantiles = summary[name]
        assert 0 <= quantiles["p50"] <= quantiles["p99"] <= quantiles["max"]


def test_demo_does_its_task_and_keeps_its_books(binaries: Path, tmp_path: Path):
    """As the README says to run it."""
    command = [str(ROOT / "scripts/demo"), "--json", "--log-folder", str(tmp_path), "--duration", "10"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert run.returncode == 0, run.stderr
    summary = json.loads(run.stdout.splitlines()[-1])
    check(summary)
    # Two turns at least; how many more depends on the machine.
    task = summary["task"]
    assert task["asked"] >= 2 and task["touched"] >= 1, run.stderr
    assert task["touched"] + task["wrong"] <= task["asked"]


def test_demo_interrupted(command: list[str]):
    demo = subprocess.Popen(
        [*command, "--duration", "600"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    seen = []
    for line in demo.stderr:
        seen.append(line)
        if "Hz" in line:
            time.sleep(1.0)
            os.killpg(demo.pid, signal.SIGINT)  # what Ctrl-C in a terminal does
            break
    out, err = demo.communicate(timeout=120)
    assert demo.returncode == 0, "".join(seen) + err
    check(json.loads(out.splitlines()[-1]))
