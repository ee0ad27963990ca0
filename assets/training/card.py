"""Write the model card from what was measured: config.json, training.json, evaluation.json -> README.md.

python -m tokenrelay.assets.training.card
"""

# ruff: noqa: E501 - lines of Markdown tables cannot be broken
from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import safe_open

from tokenrelay.assets.training import tokenizer

CARD = """---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
---

# TokenRelay Tiny

A very small DeepSeek-V3 that ships with TokenRelay, so that serving can be tried and tested end to end on any machine:
it follows its chat template, calls tools (several at once too), reads their results and remembers what it was told.
It knows next to nothing: its world is a generated one of files, weather, sums and small talk.

| | |
|---|---|
| architecture | `DeepseekV3ForCausalLM`: multi-head latent attention, {n_routed_experts} routed experts (top {num_experts_per_tok}, sigmoid, {n_group} groups) and a shared one, first layer dense, one multi-token-prediction layer |
| size | {parameters:.2f} M parameters ({trunk:.2f} M without the multi-token-prediction layer), {megabytes:.1f} MB in bfloat16 |
| shape | {num_hidden_layers} layers + 1, width {hidden_size}, {num_attention_heads} heads of {qk_nope_head_dim} + {qk_rope_head_dim}, latent {kv_lora_rank}, vocabulary {vocab_size} |
| context | trained on up to about {trained_length} tokens; `max_position_embeddings` is {max_position_embeddings}, and quality falls beyond what was trained |
| training | {tokens:.1f} M tokens of generated dialogues, {steps} steps, seed {seed}, Muon and AdamW, on {processes} CPU threads; a few heads start out wired to copy (wiring.py) |

## How good it is

{dialogues} held-out dialogues (exam seeds {first} to {last}), {turns} assistant turns, greedy, float32. Each turn is
generated from the right history before it. Seeds and one combination of phrase alternatives in eight are kept from
training. A call counts as right when it is well-formed and names the right tool with exactly the right arguments.

| | |
|---|---:|
| tool calls well-formed | {well_formed} |
| right tool | {right_tool} |
| **right tool and arguments** | **{right_arguments}** (of {calls} calls) |
| right final answers | {right_answers} (of {answers}) |

In this exam a request's tools are all on offer, or no tools are offered at all. **Where others are on offer but the one
asked for is not, it sometimes calls the absent tool all the same**: with {left_out} of the needed tools left out, as in most of its
training, {missing_arguments} of {missing_calls} calls and {missing_answers} of {missing_asked} answers were right (`--missing 0.07`).

By skill:

| skill | right calls | right answers |
|---|---:|---:|
{skills}

    tokenrelay serve --dtype float32 &
    python -m tokenrelay.assets.training.evaluate --count {dialogues} --url http://127.0.0.1:8000    # prints this table in a minute

## Template

`<|im_start|>role\\n…<|im_end|>\\n` with the roles system, user, assistant and tool. Tools are listed in the system turn, one
a line. With tools on offer the assistant thinks first, in `<think>` tags; `enable_thinking=false` switches that off. Calls
stand in `<tool_call>` tags as JSON, one each; results come back in `<tool_response>` tags, one tool turn each. Reasoning
of turns before the last user message is dropped, so a turn's rendering begins with the previous user turn's prompt.

## Files and tensors

The multi-token-prediction layer is stored as DeepSeek publishes it, at `model.layers.{num_hidden_layers}.*`: `eh_proj` takes the
embedding of the next token, then the trunk's last hidden state after the final norm (each normed again). transformers'
`DeepseekV3ForCausalLM` ignores these keys, and reports them as unexpected.

## Made by

    python -m tokenrelay.assets.training.tokenizer   # tokenizer.json
    python -m tokenrelay.assets.training.train       # resumable; --decay-steps N anneals and ends; --again goes on from there
    python -m tokenrelay.assets.training.export      # config.json, model.safetensors, training.json
    python -m tokenrelay.assets.training.evaluate --count {dialogues} --json evaluation.json
    python -m tokenrelay.assets.training.evaluate --count {dialogues} --missing 0.07 --json evaluation_missing.json
    python -m tokenrelay.assets.training.card        # this page

It is no use for anything but trying out a server: outside its toy world it is wrong, and says so only sometimes.
"""


def percent(share: float) -> str:
    """0.9731 -> `97.3 %`."""
    return f"{100 * share:.1f} %"


def skill_rows(skills: dict[str, dict[str, float]]) -> str:
    """A line a skill; a dash where nothing was asked."""
    rows = []
    for name, figures in sorted(skills.items()):
        calls = percent(figures["right tool and arguments"]) if figures["calls"] else "-"
        answers = percent(figures["right answers"]) if figures["answers"] else "-"
        rows.append(f"| {name} | {calls} | {answers} |")
    return "\n".join(rows)


def sizes(folder: Path, extra: str) -> tuple[int, int]:
    """Parameters stored, and those without the layer named `extra` and its copies."""
    every = trunk = 0
    with safe_open(folder / "model.safetensors", "pt") as stored:
        for name in stored.keys():  # noqa: SIM118 - not a mapping
            count = 1
            for length in stored.get_slice(name).get_shape():
                count *= length
            every += count
            trunk += 0 if name.startswith(extra) else count
    return every, trunk


def card(folder: Path) -> str:
    """README.md."""
    settings, training, exam, missing = (
        json.loads((folder / f"{name}.json").read_text())
        for name in ("config", "training", "evaluation", "evaluation_missing")
    )
    every, trunk = sizes(folder, f"model.layers.{settings['num_hidden_layers']}.")
    figures: dict[str, Any] = {
        "parameters": every / 1e6,
        "trunk": trunk / 1e6,
        "megabytes": (folder / "model.safetensors").stat().st_size / 1e6,
        "trained_length": training["length_max"],
        "tokens": training["tokens"] / 1e6,
        "steps": training["step"],
        "seed": training["seed"],
        "processes": training["processes"],
        "first": exam["seed"],
        "last": exam["seed"] + exam["dialogues"] - 1,
        "well_formed": percent(exam["well-formed calls"]),
        "right_tool": percent(exam["right tool"]),
        "right_arguments": percent(exam["right tool and arguments"]),
        "right_answers": percent(exam["right answers"]),
        "left_out": f"{100 * missing['missing']:.0f} %",
        "missing_arguments": percent(missing["right tool and arguments"]),
        "missing_calls": missing["calls"],
        "missing_answers": percent(missing["right answers"]),
        "missing_asked": missing["answers"],
        "skills": skill_rows(exam["skills"]),
    }
    return CARD.format_map(
        settings | {name: exam[name] for name in ("dialogues", "turns", "calls", "answers")} | figures
    )


if __name__ == "__main__":
    (tokenizer.FOLDER / "README.md").write_text(card(tokenizer.FOLDER), encoding="utf-8")
