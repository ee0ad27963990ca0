"""Checkpoint folders: every form that loads, every mistake named with file and tensor, memory and identity."""

from __future__ import annotations

import json
import logging
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import make_checkpoint
from model_cases import CASES, assert_close, reference_logits
from paged import Paged
from safetensors.torch import load_file, save_file

from tokenrelay.base.errors import CheckpointError
from tokenrelay.runtime.models.decoder import Model
from tokenrelay.runtime.weights.loader import load_model

CASE = {case.name: case for case in CASES}
TOKENS = list(range(40, 73))


def logits_of(model: Model, tokens: list[int] = TOKENS) -> torch.Tensor:
    paged = Paged(model)
    row = paged.add(tokens)
    return paged.step({row: len(tokens)}, every=True)[row]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen3 in one file; tests copy it before they break it."""
    return make_checkpoint(tmp_path_factory.mktemp("plain"), "qwen3")


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A DeepSeek-V3 in several shards with an index."""
    folder = make_checkpoint(tmp_path_factory.mktemp("sharded"), "deepseek_v3", max_shard_size="50KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder


@pytest.fixture
def folder(plain: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(plain, tmp_path / "model"))


@pytest.fixture
def shards(sharded: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sharded, tmp_path / "model"))


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    values = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({k: v for k, v in values.items() if v is not ...}))


def edit_tensors(folder: Path, edit: Callable[[dict[str, torch.Tensor]], None]) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)


def refused(folder: Path) -> CheckpointError:
    with pytest.raises(CheckpointError) as caught:
        load_model(folder, dtype=torch.float32)
    assert "\n" not in caught.value.message
    return caught.value


# What loads


def test_config_of_a_loaded_model(plain: Path) -> None:
    config = load_model(plain, dtype=torch.bfloat16, block_tokens=32, context_tokens=1000).config
    assert (config.name, config.architecture) == (plain.name, "Qwen3ForCausalLM")
    assert (config.vocab_size, config.layers, config.context_tokens) == (384, 2, 1000)
    assert config.eos_token_ids == (2,)
    assert config.kv_layout.shape(5) == (5, 2, 2, 32, 16)
    assert config.dtype == torch.bfloat16
    assert len(config.identity) == 16


def test_configuration_as_published_before_transformers_5(pair_of: Callable[..., Any], tmp_path: Path) -> None:
    pair = pair_of(CASE["v3-direct-q-yarn"])
    folder = Path(shutil.copytree(pair.folder, tmp_path / "model"))
    rope = dict(json.loads((folder / "config.json").read_text())["rope_parameters"])
    theta, rope["type"] = rope.pop("rope_theta"), rope.pop("rope_type")
    edit_config(folder, rope_parameters=..., rope_scaling=rope, rope_theta=theta, dtype=..., torch_dtype="float32")
    assert_close(logits_of(load_model(folder, block_tokens=16)), reference_logits(pair.hf, TOKENS))


def test_multi_token_prediction_layers_are_left_out_with_a_note(
    shards: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("tokenrelay"), "propagate", True)
    before = logits_of(load_model(shards, dtype=torch.float32, block_tokens=16))
    save_file({"model.layers.2.eh_proj.weight": torch.ones(64, 128)}, shards / "mtp.safetensors")
    index = shards / "model.safetensors.index.json"
    values = json.loads(index.read_text())
    values["weight_map"]["model.layers.2.eh_proj.weight"] = "mtp.safetensors"
    index.write_text(json.dumps(values))
    with caplog.at_level(logging.INFO, "tokenrelay.weights"):
        model = load_model(shards, dtype=torch.float32, block_tokens=16)
    assert "multi-token prediction" in caplog.text
    assert torch.equal(logits_of(model), before)


def test_a_tied_head_is_the_embedding_even_if_the_file_has_one(pair_of: Callable[..., Any], tmp_path: Path) -> None:
    pair = pair_of(CASE["qwen3-tied"])
    assert pair.model.head.tied and not hasattr(pair.model.head, "weight")
    folder = Path(shutil.copytree(pair.folder, tmp_path / "model"))
    edit_tensors(folder, lambda tensors: tensors.update({"lm_head.weight": torch.zeros(384, 64)}))
    assert torch.equal(logits_of(load_model(folder, dtype=torch.float32, block_tokens=16)), logits_of(pair.model))


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float64])
def test_stored_dtypes_are_converted(plain: Path, folder: Path, stored: torch.dtype) -> None:
    """Equal to converting beforehand: the copy rounds once."""

    def store(tensors: dict[str, torch.Tensor]) -> None:
        for name in tensors:
            tensors[name] = tensors[name].to(stored)

    edit_tensors(folder, store)
    model = load_model(folder, dtype=torch.float32)
    name = "model.layers.1.mlp.up_proj.weight"
    expected = load_file(plain / "model.safetensors")[name].to(stored).float()
    assert torch.equal(model.layers[1].mlp.gate_up.weight[96:], expected)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("said", "stored", "expected"),
    [
        ("bfloat16", torch.float32, torch.bfloat16),
        ("float16", torch.float16, torch.float32),
        (..., torch.bfloat16, torch.bfloat16),
        (..., torch.float32, torch.float32),
    ],
)
def test_dtype_left_open(folder: Path, said: Any, stored: torch.dtype, expected: torch.dtype) -> None:
    edit_config(folder, dtype=said)
    edit_tensors(folder, lambda tensors: tensors.update({k: v.to(stored) for k, v in tensors.items()}))
    model = load_model(folder)
    assert model.config.dtype == expected
    assert model.embed.weight.dtype == expected


