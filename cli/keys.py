"""`tokenrelay keys`: make, list and revoke the API keys that a router asks for."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(no_args_is_help=True, help="The API keys that a router with --keys asks for.")

FileOption = Annotated[
    Path | None,
    typer.Option(
        "--file",
        "-f",
        metavar="FILE",
        help="The keys file. Default: router.keys of the configuration, or keys.json here.",
        show_default=False,
    ),
]
ConfigOption = Annotated[
    Path | None, typer.Option("--config", metavar="FILE", help="TOML file with a table [router].", show_default=False)
]
DEFAULT_FILE = Path("keys.json")


def _limit(name: str, help: str) -> Any:
    return typer.Option(name, min=0, metavar="N", help=f"{help} Default: no limit.", show_default=False)


def _file(file: Path | None, config: Path | None) -> Path:
    """The file that is meant. Raises ConfigError."""
    from tokenrelay.base.config import resolve
    from tokenrelay.services.router.config import RouterConfig

    if file is not None:
        return file
    configured = resolve(RouterConfig, "router", file=config).values.keys
    return Path(configured) if configured else DEFAULT_FILE


@app.command()
def create(
    name: Annotated[str, typer.Argument(metavar="NAME", help="For people: it stands in logs and metrics.")],
    tenant: Annotated[
        str,
        typer.Option(
            "--tenant",
            "-t",
            metavar="NAME",
            help="Keys of one tenant share its cache and its share of the workers. Default: the key is its own tenant.",
            show_default=False,
        ),
    ] = "",
    requests_per_minute: Annotated[int, _limit("--requests-per-minute", "Requests a minute.")] = 0,
    tokens_per_minute: Annotated[
        int, _limit("--tokens-per-minute", "Tokens a minute: prompts as far as no cache has them, and output.")
    ] = 0,
    concurrency: Annotated[int, _limit("--concurrency", "Requests in work at once.")] = 0,
    priority: Annotated[
        int, typer.Option("--priority", metavar="N", help="The best (lowest) class that its requests may ask for.")
    ] = 0,
    tps_floor: Annotated[
        int, _limit("--tps-floor", "The highest TPS floor that its requests may ask for, tokens a second.")
    ] = 0,
    admin: Annotated[bool, typer.Option("--admin", help="It may look at everybody's requests: /debug, /mesh.")] = False,
    file: FileOption = None,
    config: ConfigOption = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print the key alone, for scripts.")] = False,
) -> None:
    """Make a key and print it: this once, as only its digest is kept. A running router takes it within a second.

    [cyan]tokenrelay keys create ci --tenant build --requests-per-minute 60[/cyan]
    """
    from tokenrelay.base.errors import ConfigError
    from tokenrelay.services.router.keys import locked, new_key, read_keys, write_keys

    path = _file(file, config)
    key, record = new_key(
        name,
        tenant=tenant,
        requests_per_minute=requests_per_minute,
        tokens_per_minute=tokens_per_minute,
        concurrency=concurrency,
        priority=priority,
        tps_floor=tps_floor,
        admin=admin,
    )
    with locked(path):
        records = read_keys(path) if path.exists() else []
        if any(one.name == name for one in records):
            raise ConfigError(f"{path} has a key {name!r} already: revoke it first, or choose another name")
        write_keys(path, [*records, record])
    if quiet:
        print(key)
        return
    _say_created(key, path, name)


def _say_created(key: str, path: Path, name: str) -> None:
    from rich.console import Console
    from rich.panel import Panel
    from rich.text import Text

    console = Console(highlight=False)
    console.print(Panel(Text(key, style="bold green", overflow="fold"), title=f"API key {name}", expand=False))
    console.print("Keep it now: it is not shown again.", style="bold")
    console.print(f"[dim]In {path}. Serve with:[/dim]  tokenrelay serve --keys {path}", soft_wrap=True)
    console.print("[dim]Clients:[/dim]  export OPENAI_API_KEY=…  or  ANTHROPIC_API_KEY=…")


@app.command("list")
def list_keys(
    file: FileOption = None,
    config: ConfigOption = None,
    json: Annotated[bool, typer.Option("--json", help="All fields but the digests, as JSON.")] = False,
) -> None:
    """List the keys: names, tenants, limits. Keys themselves are kept nowhere."""
    import msgspec

    from tokenrelay.services.router.keys import read_keys

    records = read_keys(_file(file, config))
    if json:
        rows = [
            {name: value for name, value in msgspec.to_builtins(one).items() if name != "sha256"} for one in records
        ]
        print(msgspec.json.format(msgspec.json.encode(rows), indent=2).decode())
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in ("name", "id", "tenant", "made"):
        table.add_column(column, overflow="fold")
    for column in ("req/min", "tok/min", "at once", "floor", "class"):
        table.add_column(column, justify="right")
    table.add_column("")
    for one in records:
        limits = (one.requests_per_minute, one.tokens_per_minute, one.concurrency, one.tps_floor)
        shown = [f"{limit:,}" if limit else "-" for limit in limits]
        table.add_row(
            one.name,
            one.id,
            one.tenant or "-",
            one.created[:10],
            *shown,
            str(one.priority),
            "admin" if one.admin else "",
        )
    Console(highlight=False).print(table if records else "no keys")


@app.command()
def revoke(
    name: Annotated[str, typer.Argument(metavar="NAME|ID", help="As `list` shows it.")],
    file: FileOption = None,
    config: ConfigOption = None,
) -> None:
    """Take a key back: a running router refuses it within a second. What it has in work goes on."""
    from tokenrelay.base.errors import ConfigError
    from tokenrelay.services.router.keys import locked, read_keys, write_keys

    path = _file(file, config)
    with locked(path):
        records = read_keys(path)
        left = [one for one in records if name not in (one.name, one.id)]
        if len(left) == len(records):
            known = ", ".join(one.name for one in records[:20]) or "none"
            raise ConfigError(f"{path} has no key {name!r}; it has: {known}")
        write_keys(path, left)
    print(f"revoked {name}")
