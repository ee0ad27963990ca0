"""A Qwen3 checkpoint folder as a GGUF file: `python gguf_of.py FOLDER FILE bf16|int8|int4` (BF16, Q8_0, Q4_0).

The table that embedding and head share is Q8_0 where the rest is Q4_0: ours keeps 8 bits there too.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Kind
from gguf.quants import quantize

KINDS = {"bf16": Kind.BF16, "int8": Kind.Q8_0, "int4": Kind.Q4_0}
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
TOP = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}


def tensors_of(path: Path) -> dict[str, np.ndarray]:
    """float32, by the checkpoint's names. The file is read by hand: numpy has no bfloat16."""
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    found = {}
    for name, entry in json.loads(data[8 : 8 + size]).items():
        if name != "__metadata__":
            assert entry["dtype"] == "BF16", f"{name} is {entry['dtype']}"
            first, end = (8 + size + at for at in entry["data_offsets"])
            halves = np.frombuffer(data[first:end], np.uint16).astype(np.uint32) << 16
            found[name] = halves.view(np.float32).reshape(entry["shape"])
    return found


def name_of(name: str) -> str:
    """llama.cpp's word for a tensor."""
    if name in TOP:
        return TOP[name]
    _, _, layer, rest = name.split(".", 3)
    return f"blk.{layer}.{NAMES[rest.removesuffix('.weight')]}.weight"


def main() -> None:
    """Write it."""
    folder, target, form = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
    config = json.loads((folder / "config.json").read_text())
    writer = gguf.GGUFWriter(target, "qwen3")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    for name, tensor in tensors_of(folder / "model.safetensors").items():
        if tensor.ndim == 1:
            writer.add_tensor(name_of(name), tensor)
            continue
        kind = Kind.Q8_0 if form == "int4" and "embed_tokens" in name else KINDS[form]
        writer.add_tensor(name_of(name), quantize(tensor, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    main()
