"""Replies as OpenAI's API (with vLLM's additions) has them: chunks for streams, objects for unary replies.

A chunk is put together from JSON pieces that were encoded once per choice; per step only what is new is encoded.
"""

from __future__ import annotations

import time
from typing import Any, Protocol

from tokenrelay.base.errors import TokenRelayError
from tokenrelay.proto import worker_pb2
from tokenrelay.services.router.detokenize import Vocabulary
from tokenrelay.services.router.generation import Choice, Run
from tokenrelay.services.router.replies import encode, error_object
from tokenrelay.services.router.sse import DONE, event
from tokenrelay.services.router.text import Delta, whole_calls
from tokenrelay.services.router.tokenize import unpack_ids
from tokenrelay.services.router.tools import CallArguments, CallStart

_LOGPROB_MIN = -9999.0  # JSON has no -inf


class Shape(Protocol):
    """One endpoint's replies."""

    def chunk(self, choice: Choice) -> bytes:
        """Take the choice's delta as one SSE event; empty when there is nothing to say."""

    def end(self) -> bytes:
        """What ends a stream, behind the last chunks."""

    def error(self, error: TokenRelayError) -> bytes:
        """What ends a stream that failed."""

    def whole(self) -> dict[str, Any]:
        """The unary reply."""


class _Logprobs:
    """Log-probabilities of one run in both endpoints' forms."""

    def __init__(self, vocabulary: Vocabulary, top: int, *, as_ids: bool) -> None:
        self._vocabulary = vocabulary
        self._top = top
        self._as_ids = as_ids

    def text(self, token_id: int) -> str:
        return f"token_id:{token_id}" if self._as_ids else self._vocabulary.token_text(token_id)

    def _entry(self, token_id: int, logprob: float) -> dict[str, Any]:
        data = self._vocabulary.token_bytes(token_id)
        return {"token": self.text(token_id), "logprob": _finite(logprob), "bytes": list(data)}

    def _top_of(self, entry: worker_pb2.TokenLogprobs) -> list[tuple[int, float]]:
        return list(zip(entry.top_token_ids, entry.top_logprobs, strict=False))[: self._top]

    def chat(self, delta: Delta) -> dict[str, Any]:
        """`logprobs` of a chat choice."""
        content = []
        for token_id, entry in zip(delta.token_ids, delta.logprobs, strict=False):
            top = [self._entry(*pair) for pair in self._top_of(entry)]
            content.append({**self._entry(token_id, entry.logprob), "top_logprobs": top})
        return {"content": content}

    def completion(self, delta: Delta, offset: int) -> tuple[dict[str, Any], int]:
        """`logprobs` of a completion choice, from this character on; and where the next ones go on."""
        tokens, values, tops, offsets = [], [], [], []
        for token_id, entry in zip(delta.token_ids, delta.logprobs, strict=False):
            text = self.text(token_id)
            top = {self.text(other): _finite(value) for other, value in self._top_of(entry)}
            tokens.append(text)
            values.append(_finite(entry.logprob))
            tops.append({**top, text: _finite(entry.logprob)})
            offsets.append(offset)
            offset += len(text)
        result = {"text_offset": offsets, "token_logprobs": values, "tokens": tokens, "top_logprobs": tops}
        return result, offset


def _finite(value: float) -> float:
    return max(value, _LOGPROB_MIN)


class _Shape:
    """What both endpoints share."""

    kind = ""
    chunk_kind = ""

    def __init__(self, run: Run, reply_id: str) -> None:
        self.run = run
        self.common: dict[str, Any] = {
            "id": reply_id,
            "object": self.kind,
            "created": int(time.time()),
            "model": run.model.names[0],
        }
        head = encode({**self.common, "object": self.chunk_kind})
        self._chunk_head = head[:-1] + b',"choices":[{"index":'
        self._usage_head = head[:-1] + b',"choices":[],"usage":'
        self._chunk_tail = b'}],"usage":null' if run.wanted.include_usage else b"}]"
        wanted = run.wanted
        self._logprobs = (
            _Logprobs(run.model.vocabulary, wanted.logprobs, as_ids=wanted.tokens_as_ids)
            if wanted.logprobs is not None
            else None
        )

    def end(self) -> bytes:
        """The chunk of stream_options.include_usage, and [DONE]."""
        if not self.run.wanted.include_usage:
            return DONE
        return event(self._usage_head + encode(self.run.usage()) + b"}") + DONE

    def error(self, error: TokenRelayError) -> bytes:
        """The error's object as the last event."""
        return event(encode(error_object(error)))

    def _silent(self, choice: Choice) -> bool:
        """Whether the choice has nothing to send. Token ids and log-probabilities wait for text; the end flushes
        them.
        """
        return choice.sent_end if choice.finish_reason is not None else not choice.delta.says_something

    def _mark_sent(self, choice: Choice) -> None:
        choice.sent = True
        choice.sent_end = choice.finish_reason is not None

    def _ending(self, choice: Choice) -> bytes:
        """`,"finish_reason":…` and what goes with it."""
        if choice.finish_reason is None:
            return b',"finish_reason":null'
        return b',"finish_reason":%b,"stop_reason":%b' % (encode(choice.finish_reason), encode(choice.stop_reason))


