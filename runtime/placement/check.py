"""Walks the declared boundaries of a model once: refuses what cannot fit, lists the collectives that the rest needs.

Nothing is inserted here. On a mesh of one rank the list of needed collectives is empty, and the refusals stay: a
declaration that is wrong is wrong on every mesh.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from tokenrelay.base.errors import PlacementError
from tokenrelay.runtime.placement.boundary import Boundary, Port
from tokenrelay.runtime.placement.mesh import AXES, Mesh
from tokenrelay.runtime.placement.placements import Layout, Partial, Placement, Replicate, Shard


@dataclass(frozen=True)
class Collective:
    """What an edge needs along one mesh axis: all_reduce, reduce_scatter, all_gather, all_to_all, or slice (local)."""

    kind: str
    axis: str
    source: str  # "layers.0.attention.y"
    target: str

    def __str__(self) -> str:
        return f"{self.kind:<14} {self.axis:<7} {self.source} -> {self.target}"


@dataclass(frozen=True)
class PlacementReport:
    """The outcome of a check: edges compared, and the collectives that the mesh needs, outer modules first."""

    mesh: Mesh
    edges: int
    collectives: tuple[Collective, ...]

    def __str__(self) -> str:
        head = f"{self.mesh!r}: {self.edges} edges, {len(self.collectives)} collectives"
        return "\n".join([head, *(f"  {collective}" for collective in self.collectives)])


def check(model: nn.Module, mesh: Mesh) -> PlacementReport:
    """Compare both ends of every declared edge of `model` and its children on `mesh`.

    Raises PlacementError naming both modules: an edge to a port that is not declared, different shapes, an unknown mesh
    axis, a Shard of a dimension that is not there or does not divide, a reduction of another kind, a whole tensor where
    a term is expected, and an input of a child that nothing feeds.
    """
    found: dict[tuple[object, ...], Collective] = {}
    compared = 0
    for path, module, boundary in _boundaries(model):
        _check_layouts(path, module, boundary, mesh)
        fed: set[str] = set()
        for edge in boundary.edges:
            source_name, source = _port(model, path, edge.source, feeds=True)
            target_name, target = _port(model, path, edge.target, feeds=False)
            if edge.part is not None:
                source = _slice(source_name, source, edge.part)
            for needed in _compare(source_name, source, target_name, target, mesh):
                # A tensor that several ports want in the same form is converted once.
                key = (needed.kind, needed.axis, needed.source, edge.part)
                found.setdefault(key, needed)
            fed.add(target_name)
            compared += 1
        _check_fed(path, module, boundary, fed)
    return PlacementReport(mesh, compared, tuple(found.values()))


def _boundaries(model: nn.Module) -> Iterator[tuple[str, nn.Module, Boundary]]:
    for path, module in model.named_modules():
        boundary = getattr(module, "boundary", None)
        if isinstance(boundary, Boundary):
            yield path, module, boundary
        elif not isinstance(module, nn.ModuleList):
            raise PlacementError(f"{path or 'the model'} ({type(module).__name__}) declares no boundary")


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _port(model: nn.Module, path: str, reference: str, *, feeds: bool) -> tuple[str, Port]:
    """Resolve an edge's end: `feeds` is true for the end that a tensor comes from."""
    child, _, name = reference.rpartition(".")
    owner_path = _join(path, child) if child else path
    try:
        owner = model.get_submodule(owner_path)
    except AttributeError:
        raise PlacementError(f"{path or 'the model'} declares an edge at {reference!r}, which is no module") from None
    boundary = getattr(owner, "boundary", None)
    if not isinstance(boundary, Boundary):
        raise PlacementError(f"{owner_path} ({type(owner).__name__}) declares no boundary")
    # A composite's own inputs feed its children, and its own outputs are fed by them.
    ports = boundary.outputs if feeds == bool(child) else boundary.inputs
    if name not in ports:
        side = "gives" if feeds else "takes"
        known = ", ".join(ports) or "none"
        raise PlacementError(f"{path or 'the model'}: {owner_path or 'the model'} {side} no {name!r} (it has: {known})")
    return _join(owner_path, name), ports[name]


def _slice(name: str, port: Port, part: tuple[int, int]) -> Port:
    width = port.shape[-1]
    if width is None or not 0 <= part[0] < part[1] <= width:
        raise PlacementError(f"{name} is {width} wide and has no part [{part[0]}:{part[1]}]")
    for axis, placement in port.layout.items():
        if isinstance(placement, Shard) and placement.dim % len(port.shape) == len(port.shape) - 1:
            raise PlacementError(f"{name} is {placement} along {axis!r} and cannot be sliced in that dimension")
    return Port((*port.shape[:-1], part[1] - part[0]), port.layout)


