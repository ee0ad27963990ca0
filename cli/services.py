"""`tokenrelay router|prefill|decode|kvstore`: one service of a fleet, by itself, as a container or a host runs it.

Flags go to the service as they are: it knows its settings, their help and their defaults.
"""

from __future__ import annotations

from collections.abc import Callable

import typer

PANEL = "Services"
_PASS_ON = {"allow_extra_args": True, "ignore_unknown_options": True}


def register(app: typer.Typer) -> None:
    """Add the commands."""

    def command(function: Callable[[typer.Context], None]) -> None:
        app.command(rich_help_panel=PANEL, add_help_option=False, context_settings=_PASS_ON)(function)

    for function in (router, prefill, decode, kvstore):
        command(function)


def router(context: typer.Context) -> None:
    """The router: HTTP in front of the workers that a kvstore names (--kvstore), or that are listed (--worker)."""
    from tokenrelay.services.router.__main__ import main as run_router

    raise typer.Exit(run_router(context.args))


def prefill(context: typer.Context) -> None:
    """A worker that computes prompts and offers their KV to decode workers. See docs/handover.md."""
    raise typer.Exit(_worker("prefill", context.args))


def decode(context: typer.Context) -> None:
    """A worker that takes KV over and decodes; it computes prompts, too, where that is better."""
    raise typer.Exit(_worker("decode", context.args))


def kvstore(context: typer.Context) -> None:
    """The kvstore: who owns which KV, who holds which prefix, blocks that outlive their worker. See docs/kvstore.md."""
    from tokenrelay.services.kvstore.__main__ import main as run_kvstore

    raise typer.Exit(run_kvstore(context.args))


def _worker(role: str, arguments: list[str]) -> int:
    from tokenrelay.cli.worker import main as run_worker

    return run_worker(arguments, role=role)
