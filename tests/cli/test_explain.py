"""`tokenrelay explain` for people, and what it says when it cannot."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from tokenrelay.base.errors import Unavailable
from tokenrelay.cli.client import ApiError
from tokenrelay.cli.explain import NoDebugEndpoints, lines, run_explain

ONE = {"request_id": "a/1", "choice": 0, "worker": "unix:/w", "text": "Decoding: prompt 3 tokens", "slot": 4}
TWO = {**ONE, "choice": 1, "text": "Held: prompt 3 tokens"}
REPLY = {"requests": [ONE, TWO], "left_out": 0, "problems": {}}


class Handler(BaseHTTPRequestHandler):
    """Answers as a router does."""

    def do_GET(self) -> None:
        status, body = 200, REPLY
        if self.path == "/debug/requests/gone":
            status, body = 404, {"error": {"message": "no worker knows an open request 'gone'"}}
        elif self.path.startswith("/off"):
            status, body = 404, {"error": {"message": f"there is nothing at {self.path}"}}
        else:
            assert self.path in ("/debug/requests", "/debug/requests/a%2F1")
        self.send_response(status)
        self.end_headers()
        self.wfile.write(json.dumps(body).encode())

    def log_message(self, *_: object) -> None:
        """Quiet."""


@pytest.fixture
def url() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_one_line_a_sequence(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    for request_id in ("a/1", None):
        run_explain(request_id, url, as_json=False)
        assert capsys.readouterr().out == (
            "a/1 at unix:/w\n  choice 0: Decoding: prompt 3 tokens\n  choice 1: Held: prompt 3 tokens\n"
        )
    run_explain(None, url, as_json=True)
    assert json.loads(capsys.readouterr().out) == REPLY


def test_why_there_is_no_answer(url: str) -> None:
    with pytest.raises(ApiError, match="no worker knows an open request 'gone'"):
        run_explain("gone", url, as_json=False)
    with pytest.raises(NoDebugEndpoints, match="start it with --debug-endpoints on"):
        run_explain("a", f"{url}/off", as_json=False)
    with pytest.raises(Unavailable, match="no server answers"):
        run_explain("a", "http://127.0.0.1:9", as_json=False)


def test_nothing_left_out_and_problems_are_said() -> None:
    assert lines({"requests": [], "left_out": 0, "problems": {}}) == ["no request is open"]
    said = lines({"requests": [ONE], "left_out": 7, "problems": {"unix:/v": "it is gone"}})
    assert said[-2:] == ["and 7 more sequences", "unix:/v did not answer: it is gone"]
