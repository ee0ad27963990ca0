"""`tokenrelay serve`: settings in, two supervised processes out.

Flags are handed to the child they belong to; file and environment each child reads by itself, by the same rules,
so that what `--print-config` shows is what runs.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from tokenrelay.base.config import Resolved, resolve
from tokenrelay.base.errors import ConfigError, TokenRelayError
from tokenrelay.base.logging import setup_logging
from tokenrelay.base.status import StatusPipe
from tokenrelay.cli.config import SupervisorConfig
from tokenrelay.cli.console import LogObserver, Observers, StatusObserver, TerminalObserver
from tokenrelay.cli.machine import look
from tokenrelay.cli.process import STATUS_FD, ChildFailed, ChildSpec
from tokenrelay.cli.supervisor import Observer, Supervisor, claim_port, private_folder

BUNDLED_MODEL = Path(__file__).resolve().parents[1] / "assets" / "tokenrelay-tiny"


@dataclass(frozen=True)
class ServeOptions:
    """What stood on the command line; None is not given."""

    file: Path | None = None  # --config
    router: Mapping[str, Any] = field(default_factory=dict)  # settings of [router] by name
    worker: Mapping[str, Any] = field(default_factory=dict)  # settings of [worker] by name
    status_fd: int | None = None
    quiet: bool = False  # no display even on a terminal


def run_serve(options: ServeOptions) -> int:
    """Serve until a signal ends it; the exit code. Raises TokenRelayError when the start failed or a child gave up."""
    try:
        return _serve(options)
    except TokenRelayError as error:
        StatusPipe(options.status_fd).failed(error)
        raise


def _serve(options: ServeOptions) -> int:
    limits, router, worker = _resolve(options)
    setup_logging("supervisor", level=router.values.log_level)
    model = check_model_folder(Path(worker.values.model) if worker.values.model else BUNDLED_MODEL)
    port = claim_port(router.values.host, router.values.port)
    url = f"http://{_in_url(router.values.host)}:{port}"
    display = sys.stderr.isatty() and not options.quiet
    observers = _observers(url, options.status_fd, display)
    if display:
        _say_machine()
    with private_folder() as folder:
        socket = str(folder / "worker.sock")
        flags = {**options.worker, "model": model, "socket": socket}
        worker_spec = ChildSpec("worker", _command("tokenrelay.cli.worker", flags, options.file), socket=socket)
        flags = {**options.router, "port": port, "worker": f"unix:{socket}"}
        router_spec = ChildSpec("router", _command("tokenrelay.services.router", flags, options.file))
        supervisor = Supervisor(worker_spec, router_spec, limits.values, observers)
        code = asyncio.run(supervisor.run())
    if observers.failure is not None:
        raise ChildFailed(observers.failure)
    return code


def print_settings(options: ServeOptions) -> None:
    """Every setting, its value and its origin."""
    table = Table(box=None, header_style="bold")
    for column in ("setting", "value", "from"):
        table.add_column(column, overflow="fold")
    for resolved in _resolve(options):
        for name, value, origin in resolved.rows():
            table.add_row(name, value, origin, style=None if origin != "default" else "dim")
    Console(highlight=False).print(table)


def check_model_folder(folder: Path) -> Path:
    """The folder, absolute. Raises ConfigError for what is no model folder at all; the worker checks what is inside."""
    if not folder.is_dir():
        hint = f"; it looks like a name on the Hugging Face Hub: download it first (hf download {folder})"
        looks_like_name = len(folder.parts) == 2 and not folder.is_absolute()
        raise ConfigError(f"there is no model folder {folder}{hint if looks_like_name else ''}")
    if not (folder / "config.json").is_file():
        raise ConfigError(f"{folder} holds no config.json, so it is not a model folder in Hugging Face's format")
    return folder.resolve()


def _resolve(options: ServeOptions) -> tuple[Resolved[SupervisorConfig], Resolved[Any], Resolved[Any]]:
    from tokenrelay.services.decode.config import WorkerConfig
    from tokenrelay.services.router.config import RouterConfig

    return (
        resolve(SupervisorConfig, "supervisor", file=options.file),
        resolve(RouterConfig, "router", file=options.file, flags=options.router),
        resolve(WorkerConfig, "worker", file=options.file, flags=options.worker),
    )


def _observers(url: str, status_fd: int | None, display: bool) -> Observers:
    observers: list[Observer] = []
    if status_fd is not None:
        observers.append(StatusObserver(status_fd, url))
    if display:
        observers.append(TerminalObserver(Console(stderr=True, highlight=False), url))
    else:
        observers.append(LogObserver())
    return Observers(*observers)


def _say_machine() -> None:
    """One line about what it runs on."""
    machine = look()
    remark = "" if machine.gpus else ": running on the CPU"
    Console(stderr=True, highlight=False).print(f"{machine.summary()}{remark}", style="dim", markup=False)


def _command(module: str, flags: Mapping[str, Any], file: Path | None) -> list[str]:
    """A child's command line: only what was given, so that it finds the rest where we would."""
    command = [sys.executable, "-m", module, "--status-fd", STATUS_FD]
    if file is not None:
        command += ["--config", str(file.resolve())]
    for name, value in flags.items():
        if value is not None:
            command += [f"--{name.replace('_', '-')}", str(value)]
    return command


def _in_url(host: str) -> str:
    """The host as one types it into a client: an address that listens everywhere is reached at this machine's own."""
    if host in ("", "0.0.0.0", "::"):
        return "127.0.0.1"
    return f"[{host}]" if ":" in host else host
