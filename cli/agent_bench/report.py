"""The result as one HTML file that needs nothing else: what held, the Pareto plot, a table of all loads."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenrelay.cli.agent_bench.measure import Figures

PER_USER = "tokens a second and user (TPS)"
WIDTH, HEIGHT, LEFT, BOTTOM, TOP, RIGHT = 760, 400, 70, 52, 20, 24

STYLE = Path(__file__).parent / "report.css"


def page(result: dict[str, Any]) -> str:
    """The whole file. `result`: as the JSON has it."""
    loads: list[Figures] = result["loads"]
    settings = result["settings"]
    parts = [
        '<!doctype html><html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>Agent bench: {_e(result['model'])}</title><style>{STYLE.read_text()}</style></head><body><main>",
        f"<h1>Agent bench: {_e(result['model'])}</h1>",
        f'<p class="big">{_e(result["summary"])}</p>',
    ]
    if result["interrupted"]:
        parts.append("<p><strong>Interrupted: this is what was measured until then.</strong></p>")
    parts += [
        "<h2>What a user gets against what a device carries</h2>",
        '<p class="muted">Each point is a load. Right: more tokens a minute and device. Up: the median user is faster, '
        "the whisker ends at the slowest 5 %. Filled: the load was held. The bold line is the Pareto front.</p>",
        plot(loads, settings["floor"]),
        f'<h2>Loads</h2><div class="box">{_table(loads)}</div>',
        "<h2>How it was measured</h2><dl>",
        *(f"<dt>{_e(name)}</dt><dd>{_e(value)}</dd>" for name, value in _facts(result).items()),
        "</dl></main></body></html>\n",
    ]
    return "\n".join(parts)


def plot(loads: Sequence[Figures], floor: float) -> str:
    """TPS per user against TPM per device, as SVG."""
    shown = sorted(
        (one for one in loads if one["tps"]["p50"] is not None and one["tpm_per_device"] > 0),
        key=lambda one: one["load"],
    )
    if not shown:
        return "<p>No load gave a point.</p>"
    right, top = (
        _ceiling(max(one["tpm_per_device"] for one in shown)),
        _ceiling(max(floor, *(one["tps"]["p50"] for one in shown)) * 1.05),
    )

    def x(tpm: float) -> float:
        return LEFT + tpm / right * (WIDTH - LEFT - RIGHT)

    def y(tps: float) -> float:
        return HEIGHT - BOTTOM - tps / top * (HEIGHT - TOP - BOTTOM)

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{_e(_spoken(shown))}">']
    end, ground, middle = WIDTH - RIGHT, HEIGHT - BOTTOM, (LEFT + WIDTH) / 2
    for n in range(5):
        value, level = right * n / 4, y(top * n / 4)
        parts.append(f'<line class="line" x1="{LEFT}" x2="{end}" y1="{level:.1f}" y2="{level:.1f}"/>')
        parts.append(_text("axis", LEFT - 8, level + 4, f"{top * n / 4:g}", "end"))
        parts.append(_text("axis", x(value), ground + 18, _short(value)))
    parts.append(_text("axis", middle, HEIGHT - 8, "tokens a minute and device (TPM)"))
    parts.append(f'<g transform="rotate(-90 14 {HEIGHT / 2})">{_text("axis", 14, HEIGHT / 2, PER_USER)}</g>')
    if floor > 0:
        parts.append(f'<line class="floor" x1="{LEFT}" x2="{end}" y1="{y(floor):.1f}" y2="{y(floor):.1f}"/>')
        parts.append(_text("floor-text", end, y(floor) - 6, f"floor {floor:g}", "end"))
    parts.append(_line("path", [(x(one["tpm_per_device"]), y(one["tps"]["p50"])) for one in shown]))
    parts.append(_line("front", [(x(one["tpm_per_device"]), y(one["tps"]["p50"])) for one in pareto(shown)]))
    for one in shown:
        at, high, low = x(one["tpm_per_device"]), y(one["tps"]["p50"]), y(one["tps"]["p5"])
        kind = "held" if one["held"] else "lost"
        parts.append(
            f'<line class="line" x1="{at:.1f}" x2="{at:.1f}" y1="{high:.1f}" y2="{low:.1f}" stroke-width="2"/>'
        )
        parts.append(
            f'<circle class="{kind}" cx="{at:.1f}" cy="{high:.1f}" r="5"><title>{_e(_spoken([one]))}</title></circle>'
        )
        parts.append(f'<text class="label" x="{at + 8:.1f}" y="{high - 8:.1f}">{one["load"]:g}</text>')
    return "".join([*parts, "</svg>"])


def pareto(loads: Sequence[Figures]) -> list[Figures]:
    """Those that no other beats in both, by falling speed."""
    front: list[Figures] = []
    for one in sorted(loads, key=lambda one: (-one["tpm_per_device"], -one["tps"]["p50"])):
        if not front or one["tps"]["p50"] > front[-1]["tps"]["p50"]:
            front.append(one)
    return front[::-1]


def _text(kind: str, x: float, y: float, text: str, anchor: str = "middle") -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{_e(text)}</text>'


def _line(kind: str, points: Sequence[tuple[float, float]]) -> str:
    return f'<polyline class="{kind}" points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in points)}"/>'


def _table(loads: Sequence[Figures]) -> str:
    heads: tuple[str, ...] = (
        "load",
        "TPM/device",
        "output TPM",
        "TPS p50",
        "TPS p5",
        "TTFT p50",
        "TTFT p95",
        "ITL p50",
        "ITL p99",
    )
    heads = (*heads, "cached", "ideal", "done", "failed", "held")
    rows = [f"<tr>{''.join(f'<th scope=col>{head}</th>' for head in heads)}</tr>"]
    for one in sorted(loads, key=lambda one: one["load"]):
        cells = (
            f"{one['load']:g}",
            f"{one['tpm_per_device']:,.0f}",
            f"{one['output_tpm_per_device']:,.0f}",
            _number(one["tps"]["p50"]),
            _number(one["tps"]["p5"]),
            _seconds(one["ttft_s"]["p50"]),
            _seconds(one["ttft_s"]["p95"]),
            _seconds(one["itl_s"]["p50"]),
            _seconds(one["itl_s"]["p99"]),
            _share(one["hit_rate"]),
            _share(one["ideal_hit_rate"]),
            str(one["requests"]),
            str(one["failed"] + one["refused"]),
            "yes" if one["held"] else one["why_not"],
        )
        rows.append(f"<tr>{''.join(f'<td>{_e(cell)}</td>' for cell in cells)}</tr>")
    return f"<table>{''.join(rows)}</table>"


def _facts(result: dict[str, Any]) -> dict[str, str]:
    settings = result["settings"]
    facts = {
        "endpoint": result["endpoint"],
        "date": result["date"],
        "workload": result["workload"],
        "a load": f"{settings['seconds']:g} s, of which the first fifth does not count",
        "devices": str(settings["devices"]),
        "TPM": "prompt and output tokens of requests that ended, a minute and device",
        "TPS": "of one request, from its first token to its last",
        "ITL": "between two chunks of a stream; a chunk may carry several tokens",
        "ideal": "prompt tokens that an infinite cache would have had",
        "held": f"the slowest 5 % got {settings['floor']:g} tokens/s, at most 1 % failed",
        "by": f"tokenrelay {result['version']}",
    }
    if settings["ttft_max_s"] is not None:
        facts["held"] += f", 95 % of first tokens came in {settings['ttft_max_s']:g} s"
    return facts


def _spoken(loads: Sequence[Figures]) -> str:
    said = []
    for one in loads:
        users, slowest = _number(one["tps"]["p50"]), _number(one["tps"]["p5"])
        said.append(f"load {one['load']:g}: {one['tpm_per_device']:,.0f} TPM, users {users} TPS, slowest {slowest}")
    return "; ".join(said)


def _ceiling(value: float) -> float:
    power = 10 ** math.floor(math.log10(value)) if value > 0 else 1.0
    return next(step * power for step in (1, 1.5, 2, 3, 4, 5, 6, 8, 10) if step * power >= value * 0.999)


def _short(value: float) -> str:
    for size, sign in ((1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:g}{sign}"
    return f"{value:g}"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:,.1f}"


def _seconds(value: float | None) -> str:
    return "–" if value is None else (f"{1000 * value:,.1f} ms" if value < 1 else f"{value:,.2f} s")


def _share(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f} %"


def _e(value: object) -> str:
    return html.escape(str(value))
