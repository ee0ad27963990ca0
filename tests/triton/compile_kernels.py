"""Compiles kernels for a device that is not there, as the wrappers launch them, and prints what each needs.

    python tests/triton/compile_kernels.py sm_90

Triton's compiler and its assembler need no driver: registers, spilled bytes, shared memory and matrix instructions of
each launch are known without one. Nothing runs; wrappers get tensors of host memory, whose contents do not matter.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "0"
sys.path.insert(0, str(Path(__file__).parent.parent / "kernels"))
sys.path.insert(0, str(Path(__file__).parent))

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
TARGETS = {"sm_90": GPUTarget("cuda", 90, 32), "gfx942": GPUTarget("hip", "gfx942", 64)}


class Absent:
    """A driver that says which device to compile for, and has none."""

    def __init__(self, target: GPUTarget) -> None:
        self._target = target

    def get_current_target(self) -> GPUTarget:
        """What to compile for."""
        return self._target

    def get_current_device(self) -> int:
        """The first."""
        return 0

    def get_current_stream(self, device: int) -> int:
        """None."""
        return 0


def record(target: GPUTarget) -> dict[str, Any]:
    """From now on launches compile and do nothing else; by the kernel's name, what was compiled."""
    found: dict[str, Any] = {}
    run = JITFunction.run

    def compile_only(self: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        compiled = run(self, *arguments, grid=grid, warmup=True, **options)
        widths = [
            f"{k}={v}" for k, v in options.items() if k in ("BLOCK_M", "BLOCK_N", "FIXED", "GROUP", "GATED", "SCALED")
        ]
        name = f"{self.__module__.rpartition('.')[2]}.{self.__name__} {' '.join(widths)}".strip()
        found.setdefault(name, compiled)
        return compiled

    JITFunction.run = compile_only
    driver.set_active(Absent(target))
    return found


def facts(compiled: Any) -> dict[str, int]:
    """shared: bytes; where it is NVIDIA's: registers of a thread, bytes it spills, wgmma and mma instructions."""
    result = {"shared": int(compiled.metadata.shared), "warps": int(compiled.metadata.num_warps)}
    if "cubin" not in compiled.asm:
        return result
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [CUOBJDUMP, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    for name, pattern in (("registers", r"REG:(\d+)"), ("stack", r"STACK:(\d+)"), ("local", r"LOCAL:(\d+)")):
        match = re.search(pattern, usage)
        result[name] = int(match.group(1)) if match else -1
    ptx = compiled.asm["ptx"]
    result["wgmma"] = len(re.findall(r"wgmma\.mma_async", ptx))
    result["mma"] = len(re.findall(r"\bmma\.sync", ptx))
    result["fma64"] = len(re.findall(r"fma\.rn\.f64", ptx))
    result["cp_async"] = len(re.findall(r"cp\.async\.c[ag]", ptx))
    return result


def main() -> None:
    """Compile what `launches` launches, and print facts as JSON."""
    target = sys.argv[1]
    found = record(TARGETS[target])
    from compile_launches import launches

    wanted = sys.argv[2:]
    for name, launch in launches():
        if not wanted or any(word in name for word in wanted):
            launch()
    print(json.dumps({name: facts(compiled) for name, compiled in found.items()}, indent=1))


if __name__ == "__main__":
    torch.manual_seed(1)
    main()
