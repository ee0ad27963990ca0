"""A small blocking client of the OpenAI-compatible endpoint, on the standard library only: `chat` starts at once.

    client = ApiClient("http://127.0.0.1:8000")
    for delta in client.stream_chat({"model": client.models()[0], "messages": [...]}):
        print(delta.content, end="")

An interrupt (KeyboardInterrupt, or closing the generator) closes the connection, which aborts the generation.
Server-sent events follow the WHATWG HTML standard, section 9.2; the chunks follow OpenAI's chat.completion.chunk.
"""

from __future__ import annotations

import http.client
import json
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from tokenrelay.base.errors import ConfigError, TokenRelayError, Unavailable

CONNECT_S = 10.0
SILENCE_S = 600.0  # between two chunks: a long prompt may take minutes on a CPU
EVENT_BYTES_MAX = 8 * 2**20


class ApiError(TokenRelayError):
    """The server answered with an error; the message is the server's."""

    code = "api_error"


@dataclass
class Delta:
    """What one chunk adds to the first choice."""

    content: str = ""
    reasoning: str = ""
    tool_calls: list[dict[str, Any]] = field(default_factory=list)  # OpenAI's partial tool calls, each with an index
    finish_reason: str | None = None
    usage: dict[str, Any] | None = None


class ApiClient:
    """Talks to one base URL, with or without a trailing /v1. Each call opens a connection of its own."""

    def __init__(self, url: str, *, api_key: str = "") -> None:
        parts = urlsplit(url if "://" in url else f"http://{url}")
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(f"--url {url!r} is not an http address such as http://127.0.0.1:8000")
        self._secure = parts.scheme == "https"
        self._host, self._port = parts.hostname, parts.port
        self._root = parts.path.rstrip("/").removesuffix("/v1")
        self._headers = {"Content-Type": "application/json", "User-Agent": "tokenrelay-cli"}
        if api_key:
            self._headers["Authorization"] = f"Bearer {api_key}"
        self.url = f"{parts.scheme}://{parts.netloc}{self._root}"

    def models(self) -> list[str]:
        """Ids of the served models. Raises Unavailable when nothing answers there, ApiError as the server says."""
        with self._request("GET", "/v1/models") as response:
            return [str(model["id"]) for model in json.loads(response.read())["data"]]

    def get_json(self, path: str) -> dict[str, Any]:
        """What a GET answers. Raises Unavailable, ApiError."""
        with self._request("GET", path) as response:
            reply = json.loads(response.read())
        if not isinstance(reply, dict):
            raise ApiError(f"{self.url}{path} did not answer with an object")
        return reply

    def stream_chat(self, body: dict[str, Any]) -> Iterator[Delta]:
        """Stream a chat completion; ends after the last chunk. Errors in mid-stream are raised as ApiError."""
        body = {**body, "stream": True, "stream_options": {"include_usage": True}}
        with self._request("POST", "/v1/chat/completions", body) as response:
            for event in _events(response):
                if "error" in event:
                    raise ApiError(_error_message(event))
                yield _delta(event)

    @contextmanager
    def _request(
        self, method: str, path: str, body: dict[str, Any] | None = None
    ) -> Iterator[http.client.HTTPResponse]:
        connection = self._connect()
        try:
            payload = None if body is None else json.dumps(body).encode()
            connection.request(method, self._root + path, body=payload, headers=self._headers)
            response = connection.getresponse()
            if response.status >= 400:
                raise ApiError(_http_error(response))
            yield response
        except TimeoutError as error:
            raise Unavailable(f"{self.url} said nothing for {SILENCE_S:.0f} s") from error
        except (OSError, http.client.HTTPException) as error:
            raise Unavailable(f"the connection to {self.url} broke: {error or type(error).__name__}") from error
        finally:
            connection.close()

    def _connect(self) -> http.client.HTTPConnection:
        try:
            if self._secure:
                context = ssl.create_default_context()
                connection: http.client.HTTPConnection = http.client.HTTPSConnection(
                    self._host, self._port, timeout=CONNECT_S, context=context
                )
            else:
                connection = http.client.HTTPConnection(self._host, self._port, timeout=CONNECT_S)
            connection.connect()
        except OSError as error:
            reason = error.strerror or str(error)
            raise Unavailable(
                f"no server answers at {self.url} ({reason}); start one with: tokenrelay serve"
            ) from error
        connection.sock.settimeout(SILENCE_S)
        return connection


def join_tool_calls(calls: list[dict[str, Any]], partial: list[dict[str, Any]]) -> None:
    """Add the partial tool calls of one chunk to the whole ones gathered so far, in place."""
    for part in partial:
        index = int(part.get("index", 0))
        while len(calls) <= index:
            calls.append({"id": "", "type": "function", "function": {"name": "", "arguments": ""}})
        call, function = calls[index], part.get("function") or {}
        call["id"] = part.get("id") or call["id"]
        call["function"]["name"] += function.get("name") or ""
        call["function"]["arguments"] += function.get("arguments") or ""


def _events(response: http.client.HTTPResponse) -> Iterator[dict[str, Any]]:
    """The JSON objects of an event stream, up to `[DONE]`. A stream that just ends is an error: it is not whole."""
    data: list[str] = []
    while True:
        line = response.readline(EVENT_BYTES_MAX)
        if not line:
            raise Unavailable("the server closed the stream before its end")
        text = line.decode("utf-8", errors="replace").rstrip("\r\n")
        if text.startswith("data:"):
            data.append(text[5:].removeprefix(" "))
        elif not text and data:
            payload, data = "\n".join(data), []
            if payload == "[DONE]":
                return
            yield json.loads(payload)


def _delta(event: dict[str, Any]) -> Delta:
    usage = event.get("usage")
    if not event.get("choices"):
        return Delta(usage=usage)
    choice = event["choices"][0]
    delta = choice.get("delta") or {}
    return Delta(
        content=delta.get("content") or "",
        reasoning=delta.get("reasoning_content") or delta.get("reasoning") or "",
        tool_calls=delta.get("tool_calls") or [],
        finish_reason=choice.get("finish_reason"),
        usage=usage,
    )


def _http_error(response: http.client.HTTPResponse) -> str:
    text = response.read(65536)
    try:
        return _error_message(json.loads(text))
    except (ValueError, TypeError):
        return f"the server answered {response.status} {response.reason}"


def _error_message(body: Any) -> str:
    """The message of an error in OpenAI's shape. Raises TypeError where it has another."""
    error = body.get("error") if isinstance(body, dict) else None
    if isinstance(error, dict) and isinstance(error.get("message"), str):
        return str(error["message"])
    raise TypeError("not an error in OpenAI's shape")
