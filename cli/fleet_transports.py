"""Which transports a worker opens for its KV, and opening them.

Unless the configuration names kinds, a worker has every kind that works where it is, best first: on one machine shared
memory (no copy through the kernel: about twice NIXL's rate there, docs/transfer.md), then NIXL, then gRPC; for other
machines NIXL, then gRPC. A peer that cannot use the first one takes the next.
"""

from __future__ import annotations

from tokenrelay.base.errors import ConfigError
from tokenrelay.base.logging import get_logger
from tokenrelay.cli.fleet_config import FleetConfig
from tokenrelay.services.chassis.security import Security
from tokenrelay.transfer.memory import Memory
from tokenrelay.transfer.select import available, open_transport
from tokenrelay.transfer.transport import Identity, Transport

log = get_logger("fleet")


def default_kinds(address: str, security: Security) -> tuple[str, ...]:
    """Kinds for a worker that is reached at `address`, best first."""
    wanted: tuple[str, ...]
    if address.startswith("unix:"):
        wanted = ("shared", "nixl", "stream")
    elif security.encrypts:  # the network is not the fleet's own, and NIXL's data is in the clear
        wanted = ("stream",)
    else:
        wanted = ("nixl", "stream")
    return tuple(kind for kind in wanted if kind in available())


async def open_transports(
    config: FleetConfig, address: str, identity: Identity, memory: Memory, security: Security
) -> list[Transport]:
    """Listening. Raises ConfigError for a kind that was named and does not open; a default one is left out."""
    opened: list[Transport] = []
    for kind in config.transports or default_kinds(address, security):
        if kind == "shared" and not address.startswith("unix:"):
            continue  # no path that a peer would find
        transport = open_transport(kind, identity, memory, listen=_listen(config, address, kind), security=security)
        try:
            await transport.open()
        except ConfigError as error:
            if kind in config.transports or kind != "nixl":
                raise
            log.warning("NIXL is installed and does not work here: KV moves without it", reason=error.message)
        else:
            opened.append(transport)
    if not opened:
        raise ConfigError(f"fleet.transports is {', '.join(config.transports)}: none of them can serve at {address}")
    return opened


def _listen(config: FleetConfig, address: str, kind: str) -> str:
    if config.transfer_host and kind != "shared":
        return f"{config.transfer_host}:0"
    if address.startswith("unix:"):
        return f"{address}.{kind}"
    return f"{address.rpartition(':')[0]}:0"
