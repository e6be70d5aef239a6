#!/usr/bin/env python3
"""Draws a piece of a trace written by --trace as SVG: one line for each kind of span.

    scripts/trace_picture.py TRACE.json FROM_MS LENGTH_MS OUT.svg [TITLE]
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from xml.sax.saxutils import escape

COLOURS = ["#2a6fb0", "#d1495b", "#3a7d44", "#b00020", "#e0a030", "#8a6d3b"]
LEFT, WIDTH, ROW, TOP = 90.0, 860.0, 34.0, 46.0


def draw(trace: dict, begin: float, length: float, title: str) -> str:
    names = {e["tid"]: e["args"]["name"] for e in trace["traceEvents"] if e["ph"] == "M"}
    spans = [e for e in trace["traceEvents"] if e["ph"] == "X" and begin <= e["ts"] / 1e3 < begin + length]
    rows = sorted({e["tid"] for e in spans})
    scale = (WIDTH - LEFT - 20) / length
    height = TOP + ROW * len(rows) + 40
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH:.0f} {height:.0f}" font-family="sans-serif" font-size="12">',
        '<rect width="100%" height="100%" fill="white"/>',
        f'<text x="{LEFT}" y="24" font-size="14">{escape(title)}</text>',
    ]
    step = next(s for s in (1, 2, 5, 10, 20, 50, 100, 1000) if length / s <= 12)
    for i in range(int(length / step) + 1):
        x = LEFT + i * step * scale
        out.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{TOP - 6}" y2="{height - 30:.0f}" stroke="#ddd"/>')
        out.append(f'<text x="{x:.1f}" y="{height - 14:.0f}" text-anchor="middle">{i * step} ms</text>')
    for row, tid in enumerate(rows):
        y = TOP + ROW * row
        out.append(f'<text x="{LEFT - 8}" y="{y + 17}" text-anchor="end">{escape(names[tid])}</text>')
        for e in (e for e in spans if e["tid"] == tid):
            x, width = LEFT + (e["ts"] / 1e3 - begin) * scale, min(e["dur"] / 1e3, begin + length - e["ts"] / 1e3) * scale
            out.append(
                f'<rect x="{x:.1f}" y="{y}" width="{max(width - 1, 1):.1f}" height="24" fill="{COLOURS[(tid - 1) % 6]}"/>'
                f'<text x="{x + 4:.1f}" y="{y + 16}" fill="white">{e["name"].split()[-1] if width > 24 else ""}</text>'
            )
    return "\n".join([*out, "</svg>\n"])


if __name__ == "__main__":
    source, begin, length, target = sys.argv[1:5]
    title = sys.argv[5] if len(sys.argv) > 5 else Path(source).name
    Path(target).write_text(draw(json.loads(Path(source).read_text()), float(begin), float(length), title))
