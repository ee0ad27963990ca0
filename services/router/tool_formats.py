"""How models write calls and reasoning: chosen by what their chat template shows, or by `--tool-parser` and
`--reasoning-parser`.

    formats = choose(template.source, tool_parser="auto", reasoning_parser="auto")
    formats.parser(tools)          # for one sequence
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tokenrelay.services.router import channels
from tokenrelay.services.router.tool_pairs import DsmlParser, GlmParser, QwenCoderParser
from tokenrelay.services.router.tool_parsers import (
    DeepSeekParser,
    HermesParser,
    KimiParser,
    LlamaParser,
    MistralParser,
)
from tokenrelay.services.router.tools import Parser

Tools = Sequence[Mapping[str, Any]]
Think = tuple[str, str]


@dataclass(frozen=True)
class ToolFormat:
    """One way to write calls. `tags` may be special tokens, which must then be in the text; `shown`: what a template
    that teaches this format has in it.
    """

    name: str
    make: Callable[[Tools], Parser]
    tags: tuple[str, ...]
    shown: str


# In the order in which a template is looked at: what is most particular comes first.
FORMATS: tuple[ToolFormat, ...] = (
    ToolFormat("dsml", DsmlParser, (), "<｜DSML｜invoke"),
    ToolFormat(
        "deepseek",
        lambda tools: DeepSeekParser(),
        (*DeepSeekParser.SECTION, DeepSeekParser.OPEN, "<｜tool▁sep｜>", DeepSeekParser.CLOSE),
        DeepSeekParser.OPEN,
    ),
    ToolFormat(
        "kimi",
        lambda tools: KimiParser(),
        (*KimiParser.SECTION, KimiParser.OPEN, "<|tool_call_argument_begin|>", KimiParser.CLOSE),
        KimiParser.OPEN,
    ),
    ToolFormat("mistral", lambda tools: MistralParser(), ("[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"), "[TOOL_CALLS]"),
    ToolFormat("qwen-coder", QwenCoderParser, ("<tool_call>", "</tool_call>"), "<function="),
    ToolFormat(
        "glm",
        GlmParser,
        ("<tool_call>", "</tool_call>", "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"),
        "<arg_key>",
    ),
    ToolFormat("hermes", lambda tools: HermesParser(), ("<tool_call>", "</tool_call>"), "<tool_call>"),
    ToolFormat("llama3", lambda tools: LlamaParser(), (LlamaParser.TAG,), LlamaParser.TAG),
)
_LLAMA_TOO = "Environment: ipython"  # what Llama 3's templates have where they do not show the tag
CHANNEL = "channel"
BY_NAME = {one.name: one for one in FORMATS}
TOOL_PARSERS = ("auto", *BY_NAME, CHANNEL)

THINK: Think = ("<think>", "</think>")
THINK_TAGS: tuple[Think, ...] = (THINK, ("[THINK]", "[/THINK]"))
REASONING_PARSERS = ("auto", "think", CHANNEL, "none")


@dataclass(frozen=True)
class Formats:
    """What a model's replies are read with. `tool_format` None: in channels, reasoning too. `think`: the tags around
    reasoning; None: there is none.
    """

    tool_format: ToolFormat | None
    think: Think | None

    @property
    def tags(self) -> tuple[str, ...]:
        """What must be in the text although it may be a special token."""
        calls = self.tool_format.tags if self.tool_format is not None else channels.TAGS
        return (*calls, *(self.think or ()))

    @property
    def channels(self) -> bool:
        """Whether replies are in channels: then each is parsed, with or without tools."""
        return self.tool_format is None

    def parser(self, tools: Tools | None) -> Parser | None:
        """For one sequence; None where nothing needs one."""
        if self.tool_format is None:
            return channels.ChannelParser(tools=bool(tools))
        return self.tool_format.make(tools) if tools else None


def choose(
    template: str,
    *,
    tool_parser: str = "auto",
    reasoning_parser: str = "auto",
    has_token: Callable[[str], bool] = lambda token: False,
) -> Formats:
    """The formats of a model. `has_token`: whether a tag is one of its tokens, which says that it thinks."""
    if (
        tool_parser == CHANNEL
        or reasoning_parser == CHANNEL
        or (tool_parser == reasoning_parser == "auto" and channels.CHANNEL in template)
    ):
        return Formats(None, None)
    shown = next((one for one in FORMATS if one.shown in template), None)
    if shown is None:
        shown = BY_NAME["llama3" if _LLAMA_TOO in template else "hermes"]
    found = next((think for think in THINK_TAGS if has_token(think[1]) or think[1] in template), None)
    if reasoning_parser != "auto":
        found = None if reasoning_parser == "none" else found or THINK
    return Formats(shown if tool_parser == "auto" else BY_NAME[tool_parser], found)
