"""python -m tokenrelay.services.kvstore --address 127.0.0.1:7000 --backend etcd --etcd 127.0.0.1:2379"""

from __future__ import annotations

import sys

import uvloop

from tokenrelay.base.errors import ConfigError
from tokenrelay.base.ids import incarnation
from tokenrelay.base.logging import setup_logging
from tokenrelay.base.parent import die_with_parent
from tokenrelay.base.status import StatusPipe
from tokenrelay.services.chassis.security import Security
from tokenrelay.services.kvstore.config import parse_arguments, resolve_options
from tokenrelay.services.kvstore.service import run


def main(arguments: list[str]) -> int:
    """The exit code: 1 for an error that ends the start-up."""
    die_with_parent()
    options = parse_arguments(arguments)
    status = StatusPipe(options.status_fd)
    try:
        settings = resolve_options(options)
        if options.print_config:
            for field, value, origin in [*settings.kvstore.rows(), *settings.security.rows()]:
                shown = "(set)" if field == "security.token" and value != "''" else value
                print(f"{field} = {shown}  # {origin}")
            return 0
        config, life = settings.kvstore.values, incarnation()
        security = Security.of(settings.security.values)
        setup_logging("kvstore", level=config.log_level, incarnation=life, style=config.log_style)
        uvloop.run(run(config, security, life, status))
    except ConfigError as error:
        status.failed(error)
        if options.status_fd is None:  # else the supervisor says it, once
            print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
