"""What the host costs per engine step: each stage's processor time, and how much of it the next step has to wait for.

    python bench/step.py --quick
    python bench/step.py --json bench/results/step.json

Stages are timed one by one in a decode steady state (median processor time of the thread, in microseconds): plan,
batch (the native call that makes a step of the plan's rows), commit and outputs are the engine thread's, messages the
event loop's. `tensors`, `sampling_state`, `sample` and `to_host` are what a step costs more whose rows ask for more
than a token, or whose model is not captured. `gap_us` is wall time: with a model that only sleeps, the time per step
beyond the time that steps ran, with one step in flight and with two. One step ahead is there to make it vanish.

`telling_us` is the processor time of both threads for each step that the engine's thread tells the event loop (one
hop, and the message to the router's stream), less that of the same pause without a step.

`whole` is the processor time of all threads of the process for each step of a whole engine on a model of 12 tiny
layers, mean over the last three quarters of the steps; `kernels` is the part of it that the executor's thread spends
inside the native call that runs a step, from the tokens fed back to those chosen (processor time around the call,
summed over the same steps; both clock readings count as overhead). `overhead` is the difference: plan, batch, launch,
both threads' waking, commit, outputs and counters. 150 are asked for. `modules` is `whole` where no model is captured.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch

from tokenrelay.kernels.layout import MlaLayout
from tokenrelay.kernels.step import HostSteps
from tokenrelay.libscheduler import Config, Plan, Scheduler
from tokenrelay.proto import worker_pb2
from tokenrelay.runtime.build import EngineSizes, build_engine
from tokenrelay.runtime.engine import Engine, EngineOptions
from tokenrelay.runtime.executor.batch import batch_of, shared
from tokenrelay.runtime.executor.executor import Executor
from tokenrelay.runtime.executor.sampler import Sampler
from tokenrelay.runtime.requests import EngineOutput, EngineRequest, EngineStats, Finish, SamplingParams
from tokenrelay.runtime.weights.loader import load_model
from tokenrelay.services.chassis.mailbox import LoopMailbox
from tokenrelay.services.chassis.wire import sequence_output

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests/support"))

from checkpoints import make_checkpoint

if TYPE_CHECKING:
    from tokenrelay.kernels._cpu import HostStep

VOCAB = 32_000
SLOTS = 64
BLOCK_TOKENS = 64
Result = TypeVar("Result")


def new_scheduler(steps_in_flight: int) -> Scheduler:
    """Room for every row to run to its end."""
    return Scheduler(
        Config(
            block_tokens=BLOCK_TOKENS,
            blocks=4096,
            slots=SLOTS,
            context_tokens=4096,
            hash_key=bytes(16),
            model_identity=bytes(16),
            steps_in_flight=steps_in_flight,
        )
    )


class Stages:
    """Processor time per call of each stage, in nanoseconds."""

    def __init__(self) -> None:
        self.times: dict[str, list[int]] = {}

    def run(self, name: str, call: Callable[[], Result]) -> Result:
        """Call and remember."""
        began = time.thread_time_ns()
        result = call()
        self.times.setdefault(name, []).append(time.thread_time_ns() - began)
        return result

    def medians_us(self) -> dict[str, float]:
        """Per stage."""
        return {name: round(statistics.median(times) / 1000, 1) for name, times in self.times.items()}


def stages(rows: int, temperature: float, steps: int) -> dict[str, float]:
    """Median microseconds of each stage with `rows` decode rows."""
    scheduler, device, stage = new_scheduler(1), torch.device("cpu"), Stages()
    sampler = Sampler(SLOTS, VOCAB, device)
    cache, last_token = torch.zeros(1, BLOCK_TOKENS, 8), torch.zeros(SLOTS, dtype=torch.int64)
    steps_of = HostSteps.over(shared(scheduler.block_table), BLOCK_TOKENS, sampler.settings, [cache], last_token)
    assert steps_of is not None, "the native extension is needed"
    params = {n: SamplingParams(temperature=temperature, seed=n) for n in range(rows)}
    for n in range(rows):
        prompt = np.arange(3, 13, dtype=np.uint32)
        scheduler.submit(n, prompt, output_start=10, tokens_max=steps + 10, now_us=0)
    logits = torch.randn(rows, VOCAB)
    for _ in range(steps):
        plan = stage.run("plan", lambda: scheduler.plan(0))
        assert plan is not None
        step = stage.run("batch", lambda plan=plan: made(steps_of, plan))
        batch = stage.run("tensors", lambda step=step: batch_of(steps_of, step, ()))
        work = stage.run(
            "sampling_state",
            lambda plan=plan, batch=batch: sampler.prepare(
                plan, batch.sample_slots, batch.sample_ends, params, scheduler.token_ids
            ),
        )
        sampled, _ = stage.run("sample", lambda work=work: sampler.run(work, logits))
        token_ids = stage.run("to_host", lambda sampled=sampled: sampled.cpu().numpy().astype(np.uint32))
        outcome = stage.run("commit", lambda plan=plan, ids=token_ids: scheduler.commit(plan.step, ids, 0))
        outputs = stage.run("outputs", lambda outcome=outcome: outputs_of(outcome))
        stage.run("messages", lambda outputs=outputs: message_of(outputs))
    return stage.medians_us()


def made(steps: HostSteps, plan: Plan) -> HostStep:
    """As Executor makes it."""
    return steps.make(plan.slots, plan.starts, plan.lengths, plan.samples, plan.feedback, plan.token_ids, plan.decodes)


def outputs_of(outcome: Any) -> list[EngineOutput]:
    """As Engine._commit makes them."""
    finishes = tuple(Finish)
    return [
        EngineOutput(sequence_id, (token_id,), finishes[finish])
        for sequence_id, token_id, finish in zip(
            outcome.sequence_ids.tolist(), outcome.token_ids.tolist(), outcome.finish.tolist(), strict=True
        )
    ]


def message_of(outputs: list[EngineOutput]) -> bytes:
    """One StepOutput, as bytes."""
    return worker_pb2.StepOutput(step=1, outputs=map(sequence_output, outputs)).SerializeToString()


def telling_us(rows: int, steps: int) -> float:
    """From the engine's thread to bytes for the stream, paced so that each step is told alone."""
    outputs = [EngineOutput(n, (n,)) for n in range(rows)]

    async def told(tells: bool) -> int:
        loop, done = asyncio.get_running_loop(), asyncio.Event()

        def take(posts: list[tuple[list[EngineOutput], EngineStats]]) -> None:
            for batch, _ in posts:
                message_of(batch)

        mailbox = LoopMailbox[list[EngineOutput], EngineStats](loop, take)

        def engine() -> None:
            for _ in range(steps):
                time.sleep(0.001)
                if tells:
                    mailbox.post(outputs, EngineStats())
            loop.call_soon_threadsafe(done.set)

        thread = threading.Thread(target=engine)
        began = time.process_time_ns()
        thread.start()
        await done.wait()
        thread.join()
        return time.process_time_ns() - began

    return round((asyncio.run(told(True)) - asyncio.run(told(False))) / 1000 / steps, 1)


