"""From Anthropic's Messages to the one request that this router serves (`openai_types.ChatRequest`).

    body = decode(raw, MessagesRequest)
    chat = chat_request(body)

Everything wrong is an InvalidRequest that names the field as Anthropic's API does: `messages.0.content.1.text`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tokenrelay.base.errors import InvalidRequest
from tokenrelay.services.router import limits
from tokenrelay.services.router.messages_types import (
    Block,
    Conversation,
    DocumentBlock,
    ImageBlock,
    InputMessage,
    MessagesRequest,
    RedactedThinkingBlock,
    TextBlock,
    ThinkingBlock,
    Tool,
    ToolResultBlock,
    ToolUseBlock,
)
from tokenrelay.services.router.openai_types import ChatRequest, FunctionCall, Message, ToolCall
from tokenrelay.services.router.validate import check_free_form, check_range

THINKING_BUDGET_MIN = 1024  # Anthropic's
TEMPERATURE = (0.0, 1.0)
# Claude Code puts a line into its system prompt that differs in each request, so that no cached prefix would ever be
# found behind it. Anthropic's server takes it out; so does this one.
VOLATILE_SYSTEM_PREFIX = "x-anthropic-billing-header:"


def refuse(name: str, reason: str, code: str | None = None) -> InvalidRequest:
    """An error that names a field."""
    return InvalidRequest(f"{name}: {reason}", param=name, code=code)


def chat_request(body: Conversation) -> ChatRequest:
    """The same request in the router's own form. Raises InvalidRequest."""
    result = ChatRequest(
        model=body.model,
        messages=_messages(body),
        tools=_tools(body.tools),
        chat_template_kwargs=_template_kwargs(body),
    )
    if body.tool_choice is not None:
        result.tool_choice = _tool_choice(body)
        result.parallel_tool_calls = not body.tool_choice.disable_parallel_tool_use
    if body.output_config is not None:
        result.reasoning_effort = body.output_config.effort
        if body.output_config.format is not None:
            result.response_format = _response_format(body.output_config.format)
    if isinstance(body, MessagesRequest):
        _sampling(body, result)
    return result


def hints_cache(body: Conversation) -> bool:
    """Whether the client asked, by a `cache_control` anywhere, that the prefix be kept."""
    if body.cache_control is not None or any(tool.cache_control is not None for tool in body.tools or ()):
        return True
    groups = [body.system, *(message.content for message in body.messages)]
    return any(not isinstance(group, str) and any(block.cache_control for block in group) for group in groups if group)


def _sampling(body: MessagesRequest, result: ChatRequest) -> None:
    if body.temperature is not None:
        check_range("temperature", body.temperature, TEMPERATURE)
    if body.top_k is not None:
        check_range("top_k", body.top_k, (0, limits.TOP_K_MAX))
    for name in ("container", "mcp_servers"):
        if getattr(body, name):
            raise refuse(name, "nothing is run on this server", "unsupported_parameter")
    result.max_tokens = body.max_tokens
    result.stop = body.stop_sequences
    result.temperature, result.top_p, result.top_k = body.temperature, body.top_p, body.top_k
    result.stream = body.stream
    result.seed, result.priority, result.cache_salt = body.seed, body.priority, body.cache_salt
    result.tps_floor, result.expected_output_tokens = body.tps_floor, body.expected_output_tokens
    if body.thinking is not None and body.thinking.type == "enabled":
        result.thinking_token_budget = body.thinking.budget_tokens


# -- messages ---------------------------------------------------------------------------------------------------------
def _messages(body: Conversation) -> list[Message]:
    if not body.messages:
        raise refuse("messages", "at least one message is required")
    if len(body.messages) > limits.MESSAGES_MAX:
        raise refuse("messages", f"{len(body.messages)} messages, at most {limits.MESSAGES_MAX}")
    if body.messages[0].role != "user":
        raise refuse("messages.0.role", "the first message must use the user role")
    if body.messages[-1].role == "assistant":
        raise refuse("messages", "the conversation must end with a user message; a reply cannot be begun for the model")
    turns = _Turns(body.system)
    for index, message in enumerate(body.messages):
        turns.add(f"messages.{index}", message)
    turns.check_answered("messages")
    return turns.messages


