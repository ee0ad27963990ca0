"""The request bodies of Anthropic's Messages API (https://docs.anthropic.com/en/api/messages).

Types are strict, `null` means "not given". As Anthropic's own server does, an unknown field of the body is refused
("Extra inputs are not permitted"); with an `anthropic-beta` header it is ignored instead: a beta may have added it.
Fields of blocks that are not declared are ignored. `cache_control` is taken wherever it may stand.
"""

from __future__ import annotations

from typing import Any

import msgspec


class CacheControl(msgspec.Struct, kw_only=True):
    """A hint that the prefix up to here will come again."""

    type: str
    ttl: str | None = None


class _Block(msgspec.Struct, kw_only=True, tag_field="type"):
    cache_control: CacheControl | None = None


class TextBlock(_Block, kw_only=True, tag="text"):
    """Text, anybody's."""

    text: str


class ImageBlock(_Block, kw_only=True, tag="image"):
    """Refused: the models here read text."""


class DocumentBlock(_Block, kw_only=True, tag="document"):
    """A document; plain text is taken."""

    source: dict[str, Any]
    title: str | None = None


class ToolUseBlock(_Block, kw_only=True, tag="tool_use"):
    """A call, by the assistant."""

    id: str
    name: str
    input: dict[str, Any]


class ToolResultBlock(_Block, kw_only=True, tag="tool_result"):
    """What a call gave, by the user."""

    tool_use_id: str
    content: str | list[TextBlock | ImageBlock | DocumentBlock] | None = None
    is_error: bool | None = None


class ThinkingBlock(_Block, kw_only=True, tag="thinking"):
    """What the assistant thought; the template decides what becomes of it."""

    thinking: str
    signature: str | None = None


class RedactedThinkingBlock(_Block, kw_only=True, tag="redacted_thinking"):
    """What only Anthropic can read: dropped."""

    data: str | None = None


Block = TextBlock | ImageBlock | DocumentBlock | ToolUseBlock | ToolResultBlock | ThinkingBlock | RedactedThinkingBlock


class InputMessage(msgspec.Struct, kw_only=True):
    """One message of a conversation."""

    role: str
    content: str | list[Block]


class Tool(msgspec.Struct, kw_only=True):
    """A tool of the client. `type` other than custom: one that Anthropic would run, or defines itself."""

    name: str
    input_schema: dict[str, Any] | None = None
    description: str | None = None
    type: str | None = None
    cache_control: CacheControl | None = None


class ToolChoice(msgspec.Struct, kw_only=True):
    """`tool_choice`."""

    type: str
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class Thinking(msgspec.Struct, kw_only=True):
    """`thinking`."""

    type: str
    budget_tokens: int | None = None


class OutputConfig(msgspec.Struct, kw_only=True):
    """`output_config`."""

    effort: str | None = None
    format: dict[str, Any] | None = None


class Conversation(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """What both endpoints take."""

    model: str
    messages: list[InputMessage]
    system: str | list[TextBlock] | None = None
    tools: list[Tool] | None = None
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    cache_control: CacheControl | None = None
    chat_template_kwargs: dict[str, Any] | None = None  # ours: variables for the template


class MessagesRequest(Conversation, kw_only=True, forbid_unknown_fields=True):
    """POST /v1/messages."""

    max_tokens: int
    stream: bool | None = None
    stop_sequences: list[str] | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    # without effect
    metadata: dict[str, Any] | None = None
    service_tier: str | None = None
    inference_geo: str | None = None
    # refused
    container: Any = None
    mcp_servers: list[Any] | None = None
    # ours, as in chat completions
    seed: int | None = None
    priority: int | None = None
    tps_floor: int | None = None
    expected_output_tokens: int | None = None
    cache_salt: str | None = None


class BetaMessagesRequest(MessagesRequest, kw_only=True, forbid_unknown_fields=False):
    """The same where a beta may have added fields."""


class CountTokensRequest(Conversation, kw_only=True, forbid_unknown_fields=True):
    """POST /v1/messages/count_tokens."""


class BetaCountTokensRequest(CountTokensRequest, kw_only=True, forbid_unknown_fields=False):
    """The same where a beta may have added fields."""
