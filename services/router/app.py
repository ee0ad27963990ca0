"""The HTTP application: routes, errors, health and metrics.

web.AppRunner(create_app(state), handler_cancellation=True)     # a client that leaves cancels its handler
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from aiohttp import web
from google.protobuf.message import Message

from tokenrelay.base.errors import InvalidRequest, NotFound, TokenRelayError, Unavailable
from tokenrelay.base.logging import get_logger
from tokenrelay.base.version import version
from tokenrelay.proto import worker_pb2
from tokenrelay.services.chassis.client import WorkerClient
from tokenrelay.services.router import (
    cors,
    debug,
    mesh_feed,
    messages,
    messages_errors,
    metrics,
    openapi,
    page,
    responses,
)
from tokenrelay.services.router.body import read_body, render_messages, request_id_of
from tokenrelay.services.router.gate import salt_of
from tokenrelay.services.router.generate import chat_completions, completions
from tokenrelay.services.router.model import ServedModel
from tokenrelay.services.router.openai_types import DetokenizeRequest, TokenizeRequest
from tokenrelay.services.router.replies import error_response, json_response
from tokenrelay.services.router.state import STATE, RouterState
from tokenrelay.services.router.tokenize import unpack_ids
from tokenrelay.services.router.validate import check_token_ids, decode
from tokenrelay.services.router.workers import WorkerPool

log = get_logger("router")

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
SCRAPE_TIMEOUT_S = 1.0
CLIENT_LEFT = 499  # as nginx counts clients that closed the connection before the reply


def create_app(state: RouterState) -> web.Application:
    """All endpoints on this state."""
    middlewares = [_answer]
    if state.config.cors_origins:
        middlewares.append(cors.Cors(state.config.cors_origins).middleware)
    if state.gate is not None:
        middlewares.append(state.gate.middleware)
    app = web.Application(middlewares=middlewares, client_max_size=state.config.body_bytes_max)
    app[STATE] = state
    app.on_response_prepare.append(_named_as_asked)
    app.on_response_prepare.append(_last_on_its_connection)
    if state.config.cors_origins:
        app.on_response_prepare.append(cors.mark)
    app.add_routes(
        [
            web.post("/v1/chat/completions", chat_completions),
            web.post("/v1/completions", completions),
            web.post(responses.PATH, responses.responses),
            web.get(f"{responses.PATH}/{{id}}", responses.one_response),
            web.delete(f"{responses.PATH}/{{id}}", responses.delete_response),
            web.post(messages.PATH, messages.messages),
            web.post(f"{messages.PATH}/count_tokens", messages.count_tokens),
            web.get("/v1/models", models),
            web.get("/v1/models/{name:.+}", one_model),
            web.post("/tokenize", tokenize),
            web.post("/detokenize", detokenize),
            web.get("/health", health),
            web.get("/ready", ready),
            web.get("/metrics", metrics_page),
            web.get("/version", version_of),
            web.get(openapi.PATH, openapi.serve),
            web.get("/workers", workers),
            *debug.routes(state.config),
        ]
    )
    if state.config.page == "on":
        mesh_feed.add(app, state)
        app.add_routes(page.routes())
    return app


async def _named_as_asked(request: web.Request, response: web.StreamResponse) -> None:
    """Anthropic's clients look for the request's id under another name."""
    if request.path.startswith(messages.PATH):
        response.headers["request-id"] = request_id_of(request)


async def _last_on_its_connection(request: web.Request, response: web.StreamResponse) -> None:
    """While another router takes over, each reply tells its client to connect anew."""
    if request.app[STATE].handing_over:
        response.force_close()
        response.headers["Connection"] = "close"  # aiohttp has made its headers by now


@web.middleware
async def _answer(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Every error becomes a reply in its API's shape; every reply is counted."""
    counts = request.app[STATE].metrics.requests
    resource = request.match_info.route.resource
    endpoint = resource.canonical if resource is not None else "other"
    try:
        response = await handler(request)
    except asyncio.CancelledError:
        counts[endpoint, CLIENT_LEFT] += 1
        raise
    except TokenRelayError as error:
        response = _error(request, error)
    except web.HTTPException as error:
        response = _http_error(request, error)
    except ConnectionError:  # the client left while its reply was being written
        counts[endpoint, CLIENT_LEFT] += 1
        raise asyncio.CancelledError from None
    except Exception:
        log.exception("a request failed for no known reason", request_id=request_id_of(request), path=request.path)
        response = _error(request, TokenRelayError("the server failed; its log says why"))
    if not response.prepared:
        response.headers["X-Request-Id"] = request_id_of(request)
    counts[endpoint, response.status] += 1
    return response


def _error(request: web.Request, error: TokenRelayError) -> web.Response:
    if request.path.startswith(messages.PATH):
        return messages_errors.error_reply(error, request_id_of(request))
    return error_response(error)


def _http_error(request: web.Request, error: web.HTTPException) -> web.StreamResponse:
    """aiohttp's own refusals: no such path, wrong method."""
    if error.status == 404:
        return _error(request, NotFound(f"there is nothing at {request.path[:256]}"))
    message = f"{request.method[:16]} {request.path[:256]}: {error.reason}"
    response = _error(request, InvalidRequest(message, code="invalid_method" if error.status == 405 else None))
    if error.status >= 400:
        response.set_status(error.status)
    if "Allow" in error.headers:
        response.headers["Allow"] = error.headers["Allow"]
    return response