def test_router_stays_in_float32(sharded: Path) -> None:
    model = load_model(sharded, dtype=torch.bfloat16)
    router = model.layers[1].mlp.router  # type: ignore[union-attr]
    assert router.weight.dtype == router.bias.dtype == torch.float32  # type: ignore[union-attr]
    assert model.layers[1].mlp.experts.w_down.dtype == torch.bfloat16  # type: ignore[union-attr]


def test_float8_blocks_are_turned_into_the_dtype(sharded: Path, shards: Path) -> None:
    """DeepSeek-V3's published form. Expected: the same folder with the products written out by plain loops."""
    block = 24  # divides neither side, so that the last blocks are short
    written = {}
    for path in shards.glob("*.safetensors"):
        tensors = load_file(path)
        for name in [name for name in tensors if name.endswith("proj.weight") and "mlp" in name]:
            weight = tensors[name]
            rows, columns = -(-weight.shape[0] // block), -(-weight.shape[1] // block)
            scale = torch.rand(rows, columns) * 0.01 + 0.001
            quantised = torch.empty_like(weight)
            product = torch.empty_like(weight)
            for i in range(weight.shape[0]):
                for j in range(weight.shape[1]):
                    factor = scale[i // block, j // block]
                    quantised[i, j] = (weight[i, j] / factor).clamp(-448, 448)
                    product[i, j] = quantised[i, j].to(torch.float8_e4m3fn).float() * factor
            tensors[name], tensors[name + "_scale_inv"] = quantised.to(torch.float8_e4m3fn), scale
            written[name] = product
        save_file(tensors, path)
    edit_config(shards, quantization_config={"quant_method": "fp8", "weight_block_size": [block, block]})
    index = shards / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": _weight_map(shards)}))
    model = load_model(shards, dtype=torch.float32)
    experts = model.layers[1].mlp.experts  # type: ignore[union-attr]
    prefix = "model.layers.1.mlp.experts.3"
    assert torch.allclose(experts.w_gate_up[3, :24], written[f"{prefix}.gate_proj.weight"], rtol=1e-6)  # type: ignore[index,union-attr]
    assert torch.allclose(experts.w_down[3], written[f"{prefix}.down_proj.weight"], rtol=1e-6)  # type: ignore[index,union-attr]
    edit_config(shards, quantization_config={"quant_method": "fp8", "weight_block_size": [32, 32]})
    assert "scale_inv is F32" in refused(shards).message
    edit_config(shards, quantization_config=None)
    assert "describes no float8 blocks" in refused(shards).message
    edit_config(shards, quantization_config={"quant_method": "awq"})
    assert 'quantization_config.quant_method is "awq"' in refused(shards).message


def _weight_map(folder: Path) -> dict[str, str]:
    return {name: path.name for path in folder.glob("*.safetensors") for name in load_file(path)}


def test_progress_counts_bytes_up_to_the_total(sharded: Path) -> None:
    calls: list[tuple[int, int]] = []
    load_model(sharded, dtype=torch.float32, progress=lambda done, total: calls.append((done, total)))
    tensors = [tensor for path in sharded.glob("*.safetensors") for tensor in load_file(path).values()]
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    assert len(calls) == len(tensors)
    assert [done for done, _ in calls] == sorted({done for done, _ in calls})
    assert calls[-1] == (size, size)


def test_end_of_reply_tokens(folder: Path) -> None:
    generation = folder / "generation_config.json"
    for value, expected in [(7, (7,)), ([7, 9], (7, 9)), (None, (2,))]:
        generation.write_text(json.dumps({"eos_token_id": value}))
        assert load_model(folder).config.eos_token_ids == expected
    generation.unlink()
    edit_config(folder, eos_token_id=[3, 4])
    assert load_model(folder).config.eos_token_ids == (3, 4)
    edit_config(folder, eos_token_id="end")
    assert 'eos_token_id is "end"' in refused(folder).message


def test_a_model_can_be_moved_after_it_is_frozen(plain: Path) -> None:
    model = load_model(plain, dtype=torch.float32, block_tokens=16)
    before = logits_of(model)
    model.to(torch.float64).to(torch.float32)
    assert model.layers[0].mlp.down.weight.dtype == torch.float32  # type: ignore[union-attr]
    assert torch.equal(logits_of(model), before)


def test_memory_stays_near_the_model(tmp_path: Path) -> None:
    """50 MB of weights in shards, loaded in a process of its own: it grows by the model and little more."""
    folder = make_checkpoint(
        tmp_path / "model", "qwen3_moe", max_shard_size="16MB", num_hidden_layers=2, hidden_size=256,
        moe_intermediate_size=240, num_experts=32, num_experts_per_tok=2,
    )  # fmt: skip
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    assert size > 45e6
    code = f"""
import mmap, torch
from pathlib import Path
from tokenrelay.runtime.weights.loader import load_model
resident = lambda: int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE
load_model(Path({str(tmp_path / "warm")!r}), dtype=torch.float32)
before = resident()
seen = []
model = load_model(Path({str(folder)!r}), dtype=torch.float32, progress=lambda done, total: seen.append(resident()))
print(max(seen) - before)
"""
    make_checkpoint(tmp_path / "warm", "qwen3_moe")
    grown = int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    assert grown < 1.25 * size, f"{grown / 1e6:.0f} MB for {size / 1e6:.0f} MB of weights"


def test_any_damage_to_a_header_is_a_checkpoint_error_or_harmless(folder: Path) -> None:
    """300 random changes of 1 to 4 bytes: never another exception, never a read outside the file."""
    path = folder / "model.safetensors"
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    source = random.Random(0)
    refusals = 0
    for _ in range(300):
        damaged = bytearray(content)
        for _ in range(source.randrange(1, 5)):
            damaged[source.randrange(end)] = source.randrange(256)
        path.write_bytes(damaged)
        try:
            load_model(folder, dtype=torch.float32)
        except CheckpointError:
            refusals += 1
    assert refusals > 290  # a change may leave a header valid: another order, a byte replaced by itself


# Identity


def test_identity_is_of_weights_dtype_and_architecture(plain: Path, folder: Path, tmp_path: Path) -> None:
    first = load_model(plain, dtype=torch.float32).config.identity
    assert load_model(folder, dtype=torch.float32).config.identity == first, "a copy elsewhere is the same model"
    assert load_model(plain, dtype=torch.bfloat16).config.identity != first
    edit_config(folder, rms_norm_eps=1e-5)
    assert load_model(folder, dtype=torch.float32).config.identity != first
    other = make_checkpoint(tmp_path / "other", "qwen3", seed=1)
    assert load_model(other, dtype=torch.float32).config.identity != first, "other weights of the same shapes"


# What is refused


def test_no_folder(tmp_path: Path) -> None:
    assert refused(tmp_path / "nowhere").message == f"the model folder {tmp_path / 'nowhere'} does not exist"
    (tmp_path / "file").write_text("")
    assert "is a file, not a folder" in refused(tmp_path / "file").message


def test_no_config(folder: Path) -> None:
    (folder / "config.json").unlink()
    error = refused(folder)
    assert error.message == f"{folder / 'config.json'} does not exist"
    assert error.file == str(folder / "config.json")


def test_no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    assert "holds neither model.safetensors nor model.safetensors.index.json" in refused(folder).message
    (folder / "pytorch_model.bin").write_bytes(b"")
    assert "convert them to safetensors" in refused(folder).message


def test_a_shard_that_the_index_names_is_missing(shards: Path) -> None:
    path = sorted(shards.glob("*.safetensors"))[1]
    path.unlink()
    error = refused(shards)
    assert error.message.startswith(f"{path} is missing: model.safetensors.index.json says it holds ")
    assert error.file == str(path)


def test_a_shard_that_lacks_what_the_index_says(shards: Path) -> None:
    index = shards / "model.safetensors.index.json"
    values = json.loads(index.read_text())
    values["weight_map"]["model.extra"] = sorted(values["weight_map"].values())[0]
    index.write_text(json.dumps(values))
    error = refused(shards)
    assert "lacks model.extra, which model.safetensors.index.json places there" in error.message
    assert error.tensor == "model.extra"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{}", "weight_map is missing or empty"),
        ('{"weight_map": {"a": "../../etc/passwd"}}', "places a in '../../etc/passwd', expected the name of a file"),
        ('{"weight_map": {"a": 3}}', "places a in 3"),
        ("nonsense", "is not valid JSON"),
    ],
)
def test_a_broken_index(shards: Path, content: str, message: str) -> None:
    (shards / "model.safetensors.index.json").write_text(content)
    assert message in refused(shards).message


