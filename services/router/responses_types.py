"""The request body and the input items of OpenAI's Responses API
(https://platform.openai.com/docs/api-reference/responses).

Types are strict, `null` means "not given", fields that are not declared are ignored, as in chat completions.
"""

from __future__ import annotations

from typing import Any

import msgspec


class Reasoning(msgspec.Struct, kw_only=True):
    """`reasoning`. Of a summary nothing is made: the reasoning itself is in the reply."""

    effort: str | None = None
    summary: str | None = None
    generate_summary: str | None = None


class TextConfig(msgspec.Struct, kw_only=True):
    """`text`."""

    format: dict[str, Any] | None = None
    verbosity: str | None = None


class ResponsesRequest(msgspec.Struct, kw_only=True):
    """POST /v1/responses."""

    input: str | list[dict[str, Any]]
    model: str | None = None
    instructions: str | None = None
    previous_response_id: str | None = None
    store: bool | None = None
    stream: bool | None = None
    max_output_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    reasoning: Reasoning | None = None
    text: TextConfig | None = None
    include: list[str] | None = None
    metadata: dict[str, str] | None = None
    # ours, as in chat completions
    seed: int | None = None
    top_k: int | None = None
    priority: int | None = None
    tps_floor: int | None = None
    expected_output_tokens: int | None = None
    cache_salt: str | None = None
    prompt_cache_key: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    thinking_token_budget: int | None = None
    # refused where they would change the answer
    background: bool | None = None
    conversation: Any = None
    prompt: Any = None
    truncation: str | None = None
    max_tool_calls: int | None = None
    top_logprobs: int | None = None


class MessageItem(msgspec.Struct, kw_only=True):
    """A message, anybody's; `type` may be left out."""

    role: str
    content: str | list[dict[str, Any]]


class CallItem(msgspec.Struct, kw_only=True):
    """`function_call`: what the assistant called."""

    call_id: str
    name: str
    arguments: str


class CallOutputItem(msgspec.Struct, kw_only=True):
    """`function_call_output`: what that gave."""

    call_id: str
    output: str | list[dict[str, Any]]


class ReasoningPart(msgspec.Struct, kw_only=True):
    """A piece of reasoning."""

    text: str


class ReasoningItem(msgspec.Struct, kw_only=True):
    """`reasoning`: what the assistant thought, as a reply had it."""

    summary: list[ReasoningPart] | None = None
    content: list[ReasoningPart] | None = None
    encrypted_content: str | None = None
