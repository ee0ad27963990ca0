"""A module's boundary as data: what goes in and out, how it is placed, and how its children are wired.

A module carries `boundary: Boundary`, set by its constructor. Names of ports are the module's own words ("x", "y").
An edge of a composite is written `"child.port -> child.port"`; a bare port name is the composite's own, and `a.b.port`
reaches the port of a grandchild. `"down.y[0:512] -> norm.x"` passes a slice of the last dimension on.
Several edges into one port add up.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from tokenrelay.runtime.placement.mesh import TOKEN_AXES
from tokenrelay.runtime.placement.placements import Layout, Placement, Replicate, Shard


@dataclass(frozen=True)
class Port:
    """One tensor that crosses a boundary. `shape` is the whole tensor's, None for a size known at run time (tokens).

    `pieces` says into how many parts a sharded dimension may be cut at most (attention heads must stay whole); 0: any.
    `stacked` tensors lie side by side in the last dimension and are each cut: such a shard is no piece of the whole,
    and nothing converts it.
    """

    shape: tuple[int | None, ...]
    layout: Layout = field(default_factory=dict)
    pieces: int = 0
    stacked: int = 1

    def placement(self, axis: str) -> Placement:
        """The placement along `axis`: Replicate() where the layout says nothing, but tokens are dealt out over dp."""
        said = self.layout.get(axis)
        if said is not None:
            return Shard(said.dim % len(self.shape)) if isinstance(said, Shard) else said
        return Shard(0) if axis in TOKEN_AXES and self.shape and self.shape[0] is None else Replicate()


@dataclass(frozen=True)
class Edge:
    """A tensor's way: from port `source` to port `target`, both relative to the module that declares the edge.

    `part` is the range of the last dimension that is passed on; None: all of it.
    """

    source: str
    target: str
    part: tuple[int, int] | None = None


@dataclass(frozen=True)
class Boundary:
    """What a module promises: its ports, the placement of its own parameters, and the edges among its children.

    `tokenwise`: tokens do not meet in it and no rank's weights differ along an axis that its ports do not name, so it
    may run on a part of the tokens (Shard(0)) where its ports say Replicate.
    `sends`: axes along which both its tokens and its parameters are Shard(0). Each token goes to the ranks whose
    parameters it asks for, and what they give comes back and is added (all-to-all, around the call).
    """

    inputs: Mapping[str, Port]
    outputs: Mapping[str, Port]
    parameters: Mapping[str, Layout] = field(default_factory=dict)
    edges: tuple[Edge, ...] = ()
    tokenwise: bool = False
    sends: tuple[str, ...] = ()


_LINE = re.compile(r"\s*([\w.]+)(?:\[(\d+):(\d+)\])?\s*->\s*([\w.]+)\s*")


def edges(*lines: str) -> tuple[Edge, ...]:
    """Edges from lines like `"attention.y -> norm.x"`. Raises ValueError for a line of another form."""
    made = []
    for line in lines:
        found = _LINE.fullmatch(line)
        if found is None:
            raise ValueError(f"an edge is written 'a.y -> b.x' or 'a.y[0:8] -> b.x', not {line!r}")
        source, first, end, target = found.groups()
        made.append(Edge(source, target, None if first is None else (int(first), int(end))))
    return tuple(made)
