"""The identity of a loaded model: 16 bytes that are equal where KV blocks may be shared."""

from __future__ import annotations

import hashlib
from dataclasses import fields

import torch

from tokenrelay.runtime.models.config import Architecture
from tokenrelay.runtime.weights.checkpoint import Checkpoint

SAMPLES_MAX = 512  # tensors looked into
SAMPLE_BYTES = 4096  # from the middle of each


def changed_identity(identity: bytes, form: str, person: bytes = b"tokenrelay-quant") -> bytes:
    """Of a model whose KV is no longer that of `identity`, as its weights (or `person`) are kept in another form."""
    return hashlib.blake2b(identity + form.encode(), digest_size=16, person=person).digest()


def model_identity(checkpoint: Checkpoint, name: str, architecture: Architecture, dtype: torch.dtype) -> bytes:
    """BLAKE2b-128 over the architecture, the dtype, all headers and sizes, and samples of the data.

    Headers alone would make every fine-tune of a model equal to it, and one's KV would be served as the other's. So
    4 KiB from the middle of up to 512 tensors, evenly chosen in name order, count too: at most 2 MiB are read. The
    folder's name and place do not count: copies on other machines are equal.
    """
    digest = hashlib.blake2b(digest_size=16, person=b"tokenrelay-model")

    def add(text: str | bytes) -> None:
        data = text.encode() if isinstance(text, str) else text
        digest.update(len(data).to_bytes(8, "little") + data)

    add(name)
    add(str(dtype))
    for field in fields(architecture):
        value = getattr(architecture, field.name)
        add(f"{field.name}={sorted(value) if isinstance(value, frozenset) else value!r}")
    for file in checkpoint.files:
        add(file.path.name)
        add(file.header)
        add(str(file.size_bytes))
    names = sorted(checkpoint.where)
    step = -(-len(names) // SAMPLES_MAX)
    for tensor in names[::step]:
        entry = checkpoint.entry(tensor)
        size = min(entry.size_bytes, SAMPLE_BYTES)
        add(checkpoint.where[tensor].read(entry.first + (entry.size_bytes - size) // 2, size))
    return digest.digest()
