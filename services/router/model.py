"""What the router knows of the model its workers run: names, tokenizer, template, defaults. Read from the model's
folder.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
from tokenizers import Tokenizer

from tokenrelay.base.errors import CheckpointError, InvalidRequest, NotFound, TokenRelayError
from tokenrelay.proto import worker_pb2
from tokenrelay.services.router import limits
from tokenrelay.services.router.config import RouterConfig
from tokenrelay.services.router.detokenize import Vocabulary
from tokenrelay.services.router.structured import GrammarMaker
from tokenrelay.services.router.template import ChatTemplate
from tokenrelay.services.router.tokenize import PromptTokenizer
from tokenrelay.services.router.tool_formats import Formats, choose
from tokenrelay.services.router.validate import Defaults, check_range

_TOKEN_BYTES_MAX = 256  # no token is longer than this; see `check_text`


@dataclass(frozen=True)
class ServedModel:
    """One model. `names[0]` is what replies say; `tag_ids` are special tokens that the parsers must see."""

    names: tuple[str, ...]
    folder: Path
    identity: bytes
    context_tokens: int
    vocabulary_size: int
    vocabulary: Vocabulary
    tokenizer: PromptTokenizer
    template: ChatTemplate | None
    defaults: Defaults
    formats: Formats
    tag_ids: frozenset[int]
    grammars: GrammarMaker
    created: int

    def check_name(self, name: str | None) -> None:
        """Raise NotFound for a model that is not served here; None is this one."""
        if name is not None and name not in self.names:
            raise NotFound(
                f"the model {name[:128]!r} is not served here; this server has {', '.join(self.names)}",
                param="model",
                code="model_not_found",
            )

    def check_text(self, text: str, param: str) -> None:
        """Refuse, before it is tokenized, a text that cannot fit whatever its tokens are."""
        if len(text) > self.context_tokens * _TOKEN_BYTES_MAX:
            raise context_exceeded(f"more than {len(text) // _TOKEN_BYTES_MAX}", self.context_tokens, param)

    def tokens_left(self, prompt_tokens: int, param: str) -> int:
        """Room for output. Raises InvalidRequest when there is none."""
        if prompt_tokens >= self.context_tokens:
            raise context_exceeded(str(prompt_tokens), self.context_tokens, param)
        return self.context_tokens - prompt_tokens


def context_exceeded(prompt_tokens: str, context_tokens: int, param: str) -> InvalidRequest:
    """OpenAI's refusal of a prompt that leaves no room."""
    return InvalidRequest(
        f"this model's maximum context length is {context_tokens} tokens, but the {param} resulted in {prompt_tokens}"
        " tokens, which leaves no room for an answer",
        param=param,
        code="context_length_exceeded",
    )


def load_model(reply: worker_pb2.HandshakeReply, config: RouterConfig, executor: Executor) -> ServedModel:
    """Read the folder that the worker (or the configuration) names. Raises CheckpointError; takes up to seconds."""
    folder = Path(config.model_dir or reply.model_path)
    tokenizer_file = folder / "tokenizer.json"
    spec = _read_json(tokenizer_file, required=True)
    try:
        tokenizer = Tokenizer.from_file(str(tokenizer_file))
    except Exception as error:  # the library raises bare Exception
        raise CheckpointError(f"{tokenizer_file}: not a tokenizer: {error}", file=str(tokenizer_file)) from error
    template = ChatTemplate.load(folder, _read_json(folder / "tokenizer_config.json"))
    vocabulary = Vocabulary(tokenizer, spec)
    formats = choose(
        template.source if template is not None else "",
        tool_parser=config.tool_parser,
        reasoning_parser=config.reasoning_parser,
        has_token=lambda tag: tokenizer.token_to_id(tag) is not None,
    )
    tag_ids = (tokenizer.token_to_id(tag) for tag in formats.tags)
    return ServedModel(
        names=(reply.model_name or folder.name, *config.model_alias),
        folder=folder,
        identity=reply.model_identity,
        context_tokens=reply.context_tokens,
        vocabulary_size=reply.vocab_size or vocabulary.size,
        vocabulary=vocabulary,
        tokenizer=PromptTokenizer(
            tokenizer,
            spec,
            cache_bytes=config.tokenizer_cache_bytes,
            inline_chars=config.tokenize_inline_chars,
            executor=executor,
        ),
        template=template,
        defaults=_defaults(folder / "generation_config.json", reply),
        formats=formats,
        tag_ids=frozenset(token_id for token_id in tag_ids if token_id is not None),
        grammars=GrammarMaker(tokenizer_file),
        created=int(time.time()),
    )


def _defaults(file: Path, reply: worker_pb2.HandshakeReply) -> Defaults:
    """Sampling defaults as vLLM takes them from generation_config.json; what is out of bounds there is a bad folder."""
    given = _read_json(file)
    try:
        temperature, top_p = _number(given, "temperature", 1.0), _number(given, "top_p", 1.0)
        min_p, repetition = _number(given, "min_p", 0.0), _number(given, "repetition_penalty", 1.0)
        top_k = int(_number(given, "top_k", 0))
        tokens_max = given.get("max_new_tokens")
        check_range("temperature", temperature, limits.TEMPERATURE)
        check_range("top_p", top_p, (0.0, 1.0), open_minimum=True)
        check_range("min_p", min_p, (0.0, 1.0))
        check_range("repetition_penalty", repetition, limits.REPETITION_PENALTY)
        check_range("top_k", top_k, (-1, limits.TOP_K_MAX))
    except (TokenRelayError, TypeError, ValueError) as error:
        raise CheckpointError(f"{file}: {error}", file=str(file)) from error
    end = given.get("eos_token_id")
    end_ids = end if isinstance(end, list) else [end]
    ids = {*reply.eos_token_ids, *(token_id for token_id in end_ids if isinstance(token_id, int) and token_id >= 0)}
    return Defaults(
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        repetition_penalty=repetition,
        tokens_max=tokens_max if isinstance(tokens_max, int) and tokens_max > 0 else None,
        end_token_ids=tuple(sorted(ids)),
    )


def _number(given: Mapping[str, Any], name: str, default: float) -> float:
    value = given.get(name)
    return default if value is None else float(value)


def _read_json(file: Path, *, required: bool = False) -> dict[str, Any]:
    """A JSON object; {} for a file that is not there. Raises CheckpointError naming the file."""
    try:
        value = msgspec.json.decode(file.read_bytes())
    except FileNotFoundError as error:
        if required:
            raise CheckpointError(f"{file} is missing", file=str(file)) from error
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: cannot be read: {error}", file=str(file)) from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{file}: not a JSON object", file=str(file))
    return value
