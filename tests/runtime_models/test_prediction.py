"""The multi-token prediction layer: its weights, and what it says beside the published formulas in float64."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import make_checkpoint, make_model
from paged import Paged
from predictions import FILE, make_prediction_checkpoint, predicted
from safetensors.torch import load_file, save_file

from tokenrelay.base.errors import CheckpointError
from tokenrelay.kernels.batch import AttentionBatch
from tokenrelay.runtime.models.prediction import Pairs
from tokenrelay.runtime.weights.loader import load_model

BLOCK_TOKENS = 16
TOKENS = [int(t) for t in torch.randint(0, 384, (37,), generator=torch.Generator().manual_seed(4))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_prediction_checkpoint(tmp_path_factory.mktemp("mtp") / "model")


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def load(folder: Path, **options: Any) -> Any:
    return load_model(folder, **{"dtype": torch.float32, "block_tokens": BLOCK_TOKENS, "prediction": "on", **options})


def edit(folder: Path, tensors: dict[str, torch.Tensor | None]) -> None:
    """Replace, add or (None) take out."""
    found = load_file(folder / FILE)
    for name, tensor in tensors.items():
        found.pop(name, None)
        if tensor is not None:
            found[name] = tensor
    save_file(found, folder / FILE, metadata={"format": "pt"})


def configure(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def asked_rows(paged: Paged, sequence: int, rows: list[int]) -> AttentionBatch:
    """A decode row of the sequence for each of these tokens."""
    at = torch.tensor(rows)
    return AttentionBatch(
        block_table=paged.block_table,
        slots=torch.full((len(rows),), paged.rows[sequence].slot, dtype=torch.int32),
        starts=at.to(torch.int32),
        lengths=torch.ones(len(rows), dtype=torch.int32),
        offsets=torch.arange(len(rows) + 1, dtype=torch.int32),
        positions=at,
        cache_slots=torch.zeros(len(rows), dtype=torch.int64),
        decodes=len(rows),
        context_max=max(rows, default=0) + 1,
    )


def said(model: Any, tokens: list[int], cuts: list[int], dtype: torch.dtype = torch.float32) -> Any:
    """(hidden, logits of the layer) behind each token, its entries written in pieces that end at `cuts`."""
    paged = Paged(model)
    cache = torch.full(paged.caches[0].shape, float("nan"), dtype=dtype)
    sequence = paged.add(tokens)
    token_ids, batch, _ = paged.batch({sequence: len(tokens)})
    hidden = model.hidden(token_ids, batch, [*paged.caches, cache])
    before = torch.cat((torch.zeros(1, hidden.shape[1], dtype=dtype), hidden[:-1]))
    parts = []
    for first, end in zip([0, *cuts], [*cuts, len(tokens)], strict=True):
        rows = list(range(first, end))
        pairs = Pairs(
            hidden=before[first:end],
            embedded=model.embed(token_ids[first:end]),
            positions=batch.positions[first:end],
            cache_slots=batch.cache_slots[first:end],
            asked=torch.arange(end - first),
        )
        y = model.prediction(pairs, model.cos_sin, asked_rows(paged, sequence, rows), cache)
        parts.append(model.head(y))
    return hidden, torch.cat(parts)


@pytest.mark.parametrize("cuts", [[], [1, 16, 20]])
def test_it_says_what_the_published_formulas_say(folder: Path, cuts: list[int]) -> None:
    model = load(folder)
    hidden, logits = said(model, TOKENS, cuts)
    expected = predicted(folder, hidden, TOKENS)
    assert float((logits - expected).abs().max()) < 1e-4 * float(expected.abs().max())


def test_the_hidden_states_are_those_of_the_reference(folder: Path) -> None:
    """What the report calls h: behind the last norm, for every token and not for sampled ones only."""
    hf = make_model("deepseek_v3", num_nextn_predict_layers=1)
    hidden, _ = said(load(folder), TOKENS, [])
    with torch.no_grad():
        expected = hf.model(torch.tensor([TOKENS])).last_hidden_state[0]
    assert float((hidden - expected).abs().max()) < 1e-4


def test_entries_without_queries_are_written_all_the_same(folder: Path) -> None:
    model = load(folder)
    paged = Paged(model)
    caches = [torch.full(paged.caches[0].shape, float("nan")) for _ in range(2)]
    sequence = paged.add(TOKENS)
    token_ids, batch, _ = paged.batch({sequence: len(TOKENS)})
    hidden = torch.ones(len(TOKENS), 64)
    rows = torch.tensor([3, 36])
    pairs = Pairs(hidden, model.embed(token_ids), batch.positions, batch.cache_slots, rows)
    y = model.prediction(pairs, model.cos_sin, asked_rows(paged, sequence, [3, 36]), caches[0])
    assert y.shape == (2, 64)
    model.prediction.write(pairs, model.cos_sin, caches[1])
    written = [cache.view(-1, cache.shape[-1])[batch.cache_slots] for cache in caches]
    assert torch.equal(written[0], written[1]) and not written[0].isnan().any()


def test_bfloat16_is_near(folder: Path) -> None:
    hidden, logits = said(load(folder, dtype=torch.bfloat16), TOKENS, [], torch.bfloat16)
    expected = predicted(folder, hidden.float(), TOKENS)
    error = (logits - expected).abs().mean() / expected.abs().mean()
    assert float(error) < 0.05


def test_float8_blocks_are_read(copy: Path) -> None:
    """`eh_proj` and an expert as DeepSeek stores them."""
    own = "model.layers.2."
    names = (f"{own}eh_proj.weight", f"{own}mlp.experts.5.down_proj.weight", f"{own}self_attn.q_b_proj.weight")
    tensors = load_file(copy / FILE)
    changes: dict[str, torch.Tensor | None] = {}
    rounded = {}
    for name in names:
        weight = tensors[name]
        factors = torch.full((-(-weight.shape[0] // 32), -(-weight.shape[1] // 32)), 0.01)
        packed = (weight / 0.01).to(torch.float8_e4m3fn)
        changes |= {name: packed, f"{name}_scale_inv": factors}
        rounded[name] = packed.float() * 0.01
    edit(copy, changes)
    configure(copy, quantization_config={"quant_method": "fp8", "weight_block_size": [32, 32]})
    hidden, logits = said(load(copy), TOKENS, [])
    edit(copy, {**rounded, **{f"{name}_scale_inv": None for name in names}})
    expected = predicted(copy, hidden, TOKENS)
    assert float((logits - expected).abs().max()) < 1e-4 * float(expected.abs().max())


def test_off_leaves_it_out_and_changes_nothing(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    logging.getLogger("tokenrelay").propagate = True
    try:
        with caplog.at_level(logging.INFO, "tokenrelay.weights"):
            off = load(folder, prediction="off")
    finally:
        logging.getLogger("tokenrelay").propagate = False
    on = load(folder)
    assert "left out the multi-token prediction layers" in caplog.text
    assert off.prediction is None and off.config.kv_layers == off.config.layers == 2
    assert on.config.kv_layers == 3 and on.config.layers == 2
    assert off.config.kv_words != on.config.kv_words and off.config.identity == on.config.identity
    logits = []
    for model in (off, on):
        paged = Paged(model)
        logits.append(paged.step({paged.add(TOKENS): len(TOKENS)})[0])
    assert torch.equal(*logits)


def test_where_there_is_none(tmp_path: Path, copy: Path) -> None:
    """`auto` goes on without it, `on` says why not: Kimi-K2 has no such layers, transformers drops them."""
    plain = make_checkpoint(tmp_path / "plain", "deepseek_v3", num_nextn_predict_layers=1)
    qwen = make_checkpoint(tmp_path / "qwen", "qwen3")
    edit(copy, {})
    for found, words in ((plain, "transformers drops it"), (qwen, "its architecture has none")):
        assert load(found, prediction="auto").prediction is None
        with pytest.raises(CheckpointError, match=words):
            load(found)
    configure(copy, num_nextn_predict_layers=0)
    assert load(copy, prediction="auto").prediction is None
    with pytest.raises(CheckpointError, match="Kimi-K2"):
        load(copy)


def test_an_embedding_of_its_own_is_refused(copy: Path) -> None:
    tensor = load_file(copy / FILE)["model.layers.2.embed_tokens.weight"]
    tensor[7, 7] += 1
    edit(copy, {"model.layers.2.embed_tokens.weight": tensor})
    with pytest.raises(CheckpointError, match=r"model\.layers\.2\.embed_tokens\.weight is not model\.embed_tokens"):
        load(copy)
    assert load(copy, prediction="off").prediction is None


@pytest.mark.parametrize(
    ("name", "tensor", "words"),
    [
        ("model.layers.2.enorm.weight", None, "lacks the tensor model.layers.2.enorm.weight"),
        ("model.layers.2.eh_proj.weight", torch.zeros(64, 64), "has shape"),
        ("model.layers.2.gate.weight", torch.zeros(64), "has no place in a prediction layer"),
    ],
)
def test_a_broken_layer_is_refused(copy: Path, name: str, tensor: torch.Tensor | None, words: str) -> None:
    edit(copy, {name: tensor})
    with pytest.raises(CheckpointError, match=words):
        load(copy)
