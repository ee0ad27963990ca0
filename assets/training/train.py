"""Train the bundled model: resumable, and a function of its seed.

    python -m tokenrelay.assets.training.train --minutes 60          # go on from .cache/assets/tiny.pt, or start
    python -m tokenrelay.assets.training.train --decay-steps 1500    # ... and anneal to the end
    python -m tokenrelay.assets.training.train --again --decay-steps 1500  # ... and once more from there

The learning rate warms up, stays, and decays linearly from whatever step `--decay-steps` was first given at (WSD,
arXiv:2404.06395), so that the budget need not be known beforehand. What a step sees depends on (seed, step) and on the
number of processes alone. SIGTERM or Ctrl-C ends a run after its present step, saved.

Each core runs a process with one thread, and gradients are averaged once a step: on a machine that others use too, that
is many times faster than one process with a thread a core, whose every small operation waits for the slower one.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor
from torch.multiprocessing.spawn import spawn

from tokenrelay.assets.training import corpus, tokenizer, world
from tokenrelay.assets.training.model import Model, Shape
from tokenrelay.assets.training.muon import optimizers
from tokenrelay.assets.training.wiring import wire

CHECKPOINT = Path(__file__).resolve().parents[2] / ".cache" / "assets" / "tiny.pt"
MATRIX_LR, OTHER_LR = 0.01, 1e-3
WARMUP_STEPS = 100
MTP_WEIGHT = 0.3  # lambda of the DeepSeek-V3 paper
MTP_ROWS = 4  # the extra layer sees one row in so many: it is a quarter of the cost of a step otherwise
CONTEXT_STEPS = 4  # every so many steps the loss is on what the model reads, too: the head is a fifth of a step's cost
BALANCE_SPEED = 1e-3
REPORT_STEPS, EXAM_STEPS, SAVE_SECONDS = 50, 250, 120
EPISODES = [(0, 1), (250, 2), (600, 4), (1500, 9)]  # from this step on, dialogues of up to so many episodes
MISSING = [(0, world.MISSING_TRAIN), (2250, 0.2)]  # likewise: how often a needed tool is not on offer
DRILLS = [(0, 192), (400, 48), (1500, 0)]  # likewise: copying drills beside a chunk's dialogues


@dataclass
class Place:
    """Where the corpus and the schedule stand."""

    step: int = 0
    chunk: int = 0
    batch: int = 0
    tokens: int = 0
    length_max: int = 0
    chunk_step: int = 0  # the step at which this chunk began
    phase_from: int = 0  # the rate warmed up from here: a run whose decay was over may be gone on with
    decay_from: int | None = None
    decay_steps: int = 0

    def rate(self) -> float:
        """The learning rate's factor at this step."""
        warm = min(1.0, (self.step - self.phase_from + 1) / WARMUP_STEPS)
        if self.decay_from is None:
            return warm
        return warm * max(0.0, 1 - (self.step - self.decay_from) / self.decay_steps)

    def done(self) -> bool:
        """Whether the decay is over."""
        return self.decay_from is not None and self.step >= self.decay_from + self.decay_steps


