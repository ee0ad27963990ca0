"""Reads safetensors files through memory maps, with errors that name file and tensor.

The format (huggingface/safetensors, README): 8 bytes little-endian length of the header, the header as JSON
({name: {dtype, shape, data_offsets}} and `__metadata__`), then the data, row-major, little-endian. It is read here
rather than through the safetensors package because that one reports neither which tensor a truncated file lacks nor
where a tensor lies, and pages that were copied could not be given back.
"""

from __future__ import annotations

import contextlib
import json
import math
import mmap
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, TypeGuard

import torch
from torch import Tensor

from tokenrelay.base.errors import CheckpointError

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_HEADER_BYTES_MAX = 100_000_000  # the reference implementation's bound


@dataclass(frozen=True)
class Entry:
    """One tensor of a file; `first` and `end` are byte positions in the file."""

    name: str
    dtype: str  # as the header spells it
    shape: tuple[int, ...]
    first: int
    end: int

    @property
    def size_bytes(self) -> int:
        """Bytes of the tensor's data."""
        return self.end - self.first


class SafetensorsFile:
    """One open file: `entries` by name in the order of their data, `tensor(name)` as a view of the map.

    A tensor stays valid until `release(name)` or `close()`; both expect that no view of it is used any more.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.size_bytes = path.stat().st_size
            with path.open("rb") as file:
                self.header = _read_header(file.read(8), file, path, self.size_bytes)
                # Copy-on-write, because torch warns of tensors over read-only memory; nothing is ever written.
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        except FileNotFoundError:
            raise CheckpointError(f"{path} does not exist", file=str(path)) from None
        except OSError as error:
            raise CheckpointError(f"cannot read {path}: {error.strerror}", file=str(path)) from error
        self.entries = _entries(self.header, path, self.size_bytes)

    def __enter__(self) -> SafetensorsFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def tensor(self, name: str) -> Tensor:
        """The tensor as it lies in the file: no copy, no conversion."""
        entry = self.entries[name]
        dtype = DTYPES[entry.dtype]
        count = math.prod(entry.shape)
        if count == 0:
            return torch.empty(entry.shape, dtype=dtype)
        return torch.frombuffer(self._map, dtype=dtype, count=count, offset=entry.first).view(entry.shape)

    def read(self, first: int, size_bytes: int) -> bytes:
        """Bytes of the file."""
        return self._map[first : first + size_bytes]

    def release(self, name: str) -> None:
        """Give the pages of a tensor back to the system: resident memory stays flat however large the file is."""
        entry = self.entries[name]
        page = mmap.PAGESIZE
        first = -(-entry.first // page) * page
        end = entry.end // page * page
        if end > first and hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED, first, end - first)

    def close(self) -> None:
        """Unmap. Tensors of this file must be gone; where an error's traceback still holds one, it unmaps later."""
        with contextlib.suppress(BufferError):
            self._map.close()


def _read_header(length_bytes: bytes, file: Any, path: Path, size_bytes: int) -> bytes:
    length = int.from_bytes(length_bytes, "little")
    if len(length_bytes) < 8 or length == 0:
        raise CheckpointError(f"{path} is no safetensors file: it has {size_bytes} bytes and no header", file=str(path))
    if length > _HEADER_BYTES_MAX:
        raise CheckpointError(f"{path} is no safetensors file: its header would have {length} bytes", file=str(path))
    if 8 + length > size_bytes:
        message = f"{path} is truncated: it has {size_bytes} bytes, its header alone takes {8 + length}"
        raise CheckpointError(message, file=str(path))
    header: bytes = file.read(length)
    return header


def _entries(header: bytes, path: Path, size_bytes: int) -> dict[str, Entry]:
    try:
        values = json.loads(header)
    except ValueError as error:
        raise CheckpointError(f"{path}: its header is not valid JSON: {error}", file=str(path)) from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: its header is no JSON object", file=str(path))
    data_first = 8 + len(header)
    made = [_entry(name, value, data_first, path) for name, value in values.items() if name != "__metadata__"]
    for entry in made:
        if entry.end > size_bytes:
            raise CheckpointError(
                f"{path} is truncated: {entry.name} ends at byte {entry.end} and the file has {size_bytes}",
                file=str(path),
                tensor=entry.name,
            )
    return {entry.name: entry for entry in sorted(made, key=lambda entry: entry.first)}


def _entry(name: str, value: Any, data_first: int, path: Path) -> Entry:
    def fail(what: str) -> CheckpointError:
        return CheckpointError(f"{path}: {name} {what}", file=str(path), tensor=name)

    if not isinstance(value, dict):
        raise fail("has no description in the header")
    shape, offsets, dtype = value.get("shape"), value.get("data_offsets"), value.get("dtype")
    if dtype not in DTYPES:
        raise fail(f"has the unknown dtype {dtype!r}; known: {', '.join(DTYPES)}")
    if not _sizes(shape) or not _sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise fail(f"has an invalid description: shape {shape!r}, data_offsets {offsets!r}")
    expected = math.prod(shape) * DTYPES[dtype].itemsize
    if offsets[1] - offsets[0] != expected:
        raise fail(f"has {offsets[1] - offsets[0]} bytes; {dtype} {shape} takes {expected}")
    return Entry(name, dtype, tuple(shape), data_first + offsets[0], data_first + offsets[1])


def _sizes(values: Any) -> TypeGuard[list[int]]:
    return isinstance(values, list) and all(type(item) is int and item >= 0 for item in values)