class ChatShape(_Shape):
    """/v1/chat/completions."""

    kind = "chat.completion"
    chunk_kind = "chat.completion.chunk"

    def chunk(self, choice: Choice) -> bytes:
        """Take the choice's delta as one SSE event; empty when there is nothing to say."""
        if self._silent(choice):
            return b""
        delta, choice.delta = choice.delta, Delta()
        wanted = self.run.wanted
        fields = []
        if not choice.sent:
            fields.append(b'"role":"assistant"')
        if delta.reasoning:
            fields.append(b'"reasoning_content":' + encode(delta.reasoning))
        if delta.content or not (choice.sent or delta.reasoning or delta.events):
            fields.append(b'"content":' + encode(delta.content))
        calls = _call_deltas(delta)
        if calls:
            fields.append(b'"tool_calls":' + encode(calls))
        pieces = [self._chunk_head, b'%d,"delta":{' % choice.index, b",".join(fields), b'},"logprobs":']
        pieces.append(b"null" if self._logprobs is None else encode(self._logprobs.chat(delta)))
        pieces.append(self._ending(choice))
        if wanted.token_ids:
            pieces.append(b',"token_ids":' + encode(delta.token_ids))
        pieces.append(self._chunk_tail)
        if wanted.token_ids and not choice.sent:
            pieces.append(b',"prompt_token_ids":' + encode(unpack_ids(self.run.prompts[0].packed)))
        self._mark_sent(choice)
        return event(b"".join(pieces) + b"}")

    def whole(self) -> dict[str, Any]:
        """The unary reply."""
        wanted = self.run.wanted
        reply = {**self.common, "choices": [self._choice(choice) for choice in self.run.choices]}
        reply["usage"] = self.run.usage()
        if wanted.token_ids:
            reply["prompt_token_ids"] = unpack_ids(self.run.prompts[0].packed)
        return reply

    def _choice(self, choice: Choice) -> dict[str, Any]:
        delta = choice.delta
        calls = whole_calls(delta.events)
        content = delta.content if delta.content or not (calls or delta.reasoning) else None
        message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
        if delta.reasoning:
            message["reasoning_content"] = delta.reasoning
        if calls:
            message["tool_calls"] = [
                {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}
                for call_id, name, arguments in calls
            ]
        result: dict[str, Any] = {
            "index": choice.index,
            "message": message,
            "logprobs": None if self._logprobs is None else self._logprobs.chat(delta),
            "finish_reason": choice.finish_reason,
            "stop_reason": choice.stop_reason,
        }
        if self.run.wanted.token_ids:
            result["token_ids"] = delta.token_ids
        return result


def _call_deltas(delta: Delta) -> list[dict[str, Any]]:
    """Tool call deltas for a chunk: one per call, its pieces of arguments joined."""
    deltas: dict[int, dict[str, Any]] = {}
    for one in delta.events:
        if isinstance(one, CallStart):
            function = {"name": one.name, "arguments": ""}
            deltas[one.index] = {"index": one.index, "id": one.call_id, "type": "function", "function": function}
        elif isinstance(one, CallArguments):
            known = deltas.setdefault(one.index, {"index": one.index, "function": {"arguments": ""}})
            known["function"]["arguments"] += one.text
    return list(deltas.values())


class CompletionShape(_Shape):
    """/v1/completions."""

    kind = "text_completion"
    chunk_kind = "text_completion"

    def __init__(self, run: Run, reply_id: str) -> None:
        super().__init__(run, reply_id)
        self._offsets = dict.fromkeys(range(len(run.choices)), 0)

    def chunk(self, choice: Choice) -> bytes:
        """Take the choice's delta as one SSE event; empty when there is nothing to say."""
        if self._silent(choice):
            return b""
        delta, choice.delta = choice.delta, Delta()
        pieces = [self._chunk_head, b'%d,"text":' % choice.index, encode(delta.content), b',"logprobs":']
        pieces.append(encode(self._choice_logprobs(choice, delta)))
        pieces.append(self._ending(choice))
        if self.run.wanted.token_ids:
            if not choice.sent:
                packed = self.run.prompts[choice.prompt_index].packed
                pieces.append(b',"prompt_token_ids":' + encode(unpack_ids(packed)))
            pieces.append(b',"token_ids":' + encode(delta.token_ids))
        self._mark_sent(choice)
        pieces.append(self._chunk_tail)
        return event(b"".join(pieces) + b"}")

    def _choice_logprobs(self, choice: Choice, delta: Delta) -> dict[str, Any] | None:
        if self._logprobs is None:
            return None
        result, self._offsets[choice.index] = self._logprobs.completion(delta, self._offsets[choice.index])
        return result

    def whole(self) -> dict[str, Any]:
        """The unary reply."""
        choices = [self._choice(choice) for choice in self.run.choices]
        return {**self.common, "choices": choices, "usage": self.run.usage()}

    def _choice(self, choice: Choice) -> dict[str, Any]:
        delta = choice.delta
        result: dict[str, Any] = {
            "index": choice.index,
            "text": delta.content,
            "logprobs": self._choice_logprobs(choice, delta),
            "finish_reason": choice.finish_reason,
            "stop_reason": choice.stop_reason,
        }
        if self.run.wanted.token_ids:
            result["prompt_token_ids"] = unpack_ids(self.run.prompts[choice.prompt_index].packed)
            result["token_ids"] = delta.token_ids
        return result
