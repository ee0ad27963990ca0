"""Tool sessions and structured output where a prompt is computed by one worker and decoded by another."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import httpx
import jsonschema
import pytest
from serving import Server

SCHEMA = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 8},
        "people": {"type": "integer", "minimum": 0, "maximum": 999},
    },
    "required": ["city", "people"],
    "additionalProperties": False,
}
FORM = {"type": "json_schema", "json_schema": {"name": "city", "schema": SCHEMA, "strict": True}}


@pytest.fixture(scope="module")
def two_legs(start: Callable[..., Server], tmp_path_factory: pytest.TempPathFactory) -> Server:
    config = tmp_path_factory.mktemp("config") / "relay.toml"
    config.write_text('[router]\nremote_prefill = "always"\n')
    return start("--prefill", 1, "--decode", 1, "--dtype", "float32", "--config", config, command="up")


def complete(server: Server, prompt: str, **parameters: Any) -> Any:
    """A text completion, which does not reason, as random as can be."""
    asked = {"model": server.model, "prompt": prompt, "temperature": 2.0, "max_tokens": 300, **parameters}
    return server.client.completions.create(**asked).choices[0]


def test_the_second_worker_goes_on_within_the_grammar(two_legs: Server) -> None:
    for seed in range(4):
        question = f"Tell me of city number {seed}, and of the people there."
        reply = complete(two_legs, question, seed=seed, extra_body={"response_format": FORM})
        assert reply.finish_reason == "stop", reply.text
        jsonschema.validate(json.loads(reply.text), SCHEMA)
        choice = complete(two_legs, question, seed=seed, extra_body={"guided_choice": ["left side", "right side"]})
        assert (choice.text in ("left side", "right side"), choice.finish_reason) == (True, "stop")
    ends = [line for line in httpx.get(f"{two_legs.url}/metrics").text.splitlines() if "handovers_total{" in line]
    assert sum(float(line.split()[-1]) for line in ends) >= 8, ends
