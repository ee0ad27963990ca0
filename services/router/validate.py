"""From a request's body to what it wants of the worker. Everything wrong is an InvalidRequest that names the parameter.

body = decode(raw, ChatRequest)                # JSON, types
wanted = wanted_of(body, defaults, ...)        # bounds
"""

from __future__ import annotations

import math
import os
import re
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import msgspec
import numpy as np

from tokenrelay.base.errors import InvalidRequest
from tokenrelay.proto import worker_pb2
from tokenrelay.services.router import limits
from tokenrelay.services.router.openai_types import ChatRequest, CompletionRequest, Generation
from tokenrelay.services.router.stops import StopAutomaton

T = TypeVar("T")

_PATH = re.compile(r" - at `(key in )?\$(.*)`$")
_MISSING = re.compile(r"missing required field `(\w+)`")


@dataclass(frozen=True, slots=True)
class Defaults:
    """What a model's generation_config.json says where a request says nothing (as vLLM takes it)."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    tokens_max: int | None = None
    end_token_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Wanted:
    """A validated request, but for its prompt. `sampling` is shared by its sequences; `logprobs`: None, or how many
    top ones.
    """

    sampling: worker_pb2.Sampling
    seed: int
    n: int
    tokens_max: int | None
    stops: StopAutomaton | None
    include_stop: bool
    logprobs: int | None
    token_ids: bool
    tokens_as_ids: bool
    skip_special: bool
    stream: bool
    include_usage: bool
    priority: int
    salt: bytes
    end_token_ids: frozenset[int] = frozenset()
    tps_floor: int = 0  # tokens a second that its user keeps; 0: the worker's floor
    expected_tokens: int = 0  # of output, likely; 0: nobody says
    session: bytes = b""  # whose next request finds this one's cache; empty: nobody says
    tools: bool = False  # it may end with a tool call, and then comes back with the results


def decode(raw: bytes, cls: type[T]) -> T:
    """Parse a body. Raises InvalidRequest that names the parameter for a wrong type."""
    try:
        return msgspec.json.decode(raw, type=cls)
    except msgspec.ValidationError as error:
        raise wrong_type(str(error)) from error
    except RecursionError as error:
        raise InvalidRequest("the body is nested too deeply", code="invalid_json") from error
    except UnicodeDecodeError as error:
        message = f"the body is not UTF-8: {error.reason} at byte {error.start}"
        raise InvalidRequest(message, code="invalid_json") from error
    except ValueError as error:
        raise InvalidRequest(f"the body is not valid JSON: {error}", code="invalid_json") from error


def convert(value: Any, cls: type[T], name: str) -> T:
    """A free-form part of a body as the struct it must be. Raises InvalidRequest that names the field."""
    try:
        return msgspec.convert(value, cls)
    except msgspec.ValidationError as error:
        raise wrong_type(str(error), name) from error


def wrong_type(text: str, name: str = "") -> InvalidRequest:
    """msgspec's message, `Expected … - at `$.messages[0].role``, with the path (below `name`) as the client has it."""
    found = _PATH.search(text)
    path = (name + found.group(2) if found else name).removeprefix(".")
    message = text[: found.start()] if found else text
    missing = _MISSING.search(message)
    if missing:
        path = f"{path}.{missing.group(1)}".removeprefix(".")
    path = path.replace("[...]", "")
    if message == "Expected `object`, got `array`" and not path:
        message = "the body must be a JSON object, not an array"
    return InvalidRequest(f"{path}: {message}" if path else message, param=path or None, code="invalid_type")


def check_range(name: str, value: float, bounds: tuple[float, float], *, open_minimum: bool = False) -> None:
    """Raise InvalidRequest unless the value is finite and within its bounds."""
    minimum, maximum = bounds
    low = value <= minimum if open_minimum else value < minimum
    if not math.isfinite(value) or low or value > maximum:
        interval = f"{'(' if open_minimum else '['}{minimum:g}, {maximum:g}]"
        raise InvalidRequest(f"{name} must be in {interval}, not {_short(value)}", param=name, code="out_of_range")


def _short(value: float) -> str:
    return f"{value:g}" if isinstance(value, float) or abs(value) < 1 << 53 else "a number that large"


def check_free_form(name: str, value: Any) -> None:
    """Raise InvalidRequest for free-form JSON that nests deeper, or has larger integers, than anyone needs."""
    level: list[Any] = [value]
    for _ in range(limits.JSON_DEPTH_MAX + 1):
        if not level:
            return
        following: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                following.extend(item.values())
            elif isinstance(item, list):
                following.extend(item)
            elif isinstance(item, int) and item.bit_length() > limits.INTEGER_BITS_MAX:
                raise InvalidRequest(f"{name} has an integer that is too large", param=name, code="out_of_range")
        level = following
    raise InvalidRequest(
        f"{name} is nested deeper than {limits.JSON_DEPTH_MAX} levels", param=name, code="out_of_range"
    )


