"""/, /mesh and /mesh/events: what they say, who may see it, and that nobody pays while nobody looks."""

from __future__ import annotations

import asyncio
import json
import time
from typing import Any

import aiohttp
import pytest
from mock_worker import BLOCKS, Script
from router_stack import Stack, StartStack, until

from tokenrelay.proto import worker_pb2
from tokenrelay.services.router import mesh_feed, page
from tokenrelay.services.router.mesh import HIDDEN, _blocks, handover_object, percentile, trail_object
from tokenrelay.services.router.mesh_feed import FEED, MeshFeed
from tokenrelay.services.router.trails import NO_TRAIL, NOTES_MAX, Trails

HANG = Script([], finish=worker_pb2.FINISH_NONE)
PAGE_BYTES_MAX = 300_000


async def get(stack: Stack, path: str, **headers: str) -> tuple[int, Any]:
    async with stack.http.get(stack.url + path, headers=headers) as response:
        return response.status, await response.json()


def feed_of(stack: Stack) -> MeshFeed:
    app = stack.service._runner.app
    return app[FEED]


class Viewer:
    """Reads events of /mesh/events."""

    def __init__(self, response: aiohttp.ClientResponse) -> None:
        self._response = response

    async def next(self) -> tuple[str, Any]:
        """(name, data)."""
        name = ""
        async with asyncio.timeout(5):
            while line := (await self._response.content.readline()).decode():
                if line.startswith("event: "):
                    name = line[7:].strip()
                elif line.startswith("data: "):
                    return name, json.loads(line[6:])
        return "end", None


# -- the page ---------------------------------------------------------------------------------------------------------
async def test_the_page_is_small_and_asks_for_nothing_from_elsewhere(stack: Stack) -> None:
    async with stack.http.get(stack.url + "/") as response:
        html = await response.text()
        assert response.status == 200 and response.content_type == "text/html"
        policy = response.headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy and "http" not in policy
    assert "<style" not in html and " style=" not in html and "onclick" not in html
    assert sum(len(asset.body) for asset in page.assets().values()) < PAGE_BYTES_MAX
    for name, asset in page.assets().items():
        text = asset.body.decode()
        assert "https://" not in text, name
        for word in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "new Function"):
            assert word not in text, f"{name} makes markup or code of text"
        async with stack.http.get(f"{stack.url}/page/{name}") as response:
            assert response.status == 200 and response.headers["X-Content-Type-Options"] == "nosniff"
            etag = response.headers["ETag"]
        async with stack.http.get(f"{stack.url}/page/{name}", headers={"If-None-Match": etag}) as response:
            assert response.status == 304 and not await response.read()


@pytest.mark.parametrize("name", ["nothing.js", "..%2Fconfig.py", "%2e%2e/page.py", "index.html%00"])
async def test_nothing_else_is_served(stack: Stack, name: str) -> None:
    async with stack.http.get(f"{stack.url}/page/{name}") as response:
        assert response.status == 404


async def test_it_can_be_turned_off(start_stack: StartStack) -> None:
    stack = await start_stack(page="off")
    for path in ("/", "/mesh", "/mesh/events", "/page/app.js"):
        assert (await get(stack, path))[0] == 404


# -- the snapshot -----------------------------------------------------------------------------------------------------
async def test_a_snapshot_has_workers_and_requests(stack: Stack) -> None:
    stack.worker.say("one two three four five six", cached_tokens=3)
    async with stack.http.post(
        f"{stack.url}/v1/chat/completions",
        json={"messages": [{"role": "user", "content": "Hi"}]},
        headers={"X-Request-Id": "turn-1"},
    ) as response:
        reply = await response.json()
    status, mesh = await get(stack, "/mesh")
    assert status == 200
    (worker,) = mesh["workers"]
    assert (worker["target"], worker["state"], worker["role"]) == (stack.worker.address, "ready", "colocated")
    assert sum(worker["blocks"].values()) == BLOCKS
    (request,) = mesh["requests"]
    usage = reply["usage"]
    assert request["id"] == "turn-1" and request["outcome"] == "stop"
    assert (request["prompt_tokens"], request["output_tokens"]) == (usage["prompt_tokens"], usage["completion_tokens"])
    assert request["cached_tokens"] == 3
    assert [note["kind"] for note in request["notes"]] == ["submitted", "first_token", "ended"]
    assert 0 <= request["notes"][0]["at_ms"] <= request["ttft_ms"] <= request["ended_ms"]
    assert mesh["point"]["ttft_p50_ms"] == request["ttft_ms"] and mesh["point"]["users"] == 1
    assert mesh["totals"]["output_tokens"] == usage["completion_tokens"]
    assert (await get(stack, "/mesh/requests/turn-1"))[1]["outcome"] == "stop"
    assert (await get(stack, "/mesh/requests/turn-2"))[0] == 404


