"""Requests as clients send them, each reply checked for being whole: for the soak and the end-to-end tests.

    async with aiohttp.ClientSession() as session:
        outcome = await send(session, url, "/v1/chat/completions", {"stream": True, ...}, abort_after=3)
        assert not outcome.problems

A reply is whole when every choice has exactly one finish_reason and nothing after it, and the stream exactly one
`[DONE]`, last. What is not whole is a problem, also when the text looks fine.
"""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Literal

import aiohttp

REPLY_S = 300.0  # longest wait for one reply
LINE_BYTES_MAX = 8 * 2**20

Kind = Literal["completed", "aborted", "refused", "errored", "broken"]


@dataclass
class Outcome:
    """How one request ended."""

    kind: Kind = "broken"
    status: int = 0  # HTTP
    text: str = ""  # of the first choice
    finish_reasons: dict[int, str] = field(default_factory=dict)  # by choice
    chunks: int = 0  # of a stream
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    first_s: float = 0.0  # until the first content
    total_s: float = 0.0
    error: str = ""  # the server's message
    problems: list[str] = field(default_factory=list)


async def send(
    session: aiohttp.ClientSession, url: str, path: str, body: dict[str, Any], *, abort_after: int | None = None
) -> Outcome:
    """One POST. `abort_after`: hang up after so many chunks of the stream (0: as soon as the request is out)."""
    outcome = Outcome()
    began_s = time.monotonic()
    try:
        async with asyncio.timeout(REPLY_S), session.post(url + path, json=body) as response:
            outcome.status = response.status
            if response.status != 200:
                _read_refusal(outcome, await response.text())
                if response.status == 429 and not response.headers.get("Retry-After", "").isdigit():
                    outcome.problems.append("429 without Retry-After")
            elif abort_after == 0:
                outcome.kind = "aborted"
            elif body.get("stream"):
                await _read_stream(outcome, response, body, abort_after, began_s)
            else:
                _read_whole(outcome, await response.json(), body)
    except TimeoutError:
        outcome.problems.append(f"no end within {REPLY_S:.0f} s")
    except (aiohttp.ClientError, ConnectionError) as error:
        outcome.error = f"{type(error).__name__}: {error}"
        outcome.problems.append(f"the connection broke: {outcome.error}")
    except ValueError as error:  # UnicodeDecodeError and JSONDecodeError are
        outcome.problems.append(f"not JSON in UTF-8: {error}")
    outcome.total_s = time.monotonic() - began_s
    return outcome


def _read_refusal(outcome: Outcome, text: str) -> None:
    """429 and 503 are refusals, other 4xx what the client did wrong; each must have OpenAI's shape."""
    try:
        error = json.loads(text)["error"]
        outcome.error = str(error["message"])
        if not {"message", "type", "param", "code"} <= set(error):
            outcome.problems.append(f"error without type, param or code: {text[:200]}")
    except (ValueError, KeyError, TypeError):
        outcome.problems.append(f"status {outcome.status} without an error object: {text[:200]}")
    outcome.kind = "refused" if outcome.status in (429, 503) else "errored"


async def _read_stream(
    outcome: Outcome, response: aiohttp.ClientResponse, body: dict[str, Any], abort_after: int | None, began_s: float
) -> None:
    done = False
    while line := await response.content.readline():
        text = line.decode("utf-8").rstrip("\r\n")  # strict: a broken character is a broken reply
        if not text.startswith("data:"):
            continue
        payload = text[5:].strip()
        if done:
            outcome.problems.append(f"data after [DONE]: {payload[:200]}")
        elif payload == "[DONE]":
            done = True
        else:
            _read_chunk(outcome, json.loads(payload), began_s)
            if abort_after is not None and outcome.chunks >= abort_after:
                outcome.kind = "aborted"
                return
    if outcome.error:
        outcome.kind = "errored"  # an error event is the terminal reply
        return
    if not done:
        outcome.problems.append("the stream ended without [DONE]")
    _judge(outcome, body)


