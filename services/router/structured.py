"""What an answer must be: `response_format`, `structured_outputs` and their kin, and calls that must be made, as one
grammar for the worker's sampler.

    maker = GrammarMaker(tokenizer_file)                  # one per model
    if constrained(body):
        grammar = maker.grammar(body, tools, formats, inside=False)      # in a thread

A budget for reasoning (`thinking_token_budget`) is part of it: so many tokens, then the closing tag must come. Models
whose tags are no tokens of their own have no such budget.

Grammars are llguidance's Lark (https://github.com/guidance-ai/llguidance/blob/main/docs/syntax.md), so that a schema, a
regex, a choice and the reasoning before them are one text. Everything wrong is an InvalidRequest that names the
parameter. Sizes are bounded here, the work of reading and of each mask by llguidance's own limits.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from tokenrelay.base.errors import InvalidRequest
from tokenrelay.services.router import limits
from tokenrelay.services.router.openai_types import ChatRequest, Generation
from tokenrelay.services.router.tool_formats import Formats, Think
from tokenrelay.services.router.validate import check_free_form

ANY_OBJECT: dict[str, Any] = {"type": "object"}
# Arguments of a call are written as models of the family write JSON: with a space behind `:` and `,`.
_STYLE = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
# Else as it likes, but not for ever: a model that has begun with white space may never end.
_SPACED = {"whitespace_pattern": r"[ \n\r\t]{1,40}"}
_PLACE = re.compile(r"^at \d+\(\d+\): ")  # in the text that was made here: nothing a client knows
_START = re.compile(r"(?m)^start(?=\s*:)")

Tag = Callable[[str], str | None]  # a special token as Lark names it; None for what is none


def constrained(body: Generation) -> bool:
    """Whether the request may say what the answer must be."""
    fields = (body.response_format, body.structured_outputs, body.guided_json, body.guided_regex)
    forced = isinstance(body, ChatRequest) and (
        body.tool_choice not in (None, "auto", "none") or body.thinking_token_budget is not None
    )
    return forced or any(field is not None for field in (*fields, body.guided_choice, body.guided_grammar))


@dataclass(frozen=True)
class Form:
    """What the answer must be: Lark rules of which `tr_answer` is it; the parameter that asked."""

    rules: str
    param: str


def thought_rules(think: Think | None, tag: Tag, *, inside: bool) -> str:
    """`tr_thought`: reasoning that the model may begin, or its rest where the prompt has begun it."""
    if think is None:
        return 'tr_thought: ""'
    opened, closed = tag(think[0]) or _literal(think[0]), tag(think[1])
    if closed is not None:
        rest, rules = rf"/(.|\n)*/ {closed} /\n*/", ""
    else:
        ending = re.escape(think[1]).replace("/", r"\/")
        rest, rules = r"tr_rest /\n*/", f"\ntr_rest[lazy]: /(.|\\n)*{ending}/"
    return f"tr_thought: {rest if inside else f'({opened} {rest})?'}{rules}"


@dataclass(frozen=True)
class Budget:
    """How many tokens of reasoning there may be, between two tokens."""

    tokens: int
    opened: int
    closed: int

    @classmethod
    def of(cls, body: Generation, formats: Formats | None, token_id: Callable[[str], int | None]) -> Budget | None:
        """What the request asks for, where the model's tags can be told from text; None: there is no bound."""
        asked = body.thinking_token_budget if isinstance(body, ChatRequest) else None
        if asked is None or formats is None or formats.think is None:
            return None
        opened, closed = (token_id(tag) for tag in formats.think)
        return cls(asked, opened, closed) if opened is not None and closed is not None else None

    def rules(self, *, inside: bool) -> str:
        """`tr_thought`, as `thought_rules` has it."""
        thought = f"<[^{self.closed}]>{{0,{self.tokens}}} " if self.tokens else ""
        rest = f"{thought}<[{self.closed}]>"
        return f"tr_thought: {rest if inside else f'(<[{self.opened}]> {rest})?'}"

    @property
    def free(self) -> str:
        """`tr_answer` where nothing is asked of it: anything, but no reasoning once more at its beginning."""
        return f"tr_answer: (<[^{self.opened}]> <[*]>*)?"


def form_of(body: Generation, tools: Sequence[Mapping[str, Any]] | None, formats: Formats, tag: Tag) -> Form | None:
    """What the request asks for. Raises InvalidRequest that names the parameter."""
    forms = [form for form in (_response_format(body), _structured(body)) if form]
    if len(forms) > 1:
        raise _refuse(forms[1].param, f"{forms[0].param} is there, too; only one can be followed")
    forced = _forced(body, tools)
    if forced is not None:
        calls = _call_rules(forced, body, formats, tag, "tool_choice")
        form: Form | None = Form(f"tr_answer: tr_calls\n{calls}", "tool_choice")
    elif forms and tools:
        calls = _call_rules([tool["function"] for tool in tools], body, formats, tag, forms[0].param)
        given = _START.sub("tr_form", forms[0].rules.replace("tr_answer:", "tr_form:", 1))
        form = Form(f"tr_answer: tr_form | tr_calls\n{given}\n{calls}", forms[0].param)
    else:
        form = forms[0] if forms else None
    for name in ("ignore_eos", "min_tokens"):
        if form is not None and getattr(body, name):
            raise _refuse(name, f"cannot be used with {form.param}")
    return form


