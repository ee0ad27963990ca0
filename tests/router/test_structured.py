"""What an answer must be: the grammar that the worker is given accepts that and nothing else, in each API."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from llguidance import LLMatcher, LLTokenizer
from mock_worker import write_model_folder
from router_stack import Stack, StartStack

CHAT, MESSAGES, RESPONSES = "/v1/chat/completions", "/v1/messages", "/v1/responses"
USER = {"role": "user", "content": "Hi"}
SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "n": {"type": "integer"}},
    "required": ["city", "n"],
    "additionalProperties": False,
}
GOOD, WRONG = '{"city": "Bern", "n": 3}', '{"city": 3}'
JSON_SCHEMA = {"type": "json_schema", "json_schema": {"name": "x", "strict": True, "schema": SCHEMA}}
READ = {
    "type": "object",
    "properties": {"path": {"type": "string"}},
    "required": ["path"],
    "additionalProperties": False,
}
TOOLS = [{"type": "function", "function": {"name": name, "parameters": READ}} for name in ("read", "list")]
CALL = '<tool_call>\n{"name": "%s", "arguments": {"path": "a"}}\n</tool_call>'


@pytest.fixture(scope="module")
def tokenizer(model_folder: Path) -> LLTokenizer:
    return LLTokenizer(str(model_folder / "tokenizer.json"))


def accepts(tokenizer: LLTokenizer, grammar: str, text: str) -> bool:
    matcher = LLMatcher(tokenizer, grammar, log_level=0)
    assert not matcher.is_error(), matcher.get_error()
    ids = tokenizer.tokenize_str(text, parse_special=True)
    return bool(matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting())


async def grammar_of(stack: Stack, path: str = CHAT, **body: Any) -> str:
    """What the worker is given for this request."""
    asked = {"messages": [USER], **body}
    if path == RESPONSES:
        asked = {"input": "Hi", **body}
    status, reply = await stack.post(path, asked)
    assert status == 200, reply
    return str(stack.worker.submits[-1].sampling.grammar)


@pytest.mark.parametrize(
    ("fields", "good", "bad"),
    [
        ({"response_format": {"type": "json_object"}}, [GOOD, "{}"], ["[]", "x", ""]),
        (
            {"response_format": JSON_SCHEMA},
            [GOOD, '{"city":"Bern","n":3}', '{\n    "city": "Bern",\n    "n": 3\n}'],
            [WRONG, "{}", GOOD + "x", GOOD.replace(", ", "," + " " * 50)],
        ),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}}, ["{}"], ["5"]),
        ({"structured_outputs": {"json": SCHEMA}}, [GOOD], [WRONG]),
        ({"structured_outputs": {"json_object": True}}, ["{}"], ["5"]),
        ({"guided_json": json.dumps(SCHEMA)}, [GOOD], [WRONG]),
        ({"structured_outputs": {"regex": "[a-c]{2}/\\d+\nx"}}, ["ab/12\nx"], ["ab/\nx", "ab/1"]),
        ({"guided_regex": "a|b"}, ["a", "b"], ["ab"]),
        ({"structured_outputs": {"choice": ["yes", 'no "x"']}}, ["yes", 'no "x"'], ["no", "yesyes"]),
        ({"guided_choice": ["über", "a\nb"]}, ["über", "a\nb"], ["u"]),
        ({"structured_outputs": {"grammar": 'start: "a" more\nmore: /[0-9]+/'}}, ["a12"], ["a", "12"]),
        ({"guided_grammar": 'root ::= "a" more\nmore ::= [0-9]+'}, ["a12"], ["a"]),
    ],
)
async def test_forms(
    stack: Stack, tokenizer: LLTokenizer, fields: dict[str, Any], good: list[str], bad: list[str]
) -> None:
    grammar = await grammar_of(stack, **fields)
    for text in good:
        assert accepts(tokenizer, grammar, text), text
        assert accepts(tokenizer, grammar, f"<think>\nHm, {WRONG}?\n</think>\n\n{text}"), "reasoning is free"
    for text in bad:
        assert not accepts(tokenizer, grammar, text), text
        assert not accepts(tokenizer, grammar, f"<think>\nHm.\n</think>\n\n{text}"), text
    completion = await grammar_of(stack, "/v1/completions", prompt="Hi", messages=None, **fields)
    assert accepts(tokenizer, completion, good[0])
    assert not accepts(tokenizer, completion, f"<think>\nHm.\n</think>\n\n{good[0]}"), "a completion does not reason"


async def test_reasoning_that_the_prompt_began(stack: Stack, tokenizer: LLTokenizer) -> None:
    thinking = {"enable_thinking": True}
    grammar = await grammar_of(stack, response_format=JSON_SCHEMA, chat_template_kwargs=thinking)
    assert accepts(tokenizer, grammar, f"Hm.\n</think>\n\n{GOOD}")
    assert not accepts(tokenizer, grammar, GOOD)


def token_ids(stack: Stack, text: str) -> list[int]:
    return stack.worker.ids(text)


def follows(tokenizer: LLTokenizer, grammar: str, ids: list[int]) -> int:
    """How many of these tokens the grammar allows, one after the other."""
    matcher = LLMatcher(tokenizer, grammar, log_level=0)
    assert not matcher.is_error(), matcher.get_error()
    for count, token_id in enumerate(ids):
        if matcher.validate_tokens([token_id]) != 1:
            return count
        matcher.consume_token(token_id)
    return len(ids)


BUDGETS: list[tuple[str, dict[str, Any]]] = [
    ("/v1/chat/completions", {"thinking_token_budget": 20}),
    ("/v1/responses", {"thinking_token_budget": 20, "input": "Hi", "messages": None}),
]


@pytest.mark.parametrize("begun", [False, True])
@pytest.mark.parametrize(("path", "fields"), BUDGETS)
async def test_a_budget_for_reasoning(
    stack: Stack, tokenizer: LLTokenizer, path: str, fields: dict[str, Any], begun: bool
) -> None:
    grammar = await grammar_of(stack, path, chat_template_kwargs={"enable_thinking": begun}, **fields)
    opened, closed = token_ids(stack, "<think>"), token_ids(stack, "</think>")
    head = [] if begun else opened
    words = token_ids(stack, "the quick brown fox jumps over the lazy dog, and reads the file" * 2)
    assert len(words) > 21
    assert follows(tokenizer, grammar, head + words) == len(head) + 20, "then it must come to its end"
    answer = token_ids(stack, f"\n\nYes.\n{CALL % 'read'}") + words
    for thought in (words[:20], words[:3], []):
        whole = [*head, *thought, *closed, *answer]
        assert follows(tokenizer, grammar, whole) == len(whole), "what comes behind is free"
    if not begun:
        assert follows(tokenizer, grammar, answer) == len(answer), "it need not think"


async def test_a_budget_of_nothing(stack: Stack, tokenizer: LLTokenizer) -> None:
    grammar = await grammar_of(stack, thinking_token_budget=0)
    opened, closed, words = (token_ids(stack, text) for text in ("<think>", "</think>", "the quick brown fox"))
    assert follows(tokenizer, grammar, [*opened, *words]) == 1
    whole = [*opened, *closed, *words]
    assert follows(tokenizer, grammar, whole) == len(whole)


async def test_the_largest_budget_is_read_soon(stack: Stack) -> None:
    began_s = time.monotonic()
    assert await grammar_of(stack, thinking_token_budget=1 << 20)
    assert time.monotonic() - began_s < 10


async def test_a_budget_beside_a_form(stack: Stack, tokenizer: LLTokenizer) -> None:
    grammar = await grammar_of(stack, response_format=JSON_SCHEMA, thinking_token_budget=2)
    opened, closed, form = (token_ids(stack, text) for text in ("<think>", "</think>", f"\n\n{GOOD}"))
    assert accepts(tokenizer, grammar, GOOD) and not accepts(tokenizer, grammar, WRONG)
    whole = [*opened, *token_ids(stack, "Hm"), *closed, *form]
    assert follows(tokenizer, grammar, whole) == len(whole)
    assert follows(tokenizer, grammar, [*opened, *token_ids(stack, "Hm, well then")]) == 3


async def test_anthropics_budget_is_this_one(stack: Stack) -> None:
    claude: dict[str, Any] = {"model": "mock", "max_tokens": 4000}
    thinking = {"type": "enabled", "budget_tokens": 1100}
    assert "{0,1100}" in await grammar_of(stack, MESSAGES, thinking=thinking, **claude)
    assert await grammar_of(stack, MESSAGES, thinking={"type": "adaptive"}, **claude) == ""


async def test_no_form_is_no_grammar(stack: Stack) -> None:
    assert await grammar_of(stack) == ""
    assert await grammar_of(stack, response_format={"type": "text"}, tools=TOOLS, tool_choice="auto") == ""


async def test_calls_that_must_be_made(stack: Stack, tokenizer: LLTokenizer) -> None:
    both = f"{CALL % 'read'}\n{CALL % 'list'}"
    required = await grammar_of(stack, tools=TOOLS, tool_choice="required")
    assert accepts(tokenizer, required, both)
    assert accepts(tokenizer, required, f"<think>\nHm.\n</think>\n\n{CALL % 'list'}")
    assert not accepts(tokenizer, required, "Hello")
    assert not accepts(tokenizer, required, CALL % "write")
    assert not accepts(tokenizer, required, (CALL % "read").replace('"a"', "5"))
    one = await grammar_of(stack, tools=TOOLS, tool_choice="required", parallel_tool_calls=False)
    assert accepts(tokenizer, one, CALL % "list")
    assert not accepts(tokenizer, one, both)
    named = await grammar_of(stack, tools=TOOLS, tool_choice={"type": "function", "function": {"name": "list"}})
    assert accepts(tokenizer, named, CALL % "list")
    assert not accepts(tokenizer, named, CALL % "read")


async def test_a_form_beside_tools_is_either(stack: Stack, tokenizer: LLTokenizer) -> None:
    grammar = await grammar_of(stack, tools=TOOLS, response_format=JSON_SCHEMA)
    assert accepts(tokenizer, grammar, GOOD)
    assert accepts(tokenizer, grammar, CALL % "read")
    assert not accepts(tokenizer, grammar, "Hello")


async def test_the_other_apis_say_the_same(stack: Stack, tokenizer: LLTokenizer) -> None:
    claude: dict[str, Any] = {"model": "mock", "max_tokens": 64}
    tool = {"name": "read", "input_schema": READ}
    form = {"format": {"type": "json_schema", "schema": SCHEMA}}
    grammar = await grammar_of(stack, MESSAGES, output_config=form, **claude)
    assert (accepts(tokenizer, grammar, GOOD), accepts(tokenizer, grammar, WRONG)) == (True, False)
    for choice in ({"type": "any"}, {"type": "tool", "name": "read"}):
        grammar = await grammar_of(stack, MESSAGES, tools=[tool], tool_choice=choice, **claude)
        assert (accepts(tokenizer, grammar, CALL % "read"), accepts(tokenizer, grammar, "Hi")) == (True, False)
    text = {"format": {"type": "json_schema", "name": "x", "schema": SCHEMA, "strict": True}}
    grammar = await grammar_of(stack, RESPONSES, text=text)
    assert (accepts(tokenizer, grammar, GOOD), accepts(tokenizer, grammar, WRONG)) == (True, False)
    tools = [{"type": "function", "name": "read", "parameters": READ}]
    grammar = await grammar_of(stack, RESPONSES, tools=tools, tool_choice={"type": "function", "name": "read"})
    assert (accepts(tokenizer, grammar, CALL % "read"), accepts(tokenizer, grammar, "Hi")) == (True, False)


DEEP: dict[str, Any] = {"type": "string"}
for _ in range(80):
    DEEP = {"type": "array", "items": DEEP}
BAD: list[tuple[dict[str, Any], str]] = [
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
    ({"response_format": {"type": "json_schema", "json_schema": {"schema": 5}}}, "response_format.json_schema"),
    ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "nope"}}}}, "response_format"),
    ({"guided_json": {"$ref": "#/nowhere"}}, "guided_json"),
    ({"guided_json": {"allOf": [{"type": "string"}, {"type": "integer"}]}}, "guided_json"),
    ({"guided_json": DEEP}, "guided_json"),
    ({"guided_json": "{"}, "guided_json"),
    ({"guided_regex": "("}, "guided_regex"),
    ({"guided_regex": "(?=a)b"}, "guided_regex"),
    ({"guided_regex": "x" * (1 << 20) + "y"}, "guided_regex"),
    ({"guided_regex": ""}, "guided_regex"),
    ({"guided_choice": []}, "guided_choice"),
    ({"guided_choice": [5]}, "guided_choice"),
    ({"guided_choice": ["x"] * 10_001}, "guided_choice"),
    ({"guided_grammar": "anything"}, "guided_grammar"),
    ({"guided_grammar": "start: nothing"}, "guided_grammar"),
    ({"guided_grammar": "root ::= ("}, "guided_grammar"),
    ({"structured_outputs": {}}, "structured_outputs"),
    ({"structured_outputs": 5}, "structured_outputs"),
    ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs.choice"),
    ({"response_format": JSON_SCHEMA, "guided_regex": "a"}, "guided_regex"),
    ({"response_format": JSON_SCHEMA, "ignore_eos": True}, "ignore_eos"),
    ({"response_format": JSON_SCHEMA, "min_tokens": 5}, "min_tokens"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "x"}}}, "tool_choice"),
    ({"tools": TOOLS, "tool_choice": {"type": "custom"}}, "tool_choice"),
]


async def test_what_cannot_be_followed_is_refused_by_name(stack: Stack) -> None:
    for fields, param in BAD:
        status, reply = await stack.post(CHAT, {"messages": [USER], **fields})
        assert status == 400, (str(fields)[:200], reply)
        assert reply["error"]["param"] == param, (str(fields)[:200], reply)
        assert reply["error"]["message"].startswith(param)
    assert stack.worker.submits == []


EXPLODING: list[dict[str, Any]] = [
    {"guided_regex": "((a{0,1000}){0,1000}){0,1000}"},
    {"guided_regex": "(x+x+)+y"},
    {"guided_json": {"type": "array", "minItems": 10**8, "items": {"type": "integer"}}},
    {"guided_json": {"type": "string", "pattern": "^(a|aa)+$", "maxLength": 10**8}},
    {"guided_json": {"anyOf": [{"$ref": "#"}, {"type": "array", "items": {"$ref": "#"}}]}},
    {"guided_json": {"type": "object", "properties": {f"p{n}": {"type": "string"} for n in range(300)}}},
    {"guided_grammar": 'start: a\na: a a | "x" | ""'},
]


@pytest.mark.timeout(20)
async def test_what_could_explode_is_answered_soon(stack: Stack) -> None:
    """Accepted, as it is read when it is needed, or refused: never a hang, never a 500."""
    for fields in EXPLODING:
        status, reply = await stack.post(CHAT, {"messages": [USER], **fields})
        assert status in (200, 400), reply


async def test_other_ways_to_write_calls_are_refused(tmp_path: Path, start_stack: StartStack) -> None:
    stack = await start_stack(folder=write_model_folder(tmp_path), tool_parser="kimi")
    status, reply = await stack.post(CHAT, {"messages": [USER], "tools": TOOLS, "tool_choice": "required"})
    assert (status, reply["error"]["param"], reply["error"]["code"]) == (400, "tool_choice", "unsupported_parameter")
    status, reply = await stack.post(CHAT, {"messages": [USER], "response_format": JSON_SCHEMA})
    assert status == 200, "a form alone needs no calls"


async def test_a_worker_that_cannot_is_not_asked(stack: Stack) -> None:
    stack.service.pool.usable[0].handshake.grammars = False
    status, reply = await stack.post(CHAT, {"messages": [USER], "response_format": JSON_SCHEMA})
    assert (status, reply["error"]["code"]) == (503, "unavailable")
