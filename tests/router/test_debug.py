"""/debug/requests: what workers say about open requests, and who may see it."""

from __future__ import annotations

import json

import pytest
from router_stack import Stack, StartStack, until

from tokenrelay.base.errors import Unavailable
from tokenrelay.proto import worker_pb2
from tokenrelay.services.router.config import RouterConfig
from tokenrelay.services.router.debug import is_loopback, serves_debug


async def get(stack: Stack, path: str) -> tuple[int, dict[str, object]]:
    async with stack.http.get(stack.url + path) as response:
        return response.status, json.loads(await response.text())


def explaining(stack: Stack) -> None:
    """The worker says of each open sequence what a scheduler would."""

    async def explain(request_id: str) -> worker_pb2.ExplainReply:
        wanted = [s for s in stack.worker.submits if not request_id or s.request_id == request_id]
        said = {"state": "Waiting", "ahead": 2}
        return worker_pb2.ExplainReply(
            sequences=[
                worker_pb2.SequenceExplanation(
                    request_id=s.request_id, choice=s.choice, text="Waiting: 2 are before it", json=json.dumps(said)
                )
                for s in wanted
            ],
            left_out=1 if not request_id else 0,
        )

    assert stack.worker.host.servicer is not None
    stack.worker.host.servicer._explain = explain


async def test_an_open_request_is_found_by_its_id(stack: Stack) -> None:
    explaining(stack)
    body = {"messages": [{"role": "user", "content": "Hi"}]}
    async with stack.http.post(
        stack.url + "/v1/chat/completions", json=body, headers={"X-Request-Id": "my-request/1"}
    ) as response:
        request_id = response.headers["X-Request-Id"]
    status, reply = await get(stack, f"/debug/requests/{stack.worker.submits[0].request_id}")
    assert status == 200 and request_id == stack.worker.submits[0].request_id
    (one,) = reply["requests"]  # type: ignore[misc]
    assert one == {
        "request_id": request_id,
        "choice": 0,
        "worker": stack.worker.address,
        "text": "Waiting: 2 are before it",
        "state": "Waiting",
        "ahead": 2,
    }
    status, reply = await get(stack, "/debug/requests")
    assert status == 200 and len(reply["requests"]) == 1 and reply["left_out"] == 1  # type: ignore[arg-type]


async def test_an_unknown_request_is_not_found_and_the_reply_says_what_that_may_mean(stack: Stack) -> None:
    explaining(stack)
    status, reply = await get(stack, "/debug/requests/nobody")
    assert status == 404 and "it has ended" in reply["error"]["message"]  # type: ignore[index]


async def test_a_worker_that_does_not_explain_is_named(stack: Stack) -> None:
    status, reply = await get(stack, "/debug/requests")
    assert status == 200 and reply["requests"] == []
    assert "does not explain" in reply["problems"][stack.worker.address]  # type: ignore[index]

    async def failing(_: str) -> worker_pb2.ExplainReply:
        raise Unavailable("the engine is closed")

    assert stack.worker.host.servicer is not None
    stack.worker.host.servicer._explain = failing
    assert "the engine is closed" in (await get(stack, "/debug/requests"))[1]["problems"][stack.worker.address]  # type: ignore[index]
    await stack.worker.stop()
    await until(lambda: not stack.service.pool.usable)
    assert stack.worker.address in (await get(stack, "/debug/requests"))[1]["problems"]  # type: ignore[operator]


async def test_it_can_be_turned_off(start_stack: StartStack) -> None:
    stack = await start_stack(debug_endpoints="off")
    status, reply = await get(stack, "/debug/requests")
    assert status == 404 and "there is nothing at" in reply["error"]["message"]  # type: ignore[index]


@pytest.mark.parametrize(
    ("host", "setting", "served"),
    [
        ("127.0.0.1", "auto", True),
        ("localhost", "auto", True),
        ("::1", "auto", True),
        ("[::1]", "auto", True),
        ("0.0.0.0", "auto", False),
        ("::", "auto", False),
        ("192.168.1.7", "auto", False),
        ("example.org", "auto", False),
        ("0.0.0.0", "on", True),
        ("127.0.0.1", "off", False),
    ],
)
def test_who_is_served(host: str, setting: str, served: bool) -> None:
    assert serves_debug(RouterConfig(host=host, debug_endpoints=setting)) is served  # type: ignore[arg-type]
    assert not is_loopback("")