def _refuse(name: str, reason: str) -> InvalidRequest:
    return InvalidRequest(f"{name}: {reason}", param=name)


def _response_format(body: Generation) -> Form | None:
    given, name = body.response_format, "response_format"
    if given is None or given == {"type": "text"}:
        return None
    if not isinstance(given, dict):
        raise _refuse(name, "expected an object")
    kind = given.get("type")
    if kind == "text":
        return None
    if kind == "json_object":
        return Form(f"tr_answer: {_json(ANY_OBJECT, name)}", name)
    if kind != "json_schema":
        raise _refuse(f"{name}.type", 'expected "text", "json_object" or "json_schema"')
    schema = given.get("json_schema")
    if not isinstance(schema, dict) or not isinstance(schema.get("schema"), dict | None):
        raise _refuse(f"{name}.json_schema", "expected an object with a schema")
    return Form(f"tr_answer: {_json(schema.get('schema') or ANY_OBJECT, f'{name}.json_schema.schema')}", name)


def _structured(body: Generation) -> Form | None:
    """`structured_outputs` as vLLM has it, and the older `guided_*`: exactly one of json, regex, choice, grammar."""
    given = body.structured_outputs
    if given is not None and not isinstance(given, dict):
        raise _refuse("structured_outputs", "expected an object")
    asked: list[tuple[str, str, Any]] = []
    for kind in ("json", "json_object", "regex", "choice", "grammar"):
        if given is not None and given.get(kind) not in (None, False):
            asked.append((f"structured_outputs.{kind}", kind, given[kind]))
        older = getattr(body, f"guided_{kind}", None)
        if older is not None:
            asked.append((f"guided_{kind}", kind, older))
    if len(asked) > 1:
        raise _refuse(asked[1][0], f"{asked[0][0]} is there, too; only one can be followed")
    if given is not None and not asked:
        raise _refuse("structured_outputs", "expected one of json, json_object, regex, choice and grammar")
    return Form(_rules(*asked[0]), asked[0][0]) if asked else None


def _rules(name: str, kind: str, value: Any) -> str:
    if kind == "json_object":
        return f"tr_answer: {_json(ANY_OBJECT, name)}"
    if kind == "json":
        return f"tr_answer: {_json(_parsed(name, value), name)}"
    if kind == "choice":
        return f"tr_answer: {_choice(name, value)}"
    if not isinstance(value, str) or not value:
        raise _refuse(name, "expected a text")
    if len(value) > limits.GRAMMAR_CHARS_MAX:
        raise _refuse(name, f"longer than {limits.GRAMMAR_CHARS_MAX} characters")
    return f"tr_answer: {_regex(value)}" if kind == "regex" else _own_grammar(name, value)


def _regex(text: str) -> str:
    """A regex as Lark writes it, with no `/` and no line break that would end it."""
    import llguidance

    lark: str = json.loads(llguidance.LLMatcher.grammar_from_regex(text))["grammars"][0]["lark_grammar"]
    return lark.removeprefix("start: ")


def _own_grammar(name: str, text: str) -> str:
    """The client's grammar, in Lark or in GBNF (`root ::= …`)."""
    if "::=" in text:
        from llguidance.gbnf_to_lark import any_to_lark

        try:
            text = any_to_lark(text)
        except Exception as error:  # a small parser that raises what it meets
            raise _refuse(name, f"not a grammar: {str(error)[:200]}") from error
    if not _START.search(text):
        raise _refuse(name, "a Lark grammar has a rule named start, a GBNF grammar one named root")
    return _START.sub("tr_answer", text)


