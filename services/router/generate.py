"""/v1/chat/completions and /v1/completions: from a body to a reply."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from functools import partial

from aiohttp import web

from tokenrelay.base.errors import InvalidRequest, Overloaded, Unavailable
from tokenrelay.base.ids import request_id as new_request_id
from tokenrelay.base.logging import get_logger
from tokenrelay.services.router import limits, traces
from tokenrelay.services.router.body import read_body, render_messages, request_id_of, tenant_of
from tokenrelay.services.router.debug import serves_debug
from tokenrelay.services.router.gate import as_caller, caller_of
from tokenrelay.services.router.generation import Choice, Prompt, Run
from tokenrelay.services.router.model import ServedModel
from tokenrelay.services.router.openai_types import ChatRequest, CompletionRequest
from tokenrelay.services.router.reasoning import prompt_ends_inside_thinking
from tokenrelay.services.router.replies import json_response
from tokenrelay.services.router.shapes import ChatShape, CompletionShape, Shape
from tokenrelay.services.router.sse import PING, EventStream
from tokenrelay.services.router.state import STATE, RouterState
from tokenrelay.services.router.structured import constrained
from tokenrelay.services.router.text import ChatText, PlainText, TextSink
from tokenrelay.services.router.validate import Wanted, decode, packed_token_ids, wanted_of

log = get_logger("router")

EXPLAIN_HEADER = "X-Explain"
DECISION_HEADER = "X-Decision"
MakeShape = Callable[[Run, str], Shape]
Serve = Callable[[web.Request, RouterState, float], Awaitable[web.StreamResponse]]


async def chat_completions(request: web.Request) -> web.StreamResponse:
    """POST /v1/chat/completions."""
    return await admitted(request, _chat)


async def completions(request: web.Request) -> web.StreamResponse:
    """POST /v1/completions."""
    return await admitted(request, _completion)


async def admitted(request: web.Request, serve: Serve) -> web.StreamResponse:
    """Serve a request that generates, within the bound on open ones. Raises Unavailable or Overloaded."""
    state = request.app[STATE]
    arrived_s = time.monotonic()
    state.admit()
    try:
        return await serve(request, state, arrived_s)
    finally:
        state.leave()
        state.metrics.request_s.observe(time.monotonic() - arrived_s)


async def _chat(request: web.Request, state: RouterState, arrived_s: float) -> web.StreamResponse:
    raw = await read_body(request)
    return await serve_chat(request, state, decode(raw, ChatRequest), len(raw), ChatShape, "chatcmpl", arrived_s)


async def serve_chat(
    request: web.Request,
    state: RouterState,
    body: ChatRequest,
    size: int,
    make_shape: MakeShape,
    prefix: str,
    arrived_s: float,
) -> web.StreamResponse:
    """Answer a conversation, whichever API it came by: `size` bytes of body, replies by `make_shape`, whose ids begin
    with `prefix`.
    """
    model = state.pool.require_model()
    model.check_name(body.model)
    wanted = as_caller(request, wanted_of(body, model.defaults, model.vocabulary_size), state.config.tps_floor_max)
    text, tools = await render_messages(state, model, body, size)
    model.check_text(text, "messages")
    packed = await encode_prompt(model, text, "messages", add_special_tokens=False, salt=wanted.salt)
    prompt = Prompt(packed, "messages")
    formats = model.formats
    inside = formats.think is not None and prompt_ends_inside_thinking(text, formats.think[0])
    if constrained(body):
        make = partial(model.grammars.grammar, body, tools, formats, inside=inside)
        wanted.sampling.grammar = await _grammar(state, make)
    wanted = replace(wanted, tools=bool(tools))
    calls_max = 1 if body.parallel_tool_calls is False else None

    def make_text() -> TextSink:
        parser = formats.parser(tools)
        return ChatText(think=formats.think, inside_thinking=inside, tools=parser, calls_max=calls_max)

    return await _serve(request, state, model, wanted, [prompt], make_text, make_shape, prefix, arrived_s)


async def _completion(request: web.Request, state: RouterState, arrived_s: float) -> web.StreamResponse:
    body = decode(await read_body(request), CompletionRequest)
    model = state.pool.require_model()
    model.check_name(body.model)
    wanted = as_caller(request, wanted_of(body, model.defaults, model.vocabulary_size), state.config.tps_floor_max)
    if constrained(body):
        make = partial(model.grammars.grammar, body, None, None, inside=False)
        wanted.sampling.grammar = await _grammar(state, make)
    prompts = await _completion_prompts(model, body, wanted.salt)
    if len(prompts) * wanted.n > limits.CHOICES_MAX:
        message = f"{len(prompts)} prompts with n={wanted.n} make more than {limits.CHOICES_MAX} choices"
        raise InvalidRequest(message, param="n")
    return await _serve(request, state, model, wanted, prompts, PlainText, CompletionShape, "cmpl", arrived_s)


async def _grammar(state: RouterState, make: Callable[[], str]) -> str:
    """The grammar that the workers' samplers follow. Raises InvalidRequest for one that cannot be followed."""
    grammar = await asyncio.get_running_loop().run_in_executor(state.executor, make)
    hellos = [client.handshake for client in state.pool.usable]
    if grammar and not all(hello is not None and hello.grammars for hello in hellos):
        raise Unavailable("a worker cannot constrain its output: it has no tokenizer.json")
    return grammar


