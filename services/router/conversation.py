"""Messages and tools of a chat request, checked and in the form that chat templates take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from tokenrelay.base.errors import InvalidRequest
from tokenrelay.services.router import limits, template
from tokenrelay.services.router.openai_types import ChatRequest, Message, MessageContent, TokenizeRequest, ToolCall
from tokenrelay.services.router.validate import check_free_form

ROLES = ("system", "developer", "user", "assistant", "tool")


def template_messages(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """The conversation for a template. `developer` becomes `system`, which templates know; text parts are joined by
    newlines.

    Raises InvalidRequest that names the message.
    """
    if not messages:
        raise InvalidRequest("messages is empty", param="messages")
    if len(messages) > limits.MESSAGES_MAX:
        raise InvalidRequest(f"messages has {len(messages)} entries, at most {limits.MESSAGES_MAX}", param="messages")
    _check_results(messages)
    return [_template_message(message, f"messages[{index}]") for index, message in enumerate(messages)]


def _check_results(messages: Sequence[Message]) -> None:
    """Raise InvalidRequest for a tool's result that names a call which the assistant did not make. One that names none
    is the template's affair.
    """
    asked: set[str | None] = set()
    for index, message in enumerate(messages):
        if message.role == "assistant":
            asked.update(call.id for call in message.tool_calls or ())
        elif message.role == "tool" and message.tool_call_id is not None and message.tool_call_id not in asked:
            name = f"messages[{index}].tool_call_id"
            raise InvalidRequest(
                f"{name}: no assistant message before has a call {message.tool_call_id[:64]!r}", param=name
            )


def _template_message(message: Message, name: str) -> dict[str, Any]:
    if message.role not in ROLES:
        raise InvalidRequest(
            f"{name}.role: unknown role {message.role[:64]!r}; expected one of {', '.join(ROLES)}", param=f"{name}.role"
        )
    text = _content_text(message.content, f"{name}.content")
    if text is None and not (message.role == "assistant" and (message.tool_calls or _reasoning(message))):
        raise InvalidRequest(f"{name}.content is missing", param=f"{name}.content")
    result: dict[str, Any] = {"role": "system" if message.role == "developer" else message.role, "content": text or ""}
    if message.name is not None:
        result["name"] = message.name
    if message.role == "assistant":
        if message.tool_calls:
            result["tool_calls"] = [
                _template_call(call, f"{name}.tool_calls[{index}]") for index, call in enumerate(message.tool_calls)
            ]
        reasoning = _reasoning(message)
        if reasoning:
            result["reasoning_content"] = result["thinking"] = reasoning  # templates know either name
    elif message.tool_calls:
        raise InvalidRequest(f"{name}.tool_calls: only an assistant calls tools", param=f"{name}.tool_calls")
    if message.role == "tool" and message.tool_call_id is not None:
        result["tool_call_id"] = message.tool_call_id
    return result


def _reasoning(message: Message) -> str | None:
    return message.reasoning_content if message.reasoning_content is not None else message.reasoning


def _content_text(content: MessageContent, name: str) -> str | None:
    if content is None or isinstance(content, str):
        return content
    texts = []
    for index, part in enumerate(content):
        kind = part.get("type")
        if kind not in ("text", "input_text", "output_text"):
            message = f"{name}[{index}]: content parts of type {str(kind)[:64]!r} are not supported, only text"
            raise InvalidRequest(message, param=f"{name}[{index}]", code="unsupported_content")
        text = part.get("text")
        if not isinstance(text, str):
            raise InvalidRequest(f"{name}[{index}].text must be a string", param=f"{name}[{index}].text")
        texts.append(text)
    return "\n".join(texts)


def _template_call(call: ToolCall, name: str) -> dict[str, Any]:
    """Arguments become the object that templates print; text that is none (a call cut short, say) stays as it is."""
    arguments: Any = call.function.arguments
    if arguments is None or arguments == "":
        arguments = {}
    elif isinstance(arguments, str):
        try:
            parsed = msgspec.json.decode(arguments)
        except (ValueError, RecursionError):
            parsed = None
        arguments = parsed if isinstance(parsed, dict) else arguments
    check_free_form(f"{name}.function.arguments", arguments)
    result: dict[str, Any] = {"type": "function", "function": {"name": call.function.name, "arguments": arguments}}
    if call.id is not None:
        result["id"] = call.id
    return result


def template_tools(tools: Sequence[dict[str, Any]] | None) -> list[dict[str, Any]] | None:
    """Tools as they were sent, checked; None where there are none. Raises InvalidRequest that names the tool."""
    if not tools:
        return None
    if len(tools) > limits.TOOLS_MAX:
        raise InvalidRequest(f"tools has {len(tools)} entries, at most {limits.TOOLS_MAX}", param="tools")
    for index, tool in enumerate(tools):
        name = f"tools[{index}]"
        function = tool.get("function")
        if tool.get("type") != "function" or not isinstance(function, dict):
            raise InvalidRequest(f'{name} must be {{"type": "function", "function": {{…}}}}', param=name)
        tool_name = function.get("name")
        if not isinstance(tool_name, str) or not 0 < len(tool_name) <= limits.TOOL_NAME_CHARS_MAX:
            raise InvalidRequest(
                f"{name}.function.name must be a string of 1 to {limits.TOOL_NAME_CHARS_MAX} characters",
                param=f"{name}.function.name",
            )
        if not isinstance(function.get("parameters"), dict | None):
            raise InvalidRequest(f"{name}.function.parameters must be an object", param=f"{name}.function.parameters")
    check_free_form("tools", list(tools))
    return list(tools)


def tools_in_force(body: ChatRequest) -> list[dict[str, Any]] | None:
    """The tools that the model sees; none for tool_choice "none", where it must not call any."""
    tools = template_tools(body.tools)
    choice = body.tool_choice
    if choice is None or choice == "auto":
        return tools
    if choice == "none":
        return None
    if choice == "required" or isinstance(choice, dict):
        return tools
    raise InvalidRequest(
        f'tool_choice must be "auto", "none", "required" or a tool, not {choice[:64]!r}', param="tool_choice"
    )


def template_variables(body: ChatRequest | TokenizeRequest) -> Mapping[str, Any]:
    """`chat_template_kwargs` and `reasoning_effort`, for the template. Raises InvalidRequest for a reserved name."""
    given = body.chat_template_kwargs or {}
    name = "chat_template_kwargs"
    if len(given) > limits.TEMPLATE_KWARGS_MAX:
        raise InvalidRequest(f"{name} has {len(given)} entries, at most {limits.TEMPLATE_KWARGS_MAX}", param=name)
    for key in given:
        if key in template.RESERVED:
            raise InvalidRequest(f"{name}: {key!r} is given by the server", param=f"{name}.{key}")
    check_free_form(name, given)
    if isinstance(body, ChatRequest) and body.reasoning_effort is not None:
        return {"reasoning_effort": body.reasoning_effort, **given}
    return given
