"""API keys, limits and tenants: the official clients through the gate, and what one tenant can learn of another."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import anthropic
import openai
import pytest
from mock_worker import Script
from router_stack import Stack, StartStack, until

from tokenrelay.base.errors import ConfigError
from tokenrelay.services.router import gate as gate_module
from tokenrelay.services.router.keys import KeyBook, KeyRecord, new_key, read_keys, write_keys
from tokenrelay.services.router.rates import Bucket

USER = {"role": "user", "content": "Hi"}
CHAT = {"messages": [USER]}


class Keys:
    """A keys file that a test writes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.records: list[KeyRecord] = []
        write_keys(path, [])

    def add(self, name: str, **fields: Any) -> str:
        key, record = new_key(name, **fields)
        self.records.append(record)
        write_keys(self.path, self.records)
        return key

    def drop(self, name: str) -> None:
        self.records = [one for one in self.records if one.name != name]
        write_keys(self.path, self.records)


@pytest.fixture
def keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Keys:
    monkeypatch.setattr(gate_module, "LOOK_S", 0.0)
    return Keys(tmp_path / "keys.json")


@pytest.fixture
async def gated(start_stack: StartStack, keys: Keys) -> AsyncIterator[Stack]:
    yield await start_stack(keys=str(keys.path))


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


async def ask(stack: Stack, path: str, key: str = "", body: Any = CHAT, **headers: str) -> tuple[int, Any, Any]:
    """(status, JSON, headers)"""
    given = {**(bearer(key) if key else {}), **headers}
    async with stack.http.post(stack.url + path, json=body, headers=given) as response:
        return response.status, await response.json(), response.headers


# -- official clients ------------------------------------------------------------------------------------------------
async def test_the_openai_client_with_and_without_a_key(gated: Stack, keys: Keys) -> None:
    key = keys.add("one")
    async with openai.AsyncOpenAI(base_url=gated.url + "/v1", api_key=key, max_retries=0) as client:
        reply = await client.chat.completions.create(model="mock", messages=[USER])
        assert reply.choices[0].message.content == "Hello world!"
        assert (await client.responses.create(model="mock", input="Hi")).output_text == "Hello world!"
    async with openai.AsyncOpenAI(base_url=gated.url + "/v1", api_key=key[:-1] + "~", max_retries=0) as client:
        with pytest.raises(openai.AuthenticationError) as wrong:
            await client.chat.completions.create(model="mock", messages=[USER])
        assert wrong.value.code == "invalid_api_key"
        with pytest.raises(openai.AuthenticationError):
            await client.responses.create(model="mock", input="Hi")
        with pytest.raises(openai.AuthenticationError):
            await client.models.list()
    assert len(gated.worker.submits) == 2


async def test_the_anthropic_client_with_and_without_a_key(gated: Stack, keys: Keys) -> None:
    key = keys.add("one", requests_per_minute=1)
    async with anthropic.AsyncAnthropic(base_url=gated.url, api_key=key, max_retries=0) as client:
        ask_it = lambda: client.messages.create(model="mock", max_tokens=99, messages=[USER])
        assert (await ask_it()).content[0].text == "Hello world!"
        with pytest.raises(anthropic.RateLimitError) as limited:
            await ask_it()
        assert limited.value.body["error"]["type"] == "rate_limit_error"
        assert int(limited.value.response.headers["retry-after"]) in range(55, 61)
    async with anthropic.AsyncAnthropic(base_url=gated.url, api_key="sk-nobody", max_retries=0) as client:
        with pytest.raises(anthropic.AuthenticationError) as wrong:
            await client.messages.create(model="mock", max_tokens=99, messages=[USER])
        assert wrong.value.body["error"]["type"] == "authentication_error"
        assert wrong.value.body["request_id"] == wrong.value.response.headers["request-id"]


async def test_the_openai_client_comes_again_after_its_limit(gated: Stack, keys: Keys) -> None:
    """Its own retry follows Retry-After."""
    key = keys.add("one", requests_per_minute=60)
    caller = gated.service.state.gate.authenticate(bearer(key), 10**9)
    async with openai.AsyncOpenAI(base_url=gated.url + "/v1", api_key=key, max_retries=1) as client:
        await client.chat.completions.create(model="mock", messages=[USER])
        caller.requests.take(caller.requests.left(asyncio.get_running_loop().time()), asyncio.get_running_loop().time())
        await client.chat.completions.create(model="mock", messages=[USER])
    assert caller.refused["requests"] == 1
    assert caller.counts["requests"] == 2