class _Turns:
    """Messages in the router's form: one turn's blocks become an assistant's text and calls, or tool results and a
    user's text. Consecutive messages of one role are one turn, as Anthropic has it.
    """

    def __init__(self, system: str | list[TextBlock] | None) -> None:
        self.messages: list[Message] = []
        self._asked: set[str] = set()  # calls of the last turn that have no result yet
        texts = [system] if isinstance(system, str) else [block.text for block in system or ()]
        kept = [text for text in texts if text and not text.startswith(VOLATILE_SYSTEM_PREFIX)]
        if kept:
            self.messages.append(Message(role="system", content=[_part(text) for text in kept]))

    def add(self, name: str, message: InputMessage) -> None:
        blocks: Sequence[Block] = (
            [TextBlock(text=message.content)] if isinstance(message.content, str) else message.content
        )
        if message.role == "user":
            for index, block in enumerate(blocks):
                self._user(f"{name}.content.{index}", block)
        elif message.role == "assistant":
            self.check_answered(name)
            last = self.messages[-1] if self.messages else None
            if last is None or last.role != "assistant":
                last = Message(role="assistant", content=[])
                self.messages.append(last)
            for index, block in enumerate(blocks):
                self._assistant(f"{name}.content.{index}", block, last)
            if not (last.content or last.tool_calls or last.reasoning_content):
                last.content = ""
        else:
            raise refuse(f"{name}.role", f'{message.role[:64]!r} is none of "user" and "assistant"')

    def check_answered(self, name: str) -> None:
        """Raise InvalidRequest while calls lack their results."""
        if self._asked:
            asked = ", ".join(sorted(self._asked)[:8])
            reason = f"`tool_use` ids were found without `tool_result` blocks immediately after: {asked[:256]}"
            raise refuse(name, reason)

    def _user(self, name: str, block: Block) -> None:
        if isinstance(block, ToolResultBlock):
            if block.tool_use_id not in self._asked:
                reason = "each `tool_result` must have a corresponding `tool_use` in the previous message, which"
                raise refuse(f"{name}.tool_use_id", f"{reason} {block.tool_use_id[:64]!r} has not")
            self._asked.remove(block.tool_use_id)
            self.messages.append(
                Message(role="tool", tool_call_id=block.tool_use_id, content=_result_text(name, block.content))
            )
            return
        if not isinstance(block, TextBlock | ImageBlock | DocumentBlock):
            raise refuse(name, f"a user message has no {_kind(block)} blocks")
        self.check_answered(name)
        text = _text(name, block)
        last = self.messages[-1] if self.messages else None
        if last is not None and last.role == "user" and isinstance(last.content, list):
            last.content.append(_part(text))
        else:
            self.messages.append(Message(role="user", content=[_part(text)]))

    def _assistant(self, name: str, block: Block, message: Message) -> None:
        if isinstance(block, ToolUseBlock):
            if block.id in self._asked:
                raise refuse(f"{name}.id", "`tool_use` ids must be unique")
            check_free_form(f"{name}.input", block.input)
            self._asked.add(block.id)
            call = ToolCall(id=block.id, function=FunctionCall(name=block.name, arguments=block.input))
            message.tool_calls = [*(message.tool_calls or ()), call]
        elif isinstance(block, ThinkingBlock):
            before = f"{message.reasoning_content}\n" if message.reasoning_content else ""
            message.reasoning_content = before + block.thinking
        elif isinstance(block, TextBlock):
            assert isinstance(message.content, list), "made here"
            message.content.append(_part(block.text))
        elif not isinstance(block, RedactedThinkingBlock):
            raise refuse(name, f"an assistant message has no {_kind(block)} blocks")


