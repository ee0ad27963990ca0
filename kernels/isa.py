"""What the processor can do, as the kernels ask for it."""

from __future__ import annotations

import functools
import platform
from collections.abc import Callable
from pathlib import Path

# Linux's names in /proc/cpuinfo, which list only what the operating system enabled too.
_PROBED = (
    "avx2",
    "fma",
    "f16c",
    "avx512f",
    "avx512bw",
    "avx512vl",
    "avx512dq",
    "avx512_bf16",
    "avx512_vnni",
    "amx_bf16",
)


@functools.cache
def features() -> frozenset[str]:
    """The instruction sets of this machine that a kernel may ask for, for example `avx2`, `avx512f`, `avx512_bf16`.

    The native extension asks the processor itself (CPUID, and XGETBV for what the system saves); where it is not
    built, Linux's list is read. An unknown machine has none, and runs the references.
    """
    try:
        import tokenrelay.kernels._cpu as _cpu
    except ImportError:
        return _from_proc_cpuinfo(Path("/proc/cpuinfo"))
    return frozenset(_cpu.isa_features())


_devices: dict[str, Callable[[], frozenset[str]]] = {}


def register_device(device: str, probe: Callable[[], frozenset[str]]) -> None:
    """`probe` says what the accelerators that torch calls `device` can do; who brings kernels for them registers it."""
    _devices[device] = probe


def features_of(device: str) -> frozenset[str]:
    """What kernels on this device may ask for: the processor's features, or the accelerator's, its architecture too."""
    probe = _devices.get(device)
    return features() if probe is None else probe()


def machine() -> str:
    """The architecture, for example `x86_64`."""
    return platform.machine()


def _from_proc_cpuinfo(path: Path) -> frozenset[str]:
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return frozenset()
    for line in text.splitlines():
        if line.startswith("flags"):
            flags = set(line.partition(":")[2].split())
            return frozenset(name for name in _PROBED if name in flags)
    return frozenset()
