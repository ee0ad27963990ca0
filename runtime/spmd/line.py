"""A compiled program as one Python function: a straight line of calls over local variables.

    line = Line(program, bind)            # bind(op) -> Bound, what an operation calls
    outputs = line.run(given, inputs)

A step of a small model is made of Python, so what stands between two kernels counts: closures over numbered values cost
about a microsecond an operation, a line of a function a tenth of it. The function is made from the program's own text,
which `source` holds; nothing of it comes from outside.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from tokenrelay.runtime.placement.ir import Call, Op, Part, Program, Start, Value, Wait, reads, writes


@dataclass(frozen=True, slots=True)
class Bound:
    """What runs an operation: called with its values, then with fields of the step's inputs (`more`, as "caches[3]").

    `first` is called on the first value before that: a reduction into a norm.
    """

    call: Callable[..., Any]
    more: tuple[str, ...] = ()
    first: Callable[..., Any] | None = None
    ends: bool = False  # a step without samples ends before it


@dataclass(slots=True)
class _Text:
    """The lines, and what they name."""

    lines: list[str] = field(default_factory=list)
    names: dict[str, Any] = field(default_factory=dict)

    def name(self, thing: Any, kind: str) -> str:
        """A global name for `thing`."""
        made = f"{kind}{len(self.names)}"
        self.names[made] = thing
        return made


class Line:
    """A program bound to what runs it. Values are dropped after their last reader."""

    def __init__(self, program: Program, bind: Callable[[Op], Bound], *, fused: bool, overlapped: bool = False) -> None:
        """`fused`: attention's two halves as the one module that they are parts of (`fuse_cores`).

        `overlapped`: what runs a Start answers what is called at the Wait; else it has waited already.
        """
        self.takes: list[Value] = [program.values[value] for _, value in program.inputs]
        ops = list(grouped_parts(fuse_cores(program) if fused else program.ops, program))
        variables = {value: f"v{i}" for i, (_, value) in enumerate(program.inputs)}
        arguments = ", ".join(variables.values())
        text = _Text([f"def run({arguments}, i):"] if arguments else ["def run(i):"])
        last = {value: i for i, group in enumerate(ops) for op in group for value in reads(op)}
        kept = {value for _, value in program.outputs}
        for i, group in enumerate(ops):
            made = [v for op in group for v in ((op.move.target,) if isinstance(op, Start) else writes(op))]
            if isinstance(wait := group[0], Wait):
                if overlapped:
                    text.lines.append(f"    {(name := variables[wait.move.target])} = {name}()")
                continue
            variables |= {value: f"v{len(variables) + n}" for n, value in enumerate(made)}
            self._line(text, group, made, variables, bind, program)
            used = dict.fromkeys(value for op in group for value in reads(op))
            if dead := [variables[v] for v in used if last[v] == i and v not in kept]:
                text.lines.append(f"    del {', '.join(dead)}")
        text.lines.append(f"    return ({''.join(variables[value] + ', ' for _, value in program.outputs)})")
        self.source = "\n".join(text.lines)
        namespace = text.names
        exec(compile(self.source, "<program>", "exec"), namespace)
        self.run: Callable[..., tuple[Any, ...] | None] = namespace["run"]
        """(values of the program's inputs, `Inputs`) -> its outputs; None for a step without samples that ended."""

    @staticmethod
    def _line(
        text: _Text,
        group: tuple[Op, ...],
        made: list[str],
        variables: dict[str, str],
        bind: Callable[[Op], Bound],
        program: Program,
    ) -> None:
        outs = ", ".join(variables[value] for value in made)
        op = group[0]
        if isinstance(op, Part) and len(group) > 1:
            sizes = tuple(part.end - part.first for part in group if isinstance(part, Part))
            text.lines.append(f"    {outs} = {variables[op.source]}.split_with_sizes({sizes}, -1)")
            return
        bound = bind(op)
        if bound.ends:
            text.lines += ["    if not i.sample_rows.shape[0]:", "        return None"]
        given = [variables[value] for value in reads(op)]
        if bound.first is not None:
            given[0] = f"{text.name(bound.first, 'c')}({given[0]})"
        call = text.name(bound.call, "f")
        text.lines.append(f"    {outs} = {call}({', '.join([*given, *(f'i.{name}' for name in bound.more)])})")


def fuse_cores(program: Program) -> tuple[Op, ...]:
    """Attention's two halves as the one module that they are parts of, where no move stands between them."""
    ops: list[Op] = []
    for op in program.ops:
        before = ops[-1] if ops else None
        if isinstance(op, Call) and isinstance(before, Call) and op.module.endswith(".core.attend"):
            core = op.module.removesuffix(".attend")
            if before.module == f"{core}.heads" and [v for _, v in before.outputs] == [v for _, v in op.inputs]:
                ops[-1] = Call(core, before.inputs, op.outputs)
                continue
        ops.append(op)
    return tuple(ops)


def grouped_parts(ops: tuple[Op, ...], program: Program) -> Iterator[tuple[Op, ...]]:
    """Each operation alone, but the parts of one value together where they are all of it, in order: one split."""
    parts: dict[str, list[Part]] = {}
    for op in ops:
        if isinstance(op, Part):
            parts.setdefault(op.source, []).append(op)
    split = {}
    for source, found in parts.items():
        found.sort(key=lambda part: part.first)
        bounds = [0, *(part.end for part in found)]
        if [part.first for part in found] == bounds[:-1] and bounds[-1] == program.values[source].shape[-1]:
            split[source] = tuple(found)
    done: set[str] = set()
    for op in ops:
        if isinstance(op, Part) and op.source in split:
            if op.source not in done:
                done.add(op.source)
                yield split[op.source]
        else:
            yield (op,)
