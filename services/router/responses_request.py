"""From OpenAI's Responses to the one request that this router serves (`openai_types.ChatRequest`).

    items = Items()                          # or Items(stored.messages, stored.unanswered): the turns before
    items.add_input(body.input)
    chat = chat_request(body, items)

Everything wrong is an InvalidRequest that names the field as this API does: `input[1].content[0].text`.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Collection, Sequence
from typing import Any

from tokenrelay.base.errors import InvalidRequest
from tokenrelay.services.router import limits
from tokenrelay.services.router.openai_types import ChatRequest, FunctionCall, Message, ToolCall
from tokenrelay.services.router.responses_types import (
    CallItem,
    CallOutputItem,
    MessageItem,
    ReasoningItem,
    ResponsesRequest,
)
from tokenrelay.services.router.validate import check_free_form, convert

ROLES = ("user", "assistant", "system", "developer")
# Tools that OpenAI would run, and that a client offers whether they are there or not: the model does not see them.
HOSTED_LEFT_OUT = ("web_search", "web_search_preview")
ENCRYPTED = "reasoning.encrypted_content"
INCLUDE_LOGPROBS = "message.output_text.logprobs"
_SEALED = "tr1:"  # how our `encrypted_content` begins
# Where a field has another name here than in the request that the router serves.
NAMES = {"messages": "input", "max_tokens": "max_output_tokens", "response_format": "text.format"}


def refuse(name: str, reason: str, code: str | None = None) -> InvalidRequest:
    """An error that names a field."""
    return InvalidRequest(f"{name}: {reason}", param=name, code=code)


def renamed(error: InvalidRequest) -> InvalidRequest:
    """The same error with the field's name in this API."""
    head, bracket, rest = (error.param or "").partition("[")
    name = NAMES.get(head)
    if name is None:
        return error
    message, param = error.message, error.param or ""
    spelled = name + bracket + rest
    if message.startswith(param):
        message = spelled + message[len(param) :]
    renewed = InvalidRequest(message.replace("the messages resulted", "the input resulted"), param=spelled)
    renewed.code = error.code
    return renewed


def sealed(reasoning: str) -> str:
    """`encrypted_content`: for a client that keeps the conversation itself. It is the client's own, so no secret."""
    return _SEALED + base64.b64encode(reasoning.encode("utf-8", "replace")).decode()


def _unsealed(content: str) -> str:
    """What `sealed` had; nothing where somebody else wrote it."""
    try:
        return base64.b64decode(content.removeprefix(_SEALED), validate=True).decode()
    except (binascii.Error, ValueError):
        return ""


# -- the request ------------------------------------------------------------------------------------------------------
def check(body: ResponsesRequest) -> None:
    """Refuse what would change the answer and is not there. Raises InvalidRequest."""
    include = body.include or ()
    refused = [
        ("background", bool(body.background), "a response is made while its request is open"),
        ("conversation", body.conversation is not None, "use previous_response_id, or send the items"),
        ("prompt", body.prompt is not None, "there are no stored prompts"),
        ("truncation", body.truncation not in (None, "disabled"), "nothing is left out of the input"),
        ("max_tool_calls", body.max_tool_calls is not None, "no tools are run here"),
        ("top_logprobs", bool(body.top_logprobs), "use chat completions for log-probabilities"),
        ("include", INCLUDE_LOGPROBS in include, "use chat completions for log-probabilities"),
    ]
    for name, present, reason in refused:
        if present:
            raise refuse(name, reason, "unsupported_parameter")


def chat_request(body: ResponsesRequest, items: Items) -> ChatRequest:
    """The same request in the router's own form. Raises InvalidRequest."""
    items.check_answered()
    messages = items.messages
    if body.instructions:
        messages = [Message(role="system", content=body.instructions), *messages]
    result = ChatRequest(
        model=body.model,
        messages=messages,
        tools=_tools(body.tools),
        max_tokens=body.max_output_tokens,
        temperature=body.temperature,
        top_p=body.top_p,
        top_k=body.top_k,
        seed=body.seed,
        priority=body.priority,
        tps_floor=body.tps_floor,
        expected_output_tokens=body.expected_output_tokens,
        cache_salt=body.cache_salt,
        prompt_cache_key=body.prompt_cache_key,
        stream=body.stream,
        parallel_tool_calls=body.parallel_tool_calls,
        chat_template_kwargs=body.chat_template_kwargs,
        thinking_token_budget=body.thinking_token_budget,
        reasoning_effort=body.reasoning.effort if body.reasoning is not None else None,
        tool_choice=_tool_choice(body),
    )
    if body.text is not None and body.text.format is not None:
        result.response_format = _response_format(body.text.format)
    return result


def _tools(tools: Sequence[dict[str, Any]] | None) -> list[dict[str, Any]] | None:
    if not tools:
        return None
    if len(tools) > limits.TOOLS_MAX:
        raise refuse("tools", f"{len(tools)} tools, at most {limits.TOOLS_MAX}")
    result = []
    for index, tool in enumerate(tools):
        name, kind = f"tools[{index}]", tool.get("type")
        if kind in HOSTED_LEFT_OUT:
            continue
        if kind != "function":
            reason = f'{str(kind)[:64]!r} is not known here, only "function"'
            raise refuse(f"{name}.type", reason, "unsupported_parameter")
        tool_name, parameters = tool.get("name"), tool.get("parameters")
        if not isinstance(tool_name, str) or not 0 < len(tool_name) <= limits.TOOL_NAME_CHARS_MAX:
            raise refuse(f"{name}.name", f"expected a string of 1 to {limits.TOOL_NAME_CHARS_MAX} characters")
        if not isinstance(parameters, dict | None):
            raise refuse(f"{name}.parameters", "expected an object")
        function = {
            key: tool[key] for key in ("name", "description", "parameters", "strict") if tool.get(key) is not None
        }
        check_free_form(name, function)
        result.append({"type": "function", "function": function})
    return result


