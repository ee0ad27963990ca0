"""Both vendors' clients for Python hold the conversations of tests/node/suite.mjs, colocated and with two workers."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from typing import Any

import anthropic
import httpx
import openai
import pytest
from serving import Server

QUESTION = "What is 17 * 23?"
BOTH = "How is the weather in Paris and Berlin?"
STORY = {"role": "user", "content": "Tell me a story."}
WHO = {"role": "user", "content": "Who are you?"}
POINT: dict[str, Any] = {
    "type": "object",
    "properties": {axis: {"type": "integer", "minimum": 0, "maximum": 99} for axis in ("x", "y")},
    "required": ["x", "y"],
    "additionalProperties": False,
}


def takes(name: str) -> dict[str, Any]:
    return {"type": "object", "properties": {name: {"type": "string"}}, "required": [name]}


CALCULATOR = ("calculator", "Evaluate an arithmetic expression.", takes("expression"))
WEATHER = ("get_weather", "Get the current weather for a city.", takes("city"))


@pytest.fixture(scope="module", params=["colocated", "two legs"])
def server(
    request: pytest.FixtureRequest, start: Callable[..., Server], tmp_path_factory: pytest.TempPathFactory
) -> Server:
    if request.param == "colocated":
        return start("--dtype", "float32")
    config = tmp_path_factory.mktemp("config") / "relay.toml"
    config.write_text('[router]\nremote_prefill = "always"\n')
    return start("--prefill", 1, "--decode", 1, "--dtype", "float32", "--config", config, command="up")


def metric(server: Server, name: str) -> float:
    lines = httpx.get(f"{server.url}/metrics").text.splitlines()
    return sum(float(line.split()[-1]) for line in lines if re.match(rf"tokenrelay_{name}\b", line))


def settled(server: Server) -> None:
    """Nothing is open once a client has left."""
    deadline_s = time.monotonic() + 20
    while metric(server, "requests_open"):
        assert time.monotonic() < deadline_s, "a request that was aborted is still open"
        time.sleep(0.05)


def whole(ask: Callable[[], tuple[str, bool]]) -> Any:
    """The JSON of the first answer that was not cut short: a small model may fill its tokens with white space."""
    for _ in range(10):
        text, cut = ask()
        if not cut:
            return json.loads(text)
    raise AssertionError("no answer came to its end")


class Chat:
    """OpenAI's chat completions."""

    def __init__(self, server: Server) -> None:
        self.client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=120)
        self.model = server.model

    def say(self, messages: list[Any], tools: tuple[Any, ...] = (), **asked: Any) -> Any:
        functions = [{"name": name, "description": said, "parameters": schema} for name, said, schema in tools]
        if functions:
            asked["tools"] = [{"type": "function", "function": one} for one in functions]
        asked = {"temperature": 0, "max_tokens": 128, **asked}
        return self.client.chat.completions.create(model=self.model, messages=messages, **asked)

    def text(self, message: Any) -> str:
        return str(self.say([message]).choices[0].message.content)

    def streamed(self, message: Any) -> str:
        chunks = self.say([message], stream=True)
        return "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)

    def calls(self, question: str, *tools: Any) -> tuple[list[Any], Callable[[str], str]]:
        """The arguments of each call, and what the model makes of one's result."""
        messages: list[Any] = [{"role": "user", "content": question}]
        message = self.say(messages, tools).choices[0].message
        made = message.tool_calls or []
        messages.append(message.model_dump(exclude_none=True))

        def answered(result: str) -> str:
            messages.append({"role": "tool", "tool_call_id": made[0].id, "content": result})
            return str(self.say(messages, tools).choices[0].message.content)

        return [json.loads(call.function.arguments) for call in made], answered

    def point(self) -> Any:
        form = {"type": "json_schema", "json_schema": {"name": "point", "strict": True, "schema": POINT}}

        def ask() -> tuple[str, bool]:
            asked = self.say([{"role": "user", "content": "A point."}], response_format=form, temperature=1).choices[0]
            return asked.message.content, asked.finish_reason == "length"

        return whole(ask)

    def leave(self) -> None:
        with self.say([STORY], stream=True, max_tokens=4000, temperature=1, extra_body={"ignore_eos": True}) as stream:
            next(chunk for chunk in stream if chunk.choices and chunk.choices[0].delta.content)

    def refused(self) -> None:
        with pytest.raises(openai.BadRequestError) as caught:
            self.say([WHO], temperature=9)
        assert caught.value.param == "temperature"
        with pytest.raises(openai.NotFoundError):
            self.client.chat.completions.create(model="nobody", messages=[WHO])


