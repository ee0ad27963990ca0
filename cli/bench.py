"""`tokenrelay bench …`: measurements that a user makes of a server, ours or another's."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

PANEL_LOAD, PANEL_SHAPE, PANEL_OUT = "Load", "Workload", "Result"
OWN_SCALE = 0.02  # of an agent's context, for a server of one's own with the bundled model


def _option(
    *names: str, help: str, panel: str | None = None, metavar: str | None = None, least: float | None = None
) -> Any:
    return typer.Option(*names, help=help, rich_help_panel=panel, metavar=metavar, show_default=False, min=least)


def register(app: typer.Typer) -> None:
    """Add the group."""
    group = typer.Typer(
        no_args_is_help=True, help="Measure a server: how much it carries while users keep their floor."
    )

    @group.callback()
    def bench() -> None:
        """Measure a server: how much it carries while users keep their floor."""

    group.command("agent")(agent)
    app.add_typer(group, name="bench", rich_help_panel="Looking inside")


def agent(
    url: Annotated[
        str | None,
        _option(
            "--url", metavar="URL", help="An OpenAI endpoint, ours or another's. Default: an own server, for this."
        ),
    ] = None,
    model: Annotated[
        str | None,
        _option(
            "--model", "-m", metavar="MODEL", help="The served name; without --url a model folder. Default: its first."
        ),
    ] = None,
    api_key: Annotated[str, _option("--api-key", metavar="KEY", help="Sent as a bearer token.")] = "",
    trace: Annotated[
        Path | None,
        _option(
            "--trace",
            panel=PANEL_SHAPE,
            metavar="FILE",
            help="Replay this trace (Mooncake's format) instead of sessions.",
        ),
    ] = None,
    scale: Annotated[
        float | None,
        _option(
            "--scale",
            panel=PANEL_SHAPE,
            metavar="F",
            help="Factor on every length. Default: 1, or 0.02 for an own server.",
        ),
    ] = None,
    turns: Annotated[
        str, _option("--turns", panel=PANEL_SHAPE, metavar="N-M", help="Turns of a session. Default: 10-15.")
    ] = "10-15",
    first_tokens: Annotated[
        int, _option("--first-tokens", panel=PANEL_SHAPE, metavar="N", help="Of a first turn. Default: 50000.", least=1)
    ] = 50_000,
    system_tokens: Annotated[
        int,
        _option(
            "--system-tokens", panel=PANEL_SHAPE, metavar="N", help="Of those, shared by all. Default: 12000.", least=1
        ),
    ] = 12_000,
    turn_tokens: Annotated[
        int,
        _option("--turn-tokens", panel=PANEL_SHAPE, metavar="N", help="That each turn appends. Default: 800.", least=1),
    ] = 800,
    output_tokens: Annotated[
        int, _option("--output-tokens", panel=PANEL_SHAPE, metavar="N", help="Of an answer. Default: 500.", least=1)
    ] = 500,
    pause: Annotated[
        float,
        _option(
            "--pause",
            panel=PANEL_SHAPE,
            metavar="S",
            help="Between an answer and the next turn, mean. Default: 0.",
            least=0,
        ),
    ] = 0.0,
    requests: Annotated[
        int, _option("--requests", panel=PANEL_SHAPE, metavar="N", help="Of a trace, at most. Default: 300.", least=1)
    ] = 300,
    load: Annotated[
        str | None,
        _option(
            "--load",
            "--concurrency",
            "-c",
            panel=PANEL_LOAD,
            metavar="N,…",
            help="Users at once (of a trace: factors on its rate), one after the other. Default: search for the "
            "largest that keeps the floor.",
        ),
    ] = None,
    load_max: Annotated[
        float,
        _option("--load-max", panel=PANEL_LOAD, metavar="N", help="Where the search ends. Default: 256.", least=1),
    ] = 256.0,
    seconds: Annotated[
        float, _option("--seconds", "-s", panel=PANEL_LOAD, metavar="S", help="Of each load. Default: 60.", least=1)
    ] = 60.0,
    floor: Annotated[
        float,
        _option(
            "--floor",
            panel=PANEL_LOAD,
            metavar="TPS",
            help="Tokens per second that every user keeps. Default: 70.",
            least=0,
        ),
    ] = 70.0,
    ttft_max: Annotated[
        float | None,
        _option(
            "--ttft-max",
            panel=PANEL_LOAD,
            metavar="S",
            help="And 95 % of first tokens come in this time. Default: any.",
        ),
    ] = None,
    devices: Annotated[
        int,
        _option(
            "--devices", panel=PANEL_LOAD, metavar="N", help="That serve, for figures per device. Default: 1.", least=1
        ),
    ] = 1,
    timeout: Annotated[
        float, _option("--timeout", panel=PANEL_LOAD, metavar="S", help="Of one request. Default: 600.", least=1)
    ] = 600.0,
    seed: Annotated[
        int, _option("--seed", panel=PANEL_SHAPE, metavar="N", help="Another seed, other texts. Default: 1.")
    ] = 1,
    json: Annotated[Path | None, _option("--json", panel=PANEL_OUT, metavar="FILE", help="Every figure.")] = None,
    html: Annotated[
        Path | None,
        _option("--html", panel=PANEL_OUT, metavar="FILE", help="A report with the Pareto plot, in one file."),
    ] = None,
) -> None:
    """Replay coding agents' sessions, or a trace, and say how many tokens a minute a device carries at a TPS floor.

    Ctrl-C writes what was measured so far. docs/agent-bench.md says what each figure means.

    [bold]Examples[/bold]

    [cyan]tokenrelay bench agent[/cyan]  —  the bundled model, small sessions

    [cyan]tokenrelay bench agent --url http://gpu-box:8000 --devices 8 --html report.html[/cyan]

    [cyan]tokenrelay bench agent --url http://gpu-box:8000 --trace conversation_trace.jsonl --load 0.5,1,2[/cyan]
    """
    import math

    from tokenrelay.cli.agent_bench.command import Target, run_agent_bench
    from tokenrelay.cli.agent_bench.records import Settings

    settings = Settings(
        trace=trace,
        scale=positive("--scale", scale if scale is not None else 1.0 if url is not None else OWN_SCALE),
        loads=loads_of(load, whole=trace is None),
        load_max=load_max,
        seconds=seconds,
        requests=requests,
        floor=floor,
        ttft_max_s=math.inf if ttft_max is None else positive("--ttft-max", ttft_max),
        devices=devices,
        pause_s=pause,
        turns=turns_of(turns),
        system_tokens=system_tokens,
        first_tokens=first_tokens,
        turn_tokens=turn_tokens,
        output_tokens=output_tokens,
        request_timeout_s=timeout,
        seed=seed,
    )
    if first_tokens <= system_tokens:
        raise typer.BadParameter("--first-tokens must be more than --system-tokens, which are part of it")
    target = Target(url=url, model=model, api_key=api_key, json=json, html=html)
    raise typer.Exit(run_agent_bench(target, settings))


def turns_of(text: str) -> tuple[int, int]:
    """`10-15` or `12`. Raises BadParameter."""
    low, _, high = text.partition("-")
    try:
        found = int(low), int(high or low)
    except ValueError:
        found = (0, 0)
    if not 1 <= found[0] <= found[1] <= 1000:
        raise typer.BadParameter(f"--turns {text!r} is no number of turns such as 12 or 10-15")
    return found


def loads_of(text: str | None, *, whole: bool) -> tuple[float, ...]:
    """`1,2,8`, or none. Raises BadParameter."""
    if text is None:
        return ()
    try:
        found = tuple(float(one) for one in text.split(","))
    except ValueError:
        found = (0.0,)
    wrong = any(not 0 < one <= 4096 or (whole and one != int(one)) for one in found)
    if wrong:
        what = "whole numbers of users" if whole else "factors on the trace's rate"
        raise typer.BadParameter(f"--load {text!r}: expected {what} such as 1,2,8, each above 0 and at most 4096")
    return found


def positive(name: str, value: float) -> float:
    """Raises BadParameter for what is not a positive number."""
    if not 0 < value < float("inf"):
        raise typer.BadParameter(f"{name} must be above 0, not {value:g}")
    return value
