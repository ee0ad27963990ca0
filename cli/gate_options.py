"""Options of `serve` about who may come in, and which worker answers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

PANEL = "Who may come in"


def _option(name: str, help: str, metavar: str | None = None, panel: str = PANEL) -> Any:
    return typer.Option(name, help=help, metavar=metavar, rich_help_panel=panel, show_default=False)


KeysOption = Annotated[
    Path | None,
    _option("--keys", "File with API keys, made by `tokenrelay keys`. Default: no key is asked for.", "FILE"),
]
CertificateOption = Annotated[
    Path | None, _option("--tls-certificate", "PEM file; with --tls-key: HTTPS. Default: HTTP.", "FILE")
]
KeyOption = Annotated[Path | None, _option("--tls-key", "PEM file with the certificate's key.", "FILE")]
CorsOption = Annotated[
    str | None,
    _option("--cors-origins", "Origins whose pages may call from a browser, or *. Default: none.", "ORIGINS"),
]
ApiKeyOption = Annotated[
    str,
    typer.Option(
        "--api-key", metavar="KEY", envvar="TOKENRELAY_API_KEY", show_envvar=True, help="Sent as a bearer token."
    ),
]
Policy = Literal["cache-aware", "power-of-two", "least-load", "round-robin", "consistent-hash"]
PolicyOption = Annotated[
    Policy | None,
    _option(
        "--policy",
        "How a worker is chosen, with several. Default: cache-aware, the one with the prompt's beginning unless it is "
        "far busier than others.",
        panel="Steps and queues",
    ),
]


def settings(
    keys: Path | None, tls_certificate: Path | None, tls_key: Path | None, cors_origins: str | None
) -> dict[str, Any]:
    """As the router's settings; paths absolute, as its process may run elsewhere."""
    paths = {"keys": keys, "tls_certificate": tls_certificate, "tls_key": tls_key}
    found: dict[str, Any] = {name: None if path is None else str(path.absolute()) for name, path in paths.items()}
    return found | {"cors_origins": cors_origins}
