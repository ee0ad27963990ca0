"""What the leader tells its followers: a kind, a length, and the bytes; a step's tensors lie one behind the other."""

from __future__ import annotations

import json
import os
import select
import struct
import time
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tokenrelay.base.errors import Unavailable
from tokenrelay.kernels.batch import AttentionBatch

HEAD = struct.Struct("<cQ")
LOAD, CACHES, STEP, SPREAD, REPLACE = b"L", b"C", b"S", b"P", b"E"
FRAME_BYTES_MAX = 1 << 30
_COUNTS = 8  # tokens, rows, sampled rows, table columns, decodes, context_max, bounds of groups, group_max


def write_frame(fd: int, kind: bytes, payload: bytes, timeout_s: float) -> None:
    """Send to a pipe that does not block. Raises Unavailable when the reader is gone or does not read in time."""
    end = time.monotonic() + timeout_s
    rest = memoryview(HEAD.pack(kind, len(payload)) + payload)
    while rest:
        left = end - time.monotonic()
        if left <= 0 or not select.select([], [fd], [], left)[1]:
            raise Unavailable(f"a rank did not take its plan within {timeout_s:g} s")
        try:
            rest = rest[os.write(fd, rest) :]
        except BlockingIOError:
            continue
        except OSError as error:
            raise Unavailable(f"a rank is gone: {error.strerror}") from error


def read_frame(fd: int) -> tuple[bytes, bytes] | None:
    """The next frame, or None at the end of the pipe: the leader is gone, or has closed."""
    head = _read(fd, HEAD.size)
    if head is None:
        return None
    kind, length = HEAD.unpack(head)
    if length > FRAME_BYTES_MAX:
        raise Unavailable(f"a frame of {length} bytes")
    payload = _read(fd, length)
    return None if payload is None else (kind, payload)


def _read(fd: int, count: int) -> bytes | None:
    parts = []
    while count:
        part = os.read(fd, min(count, 1 << 20))
        if not part:
            return None
        parts.append(part)
        count -= len(part)
    return b"".join(parts)


def pack_json(values: dict[str, Any]) -> bytes:
    """A frame's payload for LOAD and CACHES."""
    return json.dumps(values).encode()


def pack_step(token_ids: Tensor, batch: AttentionBatch, sample_rows: Tensor, block_tokens: int) -> bytes:
    """int64 all through: the counts, then each tensor; of the block table the rows and columns in use."""
    columns = -(-batch.context_max // block_tokens)
    table = batch.block_table[batch.slots.long(), :columns]
    groups = token_ids.new_empty(0) if batch.groups is None else batch.groups
    counts = [len(token_ids), len(batch.slots), len(sample_rows), columns, batch.decodes, batch.context_max]
    counts += [len(groups), batch.group_max]
    tensors = [token_ids, batch.positions, batch.cache_slots, batch.starts, batch.lengths, batch.offsets, sample_rows]
    tensors.append(groups)
    arrays = [tensor.cpu().numpy().astype("<i8", copy=False) for tensor in (*tensors, table.reshape(-1))]
    return b"".join([np.array(counts, "<i8").tobytes(), *(array.tobytes() for array in arrays)])


def unpack_step(payload: bytes) -> tuple[Tensor, AttentionBatch, Tensor]:
    """The step's token ids, batch and sampled rows, as `pack_step` had them."""
    values = torch.frombuffer(bytearray(payload), dtype=torch.int64)
    tokens, rows, sampled, columns, decodes, context_max, grouped, group_max = values[:_COUNTS].tolist()
    sizes = [tokens, tokens, tokens, rows, rows, rows + 1, sampled, grouped, rows * columns]
    tensors = torch.split(values[_COUNTS:], sizes)
    token_ids, positions, cache_slots, starts, lengths, offsets, sample_rows, groups, table = tensors
    batch = AttentionBatch(
        block_table=table.view(rows, columns).int(),
        slots=torch.arange(rows, dtype=torch.int32),
        starts=starts.int(),
        lengths=lengths.int(),
        offsets=offsets.int(),
        positions=positions.clone(),
        cache_slots=cache_slots.clone(),
        decodes=decodes,
        context_max=context_max,
        groups=groups.int() if grouped else None,
        group_max=group_max,
        extents=tuple(zip(starts.tolist(), lengths.tolist(), strict=True)),
    )
    return token_ids.clone(), batch, sample_rows.clone()


def on_device(
    token_ids: Tensor, batch: AttentionBatch, sample_rows: Tensor, device: torch.device
) -> tuple[Tensor, AttentionBatch, Tensor]:
    """A step's tensors where the model is."""
    if token_ids.device == device:
        return token_ids, batch, sample_rows
    fields = ("block_table", "slots", "starts", "lengths", "offsets", "positions", "cache_slots")
    moved = {name: getattr(batch, name).to(device) for name in fields}
    if batch.groups is not None:
        moved["groups"] = batch.groups.to(device)
    return token_ids.to(device), replace(batch, **moved), sample_rows.to(device)