class Responses(Chat):
    """OpenAI's Responses."""

    def respond(self, given: Any, tools: tuple[Any, ...] = (), **asked: Any) -> Any:
        if tools:
            functions = [{"name": name, "description": said, "parameters": schema} for name, said, schema in tools]
            asked["tools"] = [{"type": "function", "strict": False, **one} for one in functions]
        asked = {"temperature": 0, "max_output_tokens": 128, **asked}
        return self.client.responses.create(model=self.model, input=given, **asked)

    def text(self, message: Any) -> str:
        return str(self.respond(message["content"]).output_text)

    def streamed(self, message: Any) -> str:
        events = list(self.respond(message["content"], stream=True))
        assert [event.sequence_number for event in events] == list(range(len(events)))
        assert events[-1].type == "response.completed"
        return "".join(event.delta for event in events if event.type == "response.output_text.delta")

    def calls(self, question: str, *tools: Any) -> tuple[list[Any], Callable[[str], str]]:
        first = self.respond(question, tools)
        made = [item for item in first.output if item.type == "function_call"]

        def answered(result: str) -> str:
            output = [{"type": "function_call_output", "call_id": made[0].call_id, "output": result}]
            return str(self.respond(output, tools, previous_response_id=first.id).output_text)

        return [json.loads(call.arguments) for call in made], answered

    def point(self) -> Any:
        form = {"format": {"type": "json_schema", "name": "point", "strict": True, "schema": POINT}}

        def ask() -> tuple[str, bool]:
            reply = self.respond("A point.", text=form, temperature=1)
            return reply.output_text, reply.status == "incomplete"

        return whole(ask)

    def leave(self) -> None:
        with self.respond(STORY["content"], stream=True, max_output_tokens=4000, temperature=2) as stream:
            next(iter(stream))

    def refused(self) -> None:
        with pytest.raises(openai.BadRequestError):
            self.respond("Hi", temperature=9)
        with pytest.raises(openai.BadRequestError) as caught:
            self.respond("Hi", previous_response_id="resp_none")
        assert caught.value.code == "previous_response_not_found"


class Messages:
    """Anthropic's Messages."""

    def __init__(self, server: Server) -> None:
        self.client = anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0, timeout=120)
        self.model = server.model

    def _asked(self, messages: list[Any], tools: tuple[Any, ...], asked: dict[str, Any]) -> dict[str, Any]:
        if tools:
            asked["tools"] = [{"name": name, "description": said, "input_schema": one} for name, said, one in tools]
        return {"model": self.model, "messages": messages, "max_tokens": 128, "temperature": 0, **asked}

    def say(self, messages: list[Any], tools: tuple[Any, ...] = (), **asked: Any) -> Any:
        return self.client.messages.create(**self._asked(messages, tools, asked))

    def text(self, message: Any) -> str:
        return "".join(block.text for block in self.say([message]).content if block.type == "text")

    def streamed(self, message: Any) -> str:
        with self.client.messages.stream(**self._asked([message], (), {})) as stream:
            return stream.get_final_text()

    def calls(self, question: str, *tools: Any) -> tuple[list[Any], Callable[[str], str]]:
        messages: list[Any] = [{"role": "user", "content": question}]
        first = self.say(messages, tools)
        made = [block for block in first.content if block.type == "tool_use"]
        messages.append({"role": "assistant", "content": [block.to_dict() for block in first.content]})

        def answered(result: str) -> str:
            block = {"type": "tool_result", "tool_use_id": made[0].id, "content": result}
            messages.append({"role": "user", "content": [block]})
            return "".join(block.text for block in self.say(messages, tools).content if block.type == "text")

        return [call.input for call in made], answered

    def point(self) -> Any:
        form = {"format": {"type": "json_schema", "schema": POINT}}

        def ask() -> tuple[str, bool]:
            dialogue = [{"role": "user", "content": "A point."}]
            reply = self.say(dialogue, extra_body={"output_config": form}, temperature=1)
            return "".join(b.text for b in reply.content if b.type == "text"), reply.stop_reason == "max_tokens"

        return whole(ask)

    def leave(self) -> None:
        with self.client.messages.stream(**self._asked([STORY], (), {"max_tokens": 4000, "temperature": 1})) as stream:
            next(iter(stream))

    def refused(self) -> None:
        with pytest.raises(anthropic.BadRequestError):
            self.say([WHO], temperature=9)
        with pytest.raises(anthropic.BadRequestError):
            self.say([{"role": "assistant", "content": "Hi"}])


@pytest.mark.parametrize("api", [Chat, Responses, Messages])
def test_the_conversations(server: Server, api: type[Chat | Responses | Messages]) -> None:
    client = api(server)
    whole = client.text(WHO)
    assert len(whole) > 5 and client.streamed(WHO) == whole
    arguments, answered = client.calls(QUESTION, CALCULATOR)
    assert arguments == [{"expression": "17 * 23"}] and "391" in answered("391")
    assert sorted(one["city"] for one in client.calls(BOTH, WEATHER)[0]) == ["Berlin", "Paris"]
    point = client.point()
    assert set(point) == {"x", "y"} and all(0 <= value <= 99 for value in point.values())
    client.leave()
    settled(server)
    client.refused()
    assert (metric(server, "handovers_total") >= 4) == ("prefill-1_pid" in server.facts)
