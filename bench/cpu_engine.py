"""Whole engines on this CPU: ours beside llama.cpp and vLLM, the same random-weight models, in one run.

    python bench/cpu_engine.py --setup                       # the peers, in environments under .cache/bench/venvs
    python bench/cpu_engine.py --quick [--json FILE]         # ours, and what peers are there, bfloat16, under a minute
    python bench/cpu_engine.py --forms bf16,int8,int4        # minutes; --models qwen3,deepseek --subjects tokenrelay

Each engine is a process of its own (bench/engines/); they take turns, case by case, so that a busy machine hurts all
alike. `decode` is tokens per second of all sequences while all run; `prefill` those of one prompt; `again_ms` the time
to the first token when the same prompt comes again; `ready_s` from the start of the process to its first answer. Decode
of one sequence stands beside a floor, `of_floor`: the bytes that a step reads, at the bandwidth that all processors
read with just before and after it, for a machine's memory may be twice as fast in one minute as in the next. llama.cpp
takes GGUF files made from the same checkpoint (int8: Q8_0, int4: Q4_0, beside our groups of 32); it samples nothing,
and has no DeepSeek file here. vLLM takes bfloat16.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # read when torch is imported; as the supervisor sets it for workers

import torch
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "bench"), str(ROOT / "tests/support")]

from checkpoints import make_checkpoint  # noqa: E402 - once its folder is known
from scheduler import VENVS, about  # noqa: E402
from scheduler import setup as setup_vllm  # noqa: E402

ENGINES = ROOT / "bench/engines"
MODELS_AT = ROOT / ".cache/bench/models"
ANSWER_MAX_S = 600.0
READING_S = 0.3
MARK = "@@ "
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3": (  # Qwen3-0.6B with a vocabulary of 32,768: 473 M parameters
        "qwen3",
        {
            "hidden_size": 1024,
            "num_hidden_layers": 28,
            "intermediate_size": 3072,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "vocab_size": 32768,
            "tie_word_embeddings": True,
        },
    ),
    "deepseek": (  # DeepSeek-V2's layers, small: 720 M parameters, about 250 M of them active
        "deepseek_v2",
        {
            "hidden_size": 1024,
            "num_hidden_layers": 12,
            "intermediate_size": 2816,
            "num_attention_heads": 16,
            "num_key_value_heads": 16,
            "kv_lora_rank": 512,
            "qk_rope_head_dim": 64,
            "qk_nope_head_dim": 128,
            "v_head_dim": 128,
            "moe_intermediate_size": 512,
            "n_routed_experts": 32,
            "num_experts_per_tok": 4,
            "n_group": 1,  # vLLM wants them said
            "topk_group": 1,
            "vocab_size": 32768,
        },
    ),
}


@dataclass
class Subject:
    """An engine: its script and the Python that has it."""

    name: str
    script: str
    python: Path
    takes: dict[str, tuple[str, ...]]  # model -> forms
    process: subprocess.Popen[str] | None = None
    said: IO[str] = field(default_factory=lambda: tempfile.TemporaryFile("w+"))  # noqa: SIM115 - for its life
    version: str = ""
    missing: str = ""

    def start(self, model: str, form: str) -> dict[str, Any]:
        """Load; its first answer, or why there is none."""
        if not self.python.exists():
            return {"error": "not installed (bench/cpu_engine.py --setup)"}
        target = gguf_of(model, form, self.python) if self.name == "llama.cpp" else MODELS_AT / model
        command = [self.python, ENGINES / self.script, target, form, str(time.time())]
        environment = os.environ | {"OMP_WAIT_POLICY": "PASSIVE"}
        self.process = subprocess.Popen(
            [str(part) for part in command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.said,
            text=True,
            env=environment,
        )
        ready = self.read()
        self.version = str(ready.get("version", self.version))
        return ready

    def ask(self, case: dict[str, Any]) -> dict[str, Any]:
        """One case."""
        if self.process is None or self.process.stdin is None or self.process.poll() is not None:
            return {"error": "the process ended"}
        self.process.stdin.write(json.dumps(case) + "\n")
        self.process.stdin.flush()
        return self.read()

    def read(self) -> dict[str, Any]:
        """The next answer; other lines are the peer's talk."""
        assert self.process is not None and self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith(MARK):
                found: dict[str, Any] = json.loads(line.removeprefix(MARK))
                return found
        self.said.seek(0)
        return {"error": "the process ended: " + " | ".join(self.said.read().splitlines()[-3:])[:400]}

    def stop(self) -> None:
        """End the process."""
        if self.process is not None and self.process.stdin is not None:
            self.process.stdin.close()
            try:
                self.process.wait(60)
            except subprocess.TimeoutExpired:
                self.process.kill()
        self.process = None


