"""Settings of a worker that is a member of a fleet."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tokenrelay.base.config import setting
from tokenrelay.base.errors import ConfigError
from tokenrelay.transfer.select import available


@dataclass(frozen=True, kw_only=True)
class FleetConfig:
    """Settings of a worker that is not alone, the table `[fleet]` (`TOKENRELAY_FLEET_…`)."""

    role: Literal["colocated", "prefill", "decode"] = setting("colocated", "what the fleet uses this worker for")
    name: str = setting("", "stays the same over restarts; empty: the role and the socket's name")
    kvstore: tuple[str, ...] = setting((), "addresses of kvstores, host:port or unix:PATH, comma-separated")
    address: str = setting("", "host:port to be reached at and to serve on; empty: the worker's Unix socket")
    listen: str = setting("", "host:port to serve on, such as 0.0.0.0:7100, where it is not the address; empty: it is")
    transports: tuple[str, ...] = setting((), "kinds of transport, best first; empty: what works here")
    transfer_host: str = setting("", "address that peers of other hosts read KV from; empty: this machine only")
    lease_s: float = setting(10.0, "how long the fleet waits for a sign of life, seconds", minimum=0.1, maximum=3600)
    join_s: float = setting(60.0, "how long to wait for a kvstore at the start, seconds", minimum=0.1)
    handle_deadline_s: float = setting(600.0, "seconds from admission until a peer must have claimed", minimum=0.1)
    ledger_wait_s: float = setting(
        5.0, "seconds that a computed prompt waits for a silent kvstore before its request is moved", minimum=0.1
    )
    read_deadline_s: float = setting(30.0, "seconds without a sign of reading until a claim is over", minimum=0.1)
    transfer_deadline_s: float = setting(600.0, "seconds from admission until all KV must be here", minimum=0.1)
    block_tier: bool = setting(False, "write sealed blocks to the kvstore's tier, and load prefixes from it")
    block_tier_tokens_min: int = setting(
        256, "a prefix that the tier has and this worker lacks is loaded from so many tokens on", minimum=1
    )
    admin_host: str = setting("127.0.0.1", "address of the HTTP port with /health, /ready and /metrics")
    admin_port: int | None = setting(None, "that port; 0 lets the system choose; default: none", minimum=0)

    def check(self) -> None:
        """What bounds of single fields cannot say. Raises ConfigError."""
        if self.role != "colocated" and not self.kvstore:
            raise ConfigError(f"fleet.kvstore is empty: a {self.role} worker needs the address of a kvstore")
        for name in ("address", "listen"):
            given = getattr(self, name)
            host, _, port = given.rpartition(":")
            if given and (not host or not port.isdigit() or not 0 < int(port) < 65536):
                raise ConfigError(f"fleet.{name} is {given!r}, expected host:port")
        if self.listen and not self.address:
            raise ConfigError("fleet.listen is set, and fleet.address is empty: where do others reach this worker?")
        unknown = [kind for kind in self.transports if kind not in available()]
        if unknown:
            raise ConfigError(f"fleet.transports has {', '.join(unknown)}, expected some of {', '.join(available())}")
