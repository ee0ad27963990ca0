"""`tokenrelay explain`: asks a running server why its requests are where they are."""

from __future__ import annotations

import json
from typing import Any
from urllib.parse import quote

from tokenrelay.base.errors import TokenRelayError
from tokenrelay.cli.client import ApiClient, ApiError

DEFAULT_URL = "http://127.0.0.1:8000"


class NoDebugEndpoints(TokenRelayError):
    """The server does not say: its debug endpoints are off."""


def run_explain(request_id: str | None, url: str | None, *, as_json: bool, api_key: str = "") -> None:
    """Print one line a sequence, or the reply as it is. Raises ApiError, Unavailable."""
    client = ApiClient(url or DEFAULT_URL, api_key=api_key)
    path = "/debug/requests" + (f"/{quote(request_id, safe='')}" if request_id else "")
    try:
        reply = client.get_json(path)
    except ApiError as error:
        if "there is nothing at" in error.message:
            raise NoDebugEndpoints(
                f"{client.url} serves no debug endpoints: it listens to the network, so they are off; "
                "start it with --debug-endpoints on"
            ) from error
        raise
    if as_json:
        print(json.dumps(reply, indent=2))
        return
    for line in lines(reply):
        print(line)


def lines(reply: dict[str, Any]) -> list[str]:
    """The reply for people: each request with its sequences below it."""
    out: list[str] = []
    last: object = None
    for one in reply["requests"]:
        if one["request_id"] != last:
            last = one["request_id"]
            out.append(f"{last or '(no id)'} at {one['worker']}")
        out.append(f"  choice {one['choice']}: {one['text']}")
    if reply["left_out"]:
        out.append(f"and {reply['left_out']} more sequences")
    out += [f"{target} did not answer: {why}" for target, why in reply["problems"].items()]
    return out or ["no request is open"]
