"""What a rank of another host is told by its launcher, in the variables that torchrun sets."""

from __future__ import annotations

import os
from dataclasses import dataclass

from tokenrelay.base.errors import ConfigError


@dataclass(frozen=True, slots=True)
class RankEnvironment:
    """RANK, MASTER_ADDR and MASTER_PORT as torchrun sets them, TOKENRELAY_RENDEZVOUS_KEY as the leader has it."""

    rank: int
    host: str
    port: int
    key: str

    @staticmethod
    def read() -> RankEnvironment:
        """Raises ConfigError that names the variable."""
        numbers = {}
        for name in ("RANK", "MASTER_PORT"):
            text = os.environ.get(name, "")
            if not text.isdecimal():
                raise ConfigError(f"{name} is {text!r}, expected a number, as torchrun sets it")
            numbers[name] = int(text)
        host = os.environ.get("MASTER_ADDR", "")
        if not host:
            raise ConfigError("MASTER_ADDR is not set: on which host does rank 0 lead?")
        key = os.environ.get("TOKENRELAY_RENDEZVOUS_KEY", "")
        return RankEnvironment(numbers["RANK"], host, numbers["MASTER_PORT"], key)
