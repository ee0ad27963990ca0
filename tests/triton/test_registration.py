"""What the registry says of these kernels on machines of all kinds, and that nobody else names a vendor."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from tokenrelay.kernels import isa, registry
from tokenrelay.kernels.triton import DEVICE, arch

ROOT = Path(__file__).parent.parent.parent


def run(code: str, **environment: str) -> str:
    """What a new process prints, without the interpreter unless asked."""
    env = {**os.environ, "TRITON_INTERPRET": "0", **environment}
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True).stdout


def test_what_runs_follows_from_what_the_device_can_do() -> None:
    """Nothing: listed and refused, and triton is not even loaded. Enough: balanced, or fixed in deterministic mode."""
    code = """
import sys
from tokenrelay.kernels import isa, registry
registry.load()
isa.register_device("cuda", lambda: frozenset())
for device in ("cpu", "cuda"):
    reasons = registry.explain("mla_decode", device=device, dtype="bfloat16", rank=512).verdicts
    print(next(v.reason for v in reasons if v.kernel.path == "triton/balanced"))
print("triton" in sys.modules)
isa.register_device("cuda", lambda: frozenset({"triton", "sm_90", "dot_bf16", "dot_fp8", "shared_227k"}))
path = lambda op, **d: registry.select(op, device="cuda", **d).path
print(path("mla_decode", dtype="bfloat16", rank=512), path("mla_decode", dtype="float8_e4m3fn"))
print(path("mla_decode", dtype="bfloat16", rank=4096), path("linear", dtype="bfloat16"), path("sample"))
isa.register_device("cuda", lambda: frozenset({"triton", "gfx942", "dot_bf16", "dot_fp8"}))
print(path("mla_decode", dtype="bfloat16", rank=512), path("rms_norm", dtype="bfloat16"), path("sample"))
isa.register_device("cuda", lambda: frozenset({"triton", "sm_90", "dot_bf16", "dot_fp8", "shared_227k"}))
registry.deterministic()
print(path("mla_decode", dtype="bfloat16", rank=512), path("mla_prefill", dtype="float8_e4m3fn"))
print(path("gqa_prefill", dtype="bfloat16"), path("linear", dtype="bfloat16"), path("mla_absorb"))
print(registry.numerics("cuda").split("/")[2])
"""
    assert run(code).splitlines() == [
        "device: required cpu, supported cuda",
        "isa: required this machine lacks dot_bf16, shared_227k, triton, supported dot_bf16, shared_227k, triton",
        "False",
        "triton/balanced triton/balanced-fp8",
        "ref/torch ref/torch triton/rows",
        "ref/torch triton/rows triton/rows",
        "triton/fixed triton/fixed-fp8",
        "triton/fixed triton/invariant triton/invariant",
        "dot_bf16,dot_fp8,shared_227k,sm_90,triton",
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
