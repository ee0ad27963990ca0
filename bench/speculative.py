"""Drafts, from a sequence's own text and from a prediction layer: tokens per second with and without, and how many came
true.

    python bench/speculative.py --quick
    python bench/speculative.py --json result.json [--model FOLDER] [--threads 1]

**Tasks**, on the bundled model, greedy, 1 and 4 answers at a time: `repeat` goes on with a text that says the same
phrases again and again, `code_edit` writes a file again of which one name was changed, `agent` has the turns of
held-out dialogues (tool calls, and answers about their results). Drafts come from the text (ngram) and from the bundled
model's multi-token prediction layer (mtp), as wide as the engine chooses in production, and all runs must say the same.
**Places**: the same tasks with the prediction layer, all that it proposes drafted, 1 and 3 tokens wide: how often the
first, second and third token came true when those before it did, and what that brings.
**Device**, without --quick: a model of random weights (`--model`, or a Qwen3 shape of 110 M parameters) on which a
known share of the drafted tokens comes true, of a fixed width: what a row of 1 + d tokens costs, and when it pays.
Rounds take turns (without, with), so that a busy machine hurts both alike: ratios are medians over rounds.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "bench"))

from scheduler import about  # noqa: E402 - once its folder is known

from tokenrelay.assets.training import evaluate, tokenizer  # noqa: E402
from tokenrelay.runtime.build import EngineSizes, build_engine  # noqa: E402
from tokenrelay.runtime.drafts import Drafter, Text  # noqa: E402
from tokenrelay.runtime.models.decoder import Model  # noqa: E402
from tokenrelay.runtime.predicted import PredictedDrafter  # noqa: E402
from tokenrelay.runtime.requests import EngineOutput, EngineRequest, EngineStats, Finish  # noqa: E402
from tokenrelay.runtime.weights.loader import load_model  # noqa: E402

BUNDLED = ROOT / "assets/tokenrelay-tiny"
WAIT_S = 600.0
WIDTH, MTP_WIDTH = 8, 3  # of drafts, as a worker has them by default
Prompts = Sequence[Sequence[int]]
Guess = Callable[[int, int], Sequence[int]]  # (number of the prompt, tokens known) -> what comes next


class Worker:
    """An engine; `answer` runs prompts and measures."""

    def __init__(self, model: Model, *, threads: int | None, draft_tokens: int) -> None:
        """With a `model` whose prediction layer was loaded drafts come from that."""
        self._outputs: dict[int, list[int]] = {}
        self._ended = threading.Semaphore(0)
        self._next = 0
        sizes = EngineSizes(slots=8, threads=threads, draft_tokens=draft_tokens, blocks=160, tps_floor=0)
        self.built = build_engine(model, sizes, on_step=self._on_step)
        self.engine = self.built.engine
        self.engine.start()

    def _on_step(self, outputs: list[EngineOutput], _: EngineStats) -> None:
        for output in outputs:
            self._outputs[output.sequence_id] += output.token_ids
            if output.finish != Finish.NONE:
                self._ended.release()

    def answer(self, prompts: Prompts, tokens_max: int, at_once: int, stops: tuple[int, ...]) -> dict[str, Any]:
        """Outputs, and what they took: seconds, seconds of CPU time; drafted and accepted tokens."""
        before, first = self.engine.stats.drafts, self._next
        began, cpu = time.perf_counter(), time.process_time()
        for number, prompt in enumerate(prompts):
            if number >= at_once:
                self._ended.acquire(timeout=WAIT_S)
            ids = np.array(prompt, np.uint32)
            self._outputs[self._next] = []
            self.engine.submit(EngineRequest(self._next, ids, len(ids), tokens_max, stop_token_ids=stops))
            self._next += 1
        for _ in range(min(at_once, len(prompts))):
            self._ended.acquire(timeout=WAIT_S)
        seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
        after = self.engine.stats.drafts
        outputs = [self._outputs.pop(first + number) for number in range(len(prompts))]
        return {
            "outputs": outputs,
            "tokens": sum(map(len, outputs)),
            "seconds": seconds,
            "cpu_s": cpu,
            "drafted": after.tokens - before.tokens,
            "accepted": after.accepted - before.accepted,
        }


class Told(Drafter):
    """Drafts of a fixed width, of which a known share comes true."""

    def __init__(self, worker: Worker, guess: Guess, first: int, width: int) -> None:
        super().__init__(worker.built.scheduler, tokens_max=width)
        self._guess, self._first = guess, first

    def _indexed(self, sequence_id: int, text: Any) -> Any:
        known = self._scheduler.token_ids(sequence_id)
        guess = [] if known is None else self._guess(sequence_id - self._first, len(known))
        text.fresh.clear()
        return _Found(guess)

    def _width(self, rate: float, offered: int, won: float, context: int) -> tuple[int, float]:
        return self._tokens_max, 1.0


class _Found:
    def __init__(self, guess: Sequence[int]) -> None:
        self._guess = guess

    def find(self, width: int) -> tuple[Any, int]:
        return np.array(self._guess[:width], np.uint32), len(self._guess)

    def __len__(self) -> int:
        return 1


def tasks(quick: bool) -> dict[str, tuple[Prompts, int]]:
    """Prompts of the bundled model, and how many tokens they are answered with at most."""
    rng = random.Random(1)
    count = 4 if quick else 12
    encode = tokenizer.load(BUNDLED).encode
    repeats = []
    for _ in range(count):
        phrases = [[rng.randrange(300, 2000) for _ in range(rng.randint(12, 24))] for _ in range(3)]
        repeats.append([token for _ in range(4) for phrase in phrases for token in phrase])
    edits = []
    for _ in range(count):
        names = [rng.choice(("read", "list", "count", "send", "find")) + f"_{rng.randrange(90)}" for _ in range(6)]
        lines = [f"def {name}(path):\n    files = list(path)\n    return {name}_all(files)\n" for name in names]
        old, new = "".join(lines), "".join(lines).replace("files", "notes")
        edits.append(encode(f"{old}\n{new[: len(new) // 3]}", add_special_tokens=False).ids)
    agents = [question.ids for question in islice(evaluate.questions(count, 0, BUNDLED), 2 * count)]
    tokens_max = 64 if quick else 96
    return {"repeat": (repeats, tokens_max), "code_edit": (edits, tokens_max), "agent": (agents, tokens_max)}


def run_tasks(quick: bool, threads: int | None) -> list[dict[str, Any]]:
    """Each task, so many answers at a time, without drafts and with them."""
    model = load_model(BUNDLED, dtype=torch.float32)
    workers = {
        name: Worker(one, threads=threads, draft_tokens=width)
        for name, one, width in (
            ("none", model, 0),
            ("ngram", model, WIDTH),
            ("mtp", load_model(BUNDLED, dtype=torch.float32, prediction="on"), MTP_WIDTH),
        )
    }
    ends = tuple(model.config.eos_token_ids)
    rows = []
    for task, (prompts, tokens_max) in tasks(quick).items():
        for at_once in (1, 4):
            stops = ends if task == "agent" else ()
            rounds = []
            for _ in range(2 if quick else 5):
                rounds.append({name: w.answer(prompts, tokens_max, at_once, stops) for name, w in workers.items()})
            for name in ("ngram", "mtp"):
                pairs = [(one["none"], one[name]) for one in rounds]
                same = all(one["outputs"] == other["outputs"] for one, other in pairs)
                case = {"part": "tasks", "case": task, "proposer": name, "at_once": at_once}
                rows.append({**case, **summary(pairs[1:]), "same_text": same})
    for worker in workers.values():
        worker.engine.close()
    return rows


def run_places(quick: bool, threads: int | None) -> list[dict[str, Any]]:
    """The prediction layer with all that it proposes drafted, one answer at a time."""
    plain = Worker(load_model(BUNDLED, dtype=torch.float32), threads=threads, draft_tokens=0)
    model = load_model(BUNDLED, dtype=torch.float32, prediction="on")
    rows = []
    for width in (1, MTP_WIDTH):
        worker = Worker(model, threads=threads, draft_tokens=width)
        places = Places(worker, width)
        for task, (prompts, tokens_max) in tasks(quick).items():
            pairs = []
            for _ in range(1 if quick else 3):
                places.clear()
                pairs.append(tuple(w.answer(prompts, tokens_max, 1, ()) for w in (plain, worker)))
            same = all(one["outputs"] == other["outputs"] for one, other in pairs)
            case = {"part": "places", "case": f"{task}, always {width}", "proposer": "mtp", "at_once": 1}
            rows.append({**case, **summary(pairs), "by_place": places.rates(), "same_text": same})
        worker.engine.close()
    plain.engine.close()
    return rows


class Places:
    """Makes a worker draft all that its prediction layer proposes, and counts what came true place by place."""

    def __init__(self, worker: Worker, width: int) -> None:
        drafter = worker.engine._drafter
        assert isinstance(drafter, PredictedDrafter)
        learn = drafter._learn
        self._seen: list[list[int]] = [[] for _ in range(width)]

        def look(text: Text, hits: int, *, missed: bool) -> None:
            for place, came in enumerate([1] * hits + [0] * missed, start=text.kind):
                self._seen[place].append(came)
            learn(text, hits, missed=missed)

        drafter._learn = look  # type: ignore[method-assign]
        drafter._best_width = lambda rates, *_: (len(rates), 1.0)  # type: ignore[method-assign]

    def clear(self) -> None:
        """Begin anew."""
        for seen in self._seen:
            seen.clear()

    def rates(self) -> list[float | None]:
        """How often each place came true when those before it did."""
        return [round(statistics.mean(seen), 3) if seen else None for seen in self._seen]


def run_device(model: Model, threads: int | None, rounds_max: int) -> list[dict[str, Any]]:
    """Known shares of known widths, against none."""
    rng = random.Random(2)
    vocab = model.config.vocab_size
    prompts = [[rng.randrange(vocab) for _ in range(96)] for _ in range(8)]
    plain, drafting = (Worker(model, threads=threads, draft_tokens=width) for width in (0, 15))
    texts = plain.answer(prompts, 64, 8, ())["outputs"]
    rows = []
    for at_once in (1, 8):
        asked = prompts[:at_once]
        for width in (2, 4, 8):
            for share in (0.5, 0.8, 1.0):

                def guess(number: int, known: int, width: int = width, share: float = share) -> Sequence[int]:
                    coming = texts[number][known - len(prompts[number]) :][:width]
                    return [token if rng.random() < share else (token + 1) % vocab for token in coming]

                rounds = []
                for _ in range(rounds_max):
                    one = plain.answer(asked, 64, at_once, ())
                    drafting.engine._drafter = Told(drafting, guess, drafting._next, width)
                    rounds.append((one, drafting.answer(asked, 64, at_once, ())))
                case = {"part": "device", "case": f"width {width}, {share:.0%} true", "at_once": at_once}
                rows.append({**case, "width": width, "share": share, **summary(rounds)})
    for worker in (plain, drafting):
        worker.engine.close()
    return rows


def summary(rounds: Sequence[tuple[dict[str, Any], dict[str, Any]]]) -> dict[str, Any]:
    """Medians over rounds of (without, with)."""

    def median(values: Sequence[float]) -> float:
        return round(statistics.median(values), 3)

    drafted, accepted = (sum(other[name] for _, other in rounds) for name in ("drafted", "accepted"))
    return {
        "tokens_per_s_without": median([one["tokens"] / one["seconds"] for one, _ in rounds]),
        "tokens_per_s": median([other["tokens"] / other["seconds"] for _, other in rounds]),
        "speedup": median(
            [one["seconds"] / one["tokens"] * other["tokens"] / other["seconds"] for one, other in rounds]
        ),
        "cpu_gain": median([one["cpu_s"] / one["tokens"] * other["tokens"] / other["cpu_s"] for one, other in rounds]),
        "drafted_per_token": median([other["drafted"] / other["tokens"] for _, other in rounds]),
        "acceptance": round(accepted / drafted, 3) if drafted else None,
    }


def random_model(folder: Path) -> Path:
    """A Qwen3 shape of random weights."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=16_384,
        hidden_size=768,
        intermediate_size=2304,
        num_hidden_layers=12,
        num_attention_heads=12,
        num_key_value_heads=4,
        head_dim=64,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    Qwen3ForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