async def _completion_prompts(model: ServedModel, body: CompletionRequest, salt: bytes) -> list[Prompt]:
    """Text, texts, token ids, or lists of token ids. Raises InvalidRequest that names the prompt."""
    given = body.prompt
    if isinstance(given, str):
        return [await _text_prompt(model, given, "prompt", body, salt)]
    if not given:
        raise InvalidRequest("prompt is empty", param="prompt")
    if isinstance(given[0], int) and set(map(type, given)) == {int}:  # a long prompt: no Python for each id
        return [_ids_prompt(model, given, "prompt")]  # type: ignore[arg-type]
    if len(given) > limits.PROMPTS_MAX:
        raise InvalidRequest(f"prompt has {len(given)} entries, at most {limits.PROMPTS_MAX}", param="prompt")
    prompts = []
    for index, item in enumerate(given):
        if isinstance(item, int):
            raise InvalidRequest("prompt mixes token ids with other prompts", param=f"prompt[{index}]")
        name = f"prompt[{index}]"
        prompts.append(
            await _text_prompt(model, item, name, body, salt)
            if isinstance(item, str)
            else _ids_prompt(model, item, name)
        )
    return prompts


async def _text_prompt(model: ServedModel, text: str, name: str, body: CompletionRequest, salt: bytes) -> Prompt:
    model.check_text(text, name)
    special = body.add_special_tokens is not False
    packed = await encode_prompt(model, text, name, add_special_tokens=special, salt=salt)
    return _checked(model, Prompt(packed, name))


def _ids_prompt(model: ServedModel, token_ids: list[int], name: str) -> Prompt:
    return _checked(model, Prompt(packed_token_ids(name, token_ids, model.vocabulary_size), name))


def _checked(model: ServedModel, prompt: Prompt) -> Prompt:
    if not prompt.packed:
        raise InvalidRequest(f"{prompt.param} has no tokens", param=prompt.param)
    model.tokens_left(prompt.tokens, prompt.param)
    return prompt


async def encode_prompt(
    model: ServedModel, text: str, name: str, *, add_special_tokens: bool, salt: bytes = b""
) -> bytes:
    """Token ids, packed. Raises InvalidRequest that names the parameter."""
    try:
        return await model.tokenizer.encode(text, add_special_tokens=add_special_tokens, salt=salt)
    except InvalidRequest as error:
        raise InvalidRequest(error.message, param=name) from error


