"""The picture of bench/eviction.py: hit rate against the size of the cache, a panel a workload. Plain SVG."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

WIDTH, HEIGHT, GAP, LEFT, TOP = 300, 240, 50, 60, 40
COLOURS = {"lru": "#c8553d", "reuse": "#0b6e4f", "optimum": "#8d99ae"}


def draw(rows: Sequence[dict[str, Any]]) -> str:
    """The whole picture. `rows`: `workload`, `policy`, `blocks` and `hit_rate`."""
    workloads = list(dict.fromkeys(row["workload"] for row in rows))
    width = LEFT + len(workloads) * (WIDTH + GAP)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {TOP + HEIGHT + 80}" font-family="sans-serif"'
        ' font-size="11"><rect width="100%" height="100%" fill="white"/>'
    ]
    for number, workload in enumerate(workloads):
        parts += _panel([row for row in rows if row["workload"] == workload], LEFT + number * (WIDTH + GAP))
    for number, (policy, colour) in enumerate(COLOURS.items()):
        left = LEFT + 110 * number
        parts.append(f'<rect x="{left}" y="{TOP + HEIGHT + 54}" width="22" height="4" fill="{colour}"/>')
        parts.append(f'<text x="{left + 28}" y="{TOP + HEIGHT + 60}">{policy}</text>')
    return "\n".join([*parts, "</svg>\n"])


def _panel(rows: Sequence[dict[str, Any]], left: int) -> list[str]:
    sizes = sorted({row["blocks"] for row in rows})
    high = max(row["hit_rate"] for row in rows) * 1.05 or 1.0
    low = min(row["hit_rate"] for row in rows) * 0.95
    span = math.log(sizes[-1] / sizes[0]) or 1.0

    def x(blocks: int) -> float:
        return left + 10 + (WIDTH - 20) * math.log(blocks / sizes[0]) / span

    def y(rate: float) -> float:
        return TOP + HEIGHT * (1 - (rate - low) / (high - low or 1.0))

    parts = [
        f'<rect x="{left}" y="{TOP}" width="{WIDTH}" height="{HEIGHT}" fill="none" stroke="#888"/>',
        f'<text x="{left}" y="{TOP - 14}" font-size="13" font-weight="bold">{rows[0]["workload"]}</text>',
        f'<text x="{left + WIDTH / 2}" y="{TOP + HEIGHT + 34}" text-anchor="middle">blocks of 512 tokens</text>',
    ]
    for blocks in sizes:
        parts.append(f'<text x="{x(blocks):.1f}" y="{TOP + HEIGHT + 16}" text-anchor="middle">{blocks}</text>')
    for part in range(5):
        rate = low + (high - low) * part / 4
        parts.append(f'<text x="{left - 5}" y="{y(rate) + 4:.1f}" text-anchor="end" fill="#555">{rate:.1%}</text>')
    for policy, colour in COLOURS.items():
        mine = sorted((row["blocks"], row["hit_rate"]) for row in rows if row["policy"] == policy)
        where = " ".join(f"{x(blocks):.1f},{y(rate):.1f}" for blocks, rate in mine)
        parts.append(f'<polyline points="{where}" fill="none" stroke="{colour}" stroke-width="1.8"/>')
        parts += [f'<circle cx="{x(b):.1f}" cy="{y(r):.1f}" r="2.8" fill="{colour}"/>' for b, r in mine]
    return parts
