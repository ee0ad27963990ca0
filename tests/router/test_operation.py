"""Models, tokens, health, metrics; and what the configuration refuses."""

from __future__ import annotations

import re

import pytest
from mock_worker import BLOCKS, Script
from router_stack import Stack, StartStack, until

from tokenrelay.base.errors import ConfigError
from tokenrelay.proto import worker_pb2
from tokenrelay.services.router.config import parse_arguments, resolve_options
from tokenrelay.services.router.metrics import Histogram, Metrics


async def get(stack: Stack, path: str) -> tuple[int, str]:
    async with stack.http.get(stack.url + path) as response:
        return response.status, await response.text()


def samples(page: str) -> dict[str, float]:
    """Each sample of a Prometheus page; every line must be one, or a comment."""
    found = {}
    for line in page.splitlines():
        if not line.startswith("# "):
            match = re.fullmatch(r"(\w+(?:\{[^}]*\})?) (-?[\d.e+-]+)", line)
            assert match, line
            assert match[1] not in found, f"{match[1]} twice"
            found[match[1]] = float(match[2])
    return found


async def test_models(start_stack: StartStack) -> None:
    stack = await start_stack(model_alias=("gpt-4o", "org/name"))
    async with stack.http.get(stack.url + "/v1/models") as response:
        listed = (await response.json())["data"]
    assert [entry["id"] for entry in listed] == ["mock", "gpt-4o", "org/name"]
    assert listed[0]["max_model_len"] == 4096
    assert (await get(stack, "/v1/models/org/name"))[0] == 200
    assert (await get(stack, "/v1/models/other"))[0] == 404
    assert (await stack.chat(model="gpt-4o"))["model"] == "mock"


async def test_tokenize_and_detokenize(stack: Stack) -> None:
    text = "Größe <think> <|im_end|>"
    status, reply = await stack.post("/tokenize", {"prompt": text, "return_token_strs": True})
    assert status == 200
    assert reply["tokens"] == stack.worker.ids(text)
    assert (reply["count"], reply["max_model_len"]) == (len(reply["tokens"]), 4096)
    assert len(reply["token_strs"]) == reply["count"]
    status, back = await stack.post("/detokenize", {"tokens": reply["tokens"]})
    assert (status, back) == (200, {"prompt": text})
    status, reply = await stack.post("/tokenize", {"messages": [{"role": "user", "content": "Hi"}]})
    await stack.chat("Hi")
    assert reply["count"] == stack.worker.submits[0].output_start
    assert (await stack.post("/tokenize", {}))[0] == 400
    assert (await stack.post("/tokenize", {"prompt": "x", "messages": []}))[0] == 400
    assert (await stack.post("/detokenize", {"tokens": [10**9]}))[0] == 400


async def test_health_ready_version(stack: Stack) -> None:
    assert (await get(stack, "/health"))[0] == 200
    assert (await get(stack, "/ready"))[0] == 200
    assert "version" in (await get(stack, "/version"))[1]


async def test_metrics(stack: Stack) -> None:
    stack.worker.say("one two three", cached_tokens=3)
    await stack.chat()
    await stack.chat_stream()
    await stack.post("/v1/chat/completions", {"messages": []})
    stack.worker.host.answer = lambda submit: Script([], finish=worker_pb2.FINISH_NONE)
    page = samples((await get(stack, "/metrics"))[1])
    chat = 'tokenrelay_requests_total{endpoint="/v1/chat/completions",status="%d"}'
    assert (page[chat % 200], page[chat % 400]) == (2, 1)
    tokens = len(stack.worker.ids("one two three")) + 1
    assert page["tokenrelay_output_tokens_total"] == 2 * tokens
    assert page["tokenrelay_cached_tokens_total"] == 6
    assert page["tokenrelay_prompt_tokens_total"] == 2 * stack.worker.submits[0].output_start
    assert page["tokenrelay_ttft_seconds_count"] == 2
    assert page["tokenrelay_inter_token_seconds_count"] <= 2 * (tokens - 1)
    assert page["tokenrelay_requests_open"] == 0
    assert page[f'tokenrelay_worker_ready{{worker="{stack.worker.address}"}}'] == 1


async def test_the_kv_gauge_is_fresh_and_sums_to_the_pool(stack: Stack) -> None:
    """The mock's counters change with no step that would tell the router."""
    stack.worker.host.answer = lambda submit: Script([], finish=worker_pb2.FINISH_NONE)
    _, writer = await stack.connect({"messages": [{"role": "user", "content": "Hi"}]})
    await until(lambda: stack.worker.running == 1)
    blocks = {}
    page = samples((await get(stack, "/metrics"))[1])
    for state in ("free", "cached", "active"):
        blocks[state] = page[f'tokenrelay_kv_blocks{{state="{state}"}}']
    assert (sum(blocks.values()), blocks["active"]) == (BLOCKS, 1)
    assert page['tokenrelay_sequences{state="running"}'] == 1
    writer.close()
    await stack.worker.stop()
    assert "tokenrelay_kv_blocks" in (await get(stack, "/metrics"))[1], "the last known ones"