def _tool_choice(body: ResponsesRequest) -> str | dict[str, Any] | None:
    choice = body.tool_choice
    if not isinstance(choice, dict):
        return choice
    if choice.get("type") != "function" or not isinstance(choice.get("name"), str):
        raise refuse("tool_choice", 'expected "auto", "none", "required" or {"type": "function", "name": …}')
    return {"type": "function", "function": {"name": choice["name"]}}


def _response_format(given: dict[str, Any]) -> dict[str, Any]:
    """`text.format` has the fields of a schema beside its type, where chat completions nest them."""
    if given.get("type") != "json_schema":
        return given
    schema = {key: given[key] for key in ("name", "schema", "strict", "description") if key in given}
    return {"type": "json_schema", "json_schema": schema}


# -- the items --------------------------------------------------------------------------------------------------------
class Items:
    """A conversation's items as messages: reasoning, text and calls of one turn become one message of the assistant.

    `messages` of former turns are not changed; `unanswered`: their calls that have no output yet.
    """

    def __init__(self, messages: Sequence[Message] = (), unanswered: Collection[str] = ()) -> None:
        self.messages = list(messages)
        self.unanswered = set(unanswered)
        self._turn: Message | None = None  # the assistant's message that further items are put into

    def add_input(self, given: str | list[dict[str, Any]]) -> None:
        """`input` of a request. Raises InvalidRequest."""
        if isinstance(given, str):
            self._say("user", given)
            return
        if len(given) > limits.MESSAGES_MAX:
            raise refuse("input", f"{len(given)} items, at most {limits.MESSAGES_MAX}")
        if not given and not self.messages:
            raise refuse("input", "there is nothing in it")
        for index, item in enumerate(given):
            self.add(item, f"input[{index}]")

    def add(self, item: dict[str, Any], name: str) -> None:
        """One item. Raises InvalidRequest."""
        kind = item.get("type")
        if kind is None or kind == "message":
            self._message(convert(item, MessageItem, name), name)
        elif kind == "function_call":
            self._call(convert(item, CallItem, name), name)
        elif kind == "function_call_output":
            self._output(convert(item, CallOutputItem, name), name)
        elif kind == "reasoning":
            self._reasoning(convert(item, ReasoningItem, name))
        else:
            raise refuse(f"{name}.type", f"items of type {str(kind)[:64]!r} are not supported", "unsupported_content")

    def check_answered(self) -> None:
        """Raise InvalidRequest while calls lack their outputs."""
        if self.unanswered:
            call_id = min(self.unanswered)[:64]
            raise InvalidRequest(f"No tool output found for function call {call_id}.", param="input")

    def _say(self, role: str, text: str) -> None:
        self.messages.append(Message(role=role, content=text))

    def _assistant(self) -> Message:
        if self._turn is None:
            self._turn = Message(role="assistant", content="")
            self.messages.append(self._turn)
        return self._turn

    def _message(self, item: MessageItem, name: str) -> None:
        if item.role not in ROLES:
            raise refuse(f"{name}.role", f"{item.role[:64]!r} is none of {', '.join(ROLES)}")
        text = _text(item.content, f"{name}.content")
        if item.role != "assistant":
            self._turn = None
            self._say(item.role, text)
            return
        message = self._assistant()
        message.content = f"{message.content}\n{text}" if message.content else text

    def _call(self, item: CallItem, name: str) -> None:
        if item.call_id in self.unanswered:
            raise refuse(f"{name}.call_id", "two calls have the same id")
        self.unanswered.add(item.call_id)
        message = self._assistant()
        call = ToolCall(id=item.call_id, function=FunctionCall(name=item.name, arguments=item.arguments))
        message.tool_calls = [*(message.tool_calls or ()), call]

    def _output(self, item: CallOutputItem, name: str) -> None:
        if item.call_id not in self.unanswered:
            message = f"No tool call found for function call output with call_id {item.call_id[:64]}."
            raise InvalidRequest(message, param=f"{name}.call_id")
        self.unanswered.remove(item.call_id)
        self._turn = None
        text = _text(item.output, f"{name}.output")
        self.messages.append(Message(role="tool", tool_call_id=item.call_id, content=text))

    def _reasoning(self, item: ReasoningItem) -> None:
        text = "\n".join(part.text for part in item.content or item.summary or ())
        if not text and item.encrypted_content is not None:
            text = _unsealed(item.encrypted_content)
        if text:
            message = self._assistant()
            before = f"{message.reasoning_content}\n" if message.reasoning_content else ""
            message.reasoning_content = before + text


def _text(content: str | list[dict[str, Any]], name: str) -> str:
    if isinstance(content, str):
        return content
    texts = []
    for index, part in enumerate(content):
        kind = part.get("type")
        field = "refusal" if kind == "refusal" else "text"
        if kind not in ("input_text", "output_text", "text", "refusal"):
            reason = f"content of type {str(kind)[:64]!r} is not supported, only text"
            raise refuse(f"{name}[{index}]", reason, "unsupported_content")
        text = part.get(field)
        if not isinstance(text, str):
            raise refuse(f"{name}[{index}].{field}", "expected a string")
        texts.append(text)
    return "\n".join(texts)
