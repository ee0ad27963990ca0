"""Chat templates render as transformers renders them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tokenrelay.base.errors import InvalidRequest
from tokenrelay.services.router.template import ChatTemplate

BUNDLED = Path(__file__).resolve().parents[2] / "assets/tokenrelay-tiny"
MESSAGES = [
    {"role": "system", "content": "Be short."},
    {"role": "user", "content": "Größe <b> 'quoted'?"},
    {
        "thinking": "hm",  # conversation.py says it twice, as transformers does
        "role": "assistant",
        "content": "",
        "reasoning_content": "hm",
        "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {"a": "é", "b": [1, None]}}}],
    },
    {"role": "tool", "content": "5"},
]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "f",
            "description": "does <this> & that",
            "parameters": {"type": "object", "properties": {"a": {"type": "string"}}},
        },
    }
]
FEATURES = """\
{% for message in messages %}
  {% if loop.index0 == 1 %}{% continue %}{% endif %}
  {{ message.role }}: {{ message | tojson }}
{% generation %}said: {{ message.content }}{% endgeneration %}

{% endfor %}
{%- set ns = namespace(n=0) %}{% set ns.n = 5 %}{{ ns.n }}{{ bos_token }}
{{ tools | tojson(indent=2) if tools }}{{ strftime_now("%Y") | length }}{{ extra }}
"""


def transformers_render(template: str, messages: list[Any], **variables: Any) -> str:
    """The reference, where transformers is installed (it is a development dependency)."""
    chat_template_utils = pytest.importorskip("transformers.utils.chat_template_utils")
    rendered, _ = chat_template_utils.render_jinja_template([messages], chat_template=template, **variables)
    return str(rendered[0])


@pytest.mark.parametrize("tools", [None, TOOLS])
@pytest.mark.parametrize(
    "template", [FEATURES, (BUNDLED / "chat_template.jinja").read_text()], ids=["features", "bundled"]
)
def test_equals_transformers(template: str, tools: list[Any] | None) -> None:
    ours = ChatTemplate({"default": template}, {"bos_token": "<s>"})
    expected = transformers_render(
        template, MESSAGES, tools=tools, add_generation_prompt=True, bos_token="<s>", extra="more"
    )
    assert ours.render(MESSAGES, tools=tools, extra={"extra": "more"}) == expected


def test_sources(tmp_path: Path) -> None:
    assert ChatTemplate.load(tmp_path, {}) is None
    config: dict[str, Any] = {"chat_template": "config {{ eos_token }}", "eos_token": {"content": "<e>"}}
    loaded = ChatTemplate.load(tmp_path, config)
    assert loaded is not None
    assert loaded.render([]) == "config <e>"
    config["chat_template"] = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "tools"}]
    named = ChatTemplate.load(tmp_path, config)
    assert named is not None
    assert (named.render([]), named.render([], tools=TOOLS)) == ("plain", "tools")
    (tmp_path / "chat_template.jinja").write_text("file")
    from_file = ChatTemplate.load(tmp_path, config)
    assert from_file is not None
    assert from_file.render([]) == "file"


def test_a_template_cannot_reach_out() -> None:
    for source in ("{{ ''.__class__.__base__.__subclasses__() }}", "{{ messages.append(1) }}", "{% include 'x' %}"):
        with pytest.raises(InvalidRequest):
            ChatTemplate({"default": source}).render([{"role": "user"}])


def test_messages_are_not_changed_by_rendering() -> None:
    before = json.dumps(MESSAGES)
    ChatTemplate({"default": FEATURES}).render(MESSAGES, tools=TOOLS)
    assert json.dumps(MESSAGES) == before
