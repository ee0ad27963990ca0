"""What the schedulers say about open requests: /debug/requests, for a person.

It shows ids, lengths and queue positions of everybody's requests, though never a prompt: so it is served when the
router listens on this machine only, or when the operator asks for it (`router.debug_endpoints`).
"""

from __future__ import annotations

import asyncio
import ipaddress
from typing import Any

import msgspec
from aiohttp import web

from tokenrelay.base.errors import NotFound, TokenRelayError
from tokenrelay.proto import worker_pb2
from tokenrelay.services.chassis.client import WorkerClient
from tokenrelay.services.router.config import RouterConfig
from tokenrelay.services.router.replies import json_response
from tokenrelay.services.router.state import STATE

EXPLAIN_TIMEOUT_S = 5.0


def routes(config: RouterConfig) -> list[web.RouteDef]:
    """The endpoints, if this router serves them."""
    if not serves_debug(config):
        return []
    return [web.get("/debug/requests", requests_open), web.get("/debug/requests/{id:.+}", one_request)]


def serves_debug(config: RouterConfig) -> bool:
    """`auto`: when only this machine can connect."""
    if config.debug_endpoints == "auto":
        return is_loopback(config.host)
    return config.debug_endpoints == "on"


def is_loopback(host: str) -> bool:
    """Whether an address to listen on is this machine's alone."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


async def requests_open(request: web.Request) -> web.Response:
    """GET /debug/requests: every open sequence of every worker, and why it is where it is."""
    return json_response(await _ask_all(request, ""))


async def one_request(request: web.Request) -> web.Response:
    """GET /debug/requests/{id}: the sequences of one request, by its X-Request-Id."""
    request_id = request.match_info["id"]
    found = await _ask_all(request, request_id)
    if not found["requests"]:
        raise NotFound(
            f"no worker knows an open request {request_id[:128]!r}: it has ended, was never here, or waits in the "
            f"router for a worker{''.join(f'; {target}: {why}' for target, why in found['problems'].items())}"
        )
    return json_response(found)


async def _ask_all(request: web.Request, request_id: str) -> dict[str, Any]:
    clients = request.app[STATE].pool.clients
    placements, routes = request.app[STATE].placements, request.app[STATE].routes
    replies = await asyncio.gather(*(_ask(client, request_id) for client in clients))
    found: dict[str, Any] = {"requests": [], "left_out": 0, "problems": {}}
    for client, reply in zip(clients, replies, strict=True):
        if isinstance(reply, TokenRelayError):
            found["problems"][client.target] = reply.message
            continue
        found["left_out"] += reply.left_out
        for one in reply.sequences:
            text = f"{one.text}; {placement}" if (placement := placements.get(one.request_id)) else one.text
            said = {"request_id": one.request_id, "choice": one.choice, "worker": client.target, "text": text}
            if route := routes.get(one.request_id):
                said["route"] = route
            if placement:
                said["placement"] = placement
            found["requests"].append({**msgspec.json.decode(one.json), **said})
    return found


async def _ask(client: WorkerClient, request_id: str) -> worker_pb2.ExplainReply | TokenRelayError:
    try:
        return await client.explain(request_id, EXPLAIN_TIMEOUT_S)
    except TokenRelayError as error:
        return error
