"""Replies as Anthropic's Messages API has them (https://docs.anthropic.com/en/api/messages-streaming).

A stream is `message_start`, then for each block of the content `content_block_start`, `content_block_delta`s and
`content_block_stop`, then `message_delta` with the stop reason and the usage, then `message_stop`.
"""

from __future__ import annotations

import base64
import hashlib
from typing import Any

import msgspec

from tokenrelay.base.errors import TokenRelayError
from tokenrelay.services.router.generation import Choice, Run
from tokenrelay.services.router.messages_errors import error_event
from tokenrelay.services.router.replies import encode
from tokenrelay.services.router.sse import named_event
from tokenrelay.services.router.text import Delta
from tokenrelay.services.router.tools import CallArguments, CallBroken, CallEnd, CallStart, Text


class MessagesShape:
    """/v1/messages. `hints_cache`: the request had a `cache_control`."""

    def __init__(self, run: Run, reply_id: str, *, hints_cache: bool = False) -> None:
        self.run = run
        self._id = reply_id
        self._hints_cache = hints_cache
        self._blocks = _Blocks()

    def chunk(self, choice: Choice) -> bytes:
        """Take the choice's delta as SSE events; empty when there is nothing to say."""
        ended = choice.finish_reason is not None
        if choice.sent_end if ended else not choice.delta.says_something:
            return b""
        delta, choice.delta = choice.delta, Delta()
        events = []
        if not choice.sent:
            message = {**self._message([]), "usage": self._usage(choice, 0), **_NO_STOP}
            events.append(_event("message_start", message=message))
        self._blocks.take(delta, events)
        if ended:
            self._blocks.close(events)
            usage = self._usage(choice, choice.output_tokens)
            events.append(_event("message_delta", delta=self._stop(choice), usage=usage))
            events.append(_event("message_stop"))
        choice.sent, choice.sent_end = True, ended
        return b"".join(events)

    def end(self) -> bytes:
        """`message_stop` has said it."""
        return b""

    def error(self, error: TokenRelayError) -> bytes:
        """The error's event."""
        return error_event(error, self.run.request_id)

    def whole(self) -> dict[str, Any]:
        """The unary reply."""
        choice = self.run.choices[0]
        usage = self._usage(choice, choice.output_tokens)
        return {**self._message(whole_content(choice.delta)), **self._stop(choice), "usage": usage}

    def _message(self, content: list[dict[str, Any]]) -> dict[str, Any]:
        model = self.run.model.names[0]
        return {"id": self._id, "type": "message", "role": "assistant", "model": model, "content": content}

    def _stop(self, choice: Choice) -> dict[str, Any]:
        reason = choice.finish_reason
        if reason == "length":
            wanted = self.run.wanted.tokens_max
            short = wanted is not None and choice.output_tokens < wanted
            return {"stop_reason": "model_context_window_exceeded" if short else "max_tokens", "stop_sequence": None}
        if reason == "tool_calls":
            return {"stop_reason": "tool_use", "stop_sequence": None}
        if isinstance(choice.stop_reason, str):
            return {"stop_reason": "stop_sequence", "stop_sequence": choice.stop_reason}
        return {"stop_reason": "end_turn", "stop_sequence": None}

    def _usage(self, choice: Choice, output_tokens: int) -> dict[str, Any]:
        """`input_tokens` are those that were neither found in the cache nor, as asked for, put there: the last, partial
        block's.
        """
        prompt_tokens = self.run.prompts[0].tokens
        read = choice.cached_tokens
        hello = choice.handle.client.handshake if choice.handle is not None else None
        block_tokens = hello.block_tokens if hello is not None else 0
        created = 0
        if self._hints_cache and block_tokens:
            created = max(0, prompt_tokens - prompt_tokens % block_tokens - read)
        return {
            "input_tokens": prompt_tokens - read - created,
            "cache_creation_input_tokens": created,
            "cache_read_input_tokens": read,
            "output_tokens": output_tokens,
        }


_NO_STOP: dict[str, Any] = {"stop_reason": None, "stop_sequence": None}


def _event(kind: str, **fields: Any) -> bytes:
    return named_event(kind, encode({"type": kind, **fields}))


def _signature(thinking: bytes) -> str:
    """Anthropic's signs what was thought; here it only tells texts apart."""
    return base64.b64encode(thinking).decode()


class _Blocks:
    """The blocks of a streamed reply: which one is open, and what it needs at its end."""

    def __init__(self) -> None:
        self._index = -1
        self._open: str | None = None
        self._thought = hashlib.blake2b(digest_size=32)

    def take(self, delta: Delta, events: list[bytes]) -> None:
        """What a delta adds."""
        if delta.reasoning:
            if self._open != "thinking":
                self._begin({"type": "thinking", "thinking": "", "signature": ""}, events)
            self._thought.update(delta.reasoning.encode("utf-8", "replace"))
            self._delta({"type": "thinking_delta", "thinking": delta.reasoning}, events)
        for event in delta.ordered():
            if isinstance(event, CallStart):
                block = {"type": "tool_use", "id": event.call_id, "name": event.name, "input": {}}
                self._begin(block, events)
            elif isinstance(event, CallArguments):
                self._delta({"type": "input_json_delta", "partial_json": event.text}, events)
            elif isinstance(event, CallEnd):
                self.close(events)
            else:
                if isinstance(event, CallBroken) or self._open != "text":
                    self._begin({"type": "text", "text": ""}, events)
                self._delta({"type": "text_delta", "text": event.text}, events)

    def _begin(self, block: dict[str, Any], events: list[bytes]) -> None:
        self.close(events)
        self._index += 1
        self._open = block["type"]
        events.append(_event("content_block_start", index=self._index, content_block=block))

    def _delta(self, delta: dict[str, Any], events: list[bytes]) -> None:
        events.append(_event("content_block_delta", index=self._index, delta=delta))

    def close(self, events: list[bytes]) -> None:
        """End the open block, if there is one."""
        if self._open == "thinking":
            self._delta({"type": "signature_delta", "signature": _signature(self._thought.digest())}, events)
        if self._open is not None:
            events.append(_event("content_block_stop", index=self._index))
        self._open = None


def whole_content(delta: Delta) -> list[dict[str, Any]]:
    """The blocks of a whole reply. A call that is none is text."""
    blocks: list[dict[str, Any]] = []
    if delta.reasoning:
        digest = hashlib.blake2b(delta.reasoning.encode("utf-8", "replace"), digest_size=32).digest()
        blocks.append({"type": "thinking", "thinking": delta.reasoning, "signature": _signature(digest)})
    texts: list[str] = []
    start: CallStart | None = None
    arguments: list[str] = []
    for event in delta.ordered():
        if isinstance(event, CallStart):
            start, arguments = event, []
        elif isinstance(event, CallArguments):
            arguments.append(event.text)
        elif isinstance(event, Text | CallBroken):
            texts.append(event.text)
        elif start is not None:
            _end_text(texts, blocks)
            whole = msgspec.Raw("".join(arguments).encode())
            blocks.append({"type": "tool_use", "id": start.call_id, "name": start.name, "input": whole})
    _end_text(texts, blocks)
    return blocks


def _end_text(texts: list[str], blocks: list[dict[str, Any]]) -> None:
    text = "".join(texts)
    texts.clear()
    if text:
        blocks.append({"type": "text", "text": text})
