"""The shipped policy does its task: a few seeds in virtual time, so that nothing depends on how fast the machine is."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from harness import ROOT


def evaluate(binaries: Path, out: Path, *options: str) -> dict:
    command = [sys.executable, str(ROOT / "scripts/evaluate.py"), "--pi0", str(binaries / "pi0"), "--out", str(out), *options]
    run = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert run.returncode == 0, run.stderr
    return json.loads((out / "results.json").read_text())[0]


def test_the_shipped_policy_touches_the_named_block(binaries: Path, tmp_path: Path):
    result = evaluate(binaries, tmp_path, "--episodes", "6")
    summary, episodes = result["summary"], result["episodes"]
    assert [e["seed"] for e in episodes] == list(range(6))
    assert {e["wanted"] for e in episodes} == {"red", "green", "blue"}
    assert summary["success"] >= 5 / 6, episodes
    assert summary["stopped"] == 0, episodes
