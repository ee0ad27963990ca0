"""`tokenrelay plan`: what a model would send on a mesh, as a table and as a picture."""

from __future__ import annotations

import html
import json
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tokenrelay.base.errors import TokenRelayError
from tokenrelay.runtime.layers.moe import ExpertSplit
from tokenrelay.runtime.placement.cost import CostModel
from tokenrelay.runtime.placement.mesh import STAGES, Mesh
from tokenrelay.runtime.spmd.plan import Group, Plan, make_plan

COLOURS = {
    "all_reduce": "#c2410c",
    "reduce_scatter": "#b45309",
    "all_gather": "#1d4ed8",
    "all_to_all": "#7e22ce",
    "slice": "#64748b",
    "send": "#0f766e",
}


def run_plan(
    model: Path,
    mesh: dict[str, int],
    *,
    tokens: int,
    host_ranks: int,
    experts: str,
    svg: Path | None,
    as_json: bool,
) -> None:
    """Print the plan, and draw it where `svg` says. Raises CheckpointError, PlacementError."""
    plan = make_plan(
        model, Mesh(**mesh), CostModel(tokens=tokens, host_ranks=host_ranks), experts=ExpertSplit.parse(experts)
    )
    if svg is not None:
        try:
            svg.write_text(picture(plan), encoding="utf-8")
        except OSError as error:
            raise TokenRelayError(f"cannot write {svg}: {error.strerror}") from error
    if as_json:
        groups = [{**asdict(group), "sent_bytes": group.sent_bytes, "move_s": group.move_s} for group in plan.groups]
        print(json.dumps({"mesh": plan.mesh.sizes, "groups": groups, "step_s": plan.step_s}, indent=2))
        return
    console = Console(highlight=False, width=None if Console().is_terminal else 120)
    console.print(table(plan))
    console.print(footer(plan))


def table(plan: Plan) -> Table:
    """One line a collective, one for the sum of each group of layers."""
    made = Table(title=f"{plan.architecture} on {plan.mesh!r}, {plan.cost.tokens} tokens a step", title_justify="left")
    for name in ("layers", "collective", "axes", "of"):
        made.add_column(name, overflow="fold")
    for name in ("bytes/token", "us", "how"):
        made.add_column(name, justify="left" if name == "how" else "right")
    for group in plan.groups:
        label = f"{group.name} (each)" if group.count > 1 else group.name
        for i, move in enumerate(group.moves):
            per_token = move.sent_bytes / plan.cost.tokens
            made.add_row(
                label if i == 0 else "",
                move.kind,
                "+".join(move.axes),
                move.where,
                f"{per_token:,.0f}",
                f"{move.seconds * 1e6:.1f}",
                move.how,
            )
        made.add_row(
            "" if group.moves else label,
            f"[bold]{_count(group)}[/bold]",
            "",
            f"{group.weight_bytes / 2**20:,.0f} MiB of weights, {group.compute_s * 1e6:.1f} us of work",
            f"[bold]{group.sent_bytes / plan.cost.tokens:,.0f}[/bold]",
            f"[bold]{(group.compute_s + group.move_s) * 1e6:.1f}[/bold]",
            "",
            end_section=True,
        )
    return made


def footer(plan: Plan) -> str:
    """The whole step in one paragraph, with what the figures stand on."""
    cost = plan.cost
    held = sum(group.count * group.weight_bytes for group in plan.groups) / plan.mesh.size(STAGES)
    return (
        f"{plan.mesh.ranks} ranks, {held / 2**30:.1f} GiB of weights each; a step is predicted to take "
        f"{plan.step_s * 1e3:.2f} ms without reading the cache. Bytes are what one rank sends. Assumed: "
        f"{cost.link_bytes_s / 1e9:.0f} GB/s and {cost.link_latency_s * 1e6:.0f} us a phase among {cost.host_ranks} "
        f"ranks of a host, {cost.network_bytes_s / 1e9:.0f} GB/s and {cost.network_latency_s * 1e6:.0f} us beyond, "
        f"memory {cost.memory_bytes_s / 1e12:.2f} TB/s, {cost.flops_s / 1e12:.0f} TFLOP/s, "
        f"{cost.element_bytes} bytes a value. Compiled in {plan.compile_s:.2f} s."
    )


def _count(group: Group) -> str:
    count = sum(move.kind != "slice" for move in group.moves)
    return f"{count} collective{'' if count == 1 else 's'}"


def picture(plan: Plan) -> str:
    """An SVG: a column for each group of layers, modules as boxes, collectives as coloured bars between them."""
    width, step, top = 300, 34, 84
    rows = max(len(group.modules) for group in plan.groups)
    wide, high = width * len(plan.groups) + 20, top + rows * step + 50
    title = f"{plan.architecture} on {plan.mesh!r}, {plan.cost.tokens} tokens a step: {plan.step_s * 1e3:.2f} ms"
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {wide} {high}" font-family="sans-serif" font-size="12">',
        f'<rect width="{wide}" height="{high}" fill="#ffffff"/>',
        f'<text x="20" y="28" font-size="16">{html.escape(title)}</text>',
    ]
    for column, group in enumerate(plan.groups):
        x = 20 + column * width
        out.append(f'<text x="{x}" y="58" font-weight="bold">{html.escape(group.name)}</text>')
        said = f"{_count(group)}, {group.sent_bytes / plan.cost.tokens:,.0f} bytes a token"
        out.append(f'<text x="{x}" y="74" fill="#475569">{said}</text>')
        for row, name in enumerate(group.modules):
            y = top + row * step
            if name.startswith("*"):
                move = group.moves[int(name[1:])]
                text = f"{move.kind} {'+'.join(move.axes)}  {move.seconds * 1e6:.1f} us {move.how}"
                fill, ink = COLOURS[move.kind], "#ffffff"
            else:
                text, fill, ink = name, "#f1f5f9", "#0f172a"
            out.append(f'<rect x="{x}" y="{y}" width="{width - 20}" height="{step - 8}" rx="4" fill="{fill}"/>')
            out.append(f'<text x="{x + 8}" y="{y + 17}" fill="{ink}">{html.escape(text)}</text>')
    return "\n".join([*out, "</svg>", ""])
