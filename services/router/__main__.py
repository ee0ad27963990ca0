"""python -m tokenrelay.services.router --port 8000 --worker unix:/run/tokenrelay/worker.sock"""

from __future__ import annotations

import socket
import sys

import uvloop

from tokenrelay.base.config import resolve
from tokenrelay.base.errors import ConfigError
from tokenrelay.base.ids import incarnation
from tokenrelay.base.logging import setup_logging
from tokenrelay.base.parent import die_with_parent
from tokenrelay.base.status import StatusPipe
from tokenrelay.services.chassis.security import Security, SecurityConfig
from tokenrelay.services.chassis.tracing import Tracer, TracingConfig
from tokenrelay.services.router.config import parse_arguments, resolve_options
from tokenrelay.services.router.service import run


def main(arguments: list[str]) -> int:
    """The exit code: 1 for an error that ends the start-up."""
    die_with_parent()
    options = parse_arguments(arguments)
    status = StatusPipe(options.status_fd)
    try:
        resolved = resolve_options(options)
        fleet = resolve(SecurityConfig, "security", file=options.config)
        tracing = resolve(TracingConfig, "tracing", file=options.config)
        if options.print_config:
            for field, value, origin in [*resolved.rows(), *fleet.rows(), *tracing.rows()]:
                shown = "(set)" if field == "security.token" and value != "''" else value
                print(f"{field} = {shown}  # {origin}")
            return 0
        security = Security.of(fleet.values)
        config, life = resolved.values, incarnation()
        setup_logging("router", level=config.log_level, incarnation=life, style=config.log_style)
        tracer = Tracer.of(tracing.values, "router", life)
        listening = None if options.listen_fd is None else socket.socket(fileno=options.listen_fd)
        uvloop.run(run(config, status, listening, security, tracer))
    except ConfigError as error:
        status.failed(error)
        if options.status_fd is None:  # else the supervisor says it, once
            print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
