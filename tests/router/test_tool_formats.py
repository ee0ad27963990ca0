"""Calls and reasoning as each family of models writes them, however the text is cut."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jiter
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mock_worker import write_model_folder
from router_stack import StartStack
from tokenizers import AddedToken, Tokenizer

from tokenrelay.services.router.json_stream import JsonObject
from tokenrelay.services.router.text import ChatText, Delta, whole_calls
from tokenrelay.services.router.tool_formats import BY_NAME, CHANNEL, Formats, choose
from tokenrelay.services.router.tool_scanner import HEAD_CHARS_MAX
from tokenrelay.services.router.tools import CallArguments

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "read",
            "parameters": {
                "type": "object",
                "properties": {
                    "path": {"type": "string"},
                    "line": {"type": "integer"},
                    "all": {"type": "boolean"},
                    "more": {"type": "array"},
                },
            },
        },
    }
]
NAMES = [*BY_NAME, CHANNEL]
DS = (
    "<｜tool▁calls▁begin｜>",
    "<｜tool▁call▁begin｜>",
    "<｜tool▁sep｜>",
    "<｜tool▁call▁end｜>",
    "<｜tool▁calls▁end｜>",
)
KIMI = ("<|tool_calls_section_begin|>", "<|tool_call_begin|>", "<|tool_call_argument_begin|>", "<|tool_call_end|>")
KIMI_END = "<|tool_calls_section_end|>"


def formats(name: str) -> Formats:
    return choose("", tool_parser=name, reasoning_parser="channel" if name == CHANNEL else "none")


def fed(name: str, pieces: list[str]) -> tuple[str, str, list[tuple[str, str]], Delta]:
    """(content, reasoning, calls) as a unary reply has them, and the delta."""
    text = ChatText(tools=formats(name).parser(TOOLS))
    delta = Delta()
    for piece in pieces:
        text.feed(piece, delta)
    text.finish(delta)
    calls = [(call, arguments) for _, call, arguments in whole_calls(delta.events)]
    return delta.content, delta.reasoning, calls, delta


def cut(text: str, size: int) -> list[str]:
    return [text[start : start + size] for start in range(0, len(text), size)]


READ = ("read", {"path": "a"})
TRANSCRIPTS: list[tuple[str, str, str, list[tuple[str, Any]]]] = [
    # -- DeepSeek V3 and R1, then V3.1
    ("deepseek", f'See.{DS[0]}{DS[1]}function{DS[2]}read\n```json\n{{"path": "a"}}\n```{DS[3]}{DS[4]}', "See.", [READ]),
    ("deepseek", f'{DS[0]}{DS[1]}read{DS[2]}{{"path": "a"}}{DS[3]}\n{DS[1]}x{DS[2]}{{}}{DS[3]}{DS[4]}', "",
     [READ, ("x", {})]),
    ("deepseek", f'{DS[0]}{DS[1]}read{DS[2]}{{"path": "a"}}', "", [READ]),  # only the close marks lack
    ("deepseek", f"{DS[0]}{DS[1]}read{DS[2]}oops{DS[3]}{DS[4]}", f"{DS[1]}read{DS[2]}oops{DS[3]}", []),
    ("deepseek", f'{DS[1]}read{DS[2]}{{"path": oops}}{DS[3]}', f'{DS[1]}read{DS[2]}{{"path": oops}}{DS[3]}', []),
    # -- DeepSeek V3.2
    (
        "dsml",
        'See.\n\n<｜DSML｜function_calls>\n<｜DSML｜invoke name="read">\n<｜DSML｜parameter name="path" string="true">'
        'a <b>\n</｜DSML｜parameter>\n<｜DSML｜parameter name="line" string="false">3</｜DSML｜parameter>\n'
        "</｜DSML｜invoke>\n"
        '<｜DSML｜invoke name="x">\n</｜DSML｜invoke>\n</｜DSML｜function_calls>',
        "See.",
        [("read", {"path": "a <b>\n", "line": 3}), ("x", {})],
    ),
    # -- Kimi K2
    ("kimi", f'Ok{KIMI[0]}{KIMI[1]}functions.read:0{KIMI[2]}{{"path": "a"}}{KIMI[3]}{KIMI_END}', "Ok", [READ]),
    ("kimi", f'{KIMI[0]}{KIMI[1]}functions.read{KIMI[2]}{{"path": "a"}}{KIMI[3]}{KIMI_END}',
     f'{KIMI[1]}functions.read{KIMI[2]}{{"path": "a"}}{KIMI[3]}', []),
    # -- Mistral, older and newer
    ("mistral", 'Ok. [TOOL_CALLS] [{"name": "read", "arguments": {"path": "a"}}, {"name": "x", "arguments": {}}]',
     "Ok.", [READ, ("x", {})]),
    ("mistral", '[TOOL_CALLS]read[ARGS]{"path": "a"}[TOOL_CALLS]x[CALL_ID]abc123[ARGS]{}', "", [READ, ("x", {})]),
    ("mistral", '[TOOL_CALLS]read{"path": "a"}', "", [READ]),
    ("mistral", '[TOOL_CALLS][{"name": "read", "arguments": {"path": "a"}}, oops]', ", oops]", [READ]),
    ("mistral", "An array: [1, 2] and [TOOL", "An array: [1, 2] and [TOOL", []),
    # -- Llama 3
    ("llama3", '{"name": "read", "parameters": {"path": "a"}}', "", [READ]),
    ("llama3", '<|python_tag|>{"type": "function", "name": "read", "parameters": {"path": "a"}}', "", [READ]),
    ("llama3", '{"name": "read", "parameters": {"path": "a"}}; {"name": "x", "parameters": {}}', "", [READ, ("x", {})]),
    ("llama3", '{"answer": 42} is an object.', '{"answer": 42} is an object.', []),
    ("llama3", 'No: {"name": "read", "parameters": {}}', 'No: {"name": "read", "parameters": {}}', []),
    ("llama3", "  Hello", "  Hello", []),
    # -- Qwen3-Coder
    (
        "qwen-coder",
        "Ok.\n<tool_call>\n<function=read>\n<parameter=path>\nline 1\n<b> \"q\" \\\n</parameter>\n<parameter=line>\n3\n"
        "</parameter>\n<parameter=all>\nTrue\n</parameter>\n<parameter=more>\n[1, {}]\n</parameter>\n</function>\n"
        "</tool_call>",
        "Ok.",
        [("read", {"path": 'line 1\n<b> "q" \\', "line": 3, "all": True, "more": [1, {}]})],
    ),
    ("qwen-coder", "<tool_call><function=x></function></tool_call>", "", [("x", {})]),
    ("qwen-coder", "<tool_call><function=read><parameter=line>some</parameter></function></tool_call>", "",
     [("read", {"line": "some"})]),
    ("qwen-coder", "<tool_call><function=read><parameter=path>cut",
     "<tool_call><function=read><parameter=path>cut", []),
    # -- GLM
    ("glm", "<tool_call>read\n<arg_key>path</arg_key>\n<arg_value>a b\n</arg_value>\n<arg_key>line</arg_key>\n"
     "<arg_value>3</arg_value>\n</tool_call>", "", [("read", {"path": "a b\n", "line": 3})]),
    ("glm", "Now<tool_call>x</tool_call> and", "Nowand", [("x", {})]),
    ("glm", "<tool_call>two words</tool_call>", "<tool_call>two words</tool_call>", []),
    # -- Hermes: models write line breaks into strings
    ("hermes", '<tool_call>{"name": "read", "arguments": {"path": "a\n\tb"}}</tool_call>', "",
     [("read", {"path": "a\n\tb"})]),
]  # fmt: skip


@pytest.mark.parametrize(("name", "text", "content", "calls"), TRANSCRIPTS)
def test_transcripts(name: str, text: str, content: str, calls: list[tuple[str, Any]]) -> None:
    for size in (1, 2, 3, 7, 1000):
        got_content, _, got_calls, _ = fed(name, cut(text, size))
        assert got_content == content, f"in pieces of {size}"
        assert [(call, json.loads(arguments)) for call, arguments in got_calls] == calls, f"in pieces of {size}"


CHANNELS = [
    ("<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>It is 2.<|return|>",
     "It is 2.", "Hm.", []),
    ("<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>commentary to=functions.read "
     '<|constrain|>json<|message|>{"path": "a"}<|call|>', "", "Hm.", [READ]),
    ("<|channel|>commentary<|message|>Let me see.<|end|><|start|>assistant to=functions.read<|channel|>commentary json"
     '<|message|>{"path": "a"}<|call|>', "Let me see.", "", [READ]),
    (' to=functions.read<|channel|>commentary<|message|>{"path": "a"}', "", "", [READ]),
    ("Just text.", "Just text.", "", []),
    ("<|channel|>final<|message|>cut <|en", "cut <|en", "", []),
    ("<|channel|>commentary to=functions.read<|message|>oops<|call|>", "oops", "", []),
    ("<|channel|>no message", "<|channel|>no message", "", []),
]  # fmt: skip


@pytest.mark.parametrize(("text", "content", "reasoning", "calls"), CHANNELS)
def test_channels(text: str, content: str, reasoning: str, calls: list[tuple[str, Any]]) -> None:
    for size in (1, 2, 3, 7, 1000):
        got = fed(CHANNEL, cut(text, size))
        assert got[:2] == (content, reasoning), f"in pieces of {size}"
        assert [(call, json.loads(arguments)) for call, arguments in got[2]] == calls, f"in pieces of {size}"


def test_channels_without_tools_show_what_was_to_be_a_call() -> None:
    text = ChatText(tools=formats(CHANNEL).parser(None))
    delta = Delta()
    text.feed('<|channel|>commentary to=functions.read<|message|>{"path": "a"}<|call|>', delta)
    text.finish(delta)
    assert (delta.content, whole_calls(delta.events)) == ('{"path": "a"}', [])


def test_kimis_ids_are_kept() -> None:
    *_, delta = fed("kimi", [f'{KIMI[0]}{KIMI[1]}functions.read:3{KIMI[2]}{{"path": "a"}}{KIMI[3]}'])
    assert whole_calls(delta.events) == [("functions.read:3", "read", '{"path": "a"}')]


def test_strings_stream_before_they_are_whole() -> None:
    text, delta = ChatText(tools=formats("qwen-coder").parser(TOOLS)), Delta()
    text.feed("<tool_call>\n<function=read>\n<parameter=path>\nsome te", delta)
    assert "".join(event.text for event in delta.events if isinstance(event, CallArguments)) == '{"path": "some te'


def test_a_name_without_end_is_text() -> None:
    text = "<tool_call><function=" + "x" * 2 * HEAD_CHARS_MAX
    assert fed("qwen-coder", cut(text, 100))[0] == text


# -- any text, any cut ------------------------------------------------------------------------------------------------
MARKS = """\
[TOOL_CALLS] [ARGS] <|python_tag|> <tool_call> </tool_call> <function=read> <parameter=path> </parameter> </function>
<arg_key> path </arg_key> <arg_value> </arg_value> <｜DSML｜function_calls> </｜DSML｜parameter> </｜DSML｜invoke>
<|channel|> analysis <|message|> <|end|> <|start|> <|call|> {"path":"a"} } ] ; functions.read:0 read ```json ``` < { "
\\ \\u d800 , [
"""
LONG_MARKS = [
    '<｜DSML｜invoke name="read">',
    '<｜DSML｜parameter name="path" string="true">',
    "commentary to=functions.read",
]
PIECES = st.one_of(
    st.sampled_from([*DS, *KIMI, KIMI_END, *MARKS.split(), *LONG_MARKS, '{"name": "x", "arguments": ', "\n", " "]),
    st.text(max_size=3),
)


@settings(max_examples=600, deadline=None)
@given(name=st.sampled_from(NAMES), pieces=st.lists(PIECES, max_size=14), data=st.data())
def test_any_text_comes_out_the_same_however_it_is_cut(name: str, pieces: list[str], data: st.DataObject) -> None:
    text = "".join(pieces)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    parts = [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    whole, single, some = fed(name, [text]), fed(name, list(text)), fed(name, parts)
    assert whole[:3] == single[:3] == some[:3]
    for _, arguments in whole[2]:
        assert isinstance(json.loads(arguments), dict)
    for delta in (whole[3], single[3]):
        started: dict[int, str] = {}
        for event in delta.events:
            if isinstance(event, CallArguments):
                started[event.index] = started.get(event.index, "") + event.text
        for arguments in started.values():
            jiter.from_json(arguments.encode(), partial_mode=True)  # a client's parser takes it at any moment


VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-(10**9), 10**9), st.floats(allow_nan=False, allow_infinity=False))
    | st.text(max_size=12),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)),
    max_leaves=8,
)
OBJECTS = st.dictionaries(st.text(max_size=6), VALUES, max_size=3)
WRITTEN: dict[str, Callable[[str], str]] = {
    "hermes": lambda arguments: f'<tool_call>\n{{"name": "read", "arguments": {arguments}}}\n</tool_call>\n',
    "deepseek": lambda arguments: f"{DS[0]}{DS[1]}read{DS[2]}{arguments}{DS[3]}{DS[4]}",
    "kimi": lambda arguments: f"{KIMI[0]}{KIMI[1]}functions.read:0{KIMI[2]}{arguments}{KIMI[3]}{KIMI_END}",
    "mistral": lambda arguments: f"[TOOL_CALLS]read[ARGS]{arguments}",
    "llama3": lambda arguments: f'<|python_tag|>{{"name": "read", "parameters": {arguments}}}',
    "channel": lambda arguments: f"<|channel|>commentary to=functions.read<|message|>{arguments}<|call|>",
}


@settings(max_examples=300, deadline=None)
@given(name=st.sampled_from(sorted(WRITTEN)), given=st.lists(OBJECTS, max_size=3), ascii_only=st.booleans())
def test_what_was_called_comes_out(name: str, given: list[dict[str, Any]], ascii_only: bool) -> None:
    text = "".join(WRITTEN[name](json.dumps(one, ensure_ascii=ascii_only)) for one in given)
    for size in (1, 5, 10_000):
        content, _, calls, _ = fed(name, cut(text, size))
        assert content == ""
        assert [(call, json.loads(arguments)) for call, arguments in calls] == [("read", one) for one in given]


KEYS = st.text(st.characters(exclude_characters='<>\n"', exclude_categories=("Z", "C")), min_size=1, max_size=6)
PLAIN = st.text(st.characters(exclude_characters="<", exclude_categories=("Cs",)), max_size=12)


@settings(max_examples=200, deadline=None)
@given(name=st.sampled_from(["qwen-coder", "glm", "dsml"]), given=st.dictionaries(KEYS, PLAIN, max_size=3))
def test_pairs_come_out(name: str, given: dict[str, str]) -> None:
    if name == "qwen-coder":
        body = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in given.items())
        text = f"<tool_call>\n<function=other>\n{body}</function>\n</tool_call>"
    elif name == "glm":
        pairs = given.items()
        body = "".join(f"<arg_key>{key}</arg_key>\n<arg_value>{value}</arg_value>\n" for key, value in pairs)
        text = f"<tool_call>other\n{body}</tool_call>"
    else:
        close = "</｜DSML｜parameter>\n"
        body = "".join(f'<｜DSML｜parameter name="{key}" string="true">{value}{close}' for key, value in given.items())
        text = f'<｜DSML｜invoke name="other">\n{body}</｜DSML｜invoke>'
    for size in (1, 4, 10_000):
        content, _, calls, _ = fed(name, cut(text, size))
        assert content == ""
        assert [(call, json.loads(arguments)) for call, arguments in calls] == [("other", given)]


# -- JSON -------------------------------------------------------------------------------------------------------------
@settings(max_examples=400, deadline=None)
@given(
    text=st.one_of(
        OBJECTS.map(json.dumps),
        st.text('{}[]":,\\u0123456789abcdeftrulns.-+E \n', max_size=20).map(lambda rest: "{" + rest),
        st.text('{"a":\\ud8c01}', max_size=24).map(lambda rest: '{"' + rest),
    )
)
def test_what_leaves_is_json(text: str) -> None:
    scan = JsonObject()
    out, taken = scan.feed(text)
    assert (taken == len(text)) != (scan.bad or (scan.done and taken < len(text)))
    if scan.done:
        assert isinstance(jiter.from_json(out.encode()), dict)
    else:
        jiter.from_json(out.encode(), partial_mode=True)
    try:
        whole = json.loads(text, strict=False)
    except ValueError:
        assert not (scan.done and taken == len(text))
    else:
        if isinstance(whole, dict) and "\\u" not in text:  # the standard library takes lone surrogates, we do not
            assert scan.done
            assert json.loads(out) == whole
    again, pieces = JsonObject(), []
    for character in text:
        if again.bad or again.done:
            break
        pieces.append(again.feed(character)[0])
    assert ("".join(pieces), again.done, again.bad) == (out, scan.done, scan.bad)


@pytest.mark.parametrize(
    ("text", "good"),
    [
        ('{"\\ud83d\\udc4b": "\\u00e9"}', True),
        ('{"a": "\\ud83d"}', False),
        ('{"a": "\\ud83dx"}', False),
        ('{"a": "\\ud83d\\n"}', False),
        ('{"a": "\\ud83d\\ud83d"}', False),
        ('{"a": "\\udc4b"}', False),
        ('{"a": 01}', False),
        ('{"a": -0.5e+3}', True),
        ('{"a": 1.}', False),
        ('{"a": [1,]}', False),
        ('{"a": {},}', False),
        ('{"a": nul}', False),
        ('[{"a": 1}]', False),
    ],
)
def test_json_as_the_standard_has_it(text: str, good: bool) -> None:
    scan = JsonObject()
    out, _ = scan.feed(text)
    assert (scan.done, scan.bad) == (good, not good)
    assert not good or out == text


def test_json_that_nests_too_deeply_is_none() -> None:
    scan = JsonObject()
    scan.feed('{"a":' * 100)
    assert scan.bad


# -- what a template shows --------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("shown", "tool_format"),
    [
        ("{{ '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>' }}", "deepseek"),
        ("<|tool_calls_section_begin|><|tool_call_begin|>", "kimi"),
        ("[AVAILABLE_TOOLS] [TOOL_CALLS]", "mistral"),
        ("<tool_call>\n<function=example>", "qwen-coder"),
        ("<tool_call>{function-name}\n<arg_key>", "glm"),
        ('<tool_call>\n{"name": ', "hermes"),
        ("Environment: ipython", "llama3"),
        ("<|python_tag|>", "llama3"),
        ("nothing", "hermes"),
    ],
)
def test_the_template_chooses(shown: str, tool_format: str) -> None:
    chosen = choose(shown)
    assert chosen.tool_format is not None
    assert chosen.tool_format.name == tool_format
    assert choose(shown, tool_parser="kimi").tool_format is BY_NAME["kimi"], "a flag overrides it"


def test_the_template_chooses_reasoning() -> None:
    assert choose("… </think> …").think == ("<think>", "</think>")
    assert choose("[THINK] [/THINK]").think == ("[THINK]", "[/THINK]")
    assert choose("").think is None
    assert choose("", has_token=lambda tag: tag == "</think>").think == ("<think>", "</think>")
    assert choose("</think>", reasoning_parser="none").think is None
    assert choose("", reasoning_parser="think").think == ("<think>", "</think>")
    assert choose("<|channel|>analysis").channels
    assert "<|message|>" in choose("<|channel|>analysis").tags


# -- served -----------------------------------------------------------------------------------------------------------
async def test_marks_that_are_special_tokens_reach_the_parser(tmp_path: Path, start_stack: StartStack) -> None:
    folder = write_model_folder(tmp_path, chat_template="{{ messages[-1].content }}{# <|tool_call_begin|> #}")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_special_tokens([AddedToken(mark, special=True, normalized=False) for mark in (*KIMI, KIMI_END)])
    tokenizer.save(str(folder / "tokenizer.json"))
    stack = await start_stack(folder=folder)
    call = f'{KIMI[1]}functions.read:0{KIMI[2]}{{"path": "a"}}{KIMI[3]}'
    stack.worker.say(f"Ok.{KIMI[0]}{call}{KIMI_END}")
    choice = (await stack.chat(tools=TOOLS))["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("Ok.", "tool_calls")
    assert [one["id"] for one in choice["message"]["tool_calls"]] == ["functions.read:0"]
    result = {"role": "tool", "tool_call_id": "functions.read:0", "content": "b"}
    status, _ = await stack.post(
        "/v1/chat/completions", {"messages": [{"role": "user", "content": "Hi"}, choice["message"], result]}
    )
    assert status == 200
    status, reply = await stack.post("/v1/chat/completions", {"messages": [{"role": "user", "content": "Hi"}, result]})
    assert (status, reply["error"]["param"]) == (400, "messages[1].tool_call_id")


async def test_a_flag_chooses_the_parser(start_stack: StartStack) -> None:
    stack = await start_stack(tool_parser="mistral")
    stack.worker.say('[TOOL_CALLS]read[ARGS]{"path": "a"}')
    assert (await stack.chat(tools=TOOLS))["choices"][0]["finish_reason"] == "tool_calls"
