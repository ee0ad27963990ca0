"""The kvstore as a process: its configuration, its signals, the handover to a standby."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from etcd_server import EtcdServer, free_port
from kv_fleet import Fleet, member, named
from kv_process import KvProcess

from tokenrelay.base.errors import ConfigError
from tokenrelay.ledger.api import Joined
from tokenrelay.services.kvstore.config import parse_arguments, resolve_options

PREFILL = member("prefill", role="prefill")


def run(*flags: str, environ: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tokenrelay.cli.main", "kvstore", *flags]
    return subprocess.run(command, capture_output=True, text=True, timeout=30, env=environ, check=False)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--address", "nowhere"], "kvstore.address is 'nowhere', expected host:port or unix:PATH"),
        (["--backend", "zookeeper"], "kvstore.backend (flag --backend) is 'zookeeper', expected one of"),
        (["--backend", "etcd", "--etcd", "host"], "kvstore.etcd has 'host', expected host:port"),
        (["--backend", "etcd", "--etcd-prefix", "/x"], "kvstore.etcd_prefix is '/x', expected a final /"),
        (["--backend", "etcd", "--etcd-timeout-s", "9"], "less than half of kvstore.lease_s"),
        (["--lease-s", "soon"], "kvstore.lease_s (flag --lease-s) is 'soon', expected a number"),
        (["--handles-max", "0"], "expected at least 1"),
    ],
)
def test_a_wrong_setting_is_named(flags: list[str], words: str) -> None:
    with pytest.raises(ConfigError) as error:
        resolve_options(parse_arguments(flags))
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--tier-dir", "/dev/null/x", "--admin-port", "0"], "error: kvstore.tier_dir: /dev/null/x: Not a directory"),
        (["--address", "192.0.2.1:0", "--admin-port", "0"], "error: cannot listen on 192.0.2.1:0"),
    ],
)
def test_a_start_that_fails_ends_in_one_sentence(flags: list[str], words: str) -> None:
    done = run(*flags)
    assert done.returncode == 1 and words in done.stderr and "Traceback" not in done.stderr, done.stderr


def test_print_config_tells_where_values_come_from_and_no_secret(tmp_path: Path) -> None:
    file = tmp_path / "relay.toml"
    file.write_text('[kvstore]\nlease_s = 7\n[security]\ntoken = "a-secret-of-the-fleet"\n')
    done = run("--config", str(file), "--print-config", "--answer-s", "3")
    assert f"kvstore.lease_s = 7.0  # file {file}" in done.stdout
    assert "kvstore.answer_s = 3.0  # flag --answer-s" in done.stdout
    assert "security.token = (set)" in done.stdout and "a-secret" not in done.stdout


async def test_sigterm_hands_over_to_a_standby_and_loses_nothing(
    empty_fleet: Fleet, tmp_path: Path, etcd: EtcdServer
) -> None:
    fields = {"backend": "etcd", "etcd": (etcd.endpoint,), "etcd_prefix": f"/{free_port()}/", "lease_s": 30}
    fields |= {"tier_dir": str(tmp_path / "tier")}
    active = KvProcess(tmp_path, "a", **fields)
    client = await empty_fleet.kvstore_client(active.address, f"unix:{tmp_path}/b.sock")
    assert isinstance(await client.join(PREFILL, lease_s=30), Joined)
    handles = {named(await client.reserve(PREFILL.actor, extents=1, deadline_s=60)) for _ in range(20)}
    standby = KvProcess(tmp_path, "b", **fields)
    began_s = time.monotonic()
    active.signal(signal.SIGTERM)
    assert active.wait() == 0
    views = await client.views()
    while not isinstance(views, list):
        views = await client.views()
    assert time.monotonic() - began_s < 10, "well before the lease of 30 s is over"
    assert {view.handle for view in views} == handles and client.connection.term == 2
    standby.signal(signal.SIGTERM)
    assert standby.wait() == 0
    standby.close()
    active.close()