def _check_fed(path: str, module: nn.Module, boundary: Boundary, fed: set[str]) -> None:
    if not boundary.edges:
        return
    for name in boundary.outputs:
        if _join(path, name) not in fed:
            raise PlacementError(f"{path or 'the model'}: nothing feeds its output {name!r}")
    for child_path, child in module.named_modules():
        parent, _, _ = child_path.rpartition(".")
        grand = parent and not isinstance(module.get_submodule(parent), nn.ModuleList)
        inner = getattr(child, "boundary", None)
        if not child_path or grand or not isinstance(inner, Boundary):
            continue
        for name in inner.inputs:
            if _join(_join(path, child_path), name) not in fed:
                raise PlacementError(f"{path or 'the model'}: nothing feeds {_join(child_path, name)!r}")


def _check_layouts(path: str, module: nn.Module, boundary: Boundary, mesh: Mesh) -> None:
    for name, port in [*boundary.inputs.items(), *boundary.outputs.items()]:
        _check_layout(_join(path, name), port.shape, port.layout, mesh, port.pieces)
    for name, layout in boundary.parameters.items():
        parameter = module.get_parameter(name)
        _check_layout(_join(path, name), tuple(parameter.shape), layout, mesh)
        if name != "bias" and any(isinstance(placement, Partial) for placement in layout.values()):
            raise PlacementError(f"{_join(path, name)} is a parameter and cannot be Partial")
    for axis in boundary.sends:
        ports = {**boundary.inputs, **boundary.outputs}
        wrong = [name for name, port in ports.items() if port.placement(axis) != Shard(0)]
        wrong += [name for name, layout in boundary.parameters.items() if layout.get(axis) != Shard(0)]
        if wrong:
            raise PlacementError(
                f"{path or 'the model'} sends tokens along {axis!r}, so {', '.join(wrong)} must be Shard(0)"
            )


def _check_layout(name: str, shape: tuple[int | None, ...], layout: Layout, mesh: Mesh, pieces: int = 0) -> None:
    ranks = [1] * len(shape)
    for axis, placement in layout.items():
        if axis not in AXES:
            raise PlacementError(f"{name} names the mesh axis {axis!r}; known: {', '.join(AXES)}")
        if not isinstance(placement, Shard):
            continue
        if not -len(shape) <= placement.dim < len(shape):
            raise PlacementError(f"{name} has {len(shape)} dimensions and cannot be {placement} along {axis!r}")
        ranks[placement.dim] *= mesh.size(axis)
    for size, count in zip(shape, ranks, strict=True):
        if pieces and pieces % count:
            raise PlacementError(f"{name}: {pieces} pieces cannot be dealt out evenly to {count} ranks ({mesh!r})")
        if size is not None and size % count:
            raise PlacementError(
                f"{name}: a dimension of {size} cannot be dealt out evenly to {count} ranks ({mesh!r})"
            )


def _compare(source_name: str, source: Port, target_name: str, target: Port, mesh: Mesh) -> Iterator[Collective]:
    both = f"{source_name} -> {target_name}"
    if source.shape != target.shape:
        raise PlacementError(f"{both}: {source_name} has the shape {source.shape}, {target_name} takes {target.shape}")
    for axis in AXES:
        have, want = source.placement(axis), target.placement(axis)
        kind = _conversion(have, want)
        if kind == "refused":
            raise PlacementError(
                f"{both}: {source_name} is {have} along {axis!r}, and {target_name} takes {want}; "
                f"it would fit if {target_name} took {have}, or {source_name} gave {want}"
            )
        if kind and any(_cuts_stacked(port, axis) for port in (source, target)):
            raise PlacementError(
                f"{both}: {source_name} is {have} along {axis!r}, and {target_name} takes {want}; what is stacked "
                f"there is cut piece by piece and cannot be converted: give {target_name} {have}"
            )
        if kind and mesh.size(axis) > 1:
            yield Collective(kind, axis, source_name, target_name)


def _cuts_stacked(port: Port, axis: str) -> bool:
    return port.stacked > 1 and port.placement(axis) == Shard(len(port.shape) - 1)


def _conversion(have: Placement, want: Placement) -> str:
    """The collective that turns one placement into the other: "" for none, "refused" where there is none."""
    if have == want:
        return ""
    match have, want:
        case Partial(), Replicate():
            return "all_reduce"
        case Partial(), Shard():
            return "reduce_scatter"
        case Shard(), Replicate():
            return "all_gather"
        case Shard(), Shard():
            return "all_to_all"
        case Replicate(), Shard():
            return "slice"  # every rank has it all and keeps its part: no bytes move
    return "refused"  # a whole tensor where a term is expected would be counted once per rank
