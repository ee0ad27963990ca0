"""The bundled model's exam: held-out dialogues, greedy generation, tool calls and answers graded.

    python -m tokenrelay.assets.training.evaluate [--model DIR] [--url URL] [--count N] [--json FILE]

Each assistant turn of a dialogue is generated from the right history before it, so that one mistake counts once. The
dialogues come from seeds and combinations of wording that training never draws (see world.py). A tool call is right
when it is well-formed JSON with the right tool and exactly the right arguments.
"""

from __future__ import annotations

import argparse
import json
import sys
import urllib.request
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from tokenrelay.assets.training import template, tokenizer, world
from tokenrelay.assets.training.grading import Reply, Tally, parse

NEW_TOKENS_MAX = 112
BATCH = 32
REPLY_S = 120.0
TABLE_WIDTH = 110  # characters, where the output is no terminal
Generate = Callable[[list[list[int]]], list[list[int]]]


@dataclass(frozen=True)
class Question:
    """One assistant turn to write: the prompt's ids, and what is wanted."""

    ids: list[int]
    message: dict[str, Any]
    facts: tuple[str, ...]
    skill: str


def questions(count: int, first: int, folder: Path, missing: float = 0.0) -> Iterator[Question]:
    """Every assistant turn of `count` held-out dialogues from seed `first` on; `missing` as in world.write."""
    encode = tokenizer.load(folder).encode
    for index in range(first, first + count):
        dialogue = world.write_exam(index, missing=missing)
        for place, message in enumerate(dialogue.messages):
            if message["role"] != "assistant":
                continue
            history = dialogue.messages[:place]
            prompt = template.render(history, dialogue.tools or None, add_generation_prompt=True)
            skill = dialogue.skills[dialogue.episodes[place]]
            ids = encode(prompt, add_special_tokens=False).ids
            yield Question(ids, message, dialogue.facts.get(place, ()), skill)


def with_transformers(folder: Path) -> Generate:
    """Greedy generation by transformers' class, float32, with its KV cache; prompts are padded at the left."""
    import transformers

    transformers.logging.set_verbosity_error()
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    pad = model.config.pad_token_id

    def generate(prompts: list[list[int]]) -> list[list[int]]:
        longest = max(map(len, prompts))
        ids = torch.tensor([[pad] * (longest - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        with torch.inference_mode():
            out = model.generate(ids, attention_mask=mask, max_new_tokens=NEW_TOKENS_MAX, do_sample=False)
        return [row.tolist() for row in out[:, longest:]]

    return generate


def with_server(url: str) -> Generate:
    """Greedy generation by a running server, all prompts of a call at once: minutes where transformers' class, whose
    loop over experts is slow on a CPU, takes most of an hour."""

    def one(prompt: list[int]) -> list[int]:
        body = {"prompt": prompt, "max_tokens": NEW_TOKENS_MAX, "temperature": 0, "return_token_ids": True}
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{url}/v1/completions", json.dumps(body).encode(), headers)
        with urllib.request.urlopen(request, timeout=REPLY_S) as response:
            ids: list[int] = json.load(response)["choices"][0]["token_ids"]
            return ids

    def generate(prompts: list[list[int]]) -> list[list[int]]:
        with ThreadPoolExecutor(BATCH) as pool:
            return list(pool.map(one, prompts))

    return generate


def examine(
    asked: list[Question], generate: Generate, folder: Path, mistake: Callable[[Question, str], None] | None = None
) -> dict[str, Tally]:
    """Generate and grade; the tallies by skill. Questions of a length go together, so that little is padded."""
    codec = tokenizer.load(folder)
    end = tokenizer.id_of(codec, "<|im_end|>")
    tallies: dict[str, Tally] = defaultdict(Tally)
    asked = sorted(asked, key=lambda question: len(question.ids))
    parts = [asked[first : first + BATCH] for first in range(0, len(asked), BATCH)]
    for part in track(parts, description="examining", transient=True):
        for question, ids in zip(part, generate([question.ids for question in part]), strict=True):
            closed = end in ids
            text = codec.decode(ids[: ids.index(end)] if closed else ids, skip_special_tokens=False)
            reply: Reply = parse(text, closed)
            if not tallies[question.skill].grade(reply, question.message, question.facts) and mistake:
                mistake(question, text)
    return dict(tallies)


def total(tallies: dict[str, Tally]) -> Tally:
    """All tallies as one."""
    whole = Tally()
    for tally in tallies.values():
        for name, value in vars(tally).items():
            setattr(whole, name, getattr(whole, name) + value)
    return whole


def table(tallies: dict[str, Tally], title: str) -> Table:
    """A row a skill, and the total."""
    shown = Table(title=title)
    shown.add_column("skill", no_wrap=True)
    for column in ("calls", "well-formed", "right tool", "right arguments", "answers", "right answers"):
        shown.add_column(column, justify="right", no_wrap=True)
    rows = [*sorted(tallies.items()), ("all", total(tallies))]
    for name, tally in rows:
        if name == "all":
            shown.add_section()
        shares = list(tally.shares().values())
        calls = [f"{100 * share:.1f} %" if tally.calls else "" for share in shares[:3]]
        answers = f"{100 * shares[3]:.1f} %" if tally.answers else ""
        shown.add_row(name, str(tally.calls or ""), *calls, str(tally.answers or ""), answers)
    return shown


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=tokenizer.FOLDER)
    parser.add_argument("--url", help="let this server, which serves --model, generate, not transformers")
    parser.add_argument("--count", type=int, default=200, help="dialogues")
    parser.add_argument("--seed", type=int, default=0, help="the first dialogue's seed")
    parser.add_argument("--missing", type=float, default=0.0, help="how often a tool that is asked for is not on offer")
    parser.add_argument("--json", type=Path, help="write the figures there too")
    parser.add_argument("--mistakes", type=int, default=0, help="show so many wrong turns")
    options = parser.parse_args()
    console = Console() if sys.stdout.isatty() else Console(width=TABLE_WIDTH)
    shown: list[str] = []

    def mistake(question: Question, text: str) -> None:
        if len(shown) < options.mistakes:
            wanted = template.render([question.message])
            shown.append(f"--- {question.skill}\nwanted {wanted}got    {text}\n")

    asked = list(questions(options.count, options.seed, options.model, options.missing))
    generate = with_server(options.url) if options.url else with_transformers(options.model)
    tallies = examine(asked, generate, options.model, mistake)
    seeds = f"{options.count} held-out dialogues, seeds {options.seed} to {options.seed + options.count - 1}"
    console.print(table(tallies, f"{seeds}, {len(asked)} turns"))
    console.print("\n".join(shown), markup=False, highlight=False)
    if options.json:
        whole = total(tallies)
        record: dict[str, Any] = {"dialogues": options.count, "seed": options.seed, "missing": options.missing}
        record |= {"turns": len(asked)} | vars(whole) | whole.shares()
        record["skills"] = {name: vars(tally) | tally.shares() for name, tally in sorted(tallies.items())}
        options.json.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
