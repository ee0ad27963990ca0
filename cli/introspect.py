"""The commands that look inside: kernels, state machines, versions."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from importlib import metadata
from typing import Any

from rich.console import Console
from rich.table import Table as Grid

from tokenrelay.base.errors import ConfigError
from tokenrelay.base.version import version
from tokenrelay.cli.machine import look

# Libraries whose version a bug report needs.
_LIBRARIES = ("torch", "triton", "numpy", "safetensors", "tokenizers", "aiohttp", "grpcio", "msgspec")


def print_kernels(op: str | None) -> None:
    """A table of the registered kernels, of one operation or of all."""
    from tokenrelay.kernels import registry

    _check_op(op, registry.ops())
    table = Grid(box=None, header_style="bold")
    for column in ("operation", "kernel", "device", "needs", "dtypes", "limits", "priority", "from"):
        whole = column in ("operation", "kernel", "device")
        table.add_column(column, justify="right" if column == "priority" else "left", overflow="fold", no_wrap=whole)
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
    """Mermaid diagrams of the state machines, one or all, from the constexpr tables that the compiler checked."""
    from tokenrelay.libscheduler import fsm_tables
    from tokenrelay.libscheduler.diagram import document

    tables = fsm_tables()
    if name is not None and name not in tables:
        raise ConfigError(f"no state machine is called {name!r}; there are {', '.join(sorted(tables))}")
    print("\n".join(document(tables[each]) for each in sorted(tables) if name in (None, each)), end="")


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
