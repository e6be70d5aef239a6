#!/usr/bin/env python3
"""Draws a flight recording as SVG: modes, then commanded and measured position of each joint, chunks, what the log says.

    scripts/recording_picture.py RECORDING.mcap OUT.svg [JOINT...]

Needs the Python package rosbags (`pip install rosbags`); .local/venv has it.
"""

from __future__ import annotations

import sys
from pathlib import Path
from xml.sax.saxutils import escape

from rosbags.highlevel import AnyReader

MODES = {"ramp": "#e0a030", "run": "#3a7d44", "coast": "#c77d1e", "stopping": "#d1495b", "stopped": "#8a3b3b", "fault": "#b00020"}
COMMAND, MEASURED, CHUNK = "#2a6fb0", "#e0703a", "#bbb"
WARN = 30
LEFT, WIDTH, ROW, TOP, SAID = 150.0, 900.0, 90.0, 70.0, 18.0


def read(path: Path) -> tuple[list, list[float], list[tuple[float, str]], list[str]]:
    """Ticks and chunks with their times, what was logged, and the names of the joints."""
    ticks, chunks, said, joints = [], [], [], []
    with AnyReader([path]) as reader:
        for connection, recorded, data in reader.messages():
            message = lambda: reader.deserialize(data, connection.msgtype)  # noqa: B023, E731
            if connection.msgtype == "pi0_mps/msg/Tick":
                ticks.append((recorded * 1e-9, message()))
            elif connection.topic.endswith("/action_chunk"):
                chunks.append(recorded * 1e-9)
                joints = joints or list(message().joint_names)
            elif connection.topic == "/rosout" and ((log := message()).level >= WARN or log.msg.startswith("mode: ")):
                said.append((recorded * 1e-9, log.msg))
    if not ticks:
        sys.exit(f"{path} holds no ticks: is it a recording of the node's own?")
    return ticks, chunks, said, joints


def draw(path: Path, wanted: list[str]) -> str:
    ticks, chunks, said, names = read(path)
    names = names or [f"joint {i}" for i in range(len(ticks[0][1].measured))]
    if unknown := set(wanted) - set(names):
        sys.exit(f"no joint {', '.join(sorted(unknown))}; there are {', '.join(names)}")
    joints = [i for i, name in enumerate(names) if name in wanted] or list(range(len(names)))
    begin, end = ticks[0][0], ticks[-1][0]
    scale = (WIDTH - LEFT - 20) / max(end - begin, 1e-3)
    x = lambda t: LEFT + (t - begin) * scale  # noqa: E731
    bottom = TOP + ROW * len(joints)
    height = bottom + 24 + SAID * len(said)
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH:.0f} {height:.0f}" font-family="sans-serif" font-size="12">',
        '<rect width="100%" height="100%" fill="white"/>',
        f'<text x="{LEFT}" y="20" font-size="14">{escape(path.name)}</text>',
        f'<text x="{LEFT}" y="38" fill="{COMMAND}">commanded</text><text x="{LEFT + 80}" y="38" fill="{MEASURED}">measured</text>'
        f'<text x="{LEFT + 150}" y="38" fill="#777">grey lines: chunks</text>',
    ]
    first = 0
    for i in range(1, len(ticks) + 1):
        if i == len(ticks) or ticks[i][1].mode_name != ticks[first][1].mode_name:
            mode, to = ticks[first][1].mode_name, ticks[min(i, len(ticks) - 1)][0]
            width = x(to) - x(ticks[first][0])
            out.append(f'<rect x="{x(ticks[first][0]):.1f}" y="46" width="{width:.1f}" height="16" fill="{MODES.get(mode, "#ccc")}"/>')
            if width > 7 * len(mode):
                out.append(f'<text x="{x(ticks[first][0]) + 4:.1f}" y="58" fill="white">{mode}</text>')
            first = i
    out += [f'<line x1="{x(t):.1f}" x2="{x(t):.1f}" y1="{TOP}" y2="{bottom}" stroke="{CHUNK}" stroke-width="0.5"/>' for t in chunks if begin <= t <= end]
    for row, joint in enumerate(joints):
        lines = {
            COMMAND: [(t, m.command[joint]) for t, m in ticks if len(m.command) and m.published],
            MEASURED: [(t, m.measured[joint]) for t, m in ticks if len(m.measured) and m.measured[joint] == m.measured[joint]],
        }
        values = [v for line in lines.values() for _, v in line] or [0.0]
        low, high = min(values), max(values)
        margin = max((high - low) * 0.1, 1e-3)
        low, high = low - margin, high + margin
        y = lambda v: TOP + ROW * (row + 1) - 8 - (v - low) / (high - low) * (ROW - 16)  # noqa: B023, E731
        out.append(f'<text x="{LEFT - 8}" y="{TOP + ROW * row + ROW / 2:.0f}" text-anchor="end">{escape(names[joint])}</text>')
        out.append(f'<text x="{LEFT - 8}" y="{TOP + ROW * row + ROW / 2 + 16:.0f}" text-anchor="end" fill="#777">{low:.3f} to {high:.3f}</text>')
        for colour, line in lines.items():
            points = " ".join(f"{x(t):.1f},{y(v):.1f}" for t, v in line)
            out.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="1.4"/>')
    step = next(s for s in (0.1, 0.2, 0.5, 1, 2, 5, 10, 60) if (end - begin) / s <= 12)
    for i in range(int((end - begin) / step) + 1):
        out.append(f'<text x="{LEFT + i * step * scale:.1f}" y="{bottom + 14:.0f}" text-anchor="middle">{i * step:g} s</text>')
    for i, (t, text) in enumerate(said):
        if text.startswith("mode: "):
            out.append(f'<line x1="{x(t):.1f}" x2="{x(t):.1f}" y1="46" y2="{bottom}" stroke="#444" stroke-dasharray="3 3"/>')
        out.append(f'<text x="{LEFT}" y="{bottom + 34 + SAID * i:.0f}">{t - begin:.2f} s   {escape(text)}</text>')
    return "\n".join([*out, "</svg>\n"])


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    Path(sys.argv[2]).write_text(draw(Path(sys.argv[1]), sys.argv[3:]))