async def test_a_request_in_work_is_shown_with_its_tokens(stack: Stack) -> None:
    ids = stack.worker.ids("one two three four five")
    stack.worker.host.answer = lambda submit: Script(ids, finish=worker_pb2.FINISH_NONE)
    _, writer = await stack.connect({"messages": [{"role": "user", "content": "Hi"}]})
    await until(lambda: stack.service.state.metrics.output_tokens == len(ids))
    mesh = (await get(stack, "/mesh"))[1]
    (request,) = mesh["requests"]
    assert (request["output_tokens"], request["ended_ms"], mesh["point"]["open"]) == (len(ids), None, 1)
    writer.close()
    await until(lambda: not stack.service.state.runs)
    (trail,) = stack.service.pool.trails.recent(5)
    assert trail.outcome == "unavailable" and trail.notes[-1].kind == "ended", "its client left"


async def test_a_worker_that_is_gone_is_shown_as_away(stack: Stack) -> None:
    await stack.worker.stop()
    await until(lambda: not stack.service.pool.usable)
    (worker,) = (await get(stack, "/mesh"))[1]["workers"]
    assert worker["state"] == "away" and worker["reason"]


async def test_requests_are_shown_to_this_machine_only(start_stack: StartStack) -> None:
    stack = await start_stack(debug_endpoints="off")
    await stack.chat("something private")
    mesh = (await get(stack, "/mesh"))[1]
    assert (mesh["requests"], mesh["handovers"], mesh["detail"]) == ([], [], HIDDEN)
    assert mesh["totals"]["requests"] == 1
    request_id = stack.service.pool.trails.recent(1)[0].request_id
    assert (await get(stack, f"/mesh/requests/{request_id}"))[0] == 404


async def test_a_prompt_is_never_shown(stack: Stack) -> None:
    await stack.chat("a secret of mine")
    async with stack.http.get(stack.url + "/mesh") as response:
        assert "secret" not in await response.text()


