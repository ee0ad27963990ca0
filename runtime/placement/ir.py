"""The compiler's program: values with a layout on each mesh axis, and the operations that make one from others.

A program is a straight line. Every rank runs the same one on its own part of every value. `verify` is the whole
specification, rule by rule; the compiler runs it after each pass.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from tokenrelay.base.errors import PlacementError
from tokenrelay.runtime.placement.boundary import Port
from tokenrelay.runtime.placement.mesh import AXES, Mesh
from tokenrelay.runtime.placement.placements import Partial, Placement, Replicate, Shard

Layouts = tuple[Placement, ...]  # one for each of AXES; Replicate() along an axis of one rank

KINDS = ("all_reduce", "reduce_scatter", "all_gather", "all_to_all", "slice")


@dataclass(frozen=True)
class Value:
    """A tensor as all ranks hold it together. `shape` is the whole tensor's, None for tokens."""

    name: str
    shape: tuple[int | None, ...]
    layouts: Layouts
    stacked: int = 1


@dataclass(frozen=True)
class Call:
    """Run a module: (port, value) pairs in the order of its boundary.

    Along the axes in `sends` tokens are sent to the ranks that they ask for and come back as sums (`Boundary.sends`).
    """

    module: str
    inputs: tuple[tuple[str, str], ...]
    outputs: tuple[tuple[str, str], ...]
    tokenwise: bool = False
    sends: tuple[str, ...] = ()


@dataclass(frozen=True)
class Move:
    """A collective of the ranks along `axes` (or a slice, which each rank does alone): `source` -> `target`.

    `dim` is the dimension that is cut afterwards, or was before (all_gather); `from_dim` the one of an all_to_all's
    source.
    """

    kind: str
    axes: tuple[str, ...]
    source: str
    target: str
    dim: int = 0
    from_dim: int = 0


@dataclass(frozen=True)
class Start:
    """Begin a move and go on; its target is there after `Wait`."""

    move: Move


@dataclass(frozen=True)
class Wait:
    """The end of a started move."""

    move: Move


@dataclass(frozen=True)
class Part:
    """A range of the last dimension, without bytes moved."""

    source: str
    target: str
    first: int
    end: int


@dataclass(frozen=True)
class Add:
    """The sum of values that are placed alike."""

    sources: tuple[str, ...]
    target: str


@dataclass(frozen=True)
class ReduceNorm:
    """An all_reduce, and the residual addition and norm that follow it, as one operation of one kernel."""

    move: Move
    call: Call


Op = Call | Move | Start | Wait | Part | Add | ReduceNorm
Ports = Mapping[str, tuple[Mapping[str, Port], Mapping[str, Port]]]  # module -> (inputs, outputs)


@dataclass(frozen=True)
class Program:
    """What every rank runs. `ports` are the declarations that calls are held to."""

    mesh: Mesh
    inputs: tuple[tuple[str, str], ...]  # (port, value)
    outputs: tuple[tuple[str, str], ...]
    values: Mapping[str, Value]
    ops: tuple[Op, ...]
    ports: Ports
    sends: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # module -> what its boundary declares

    @property
    def moves(self) -> list[Move]:
        """Every collective and slice, in order; a started one where it starts."""
        return [move for op in self.ops for move in moves_of(op)]


def moves_of(op: Op) -> tuple[Move, ...]:
    """The moves that begin with `op`."""
    if isinstance(op, Move):
        return (op,)
    return (op.move,) if isinstance(op, Start | ReduceNorm) else ()


def reads(op: Op) -> tuple[str, ...]:
    """Values that must be there before `op`."""
    match op:
        case Call():
            return tuple(value for _, value in op.inputs)
        case Move() | Part():
            return (op.source,)
        case Start():
            return (op.move.source,)
        case Wait():
            return ()
        case Add():
            return op.sources
        case ReduceNorm():
            return (op.move.source, *(value for _, value in op.call.inputs if value != op.move.target))


def writes(op: Op) -> tuple[str, ...]:
    """Values that are there after `op`."""
    match op:
        case Call():
            return tuple(value for _, value in op.outputs)
        case Move() | Part() | Add():
            return (op.target,)
        case Wait():
            return (op.move.target,)
        case Start():
            return ()
        case ReduceNorm():
            return tuple(value for _, value in op.call.outputs)


def layouts_of(port: Port, mesh: Mesh) -> Layouts:
    """A port's placements on `mesh`."""
    return tuple(port.placement(axis) if mesh.size(axis) > 1 else Replicate() for axis in AXES)


def after(layouts: Layouts, move: Move) -> Layouts | None:
    """The layout that `move` makes of `layouts`; None where it must not be applied.

    Where several axes cut one dimension, the innermost is the first to be gathered and the last to be cut.
    """
    made = list(layouts)
    for axis in reversed(move.axes):
        i = AXES.index(axis)
        have = made[i]
        inner = made[i + 1 :]
        match move.kind:
            case "all_reduce":
                ok, made[i] = have == Partial(), Replicate()
            case "reduce_scatter":
                ok, made[i] = have == Partial() and Shard(move.dim) not in inner, Shard(move.dim)
            case "all_gather":
                ok, made[i] = have == Shard(move.dim) and Shard(move.dim) not in inner, Replicate()
            case "slice":
                ok, made[i] = have == Replicate() and Shard(move.dim) not in inner, Shard(move.dim)
            case "all_to_all":
                ok = have == Shard(move.from_dim) and move.from_dim != move.dim
                ok = ok and Shard(move.dim) not in inner and Shard(move.from_dim) not in inner
                made[i] = Shard(move.dim)
            case _:
                ok = False
        if not ok:
            return None
    return tuple(made)