def wanted_of(body: ChatRequest | CompletionRequest, defaults: Defaults, vocabulary_size: int) -> Wanted:
    """Check every parameter of a request but its prompt. Raises InvalidRequest that names the first that is wrong."""
    _refuse_unsupported(body)
    n = 1 if body.n is None else body.n
    check_range("n", n, (1, limits.CHOICES_MAX))
    tokens_max = _tokens_max(body, defaults)
    stops = _stop_strings(body)
    logprobs = _logprobs(body)
    _check_extras(body)
    if body.seed is not None:
        check_range("seed", body.seed, limits.SEED)
    seed = int.from_bytes(os.urandom(8), "little") if body.seed is None else body.seed & ((1 << 64) - 1)
    salt = (body.cache_salt or "").encode("utf-8", "replace")
    if len(salt) > limits.CACHE_SALT_BYTES_MAX:
        raise InvalidRequest(f"cache_salt is longer than {limits.CACHE_SALT_BYTES_MAX} bytes", param="cache_salt")
    if body.stream_options is not None and not body.stream:
        raise InvalidRequest("stream_options needs stream: true", param="stream_options")
    return Wanted(
        sampling=_sampling(body, defaults, vocabulary_size, logprobs, tokens_max),
        seed=seed,
        n=n,
        tokens_max=tokens_max,
        stops=StopAutomaton(stops) if stops else None,
        include_stop=bool(body.include_stop_str_in_output),
        logprobs=logprobs,
        token_ids=bool(body.return_token_ids),
        tokens_as_ids=bool(body.return_tokens_as_token_ids),
        skip_special=body.skip_special_tokens is not False,
        stream=bool(body.stream),
        include_usage=body.stream_options is not None and bool(body.stream_options.include_usage),
        priority=body.priority or 0,
        tps_floor=body.tps_floor or 0,
        expected_tokens=body.expected_output_tokens or 0,
        salt=salt,
        session=(body.prompt_cache_key or "").encode("utf-8", "replace"),
        end_token_ids=frozenset(defaults.end_token_ids),
    )


def _check_extras(body: Generation) -> None:
    hints = (
        ("priority", body.priority, limits.PRIORITY),
        ("tps_floor", body.tps_floor, limits.TPS_FLOOR),
        ("expected_output_tokens", body.expected_output_tokens, limits.EXPECTED_TOKENS),
    )
    for name, value, bounds in hints:
        if value is not None:
            check_range(name, value, bounds)
    if isinstance(body, ChatRequest) and body.thinking_token_budget is not None:
        check_range("thinking_token_budget", body.thinking_token_budget, limits.THINKING_BUDGET)


def _refuse_unsupported(body: Generation) -> None:
    """Fields that other servers honour and that would change the answer: a clear refusal, no silent other answer."""
    refused: list[tuple[str, bool, str]] = [
        ("best_of", body.best_of is not None and body.best_of != (body.n or 1), "choose among n answers yourself"),
        ("use_beam_search", bool(body.use_beam_search), "beam search is not supported"),
        ("prompt_logprobs", body.prompt_logprobs is not None, "log-probabilities of the prompt are not supported"),
    ]
    if isinstance(body, CompletionRequest):
        refused.append(("echo", bool(body.echo), "echo is not supported; /tokenize shows a prompt's tokens"))
        refused.append(("suffix", bool(body.suffix), "insertion is not supported"))
    if isinstance(body, ChatRequest):
        refused += [
            ("chat_template", body.chat_template is not None, "the model's own template is used"),
            ("continue_final_message", bool(body.continue_final_message), "a final message cannot be continued"),
            ("functions", body.functions is not None, "deprecated by OpenAI; use tools"),
            ("function_call", body.function_call is not None, "deprecated by OpenAI; use tool_choice"),
            ("modalities", body.modalities not in (None, ["text"]), "only text is supported"),
            ("audio", body.audio is not None, "only text is supported"),
        ]
    for name, present, reason in refused:
        if present:
            raise InvalidRequest(f"{name}: {reason}", param=name, code="unsupported_parameter")


def _tokens_max(body: ChatRequest | CompletionRequest, defaults: Defaults) -> int | None:
    name, value = "max_tokens", body.max_tokens
    if isinstance(body, ChatRequest) and body.max_completion_tokens is not None:
        name, value = "max_completion_tokens", body.max_completion_tokens
    if value is not None:
        check_range(name, value, (1, limits.TOKEN_ID_MAX))
    tokens_max = defaults.tokens_max if value is None else value
    if body.min_tokens is not None:
        check_range("min_tokens", body.min_tokens, (0, limits.TOKEN_ID_MAX if tokens_max is None else tokens_max))
    return tokens_max


def _stop_strings(body: Generation) -> list[str]:
    stops = [] if body.stop is None else [body.stop] if isinstance(body.stop, str) else body.stop
    if len(stops) > limits.STOPS_MAX:
        raise InvalidRequest(f"stop has {len(stops)} strings, at most {limits.STOPS_MAX}", param="stop")
    for index, stop in enumerate(stops):
        name = "stop" if isinstance(body.stop, str) else f"stop[{index}]"
        if not stop:
            raise InvalidRequest(f"{name} is empty", param=name)
        if len(stop) > limits.STOP_CHARS_MAX:
            raise InvalidRequest(f"{name} is longer than {limits.STOP_CHARS_MAX} characters", param=name)
    return stops