def gap_us(rows: int, steps_in_flight: int, step_ms: float, steps: int) -> float:
    """Wall time per step beyond the time that steps ran."""
    scheduler = new_scheduler(steps_in_flight)
    cache = torch.zeros(MlaLayout(rank=8, rope=8, block_tokens=BLOCK_TOKENS).shape(1))

    def model(token_ids: Any, batch: Any, caches: Any, sample_rows: torch.Tensor) -> torch.Tensor:
        time.sleep(step_ms / 1000)
        return torch.zeros(len(sample_rows), 64)

    executor = Executor(
        model,
        [cache],
        scheduler.block_table,
        block_tokens=BLOCK_TOKENS,
        vocab_size=64,
        steps_in_flight=steps_in_flight,
        threads=1,
    )
    seen: list[tuple[float, EngineStats]] = []
    open_rows, ended = set(range(rows)), threading.Event()

    def on_step(outputs: list[EngineOutput], stats: EngineStats) -> None:
        seen.append((time.perf_counter(), stats))
        open_rows.difference_update(output.sequence_id for output in outputs if output.finish)
        if not open_rows:
            ended.set()

    engine = Engine(
        scheduler, executor, vocab_size=64, on_step=on_step, options=EngineOptions(steps_in_flight=steps_in_flight)
    )
    engine.start()
    for n in range(rows):
        engine.submit(EngineRequest(n, np.arange(3, 13, dtype=np.uint32), 10, steps))
    assert ended.wait(600)
    engine.close()
    (began_s, first), (ended_s, last) = seen[len(seen) // 4], seen[-2]
    wall_us = (ended_s - began_s) * 1e6
    return round((wall_us - (last.step_time_us - first.step_time_us)) / (last.steps - first.steps), 1)


class Timed:
    """Processor time inside the native calls that run steps, while it is entered."""

    def __init__(self) -> None:
        self.ns = self.calls = 0
        self._run = HostSteps.run

    def __enter__(self) -> Timed:
        def run(steps: HostSteps, *arguments: Any) -> Any:
            began = time.thread_time_ns()
            result = self._run(steps, *arguments)
            self.ns += time.thread_time_ns() - began
            self.calls += 1
            return result

        HostSteps.run = run  # type: ignore[method-assign]
        return self

    def __exit__(self, *_: object) -> None:
        HostSteps.run = self._run  # type: ignore[method-assign]


def whole_step_us(folder: Path, rows: int, steps: int, *, captured: bool = True) -> tuple[float, float]:
    """Processor time of the process per decode step, the engine and its 12 layers together; and inside its kernels."""
    model = load_model(folder, dtype=torch.float32, context_tokens=steps + 64)
    seen: list[tuple[int, int, int, int]] = []  # processor time, steps, kernels' time, their calls
    open_rows, ended = set(range(rows)), threading.Event()

    def on_step(outputs: list[EngineOutput], stats: EngineStats) -> None:
        seen.append((time.process_time_ns(), stats.steps, timed.ns, timed.calls))
        open_rows.difference_update(output.sequence_id for output in outputs if output.finish)
        if not open_rows:
            ended.set()

    sizes = EngineSizes(slots=rows, step_tokens=1024, context_tokens=steps + 64, threads=1)
    engine = build_engine(model, sizes, on_step=on_step).engine
    if not captured:
        model._capture = None
    with Timed() as timed:
        engine.start()
        for n in range(rows):
            engine.submit(EngineRequest(n, np.arange(3, 13, dtype=np.uint32), 10, steps))
        assert ended.wait(600)
        engine.close()
    (began_ns, first, ran_ns, calls), (ended_ns, last, ran_till_ns, calls_till) = seen[len(seen) // 4], seen[-2]
    kernels = (ran_till_ns - ran_ns) / max(1, calls_till - calls)
    return round((ended_ns - began_ns) / 1000 / (last - first), 1), round(kernels / 1000, 1)


def whole_steps(steps: int) -> dict[str, float]:
    """Of each kind of model, at batch 1, 8 and 32; the best of three, since other work disturbs."""
    figures: dict[str, float] = {}
    for family in ("qwen3", "qwen3_moe", "deepseek_v3"):
        with tempfile.TemporaryDirectory() as folder:
            make_checkpoint(Path(folder), family, num_hidden_layers=12)
            for rows in (1, 8, 32):
                found = [whole_step_us(Path(folder), rows, steps) for _ in range(3)]
                whole, kernels = min(found, key=lambda pair: pair[0] - pair[1])
                name = f"{rows} rows, {family}, 12 layers"
                figures[f"{name}, whole_us"], figures[f"{name}, kernels_us"] = whole, kernels
                figures[f"{name}, overhead_us"] = round(whole - kernels, 1)
            figures[f"1 rows, {family}, 12 layers, modules_us"] = whole_step_us(Path(folder), 1, steps, captured=False)[
                0
            ]
    return figures


def main() -> None:
    """Print a table, and write it where --json says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="seconds instead of a minute")
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    torch.set_num_threads(1)
    steps = 200 if options.quick else 1000
    figures: dict[str, Any] = {}
    with torch.inference_mode():
        for rows in (1, 16, 64):
            for name, temperature in (("greedy", 0.0), ("sampled", 1.0)):
                for stage, value in stages(rows, temperature, steps).items():
                    figures[f"{rows} rows, {name}, {stage}_us"] = value
    for rows in (1, 8, 32):
        figures[f"{rows} rows, telling_us"] = telling_us(rows, steps)
    for rows in (1, 64):
        for in_flight in (1, 2):
            figures[f"{rows} rows, {in_flight} in flight, gap_us"] = gap_us(rows, in_flight, 2.0, steps)
    figures |= whole_steps(steps)
    for name, value in figures.items():
        print(f"{name:44} {value:10.1f}")
    if options.json:
        options.json.write_text(json.dumps({"bench": "step", "figures": figures}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
