"""Replies as OpenAI's Responses API has them (https://platform.openai.com/docs/api-reference/responses-streaming).

A stream is `response.created`, `response.in_progress`; for each item `response.output_item.added`, its parts and
deltas, each closed by a `done`, `response.output_item.done`; then `response.completed`, `response.incomplete` or
`response.failed`.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from typing import Any

from tokenrelay.base.errors import Overloaded, TokenRelayError
from tokenrelay.services.router.generation import Choice, Run
from tokenrelay.services.router.replies import encode
from tokenrelay.services.router.responses_request import ENCRYPTED, sealed
from tokenrelay.services.router.responses_types import ResponsesRequest
from tokenrelay.services.router.sse import named_event
from tokenrelay.services.router.text import Delta
from tokenrelay.services.router.tools import CallArguments, CallBroken, CallEnd, CallStart

Emit = Callable[..., None]  # (type, **fields)
OnWhole = Callable[[dict[str, Any]], None]


class ResponsesShape:
    """/v1/responses. `on_whole` is given each reply that did not fail."""

    def __init__(self, run: Run, reply_id: str, body: ResponsesRequest, on_whole: OnWhole) -> None:
        self.run = run
        self._id = reply_id
        self._body = body
        self._on_whole = on_whole
        self._created = int(time.time())
        self._sequence = 0
        self._events: list[bytes] = []
        self._output = _Output(self._emit, encrypted=ENCRYPTED in (body.include or ()))

    def chunk(self, choice: Choice) -> bytes:
        """Take the choice's delta as SSE events; empty when there is nothing to say."""
        ended = choice.finish_reason is not None
        if choice.sent_end if ended else not choice.delta.says_something:
            return b""
        delta, choice.delta = choice.delta, Delta()
        if not choice.sent:
            self._begin()
        self._output.take(delta)
        if ended:
            reply = self._reply(choice)
            self._emit(f"response.{reply['status']}", response=reply)
        choice.sent, choice.sent_end = True, ended
        return self._taken()

    def _begin(self) -> None:
        begun = self._response("in_progress")
        self._emit("response.created", response=begun)
        self._emit("response.in_progress", response=begun)

    def end(self) -> bytes:
        """`response.completed` has said it."""
        return b""

    def error(self, error: TokenRelayError) -> bytes:
        """`response.failed`."""
        if self._sequence == 0:
            self._begin()
        self._output.close("incomplete")
        code = "rate_limit_exceeded" if isinstance(error, Overloaded) else "server_error"
        failed = self._response("failed", error={"code": code, "message": error.message})
        self._emit("response.failed", response=failed)
        return self._taken()

    def whole(self) -> dict[str, Any]:
        """The unary reply."""
        choice = self.run.choices[0]
        self._output.take(choice.delta)
        reply = self._reply(choice)
        self._events.clear()
        return reply

    def _reply(self, choice: Choice) -> dict[str, Any]:
        cut = choice.finish_reason == "length"
        self._output.close("incomplete" if cut else "completed")
        details = {"incomplete_details": {"reason": "max_output_tokens"}} if cut else {}
        usage = self._usage(choice)
        reply = self._response("incomplete" if cut else "completed", usage=usage, **details)
        self._on_whole(reply)
        return reply

    def _emit(self, kind: str, **fields: Any) -> None:
        data = encode({"type": kind, "sequence_number": self._sequence, **fields})
        self._sequence += 1
        self._events.append(named_event(kind, data))

    def _taken(self) -> bytes:
        events, self._events = self._events, []
        return b"".join(events)

    def _usage(self, choice: Choice) -> dict[str, Any]:
        """`reasoning_tokens` in proportion to the text's length: a tag may be inside a token."""
        prompt_tokens, output_tokens = self.run.prompts[0].tokens, choice.output_tokens
        reasoning, chars = self._output.reasoning_chars, self._output.chars
        return {
            "input_tokens": prompt_tokens,
            "input_tokens_details": {"cached_tokens": choice.cached_tokens, "cache_write_tokens": 0},
            "output_tokens": output_tokens,
            "output_tokens_details": {"reasoning_tokens": output_tokens * reasoning // max(chars, 1)},
            "total_tokens": prompt_tokens + output_tokens,
        }

    def _response(self, status: str, **fields: Any) -> dict[str, Any]:
        body, sampling = self._body, self.run.wanted.sampling
        text = body.text
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._created,
            "status": status,
            "background": False,
            "error": None,
            "incomplete_details": None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "model": self.run.model.names[0],
            "output": list(self._output.items),
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": body.previous_response_id,
            "reasoning": {"effort": body.reasoning.effort if body.reasoning is not None else None, "summary": None},
            "service_tier": "default",
            "store": body.store is not False,
            "temperature": round(sampling.temperature, 6),
            "text": {"format": (text.format if text is not None else None) or {"type": "text"}},
            "tool_choice": body.tool_choice or "auto",
            "tools": body.tools or [],
            "top_p": round(sampling.top_p, 6),
            "truncation": "disabled",
            "usage": None,
            "metadata": body.metadata or {},
            **fields,
        }