# -- the run ----------------------------------------------------------------------------------------------------------
async def _serve(
    request: web.Request,
    state: RouterState,
    model: ServedModel,
    wanted: Wanted,
    prompts: list[Prompt],
    make_text: Callable[[], TextSink],
    make_shape: MakeShape,
    prefix: str,
    arrived_s: float,
) -> web.StreamResponse:
    """Run the sequences and answer. However this ends (cancelled: the client left), nothing stays open at the
    worker.
    """
    request_id = request_id_of(request)
    tenant = tenant_of(request, wanted.salt)
    run = Run(state.pool, state.metrics, wanted, model, request_id, prompts, make_text, arrived_s, tenant)
    shape = make_shape(run, new_request_id(prefix))
    caller = caller_of(request)
    trace = traces.begin(state.tracer, request, run, arrived_s)
    state.opened(run)
    try:
        run.start(state.config.request_timeout_s)
        if caller is not None:
            caller.begin(run)
        if wanted.stream:
            return await _Streamer(request, state, run, shape, _explanation(request, state, run)).serve()
        await run.done
        if run.error is not None:
            raise run.error
        return json_response(shape.whole(), headers=_explanation(request, state, run))
    finally:
        if caller is not None:
            caller.end(run)
        run.close("disconnect")
        state.closed(run)
        traces.finish(trace, run, caller)
        if state.ceiling is not None:
            run.count_ceiling(state.ceiling)
        key = caller.record.name if caller is not None else None
        error = run.error and run.error.code
        log.debug("request done", request_id=request_id, prompts=len(prompts), error=error, key=key)


def _explanation(request: web.Request, state: RouterState, run: Run) -> dict[str, str] | None:
    """Why the request went where it went, in a header, for who asks by `X-Explain` and may know of others' load."""
    if EXPLAIN_HEADER not in request.headers:
        return None
    caller = caller_of(request)
    if caller.record.admin if caller is not None else serves_debug(state.config):
        return {DECISION_HEADER: run.route}
    return None


class _Streamer:
    """Writes a run as server-sent events: a chunk per choice and step while the reader keeps up, merged ones else."""

    def __init__(
        self, request: web.Request, state: RouterState, run: Run, shape: Shape, headers: dict[str, str] | None
    ) -> None:
        self._state = state
        self._run = run
        self._shape = shape
        headers = {**(headers or {}), "X-Request-Id": run.request_id}
        self._stream = EventStream(request, headers, send_buffer_bytes=state.config.send_buffer_bytes)

    async def serve(self) -> web.StreamResponse:
        """Until the run is done and its reply is with the client. Raises while a status can still say what is wrong."""
        run, stream, config = self._run, self._stream, self._state.config
        began = await _within(run.first, config.headers_after_s)
        if run.error is not None:
            raise run.error
        self._state.metrics.streams_open += 1
        try:
            await self._open(b"".join(self._shape.chunk(choice) for choice in run.choices) if began else PING)
            while not await _within(run.first, config.ping_every_s):
                stream.send(PING)
            await run.done
            if not await stream.close(self._last(), config.send_timeout_s, keep_alive=run.error is None):
                self._state.metrics.aborts["send_timeout"] += 1
        finally:
            self._state.metrics.streams_open -= 1
        return stream.response

    async def _open(self, first: bytes) -> None:
        await self._stream.open(first or PING)
        self._run.on_step = self._on_step
        for choice in self._run.choices:  # what came while the headers left
            self._on_step(choice)

    def _on_step(self, choice: Choice) -> None:
        if self._stream.writable:
            data = self._shape.chunk(choice)
            if data:
                self._stream.send(data)
        elif choice.delta.size > self._state.config.slow_reader_bytes_max:
            self._run.fail(Overloaded("the client reads too slowly"), "slow_reader")

    def _last(self) -> bytes:
        """What ends the stream: what is left and its end, or the error."""
        run = self._run
        if run.error is not None:
            return self._shape.error(run.error)
        return b"".join(self._shape.chunk(choice) for choice in run.choices) + self._shape.end()


async def _within(future: asyncio.Future[None], timeout_s: float) -> bool:
    """Whether it is done within this time."""
    if not future.done():
        await asyncio.wait([future], timeout=timeout_s)
    return future.done()
