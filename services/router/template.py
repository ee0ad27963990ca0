"""Chat templates: the conversation as the text a model was trained on.

    template = ChatTemplate.load(folder)                       # None: the model has none
    prompt = template.render(messages, tools=tools, add_generation_prompt=True)

The environment is the one transformers documents for `apply_chat_template`: a sandboxed, immutable Jinja with
trim_blocks and lstrip_blocks, loop controls, `tojson` without HTML escapes, `raise_exception`, `strftime_now`, and
`{% generation %}` blocks that leave their body as it is. Sources, in order: chat_template.jinja, then
`chat_template` of tokenizer_config.json, which may also be a list of named templates ("tool_use" is taken when there
are tools).
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from tokenrelay.base.errors import CheckpointError, InvalidRequest

RENDERED_CHARS_MAX = 64 << 20
_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
RESERVED = frozenset({"messages", "tools", "add_generation_prompt", *_SPECIAL_TOKENS})


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` marks what the assistant says, for training; here it changes nothing."""

    tags = {"generation"}  # noqa: RUF012 - the base class declares it like this

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Refused(jinja2.TemplateError):
    """The template called raise_exception: its message is for the client."""


def _raise_exception(message: object) -> None:
    raise _Refused(str(message))


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _strftime_now(form: str) -> str:
    return datetime.datetime.now().astimezone().strftime(form)


def _environment() -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


class ChatTemplate:
    """One model's templates, by name; "default" is always there. Rendering is thread-safe."""

    def __init__(self, sources: Mapping[str, str], special_tokens: Mapping[str, str] | None = None) -> None:
        """Compile. A template that does not compile is kept as an error for each request: completions still work."""
        self._special_tokens = dict(special_tokens or {})
        self._templates: dict[str, jinja2.Template] = {}
        self.error: str | None = None
        self.source = sources["default"]
        environment = _environment()
        try:
            for name, source in sources.items():
                self._templates[name] = environment.from_string(source)
        except jinja2.TemplateSyntaxError as error:
            self.error = f"the model's chat template does not compile: line {error.lineno}: {error.message}"
        except Exception as error:  # a compiler that meets what nobody foresaw; the template is data
            self.error = f"the model's chat template does not compile: {type(error).__name__}: {error}"

    @staticmethod
    def load(folder: Path, config: Mapping[str, Any]) -> ChatTemplate | None:
        """The folder's template; `config` is its tokenizer_config.json. Raises CheckpointError for an unreadable
        one.
        """
        special_tokens = {name: _token_text(config[name]) for name in _SPECIAL_TOKENS if config.get(name)}
        file = folder / "chat_template.jinja"
        if file.is_file():
            try:
                return ChatTemplate({"default": file.read_text(encoding="utf-8")}, special_tokens)
            except (OSError, UnicodeDecodeError) as error:
                raise CheckpointError(f"{file}: cannot be read: {error}", file=str(file)) from error
        found = config.get("chat_template")
        if isinstance(found, list):
            named = {
                str(entry.get("name")): str(entry.get("template", "")) for entry in found if isinstance(entry, dict)
            }
            found = {"default": next(iter(named.values()), ""), **named} if named else None
        elif isinstance(found, str):
            found = {"default": found}
        else:
            found = None
        return ChatTemplate(found, special_tokens) if found else None

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        extra: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt. Raises InvalidRequest, naming `messages`, for whatever the template refuses or chokes on."""
        if self.error is not None:
            raise InvalidRequest(self.error, param="messages", code="chat_template_error")
        template = self._templates.get("tool_use", self._templates["default"]) if tools else self._templates["default"]
        variables = {**(extra or {}), **self._special_tokens}
        try:
            return self._bounded(
                lambda: template.generate(
                    variables, messages=messages, tools=tools, add_generation_prompt=add_generation_prompt
                )
            )
        except _Refused as error:
            message = f"the chat template refused the messages: {error}"
        except jinja2.TemplateError as error:
            message = f"the chat template failed on these messages: {error}"
        except Exception as error:  # the template is data: whatever it does wrong is no failure of the server
            message = f"the chat template failed on these messages: {type(error).__name__}: {str(error)[:200]}"
        raise InvalidRequest(message, param="messages", code="chat_template_error")

    @staticmethod
    def _bounded(generate: Callable[[], Any]) -> str:
        pieces, size = [], 0
        for piece in generate():
            size += len(piece)
            if size > RENDERED_CHARS_MAX:
                raise _Refused(f"it renders more than {RENDERED_CHARS_MAX} characters")
            pieces.append(piece)
        return "".join(pieces)


def _token_text(value: Any) -> str:
    """A special token in tokenizer_config.json is text, or an object with `content`."""
    return str(value.get("content", "")) if isinstance(value, dict) else str(value)
