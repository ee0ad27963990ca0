"""The kvstore's configuration: tables `[kvstore]` and `[security]` of the TOML file, `TOKENRELAY_KVSTORE_*`, flags."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tokenrelay.base.config import Resolved, resolve, setting
from tokenrelay.base.errors import ConfigError
from tokenrelay.services.chassis.security import SecurityConfig

MIB = 1 << 20


@dataclass(frozen=True, kw_only=True)
class KvstoreConfig:
    """What an operator may set."""

    address: str = setting("127.0.0.1:7000", "where to serve gRPC: host:port or unix:PATH; port 0: the system chooses")
    advertise: str = setting("", "address that others are told to use; empty: the same")
    admin_host: str = setting("127.0.0.1", "address of the HTTP port with /health, /ready and /metrics")
    admin_port: int = setting(7001, "that port; 0 lets the system choose", minimum=0, maximum=65535)
    backend: Literal["embedded", "etcd"] = setting(
        "embedded", "where the ledger is kept beside this process's memory: nowhere, or in etcd, for standbys"
    )
    etcd: tuple[str, ...] = setting(("127.0.0.1:2379",), "endpoints of etcd, host:port, comma-separated")
    etcd_prefix: str = setting("/tokenrelay/default/", "keys of this fleet begin with it")
    etcd_timeout_s: float = setting(1.0, "one request to etcd, seconds", minimum=0.05, maximum=60)
    lease_s: float = setting(
        10.0,
        "how long this kvstore may decide without hearing from etcd; etcd grants 2 s at least",
        minimum=1,
        maximum=600,
    )
    member_lease_max_s: float = setting(60.0, "longest lease a member is granted, seconds", minimum=0.1, maximum=3600)
    answer_s: float = setting(
        5.0, "how long a claimant whose claim is over may take to say that it reads no more, seconds", minimum=0.01
    )
    handles_max: int = setting(65536, "KV handles open at once", minimum=1, maximum=1 << 24)
    directory_entries_max: int = setting(1 << 20, "block hashes the prefix directory knows", minimum=1)
    tier_memory_bytes: int = setting(256 * MIB, "blocks kept in memory, bytes; 0: no tier in memory", minimum=0)
    tier_dir: str = setting(
        "", "folder for blocks on disk, of which each kvstore uses a part of its own; empty: no tier on disk"
    )
    tier_disk_bytes: int = setting(4096 * MIB, "blocks that this kvstore keeps on disk, bytes", minimum=0)
    drain_s: float = setting(10.0, "how long SIGTERM waits until all is written down, seconds", minimum=0)
    log_level: Literal["debug", "info", "warning", "error"] = setting("info", "how much is logged")
    log_style: Literal["auto", "json", "terminal"] = setting("auto", "how it is logged")

    def check(self) -> None:
        """What bounds of single fields cannot say. Raises ConfigError."""
        if self.backend == "etcd":
            if not self.etcd:
                raise ConfigError("kvstore.etcd is empty, expected at least one endpoint such as 127.0.0.1:2379")
            for endpoint in self.etcd:
                host, separator, port = endpoint.rpartition(":")
                if not separator or not host or not port.isdigit():
                    raise ConfigError(f"kvstore.etcd has {endpoint!r}, expected host:port")
            if not self.etcd_prefix.endswith("/"):
                raise ConfigError(f"kvstore.etcd_prefix is {self.etcd_prefix!r}, expected a final /")
            if self.etcd_timeout_s >= self.lease_s / 2:
                raise ConfigError("kvstore.etcd_timeout_s must be less than half of kvstore.lease_s")
        if not self.address.startswith("unix:") and not self.address.rpartition(":")[2].isdigit():
            raise ConfigError(f"kvstore.address is {self.address!r}, expected host:port or unix:PATH")


@dataclass(frozen=True)
class Settings:
    """Both tables, resolved."""

    kvstore: Resolved[KvstoreConfig]
    security: Resolved[SecurityConfig]


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """The flags: settings as they were written, `config`, `print_config`, `status_fd`."""
    parser = argparse.ArgumentParser(prog="tokenrelay kvstore", description=__doc__)
    parser.add_argument("--config", type=Path, help="TOML file with the tables [kvstore] and [security]")
    parser.add_argument("--print-config", action="store_true", help="show each setting and where it came from, and end")
    parser.add_argument("--status-fd", type=int, help="file descriptor for status lines to a supervisor")
    for field in dataclasses.fields(KvstoreConfig):
        parser.add_argument(f"--{field.name.replace('_', '-')}", help=f"{field.metadata['help']} [{field.default}]")
    return parser.parse_args(arguments)


def resolve_options(options: argparse.Namespace) -> Settings:
    """The configuration in force. Raises ConfigError that names the setting."""
    flags: dict[str, Any] = {field.name: getattr(options, field.name) for field in dataclasses.fields(KvstoreConfig)}
    resolved = resolve(KvstoreConfig, "kvstore", file=options.config, flags=flags)
    resolved.values.check()
    return Settings(resolved, resolve(SecurityConfig, "security", file=options.config))