# -- keys ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": "Bearer "},
        {"Authorization": "Basic eDp5"},
        {"Authorization": "Bearer tr-aaaaaaaa-x"},
        {"Authorization": "Bearer " + "x" * 4000},
        {"X-Api-Key": "tr--"},
        {"X-Api-Key": ""},
    ],
)
async def test_what_is_no_key(gated: Stack, keys: Keys, headers: dict[str, str]) -> None:
    keys.add("one")
    for path in ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/tokenize", "/v1/nothing"):
        status, reply, got = await ask(gated, path, **headers)
        assert (status, reply["error"]["code"]) == (401, "invalid_api_key")
        assert got["WWW-Authenticate"] == "Bearer"
    assert gated.worker.submits == []


async def test_a_key_that_is_made_or_revoked_counts_at_once(gated: Stack, keys: Keys) -> None:
    one = keys.add("one")
    assert (await ask(gated, "/v1/chat/completions", one))[0] == 200
    two = keys.add("two")
    keys.drop("one")
    assert (await ask(gated, "/v1/chat/completions", one))[0] == 401
    assert (await ask(gated, "/v1/chat/completions", two))[0] == 200
    keys.path.write_text("{")  # a person was editing: nothing changes
    assert (await ask(gated, "/v1/chat/completions", two))[0] == 200
    keys.path.unlink()
    assert (await ask(gated, "/v1/chat/completions", two))[0] == 200


async def test_a_changed_limit_keeps_what_was_used(gated: Stack, keys: Keys) -> None:
    key = keys.add("one", requests_per_minute=2)
    for expected in (200, 200, 429):
        assert (await ask(gated, "/v1/chat/completions", key))[0] == expected
    import msgspec

    keys.records = [msgspec.structs.replace(keys.records[0], requests_per_minute=3)]
    write_keys(keys.path, keys.records)
    for expected in (200, 429):
        assert (await ask(gated, "/v1/chat/completions", key))[0] == expected


async def test_paths_without_a_key_and_paths_for_admins(gated: Stack, keys: Keys) -> None:
    plain, admin = keys.add("plain"), keys.add("boss", admin=True)
    for path in ("/health", "/ready", "/metrics", "/version", "/", "/page/app.js"):
        async with gated.http.get(gated.url + path) as response:
            assert response.status == 200, path
    for path in ("/debug/requests", "/mesh"):
        for key, expected in (("", 401), (plain, 403), (admin, 200)):
            async with gated.http.get(gated.url + path, headers=bearer(key) if key else {}) as response:
                assert response.status == expected, (path, key)
                if expected == 403:
                    assert (await response.json())["error"]["code"] == "insufficient_permissions"


async def test_keyless_is_the_operators(start_stack: StartStack, keys: Keys) -> None:
    stack = await start_stack(keys=str(keys.path), keyless=("/health",))
    admin = keys.add("boss", admin=True)
    for path, key, expected in (("/health", "", 200), ("/metrics", "", 401), ("/metrics", admin, 200)):
        async with stack.http.get(stack.url + path, headers=bearer(key) if key else {}) as response:
            assert response.status == expected