def show(rows: Sequence[dict[str, Any]], console: Console) -> None:
    """As a table."""
    table = Table(title="drafts")
    for name in (
        "case",
        "from",
        "at once",
        "tokens/s without",
        "with",
        "speedup",
        "by CPU time",
        "drafted per token",
        "came true",
    ):
        table.add_column(name, justify="left" if name in ("case", "from") else "right")
    for row in rows:
        came = "-" if row["acceptance"] is None else f"{row['acceptance']:.0%}"
        if places := [f"{place:.0%}" for place in row.get("by_place", ()) if place is not None]:
            came += f" ({', '.join(places)})"
        speeds = (f"{row['tokens_per_s_without']:.0f}", f"{row['tokens_per_s']:.0f}")
        ratios = (f"{row['speedup']:.2f}", f"{row['cpu_gain']:.2f}", f"{row['drafted_per_token']:.2f}")
        table.add_row(row["case"], row.get("proposer", "told"), str(row["at_once"]), *speeds, *ratios, came)
    console.print(table)


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer prompts, no device sweep: under 50 s when idle")
    parser.add_argument("--json", metavar="FILE", help="write the result here (-: stdout)")
    parser.add_argument("--model", type=Path, metavar="FOLDER", help="of the device sweep")
    parser.add_argument("--threads", type=int, metavar="N", help="of a step")
    options = parser.parse_args()
    began = time.perf_counter()
    rows = run_tasks(options.quick, options.threads) + run_places(options.quick, options.threads)
    if not options.quick:
        with tempfile.TemporaryDirectory() as scratch:
            model = load_model(options.model or random_model(Path(scratch)), dtype=None)
            rows += run_device(model, options.threads, 3)
    show(rows, Console(stderr=options.json == "-"))
    result = {"bench": "speculative", **about(), "quick": options.quick, "results": rows}
    result["seconds"] = round(time.perf_counter() - began, 1)
    if options.json == "-":
        print(json.dumps(result, indent=1))
    elif options.json:
        Path(options.json).write_text(json.dumps(result, indent=1) + "\n")
    return 0 if all(row.get("same_text", True) for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