# -- the feed ---------------------------------------------------------------------------------------------------------
async def test_one_snapshot_a_second_for_all_viewers_and_none_without(
    stack: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    feed = feed_of(stack)
    feed._every_s = 0.1
    await asyncio.sleep(0.3)
    assert feed.snapshots == 0, "nobody watched"
    async with stack.http.get(stack.url + "/mesh/events") as one, stack.http.get(stack.url + "/mesh/events") as other:
        assert one.content_type == "text/event-stream"
        viewers = Viewer(one), Viewer(other)
        for viewer in viewers:
            name, history = await viewer.next()
            assert name == "history" and len(history["points"]) >= 1
        before, seen = feed.snapshots, 0
        for _ in range(4):
            names = [await viewer.next() for viewer in viewers]
            assert {name for name, _ in names} == {"snapshot"}
            seen += 1
        assert feed.viewers == 2 and feed.snapshots - before <= seen + 1, "not one a viewer"
    await until(lambda: feed.viewers == 0)
    after = feed.snapshots
    await asyncio.sleep(0.3)
    assert feed.snapshots <= after + 1 and feed._ticker is None


async def test_viewers_are_bounded(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mesh_feed, "VIEWERS_MAX", 1)
    async with stack.http.get(stack.url + "/mesh/events") as one:
        assert one.status == 200
        async with stack.http.get(stack.url + "/mesh/events") as other:
            assert other.status == 429 and "Retry-After" in other.headers
    await until(lambda: feed_of(stack).viewers == 0)


async def test_viewers_do_not_hold_up_a_drain(stack: Stack) -> None:
    feed_of(stack)._every_s = 0.05
    async with stack.http.get(stack.url + "/mesh/events") as response:
        viewer = Viewer(response)
        await viewer.next()
        await asyncio.wait_for(stack.service.drain(), 5)
        names = []
        while (name := (await viewer.next())[0]) not in ("bye", "end"):
            names.append(name)
        assert name == "bye" and set(names) <= {"snapshot"}


async def test_mesh_is_not_taken_twice_in_a_second(stack: Stack) -> None:
    await asyncio.gather(*(get(stack, "/mesh") for _ in range(5)))
    assert feed_of(stack).snapshots == 1


# -- trails -----------------------------------------------------------------------------------------------------------
def test_a_trail_is_bounded_and_ends_once() -> None:
    trails = Trails(trails_max=2)
    trail = trails.begin("a", prompt_tokens=5)
    for _ in range(NOTES_MAX + 9):
        trail.note("moved")
    trail.end("stop", 3)
    trail.end("length", 9)
    trail.note("parked")
    assert len(trail.notes) == NOTES_MAX + 1 and trail.notes[-1].kind == "ended"
    assert (trail.outcome, trail.output_tokens) == ("stop", 3)
    trails.begin("b", prompt_tokens=1)
    trails.begin("c", prompt_tokens=1)
    assert [one.request_id for one in trails.recent(9)] == ["c", "b"] and trails.find("a") is None
    NO_TRAIL.note("moved")
    assert not NO_TRAIL.notes


def test_where_the_wait_at_a_worker_ended_is_noted_with_the_first_token() -> None:
    trail = Trails().begin("a", prompt_tokens=5, arrived_s=time.monotonic() - 2.0)
    trail.note("submitted", worker="w")
    trail.note("submitted", worker="x", choice=1)
    time.sleep(0.02)
    trail.first_token(0, 0, waited_us=5_000)
    kinds = [(note.kind, note.worker) for note in trail.notes]
    assert kinds == [("submitted", "w"), ("submitted", "x"), ("started", "w"), ("first_token", "")]
    assert trail.notes[2].at_s == pytest.approx(trail.notes[0].at_s + 0.005)
    trail.first_token(0, 1, waited_us=9_000_000)
    assert trail.notes[-2].kind == "started" and trail.notes[-2].at_s <= trail.notes[-1].at_s, "never in the future"


def test_blocks_are_shown_by_their_states() -> None:
    told = worker_pb2.Stats(blocks_free=5, blocks_cached=4, blocks_active=6, blocks_sealed=3, blocks_in_flight=2)
    told.blocks_writable = 1
    states = {"free": 5, "cached": 4, "sealed": 3, "writable": 1, "in_flight": 2, "quarantined": 0, "active": 0}
    assert _blocks(told) == states
    untold = _blocks(worker_pb2.Stats(blocks_free=5, blocks_active=6))
    assert untold["active"] == 6 and sum(untold.values()) == 11


def test_a_handover_says_how_far_it_is() -> None:
    trails = Trails()
    trail = trails.begin("a", prompt_tokens=500)

    def stage() -> str:
        ((found, choice),) = trails.handovers
        return str(handover_object(found, choice)["stage"])

    trail.note("prefill", worker="p", to="d", detail="500 tokens")
    assert stage() == "computing"
    trail.note("offered", worker="p", to="d")
    assert stage() == "pulling"
    trail.first_token(0, 0)
    assert stage() == "pulling", "the rest is on its way"
    trail.note("handed_over", worker="p", to="d")
    assert stage() == "decoding"
    trail.end("stop", 9)
    assert stage() == "done"
    assert trail_object(trail, 9)["notes"][0]["to"] == "d"


def test_percentiles_are_values_that_were_seen() -> None:
    assert percentile([], 0.5) is None
    assert [percentile([3.0, 1.0, 2.0], share) for share in (0.0, 0.5, 0.95)] == [1.0, 2.0, 3.0]
