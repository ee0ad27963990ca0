"""The router's configuration: table `[router]` of the TOML file, `TOKENRELAY_ROUTER_*`, flags."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tokenrelay.base.config import Resolved, resolve, setting

MIB = 1 << 20
LOCAL_WORKER = "unix:/tmp/tokenrelay-worker.sock"


@dataclass(frozen=True, kw_only=True)
class RouterConfig:
    """What an operator may set. Bounds of request parameters are in limits.py."""

    host: str = setting("127.0.0.1", "address to listen on")
    port: int = setting(8000, "TCP port to listen on; 0 lets the system choose", minimum=0, maximum=65535)
    worker: tuple[str, ...] = setting(
        (), "gRPC targets of the workers, comma-separated; all serve one model [unix:/tmp/tokenrelay-worker.sock]"
    )
    kvstore: tuple[str, ...] = setting(
        (),
        "kvstores (the active one and its standbys), comma-separated: workers are found there, `worker` may be empty",
    )
    model_dir: str = setting("", "folder with the tokenizer files; empty: the folder the worker names")
    tool_parser: Literal[
        "auto", "dsml", "deepseek", "kimi", "mistral", "qwen-coder", "glm", "hermes", "llama3", "channel"
    ] = setting("auto", "how the model writes tool calls; auto: as its chat template shows")
    reasoning_parser: Literal["auto", "think", "channel", "none"] = setting(
        "auto", "how the model writes reasoning; auto: as its chat template and tokens show"
    )
    model_alias: tuple[str, ...] = setting((), "further names under which the model is served, comma-separated")
    body_bytes_max: int = setting(32 * MIB, "largest HTTP body, bytes; 1 M tokens are about 4 MiB", minimum=1024)
    keys: str = setting("", "file with API keys, made by `tokenrelay keys`; empty: no key is asked for")
    keyless: tuple[str, ...] = setting(
        ("/", "/page/", "/health", "/ready", "/metrics", "/version", "/workers"),
        "paths that need no key, comma-separated; one that ends in / is meant with all below it",
    )
    tls_certificate: str = setting("", "PEM file with the certificate (and its chain); with tls_key: HTTPS")
    tls_key: str = setting("", "PEM file with the certificate's private key")
    cors_origins: tuple[str, ...] = setting(
        (), "origins whose pages may call this server from a browser, comma-separated; *: all; empty: none"
    )
    connections_max: int = setting(16_384, "connections at once; one more is closed", minimum=1)
    head_timeout_s: float = setting(
        10.0, "how long a connection may take to send its first request's headers, seconds", minimum=0.01
    )
    body_timeout_s: float = setting(60.0, "how long a body may take to arrive, seconds", minimum=0.01)
    requests_open_max: int = setting(2048, "requests in work at once; one more is answered 429", minimum=1)
    request_timeout_s: float = setting(3600.0, "longest life of one request, seconds", minimum=1)
    policy: Literal["cache-aware", "power-of-two", "least-load", "round-robin", "consistent-hash"] = setting(
        "cache-aware",
        "how a worker is chosen; cache-aware: the one with the prompt's beginning, if it is not far busier",
    )
    tps_floor_max: int = setting(
        200, "highest TPS floor that a request may ask for, tokens a second; more is cut to that", minimum=1
    )
    moves_max: int = setting(
        2, "times a sequence goes on elsewhere when its worker dies or drains (with several workers)", minimum=0
    )
    move_wait_s: float = setting(
        15.0, "how long a sequence without a worker waits for one to come back, seconds", minimum=0
    )
    remote_prefill: Literal["auto", "always", "never"] = setting(
        "auto", "whether prefill workers compute prompts for decode workers; auto: where that pays"
    )
    remote_tokens_min: int = setting(
        256, "fewer prompt tokens than this that a decode worker's cache lacks are computed there", minimum=1
    )
    remote_queue_factor: float = setting(
        4.0,
        "a prompt is computed at its busy decode worker when prefill workers have so many times its tokens to do",
        minimum=1.0,
    )
    drain_s: float = setting(60.0, "how long SIGTERM waits for open requests, seconds", minimum=0)
    tokenize_inline_chars: int = setting(
        8192, "more text than this to tokenize goes to a thread (8 k characters take about 2 ms)", minimum=0
    )
    prefix_ceiling: bool = setting(
        False, "count what an infinite cache would have had, for /metrics: 4 us per 1,000 tokens, 8 MiB"
    )
    tokenizer_cache_bytes: int = setting(64 * MIB, "tokenized text kept for next turns, bytes", minimum=0)
    turn_memory_bytes: int = setting(
        64 * MIB, "token ids of past turns, so that a next turn sends only what it appends, bytes; 0: off", minimum=0
    )
    response_store_bytes: int = setting(
        64 * MIB, "responses kept for previous_response_id, bytes; 0: none are", minimum=0
    )
    send_buffer_bytes: int = setting(
        256 << 10, "above this a slow reader's deltas wait and are merged, bytes", minimum=1024
    )
    slow_reader_bytes_max: int = setting(
        4 * MIB, "merged deltas of one request; above this a slow reader is aborted, bytes", minimum=1024
    )
    send_timeout_s: float = setting(30.0, "how long a finished reply may take to be read, seconds", minimum=0.1)
    headers_after_s: float = setting(
        1.0, "a stream without a first token sends its headers after this, seconds", minimum=0.001
    )
    ping_every_s: float = setting(15.0, "SSE comments while a stream waits for its first token, seconds", minimum=0.01)
    debug_endpoints: Literal["auto", "on", "off"] = setting(
        "auto", "/debug/requests: why each open request is where it is; auto: when only this machine can connect"
    )
    page: Literal["on", "off"] = setting("on", "the page at / and what it shows, at /mesh")
    log_level: Literal["debug", "info", "warning", "error"] = setting("info", "how much is logged")
    log_style: Literal["auto", "json", "terminal"] = setting("auto", "how it is logged")

    @property
    def scheme(self) -> str:
        """How its URLs begin."""
        return "https" if self.tls_certificate else "http"

    @property
    def targets(self) -> tuple[str, ...]:
        """Workers that are known from the start."""
        return self.worker or (() if self.kvstore else (LOCAL_WORKER,))


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """The flags: settings as they were written, `config`, `print_config`, `status_fd`. An unknown one ends the
    process.
    """
    parser = argparse.ArgumentParser(prog="tokenrelay router", description=__doc__)
    parser.add_argument("--config", type=Path, help="TOML file with a table [router]")
    parser.add_argument("--print-config", action="store_true", help="show each setting and where it came from, and end")
    parser.add_argument("--status-fd", type=int, help="file descriptor for status lines to a supervisor")
    parser.add_argument("--listen-fd", type=int, help="accept from this inherited socket instead of binding one")
    for field in dataclasses.fields(RouterConfig):
        parser.add_argument(f"--{field.name.replace('_', '-')}", help=f"{field.metadata['help']} [{field.default}]")
    return parser.parse_args(arguments)


def resolve_options(options: argparse.Namespace) -> Resolved[RouterConfig]:
    """The configuration in force. Raises ConfigError that names the setting."""
    flags: dict[str, Any] = {field.name: getattr(options, field.name) for field in dataclasses.fields(RouterConfig)}
    return resolve(RouterConfig, "router", file=options.config, flags=flags)
