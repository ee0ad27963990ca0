"""`tokenrelay serve`: settings in, two supervised processes out.

Flags are handed to the child they belong to; file and environment each child reads by itself, by the same rules,
so that what `--print-config` shows is what runs.
"""

from __future__ import annotations

import asyncio
import json
import socket
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
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
from tokenrelay.cli.mesh import MeshObserver, connect
from tokenrelay.cli.process import STATUS_FD, ChildFailed, ChildSpec
from tokenrelay.cli.supervisor import Observer, Supervisor, claim_port, private_folder
from tokenrelay.services.decode.config import WorkerConfig
from tokenrelay.services.prefill.config import PrefillConfig
from tokenrelay.services.router.config import RouterConfig

JOIN_S = 30.0  # for the router's handshake with the worker, which takes some milliseconds
BUNDLED_MODEL = Path(__file__).resolve().parents[1] / "assets" / "tokenrelay-tiny"


@dataclass(frozen=True)
class ServeOptions:
    """What stood on the command line; None is not given."""

    file: Path | None = None  # --config
    router: Mapping[str, Any] = field(default_factory=dict)  # settings of [router] by name
    worker: Mapping[str, Any] = field(default_factory=dict)  # settings of [worker] by name
    status_fd: int | None = None
    quiet: bool = False  # no display even on a terminal
    workers: int = 1
    prefill: int = 0  # workers for prompts, and `decode` to go on with them, instead of `workers` that do both
    decode: int = 0
    table: bool = False  # a live table of the workers, on a terminal


def run_serve(options: ServeOptions) -> int:
    """Serve until a signal ends it; the exit code. Raises TokenRelayError when the start failed or a child gave up."""
    try:
        return _serve(options)
    except TokenRelayError as error:
        StatusPipe(options.status_fd).failed(error)
        raise


def _serve(options: ServeOptions) -> int:
    settings = _resolve(options)
    router, worker = settings.router.values, settings.worker.values
    setup_logging("supervisor", level=router.log_level, style=router.log_style)
    model = check_model_folder(Path(worker.model) if worker.model else BUNDLED_MODEL)
    listening = claim_port(router.host, router.port)
    port = listening.getsockname()[1]
    url = f"{router.scheme}://{_in_url(router.host)}:{port}"
    display = sys.stderr.isatty() and not options.quiet
    observers = _observers(url, options, display)
    levels: dict[str, Any] = {}
    if display:
        _say_machine()
        quieter = all(part.origins["log_level"] == "default" for part in (settings.router, settings.worker))
        levels = {"log_level": "warning"} if quieter else {}  # the display says what a person at a terminal asks first
    with private_folder() as folder:
        flags = {**levels, **_given(options.worker), "model": model}
        first: list[list[ChildSpec]] = []
        if options.prefill:
            keeper = kvstore_child(levels, options.file, folder)
            first = [[keeper]]
            workers = fleet_children(flags, options, folder, str(keeper.socket))
            its = {"kvstore": f"unix:{keeper.socket}"}
        else:
            workers = worker_children(flags, options, folder)
            its = {"worker": ",".join(f"unix:{spec.socket}" for spec in workers)}
        flags = {**levels, **_given(options.router), "port": port, **its}
        stages = [*first, workers, [router_child(flags, options.file, listening)]]
        limits = settings.supervisor.values

        async def supervise() -> int:
            joined = partial(_joined, url, len(workers))
            return await Supervisor(stages, limits, observers, joined=joined).run()

        with listening:
            code = asyncio.run(supervise())
    if observers.failure is not None:
        raise ChildFailed(observers.failure)
    return code


def worker_children(flags: Mapping[str, Any], options: ServeOptions, folder: Path) -> list[ChildSpec]:
    """`options.workers` of them, each with both roles; they divide this machine's cores and its default KV memory."""
    names = ["worker"] if options.workers == 1 else [f"worker-{number}" for number in range(1, options.workers + 1)]
    specs = []
    for name in names:
        path = str(folder / f"{name}.sock")
        its = {**flags, "socket": path, "kv_sharers": options.workers}
        specs.append(ChildSpec(name, _command("tokenrelay.cli.worker", its, options.file), socket=path))
    return specs


def fleet_children(flags: Mapping[str, Any], options: ServeOptions, folder: Path, kvstore: str) -> list[ChildSpec]:
    """Prefill and decode workers that find each other at a kvstore."""
    specs = []
    for role, count in (("prefill", options.prefill), ("decode", options.decode)):
        for number in range(1, count + 1):
            name = f"{role}-{number}"
            path = str(folder / f"{name}.sock")
            its = {**flags, "socket": path, "kv_sharers": options.prefill + options.decode}
            its |= {"role": role, "name": name, "kvstore": f"unix:{kvstore}"}
            specs.append(ChildSpec(name, _command("tokenrelay.cli.worker", its, options.file), socket=path))
    return specs


