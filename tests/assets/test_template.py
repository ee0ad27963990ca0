"""The chat template renders fixed cases exactly, appends only, and refuses what it does not know."""

from __future__ import annotations

import copy
from typing import Any

import jinja2
import pytest

from tokenrelay.assets.training import template, world

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather in a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}},
    },
}
BARE = {"type": "function", "function": {"name": "ping"}}


def call(name: str, arguments: Any) -> dict[str, Any]:
    return {"id": "call_1", "type": "function", "function": {"name": name, "arguments": arguments}}


def test_a_plain_turn() -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    assert template.render(messages, add_generation_prompt=True) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )


def test_no_system_turn_unless_there_is_something_to_say() -> None:
    assert template.render([{"role": "user", "content": "Hi"}]) == "<|im_start|>user\nHi<|im_end|>\n"
    assert template.render([{"role": "user", "content": "Hi"}], [BARE]) == (
        "<|im_start|>system\n# Tools\nping()<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
    )


def test_tools_take_a_line_each() -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    assert template.render(messages, [WEATHER, BARE]).startswith(
        "<|im_start|>system\nBe brief.\n\n# Tools\n"
        "get_weather(city: string, days: integer): The weather in a city.\nping()<|im_end|>\n"
    )


def test_calls_results_and_reasoning() -> None:
    messages = [
        {"role": "user", "content": "Weather?"},
        {
            "role": "assistant",
            "content": None,
            "reasoning_content": "Two calls.",
            "tool_calls": [call("get_weather", {"city": "<Zürich>"}), call("ping", '{"a":  1}')],
        },
        {"role": "tool", "tool_call_id": "call_1", "content": "sunny"},
    ]
    assert template.render(messages) == (
        "<|im_start|>user\nWeather?<|im_end|>\n<|im_start|>assistant\n<think>\nTwo calls.\n</think>\n\n"
        '<tool_call>\n{"name": "get_weather", "arguments": {"city": "<Zürich>"}}\n</tool_call>\n'
        '<tool_call>\n{"name": "ping", "arguments": {"a":  1}}\n</tool_call><|im_end|>\n'
        "<|im_start|>tool\n<tool_response>\nsunny\n</tool_response><|im_end|>\n"
    )


def test_reasoning_of_earlier_turns_is_dropped() -> None:
    messages = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello!", "reasoning_content": "Small talk."},
        {"role": "user", "content": "Bye"},
        {"role": "assistant", "content": "Bye!", "reasoning_content": "The end."},
    ]
    text = template.render(messages)
    assert "Small talk." not in text
    assert "<think>\nThe end.\n</think>\n\nBye!<|im_end|>" in text


def test_thinking_can_be_switched_off() -> None:
    text = template.render([{"role": "user", "content": "Hi"}], add_generation_prompt=True, enable_thinking=False)
    assert text.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")


def test_text_parts_are_joined() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert "user\nab<" in template.render([{"role": "user", "content": parts}])


@pytest.mark.parametrize(
    ("messages", "complaint"),
    [
        ([], "must not be empty"),
        ([{"role": "wizard", "content": "x"}], "unknown role: wizard"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "text only"),
        ([{"role": "user", "content": 7}], "content must be"),
    ],
)
def test_what_it_does_not_know_is_refused(messages: list[dict[str, Any]], complaint: str) -> None:
    with pytest.raises(jinja2.TemplateError, match=complaint):
        template.render(messages)


@pytest.mark.parametrize("index", range(12))
def test_a_turn_begins_with_the_previous_prompt(index: int) -> None:
    """What makes prefix caches hit: within a tool loop, and from one user turn's first prompt to the next's."""
    dialogue = world.write_exam(index)
    tools, prompt, loop = dialogue.tools or None, "", ""
    for place, message in enumerate(dialogue.messages):
        if message["role"] != "assistant":
            continue
        now = template.render(dialogue.messages[:place], tools, add_generation_prompt=True)
        if dialogue.messages[place - 1]["role"] == "user":
            assert now.startswith(prompt)
            prompt = loop = now
        else:
            assert now.startswith(loop)
            loop = now
    assert prompt


def test_arguments_may_be_text_or_an_object() -> None:
    dialogue = next(d for d in map(world.write_exam, range(50)) if any("tool_calls" in m for m in d.messages))
    messages = copy.deepcopy(dialogue.messages)
    for message in messages:
        for each in message.get("tool_calls", []):
            each["function"]["arguments"] = template.tojson(each["function"]["arguments"])
    assert template.render(messages, dialogue.tools) == template.render(dialogue.messages, dialogue.tools)
