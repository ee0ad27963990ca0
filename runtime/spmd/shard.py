"""One rank's part of a model: smaller parameters, and of each checkpoint tensor only the slices that fill them.

    sources = shard_model(model, sources, mesh, rank)       # on the meta device, before anything is allocated

A stacked parameter (q, k and v; gate and up) is cut piece by piece: a rank holds its part of each.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Container, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from tokenrelay.base.errors import PlacementError
from tokenrelay.runtime.layers.attention import GqaCore
from tokenrelay.runtime.layers.mla import MlaCore
from tokenrelay.runtime.layers.moe import Experts
from tokenrelay.runtime.layers.sources import Index, WeightPart, WeightSource, parameter
from tokenrelay.runtime.models.decoder import Model
from tokenrelay.runtime.placement import AXES, STAGES, Boundary, Layout, Mesh, Partial, Shard
from tokenrelay.runtime.placement.stages import stage_layers


@dataclass(frozen=True)
class Cut:
    """Of `count` equal pieces the one numbered `index`."""

    count: int = 1
    index: int = 0


def cuts_of(layout: Layout, dims: int, mesh: Mesh, at: Mapping[str, int]) -> list[Cut]:
    """The cut of each dimension for the rank at `at`: the outermost axis has the largest pieces."""
    cuts = [Cut()] * dims
    for axis in AXES:
        placement = layout.get(axis)
        if isinstance(placement, Shard):
            dim, size = placement.dim % dims, mesh.size(axis)
            cuts[dim] = Cut(cuts[dim].count * size, cuts[dim].index * size + at[axis])
    return cuts


def shard_model(
    model: Model, sources: Mapping[str, WeightSource], mesh: Mesh, rank: int, spare: int = 0
) -> tuple[dict[str, WeightSource], list[tuple[nn.Module, str]]]:
    """Shrink the parameters of `model` (on meta) to those of `rank`.

    Returns the sources that this rank reads, cut to what it holds, and the parameters that are zeros on this rank
    because another one adds them. Parameters of other pipeline stages have no elements.
    `spare`: places for experts beyond those dealt out, not filled.
    """
    at = mesh.coordinates(rank)
    cuts: dict[tuple[int, str], list[Cut]] = {}
    zeros: list[tuple[nn.Module, str]] = []
    elsewhere = {id(module) for path, module in model.named_modules() if not _held(path, model, mesh, at)}
    for module in model.modules():
        boundary = getattr(module, "boundary", None)
        for name, layout in boundary.parameters.items() if isinstance(boundary, Boundary) else ():
            held = module.get_parameter(name)
            cuts[id(module), name] = cuts_of(layout, held.dim(), mesh, at)
            if any(isinstance(placement, Partial) and at[axis] for axis, placement in layout.items()):
                zeros.append((module, name))
    absent = {(id(module), name) for module, name in zeros}
    local = {}
    for name, source in sources.items():
        if id(source.parts[0].module) in elsewhere:
            continue
        parts = [_cut_part(part, source, cuts[id(part.module), part.parameter]) for part in source.parts]
        kept = tuple(p for p in parts if p is not None and (id(p.module), p.parameter) not in absent)
        if kept:
            local[name] = dataclasses.replace(source, parts=kept)
    _shrink(model, cuts, mesh, elsewhere, spare)
    return local, [(module, name) for module, name in zeros if id(module) not in elsewhere]


def _held(path: str, model: Model, mesh: Mesh, at: Mapping[str, int]) -> bool:
    """Whether the module at `path` is of this rank's pipeline stage."""
    stages, stage = mesh.size(STAGES), at[STAGES]
    part, _, rest = path.partition(".")
    if part == "layers" and rest:
        return int(rest.partition(".")[0]) in stage_layers(len(model.layers), stage, stages)
    if part == "embed":  # a tied head is the embedding's table
        return stage == 0 or (stage == stages - 1 and model.architecture.tied)
    return part not in ("norm", "head") or stage == stages - 1


def _shrink(
    model: nn.Module, cuts: Mapping[tuple[int, str], list[Cut]], mesh: Mesh, elsewhere: Container[int], spare: int
) -> None:
    for module in model.modules():
        for name, held in list(module.named_parameters(recurse=False)):
            shape = [size // cut.count for size, cut in zip(held.shape, cuts[id(module), name], strict=True)]
            if isinstance(module, Experts) and any(cut.count > 1 for cut in cuts[id(module), name][:1]):
                shape[0] += spare
            if id(module) in elsewhere:
                shape[0] = 0
            with torch.device("meta"):
                setattr(module, name, parameter(*shape, dtype=held.dtype))
        if isinstance(module, GqaCore | MlaCore):
            module.narrow(mesh.size("tp"))


def _cut_part(part: WeightPart, source: WeightSource, cuts: list[Cut]) -> WeightPart | None:
    """`part` for one rank; None where nothing of it is held."""
    shape = source.view or source.shape
    at: list[int | slice] = []
    take: list[int | slice] = []
    given = iter(zip(range(len(shape)), [*part.take, *[slice(None)] * (len(shape) - len(part.take))], strict=True))
    for dim, cut in enumerate(cuts):
        place = part.at[dim] if dim < len(part.at) else slice(None)
        if isinstance(place, int):
            held = part.module.get_parameter(part.parameter).shape[dim] // cut.count
            if place // held != cut.index:
                return None
            at.append(place % held)
            continue
        from_dim, taken = next(given)
        if isinstance(taken, int):
            raise PlacementError(f"{source.name} is taken apart along dimension {from_dim} and cannot be cut there")
        first, end, _ = taken.indices(shape[from_dim])
        width = (end - first) // cut.count
        start = place.start or 0
        at.append(slice(start // cut.count, start // cut.count + width))
        take.append(slice(first + cut.index * width, first + (cut.index + 1) * width))
    return WeightPart(part.module, part.parameter, _tuple(at), _tuple(take))


def _tuple(items: list[int | slice]) -> Index:
    return tuple(items)


def expert_sources(model: Model, layer: int, place: int, expert: int, mesh: Mesh, rank: int) -> dict[str, WeightSource]:
    """The tensors of `expert`, cut to this rank's part of its width, for its place `place` in `layer`."""
    module = model.get_submodule(f"layers.{layer}.mlp.experts")
    assert isinstance(module, Experts)
    at, f, d = mesh.coordinates(rank), module.moe.width, module.hidden
    layout = module.boundary.parameters["w_down"]
    cut = cuts_of(layout, 3, mesh, at)[2]
    width = f // cut.count
    mine = slice(cut.index * width, (cut.index + 1) * width)
    gate = WeightPart(module, "w_gate_up", (place, slice(0, width)), (mine,))
    up = WeightPart(module, "w_gate_up", (place, slice(width, 2 * width)), (mine,))
    down = WeightPart(module, "w_down", (place,), (slice(None), mine))
    prefix = f"model.layers.{layer}.mlp.experts.{expert}."
    sources = (
        WeightSource(f"{prefix}gate_proj.weight", (f, d), (gate,)),
        WeightSource(f"{prefix}up_proj.weight", (f, d), (up,)),
        WeightSource(f"{prefix}down_proj.weight", (d, f), (down,)),
    )
    return {source.name: source for source in sources}