def _parsed(name: str, value: Any) -> dict[str, Any]:
    """A schema, or its text."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise _refuse(name, "not valid JSON") from None
    if not isinstance(value, dict):
        raise _refuse(name, "expected a JSON schema")
    return value


def _choice(name: str, value: Any) -> str:
    if not isinstance(value, list) or not value or not all(isinstance(one, str) and one for one in value):
        raise _refuse(name, "expected texts to choose from")
    if len(value) > limits.CHOICE_MAX:
        raise _refuse(name, f"{len(value)} texts, at most {limits.CHOICE_MAX}")
    return " | ".join(_literal(one) for one in value)


def _literal(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _json(schema: Mapping[str, Any], name: str, **style: Any) -> str:
    check_free_form(name, dict(schema))
    text = json.dumps({**schema, "x-guidance": style or _SPACED}, ensure_ascii=False)
    if len(text) > limits.GRAMMAR_CHARS_MAX:
        raise _refuse(name, f"longer than {limits.GRAMMAR_CHARS_MAX} characters")
    return f"%json {text}"


# -- calls that must be made ------------------------------------------------------------------------------------------
def _forced(body: Generation, tools: Sequence[Mapping[str, Any]] | None) -> list[Mapping[str, Any]] | None:
    """The functions one of which must be called: `tool_choice` "required", or a named one."""
    choice = body.tool_choice if isinstance(body, ChatRequest) else None
    if choice is None or choice in ("auto", "none"):
        return None
    functions = [tool["function"] for tool in tools or ()]
    if isinstance(choice, dict):
        function = choice.get("function")
        wanted = function.get("name") if choice.get("type") == "function" and isinstance(function, dict) else None
        if not isinstance(wanted, str):
            raise _refuse("tool_choice", 'expected {"type": "function", "function": {"name": …}}')
        functions = [one for one in functions if one["name"] == wanted]
        if not functions:
            raise _refuse("tool_choice", f"there is no tool {wanted[:64]!r}")
    if not functions:
        raise _refuse("tool_choice", "there are no tools to choose from")
    return functions


def _call_rules(
    functions: Sequence[Mapping[str, Any]], body: Generation, formats: Formats, tag: Tag, param: str
) -> str:
    """`tr_calls`: one call, or several, each on a line of its own, as Hermes and Qwen write them."""
    if formats.tool_format is None or formats.tool_format.name != "hermes":
        written = formats.tool_format.name if formats.tool_format is not None else "channel"
        message = f"{param}: calls cannot be constrained on a model that writes them as {written!r} does"
        raise InvalidRequest(message, param=param, code="unsupported_parameter")
    opened, closed = (tag(one) or _literal(one) for one in ("<tool_call>", "</tool_call>"))
    choice = body.tool_choice if isinstance(body, ChatRequest) else None
    single = isinstance(choice, dict) or (isinstance(body, ChatRequest) and body.parallel_tool_calls is False)
    bodies, rules = [], []
    for index, function in enumerate(functions):
        head = _literal(f'\n{{"name": {json.dumps(function["name"], ensure_ascii=False)}, "arguments": ')
        bodies.append(f'{head} tr_arguments_{index} "}}\\n"')
        arguments = _json(function.get("parameters") or ANY_OBJECT, f"tools[{index}].function.parameters", **_STYLE)
        rules.append(f"tr_arguments_{index}: {arguments}")
    many = "" if single else ' ("\\n" tr_call)*'
    call = f"tr_call: {opened} ({' | '.join(bodies)}) {closed}"
    return "\n".join([f"tr_calls: tr_call{many}", call, *rules])


# -- whether it can be followed ---------------------------------------------------------------------------------------
class GrammarMaker:
    """Makes grammars for one model, and reads them as its workers will, so that what cannot be followed is refused
    here. Any thread.
    """

    def __init__(self, tokenizer_file: Path) -> None:
        self._file = tokenizer_file
        self._lock = threading.Lock()
        self._tokens: tuple[Any, Tokenizer] | None = None

    def grammar(
        self, body: Generation, tools: Sequence[Mapping[str, Any]] | None, formats: Formats | None, *, inside: bool
    ) -> str:
        """The grammar of a request's answers; empty where nothing is asked. `formats` None: a text completion.
        Raises InvalidRequest for one that cannot be followed. Up to a second for the largest ones.
        """
        import llguidance

        tokenizer, names = self._load()

        def tag(name: str) -> str | None:
            token_id = names.token_to_id(name)
            return f"<[{token_id}]>" if token_id is not None and tokenizer.is_special_token(token_id) else None

        form = form_of(body, tools, formats or Formats(None, None), tag)
        budget = Budget.of(body, formats, names.token_to_id)
        if form is None and budget is None:
            return ""
        if budget is not None:
            breaks = "" if form is None else r" /\n*/"
            thought = budget.rules(inside=inside) + breaks
            form = form or Form(budget.free, "thinking_token_budget")
        else:
            thought = thought_rules(formats.think if formats is not None else None, tag, inside=inside)
        assert form is not None
        grammar = f"start: tr_thought tr_answer\n{thought}\n{form.rules}\n"
        failed, messages = llguidance.LLMatcher.validate_grammar_with_warnings(grammar, tokenizer)
        if failed:
            reason = _PLACE.sub("", messages[0].partition("\n")[0]) if messages else "it cannot be read"
            raise InvalidRequest(f"{form.param}: {reason[:500]}", param=form.param, code="invalid_grammar")
        return grammar

    def _load(self) -> tuple[Any, Tokenizer]:
        import llguidance

        with self._lock:
            if self._tokens is None:
                self._tokens = llguidance.LLTokenizer(str(self._file)), Tokenizer.from_file(str(self._file))
            return self._tokens
