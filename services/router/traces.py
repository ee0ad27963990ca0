"""A request as a span: its way through this router, with what happened to it as events, and the context for workers.

    trace = begin(state.tracer, request, run, arrived_s)      # None: tracing is off
    ...
    finish(trace, run, caller)

Attributes are those of OpenTelemetry's conventions for generative AI
(https://opentelemetry.io/docs/specs/semconv/gen-ai/) where they have a word for it. Never a prompt, never a key.
"""

from __future__ import annotations

from aiohttp import web

from tokenrelay.services.chassis.tracing import OpenSpan, Tracer
from tokenrelay.services.router.gate import Caller
from tokenrelay.services.router.generation import Run


def begin(tracer: Tracer | None, request: web.Request, run: Run, arrived_s: float) -> OpenSpan | None:
    """Its span, from its arrival on; the run tells workers of it."""
    if tracer is None:
        return None
    headers = request.headers
    name = f"{request.method} {request.path}"
    span = tracer.begin(name, headers.get("traceparent", ""), arrived_s, headers.get("tracestate", ""))
    run.traceparent = span.traceparent
    return span


def finish(span: OpenSpan | None, run: Run, caller: Caller | None) -> None:
    """Its end, which is now."""
    if span is None:
        return
    trail = run.trail
    for note in trail.notes:
        said = {"tokenrelay.choice": note.choice}
        words = {"tokenrelay.worker": note.worker, "tokenrelay.to": note.to, "tokenrelay.detail": note.detail}
        span.event(note.kind, trail.arrived_s + note.at_s, said | {key: word for key, word in words.items() if word})
    prompt_tokens, cached_tokens, output_tokens = run.tokens
    attributes: dict[str, str | int | float | bool] = {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "tokenrelay",
        "gen_ai.request.model": run.model.names[0],
        "gen_ai.usage.input_tokens": prompt_tokens,
        "gen_ai.usage.output_tokens": output_tokens,
        "tokenrelay.cached_tokens": cached_tokens,
        "tokenrelay.request_id": run.request_id,
        "tokenrelay.choices": len(run.choices),
        "tokenrelay.route": run.route,
    }
    if trail.first_s is not None:
        attributes["gen_ai.server.time_to_first_token"] = trail.first_s
    if caller is not None:
        attributes["tokenrelay.key"] = caller.record.name
    error = run.error.code if run.error is not None else ""
    if error:
        attributes["error.type"] = error
    span.end(attributes, error)
