"""The picture of bench/replay.py: for each workload, what the slowest 5 % of users got against tokens a minute.

Plain SVG, without a library: a panel a workload, both axes logarithmic, a line a scheduler, the floors dashed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

WIDTH, HEIGHT, GAP, LEFT, TOP = 360, 300, 30, 60, 40
COLOURS = ("#0b6e4f", "#58b368", "#c8553d", "#e8a33d", "#3a506b", "#8d99ae", "#7b2d8b")
TPS = (2.0, 500.0)


def draw(points: Sequence[dict[str, Any]], workloads: Sequence[str], floors: Sequence[int]) -> str:
    """The whole picture. `points`: runs with `workload`, `variant`, `tpm` and `tps_p5`."""
    variants = list(dict.fromkeys(sorted((p["variant"] for p in points), key=_rank)))
    colours = {name: COLOURS[n % len(COLOURS)] for n, name in enumerate(variants)}
    width = LEFT + len(workloads) * (WIDTH + GAP) + GAP
    height = TOP + HEIGHT + 60 + 18 * len(variants)
    parts: list[str] = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif"'
        ' font-size="11"><rect width="100%" height="100%" fill="white"/>'
    ]
    for n, workload in enumerate(workloads):
        mine = [p for p in points if p["workload"] == workload and p["tpm"] > 0 and math.isfinite(p["tps_p5"])]
        if mine:
            parts += _panel(mine, workload, LEFT + n * (WIDTH + GAP), floors, colours)
    for n, name in enumerate(variants):
        row = TOP + HEIGHT + 56 + 18 * n
        parts.append(f'<rect x="{LEFT}" y="{row - 9}" width="22" height="4" fill="{colours[name]}"/>')
        parts.append(f'<text x="{LEFT + 30}" y="{row}">{_escape(name)}</text>')
    return "\n".join([*parts, "</svg>\n"])


def _rank(name: str) -> tuple[int, str]:
    return (["tokenrelay", "plain", "vLLM"].index(name.split()[0].strip(",")), name)


def _panel(
    points: Sequence[dict[str, Any]], title: str, left: int, floors: Sequence[int], colours: dict[str, str]
) -> list[str]:
    low = min(p["tpm"] for p in points) * 0.9
    high = max(p["tpm"] for p in points) * 1.1

    def x(tpm: float) -> float:
        return left + WIDTH * math.log(tpm / low) / math.log(high / low)

    def y(tps: float) -> float:
        inside = min(max(tps, TPS[0]), TPS[1])
        return TOP + HEIGHT * (1 - math.log(inside / TPS[0]) / math.log(TPS[1] / TPS[0]))

    parts = [
        f'<rect x="{left}" y="{TOP}" width="{WIDTH}" height="{HEIGHT}" fill="none" stroke="#888"/>',
        f'<text x="{left}" y="{TOP - 14}" font-size="13" font-weight="bold">{_escape(title)}</text>',
        f'<text x="{left + WIDTH / 2}" y="{TOP + HEIGHT + 34}" text-anchor="middle">tokens a minute (TPM)</text>',
    ]
    if left == LEFT:
        parts.append(
            f'<text x="14" y="{TOP + HEIGHT / 2}" transform="rotate(-90 14 {TOP + HEIGHT / 2})"'
            ' text-anchor="middle">tokens/s of the slowest 5 %</text>'
        )
    for tick in (2, 5, 10, 20, 50, 100, 200, 500):
        parts.append(f'<text x="{left - 6}" y="{y(tick) + 4:.1f}" text-anchor="end" fill="#555">{tick}</text>')
    for tick in _ticks(low, high):
        parts.append(
            f'<text x="{x(tick):.1f}" y="{TOP + HEIGHT + 16}" text-anchor="middle" fill="#555">{tick / 1e6:g} M</text>'
        )
    for floor in floors:
        parts.append(
            f'<line x1="{left}" x2="{left + WIDTH}" y1="{y(floor):.1f}" y2="{y(floor):.1f}" stroke="#bbb"'
            ' stroke-dasharray="5 4"/>'
        )
    for name, colour in colours.items():
        mine = sorted({(p["load"], p["tpm"], p["tps_p5"]) for p in points if p["variant"] == name})
        where = " ".join(f"{x(tpm):.1f},{y(tps):.1f}" for _, tpm, tps in mine)
        parts.append(f'<polyline points="{where}" fill="none" stroke="{colour}" stroke-width="1.6"/>')
        parts += [f'<circle cx="{x(t):.1f}" cy="{y(s):.1f}" r="2.6" fill="{colour}"/>' for _, t, s in mine]
    return parts


def _ticks(low: float, high: float) -> list[float]:
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [step * 10.0**decade for decade in decades for step in (1, 2, 5)]
    return [tick for tick in ticks if low <= tick <= high]


def _escape(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;")
