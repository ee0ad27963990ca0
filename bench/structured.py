"""What a grammar costs: llguidance, which the workers use, and xgrammar beside it where it is installed.

    pip install --no-deps xgrammar apache-tvm-ffi        # for both
    python bench/structured.py [--vocab 128000] [--json FILE]

The same documents, valid under the same schemas, are walked token by token with a vocabulary made up of words: the time
to import the library, to take over the vocabulary, to read a schema, and for each token's mask, in processor time.
docs/adr/0012 decided by it.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import random
import statistics
import string
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "bench"))

from scheduler import about  # noqa: E402 - once its folder is known

from tokenrelay.services.router.detokenize import byte_alphabet  # noqa: E402

CITY = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "people": {"type": "integer"}},
    "required": ["city", "people"],
    "additionalProperties": False,
}
WIDE = {
    "type": "object",
    "properties": {f"field_{n}": {"type": ["string", "integer", "boolean"][n % 3]} for n in range(30)},
    "required": [f"field_{n}" for n in range(30)],
    "additionalProperties": False,
}
WIDE_DOCUMENT = {f"field_{n}": [f"some words {n}", n, True][n % 3] for n in range(30)}
ENUM = {"enum": [f"choice number {n} of many" for n in range(1000)]}
TEXT = "It was the best of times, it was the worst of times. " * 20
CASES: dict[str, tuple[dict[str, Any], Any]] = {
    "city": (CITY, {"city": "Bern", "people": 134_000}),
    "30 fields": (WIDE, WIDE_DOCUMENT),
    "1000 choices": (ENUM, "choice number 731 of many"),
    "long text": ({"type": "object", "properties": {"text": {"type": "string"}}}, {"text": TEXT}),
}


def vocabulary(size: int) -> list[bytes]:
    """Every byte, then words with and without a space before, digits and what JSON is made of."""
    rng = random.Random(0)
    tokens = dict.fromkeys(bytes([byte]) for byte in range(256))
    tokens.update(dict.fromkeys(mark.encode() for mark in ('": "', '", "', '": ', '"}', '{"', ", ", "true", "false")))
    while len(tokens) < size - 1:
        word = "".join(rng.choices(string.ascii_letters, k=rng.randint(2, 10)))
        tokens[rng.choice(["", " ", " ", "_"]).encode() + word.encode()] = None
    return list(tokens)


def write_tokenizer(tokens: Sequence[bytes], file: Path) -> None:
    """The vocabulary as a tokenizer.json, the end token last."""
    letters = {byte: letter for letter, byte in byte_alphabet().items()}
    words = {"".join(letters[byte] for byte in token): index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE({**words, "<|end|>": len(tokens)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|end|>"])
    tokenizer.save(str(file))


def greedy(tokens: Sequence[bytes], text: bytes) -> list[int]:
    """The longest token at each place."""
    at = {token: index for index, token in enumerate(tokens)}
    ids, place = [], 0
    while place < len(text):
        length = next(n for n in range(min(16, len(text) - place), 0, -1) if text[place : place + n] in at)
        ids.append(at[text[place : place + length]])
        place += length
    return ids


def timed(call: Callable[[], Any]) -> tuple[Any, float]:
    """(what it gave, milliseconds of processor time)."""
    began = time.process_time_ns()
    result = call()
    return result, (time.process_time_ns() - began) / 1e6


def import_ms(name: str) -> float:
    """In a process of its own."""
    code = f"import time; t = time.process_time(); import {name}; print(1000 * (time.process_time() - t))"
    return float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)


def llguidance_figures(tokens: Sequence[bytes], file: Path) -> dict[str, float]:
    """All rows of llguidance."""
    import llguidance

    tokenizer, setup_ms = timed(lambda: llguidance.LLTokenizer(str(file), eos_token=[len(tokens)]))
    figures = {"import_ms": import_ms("llguidance"), "vocabulary_ms": setup_ms}
    for name, (schema, document) in CASES.items():
        grammar = f"start: %json {json.dumps({**schema, 'x-guidance': {'whitespace_flexible': False}})}"
        matcher, read_ms = timed(lambda grammar=grammar: llguidance.LLMatcher(tokenizer, grammar))  # type: ignore[misc]
        assert not matcher.is_error(), matcher.get_error()
        written = json.dumps(document, separators=(",", ":")).encode()
        masks = []
        for token in greedy(tokens, written):
            masks.append(timed(matcher.compute_bitmask)[1])
            assert matcher.consume_token(token), name
        figures |= rows(name, read_ms, masks)
    return figures


def xgrammar_figures(tokens: Sequence[bytes]) -> dict[str, float]:
    """All rows of xgrammar."""
    import xgrammar

    vocab: list[Any] = [*tokens, b"<|end|>"]
    info, setup_ms = timed(
        lambda: xgrammar.TokenizerInfo(
            vocab, xgrammar.VocabType.RAW, vocab_size=len(vocab), stop_token_ids=[len(tokens)]
        )
    )
    compiler = xgrammar.GrammarCompiler(info, max_threads=1, cache_enabled=False)
    figures = {"import_ms": import_ms("xgrammar"), "vocabulary_ms": setup_ms}
    bitmask = xgrammar.allocate_token_bitmask(1, len(vocab))
    for name, (schema, document) in CASES.items():
        compiled, read_ms = timed(
            lambda schema=schema: compiler.compile_json_schema(  # type: ignore[misc]
                json.dumps(schema), any_whitespace=False, separators=(",", ":")
            )
        )
        matcher = xgrammar.GrammarMatcher(compiled)
        masks = []
        for token in greedy(tokens, json.dumps(document, separators=(",", ":")).encode()):
            masks.append(timed(lambda matcher=matcher: matcher.fill_next_token_bitmask(bitmask))[1])  # type: ignore[misc]
            assert matcher.accept_token(token), name
        figures |= rows(name, read_ms, masks)
    return figures


def rows(name: str, read_ms: float, masks: Sequence[float]) -> dict[str, float]:
    """A schema's figures."""
    ordered = sorted(1000 * mask for mask in masks)
    return {
        f"{name}, read_ms": read_ms,
        f"{name}, mask_us_median": statistics.median(ordered),
        f"{name}, mask_us_max": ordered[-1],
    }


def main() -> None:
    """Measure, print, and write where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocab", type=int, default=128_000)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    tokens = vocabulary(options.vocab)
    figures: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "tokenizer.json"
        write_tokenizer(tokens, file)
        figures["llguidance"] = llguidance_figures(tokens, file)
    if importlib.util.find_spec("xgrammar") is not None:
        figures["xgrammar"] = xgrammar_figures(tokens)
    for name in figures["llguidance"]:
        print(f"{name:32}" + "".join(f"{library} {one[name]:10.2f}   " for library, one in figures.items()))
    if options.json is not None:
        result = {"bench": "structured", **about(), "vocabulary": options.vocab, "figures": figures}
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