# -- the specification ------------------------------------------------------------------------------------------------
def _order(program: Program) -> str | None:
    """Each value is made once, and before it is read; each start has its wait, and outputs are made."""
    known = {value for _, value in program.inputs}
    started: set[Move] = set()
    for op in program.ops:
        for value in reads(op):
            if value not in known:
                return f"{op} reads {value} before it is made"
        if isinstance(op, Start):
            started.add(op.move)
        if isinstance(op, Wait):
            if op.move not in started:
                return f"{op} waits for what was not started"
            started.remove(op.move)
        for value in writes(op):
            if value in known or value not in program.values:
                return f"{op} makes {value} again, or it is undeclared"
            known.add(value)
    if started:
        return f"{started} never end"
    missing = [value for _, value in program.outputs if value not in known]
    return f"nothing makes the outputs {missing}" if missing else None


def _moves(program: Program) -> str | None:
    """A move has a group of more than one rank, and makes of its source's layout exactly its target's."""
    for move in program.moves:
        source, target = program.values[move.source], program.values[move.target]
        if not move.axes or any(program.mesh.size(axis) == 1 for axis in move.axes):
            return f"{move} has an axis of one rank"
        if after(source.layouts, move) != target.layouts or source.shape != target.shape:
            return f"{move}: {source} does not become {target}"
        last = Shard(len(source.shape) - 1)
        for axis in move.axes if source.stacked > 1 else ():
            if last in (source.layouts[AXES.index(axis)], target.layouts[AXES.index(axis)]):
                return f"{move} converts a stacked shard"
    return None


def _calls(program: Program) -> str | None:
    """Each port of a call holds a value as it is declared; a tokenwise module's may all be cut by tokens instead."""
    for op in program.ops:
        call = op.call if isinstance(op, ReduceNorm) else op
        if not isinstance(call, Call):
            continue
        inputs, outputs = program.ports[call.module]
        if [port for port, _ in call.inputs] != list(inputs) or [port for port, _ in call.outputs] != list(outputs):
            return f"{call} does not fill the ports of {call.module}"
        pairs = [(inputs[port], program.values[value]) for port, value in call.inputs]
        pairs += [(outputs[port], program.values[value]) for port, value in call.outputs]
        for i, axis in enumerate(AXES):
            exact = all(layouts_of(port, program.mesh)[i] == value.layouts[i] for port, value in pairs)
            by_tokens = call.tokenwise and all(
                port.placement(axis) == Replicate() and value.layouts[i] == Shard(0) for port, value in pairs
            )
            if not exact and not by_tokens:
                return f"{call}: its values are not placed along {axis!r} as {call.module} declares"
        if any(port.shape != value.shape for port, value in pairs):
            return f"{call}: shapes are not as {call.module} declares"
    return None


def _sends(program: Program) -> str | None:
    """A call sends along each axis that its module declares and that has ranks; its values are cut by tokens there."""
    for op in program.ops:
        call = op.call if isinstance(op, ReduceNorm) else op
        if not isinstance(call, Call):
            continue
        declared = tuple(axis for axis in program.sends.get(call.module, ()) if program.mesh.size(axis) > 1)
        if call.sends != declared:
            return f"{call} does not send as {call.module} declares"
        for _, value in (*call.inputs, *call.outputs):
            if any(program.values[value].layouts[AXES.index(axis)] != Shard(0) for axis in declared):
                return f"{call} sends {value}, which is not cut by tokens"
    return None


def _sums(program: Program) -> str | None:
    """Values that are added are placed alike; a part is taken of a dimension that is not cut."""
    for op in program.ops:
        if isinstance(op, Add):
            kinds = {(program.values[v].shape, program.values[v].layouts) for v in (*op.sources, op.target)}
            if len(kinds) != 1 or len(op.sources) < 2:
                return f"{op} adds what is not placed alike"
        if isinstance(op, Part):
            source, target = program.values[op.source], program.values[op.target]
            if source.layouts != target.layouts or Shard(len(source.shape) - 1) in source.layouts:
                return f"{op} takes a part of a dimension that is cut"
    return None


def _fused(program: Program) -> str | None:
    """A fused reduction feeds its norm and nobody else."""
    for op in program.ops:
        if isinstance(op, ReduceNorm) and (
            op.move.kind != "all_reduce" or op.move.target not in [value for _, value in op.call.inputs]
        ):
            return f"{op} is no reduction into a norm"
    return None


def _ends(program: Program) -> str | None:
    """Inputs and outputs are placed as the model's own boundary declares (`ports` under the empty name)."""
    inputs, outputs = program.ports[""]
    for ports, pairs in ((inputs, program.inputs), (outputs, program.outputs)):
        for port, value in pairs:
            if program.values[value].layouts != layouts_of(ports[port], program.mesh):
                return f"{port} is {program.values[value]}, declared {ports[port]}"
    return None


SPEC: tuple[Callable[[Program], str | None], ...] = (_order, _moves, _calls, _sends, _sums, _fused, _ends)


def verify(program: Program, stage: str) -> Program:
    """`program` itself, or PlacementError naming the pass, the rule and the operation that breaks it."""
    for rule in SPEC:
        broken = rule(program)
        if broken is not None:
            raise PlacementError(f"after {stage}: {broken} (rule: {rule.__doc__})")
    return program