def _part(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def _kind(block: Block) -> str:
    return str(block.__struct_config__.tag)


def _text(name: str, block: TextBlock | ImageBlock | DocumentBlock) -> str:
    if isinstance(block, TextBlock):
        return block.text
    if isinstance(block, DocumentBlock) and block.source.get("type") == "text":
        data = block.source.get("data")
        if isinstance(data, str):
            return f"{block.title}\n{data}" if block.title else data
    raise refuse(name, f"{_kind(block)} blocks are not supported by this model, only text", "unsupported_content")


def _result_text(name: str, content: str | list[TextBlock | ImageBlock | DocumentBlock] | None) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    return "\n".join(_text(f"{name}.content.{index}", block) for index, block in enumerate(content))


# -- tools, thinking, form --------------------------------------------------------------------------------------------
def _tools(tools: Sequence[Tool] | None) -> list[dict[str, Any]] | None:
    if not tools:
        return None
    if len(tools) > limits.TOOLS_MAX:
        raise refuse("tools", f"{len(tools)} tools, at most {limits.TOOLS_MAX}")
    result, names = [], set()
    for index, tool in enumerate(tools):
        name = f"tools.{index}"
        if tool.type not in (None, "custom"):
            reason = f"{tool.type[:64]!r} is not known here; describe the tool as a custom one"
            raise refuse(f"{name}.type", reason, "unsupported_parameter")
        if not 0 < len(tool.name) <= limits.TOOL_NAME_CHARS_MAX:
            raise refuse(f"{name}.name", f"expected 1 to {limits.TOOL_NAME_CHARS_MAX} characters")
        if tool.name in names:
            raise refuse("tools", f"tool names must be unique, and {tool.name[:64]!r} is not")
        if tool.input_schema is None:
            raise refuse(f"{name}.input_schema", "Field required")
        if tool.input_schema.get("type") != "object":
            raise refuse(f"{name}.input_schema.type", 'must be "object"')
        check_free_form(f"{name}.input_schema", tool.input_schema)
        names.add(tool.name)
        function: dict[str, Any] = {"name": tool.name, "parameters": tool.input_schema}
        if tool.description is not None:
            function["description"] = tool.description
        result.append({"type": "function", "function": function})
    return result


def _tool_choice(body: Conversation) -> str | dict[str, Any]:
    choice = body.tool_choice
    assert choice is not None, "asked by the caller"
    if choice.type in ("auto", "none"):
        return choice.type
    if choice.type not in ("any", "tool"):
        raise refuse("tool_choice.type", f'{choice.type[:64]!r} is none of "auto", "any", "tool" and "none"')
    if not body.tools:
        raise refuse("tool_choice", "may only be specified while providing `tools`")
    if choice.type == "any":
        return "required"
    if choice.name is None:
        raise refuse("tool_choice.name", "Field required")
    if all(tool.name != choice.name for tool in body.tools):
        raise refuse("tool_choice.name", f"there is no tool {choice.name[:64]!r}")
    return {"type": "function", "function": {"name": choice.name}}


def _template_kwargs(body: Conversation) -> dict[str, Any] | None:
    """Whether the model is to think, by the two names that templates have for it. Absent: as the template has it."""
    thinking = body.thinking
    if thinking is None:
        return body.chat_template_kwargs
    if thinking.type not in ("enabled", "disabled", "adaptive"):
        raise refuse("thinking.type", f'{thinking.type[:64]!r} is none of "enabled", "disabled" and "adaptive"')
    if thinking.type == "enabled":
        _check_budget(thinking.budget_tokens, body)
    thinks = thinking.type != "disabled"
    return {"enable_thinking": thinks, "thinking": thinks, **(body.chat_template_kwargs or {})}


def _check_budget(budget: int | None, body: Conversation) -> None:
    if budget is None:
        raise refuse("thinking.budget_tokens", "Field required")
    if budget < THINKING_BUDGET_MIN:
        raise refuse("thinking.budget_tokens", f"must be {THINKING_BUDGET_MIN} at least, not {budget}")
    if isinstance(body, MessagesRequest) and budget >= body.max_tokens:
        raise refuse("thinking.budget_tokens", "`max_tokens` must be greater than `thinking.budget_tokens`")


def _response_format(given: dict[str, Any]) -> dict[str, Any]:
    if given.get("type") != "json_schema" or not isinstance(given.get("schema"), dict):
        raise refuse("output_config.format", 'must be {"type": "json_schema", "schema": {…}}')
    schema = {"name": "output", "schema": given["schema"], "strict": True}
    return {"type": "json_schema", "json_schema": schema}