def all_subjects() -> list[Subject]:
    """Ours, and the peers in their environments."""
    every = ("bf16", "int8", "int4")
    return [
        Subject("tokenrelay", "ours.py", Path(sys.executable), {"qwen3": every, "deepseek": every}),
        Subject("llama.cpp", "llama_cpp_peer.py", VENVS / "llama/bin/python", {"qwen3": every}),
        Subject("vllm", "vllm_peer.py", VENVS / "vllm/bin/python", {"qwen3": ("bf16",), "deepseek": ("bf16",)}),
    ]


def setup() -> None:
    """Make the peers' environments; llama.cpp is compiled for this machine, which takes some minutes."""
    setup_vllm()
    folder = VENVS / "llama"
    if (folder / ".done").exists():
        return
    shutil.rmtree(folder, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    flags = (
        "-DLLAVA_BUILD=OFF -DGGML_NATIVE=ON -DLLAMA_BUILD_TOOLS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_TESTS=OFF"
    )
    packages = ["llama-cpp-python==0.3.36", "numpy", "gguf==0.19.0"]
    environment = os.environ | {"CMAKE_ARGS": flags, "CMAKE_BUILD_PARALLEL_LEVEL": "2"}
    subprocess.run([folder / "bin/python", "-m", "pip", "install", "-q", *packages], check=True, env=environment)
    (folder / ".done").touch()


def checkpoint(model: str) -> None:
    """The random checkpoint, made once."""
    if not (MODELS_AT / model / "config.json").exists():
        family, sizes = SHAPES[model]
        make_checkpoint(MODELS_AT / model, family, dtype=torch.bfloat16, max_shard_size="8GB", **sizes)


def gguf_of(model: str, form: str, python: Path) -> Path:
    """The checkpoint as llama.cpp reads it, made once."""
    target = MODELS_AT / f"{model}-{form}.gguf"
    if not target.exists():
        command = [python, ENGINES / "gguf_of.py", MODELS_AT / model, target, form]
        subprocess.run(
            [str(part) for part in command], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
    return target


class Reading:
    """What all processors read from memory, each on a slice of its own."""

    def __init__(self) -> None:
        self._data = torch.ones(128 << 20)
        self.seen: list[float] = []

    def gb_s(self) -> float:
        """The mean of sums over 512 MiB for about as long as a short case takes."""
        began_s, sums = time.perf_counter(), 0
        while time.perf_counter() - began_s < READING_S:
            self._data.sum()
            sums += 1
        self.seen.append(sums * self._data.numel() * 4 / (time.perf_counter() - began_s) / 1e9)
        return self.seen[-1]


def read_bytes(model: str, form: str) -> int:
    """What a decode step of one sequence must read of the weights."""
    sizes = SHAPES[model][1]
    d, layers, vocab = sizes["hidden_size"], sizes["num_hidden_layers"], sizes["vocab_size"]
    heads = sizes["num_attention_heads"]
    if model == "qwen3":
        head = sizes["head_dim"]
        per_layer = d * head * (2 * heads + 2 * sizes["num_key_value_heads"]) + 3 * d * sizes["intermediate_size"]
        small = 0
        total = layers * per_layer
    else:
        nope, rope, v, rank = (sizes[k] for k in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "kv_lora_rank"))
        small = layers * heads * (nope + v) * rank  # stays bfloat16
        attention = d * heads * (nope + rope) + d * (rank + rope) + heads * v * d
        active = 3 * d * sizes["moe_intermediate_size"] * (sizes["num_experts_per_tok"] + 1)
        total = layers * attention + (layers - 1) * active + 3 * d * sizes["intermediate_size"]
    width = {"bf16": 2.0, "int8": 1.0, "int4": 0.5 + 4 / 32}[form]
    return int(total * width + small * 2 + vocab * d * (2 if form == "bf16" else 1))


def cases(quick: bool) -> list[dict[str, Any]]:
    """What is asked, in this order."""
    if quick:
        return [
            {"case": "decode", "batch": 1, "context": 32, "tokens": 16},
            {"case": "decode", "batch": 8, "context": 32, "tokens": 8},
            {"case": "prefill", "tokens": 128},
        ]
    decodes = [{"case": "decode", "batch": b, "context": 32, "tokens": n} for b, n in ((1, 64), (8, 48), (32, 24))]
    return decodes + [{"case": "prefill", "tokens": tokens} for tokens in (128, 512, 2048)]


def label(case: dict[str, Any]) -> str:
    """Its name in the result."""
    return f"{case['case']}_{case.get('batch', case['tokens'])}"


def ask(subject: Subject, case: dict[str, Any], read_gb: float, reading: Reading) -> dict[str, Any]:
    """The case's figures; decode of one sequence with its part of the floor."""
    if case.get("batch") != 1:
        return subject.ask(case)
    before = reading.gb_s()
    figures = subject.ask(case)
    if "tokens_per_s" in figures:
        figures["of_floor"] = figures["tokens_per_s"] * read_gb / statistics.mean((before, reading.gb_s()))
    return figures


def measure(
    subjects: list[Subject], model: str, form: str, rounds: int, quick: bool, reading: Reading
) -> list[dict[str, Any]]:
    """All cases of a model in one form; a figure is the median of the rounds."""
    checkpoint(model)
    taking = [subject for subject in subjects if form in subject.takes.get(model, ())]
    rows: list[dict[str, Any]] = []
    samples: dict[tuple[str, str, str], list[float]] = {}
    alive = []
    for subject in taking:
        ready = subject.start(model, form)
        if "error" in ready:
            subject.missing = ready["error"]
            continue
        alive.append(subject)
        samples[subject.name, "ready", "s"] = [ready["ready_s"]]
    for _ in range(rounds):
        for case in cases(quick):
            for subject in alive:
                for figure, value in ask(subject, dict(case), read_bytes(model, form) / 1e9, reading).items():
                    if figure == "error":
                        subject.missing = f"{label(case)}: {value}"
                    else:
                        samples.setdefault((subject.name, label(case), figure), []).append(value)
    for subject in taking:
        subject.stop()
    for (name, case_name, figure), values in samples.items():
        median = round(statistics.median(values), 2)
        rows.append(
            {"model": model, "form": form, "case": case_name, "figure": figure, "subject": name, "value": median}
        )
    return rows


def show(rows: list[dict[str, Any]], subjects: list[Subject], out: Console) -> None:
    """A table: each engine, and ours beside the better peer and beside the floor."""
    table = Table(
        "model", "weights", "case", *(f"{s.name} {s.version}" for s in subjects), "ours / best peer", "of floor"
    )
    keys = dict.fromkeys((r["model"], r["form"], r["case"], r["figure"]) for r in rows)
    floors = {
        (r["model"], r["form"], r["case"]): r["value"]
        for r in rows
        if (r["figure"], r["subject"]) == ("of_floor", "tokenrelay")
    }
    for model, form, case, figure in keys:
        if figure == "of_floor":
            continue
        of = {
            r["subject"]: r["value"]
            for r in rows
            if (r["model"], r["form"], r["case"], r["figure"]) == (model, form, case, figure)
        }
        ours, peers = of.get("tokenrelay"), [value for name, value in of.items() if name != "tokenrelay"]
        faster = figure == "tokens_per_s"
        ratio = ours / (max(peers) if faster else min(peers)) if ours and peers else None
        floor = floors.get((model, form, case))
        cells = [f"{of[s.name]:,.1f}" if s.name in of else "-" for s in subjects]
        table.add_row(
            model, form, f"{case} {figure}", *cells, f"{ratio:.2f}" if ratio else "-", f"{floor:.0%}" if floor else "-"
        )
    out.print(table)
    for subject in subjects:
        if subject.missing:
            out.print(f"{subject.name}: {subject.missing}", markup=False)


def main() -> int:
    """Exit code 1 when ours could not be measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--setup", action="store_true", help="make the peers' environments and end")
    parser.add_argument("--quick", action="store_true", help="one round of short cases, bfloat16, ours and llama.cpp")
    parser.add_argument("--short", action="store_true", help="the short cases, of all models, forms and subjects named")
    parser.add_argument("--json", type=Path, metavar="FILE", help="the result into this file")
    parser.add_argument("--models", default="qwen3,deepseek")
    parser.add_argument("--forms", default="bf16,int8,int4")
    parser.add_argument("--subjects", default="tokenrelay,llama.cpp,vllm")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    if options.setup:
        setup()
        return 0
    subjects = [s for s in all_subjects() if s.name in options.subjects.split(",")]
    models, forms = options.models.split(","), options.forms.split(",")
    if options.quick:
        subjects, models, forms = [s for s in subjects if s.name != "vllm"], ["qwen3"], ["bf16"]
    rows: list[dict[str, Any]] = []
    reading = Reading()
    for model in models:
        for form in forms:
            rows += measure(
                subjects, model, form, 1 if options.quick else options.rounds, options.quick or options.short, reading
            )
    show(rows, subjects, Console(width=150))
    gb_s = statistics.median(reading.seen)
    spread = [round(value, 1) for value in (min(reading.seen), gb_s, max(reading.seen))]
    head = {"bench": "cpu_engine", **about(), "bandwidth_gb_s_min_median_max": spread}
    head["versions"] = {s.name: s.version or f"missing: {s.missing}" for s in subjects}
    head["floor_tokens_per_s"] = {
        f"{model} {form}": round(gb_s * 1e9 / read_bytes(model, form), 1) for model in models for form in forms
    }
    print(", ".join(f"{name}: {value}" for name, value in head.items()))
    if options.json is not None:
        options.json.write_text(json.dumps(head | {"results": rows}, indent=1) + "\n", encoding="utf-8")
    return 0 if any(r["subject"] == "tokenrelay" for r in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
