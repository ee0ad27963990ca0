"""The commands that look inside: kernels, state machines, versions."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from importlib import metadata
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table as Grid

from tokenrelay.base.errors import ConfigError
from tokenrelay.base.version import version
from tokenrelay.cli.machine import look

if TYPE_CHECKING:
    from tokenrelay.libscheduler import Table

# Libraries whose version a bug report needs.
_LIBRARIES = ("torch", "triton", "numpy", "safetensors", "tokenizers", "aiohttp", "grpcio", "msgspec")


def print_kernels(op: str | None) -> None:
    """A table of the registered kernels, of one operation or of all."""
    from tokenrelay.kernels import registry

    _check_op(op, registry.ops())
    table = Grid(box=None, header_style="bold")
    for column in ("operation", "kernel", "device", "needs", "dtypes", "limits", "priority", "from"):
        name = column in ("operation", "kernel", "device")
        table.add_column(column, justify="right" if column == "priority" else "left", overflow="fold", no_wrap=name)
    for name in registry.ops() if op is None else (op,):
        for kernel in registry.kernels(name):
            table.add_row(
                kernel.op,
                kernel.path,
                kernel.device,
                ", ".join(sorted(kernel.isa)) or "-",
                ", ".join(sorted(kernel.dtypes)) or "any",
                "; ".join(f"{key} {limit}" for key, limit in kernel.limits.items()) or "-",
                str(kernel.priority),
                kernel.source,
            )
    console = Console(highlight=False)
    console.print(table)
    for plugin, problem in registry.plugin_errors().items():
        console.print(f"the plugin {plugin} failed: {problem}", style="yellow", markup=False)


def explain_kernel(op: str, features: Sequence[str]) -> None:
    """Which kernel runs for `features` (key=value) and why no other. Raises ConfigError for what makes no sense."""
    from tokenrelay.kernels import registry

    _check_op(op, registry.ops())
    asked: dict[str, Any] = {}
    for feature in features:
        key, equals, value = feature.partition("=")
        if not equals:
            raise ConfigError(f"{feature!r} is not of the form key=value, such as device=cpu or heads=16")
        try:
            asked[key] = value if key in ("device", "dtype") else int(value)
        except ValueError as error:
            raise ConfigError(f"{key} is {value!r}, expected a whole number") from error
    try:
        explanation = registry.explain(op, **asked)
    except ValueError as error:  # an unknown dimension: the message lists the known ones
        raise ConfigError(str(error)) from error
    console = Console(highlight=False)
    console.print(str(explanation), markup=False, soft_wrap=True)
    if explanation.chosen is None:
        raise ConfigError(f"no kernel of {op} can run this")


def print_fsm(name: str | None) -> None:
    """Mermaid diagrams of the state machines, one or all."""
    from tokenrelay.libscheduler import fsm_tables

    tables = fsm_tables()
    if name is not None and name not in tables:
        raise ConfigError(f"no state machine is called {name!r}; there are {', '.join(sorted(tables))}")
    shown = sorted(tables) if name is None else [name]
    print("\n".join(mermaid(tables[each]) for each in shown), end="")


def mermaid(table: Table) -> str:
    """A Mermaid state diagram (mermaid.js.org/syntax/stateDiagram.html): transitions as arrows, refusals as comments.

    A state that nothing leaves is where the machine ends.
    """
    left = {row.state for row in table.rows if row.next is not None}
    arrows: dict[tuple[str, str], list[str]] = {}
    for row in table.rows:
        if row.next is not None:
            arrows.setdefault((row.state, row.next), []).append(row.event)
    lines = ["---", f"title: {table.name}", "---", "stateDiagram-v2", f"    [*] --> {table.initial}"]
    lines += [f"    {state} --> {after}: {', '.join(events)}" for (state, after), events in arrows.items()]
    lines += [f"    {state} --> [*]" for state in table.states if state not in left]
    lines += [f"    %% rejected: {row.event} in {row.state}: {row.reason}" for row in table.rows if row.next is None]
    return "\n".join(lines) + "\n"


def print_version() -> None:
    """Versions for people and for bug reports; imports none of the libraries."""
    machine = look()
    rows = [
        ("tokenrelay", version()),
        ("python", platform.python_version()),
        *((name, _library(name)) for name in _LIBRARIES),
        ("system", f"{platform.system()} {platform.release()} {platform.machine()}"),
        ("cpu", f"{machine.cpu}, {machine.cpus} usable"),
        ("cpu features", ", ".join(machine.features) or "none that matters"),
        ("memory", f"{machine.memory_bytes / 2**30:.1f} GiB"),
        ("gpu", ", ".join(machine.gpus) or "none"),
    ]
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(f"{name:<{width}}  {value}")


def _library(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


def _check_op(op: str | None, known: Sequence[str]) -> None:
    if op is not None and op not in known:
        raise ConfigError(f"no operation is called {op!r}; there are {', '.join(known)}")
