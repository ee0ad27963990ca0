"""What this machine offers, found without torch: usable CPUs, instruction sets, memory, GPUs."""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
from dataclasses import dataclass
from pathlib import Path

# The instruction sets our kernels and torch's make a difference by, oldest first, as /proc/cpuinfo spells them.
_FEATURES = ("avx2", "fma", "avx512f", "avx512bw", "avx512_vnni", "avx512_bf16", "amx_bf16", "asimd", "bf16")


@dataclass(frozen=True)
class Machine:
    """Facts for people and for sizing thread pools."""

    cpu: str
    cpus: int  # that this process may use: affinity and cgroup quota
    features: tuple[str, ...]
    memory_bytes: int  # of the machine, or of the cgroup where that is less
    gpus: tuple[str, ...]  # names; empty where there is no usable one

    def summary(self) -> str:
        """One line, for example `AMD EPYC 9B14, 2 CPUs, avx512_bf16, 24 GiB; no GPU`."""
        newest = self.features[-1] if self.features else "no vector unit known"
        noun = "CPU" if self.cpus == 1 else "CPUs"
        gpus = ", ".join(self.gpus) if self.gpus else "no GPU"
        return f"{self.cpu}, {self.cpus} {noun}, {newest}, {self.memory_bytes / 2**30:.0f} GiB; {gpus}"


def look() -> Machine:
    """Look at the machine; takes a few milliseconds where there is no GPU driver."""
    cpu, flags = _cpuinfo(Path("/proc/cpuinfo"))
    return Machine(
        cpu=cpu,
        cpus=usable_cpus(),
        features=tuple(name for name in _FEATURES if name in flags),
        memory_bytes=_memory_bytes(),
        gpus=gpu_names(),
    )


def usable_cpus(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """How many CPUs this process may keep busy: its affinity, less where a cgroup's quota allows less. At least 1."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):
        quota, period = (cgroup / "cpu.max").read_text().split()
        if quota != "max":
            cpus = min(cpus, max(1, int(quota) // int(period)))
    return cpus


def gpu_names() -> tuple[str, ...]:
    """Names of the devices the CUDA driver lists (docs.nvidia.com/cuda/cuda-driver-api); () without a driver."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return ()
    count = ctypes.c_int(0)
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return ()
    names = []
    for index in range(count.value):
        name = ctypes.create_string_buffer(256)
        if driver.cuDeviceGetName(name, 256, index) == 0:
            names.append(name.value.decode(errors="replace"))
    return tuple(names)


def _cpuinfo(path: Path) -> tuple[str, frozenset[str]]:
    """(name, flags) of the first CPU; x86 says `model name` and `flags`, Arm says `Features` only."""
    fields: dict[str, str] = {}
    with contextlib.suppress(OSError):
        for line in path.read_text(errors="replace").splitlines():
            if not line.strip():
                break
            key, _, value = line.partition(":")
            fields[key.strip()] = value.strip()
    name = fields.get("model name") or platform.processor() or platform.machine()
    return name, frozenset((fields.get("flags") or fields.get("Features") or "").split())


def _memory_bytes() -> int:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with contextlib.suppress(OSError, ValueError):  # "max" is no number: no limit
        total = min(total, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return total