def _read_chunk(outcome: Outcome, chunk: dict[str, Any], began_s: float) -> None:
    outcome.chunks += 1
    if "error" in chunk:
        if outcome.error:
            outcome.problems.append("two error events")
        outcome.error = str(chunk["error"]["message"])
        return
    for choice in chunk["choices"]:
        index = choice["index"]
        content = (choice.get("delta") or {}).get("content") or choice.get("text") or ""
        if content and not outcome.first_s:
            outcome.first_s = time.monotonic() - began_s
        if index in outcome.finish_reasons:
            outcome.problems.append(f"choice {index} goes on after its end")
        if index == 0:
            outcome.text += content
        if choice.get("finish_reason") is not None:
            outcome.finish_reasons[index] = choice["finish_reason"]
    _read_usage(outcome, chunk.get("usage"))


def _read_whole(outcome: Outcome, reply: dict[str, Any], body: dict[str, Any]) -> None:
    for choice in reply["choices"]:
        outcome.finish_reasons[choice["index"]] = choice["finish_reason"]
        if choice["index"] == 0:
            outcome.text = (choice.get("message") or {}).get("content") or choice.get("text") or ""
    _read_usage(outcome, reply.get("usage"))
    _judge(outcome, body)


def _read_usage(outcome: Outcome, usage: dict[str, Any] | None) -> None:
    if usage:
        outcome.prompt_tokens = usage["prompt_tokens"]
        outcome.completion_tokens = usage["completion_tokens"]
        outcome.cached_tokens = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0


def _judge(outcome: Outcome, body: dict[str, Any]) -> None:
    """The reply is over: has each choice ended?"""
    expected = set(range(int(body.get("n") or 1)))
    if set(outcome.finish_reasons) != expected:
        outcome.problems.append(f"choices that ended: {sorted(outcome.finish_reasons)}, expected {sorted(expected)}")
    unknown = set(outcome.finish_reasons.values()) - {"stop", "length", "tool_calls"}
    if unknown:
        outcome.problems.append(f"finish_reason {unknown}")
    if not outcome.problems:
        outcome.kind = "completed"


@dataclass(frozen=True)
class Pool:
    """The gauge tokenrelay_kv_blocks of /metrics."""

    free: int
    cached: int
    active: int

    @property
    def total(self) -> int:
        """All blocks; constant over a worker's life."""
        return self.free + self.cached + self.active


async def metrics(session: aiohttp.ClientSession, url: str) -> dict[str, float]:
    """Every sample of /metrics by its name with labels, as it stands there."""
    async with session.get(f"{url}/metrics") as response:
        response.raise_for_status()
        text = await response.text()
    found = {}
    for line in text.splitlines():
        if line and not line.startswith("#"):
            name, value = line.rsplit(" ", 1)
            found[name] = float(value)
    return found


async def pool(session: aiohttp.ClientSession, url: str) -> Pool:
    """The worker's blocks now. KeyError when /metrics lacks the gauge."""
    states: Counter[str] = Counter()
    for name, value in (await metrics(session, url)).items():
        if match := re.match(r'tokenrelay_kv_blocks\{.*state="(\w+)".*\}', name):
            states[match[1]] += int(value)
    return Pool(free=states["free"], cached=states["cached"], active=states["active"]) if states else _no_gauge()


def _no_gauge() -> Pool:
    raise KeyError("tokenrelay_kv_blocks is not in /metrics")


async def settled_pool(session: aiohttp.ClientSession, url: str, within_s: float = 15.0) -> Pool:
    """The blocks once no block is active, or as they are after `within_s` seconds."""
    deadline_s = time.monotonic() + within_s
    while True:
        found = await pool(session, url)
        if found.active == 0 or time.monotonic() > deadline_s:
            return found
        await asyncio.sleep(0.1)