def kvstore_child(flags: Mapping[str, Any], file: Path | None, folder: Path) -> ChildSpec:
    """Of this fleet alone: its handles and members are in memory, and workers tell a new life of it who they are."""
    path = str(folder / "kvstore.sock")
    its = {**flags, "address": f"unix:{path}", "admin_port": 0}
    return ChildSpec("kvstore", _command("tokenrelay.services.kvstore", its, file), socket=path, light=True)


def router_child(flags: Mapping[str, Any], file: Path | None, listening: socket.socket) -> ChildSpec:
    """A router that accepts from our socket, so that its next life can take over without a gap."""
    fd = listening.fileno()
    command = [*_command("tokenrelay.services.router", flags, file), "--listen-fd", str(fd)]
    return ChildSpec("router", command, pass_fds=(fd,), light=True, overlaps=True)


def print_settings(options: ServeOptions) -> None:
    """Every setting, its value and its origin."""
    table = Table(box=None, header_style="bold")
    for column in ("setting", "value", "from"):
        table.add_column(column, overflow="fold")
    settings = _resolve(options)
    chosen = {
        "router.worker": ("the worker's socket", "set by serve"),
        "worker.socket": ("a private one", "set by serve"),
    }
    if not settings.worker.values.model:
        chosen["worker.model"] = (repr(str(BUNDLED_MODEL)), "default: the bundled one")
    for resolved in (settings.router, settings.worker, settings.prefill, settings.supervisor):
        for name, value, origin in resolved.rows():
            value, origin = chosen.get(name, (value, origin))
            table.add_row(name, value, origin, style="dim" if origin.startswith("default") else None)
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


@dataclass(frozen=True)
class _Settings:
    supervisor: Resolved[SupervisorConfig]
    router: Resolved[RouterConfig]
    worker: Resolved[WorkerConfig]
    prefill: Resolved[PrefillConfig]


def _resolve(options: ServeOptions) -> _Settings:
    """As each part will do it for itself. Raises ConfigError."""
    settings = _Settings(
        supervisor=resolve(SupervisorConfig, "supervisor", file=options.file),
        router=resolve(RouterConfig, "router", file=options.file, flags=options.router),
        worker=resolve(WorkerConfig, "worker", file=options.file, flags=options.worker),
        prefill=resolve(PrefillConfig, "prefill", file=options.file),
    )
    settings.worker.values.check()
    return settings


async def _joined(url: str, workers: int) -> None:
    """Until the router has shaken hands with every worker: then `ready` means that a request will work."""
    end_s = time.monotonic() + JOIN_S
    while True:
        try:
            async with asyncio.timeout(JOIN_S):
                reader, writer = await connect(url)
                writer.write(b"GET /ready HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
                status, _, body = (await reader.read()).partition(b"\r\n\r\n")
                writer.close()
        except (OSError, TimeoutError) as error:
            raise ChildFailed(f"the router does not answer at {url}") from error
        if status.split()[1:2] == [b"200"] and json.loads(body)["workers"] == workers:
            return
        if time.monotonic() > end_s:
            raise ChildFailed(f"the router did not accept every worker within {JOIN_S:.0f} s; its log says why")
        await asyncio.sleep(0.02)


def _observers(url: str, options: ServeOptions, display: bool) -> Observers:
    observers: list[Observer] = []
    if options.status_fd is not None:
        observers.append(StatusObserver(options.status_fd, url))
    if display and options.table:
        observers.append(MeshObserver(Console(stderr=True, highlight=False), url))
    elif display:
        observers.append(TerminalObserver(Console(stderr=True, highlight=False), url))
    else:
        observers.append(LogObserver())
    return Observers(*observers)


def _say_machine() -> None:
    """One line about what it runs on."""
    machine = look()
    remark = "" if machine.gpus else ": running on the CPU"
    Console(stderr=True, highlight=False).print(f"{machine.summary()}{remark}", style="dim", markup=False)


def _given(flags: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in flags.items() if value is not None}


def _command(module: str, flags: Mapping[str, Any], file: Path | None) -> list[str]:
    """A child's command line: only what was given, so that it finds the rest where we would."""
    # -P: a queue.py in the folder where the server was started is none of ours.
    command = [sys.executable, "-Pm", module, "--status-fd", STATUS_FD]
    if file is not None:
        command += ["--config", str(file.resolve())]
    for name, value in flags.items():
        command += [f"--{name.replace('_', '-')}", str(value)]
    return command


def _in_url(host: str) -> str:
    """The host as one types it into a client: an address that listens everywhere is reached at this machine's own."""
    if host in ("", "0.0.0.0", "::"):
        return "127.0.0.1"
    return f"[{host}]" if ":" in host else host
