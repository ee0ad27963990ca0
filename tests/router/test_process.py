"""The router as a process: starts fast, imports nothing heavy, speaks to a supervisor, ends on signals."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from mock_worker import MockWorker, Script
from router_stack import until

from tokenrelay.base.status import parse_status
from tokenrelay.proto import worker_pb2

MODULE = "tokenrelay.services.router"


@dataclass
class Process:
    """A router process, and what it told its supervisor."""

    child: asyncio.subprocess.Process
    status: list[dict[str, Any]]
    url: str
    started_s: float

    async def end(self) -> int:
        return await asyncio.wait_for(self.child.wait(), 10)


@contextlib.asynccontextmanager
async def router_process(*flags: str) -> AsyncIterator[Process]:
    read_end, write_end = os.pipe()
    begun_s = time.monotonic()
    child = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", MODULE, "--port", "0", "--status-fd", str(write_end), *flags),
        pass_fds=[write_end],
        stderr=subprocess.DEVNULL,
    )
    os.close(write_end)
    try:
        line = await asyncio.wait_for(asyncio.to_thread(_read_line, read_end), 20)
        status = parse_status(line)
        assert status is not None, line
        yield Process(child, [status], f"http://127.0.0.1:{status.get('port')}", time.monotonic() - begun_s)
    finally:
        os.close(read_end)
        with contextlib.suppress(ProcessLookupError):
            child.kill()
        await child.wait()


def _read_line(descriptor: int) -> bytes:
    data = b""
    while not data.endswith(b"\n") and (piece := os.read(descriptor, 4096)):
        data += piece
    return data


@pytest.fixture
async def worker(tmp_path: Path, model_folder: Path) -> AsyncIterator[MockWorker]:
    worker = MockWorker(f"unix:{tmp_path}/w", model_folder)
    await worker.start()
    yield worker
    await worker.stop()


def test_imports_nothing_heavy() -> None:
    heavy = ("torch", "transformers", "tokenrelay.runtime", "llguidance")
    code = f"import sys, {MODULE}.__main__; print([m for m in {heavy} if m in sys.modules])"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert loaded.strip() == "[]"


async def test_starts_within_a_second_of_processor_time() -> None:
    """Processor time, not wall clock: what a busy machine adds is not the router's."""
    async with router_process("--worker", "unix:/nonexistent/socket") as process:
        cpu_s = _processor_time_s(process.child.pid)
        assert process.status[0]["event"] == "ready"
        assert cpu_s < 1.0, f"{cpu_s} s of processor time to start"
        process.child.terminate()
        assert await process.end() == 0


async def test_serves_and_drains_on_sigterm(worker: MockWorker) -> None:
    worker.say("The quick brown fox")
    worker.host.step_s = 0.05
    async with router_process("--worker", worker.address) as process, aiohttp.ClientSession() as http:
        await _until_ready(http, process.url)
        body = {"messages": [{"role": "user", "content": "Hi"}]}
        request = asyncio.create_task(_post(http, process.url, body))
        await until(lambda: worker.running == 1)
        process.child.terminate()
        reply = await asyncio.wait_for(request, 10)
        assert reply["choices"][0]["message"]["content"] == "The quick brown fox"
        assert await process.end() == 0


async def test_a_second_signal_stops_at_once(worker: MockWorker) -> None:
    worker.host.answer = lambda submit: Script([], finish=worker_pb2.FINISH_NONE)
    async with router_process("--worker", worker.address) as process, aiohttp.ClientSession() as http:
        await _until_ready(http, process.url)
        body = {"messages": [{"role": "user", "content": "Hi"}]}
        request = asyncio.create_task(_post(http, process.url, body))
        await until(lambda: worker.running == 1)
        process.child.send_signal(signal.SIGTERM)
        await asyncio.sleep(0.2)
        assert process.child.returncode is None, "it drains"
        process.child.send_signal(signal.SIGTERM)
        assert await process.end() == 0
        assert (await request)["error"]["code"] == "unavailable", "a terminal reply all the same"


async def test_a_port_in_use_ends_the_start_with_one_message() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        async with router_process("--port", str(taken.getsockname()[1])) as process:
            assert process.status[0]["event"] == "failed"
            assert process.status[0]["code"] == "config_error"
            assert await process.end() == 1


async def test_a_wrong_setting_reaches_the_supervisor() -> None:
    async with router_process("--drain-s", "soon") as process:
        assert process.status[0]["event"] == "failed"
        assert "router.drain_s (flag --drain-s) is 'soon'" in process.status[0]["message"]
        assert await process.end() == 1


def test_print_config(tmp_path: Path) -> None:
    file = tmp_path / "relay.toml"
    file.write_text('[router]\ndrain_s = 5\nlog_level = "debug"\n')
    command = [sys.executable, "-m", MODULE, "--config", str(file), "--port", "9000", "--print-config"]
    environment = {**os.environ, "TOKENRELAY_ROUTER_HOST": "0.0.0.0"}
    shown = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
    assert "router.drain_s = 5.0  # file" in shown
    assert "router.port = 9000  # flag --port" in shown
    assert "router.host = '0.0.0.0'  # environment TOKENRELAY_ROUTER_HOST" in shown
    file.write_text("[router]\nspeed = 5\n")
    failed = subprocess.run(command, capture_output=True, text=True, check=False)
    assert failed.returncode == 1
    assert "no setting 'speed'" in failed.stderr
    assert "Traceback" not in failed.stderr


def _processor_time_s(pid: int) -> float:
    """User and system time so far (proc(5): fields 14 and 15 of stat)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def _until_ready(http: aiohttp.ClientSession, url: str) -> None:
    async with asyncio.timeout(10):
        while True:
            async with http.get(url + "/ready") as response:
                if response.status == 200:
                    return
            await asyncio.sleep(0.02)


async def _post(http: aiohttp.ClientSession, url: str, body: Any) -> Any:
    async with http.post(url + "/v1/chat/completions", json=body) as response:
        return json.loads(await response.read())
