"""What is done to a program after lowering: each pass is a function from program to program, verified afterwards."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

from tokenrelay.runtime.placement.cost import CostModel
from tokenrelay.runtime.placement.ir import (
    Call,
    Move,
    Op,
    Program,
    ReduceNorm,
    Start,
    Value,
    Wait,
    after,
    reads,
    writes,
)
from tokenrelay.runtime.placement.mesh import AXES
from tokenrelay.runtime.placement.placements import Partial, Replicate, Shard

Pass = Callable[[Program, CostModel], Program]
SPLIT_TOKENS_MIN = 16  # a rank: below it a norm's time is its launch, and cutting it saves nothing


def chain(
    path: Sequence[Move], source: str, new: Callable[[str, Value], str], values: dict[str, Value]
) -> Iterator[Move]:
    """`path` with its values named, from `source` on."""
    for move in path:
        have = values[source]
        made = after(have.layouts, move)
        assert made is not None, f"{move} of {have}"
        target = new(f"{source.partition('@')[0]}@{move.kind}", dataclasses.replace(have, layouts=made))
        yield dataclasses.replace(move, source=source, target=target)
        source = target


def drop_unused(program: Program, cost: CostModel) -> Program:
    """Moves and calls whose results nobody reads are left out."""
    needed = {value for _, value in program.outputs}
    kept: list[Op] = []
    for op in reversed(program.ops):
        if needed.intersection(writes(op)):
            kept.append(op)
            needed.update(reads(op))
    return dataclasses.replace(program, ops=tuple(reversed(kept)))


def split_reductions(program: Program, cost: CostModel) -> Program:
    """all_reduce before a residual addition and norm: reduce_scatter, the norm on a part of the tokens, all_gather.

    The same bytes move, and the norm and the residual stream take 1/n of the time and of the memory. Worth it from
    some tokens a rank on; below, the two latencies stand (`fuse_norms` takes those).
    """
    n = program.mesh.size("tp")
    ranks = n * program.mesh.size("dp") * program.mesh.size("cp")
    if n == 1 or cost.tokens % ranks or cost.tokens < ranks * SPLIT_TOKENS_MIN:
        return program
    editor = _Editor(program)
    for op in program.ops:
        if isinstance(op, Call) and _is_norm(op):
            editor.split(op)
        else:
            editor.ops.append(op)
    return drop_unused(editor.done(), cost)


def fuse_norms(program: Program, cost: CostModel) -> Program:
    """all_reduce + residual + norm become one operation, where nobody else reads the sum."""
    uses = Counter(value for op in program.ops for value in reads(op))
    uses.update(value for _, value in program.outputs)
    reductions = {op.target: op for op in program.ops if isinstance(op, Move) and op.kind == "all_reduce"}
    fused: dict[Move, Call] = {}
    for op in program.ops:
        if isinstance(op, Call) and _is_norm(op) and uses[op.inputs[0][1]] == 1:
            move = reductions.get(op.inputs[0][1])
            if move is not None:
                fused[move] = op
    calls = {id(call): move for move, call in fused.items()}
    ops: list[Op] = []
    for op in program.ops:
        if isinstance(op, Move) and op in fused:
            continue
        move = calls.get(id(op))
        ops.append(ReduceNorm(move, op) if move is not None and isinstance(op, Call) else op)
    return dataclasses.replace(program, ops=tuple(ops))


def overlap(program: Program, cost: CostModel) -> Program:
    """A collective starts as soon as its source is there and is waited for by its first reader.

    What does not depend on it and comes after it is run in between: first pull such calls before the reader, then split
    the move into Start and Wait. A move with nothing in between stays whole.
    """
    ops = _hoisted(program.ops)
    i = 0
    while i < len(ops):
        move = ops[i]
        if isinstance(move, Move) and move.kind != "slice":
            blocked = {move.target}
            free: list[Op] = []
            rest: list[Op] = []
            for op in ops[i + 1 : i + 1 + _WINDOW]:
                if blocked.intersection(reads(op)):
                    blocked.update(writes(op))
                    rest.append(op)
                else:
                    free.append(op)
            if any(isinstance(op, Call) for op in free):
                ops[i : i + 1 + len(free) + len(rest)] = [Start(move), *free, Wait(move), *rest]
        i += 1
    return dataclasses.replace(program, ops=tuple(ops))


def _hoisted(ops: tuple[Op, ...]) -> list[Op]:
    """Each collective right behind what makes its source."""
    made = {value for op in ops for value in writes(op)}
    behind: dict[str, list[Op]] = {}
    for op in ops:
        if isinstance(op, Move) and op.source in made:
            behind.setdefault(op.source, []).append(op)
    hoisted: list[Op] = []

    def place(op: Op) -> None:
        hoisted.append(op)
        for value in writes(op):
            for move in behind.pop(value, ()):
                place(move)

    for op in ops:
        if not isinstance(op, Move) or op.source not in made:
            place(op)
    return hoisted


_WINDOW = 8  # operations looked at behind a collective: a layer's half; more would hold its buffers for too long


def _is_norm(call: Call) -> bool:
    return call.tokenwise and [port for port, _ in call.inputs] == ["x", "residual"]


class _Editor:
    """Rewrites norms to run on a part of the tokens."""

    def __init__(self, program: Program) -> None:
        self._program = program
        self._values = dict(program.values)
        self._made_by = {op.target: op for op in program.ops if isinstance(op, Move)}
        self._whole: dict[str, str] = {}  # gathered value -> the cut one that it comes from
        self.ops: list[Op] = []

    def done(self) -> Program:
        return dataclasses.replace(self._program, ops=tuple(self.ops), values=self._values)

    def split(self, call: Call) -> None:
        """`call` with its inputs cut by tokens over tp and its outputs gathered under the old names."""
        x, residual = (value for _, value in call.inputs)
        reduction = self._made_by.get(x)
        tp = AXES.index("tp")
        whole = self._values[x].layouts[tp] == Replicate() and self._values[residual].layouts[tp] == Replicate()
        if not whole or reduction is None or reduction.kind != "all_reduce" or reduction.axes[-1:] != ("tp",):
            self.ops.append(call)
            return
        source = reduction.source
        others = tuple(axis for axis in reduction.axes if axis != "tp")
        cut = self._step("reduce_scatter", source)
        if others:  # fewer bytes once they are cut
            cut = self._step("all_reduce", cut, others)
        inputs = (("x", cut), ("residual", self._whole.get(residual) or self._step("slice", residual)))
        outputs = []
        gathers: list[Op] = []
        for port, value in call.outputs:
            like = self._values[value]
            part = self._new(f"{value}@tokens", dataclasses.replace(like, layouts=_with_tp(like, Shard(0))))
            outputs.append((port, part))
            gathers.append(Move("all_gather", ("tp",), part, value))
            self._whole[value] = part
        self.ops.append(dataclasses.replace(call, inputs=inputs, outputs=tuple(outputs)))
        self.ops += gathers

    def _step(self, kind: str, source: str, axes: tuple[str, ...] = ("tp",)) -> str:
        move = next(chain([Move(kind, axes, "", "")], source, self._new, self._values))
        self.ops.append(move)
        return move.target

    def _new(self, name: str, like: Value) -> str:
        unique, count = name, 1
        while unique in self._values:
            count += 1
            unique = f"{name}#{count}"
        self._values[unique] = dataclasses.replace(like, name=unique)
        return unique


def _with_tp(value: Value, placement: Shard | Replicate | Partial) -> tuple[Shard | Replicate | Partial, ...]:
    tp = AXES.index("tp")
    return (*value.layouts[:tp], placement, *value.layouts[tp + 1 :])