def test_a_tensor_twice(shards: Path) -> None:
    first, second = sorted(shards.glob("*.safetensors"))[:2]
    tensors = load_file(first)
    name = next(iter(load_file(second)))
    tensors[name] = torch.zeros(1)
    save_file(tensors, first)
    assert f"{name} is in both {first.name} and {second.name}" in refused(shards).message


def test_a_truncated_file(folder: Path) -> None:
    path = folder / "model.safetensors"
    content = path.read_bytes()
    header = int.from_bytes(content[:8], "little")
    path.write_bytes(content[:-100])
    error = refused(folder)
    assert f"{path} is truncated: " in error.message and f"and the file has {len(content) - 100}" in error.message
    assert error.tensor is not None and error.tensor.startswith("model.")
    path.write_bytes(content[: 8 + header // 2])
    assert (
        f"is truncated: it has {8 + header // 2} bytes, its header alone takes {8 + header}" in refused(folder).message
    )
    path.write_bytes(content[:5])
    assert "is no safetensors file: it has 5 bytes" in refused(folder).message
    path.write_bytes(b"")
    assert "is no safetensors file: it has 0 bytes" in refused(folder).message
    path.write_bytes(b"PK\x03\x04 this is a zip file, not a checkpoint")
    assert "is no safetensors file: its header would have" in refused(folder).message


def _with_header(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    path = folder / "model.safetensors"
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header = change(header) or header
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda h: h["model.norm.weight"].update(dtype="F4"),
            "model.norm.weight has the unknown dtype 'F4'; known: F64",
        ),
        (lambda h: h["model.norm.weight"].update(shape=[63]), "model.norm.weight has 256 bytes; F32 [63] takes 252"),
        (lambda h: h["model.norm.weight"].update(shape=[-64]), "has an invalid description: shape [-64]"),
        (lambda h: h["model.norm.weight"].update(data_offsets=[256, 0]), "has an invalid description"),
        (lambda h: h["model.norm.weight"].pop("shape"), "has an invalid description: shape None"),
        (lambda h: h.update({"model.norm.weight": 5}), "model.norm.weight has no description in the header"),
        (lambda h: b"[]", "its header is no JSON object"),
        (lambda h: b"{", "its header is not valid JSON"),
    ],
)
def test_a_broken_header(folder: Path, change: Callable[[dict[str, Any]], Any], message: str) -> None:
    def apply(header: dict[str, Any]) -> Any:
        result = change(header)
        return result if isinstance(result, bytes) else None

    _with_header(folder, apply)
    assert message in refused(folder).message