# -- models -----------------------------------------------------------------------------------------------------------
async def models(request: web.Request) -> web.Response:
    """GET /v1/models."""
    model = request.app[STATE].pool.require_model()
    data = [_model_object(request, model, name) for name in model.names]
    if messages.is_anthropic(request):
        return json_response({"data": data, "has_more": False, "first_id": model.names[0], "last_id": model.names[-1]})
    return json_response({"object": "list", "data": data})


async def one_model(request: web.Request) -> web.Response:
    """GET /v1/models/{name}."""
    model = request.app[STATE].pool.require_model()
    name = request.match_info["name"]
    model.check_name(name)
    return json_response(_model_object(request, model, name))


def _model_object(request: web.Request, model: ServedModel, name: str) -> dict[str, object]:
    if messages.is_anthropic(request):
        return messages.model_object(model, name)
    return {
        "id": name,
        "object": "model",
        "created": model.created,
        "owned_by": "tokenrelay",
        "root": model.names[0],
        "parent": None,
        "max_model_len": model.context_tokens,
    }


# -- tokens -----------------------------------------------------------------------------------------------------------
async def tokenize(request: web.Request) -> web.Response:
    """POST /tokenize: a prompt, or messages through the chat template, as token ids."""
    state = request.app[STATE]
    raw = await read_body(request)
    body = decode(raw, TokenizeRequest)
    model = state.pool.require_model()
    model.check_name(body.model)
    if (body.prompt is None) == (body.messages is None):
        raise InvalidRequest("give either prompt or messages", param="prompt")
    if body.prompt is not None:
        text, special = body.prompt, body.add_special_tokens is not False
    else:
        text, special = (await render_messages(state, model, body, len(raw)))[0], bool(body.add_special_tokens)
    token_ids = unpack_ids(await model.tokenizer.encode(text, add_special_tokens=special, salt=salt_of(request)))
    reply: dict[str, object] = {
        "count": len(token_ids),
        "max_model_len": model.context_tokens,
        "tokens": token_ids,
        "token_strs": None,
    }
    if body.return_token_strs:
        reply["token_strs"] = [model.vocabulary.token_text(token_id) for token_id in token_ids]
    return json_response(reply)


async def detokenize(request: web.Request) -> web.Response:
    """POST /detokenize: token ids as text, special tokens included."""
    body = decode(await read_body(request), DetokenizeRequest)
    model = request.app[STATE].pool.require_model()
    model.check_name(body.model)
    check_token_ids("tokens", body.tokens, model.vocabulary_size)
    return json_response({"prompt": model.vocabulary.decode(body.tokens, skip_special=False)})


# -- operation --------------------------------------------------------------------------------------------------------
async def health(request: web.Request) -> web.Response:
    """GET /health: the process lives."""
    return json_response({"status": "ok"})


async def ready(request: web.Request) -> web.Response:
    """GET /ready: requests would be served now."""
    state = request.app[STATE]
    if state.draining:
        raise Unavailable("the server is shutting down")
    state.pool.require_usable()
    return json_response({"status": "ready", "workers": len(state.pool.usable)})


async def metrics_page(request: web.Request) -> web.Response:
    """GET /metrics, with counters that workers give at this moment (those of the last step, where one does not
    answer).
    """
    state = request.app[STATE]
    clients = state.pool.clients
    stats = await asyncio.gather(*(_fresh_stats(client) for client in clients))
    workers = {client.target: (client.ready, one) for client, one in zip(clients, stats, strict=True)}
    state.metrics.integrity_failures = {client.target: client.integrity_failures for client in clients}
    pool = state.pool
    state.metrics.breakers_opened, state.metrics.retries_refused = pool.breakers.opened, pool.retries.refused
    if state.ceiling is not None:
        state.metrics.ceiling_tokens = state.ceiling.tokens
    model = pool.model
    cache = model.tokenizer.cache if model is not None else None
    text = state.metrics.render(workers, (cache.hit_chars, cache.miss_chars) if cache is not None else (0, 0))
    if state.gate is not None:
        text += metrics.gate_page(state.gate)
    return web.Response(body=text.encode(), headers={"Content-Type": metrics.CONTENT_TYPE})


async def _fresh_stats(client: WorkerClient) -> worker_pb2.Stats:
    try:
        return await client.get_stats(SCRAPE_TIMEOUT_S)
    except TokenRelayError:
        return client.stats


async def workers(request: web.Request) -> web.Response:
    """GET /workers: each worker, whether it is used and why not, and its counters."""
    pool = request.app[STATE].pool
    await asyncio.gather(*(_fresh_stats(client) for client in pool.clients))
    return json_response({"workers": [_worker_object(pool, client) for client in pool.clients]})


def _worker_object(pool: WorkerPool, client: WorkerClient) -> dict[str, object]:
    hello, stats = client.handshake, client.stats
    usable = client in pool.usable
    return {
        "target": client.target,
        "role": hello.role if hello is not None else None,
        "incarnation": hello.incarnation if hello is not None else None,
        "ready": usable,
        "reason": None if usable else pool.problem(client),
        "open": client.open_count,
        "connections": client.connections,
        "stats": _plain(stats),
    }


def _plain(message: Message) -> dict[str, object]:
    """A message as JSON has it, its numbers as numbers."""
    values = {field.name: getattr(message, field.name) for field in message.DESCRIPTOR.fields}
    return {name: _plain(value) if isinstance(value, Message) else value for name, value in values.items()}


async def version_of(request: web.Request) -> web.Response:
    """GET /version."""
    return json_response({"version": version()})
