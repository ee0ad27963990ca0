"""`tokenrelay router|prefill|decode|kvstore`: each runs by itself on TCP addresses, says its help, and drains."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tokenrelay.base.errors import ConfigError
from tokenrelay.cli.fleet_config import FleetConfig

TOKEN = "the-token-of-this-tests-fleet"
Start = Callable[..., dict[str, Any]]


@pytest.mark.parametrize("command", ["router", "prefill", "decode", "kvstore"])
def test_each_says_its_settings(command: str) -> None:
    said = subprocess.run(
        [sys.executable, "-m", "tokenrelay.cli.main", command, "--help"], capture_output=True, text=True, timeout=60
    )
    assert said.returncode == 0, said.stderr
    assert f"usage: tokenrelay {command}" in said.stdout
    assert "--config" in said.stdout
    assert "--role" not in said.stdout


def test_a_worker_without_an_address_says_which_setting() -> None:
    command = [sys.executable, "-m", "tokenrelay.cli.main", "decode", "--kvstore", "127.0.0.1:1"]
    said = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert said.returncode == 1
    assert "fleet.address (host:port) or worker.socket is empty" in said.stderr


@pytest.mark.parametrize(("name", "value"), [("address", "worker"), ("address", ":7100"), ("listen", "0.0.0.0:0")])
def test_an_address_that_is_none(name: str, value: str) -> None:
    fields: dict[str, Any] = {"kvstore": ("k:1",), "address": "worker:7100", name: value}
    with pytest.raises(ConfigError, match=rf"fleet\.{name} is '{value}', expected host:port"):
        FleetConfig(role="decode", **fields).check()


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Start a service; its facts, with `process`."""
    running: list[subprocess.Popen[bytes]] = []

    def start(*arguments: str) -> dict[str, Any]:
        reading, writing = os.pipe()
        log = tmp_path / f"{len(running)}-{arguments[0]}.log"
        with log.open("wb") as errors:
            process = subprocess.Popen(
                [sys.executable, "-m", "tokenrelay.cli.main", *arguments, "--status-fd", str(writing)],
                stderr=errors,
                pass_fds=(writing,),
                env={**os.environ, "TOKENRELAY_SECURITY_TOKEN": TOKEN, "OMP_NUM_THREADS": "1"},
            )
        os.close(writing)
        running.append(process)
        with os.fdopen(reading) as pipe:
            for line in pipe:
                facts: dict[str, Any] = json.loads(line)
                if facts["event"] == "ready":
                    return {**facts, "process": process, "log": log}
        raise AssertionError(log.read_text()[-4000:])

    yield start
    for process in running:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        process.wait()


def get(port: int, path: str) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=10) as reply:
        return str(reply.read(), "utf-8")


def test_a_fleet_of_services_on_tcp(start: Start) -> None:
    """Each with the fleet's token; an answer comes out of it, and SIGTERM ends each in good order."""
    kv_port = free_port()
    services = [start("kvstore", "--address", f"127.0.0.1:{kv_port}", "--admin-port", "0")]
    for role in ("prefill", "decode"):
        listen = free_port()
        flags = ["--address", f"localhost:{listen}", "--listen", f"127.0.0.1:{listen}", "--admin-port", "0"]
        flags += ["--dtype", "float32", "--blocks", "64", "--slots", "4", "--threads", "1"]
        services.append(start(role, "--kvstore", f"127.0.0.1:{kv_port}", *flags))
        assert get(services[-1]["admin_port"], "/ready")
        assert "tokenrelay_worker_blocks_free" in get(services[-1]["admin_port"], "/metrics")
    services.append(start("router", "--kvstore", f"127.0.0.1:{kv_port}", "--port", "0"))
    port = services[-1]["port"]
    end_s = time.monotonic() + 30
    while time.monotonic() < end_s:
        with contextlib.suppress(OSError):
            if json.loads(get(port, "/ready"))["workers"] == 2:
                break
        time.sleep(0.05)
    model = json.loads(get(port, "/v1/models"))["data"][0]["id"]
    body = {"model": model, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 5, "ignore_eos": True}
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as reply:
        assert json.load(reply)["usage"]["completion_tokens"] == 5
    for service in reversed(services):
        service["process"].send_signal(signal.SIGTERM)
        assert service["process"].wait(30) == 0, service["log"].read_text()[-4000:]