def test_a_missing_tensor(folder: Path) -> None:
    edit_tensors(folder, lambda tensors: tensors.pop("model.layers.1.self_attn.k_norm.weight"))
    error = refused(folder)
    file = folder / "model.safetensors"
    assert error.message == (
        f"{file} lacks the tensor model.layers.1.self_attn.k_norm.weight, expected with shape [16]"
    )
    assert (error.file, error.tensor) == (str(file), "model.layers.1.self_attn.k_norm.weight")


def test_a_wrong_shape(folder: Path) -> None:
    edit_tensors(folder, lambda tensors: tensors.update({"model.embed_tokens.weight": torch.zeros(383, 64)}))
    error = refused(folder)
    assert "model.embed_tokens.weight has shape [383, 64]; config.json makes it [384, 64]" in error.message
    assert error.tensor == "model.embed_tokens.weight"


def test_an_unexpected_dtype(folder: Path) -> None:
    zeros = torch.zeros(64, dtype=torch.int32)
    edit_tensors(folder, lambda tensors: tensors.update({"model.norm.weight": zeros}))
    assert "model.norm.weight has dtype I32; expected one of F32, BF16, F16, F64" in refused(folder).message


def test_a_tensor_without_a_place(folder: Path) -> None:
    """A bias that the configuration does not mention would be lost silently, and every answer would be wrong."""
    edit_tensors(folder, lambda tensors: tensors.update({"model.layers.0.self_attn.q_proj.bias": torch.zeros(64)}))
    error = refused(folder)
    assert "model.layers.0.self_attn.q_proj.bias has no place in this architecture" in error.message


def test_derived_tensors_of_old_exports_are_accepted(folder: Path) -> None:
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    edit_tensors(folder, lambda tensors: tensors.update({name: torch.zeros(8)}))
    load_model(folder)


def test_a_dtype_that_no_model_has(plain: Path) -> None:
    with pytest.raises(CheckpointError, match=r"cannot load a model as torch\.int8"):
        load_model(plain, dtype=torch.int8)


def test_weights_larger_than_memory(folder: Path) -> None:
    """A header may promise any size; the file is compared with it before anything is allocated."""
    _with_header(
        folder,
        lambda h: h["model.embed_tokens.weight"].update(shape=[1 << 40, 64], data_offsets=[0, (1 << 40) * 256]) or None,
    )
    edit_config(folder, vocab_size=1 << 30)
    assert "is truncated" in refused(folder).message