def test_the_tps_floor_of_each_worker_is_on_the_page() -> None:
    floor = worker_pb2.TpsFloor(configured=70, in_force=12.5, batch_1=25, tokens=9, tokens_late=2, overrides=1)
    counted = Metrics()
    counted.integrity_failures = {"unix:a": 2}
    page = samples(counted.render({"unix:a": (True, worker_pb2.Stats(tps_floor=floor, integrity_checks=3))}))
    assert page['tokenrelay_worker_integrity_failures_total{worker="unix:a"}'] == 2
    assert page["tokenrelay_worker_integrity_checks_total"] == 3
    expected = {"configured": 70, "in_force": 12.5, "batch_1": 25, "users_below": 0}
    expected |= {"tokens_total": 9, "tokens_late_total": 2, "overrides_total": 1}
    for name, value in expected.items():
        assert page[f'tokenrelay_tps_floor_{name}{{worker="unix:a"}}'] == value


def test_drafts_of_all_workers_are_on_the_page() -> None:
    drafts = worker_pb2.Drafts(drafts=3, tokens=20, accepted=13)
    workers = {name: (True, worker_pb2.Stats(drafts=drafts)) for name in ("unix:a", "unix:b")}
    page = samples(Metrics().render({**workers, "unix:c": (True, worker_pb2.Stats())}))
    assert page["tokenrelay_spec_decode_num_drafts_total"] == 6
    assert page["tokenrelay_spec_decode_num_draft_tokens_total"] == 40
    assert page["tokenrelay_spec_decode_num_accepted_tokens_total"] == 26
    assert page["tokenrelay_spec_decode_draft_acceptance_rate"] == 0.65
    mtp = worker_pb2.Stats(drafts=worker_pb2.Drafts(drafts=1, tokens=4, accepted=3, proposer="mtp"))
    page = samples(Metrics().render({**workers, "unix:d": (True, mtp)}))
    assert page["tokenrelay_spec_decode_num_draft_tokens_total"] == 44
    for proposer, tokens, accepted in (("ngram", 40, 26), ("mtp", 4, 3)):
        label = f'{{proposer="{proposer}"}}'
        assert page[f"tokenrelay_spec_decode_proposer_draft_tokens_total{label}"] == tokens
        assert page[f"tokenrelay_spec_decode_proposer_accepted_tokens_total{label}"] == accepted
        assert page[f"tokenrelay_spec_decode_proposer_acceptance_rate{label}"] == accepted / tokens
    nobody = samples(Metrics().render({"unix:c": (True, worker_pb2.Stats())}))
    assert nobody['tokenrelay_spec_decode_proposer_acceptance_rate{proposer="mtp"}'] == 0
    assert nobody["tokenrelay_spec_decode_draft_acceptance_rate"] == 0


def test_the_host_tiers_of_all_workers_are_on_the_page() -> None:
    tier = worker_pb2.HostTier(blocks=10, blocks_used=4, copies_late=1, blocks_stored=7, blocks_loaded=5, loads=2)
    tier.tokens_loaded, tier.copies_failed, tier.copies_expired, tier.block_bytes = 320, 3, 1, 1000
    workers = {name: (True, worker_pb2.Stats(host_tier=tier)) for name in ("unix:a", "unix:b")}
    page = samples(Metrics().render({**workers, "unix:c": (True, worker_pb2.Stats())}))
    assert page['tokenrelay_host_tier_blocks{state="used"}'] == 8
    assert page['tokenrelay_host_tier_blocks{state="free"}'] == 12
    assert page["tokenrelay_host_tier_copies_late"] == 2
    assert page['tokenrelay_host_tier_bytes_total{direction="to_host"}'] == 14_000
    assert page['tokenrelay_host_tier_bytes_total{direction="to_device"}'] == 10_000
    for name, value in {"loads": 4, "tokens_loaded": 640, "copies_failed": 6, "copies_expired": 2}.items():
        assert page[f"tokenrelay_host_tier_{name}_total"] == value


def test_histograms_are_cumulative() -> None:
    histogram = Histogram((1, 2))
    for value in (0.5, 1, 1.5, 9):
        histogram.observe(value)
    histogram.observe(2, times=2)
    assert histogram.lines("x") == [
        *['x_bucket{le="1"} 2', 'x_bucket{le="2"} 5', 'x_bucket{le="+Inf"} 6', "x_sum 16.0", "x_count 6"]
    ]


def test_configuration() -> None:
    options = parse_arguments(["--port", "9", "--worker", "unix:/a,unix:/b", "--status-fd", "5"])
    resolved = resolve_options(options)
    assert resolved.values.port == 9
    assert resolved.values.worker == ("unix:/a", "unix:/b")
    assert resolved.origins["port"] == "flag --port"
    assert options.status_fd == 5
    with pytest.raises(ConfigError, match=r"router.port .*65535"):
        resolve_options(parse_arguments(["--port", "70000"]))


async def test_workers_are_listed_with_their_counters_and_problems(stack: Stack) -> None:
    await stack.chat()
    async with stack.http.get(stack.url + "/workers") as response:
        (worker,) = (await response.json())["workers"]
    assert worker["ready"] is True
    assert (worker["role"], worker["open"], worker["connections"]) == ("colocated", 0, 1)
    assert worker["stats"]["blocks_free"] > 0
    assert worker["stats"]["output_tokens"] > 0
    await stack.worker.stop()
    await until(lambda: not stack.service.pool.usable)
    async with stack.http.get(stack.url + "/workers") as response:
        (worker,) = (await response.json())["workers"]
    assert worker["ready"] is False
    assert worker["target"] in worker["reason"]
