"""What the registry says of these kernels on machines of all kinds, and that nobody else names a vendor."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tokenrelay.kernels import isa, registry
from tokenrelay.kernels.triton import DEVICE, arch

ROOT = Path(__file__).parent.parent.parent


def run(code: str, **environment: str) -> str:
    """What a new process prints, without the interpreter unless asked."""
    env = {**os.environ, "TRITON_INTERPRET": "0", **environment}
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True).stdout


def test_without_a_device_they_are_listed_and_refused_and_triton_is_not_loaded() -> None:
    code = (
        "import sys; from tokenrelay.kernels import registry, isa\n"
        "registry.load(); isa.register_device('cuda', lambda: frozenset())\n"
        "print(registry.explain('mla_decode', dtype='bfloat16', heads=16, rank=512))\n"
        "print(registry.explain('mla_decode', device='cuda', dtype='bfloat16', heads=16, rank=512))\n"
        "print('triton' in sys.modules)"
    )
    out = run(code)
    assert "triton/balanced  device: required cpu, supported cuda" in out
    assert "triton/balanced  isa: this machine lacks dot_bf16, triton, supported dot_bf16, triton" in out.replace(
        "required ", ""
    )
    assert out.endswith("False\n")


def test_the_architecture_is_a_feature(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a device of enough features the balanced kernel runs, and in deterministic mode the fixed one."""
    run_code = (
        "from tokenrelay.kernels import registry, isa\n"
        "registry.load(); isa.register_device('cuda', lambda: frozenset({'triton', 'sm_90', 'dot_bf16', 'dot_fp8'}))\n"
        "path = lambda **d: registry.select('mla_decode', device='cuda', **d).path\n"
        "print(path(dtype='bfloat16', rank=512), path(dtype='float8_e4m3fn'), path(dtype='bfloat16', rank=4096))\n"
        "registry.deterministic()\n"
        "print(path(dtype='bfloat16', rank=512), path(dtype='float8_e4m3fn'))\n"
        "print(registry.numerics('cuda').split('/')[2])"
    )
    assert run(run_code).splitlines() == [
        "triton/balanced triton/balanced-fp8 ref/torch",
        "triton/fixed triton/fixed-fp8",
        "dot_bf16,dot_fp8,sm_90,triton",
    ]


def test_interpreted_kernels_are_never_chosen_by_themselves() -> None:
    code = (
        "from tokenrelay.kernels import registry\n"
        "for op in registry.ops():\n"
        "    kernel = registry.select(op); assert not kernel.path.startswith('triton/'), (op, kernel)\n"
        "with registry.force('rms_norm', 'triton/rows'): print(registry.select('rms_norm').path)"
    )
    assert run(code, TRITON_INTERPRET="1") == "triton/rows\n"
    assert arch.features() >= {"triton"}
    assert isa.features_of("cpu") == isa.features()


def test_vendors_are_named_in_this_folder_only() -> None:
    """Sources of kernels/ and runtime/ but kernels/triton, and the links' figures of the placements' cost model."""
    word = re.compile(r"\b(nvidia|amd|rocm|hopper|h100|h200|sm_\d\d|gfx\d+)\b", re.IGNORECASE)
    found = []
    for folder in ("kernels", "runtime"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            if (ROOT / "kernels/triton") in path.parents or path == ROOT / "runtime/placement/cost.py":
                continue
            found += [f"{path.relative_to(ROOT)}: {m.group()}" for m in word.finditer(path.read_text(encoding="utf-8"))]
    assert found == []


def test_every_kernel_says_what_it_needs() -> None:
    for op in registry.ops():
        for kernel in registry.kernels(op):
            if kernel.path.startswith("triton/"):
                assert kernel.dtypes, kernel
                assert kernel.device == ("any" if kernel.priority < 0 else DEVICE)
