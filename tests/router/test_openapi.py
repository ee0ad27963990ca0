"""The served OpenAPI document: what it says, and that nothing made from it gets a 5xx (Schemathesis)."""

from __future__ import annotations

import json
import os
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import schemathesis
from fuzzed import Fuzzed
from hypothesis import HealthCheck, Phase, given, seed, settings
from schemathesis import GenerationMode

from tokenrelay.services.router.openapi import document

CASES = 20_000  # of the long run, all operations together
SHORT = 15  # of each operation
DOCUMENT = json.loads(document())
KNOWN = json.loads(document())  # for cases: they name the model that is served, or few would come further
# Nearly every value of these is refused, or they are refused without another one; then nothing behind them is reached.
LEFT_OUT = {"chat_template", "prompt_logprobs", "logit_bias", "stop", "stream_options", "best_of", "modalities", "echo"}
LEFT_OUT |= {"suffix", "functions", "function_call", "audio", "use_beam_search", "top_logprobs", "tool_choice"}
KNOWN_FIELDS = {
    "model": {"const": "mock"},
    "role": {"const": "user"},
    "prompt": {"type": "string", "minLength": 1},
    "n": {"type": "integer", "minimum": 1, "maximum": 3},
    "max_tokens": {"type": "integer", "minimum": 1},
    "max_completion_tokens": {"type": "integer", "minimum": 1},
    "min_tokens": {"const": 0},
    "min_p": {"type": "number", "minimum": 0.1, "maximum": 1},
    "top_p": {"type": "number", "minimum": 0.1, "maximum": 1},
}
for schema in KNOWN["components"]["schemas"].values():
    properties = schema.get("properties", {})
    for name in properties.keys() & LEFT_OUT:
        del properties[name]
    properties |= {name: KNOWN_FIELDS[name] for name in properties.keys() & KNOWN_FIELDS.keys()}
    if "messages" in properties:
        properties["messages"] |= {"minItems": 1, "maxItems": 3}
KNOWN["components"]["schemas"]["Message"] = {
    "type": "object",
    "properties": {"role": {"const": "user"}, "content": {"type": "string"}, "name": {"type": "string"}},
    "required": ["role", "content"],
}
OPERATIONS = [(method, path) for path, methods in DOCUMENT["paths"].items() for method in methods if path != "/metrics"]


@pytest.fixture(scope="module")
def url(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A router with a mock worker, on a loop in a thread of its own: Schemathesis' calls block."""
    stack = Fuzzed(model_folder, tmp_path_factory.mktemp("openapi"))
    thread = threading.Thread(target=stack.loop.run_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{stack.port}"
    stack.loop.call_soon_threadsafe(stack.loop.stop)
    thread.join()
    stack.close()


def run(url: str, method: str, path: str, examples: int, mode: GenerationMode) -> dict[int, int]:
    """Cases of one operation; how often each status came."""
    operation = schemathesis.openapi.from_dict(KNOWN)[path][method.upper()]
    statuses: dict[int, int] = {}
    with httpx.Client(base_url=url, timeout=30) as client:

        @seed(20261121)
        @settings(
            max_examples=examples,
            deadline=None,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(case=operation.as_strategy(generation_mode=mode))
        def ask(case: Any) -> None:
            asked = case.as_transport_kwargs(base_url=url)
            allowed = {key: asked[key] for key in ("json", "params") if asked.get(key) is not None}
            content = asked.get("data")
            content = content if isinstance(content, bytes | str) else None
            headers = {key: str(value) for key, value in asked["headers"].items()}
            try:
                request = client.build_request(
                    asked["method"], asked["url"], headers=headers, content=content, **allowed
                )
            except (UnicodeEncodeError, ValueError, httpx.InvalidURL):
                return  # nothing that a client could send
            response = client.send(request)
            statuses[response.status_code] = statuses.get(response.status_code, 0) + 1
            assert response.status_code < 500, (response.status_code, response.text, request.content[:2000])

        ask()
    return statuses


async def test_it_is_served_and_names_every_path(url: str) -> None:
    async with httpx.AsyncClient(base_url=url) as client:
        got = (await client.get("/openapi.json")).json()
    assert got == DOCUMENT and got["openapi"].startswith("3.1")
    for path, methods in got["paths"].items():
        for method, operation in methods.items():
            assert {"200", "400", "429", "503"} <= set(operation["responses"]), (method, path)
    chat = got["components"]["schemas"]["ChatRequest"]
    assert chat["required"] == ["messages"] and {"tools", "response_format", "cache_salt"} <= set(chat["properties"])


async def test_hints_are_described_for_every_api() -> None:
    for path in ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"):
        operation = DOCUMENT["paths"][path]["post"]
        headers = {one["name"]: one["schema"] for one in operation["parameters"]}
        assert headers["X-TPS-Floor"] == {"type": "integer", "minimum": 1, "maximum": 1000}
        assert {"X-Priority", "X-Session-Id", "X-Expected-Output-Tokens"} <= set(headers)
        kind = operation["requestBody"]["content"]["application/json"]["schema"]["$ref"].rpartition("/")[2]
        floor = DOCUMENT["components"]["schemas"][kind]["properties"]["tps_floor"]
        assert {"type": "integer", "minimum": 1, "maximum": 1000} in floor["anyOf"]


@pytest.mark.parametrize(("method", "path"), OPERATIONS)
def test_nothing_made_from_it_gets_a_5xx(url: str, method: str, path: str) -> None:
    assert run(url, method, path, SHORT, GenerationMode.POSITIVE)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("method", "path"), [one for one in OPERATIONS if one[0] == "post"])
def test_twenty_thousand_cases(url: str, method: str, path: str) -> None:
    """So many were answered: what no client could send is made up for. `TOKENRELAY_TEST_CASES` sets another number."""
    posts = sum(method == "post" for method, _ in OPERATIONS)
    wanted = int(os.environ.get("TOKENRELAY_TEST_CASES", CASES)) // posts + 1
    statuses: Counter[int] = Counter()
    for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):
        statuses.update(run(url, method, path, wanted // 2 + wanted // 10, mode))
    print(f"{method} {path}: {dict(sorted(statuses.items()))}")
    assert statuses.total() >= wanted, statuses
