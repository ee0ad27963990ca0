"""What a person at a terminal sees: the start-up of `serve`, and `chat` with a server of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from serving import alive, until
from terminal import Terminal

COMMAND = [sys.executable, "-m", "tokenrelay.cli.main"]


@pytest.fixture
def serve(random_model: Path) -> Iterator[Terminal]:
    terminal = Terminal([*COMMAND, "serve", str(random_model), "--port", "0", "--dtype", "float32"], columns=200)
    yield terminal
    terminal.close()


def test_serve_shows_where_and_what_and_how_it_goes_on(serve: Terminal) -> None:
    shown = serve.until(r"tokenrelay chat --url http://127\.0\.0\.1:\d+\r\n", plain=True)
    for text in (
        "running on the CPU",
        "TokenRelay is ready (",
        "/v1",
        "random-mla  (float32 on cpu)",
        "4,096 tokens",
        "curl ",
    ):
        assert text in shown, shown
    children = {name: child.pid for child in psutil.Process(serve.pid).children() for name in [child.cmdline()[2]]}
    assert set(children) == {"tokenrelay.cli.worker", "tokenrelay.services.router"}
    os.kill(children["tokenrelay.cli.worker"], signal.SIGKILL)
    serve.until("the worker was killed by SIGKILL .* starting it again in 0.5 s", plain=True)
    serve.until("the worker is ready again", plain=True)
    serve.type("\x03")
    serve.until(r"finishing what runs; nothing new is accepted \(Ctrl-C again stops at once\)", plain=True)
    serve.until("stopped", plain=True)
    assert serve.end() == 0
    until(lambda: not any(map(alive, children.values())), 10)


def test_a_failed_start_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"architectures": ["LlamaForCausalLM"], "model_type": "llama"}')
    terminal = Terminal([*COMMAND, "serve", str(tmp_path), "--port", "0"], columns=200)
    shown = terminal.until(r"\rtokenrelay: [^\n]*holds neither model\.safetensors[^\n]*\n", plain=True)
    assert shown.count("holds neither") == 1, "said twice"
    assert "Traceback" not in shown
    assert terminal.end() == 1


def test_chat_with_a_server_of_its_own(random_model: Path) -> None:
    terminal = Terminal([*COMMAND, "chat", "--model", str(random_model), "--max-tokens", "8"])
    terminal.until(r"random-mla at http://127\.0\.0\.1:\d+\..*› ")
    server = psutil.Process(terminal.pid).children(recursive=True)
    assert len(server) == 3
    terminal.type("hi\r")
    terminal.until(r"8 tokens.* 0 of \d+ prompt tokens from the cache \(cut at the token limit\).*› ", plain=True)
    terminal.type("\x04")
    assert terminal.end() == 0
    until(lambda: not any(alive(process.pid) for process in server), 10)


def test_chat_piped_with_a_server_of_its_own(random_model: Path) -> None:
    command = [*COMMAND, "chat", "--model", str(random_model), "--max-tokens", "8", "--temperature", "0"]
    done = subprocess.run(command, input="hi\n", capture_output=True, text=True, timeout=170)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.endswith("\n")
    assert len(done.stdout) > 8
