"""One request's trace through router, prefill and decode workers: real processes, a collector in this one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
from otlp import Collector, Seen
from serving import Server, until

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    with Collector() as collector:
        yield collector


def test_a_trace_of_two_legs(start: Callable[..., Server], collector: Collector, tmp_path: Path) -> None:
    config = tmp_path / "relay.toml"
    config.write_text(f'[router]\nremote_prefill = "always"\n[tracing]\nendpoint = "{collector.endpoint}"\n')
    server = start("--prefill", 1, "--decode", 1, "--config", config, command="up")
    body = {"prompt": "Once upon a time " * 40, "max_tokens": 16, "ignore_eos": True}
    reply = httpx.post(f"{server.url}/v1/completions", json=body, headers={"traceparent": PARENT}, timeout=60)
    assert reply.status_code == 200, reply.text

    def spans() -> list[Seen]:
        return [span for span in collector.spans if span.trace_id == PARENT.split("-")[1]]

    until(lambda: len(spans()) == 5, 30)
    root = next(span for span in spans() if span.service == "tokenrelay-router")
    assert root.parent_id == PARENT.split("-")[2]
    noted = [name for name in root.events if name != "started"]
    assert noted == ["prefill", "offered", "first_token", "handed_over", "ended"]
    parts = {(span.service, span.name): span for span in spans() if span is not root}
    assert set(parts) == {
        ("tokenrelay-prefill", "queue"),
        ("tokenrelay-prefill", "prefill"),
        ("tokenrelay-decode", "transfer"),
        ("tokenrelay-decode", "decode"),
    }
    assert all(span.parent_id == root.span_id for span in parts.values())
    prefill, transfer = parts["tokenrelay-prefill", "prefill"], parts["tokenrelay-decode", "transfer"]
    decode = parts["tokenrelay-decode", "decode"]
    assert root.start_ns < prefill.start_ns < prefill.end_ns < transfer.end_ns == decode.start_ns < decode.end_ns
    assert transfer.start_ns < prefill.end_ns, "the destination takes what is sealed while the prompt is computed"
    assert decode.attributes["tokenrelay.output_tokens"] == 15
    assert (decode.attributes["tokenrelay.finish"], decode.attributes["tokenrelay.worker"]) == ("length", "decode-1")
    assert prefill.attributes["tokenrelay.prompt_tokens"] == root.attributes["gen_ai.usage.input_tokens"]
