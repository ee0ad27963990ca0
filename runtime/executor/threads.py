"""How many CPU threads a step uses, in torch and in the native kernels alike."""

from __future__ import annotations

import os

import torch

# Below this a matrix fits in a core's cache, and waking a second thread costs more than it computes: on two cores of a
# Zen 4 server a model of 15 MB took 3.1 ms for a step of 16 rows with one thread, 4.2 ms with two (medians).
SMALL_MODEL_BYTES = 32 << 20


def default_threads(parameter_bytes: int) -> int:
    """One for a small model, else one per processor that this process may use."""
    if parameter_bytes < SMALL_MODEL_BYTES:
        return 1
    return processors()


def processors() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def use_threads(count: int) -> None:
    """For the calling thread's torch operations, and for the process's native kernels."""
    torch.set_num_threads(count)
    try:
        from tokenrelay.kernels import _cpu
    except ImportError:
        return  # the references run, in torch
    _cpu.set_threads(min(count, 256))
