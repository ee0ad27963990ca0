"""An agent's session of ten turns, each with a tool's round trip, by the official clients and the bundled model."""

from __future__ import annotations

import json
from typing import Any

import anthropic
import pytest
from serving import Server

CALCULATOR = ("calculator", "Evaluate an arithmetic expression.", "expression")
READ_FILE = ("read_file", "Read a text file.", "path")
# The question, what the call must say, what the tool answers; the answer must have it.
TURNS = [
    ("What is 123 * 45?", "123 * 45", "5535"),
    ("Please read notes.txt.", "notes.txt", "The cup is in room 7."),
    ("what is 12 plus 7?", "12 + 7", "19"),
    ("Please read todo.md.", "todo.md", "The team meets on Monday at 3."),
    ("Please compute 99 - 31.", "99 - 31", "68"),
    ("Please read plan.txt.", "plan.txt", "The budget is 350 euros."),
    ("how much is 8 times 9?", "8 * 9", "72"),
    ("Please read server.log.", "server.log", "The server runs on port 8080."),
    ("calculate 640 / 16", "640 / 16", "40"),
    ("Please read report.md.", "report.md", "Version 2 is due on Friday."),
]
RIGHT_MIN = 8  # of ten: what the model was made to get right


def schema(argument: str) -> dict[str, Any]:
    return {"type": "object", "properties": {argument: {"type": "string"}}, "required": [argument]}


class Chat:
    """OpenAI's chat completions."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.dialogue: list[Any] = []
        self.tools = [
            {"type": "function", "function": {"name": name, "description": text, "parameters": schema(argument)}}
            for name, text, argument in (CALCULATOR, READ_FILE)
        ]

    def ask(self, question: str) -> list[tuple[str, str, Any]]:
        """(id, name, arguments) of the calls in the reply."""
        self.dialogue.append({"role": "user", "content": question})
        message = self._say()
        calls = message.tool_calls or []
        return [(call.id, call.function.name, json.loads(call.function.arguments)) for call in calls]

    def answer(self, call_id: str, result: str) -> str:
        """What the model makes of a result."""
        self.dialogue.append({"role": "tool", "tool_call_id": call_id, "content": result})
        return self._say().content or ""

    def _say(self) -> Any:
        message = self.server.chat(*self.dialogue, tools=self.tools).choices[0].message
        self.dialogue.append(message.model_dump(exclude_none=True))
        return message


class Messages:
    """Anthropic's, streamed as Claude Code does."""

    def __init__(self, server: Server) -> None:
        self.client = anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0, timeout=120)
        self.model = server.model
        self.dialogue: list[Any] = []
        self.tools: list[Any] = [
            {"name": name, "description": text, "input_schema": schema(argument)}
            for name, text, argument in (CALCULATOR, READ_FILE)
        ]

    def ask(self, question: str) -> list[tuple[str, str, Any]]:
        self.dialogue.append({"role": "user", "content": question})
        message = self._say()
        return [(block.id, block.name, block.input) for block in message.content if block.type == "tool_use"]

    def answer(self, call_id: str, result: str) -> str:
        block = {"type": "tool_result", "tool_use_id": call_id, "content": result}
        self.dialogue.append({"role": "user", "content": [block]})
        return "".join(block.text for block in self._say().content if block.type == "text")

    def _say(self) -> Any:
        with self.client.messages.stream(
            model=self.model, max_tokens=128, temperature=0, messages=self.dialogue, tools=self.tools
        ) as stream:
            message = stream.get_final_message()
        self.dialogue.append({"role": "assistant", "content": [block.to_dict() for block in message.content]})
        self.cached = message.usage.cache_read_input_tokens
        return message


class Responses:
    """OpenAI's, the conversation kept by the server."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.previous: str | None = None
        self.tools: list[Any] = [
            {"type": "function", "name": name, "description": text, "parameters": schema(argument), "strict": False}
            for name, text, argument in (CALCULATOR, READ_FILE)
        ]

    def ask(self, question: str) -> list[tuple[str, str, Any]]:
        calls = [item for item in self._say(question).output if item.type == "function_call"]
        return [(call.call_id, call.name, json.loads(call.arguments)) for call in calls]

    def answer(self, call_id: str, result: str) -> str:
        return str(self._say([{"type": "function_call_output", "call_id": call_id, "output": result}]).output_text)

    def _say(self, given: Any) -> Any:
        reply = self.server.client.responses.create(
            model=self.server.model,
            input=given,
            previous_response_id=self.previous,
            tools=self.tools,
            temperature=0,
            max_output_tokens=128,
        )
        self.previous = reply.id
        return reply


@pytest.mark.parametrize("api", [Chat, Messages, Responses])
def test_ten_turns(bundled: Server, api: type[Chat | Messages | Responses]) -> None:
    session = api(bundled)
    right = 0
    for question, argument, result in TURNS:
        calls = session.ask(question)
        if len(calls) != 1:
            for call_id, _, _ in calls:
                session.answer(call_id, "no")
            continue
        call_id, _, arguments = calls[0]
        text = session.answer(call_id, result)
        right += list(arguments.values()) == [argument] and result in text
    assert right >= RIGHT_MIN
    if isinstance(session, Messages):
        assert session.cached > 0, "the session's beginning stays in the cache"
