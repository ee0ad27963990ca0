"""The `tokenrelay` command. Each command imports what it needs when it runs: `--help` loads no torch and no aiohttp."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

import typer

from tokenrelay.base.errors import TokenRelayError
from tokenrelay.base.parent import die_with_parent
from tokenrelay.cli import bench, gate_options, kernels, keys, services
from tokenrelay.cli.gate_options import ApiKeyOption, CertificateOption, CorsOption, KeyOption, KeysOption, PolicyOption

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="""Serve large language models to coding agents, behind an OpenAI-compatible endpoint.

    [bold]First steps[/bold]

    [cyan]tokenrelay serve[/cyan]  —  the bundled model on http://127.0.0.1:8000, no GPU needed

    [cyan]tokenrelay chat[/cyan]  —  talk to it from another terminal (or: it starts a server of its own)

    [cyan]tokenrelay serve /models/Qwen3-8B[/cyan]  —  any model folder in Hugging Face's format

    [cyan]tokenrelay serve --print-config[/cyan]  —  every setting, its value and where it came from

    Each command explains itself: [cyan]tokenrelay serve --help[/cyan].""",
)
fsm_app = typer.Typer(no_args_is_help=True, help="The state machines of requests and of KV ownership.")
app.add_typer(keys.app, name="keys", rich_help_panel="Serving")
app.add_typer(kernels.app, name="kernels", rich_help_panel="Looking inside")
app.add_typer(fsm_app, name="fsm", rich_help_panel="Looking inside")

EXPERTS_HELP = (
    "How experts are dealt out, by comma: send (tokens go to their experts' ranks along dp, instead of to all), "
    "whole (experts stay whole over tp), cut (they are cut over dp), spare:N (N places a rank for replicas)."
)
MODEL_HELP = "The model: a folder with config.json, *.safetensors and tokenizer files. Default: the bundled one."


def _option(*names: str, help: str, panel: str | None = None, metavar: str | None = None, hidden: bool = False) -> Any:
    return typer.Option(*names, help=help, rich_help_panel=panel, metavar=metavar, show_default=False, hidden=hidden)


def _count(*names: str, help: str, least: int = 0) -> Any:
    return typer.Option(*names, min=least, max=64, metavar="N", help=help)


def _version_and_end(wanted: bool) -> None:
    if wanted:
        from tokenrelay.base.version import version as installed

        print(f"tokenrelay {installed()}")
        raise typer.Exit


@app.callback()
def common(
    version: Annotated[
        bool,
        typer.Option("--version", help="Print the version and end.", callback=_version_and_end, is_eager=True),
    ] = False,
) -> None:
    """Options of the command itself."""


NETWORK, MODEL, MEMORY, STEPS, OTHER = "Where it listens", "The model", "KV memory", "Steps and queues", "Other"
Dtype = Literal["auto", "float32", "bfloat16"]
LogLevel = Literal["debug", "info", "warning", "error"]

# Options of more than one command.
ModelArgument = Annotated[Path | None, typer.Argument(metavar="MODEL", help=MODEL_HELP, show_default=False)]
ConfigOption = Annotated[
    Path | None,
    _option(
        "--config",
        panel=OTHER,
        metavar="FILE",
        help="TOML file with a table per part: \\[router], \\[worker], \\[supervisor]. "
        "The environment (TOKENRELAY_ROUTER_PORT) goes before it, flags before both.",
    ),
]
UrlOption = Annotated[
    str | None,
    _option("--url", metavar="URL", help="The server. Default: http://127.0.0.1:8000 if one answers there, or an own."),
]


@app.command(rich_help_panel="Serving")
def serve(
    model: ModelArgument = None,
    host: Annotated[
        str | None,
        _option(
            "--host",
            panel=NETWORK,
            metavar="ADDRESS",
            help="Default: 127.0.0.1, this machine only, as there "
            "is no password by default. 0.0.0.0 listens to the network.",
        ),
    ] = None,
    port: Annotated[
        int | None, _option("--port", "-p", panel=NETWORK, metavar="PORT", help="Default: 8000. 0 finds a free one.")
    ] = None,
    api_keys: KeysOption = None,
    tls_certificate: CertificateOption = None,
    tls_key: KeyOption = None,
    cors_origins: CorsOption = None,
    policy: PolicyOption = None,
    dtype: Annotated[
        Dtype | None,
        _option("--dtype", panel=MODEL, help="Default: auto, bfloat16 where the machine computes in it, else float32."),
    ] = None,
    weight_dtype: Annotated[
        Literal["auto", "fp8", "int8", "int4", "int4-32", "int4-128"] | None,
        _option(
            "--weight-dtype",
            panel=MODEL,
            help="int8 or int4: matrices are quantized at load (CPU): smaller, faster; fp8: a float8 checkpoint's stay "
            "so (GPU). Default: auto, as --dtype.",
        ),
    ] = None,
    kv_dtype: Annotated[
        Literal["auto", "fp8"] | None,
        _option(
            "--kv-dtype",
            panel=MODEL,
            help="fp8: KV in float8 with factors, for more context in the same memory. Default: auto, as --dtype.",
        ),
    ] = None,
    deterministic: Annotated[
        bool, _option("--deterministic", panel=MODEL, help="Equal bits whatever the batch, chunks, prefix or worker.")
    ] = False,
    tp: Annotated[
        int | None,
        _option(
            "--tp", panel=MODEL, metavar="N", help="Rank processes that heads and features are cut over. Default: 1."
        ),
    ] = None,
    ep: Annotated[
        int | None,
        _option("--ep", panel=MODEL, metavar="N", help="Rank processes that experts are dealt out to. Default: 1."),
    ] = None,
    dp: Annotated[
        int | None,
        _option("--dp", panel=MODEL, metavar="N", help="Rank processes that sequences are dealt out to. Default: 1."),
    ] = None,
    cp: Annotated[
        int | None,
        _option("--cp", panel=MODEL, metavar="N", help="Rank processes that a prompt's tokens are cut over."),
    ] = None,
    pp: Annotated[
        int | None,
        _option("--pp", panel=MODEL, metavar="N", help="Rank processes that layers are dealt out to, in stages."),
    ] = None,
    experts: Annotated[str | None, _option("--experts", panel=MODEL, metavar="WORDS", help=EXPERTS_HELP)] = None,
    device: Annotated[
        Literal["auto", "cpu", "cuda"] | None,
        _option("--device", panel=MODEL, help="Default: auto, a GPU if there is one, else the CPU."),
    ] = None,
    served_model_name: Annotated[
        str | None,
        _option(
            "--served-model-name",
            panel=MODEL,
            metavar="NAME",
            help="What clients call it. Default: the folder's name.",
        ),
    ] = None,
    context_tokens: Annotated[
        int | None,
        _option(
            "--context-tokens",
            panel=MODEL,
            metavar="N",
            help="Prompt and output of one sequence at most. "
            "Default: what the model was made for, as far as the KV pool can hold it.",
        ),
    ] = None,
    kv_memory: Annotated[
        str | None,
        _option(
            "--kv-memory",
            panel=MEMORY,
            metavar="SIZE",
            help="Memory of the KV pool, such as 4GiB. Default: a quarter of what is free.",
        ),
    ] = None,
    blocks: Annotated[
        int | None, _option("--blocks", panel=MEMORY, metavar="N", help="The pool in blocks, instead of --kv-memory.")
    ] = None,
    eviction: Annotated[
        Literal["reuse", "lru"] | None,
        _option(
            "--eviction",
            panel=MEMORY,
            help="Which cached block goes when room is needed. Default: reuse, the least likely to come back; lru: the "
            "least recently used.",
        ),
    ] = None,
    host_cache_gib: Annotated[
        float | None,
        _option(
            "--host-cache-gib",
            panel=MEMORY,
            metavar="GIB",
            help="Host memory to which a GPU worker writes KV blocks back, to load them again. Default: 0, none.",
        ),
    ] = None,
    block_tokens: Annotated[
        int | None,
        _option(
            "--block-tokens",
            panel=MEMORY,
            metavar="N",
            help="16, 32, 64 or 128. Default: 64: smaller blocks share "
            "more of a prefix, larger ones cost less to track.",
        ),
    ] = None,
    slots: Annotated[
        int | None,
        _option("--slots", panel=STEPS, metavar="N", help="Sequences that run at once; others wait. Default: 64."),
    ] = None,
    step_tokens: Annotated[
        int | None,
        _option(
            "--step-tokens",
            panel=STEPS,
            metavar="N",
            help="Tokens of one step, all sequences together: more "
            "raises throughput, less keeps running answers fluent. Default: 2048.",
        ),
    ] = None,
    chunk_tokens: Annotated[
        int | None,
        _option(
            "--chunk-tokens", panel=STEPS, metavar="N", help="Prompt tokens of one sequence in one step. Default: 512."
        ),
    ] = None,
    waiting_max: Annotated[
        int | None,
        _option(
            "--waiting-max",
            panel=STEPS,
            metavar="N",
            help="Sequences that may wait; one more is answered 429. Default: 1024.",
        ),
    ] = None,
    tps_floor: Annotated[
        float | None,
        _option(
            "--tps-floor",
            panel=STEPS,
            metavar="N",
            help="Tokens per second that every running answer keeps; prompts and new requests wait "
            "rather than break it. 0: off. Default: 70.",
        ),
    ] = None,
    floor_wait_s: Annotated[
        float | None,
        _option(
            "--floor-wait-s",
            panel=STEPS,
            metavar="S",
            help="A request waits for the floor's sake so long, at most. Default: 10.",
        ),
    ] = None,
    drafts: Annotated[
        Literal["auto", "ngram", "mtp", "off"] | None,
        _option(
            "--drafts",
            panel=STEPS,
            help="Who guesses tokens ahead: the answer's own text (ngram), the model's prediction layer (mtp), or that"
            " layer on a GPU where the checkpoint has one, else the text (auto, with --draft-tokens). Default: auto.",
        ),
    ] = None,
    draft_tokens: Annotated[
        int | None,
        _option("--draft-tokens", panel=STEPS, metavar="N", help="Tokens guessed ahead, at most; 0: none. Default: 0."),
    ] = None,
    threads: Annotated[
        int | None,
        _option("--threads", panel=STEPS, metavar="N", help="CPU threads of a step. Default: one per usable CPU."),
    ] = None,
    debug_endpoints: Annotated[
        Literal["auto", "on", "off"] | None,
        _option(
            "--debug-endpoints",
            panel=OTHER,
            help="/debug/requests, which `tokenrelay explain` asks. Default: auto, when only this machine can connect.",
        ),
    ] = None,
    log_level: Annotated[LogLevel | None, _option("--log-level", panel=OTHER, help="Default: info.")] = None,
    config: ConfigOption = None,
    print_config: Annotated[
        bool,
        _option(
            "--print-config", panel=OTHER, help="Print every setting, its value and where it came from; serve nothing."
        ),
    ] = False,
    quiet: Annotated[bool, _option("--quiet", panel=OTHER, help="No start-up display, even on a terminal.")] = False,
    status_fd: Annotated[int | None, _option("--status-fd", help="Report the start-up here.", hidden=True)] = None,
) -> None:
    """Serve a model on an OpenAI-compatible endpoint: chat, completions, models, metrics.

    Starts two processes, a worker that holds the model and a router that speaks HTTP, and keeps them running.
    Ctrl-C (or SIGTERM) finishes what runs, then stops; a second one stops at once.

    [bold]Examples[/bold]

    [cyan]tokenrelay serve[/cyan]

    [cyan]tokenrelay serve /models/DeepSeek-V2-Lite --dtype bfloat16 --kv-memory 8GiB --port 9000[/cyan]

    [cyan]tokenrelay serve --config relay.toml --print-config[/cyan]
    """
    from tokenrelay.cli.serve import ServeOptions, print_settings, run_serve

    options = ServeOptions(
        file=config,
        router=gate_options.settings(api_keys, tls_certificate, tls_key, cors_origins)
        | {"host": host, "port": port, "policy": policy, "debug_endpoints": debug_endpoints, "log_level": log_level},
        worker={
            "model": None if model is None else str(model),
            "dtype": dtype,
            "weight_dtype": weight_dtype,
            "kv_dtype": kv_dtype,
            "deterministic": deterministic or None,
            "tp": tp,
            "ep": ep,
            "dp": dp,
            "cp": cp,
            "pp": pp,
            "experts": experts,
            "device": device,
            "served_model_name": served_model_name,
            "context_tokens": context_tokens,
            "block_tokens": block_tokens,
            "kv_memory": kv_memory,
            "blocks": blocks,
            "eviction": eviction,
            "host_cache_gib": host_cache_gib,
            "slots": slots,
            "step_tokens": step_tokens,
            "chunk_tokens": chunk_tokens,
            "waiting_max": waiting_max,
            "tps_floor": tps_floor,
            "floor_wait_s": floor_wait_s,
            "drafts": drafts,
            "draft_tokens": draft_tokens,
            "threads": threads,
            "log_level": log_level,
        },
        status_fd=status_fd,
        quiet=quiet,
    )
    if print_config:
        print_settings(options)
        return
    raise typer.Exit(run_serve(options))


@app.command(rich_help_panel="Serving")
def up(
    model: ModelArgument = None,
    workers: Annotated[int, _count("--workers", "-w", help="Workers that prefill and decode.", least=1)] = 2,
    prefill: Annotated[int, _count("--prefill", help="Workers for prompts alone, with --decode.")] = 0,
    decode: Annotated[int, _count("--decode", help="Workers that go on with them; instead of --workers.")] = 0,
    dtype: Annotated[Dtype | None, _option("--dtype", panel=MODEL, help="Default: auto.")] = None,
    host: Annotated[str | None, _option("--host", panel=NETWORK, metavar="ADDRESS", help="Default: 127.0.0.1.")] = None,
    port: Annotated[int | None, _option("--port", "-p", panel=NETWORK, metavar="PORT", help="Default: 8000.")] = None,
    config: ConfigOption = None,
    quiet: Annotated[bool, _option("--quiet", panel=OTHER, help="No table, even on a terminal.")] = False,
    status_fd: Annotated[int | None, _option("--status-fd", help="Report the start-up here.", hidden=True)] = None,
) -> None:
    """Start the whole mesh on this machine: several workers behind one router, with a live table.

    When a worker dies, what ran on it goes on at another one, and its clients notice nothing but a pause. SIGUSR2
    replaces every service in turn without losing a request. What `serve` sets by flags is set here by `--config` or
    the environment.

    [bold]Examples[/bold]

    [cyan]tokenrelay up[/cyan]

    [cyan]tokenrelay up --prefill 2 --decode 2[/cyan]  —  KV passes between them; a kvstore says who owns it

    [cyan]tokenrelay up /models/Qwen3-8B --workers 4 --config relay.toml[/cyan]
    """
    from tokenrelay.cli.serve import ServeOptions, run_serve

    if bool(prefill) != bool(decode):
        raise typer.BadParameter("--prefill and --decode go together: at least one worker of each")

    options = ServeOptions(
        file=config,
        router={"host": host, "port": port},
        worker={"model": None if model is None else str(model), "dtype": dtype},
        status_fd=status_fd,
        quiet=quiet,
        workers=prefill + decode or workers,
        prefill=prefill,
        decode=decode,
        table=True,
    )
    raise typer.Exit(run_serve(options))


@app.command(rich_help_panel="Serving")
def chat(
    message: Annotated[
        str | None,
        typer.Argument(metavar="MESSAGE", help="Answer this one message and end.", show_default=False),
    ] = None,
    url: UrlOption = None,
    model: Annotated[
        str | None,
        _option(
            "--model",
            "-m",
            metavar="MODEL",
            help="With --url: the served name. Else: a model folder to serve. "
            "Default: the server's first, or the bundled one.",
        ),
    ] = None,
    system: Annotated[str, _option("--system", "-s", metavar="TEXT", help="The system message.")] = "",
    temperature: Annotated[
        float | None, _option("--temperature", "-t", metavar="T", help="0 is greedy. Default: the model's own.")
    ] = None,
    max_tokens: Annotated[
        int | None, _option("--max-tokens", metavar="N", help="Longest answer. Default: what the context holds.")
    ] = None,
    seed: Annotated[int | None, _option("--seed", metavar="N", help="The same seed gives the same answer.")] = None,
    tools: Annotated[
        str | None,
        _option(
            "--tools",
            metavar="FILE|demo|none",
            help="Tools to offer: a JSON list in a file (you are asked for their results), or the demo ones, which run "
            "here: a calculator, and list_files and read_file in this folder. Default: demo for the bundled model.",
        ),
    ] = None,
    api_key: ApiKeyOption = "",
) -> None:
    """Chat in the terminal with a running server, or with one started for the occasion.

    Reasoning is dimmed, tool calls are shown. Ctrl-C stops an answer, Ctrl-D leaves; /help lists the commands.
    Piped, it reads one message and writes the answer alone.

    [bold]Examples[/bold]

    [cyan]tokenrelay chat[/cyan]

    [cyan]tokenrelay chat "What is 17 * 23?"[/cyan]

    [cyan]git diff | tokenrelay chat --url http://gpu-box:8000 --system "Review this change."[/cyan]
    """
    from tokenrelay.cli.chat import ChatRequest, run_chat

    run_chat(
        ChatRequest(
            message=message,
            url=url,
            model=model,
            system=system,
            temperature=temperature,
            tokens_max=max_tokens,
            seed=seed,
            tools=tools,
            api_key=api_key,
        )
    )


services.register(app)
bench.register(app)


@fsm_app.command("show")
def fsm_show(
    name: Annotated[
        str | None, typer.Argument(metavar="NAME", help="One machine. Default: all.", show_default=False)
    ] = None,
) -> None:
    """Print the transition tables as Mermaid state diagrams, made from the tables the compiler checks.

    [cyan]tokenrelay fsm show request > request.mmd[/cyan]
    """
    from tokenrelay.cli.introspect import print_fsm

    print_fsm(name)


@app.command(rich_help_panel="Looking inside")
def explain(
    request_id: Annotated[
        str | None,
        typer.Argument(metavar="REQUEST_ID", help="Its X-Request-Id. Default: every open request.", show_default=False),
    ] = None,
    url: Annotated[
        str | None, _option("--url", metavar="URL", help="The server. Default: http://127.0.0.1:8000.")
    ] = None,
    json: Annotated[bool, _option("--json", help="All numbers, as JSON.")] = False,
    api_key: ApiKeyOption = "",
) -> None:
    """Say why open requests wait, were preempted, or got chunks of the size they got.

    [cyan]tokenrelay explain[/cyan]

    [cyan]tokenrelay explain req-5f2a --url http://127.0.0.1:9000 --json[/cyan]
    """
    from tokenrelay.cli.explain import run_explain

    run_explain(request_id, url, as_json=json, api_key=api_key)


@app.command(rich_help_panel="Looking inside")
def plan(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="A model folder, or a config.json alone.")],
    tp: Annotated[int, _option("--tp", metavar="N", help="Ranks that heads and features are cut over.")] = 1,
    ep: Annotated[int, _option("--ep", metavar="N", help="Ranks that whole experts are dealt out to.")] = 1,
    dp: Annotated[
        int, _option("--dp", metavar="N", help="Ranks that sequences are dealt out to; experts are dealt out too.")
    ] = 1,
    cp: Annotated[int, _option("--cp", metavar="N", help="Ranks that the tokens of a sequence are dealt out to.")] = 1,
    pp: Annotated[int, _option("--pp", metavar="N", help="Pipeline stages that layers are dealt out to.")] = 1,
    experts: Annotated[str, _option("--experts", metavar="WORDS", help=EXPERTS_HELP)] = "",
    tokens: Annotated[int, _option("--tokens", metavar="N", help="Tokens of a step, all ranks. Default: 64.")] = 64,
    host_ranks: Annotated[
        int, _option("--host-ranks", metavar="N", help="Ranks of one host, on the fast link. Default: 8.")
    ] = 8,
    svg: Annotated[Path | None, _option("--svg", metavar="FILE", help="Draw it too.")] = None,
    json: Annotated[bool, _option("--json", help="All numbers, as JSON.")] = False,
) -> None:
    """Say which collectives a model needs on a mesh of ranks, their bytes and time. Needs no weights and no devices.

    [cyan]tokenrelay plan /models/DeepSeek-V3 --tp 8 --dp 8 --experts send,whole[/cyan]
    """
    from tokenrelay.cli.plan import run_plan

    mesh = {"pp": pp, "dp": dp, "cp": cp, "ep": ep, "tp": tp}
    if tokens < 1 or host_ranks < 1:
        _fail("--tokens and --host-ranks are at least 1", 2)
    run_plan(model, mesh, tokens=tokens, host_ranks=host_ranks, experts=experts, svg=svg, as_json=json)


@app.command(rich_help_panel="Looking inside")
def version() -> None:
    """Versions of the parts, what the CPU can do, and whether there is a GPU."""
    from tokenrelay.cli.introspect import print_version

    print_version()


@app.command(rich_help_panel="Looking inside")
def config(config: ConfigOption = None) -> None:
    """Print every setting, its value, and where it came from: default, file or environment."""
    from tokenrelay.cli.serve import ServeOptions, print_settings

    print_settings(ServeOptions(file=config))


def main() -> NoReturn:
    """The console script. Errors are one plain sentence on stderr; exit code 1, or 2 for a wrong command line."""
    die_with_parent()
    try:
        code = app(prog_name="tokenrelay", standalone_mode=False)
    except TokenRelayError as error:
        _fail(error.message, 1)
    except Exception as error:
        if not hasattr(error, "format_message"):
            raise  # a bug: its traceback is the message
        context = getattr(error, "ctx", None)
        command = context.command_path if context is not None else "tokenrelay"
        _fail(f"{error.format_message()} (see: {command} --help)", 2)
    sys.exit(code if isinstance(code, int) else 0)


def _fail(message: str, code: int) -> NoReturn:
    print(f"tokenrelay: {message}", file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    main()
