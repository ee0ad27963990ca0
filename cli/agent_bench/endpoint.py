"""One OpenAI endpoint, as the benchmark asks it: streamed chats, each chunk with its time.

async with Endpoint("http://127.0.0.1:8000", model="", api_key="") as endpoint:
    ruler = await endpoint.calibrate()
    await endpoint.ask(record, messages, tokens=500, clock=time.monotonic)
"""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Callable
from types import TracebackType
from typing import Any
from urllib.parse import urlsplit

import aiohttp

from tokenrelay.base.errors import ConfigError, TokenRelayError, Unavailable
from tokenrelay.cli.agent_bench.records import Record
from tokenrelay.cli.agent_bench.text import Ruler
from tokenrelay.cli.client import ApiError

LINE_BYTES_MAX = 8 << 20
SAMPLES_CHARS = (400, 2400)
CALIBRATE_S = 300.0


class Endpoint:
    """`model` and what the endpoint takes are known after `calibrate`."""

    def __init__(self, url: str, *, model: str = "", api_key: str = "", timeout_s: float = 600.0) -> None:
        parts = urlsplit(url if "://" in url else f"http://{url}")
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(f"--url {url!r} is not an http address such as http://127.0.0.1:8000")
        self.url = f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/').removesuffix('/v1')}"
        self.model = model
        self.ignores_end = True  # takes ignore_eos, so that answers are as long as they shall be
        self.streams_usage = True  # else a chunk counts as a token, and prompts are as long as their text says
        self._ruler = Ruler()
        self._timeout_s = timeout_s
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._http: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Endpoint:
        self._http = aiohttp.ClientSession(
            headers=self._headers,
            connector=aiohttp.TCPConnector(limit=0),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=10),
            read_bufsize=1 << 20,
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        if self._http is not None:
            await self._http.close()

    @property
    def _client(self) -> aiohttp.ClientSession:
        assert self._http is not None, "use it as a context manager"
        return self._http

    # -- before -------------------------------------------------------------------------------------------------------
    async def calibrate(self) -> Ruler:
        """Which model it serves, what it takes, and how long texts are there. Raises Unavailable, ApiError."""
        if not self.model:
            self.model = await self._first_model()
        samples = []
        for chars in SAMPLES_CHARS:
            text = Ruler(1.0).text(f"calibration {chars}", chars)
            record = Record("calibration", 0, 0.0)
            await self._try(record, text)
            self.streams_usage = self.streams_usage and record.prompt_tokens > 0
            if not self.streams_usage:
                record.prompt_tokens = await self._counted(text)
            samples.append((len(text), record.prompt_tokens))
        try:
            self._ruler = Ruler.measured((samples[0], samples[1]))
        except ValueError as error:
            raise ApiError(f"{self.url} counts tokens strangely: {error}") from error
        return self._ruler

    async def _counted(self, text: str) -> int:
        """How many tokens a prompt has, by a reply that is no stream."""
        body = {"model": self.model, "messages": [{"role": "user", "content": text}], "max_tokens": 1}
        try:
            async with asyncio.timeout(CALIBRATE_S):
                async with self._client.post(f"{self.url}/v1/chat/completions", json=body) as response:
                    if response.status != 200:
                        raise ApiError(await _message(response))
                    return int((await response.json(content_type=None))["usage"]["prompt_tokens"])
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise Unavailable(f"the connection to {self.url} broke: {error or type(error).__name__}") from error
        except (KeyError, TypeError, ValueError) as error:
            raise ApiError(f"{self.url} gives no usage, which says how long prompts are") from error

    async def _first_model(self) -> str:
        try:
            async with self._client.get(f"{self.url}/v1/models", timeout=aiohttp.ClientTimeout(total=30)) as response:
                if response.status != 200:
                    raise ApiError(await _message(response))
                data = (await response.json(content_type=None))["data"]
                return str(data[0]["id"])
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise Unavailable(f"no server answers at {self.url}: {error or type(error).__name__}") from error
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise ApiError(f"{self.url}/v1/models names no model") from error

    async def _try(self, record: Record, text: str) -> None:
        messages = [{"role": "user", "content": text}]
        for _ in range(2):
            try:
                async with asyncio.timeout(CALIBRATE_S):
                    await self._stream(record, messages, 2, lambda: 0.0)
                return
            except ApiError as error:
                if not self.ignores_end or "ignore_eos" not in error.message:
                    raise
                self.ignores_end = False  # answers end when the model wants
            except (aiohttp.ClientError, TimeoutError, OSError) as error:
                raise Unavailable(f"the connection to {self.url} broke: {error or type(error).__name__}") from error

    # -- one request --------------------------------------------------------------------------------------------------
    async def ask(
        self, record: Record, messages: list[dict[str, str]], tokens: int, clock: Callable[[], float]
    ) -> None:
        """Fill in the record. Never raises but for a cancellation, which leaves it as cut."""
        try:
            async with asyncio.timeout(self._timeout_s):
                await self._stream(record, messages, tokens, clock)
            record.end = "done"
        except TimeoutError:
            record.end, record.error = "failed", f"no end within {self._timeout_s:g} s"
        except ApiError as error:
            record.end, record.error = ("refused" if error.code == "refused" else "failed"), error.message
        except (aiohttp.ClientError, OSError, TokenRelayError, ValueError) as error:
            record.end, record.error = "failed", f"{type(error).__name__}: {error}"
        finally:
            record.end_s = clock()

    async def _stream(
        self, record: Record, messages: list[dict[str, str]], tokens: int, clock: Callable[[], float]
    ) -> None:
        body: dict[str, Any] = {
            "model": self.model,
            "messages": messages,
            "max_tokens": tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if self.ignores_end:
            body["ignore_eos"] = True
        texts: list[str] = []
        ended = False
        async with self._client.post(f"{self.url}/v1/chat/completions", json=body) as response:
            if response.status != 200:
                error = ApiError(await _message(response))
                if response.status in (429, 503):
                    error.code = "refused"
                raise error
            while line := await response.content.readline():
                if not line.startswith(b"data:"):
                    continue
                payload = line[5:].strip()
                if payload == b"[DONE]":
                    ended = True
                    break
                _take(json.loads(payload), record, texts, clock)
        if not ended:
            raise ApiError("the stream ended before its end")
        record.text = "".join(texts)
        if not self.streams_usage:
            record.prompt_tokens = self._ruler.tokens(sum(len(message["content"]) for message in messages))
            record.output_tokens = 0 if math.isnan(record.first_s) else 1 + len(record.gaps_s)


def _take(chunk: dict[str, Any], record: Record, texts: list[str], clock: Callable[[], float]) -> None:
    if "error" in chunk:
        raise ApiError(str((chunk["error"] or {}).get("message", "an error in mid-stream")))
    usage = chunk.get("usage")
    if usage:
        record.prompt_tokens = int(usage.get("prompt_tokens") or 0)
        record.output_tokens = int(usage.get("completion_tokens") or 0)
        details = usage.get("prompt_tokens_details")
        if details is not None and details.get("cached_tokens") is not None:
            record.cached_tokens = int(details["cached_tokens"])
    for choice in chunk.get("choices") or ():
        delta = choice.get("delta") or {}
        said = delta.get("content") or ""
        thought = delta.get("reasoning_content") or delta.get("reasoning") or ""
        if said or thought or delta.get("tool_calls"):
            now_s = clock()
            if math.isnan(record.first_s):
                record.first_s = now_s
            else:
                record.gaps_s.append(now_s - record.last_s)
            record.last_s = now_s
            texts.append(said)


async def _message(response: aiohttp.ClientResponse) -> str:
    """What an error reply says."""
    text = (await response.text(errors="replace"))[:65536]
    try:
        message = json.loads(text)["error"]["message"]
    except (ValueError, KeyError, TypeError):
        message = text.strip()[:300] or response.reason
    return f"{response.status}: {message}"
