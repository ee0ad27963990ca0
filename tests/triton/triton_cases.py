"""Where these tests run: on a device, with full shapes, or in Triton's interpreter on the CPU, with small ones."""

from __future__ import annotations

import dataclasses
from typing import TypeVar

import torch
from kernel_cases import Case
from torch import Tensor

from tokenrelay.kernels.batch import AttentionBatch
from tokenrelay.kernels.triton.config import interpreting

FULL = not interpreting()
DEVICE = torch.device("cuda" if FULL else "cpu")
_T = TypeVar("_T")


def pick(small: _T, full: _T) -> _T:
    """What fits here."""
    return full if FULL else small


def there(batch: AttentionBatch) -> AttentionBatch:
    """The batch on the device; a new object in any case, so that nothing computed of another one is used."""
    tensors = {
        field.name: value.to(DEVICE)
        for field in dataclasses.fields(batch)
        if isinstance(value := getattr(batch, field.name), Tensor)
    }
    return dataclasses.replace(batch, **tensors)


def moved(case: Case) -> Case:
    """The case with batch and cache on the device; its truth stays."""
    return Case(there(case.batch), case.cache.to(DEVICE), case.contexts)


def grouped(batch: AttentionBatch, lengths: list[int]) -> AttentionBatch:
    """The batch, its decode rows being runs of `lengths` rows of one sequence each."""
    first = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    return dataclasses.replace(batch, groups=first, group_max=max(lengths))
