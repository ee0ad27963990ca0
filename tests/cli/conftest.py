"""A small server that speaks the OpenAI API from a script, for the client and the chat."""

from __future__ import annotations

import json
import queue
import socketserver
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

SLOW = object()  # in a script: from here on one chunk every 50 ms, until the client goes away


class ScriptedServer:
    """Each chat request takes the next script: a list of chunks' deltas, or a (status, body) error."""

    def __init__(self) -> None:
        self.scripts: queue.Queue[Any] = queue.Queue()
        self.requests: list[dict[str, Any]] = []
        self.authorizations: list[str | None] = []
        self.disconnected = threading.Event()
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"
        threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True).start()

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()

    def say(self, *deltas: Any, finish: str = "stop", usage: dict[str, Any] | None = None, cut: bool = False) -> None:
        """The next reply: contents (text), deltas (dict), raw bytes, SLOW. `cut`: the stream ends without its end."""
        self.scripts.put((deltas, finish, usage, cut))

    def refuse(self, status: int, body: Any) -> None:
        self.scripts.put((status, body))

    def _handler(outer) -> type[BaseHTTPRequestHandler]:
        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *arguments: Any) -> None:
                pass

            def do_GET(self) -> None:
                self._json(200, {"object": "list", "data": [{"id": "scripted", "object": "model"}]})

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.requests.append(body)
                outer.authorizations.append(self.headers["Authorization"])
                script = outer.scripts.get(timeout=10)
                if isinstance(script[0], int):
                    self._json(*script)
                else:
                    self._stream(*script)

            def _json(self, status: int, body: Any) -> None:
                payload = body if isinstance(body, bytes) else json.dumps(body).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(payload)))
                self.end_headers()
                self.wfile.write(payload)

            def _stream(self, deltas: Any, finish: str, usage: dict[str, Any] | None, cut: bool) -> None:
                self.send_response(200)
                self.send_header("Content-Type", "text/event-stream")
                self.end_headers()
                self.wfile.write(b": a comment\n\n")
                for delta in deltas:
                    if delta is SLOW:
                        self._drip()
                        return
                    if isinstance(delta, bytes):
                        self.wfile.write(delta)
                        continue
                    self._chunk(
                        {"choices": [{"index": 0, "delta": delta if isinstance(delta, dict) else {"content": delta}}]}
                    )
                if cut:
                    return
                self._chunk({"choices": [{"index": 0, "delta": {}, "finish_reason": finish}]})
                if usage is not None:
                    self._chunk({"choices": [], "usage": usage})
                self.wfile.write(b"data: [DONE]\n\n")

            def _drip(self) -> None:
                try:
                    for _ in range(400):
                        self._chunk({"choices": [{"index": 0, "delta": {"content": "."}}]})
                        outer.disconnected.wait(0.05)
                except OSError:
                    outer.disconnected.set()

            def _chunk(self, body: Any) -> None:
                self.wfile.write(b"data: " + json.dumps(body, ensure_ascii=False).encode() + b"\n\n")
                self.wfile.flush()

            def handle(self) -> None:
                try:
                    super().handle()
                except OSError:
                    outer.disconnected.set()

        assert issubclass(Handler, socketserver.BaseRequestHandler)
        return Handler


@pytest.fixture
def scripted() -> Iterator[ScriptedServer]:
    server = ScriptedServer()
    yield server
    server.close()


@pytest.fixture
def slow() -> object:
    return SLOW