def _logprobs(body: ChatRequest | CompletionRequest) -> int | None:
    """How many top log-probabilities are wanted beside the sampled token's; None: none at all."""
    if isinstance(body, CompletionRequest):
        if body.logprobs is not None:
            check_range("logprobs", body.logprobs, (0, limits.TOP_LOGPROBS_MAX))
        return body.logprobs
    if body.top_logprobs is not None:
        check_range("top_logprobs", body.top_logprobs, (0, limits.TOP_LOGPROBS_MAX))
        if not body.logprobs and body.top_logprobs > 0:
            raise InvalidRequest("top_logprobs needs logprobs: true", param="top_logprobs")
    return (body.top_logprobs or 0) if body.logprobs else None


def _sampling(
    body: Generation, defaults: Defaults, vocabulary_size: int, logprobs: int | None, tokens_max: int | None
) -> worker_pb2.Sampling:
    temperature = defaults.temperature if body.temperature is None else body.temperature
    top_p = defaults.top_p if body.top_p is None else body.top_p
    min_p = defaults.min_p if body.min_p is None else body.min_p
    top_k = defaults.top_k if body.top_k is None else body.top_k
    repetition = defaults.repetition_penalty if body.repetition_penalty is None else body.repetition_penalty
    check_range("temperature", temperature, limits.TEMPERATURE)
    check_range("top_p", top_p, (0.0, 1.0), open_minimum=True)
    check_range("min_p", min_p, (0.0, 1.0))
    check_range("top_k", top_k, (-1, limits.TOP_K_MAX))
    check_range("repetition_penalty", repetition, limits.REPETITION_PENALTY)
    check_range("presence_penalty", body.presence_penalty or 0.0, limits.PENALTY)
    check_range("frequency_penalty", body.frequency_penalty or 0.0, limits.PENALTY)
    ignore_eos = bool(body.ignore_eos)
    stop_ids = list(body.stop_token_ids or ())
    if len(stop_ids) > limits.STOP_TOKEN_IDS_MAX:
        message = f"stop_token_ids has {len(stop_ids)} ids, at most {limits.STOP_TOKEN_IDS_MAX}"
        raise InvalidRequest(message, param="stop_token_ids")
    check_token_ids("stop_token_ids", stop_ids, vocabulary_size)
    if not ignore_eos:
        stop_ids += [token_id for token_id in defaults.end_token_ids if token_id not in stop_ids]
    return worker_pb2.Sampling(
        temperature=temperature,
        top_p=top_p,
        top_k=max(top_k, 0),
        min_p=min_p,
        presence_penalty=body.presence_penalty or 0.0,
        frequency_penalty=body.frequency_penalty or 0.0,
        repetition_penalty=repetition,
        logit_bias=_logit_bias(body.logit_bias or {}, vocabulary_size),
        stop_token_ids=stop_ids,
        ignore_eos=ignore_eos,
        logprobs=0 if logprobs is None else logprobs + 1,
        tokens_min=body.min_tokens or 0,
    )


def _logit_bias(given: dict[str, float], vocabulary_size: int) -> list[worker_pb2.LogitBias]:
    if len(given) > limits.LOGIT_BIAS_MAX:
        raise InvalidRequest(
            f"logit_bias has {len(given)} entries, at most {limits.LOGIT_BIAS_MAX}", param="logit_bias"
        )
    entries = []
    for key, bias in given.items():
        if not (key.isascii() and key.isdigit() and len(key) <= 10 and int(key) < vocabulary_size):
            message = f"logit_bias: {key[:32]!r} is not a token id below {vocabulary_size}"
            raise InvalidRequest(message, param="logit_bias")
        check_range("logit_bias", bias, limits.LOGIT_BIAS)
        entries.append(worker_pb2.LogitBias(token_id=int(key), bias=bias))
    return entries


def packed_token_ids(name: str, token_ids: Sequence[int], vocabulary_size: int) -> bytes:
    """As the wire has them, checked like `check_token_ids`, but for prompts of any length: 10 ns an id."""
    try:
        packed = array("I", token_ids)
    except OverflowError:
        packed = array("I")
    if len(packed) != len(token_ids) or (
        len(packed) and int(np.frombuffer(packed, np.uint32).max()) >= vocabulary_size
    ):
        check_token_ids(name, token_ids, vocabulary_size)
    return packed.tobytes()


def check_token_ids(name: str, token_ids: Sequence[int], vocabulary_size: int) -> None:
    """Raise InvalidRequest for an id that the model does not have."""
    if token_ids and (min(token_ids) < 0 or max(token_ids) >= vocabulary_size):
        raise InvalidRequest(f"{name}: token ids are in [0, {vocabulary_size})", param=name, code="out_of_range")