class _Output:
    """The items of a reply. The last one may be open: its pieces are gathered until something else begins."""

    def __init__(self, emit: Emit, *, encrypted: bool) -> None:
        self.items: list[dict[str, Any]] = []
        self.chars = 0
        self.reasoning_chars = 0
        self._emit = emit
        self._encrypted = encrypted
        self._open: dict[str, Any] | None = None
        self._pieces: list[str] = []

    def take(self, delta: Delta) -> None:
        """What a delta adds."""
        if delta.reasoning:
            if self._kind != "reasoning":
                self._begin({"id": _id("rs"), "type": "reasoning", "summary": [], "content": []})
                self._part("added", {"type": "reasoning_text", "text": ""})
            self.reasoning_chars += len(delta.reasoning)
            self._delta("response.reasoning_text.delta", delta.reasoning, content_index=0)
        for event in delta.ordered():
            if isinstance(event, CallStart):
                call = {"id": _id("fc"), "type": "function_call", "call_id": event.call_id, "name": event.name}
                self._begin({**call, "arguments": ""})
            elif isinstance(event, CallArguments):
                self._delta("response.function_call_arguments.delta", event.text)
            elif isinstance(event, CallEnd):
                self.close()
            else:
                if isinstance(event, CallBroken):
                    self.close("incomplete")
                if self._kind != "message":
                    self._begin({"id": _id("msg"), "type": "message", "role": "assistant", "content": []})
                    self._part("added", _output_text(""))
                self._delta("response.output_text.delta", event.text, content_index=0, logprobs=[])

    @property
    def _kind(self) -> str | None:
        return self._open["type"] if self._open is not None else None

    @property
    def _place(self) -> dict[str, Any]:
        assert self._open is not None, "an item is open"
        return {"item_id": self._open["id"], "output_index": len(self.items)}

    def _begin(self, item: dict[str, Any]) -> None:
        self.close()
        self._open = item
        self._emit("response.output_item.added", output_index=len(self.items), item={**item, "status": "in_progress"})

    def _part(self, what: str, part: dict[str, Any]) -> None:
        self._emit(f"response.content_part.{what}", **self._place, content_index=0, part=part)

    def _delta(self, kind: str, text: str, **fields: Any) -> None:
        self.chars += len(text)
        self._pieces.append(text)
        self._emit(kind, **self._place, delta=text, **fields)

    def close(self, status: str = "completed") -> None:
        """End the open item, if there is one."""
        item = self._open
        if item is None:
            return
        text = "".join(self._pieces)
        self._pieces.clear()
        item["status"] = status
        if item["type"] == "function_call":
            item["arguments"] = text
            self._emit("response.function_call_arguments.done", **self._place, name=item["name"], arguments=text)
        elif item["type"] == "reasoning":
            self._emit("response.reasoning_text.done", **self._place, content_index=0, text=text)
            part = {"type": "reasoning_text", "text": text}
            self._part("done", part)
            item["content"] = [part]
            item["encrypted_content"] = sealed(text) if self._encrypted else None
        else:
            self._emit("response.output_text.done", **self._place, content_index=0, text=text, logprobs=[])
            self._part("done", _output_text(text))
            item["content"] = [_output_text(text)]
        self._emit("response.output_item.done", output_index=len(self.items), item=item)
        self.items.append(item)
        self._open = None


def _id(prefix: str) -> str:
    return f"{prefix}_{secrets.token_hex(12)}"


def _output_text(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
