"""The interpreter accepts what a compiler does not: each kernel is compiled for a device that is not there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SHARED_MAX = 232_448  # bytes of one block on sm_90 (CUDA C++ programming guide, table of compute capabilities)
SPILLED_MAX = 128  # bytes of a thread: addresses that are used once a step
SCRIPT = Path(__file__).parent / "compile_kernels.py"


def compiled(*words: str, target: str = "sm_90") -> dict[str, dict[str, int]]:
    env = {**os.environ, "TRITON_INTERPRET": "0"}
    command = [sys.executable, str(SCRIPT), target, *words]
    out = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert out.returncode == 0, out.stderr
    found: dict[str, dict[str, int]] = json.loads(out.stdout)
    return found


def check(found: dict[str, dict[str, int]]) -> None:
    """What fits, does not spill its loops away, and multiplies on the matrix units."""
    for name, facts in found.items():
        assert facts["shared"] * facts.get("programs", 1) <= SHARED_MAX, name
        assert facts["stack"] <= SPILLED_MAX, name
        if "attend" in name or "matmul" in name or "experts" in name:
            assert facts["wgmma"] + facts["mma"] > 0, name
        if "BLOCK_M=64" in name and ("attend" in name):
            assert facts["wgmma"] > 0, name
        if "weigh" in name:
            assert facts["fma64"] == 0, "contracted: other last bits than on a processor"


def test_the_most_used_compile() -> None:
    check(compiled("norm", "mla 16 False False", "sample"))


@pytest.mark.slow
def test_all_compile() -> None:
    found = compiled()
    check(found)
    assert {name.split()[0] for name in found} >= {
        "mla_kernels.attend",
        "gqa_kernels.attend",
        "dense_kernels.attend",
        "walk.merge",
        "matmul_kernels.matmul",
        "sampling_kernels.choose",
        "elementwise_kernels.rotate",
        "rotary_write_kernels.rotate_write_gqa",
        "rotary_write_kernels.rotate_write_mla",
    }


@pytest.mark.slow
def test_the_other_vendor_s_compile() -> None:
    """Nothing here is one vendor's: no instruction, no layout. Tiles of matrix products are too large for its shared
    memory, so the registry does not choose those kernels there (`shared_227k`); the others fit."""
    found = compiled("norm", "silu", "rotary", "write", "sample", "linear", "gqa decode False", target="gfx942")
    tiled = ("attend", "matmul")
    assert all(facts["shared"] <= 65_536 for name, facts in found.items() if not any(word in name for word in tiled))
    assert any("attend" in name for name in found)
