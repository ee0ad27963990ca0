"""A running `tokenrelay serve` as the tests use it."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import openai

from tokenrelay.cli.own import OwnServer

BLOCK_TOKENS = 64  # the default


class Server:
    """A running `tokenrelay serve` and an OpenAI client for it."""

    def __init__(self, own: OwnServer) -> None:
        self.own = own
        self.url = own.url
        self.model = str(own.facts["model"])
        self.facts = own.facts
        self.client = openai.OpenAI(base_url=f"{own.url}/v1", api_key="none", max_retries=0, timeout=120)

    @property
    def worker_pid(self) -> int:
        return int(self.facts["worker_pid"])

    def chat(self, *messages: Any, **parameters: Any) -> Any:
        """A chat completion; greedy unless told. A text is a user's message."""
        dialogue = [m if isinstance(m, dict) else {"role": "user", "content": m} for m in messages]
        return self.client.chat.completions.create(
            model=self.model, messages=dialogue, **{"temperature": 0, "max_tokens": 128, **parameters}
        )

    def tokens(self, text: str) -> int:
        """How many tokens a text has, by the served tokenizer."""
        reply = httpx.post(f"{self.url}/tokenize", json={"model": self.model, "prompt": text}, timeout=60)
        return len(reply.raise_for_status().json()["tokens"])

    def signal(self, number: int) -> None:
        self.own.process.send_signal(number)

    def end(self, within_s: float = 60.0) -> int:
        """The exit code once it has ended by itself."""
        return self.own.process.wait(within_s)


def until(condition: Callable[[], object], within_s: float = 60.0) -> None:
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.05)


def alive(pid: int) -> bool:
    """Whether a process runs (a zombie does not)."""
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (OSError, IndexError):
        return False