async def test_metrics_and_log_name_keys_and_never_show_them(
    gated: Stack, keys: Keys, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG")
    key = keys.add("one", requests_per_minute=1)
    await ask(gated, "/v1/chat/completions", key)
    await ask(gated, "/v1/chat/completions", key)
    await ask(gated, "/v1/chat/completions", key + "x")
    async with gated.http.get(gated.url + "/metrics") as response:
        page = await response.text()
    for line in (
        'tokenrelay_key_requests_total{key="one"} 1',
        'tokenrelay_key_limited_total{key="one",limit="requests"} 1',
        'tokenrelay_gate_refused_total{reason="wrong"} 1',
        'tokenrelay_key_requests_open{key="one"} 0',
    ):
        assert line in page, line
    assert 'tokenrelay_key_tokens_total{key="one",kind="output"}' in page
    secret = key.split("-", 2)[2]
    assert secret not in page and secret not in caplog.text and secret not in keys.path.read_text()


# -- limits ----------------------------------------------------------------------------------------------------------
async def test_concurrency(gated: Stack, keys: Keys) -> None:
    key = keys.add("one", concurrency=2)
    gated.worker.host.answer = lambda submit: Script(gated.worker.ids("Hello"), finish=0)
    waiting = [asyncio.create_task(ask(gated, "/v1/chat/completions", key)) for _ in range(2)]
    await until(lambda: gated.worker.running == 2)
    async with asyncio.timeout(5):
        status, reply, headers = await ask(gated, "/v1/chat/completions", key)
    assert (status, reply["error"]["code"], headers["Retry-After"]) == (429, "rate_limit_exceeded", "1")
    for task in waiting:
        task.cancel()  # who leaves makes room
    await asyncio.gather(*waiting, return_exceptions=True)
    await gated.idle()
    gated.worker.say("Hello")
    assert (await ask(gated, "/v1/chat/completions", key))[0] == 200


async def test_tokens_count_what_no_cache_had(gated: Stack, keys: Keys) -> None:
    key = keys.add("one", tokens_per_minute=1000)
    caller = gated.service.state.gate.authenticate(bearer(key), 10**9)
    gated.worker.host.answer = lambda submit: Script(gated.worker.ids("Hello world!"), cached_tokens=64)
    body = {"messages": [{"role": "user", "content": "a b c d " * 60}], "stream": True}
    async with gated.http.post(gated.url + "/v1/chat/completions", json=body, headers=bearer(key)) as response:
        await response.read()
    counts = caller.counts
    assert counts["prompt"] > 100 and counts["cached"] == 64 and counts["output"] > 2
    now_s = asyncio.get_running_loop().time()
    used = counts["prompt"] - counts["cached"] + counts["output"]
    assert 0 <= caller.tokens.left(now_s) - (1000 - used) < 60
    caller.tokens.take(1000, now_s)  # in debt: what runs goes on, the next one waits until it is paid
    status, reply, headers = await ask(gated, "/v1/chat/completions", key)
    assert status == 429 and "tokens a minute" in reply["error"]["message"]
    assert int(headers["Retry-After"]) > 1


async def test_what_workers_refuse_costs_no_tokens(gated: Stack, keys: Keys) -> None:
    key = keys.add("one", tokens_per_minute=1000)
    caller = gated.service.state.gate.authenticate(bearer(key), 10**9)
    gated.worker.host.answer = lambda submit: Script((), refuse=1, error="full")
    assert (await ask(gated, "/v1/chat/completions", key))[0] == 429
    assert caller.tokens.left(asyncio.get_running_loop().time()) == 1000


def test_a_bucket_over_time() -> None:
    bucket = Bucket(60, 0.0)
    for _ in range(60):
        assert bucket.wait_s(0.0) == 0.0
        bucket.take(1, 0.0)
    assert bucket.wait_s(0.0) == 1.0
    assert bucket.wait_s(0.75) == 0.25
    assert bucket.wait_s(1.0) == 0.0
    bucket.take(31, 1.0)  # a debt of 30
    assert bucket.wait_s(1.0) == 31.0
    assert bucket.left(1e6) == 60  # never more than a minute's worth
    bucket.take(-100, 1e6)
    assert bucket.left(1e6) == 60
    assert bucket.wait_s(1e6, need=1e9) == 0.0  # what is larger than the bucket needs a full one, and no more
    assert Bucket(0, 0.0).wait_s(0.0) == 0.0


# -- tenants ---------------------------------------------------------------------------------------------------------
async def test_tenants_have_salts_of_their_own_whatever_they_ask(gated: Stack, keys: Keys) -> None:
    a1, a2 = keys.add("a1", tenant="a"), keys.add("a2", tenant="a")
    b, lone, odd = keys.add("b1", tenant="b"), keys.add("lone"), keys.add("a")
    for key in (a1, a2, b, lone, odd):
        for salt in ("", "s"):
            assert (await ask(gated, "/v1/chat/completions", key, {**CHAT, "cache_salt": salt}))[0] == 200
    plain, salted = gated.worker.submits[::2], gated.worker.submits[1::2]
    assert all(len(one.salt) == 32 and len(one.tenant) == 16 for one in (*plain, *salted))
    salts = [one.salt for one in (*plain, *salted)]
    assert salts[0] == salts[1] and salts[5] == salts[6], "keys of a tenant share its cache"
    assert len(set(salts)) == 8
    tenants = [one.tenant for one in plain]
    assert tenants[0] == tenants[1] and len(set(tenants)) == 4
    assert tenants == [one.tenant for one in salted], "a salt makes nobody another tenant: shares stay fair"
    forged = {**CHAT, "cache_salt": salts[0].hex()}
    await ask(gated, "/v1/chat/completions", b, forged)
    assert gated.worker.submits[-1].salt not in salts


async def test_the_tokenizer_tells_no_tenant_what_another_asked(gated: Stack, keys: Keys) -> None:
    """What is in its cache takes less time: each tenant finds there what is its own only."""
    a, b = keys.add("a1", tenant="a"), keys.add("b1", tenant="b")
    cache = gated.service.pool.require_model().tokenizer.cache
    body = {"messages": [{"role": "user", "content": "the secret plan"}]}
    hits: dict[str, int] = {}
    for name, key, path in (
        ("first", a, "/v1/chat/completions"),
        ("other", b, "/v1/chat/completions"),
        ("count", keys.add("c1"), "/tokenize"),
        ("again", a, "/v1/chat/completions"),
    ):
        before = cache.hit_chars
        assert (await ask(gated, path, key, body))[0] == 200
        hits[name] = cache.hit_chars - before
    assert hits["other"] == hits["count"] == hits["first"]
    assert hits["again"] >= hits["first"] + len("the secret plan")


async def test_a_response_is_its_tenants(gated: Stack, keys: Keys) -> None:
    a1, a2, b = keys.add("a1", tenant="a"), keys.add("a2", tenant="a"), keys.add("b1", tenant="b")
    _, reply, _ = await ask(gated, "/v1/responses", a1, {"input": "Hi"})
    for key, expected in ((a2, 200), (b, 404), (a1, 200)):
        async with gated.http.get(f"{gated.url}/v1/responses/{reply['id']}", headers=bearer(key)) as response:
            assert response.status == expected
    status, _, _ = await ask(gated, "/v1/responses", b, {"input": "Hi", "previous_response_id": reply["id"]})
    assert status == 400


async def test_a_key_bounds_the_priority(gated: Stack, keys: Keys) -> None:
    plain, urgent = keys.add("plain"), keys.add("urgent", priority=-5)
    for key in (plain, urgent):
        for asked in (-9, 3):
            await ask(gated, "/v1/chat/completions", key, {**CHAT, "priority": asked})
    assert [one.priority for one in gated.worker.submits] == [0, 3, -5, 3]


async def test_a_key_bounds_the_floor(gated: Stack, keys: Keys) -> None:
    plain, slow = keys.add("plain"), keys.add("slow", tps_floor=50)
    for key in (plain, slow):
        for asked in (40, 150, 500):
            await ask(gated, "/v1/chat/completions", key, {**CHAT, "tps_floor": asked})
    assert [one.tps_floor for one in gated.worker.submits] == [40, 150, 200, 40, 50, 50]


# -- the file --------------------------------------------------------------------------------------------------------
def test_records_are_found_by_the_whole_key(tmp_path: Path) -> None:
    made = [new_key(f"k{number}") for number in range(20)]
    book = KeyBook(record for _, record in made)
    for key, record in made:
        assert book.find(key) == record
        for wrong in (key[:-1], key + "x", key.replace("tr-", "tr_"), record.sha256, record.id, f"tr-{record.id}-", ""):
            assert book.find(wrong) is None
    swapped = made[0][0].rsplit("-", 1)[0] + "-" + made[1][0].split("-", 2)[2]
    assert book.find(swapped) is None
    path = tmp_path / "keys.json"
    write_keys(path, [record for _, record in made])
    assert read_keys(path) == [record for _, record in made]
    assert path.stat().st_mode & 0o777 == 0o600


BAD: list[tuple[Callable[[dict[str, Any]], Any], str]] = [
    (lambda key: "[]", "Expected `object`"),
    (lambda key: {"version": 2, "keys": []}, "version is 2"),
    (lambda key: {"keys": [{**key, "name": "a b"}]}, "name is 'a b'"),
    (lambda key: {"keys": [{**key, "tenant": "é"}]}, "tenant is"),
    (lambda key: {"keys": [{**key, "sha256": "00"}]}, "sha256"),
    (lambda key: {"keys": [{**key, "id": "../../xx"}]}, "id is"),
    (lambda key: {"keys": [{**key, "concurrency": -1}]}, "concurrency is -1"),
    (lambda key: {"keys": [{**key, "tokens_per_minute": "many"}]}, "tokens_per_minute"),
    (lambda key: {"keys": [{**key, "requests": 3}]}, "requests"),
    (lambda key: {"keys": [key, key]}, "another key"),
]


@pytest.mark.parametrize(("spoil", "said"), BAD)
def test_a_bad_file_is_refused_by_name(tmp_path: Path, spoil: Callable[[dict[str, Any]], Any], said: str) -> None:
    import msgspec

    path = tmp_path / "keys.json"
    path.write_bytes(msgspec.json.encode(spoil(msgspec.to_builtins(new_key("one")[1]))))
    with pytest.raises(ConfigError) as error:
        read_keys(path)
    assert said in error.value.message and str(path) in error.value.message
