"""From declared boundaries to a program: one walk over the modules, moves where an edge's two ends differ.

    program = compile_model(model, Mesh(tp=4))            # PlacementError names both modules of an edge that cannot fit
    print(len(program.moves))

The model may be on the meta device: weights and devices are not looked at.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from tokenrelay.base.errors import PlacementError
from tokenrelay.runtime.placement import passes
from tokenrelay.runtime.placement.boundary import Boundary, Edge, Port
from tokenrelay.runtime.placement.check import check
from tokenrelay.runtime.placement.convert import Converter
from tokenrelay.runtime.placement.cost import CostModel
from tokenrelay.runtime.placement.ir import Add, Call, Move, Op, Part, Program, Value, layouts_of, verify
from tokenrelay.runtime.placement.mesh import STAGES, Mesh

Pass = passes.Pass
DEFAULT_PASSES: tuple[Pass, ...] = (passes.drop_unused, passes.split_reductions, passes.fuse_norms, passes.overlap)


def compile_model(
    model: nn.Module, mesh: Mesh, cost: CostModel | None = None, *, steps: tuple[Pass, ...] = DEFAULT_PASSES
) -> Program:
    """The program of `model` on `mesh`, verified after each pass. Raises PlacementError, see `check`.

    With pipeline stages it is still that of all layers (`stages.cut_stages` cuts it), and nothing is overlapped: a
    collective that is under way cannot be cut.
    """
    cost = cost or CostModel()
    check(model, mesh)
    program = verify(_Walk(model, mesh, cost).run(), "lowering")
    for step in steps:
        if step is passes.overlap and mesh.size(STAGES) > 1:
            continue
        program = verify(step(program, cost), step.__name__)
    return program


class _Walk:
    """Lowers a model; values are named after the port that they first appear at."""

    def __init__(self, model: nn.Module, mesh: Mesh, cost: CostModel) -> None:
        self._model = model
        self._mesh = mesh
        self._converter = Converter(mesh, cost)
        self._values: dict[str, Value] = {}
        self._ops: list[Op] = []
        self._ports: dict[str, tuple[dict[str, Port], dict[str, Port]]] = {}
        self._converted: dict[tuple[str, object], str] = {}
        self._parts: dict[tuple[str, int, int], str] = {}
        self._sends: dict[str, tuple[str, ...]] = {}

    def run(self) -> Program:
        boundary = self._model.boundary
        assert isinstance(boundary, Boundary)  # `check` has seen it
        inputs = {name: self._value(name, port) for name, port in boundary.inputs.items()}
        self._ports[""] = (dict(boundary.inputs), dict(boundary.outputs))
        outputs = self._module("", self._model, inputs)
        ends = tuple(inputs.items()), tuple(outputs.items())
        return Program(self._mesh, *ends, self._values, tuple(self._ops), self._ports, self._sends)

    def _value(self, name: str, port: Port) -> str:
        return self._new(name, Value("", port.shape, layouts_of(port, self._mesh), port.stacked))

    def _new(self, name: str, like: Value) -> str:
        unique, count = name, 1
        while unique in self._values:
            count += 1
            unique = f"{name}#{count}"
        self._values[unique] = Value(unique, like.shape, like.layouts, like.stacked)
        return unique

    def _module(self, path: str, module: nn.Module, inputs: dict[str, str]) -> dict[str, str]:
        boundary = module.boundary
        assert isinstance(boundary, Boundary)
        if boundary.edges:
            return self._composite(path, module, boundary, inputs)
        outputs = {name: self._value(_join(path, name), port) for name, port in boundary.outputs.items()}
        self._ports[path] = (dict(boundary.inputs), dict(boundary.outputs))
        given = tuple((name, inputs[name]) for name in boundary.inputs)
        sends = tuple(axis for axis in boundary.sends if self._mesh.size(axis) > 1)
        self._sends[path] = boundary.sends
        self._ops.append(Call(path, given, tuple(outputs.items()), boundary.tokenwise, sends))
        return outputs

    def _composite(self, path: str, module: nn.Module, boundary: Boundary, inputs: dict[str, str]) -> dict[str, str]:
        """Children run as soon as all that feeds them is there."""
        feeds: dict[str, list[Edge]] = {}
        for edge in boundary.edges:
            feeds.setdefault(edge.target, []).append(edge)
        children = dict.fromkeys(target.rpartition(".")[0] for target in feeds if "." in target)
        at: dict[str, str] = dict(inputs)
        waiting = list(children)
        while waiting:
            ready = [name for name in waiting if all(e.source in at for e in _into(name, feeds))]
            if not ready:
                raise PlacementError(
                    f"{path or 'the model'}: {', '.join(waiting)} wait for each other; edges reach direct children only"
                )
            for name in ready:
                child = module.get_submodule(name)
                takes = child.boundary
                assert isinstance(takes, Boundary)
                taken = {
                    port: self._feed(_join(path, f"{name}.{port}"), spec, feeds[f"{name}.{port}"], at)
                    for port, spec in takes.inputs.items()
                }
                made = self._module(_join(path, name), child, taken)
                at.update((f"{name}.{port}", value) for port, value in made.items())
                waiting.remove(name)
        return {name: self._feed(_join(path, name), port, feeds[name], at) for name, port in boundary.outputs.items()}

    def _feed(self, name: str, port: Port, feeding: list[Edge], at: dict[str, str]) -> str:
        """The value at port `name`: converted, cut, and summed as its edges say."""
        sources = [self._part(at[edge.source], edge) for edge in feeding]
        alike = {self._values[source].layouts for source in sources}
        if len(sources) > 1 and len(alike) == 1:
            sources = [self._sum(name, sources)]  # one conversion of the sum instead of one for each term
        converted = [self._convert(source, name, port) for source in sources]
        return converted[0] if len(converted) == 1 else self._sum(name, converted)

    def _sum(self, name: str, sources: list[str]) -> str:
        target = self._new(name, self._values[sources[0]])
        self._ops.append(Add(tuple(sources), target))
        return target

    def _part(self, source: str, edge: Edge) -> str:
        if edge.part is None:
            return source
        key = (source, *edge.part)
        if key not in self._parts:
            whole = self._values[source]
            shape = (*whole.shape[:-1], edge.part[1] - edge.part[0])
            target = self._new(f"{source}[{edge.part[0]}:{edge.part[1]}]", Value("", shape, whole.layouts))
            self._ops.append(Part(source, target, *edge.part))
            self._parts[key] = target
        return self._parts[key]

    def _convert(self, source: str, name: str, port: Port) -> str:
        value, want = self._values[source], layouts_of(port, self._mesh)
        if value.layouts == want:
            return source
        key = (source, want)
        if key not in self._converted:
            path = self._converter.path(value, want)
            if path is None:
                raise PlacementError(
                    f"{source} -> {name}: no collectives make {value.layouts} into {want} on {self._mesh!r}"
                )
            self._ops += list(passes.chain(path, source, self._new, self._values))
            last = self._ops[-1]
            assert isinstance(last, Move)
            self._converted[key] = last.target
        return self._converted[key]


def _into(child: str, feeds: dict[str, list[Edge]]) -> Iterator[Edge]:
    for target, feeding in feeds.items():
        if target.rpartition(".")[0] == child and "." in target:
            yield from feeding


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
