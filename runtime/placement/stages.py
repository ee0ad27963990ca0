"""Cuts a program into pipeline stages: each has some of the layers, and passes on what later ones read.

    programs = cut_stages(program, layers=61)        # one for each place along pp; every one runs on all other axes

The ranks of a stage and of the next one that stand at the same place along all other axes exchange values as they are
placed: a term goes on as a term, a part as a part, so nothing is converted at the cut.
"""

from __future__ import annotations

import re
from dataclasses import replace

from tokenrelay.base.errors import PlacementError
from tokenrelay.runtime.placement.boundary import Port
from tokenrelay.runtime.placement.ir import Call, Op, Program, ReduceNorm, Start, Wait, reads, verify, writes
from tokenrelay.runtime.placement.mesh import AXES, STAGES

_LAYER = re.compile(r"layers\.(\d+)\.")


def stage_layers(layers: int, stage: int, stages: int) -> range:
    """The layers of one stage; the first ones have one more where they do not divide. Raises PlacementError."""
    if stages > layers:
        raise PlacementError(
            f"{stages} pipeline stages, and the model has {layers} layers; each stage has at least one"
        )
    count, more = divmod(layers, stages)
    first = stage * count + min(stage, more)
    return range(first, first + count + (stage < more))


def cut_stages(program: Program, layers: int) -> tuple[Program, ...]:
    """One program for each place along pp, verified; `program` itself where there is one. Raises PlacementError."""
    stages = program.mesh.size(STAGES)
    if stages == 1:
        return (program,)
    if any(isinstance(op, Start | Wait) for op in program.ops):
        raise PlacementError("a program with collectives under way cannot be cut into stages")
    bounds = [0, *(_first_op(program, stage_layers(layers, s, stages).start) for s in range(1, stages))]
    bounds.append(len(program.ops))
    made = []
    inputs = program.inputs
    for stage in range(stages):
        ops = program.ops[bounds[stage] : bounds[stage + 1]]
        later = program.ops[bounds[stage + 1] :]
        outputs = program.outputs if stage == stages - 1 else _crossing(program, inputs, ops, later)
        made.append(verify(_stage(program, inputs, outputs, ops), f"the cut of stage {stage}"))
        inputs = outputs
    return tuple(made)


def _first_op(program: Program, layer: int) -> int:
    """Where the layer's first module runs."""
    for i, op in enumerate(program.ops):
        call = op.call if isinstance(op, ReduceNorm) else op
        found = _LAYER.match(call.module) if isinstance(call, Call) else None
        if found is not None and int(found[1]) == layer:
            return i
    raise PlacementError(f"the program runs nothing of layer {layer}")


def _crossing(
    program: Program, inputs: tuple[tuple[str, str], ...], ops: tuple[Op, ...], later: tuple[Op, ...]
) -> tuple[tuple[str, str], ...]:
    needed = {value for op in later for value in reads(op)} | {value for _, value in program.outputs}
    known = [value for _, value in inputs] + [value for op in ops for value in writes(op)]
    return tuple((value, value) for value in known if value in needed)


def _stage(
    program: Program, inputs: tuple[tuple[str, str], ...], outputs: tuple[tuple[str, str], ...], ops: tuple[Op, ...]
) -> Program:
    def ports(ends: tuple[tuple[str, str], ...]) -> dict[str, Port]:
        values = {port: program.values[value] for port, value in ends}
        return {p: Port(v.shape, dict(zip(AXES, v.layouts, strict=True)), stacked=v.stacked) for p, v in values.items()}

    return replace(
        program, inputs=inputs, outputs=outputs, ops=ops, ports={**program.ports, "": (ports(inputs), ports(outputs))}
    )
