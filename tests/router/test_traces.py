"""Traces: one request's spans in router and worker, as an exporter in memory and a collector get them."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest
from mock_worker import MockWorker, Script
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF, ParentBased
from otlp import Collector
from router_stack import Stack, StartStack

from tokenrelay.base.errors import ConfigError
from tokenrelay.proto import worker_pb2
from tokenrelay.services.chassis.spans import Spans
from tokenrelay.services.chassis.tracing import Tracer, TracingConfig

CHAT = "/v1/chat/completions"
BODY: dict[str, Any] = {"messages": [{"role": "user", "content": "Hi"}]}
PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


def in_memory(**provider: Any) -> tuple[Tracer, InMemorySpanExporter]:
    exporter, made = InMemorySpanExporter(), TracerProvider(**provider)
    made.add_span_processor(SimpleSpanProcessor(exporter))
    return Tracer(made), exporter


def by_name(exporter: InMemorySpanExporter) -> dict[str, ReadableSpan]:
    return {span.name: span for span in exporter.get_finished_spans()}


@pytest.fixture
async def traced(stack: Stack) -> tuple[Stack, InMemorySpanExporter]:
    tracer, exporter = in_memory()
    stack.service.state.tracer = tracer
    stack.worker.host.servicer.spans = Spans(tracer, "w0")
    return stack, exporter


async def test_the_spans_of_a_request(traced: tuple[Stack, InMemorySpanExporter]) -> None:
    stack, exporter = traced
    began_ns = time.time_ns()
    stack.worker.host.answer = lambda submit: Script(stack.worker.ids("Hello world!"), cached_tokens=3)
    async with stack.http.post(stack.url + CHAT, json={**BODY, "stream": True}, headers={"traceparent": PARENT}) as got:
        await got.read()
    await asyncio.sleep(0.05)
    spans = by_name(exporter)
    assert set(spans) == {f"POST {CHAT}", "queue", "prefill", "decode"}
    root = spans[f"POST {CHAT}"]
    assert f"{root.context.trace_id:032x}" == PARENT.split("-")[1]
    assert f"{root.parent.span_id:016x}" == PARENT.split("-")[2]
    for name in ("queue", "prefill", "decode"):
        assert spans[name].context.trace_id == root.context.trace_id
        assert spans[name].parent.span_id == root.context.span_id
        assert spans[name].attributes["tokenrelay.worker"] == "w0"
    assert began_ns <= root.start_time <= spans["queue"].start_time
    assert spans["queue"].end_time <= spans["prefill"].end_time == spans["decode"].start_time
    assert spans["decode"].end_time <= time.time_ns()
    said = root.attributes
    assert said["gen_ai.usage.output_tokens"] == spans["decode"].attributes["tokenrelay.output_tokens"] > 0
    assert said["tokenrelay.cached_tokens"] == spans["prefill"].attributes["tokenrelay.cached_tokens"] == 3
    assert said["gen_ai.usage.input_tokens"] == spans["prefill"].attributes["tokenrelay.prompt_tokens"]
    assert [event.name for event in root.events] == ["submitted", "first_token", "ended"]
    assert spans["decode"].attributes["tokenrelay.finish"] in ("stop", "length")
    assert "Hello" not in repr([(span.attributes, span.events) for span in spans.values()])


async def test_failed_and_aborted_requests_end_their_spans(traced: tuple[Stack, InMemorySpanExporter]) -> None:
    stack, exporter = traced
    stack.worker.host.answer = lambda submit: Script((), refuse=worker_pb2.REJECT_QUEUE_FULL, error="full")
    assert (await stack.post(CHAT, BODY))[0] == 429
    spans = by_name(exporter)
    assert spans[f"POST {CHAT}"].attributes["error.type"] == "overloaded"
    assert not spans[f"POST {CHAT}"].status.is_ok
    assert spans["queue"].attributes["tokenrelay.finish"] == "rejected"
    exporter.clear()
    stack.worker.host.answer = lambda submit: Script(stack.worker.ids("Hello"), finish=0)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.3):
            await stack.post(CHAT, BODY)
    await stack.idle()
    await asyncio.sleep(0.05)
    spans = by_name(exporter)
    assert set(spans) == {f"POST {CHAT}", "queue", "prefill", "decode"}
    assert spans["decode"].attributes["tokenrelay.finish"] == "abort"
    assert not stack.worker.host.servicer.spans.open


async def test_what_is_not_sampled_is_not_told_to_workers(stack: Stack) -> None:
    tracer, exporter = in_memory(sampler=ParentBased(ALWAYS_OFF))
    stack.service.state.tracer = tracer
    assert (await stack.post(CHAT, BODY))[0] == 200
    assert stack.worker.submits[-1].traceparent == ""
    async with stack.http.post(stack.url + CHAT, json=BODY, headers={"traceparent": PARENT}) as response:
        assert response.status == 200, "who asks with a sampled parent is traced"
    assert stack.worker.submits[-1].traceparent.startswith("00-0af7651916cd43dd8448eb211c80319c-")
    for wrong in ("x", "00-0-0-01", PARENT[:-3], "é" * 55):
        async with stack.http.post(stack.url + CHAT, json=BODY, headers={"traceparent": wrong}) as response:
            assert response.status == 200
    assert len(exporter.get_finished_spans()) == 1


async def test_off_is_off(stack: Stack) -> None:
    async with stack.http.post(stack.url + CHAT, json=BODY, headers={"traceparent": PARENT}) as response:
        assert response.status == 200
    assert stack.worker.submits[-1].traceparent == ""
    assert Tracer.of(TracingConfig(), "router", "1") is None


def test_an_endpoint_is_a_url() -> None:
    with pytest.raises(ConfigError, match="expected a URL"):
        Tracer.of(TracingConfig(endpoint="localhost:4317"), "router", "1")


async def test_a_collector_gets_them(start_stack: StartStack) -> None:
    stack = await start_stack()
    with Collector() as collector:
        tracer = Tracer.of(TracingConfig(endpoint=collector.endpoint), "router", "life-1")
        stack.service.state.tracer = tracer
        assert (await stack.post(CHAT, BODY))[0] == 200
        await asyncio.to_thread(tracer.close)
        stack.service.state.tracer = None
    (span,) = collector.spans
    assert (span.name, span.service, span.parent_id, span.failed) == (f"POST {CHAT}", "tokenrelay-router", "", False)
    assert span.attributes["gen_ai.request.model"] == "mock"
    assert span.end_ns > span.start_ns


async def test_queue_times_reach_the_metrics(stack: Stack) -> None:
    worker: MockWorker = stack.worker
    fill = worker.host._fill

    def waited(output: worker_pb2.SequenceOutput, *rest: Any) -> None:
        fill(output, *rest)
        output.waited_us = 30_000

    worker.host._fill = waited  # type: ignore[method-assign]
    await stack.chat()
    async with stack.http.get(stack.url + "/metrics") as response:
        page = await response.text()
    assert 'tokenrelay_queue_seconds_bucket{le="0.025"} 0' in page
    assert 'tokenrelay_queue_seconds_bucket{le="0.05"} 1' in page
