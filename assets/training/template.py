"""Render messages with the bundled chat template the way transformers and the router do."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any, NoReturn

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

TEMPLATE = Path(__file__).resolve().parents[1] / "tokenrelay-tiny" / "chat_template.jinja"


def _raise(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def tojson(value: Any, ensure_ascii: bool = False) -> str:
    """As transformers has it: no HTML escapes, keys in their order."""
    return json.dumps(value, ensure_ascii=ensure_ascii)


@functools.cache
def template() -> jinja2.Template:
    """The compiled template."""
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = _raise
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8"))


def render(messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None = None, **options: Any) -> str:
    """Messages and tools, OpenAI-shaped, as the text the model reads. Raises jinja2.TemplateError."""
    return template().render(messages=messages, tools=tools, **options)