class Trainer:
    """Model, optimizers and place, saved and loaded as one."""

    def __init__(self, seed: int, batch_tokens: int, rank: int = 0, ranks: int = 1) -> None:
        torch.manual_seed(seed)
        self.seed, self.batch_tokens, self.rank, self.ranks = seed, batch_tokens, rank, ranks
        self.model = Model(Shape())
        codec = tokenizer.load()
        wire(self.model, [str(codec.id_to_token(index)) for index in range(codec.get_vocab_size())])
        self.optimizers = optimizers(self.model, MATRIX_LR, OTHER_LR)
        self.base_rates = [[group["lr"] for group in optimizer.param_groups] for optimizer in self.optimizers]
        self.encoder = corpus.Encoder(codec)
        self.place = Place()
        self.held: list[tuple[Tensor, Tensor]] = []
        self.held_chunk = -1

    def save(self, path: Path) -> None:
        """Write a checkpoint; the old one stays until the new one is whole."""
        path.parent.mkdir(parents=True, exist_ok=True)
        state: dict[str, Any] = {
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "place": vars(self.place),
            "seed": self.seed,
            "batch_tokens": self.batch_tokens,
            "processes": self.ranks,
        }
        torch.save(state, path.with_suffix(".new"))
        path.with_suffix(".new").replace(path)

    def load(self, path: Path) -> None:
        """Go on from a checkpoint."""
        state = torch.load(path, weights_only=True)
        assert state["seed"] == self.seed, f"{path} is of seed {state['seed']}, not {self.seed}"
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.place = Place(**state["place"])

    def next_batch(self) -> tuple[Tensor, Tensor]:
        """ids and weights [B, T] of the next step."""
        place = self.place
        if place.batch == 0:
            place.chunk_step = place.step
        if self.held_chunk != place.chunk:
            episodes = [most for first, most in EPISODES if first <= place.chunk_step][-1]
            drills = [many for first, many in DRILLS if first <= place.chunk_step][-1]
            missing = [share for first, share in MISSING if first <= place.chunk_step][-1]
            self.held = corpus.batches(
                self.encoder, self.seed, place.chunk, self.batch_tokens, episodes, drills, missing
            )
            self.held_chunk = place.chunk
        batch = self.held[place.batch + self.rank]
        place.batch += self.ranks
        if place.batch + self.ranks > len(self.held):
            place.chunk, place.batch = place.chunk + 1, 0
        return batch

    def loss(self, ids: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Weighted mean cross-entropy of the next token, and of the token after it by the MTP layer."""
        with torch.autocast("cpu", dtype=torch.bfloat16):
            hidden = self.model(ids)
            main = self._cross_entropy(hidden[:, :-1], ids[:, 1:], weights[:, 1:])
            rows = slice(self.place.step % min(MTP_ROWS, len(ids)), None, MTP_ROWS)
            ahead = self.model.ahead(hidden[rows], ids[rows])
            extra = self._cross_entropy(ahead[:, :-1], ids[rows, 2:], weights[rows, 2:])
        return main, extra

    def _cross_entropy(self, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        keep = weights > (0 if self.place.step % CONTEXT_STEPS == 0 else corpus.CONTEXT_WEIGHT)
        logits = self.model.head(hidden[keep]).float()
        return (F.cross_entropy(logits, ids[keep], reduction="none") * weights[keep]).sum() / weights[keep].sum()

    def average(self, extras: list[Tensor]) -> list[Tensor]:
        """Average gradients and router loads over the ranks in one message, `extras` (scalars) with them."""
        if self.ranks == 1:
            return extras
        loads = [router.load for router in self.model.routers()]
        parts = [parameter.grad for parameter in self.model.parameters() if parameter.grad is not None]
        parts += loads + [extra.detach() for extra in extras]
        flat = torch.cat([part.flatten() for part in parts])
        dist.all_reduce(flat)
        flat /= self.ranks
        pieces = torch.split(flat, [part.numel() for part in parts])
        for part, piece in zip(parts, pieces, strict=True):
            part.copy_(piece.view_as(part))
        return [piece[0] for piece in pieces[-len(extras) :]]

    def step(self, stop: bool = False) -> tuple[float, float, bool]:
        """One update; returns both losses, and whether any rank wants to stop."""
        ids, weights = self.next_batch()
        self.place.length_max = max(self.place.length_max, ids.shape[1])
        main, extra = self.loss(ids, weights)
        torch.autograd.backward(main + MTP_WEIGHT * extra)
        main, extra, stops, seen = self.average([main, extra, torch.tensor(float(stop)), (weights > 0).sum().float()])
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer, rates in zip(self.optimizers, self.base_rates, strict=True):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * self.place.rate()
            optimizer.step()
            optimizer.zero_grad()
        for router in self.model.routers():
            router.balance(BALANCE_SPEED)
        self.place.step += 1
        self.place.tokens += round(seen.item() * self.ranks)
        return main.item(), extra.item(), stops.item() > 0

    @torch.no_grad()
    def spans_right(self, dialogues: int = 64) -> tuple[float, float]:
        """Held-out share of tool-call spans, and of whole assistant turns, whose every token is the likeliest one."""
        calls, turns = [], []
        self.model.eval()
        opening = tokenizer.id_of(self.encoder.tokenizer, "<tool_call>")
        rng = random.Random(0)
        samples = [self.encoder.sample(world.write_exam(i, 3), rng) for i in range(dialogues)]
        samples.sort(key=lambda sample: len(sample.ids))
        for first in range(0, len(samples), 16):
            part = samples[first : first + 16]
            ids, weights = corpus.collate(part, self.encoder.pad, max(len(sample.ids) for sample in part))
            with torch.autocast("cpu", dtype=torch.bfloat16):
                right = self.model.head(self.model(ids)).argmax(-1)[:, :-1] == ids[:, 1:]
            spoken = weights[:, 1:] >= 1
            for row in range(len(part)):
                edges = torch.diff(spoken[row].int(), prepend=torch.tensor([0]), append=torch.tensor([0]))
                for low, high in zip(*((edges == sign).nonzero().flatten().tolist() for sign in (1, -1)), strict=True):
                    whole = bool(right[row, low:high].all())
                    turns.append(whole)
                    # where the reasoning was dropped the span starts one token late, after the opening tag
                    if opening in ids[row, low : high + 1].tolist():
                        calls.append(whole)
        self.model.train()
        return sum(calls) / len(calls), sum(turns) / len(turns)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT)
    parser.add_argument("--minutes", type=float, default=60.0, help="stop (resumably) after so long")
    parser.add_argument("--steps", type=int, help="stop (resumably) at this step")
    parser.add_argument(
        "--decay-steps",
        type=int,
        help="anneal to zero over so many steps from here (or from where that was first asked for), then end",
    )
    parser.add_argument("--again", action="store_true", help="go on where a decay is over: warm up and decay once more")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch-tokens", type=int, default=2048, help="padded tokens a process sees in one step")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    return parser.parse_args()


def run(rank: int, options: argparse.Namespace, rendezvous: str) -> None:
    """One process of the training run; rank 0 reports and saves."""
    torch.set_num_threads(1)
    if options.processes > 1:
        dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=options.processes)
    trainer = Trainer(options.seed, options.batch_tokens, rank, options.processes)
    if options.checkpoint.exists():
        trainer.load(options.checkpoint)
    place = trainer.place
    if options.again and place.done():
        place.phase_from, place.decay_from = place.step, None
    if options.decay_steps:
        place.decay_from = place.step if place.decay_from is None else place.decay_from
        place.decay_steps = options.decay_steps
    deadline, saved, stopped = time.monotonic() + 60 * options.minutes, time.monotonic(), False
    asked: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, frame: asked.append(number))
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, refresh_per_second=1, disable=rank > 0) as progress:
        task = progress.add_task("training", total=60 * options.minutes)
        meter = Meter(place)
        while not (place.done() or stopped or place.step == options.steps):
            main_loss, mtp_loss, stopped = trainer.step(stop=bool(asked) or time.monotonic() > deadline)
            meter.add(main_loss, mtp_loss)
            if rank > 0:
                continue
            if place.step % REPORT_STEPS == 0:
                line = meter.report(place)
                if place.step % EXAM_STEPS == 0:
                    calls, turns = trainer.spans_right()
                    line += f"  held out: calls {calls:.3f}  turns {turns:.3f}"
                progress.console.print(line, highlight=False, soft_wrap=True)
            if time.monotonic() - saved > SAVE_SECONDS:
                trainer.save(options.checkpoint)
                saved = time.monotonic()
            progress.update(task, completed=60 * options.minutes - (deadline - time.monotonic()))
        if rank == 0:
            trainer.save(options.checkpoint)


class Meter:
    """Means since the last report."""

    def __init__(self, place: Place) -> None:
        self.since, self.tokens, self.main, self.ahead, self.steps = time.monotonic(), place.tokens, 0.0, 0.0, 0

    def add(self, main_loss: float, mtp_loss: float) -> None:
        """Count one step."""
        self.main, self.ahead, self.steps = self.main + main_loss, self.ahead + mtp_loss, self.steps + 1

    def report(self, place: Place) -> str:
        """One line, and start again."""
        speed = (place.tokens - self.tokens) / (time.monotonic() - self.since)
        line = (
            f"{time.strftime('%H:%M:%S')} step {place.step}  {place.tokens / 1e6:.2f} M tokens  {speed:.0f}/s  "
            f"loss {self.main / self.steps:.4f}  mtp {self.ahead / self.steps:.4f}  rate {place.rate():.3f}"
        )
        self.__init__(place)  # type: ignore[misc]
        return line


def main() -> None:
    """Train until the decay is over or the budget is spent."""
    options = arguments()
    if options.processes == 1:
        run(0, options, "")
        return
    with tempfile.TemporaryDirectory() as folder:
        spawn(run, (options, f"{folder}/rendezvous"), nprocs=options.processes)  # type: ignore[no-untyped-call]


if __name__ == "__main__":
    main()
