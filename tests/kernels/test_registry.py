"""Registration, selection, explanation, forcing, plugins, layouts, the ISA probe, the thread pool."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tokenrelay.base.errors import KernelUnavailable
from tokenrelay.kernels import cpu, isa, ops, registry
from tokenrelay.kernels.cpu.variants import VARIANTS
from tokenrelay.kernels.layout import GqaLayout, MlaLayout
from tokenrelay.kernels.registry import Limit


@pytest.fixture
def extra() -> Iterator[list[tuple[str, str]]]:
    """(op, path) of kernels that a test registers; they go again."""
    added: list[tuple[str, str]] = []
    yield added
    for op, path in added:
        registry.unregister(op, path)


def test_every_op_has_a_reference_a_native_kernel_and_a_public_function() -> None:
    for op in registry.ops():
        found = {k.path for k in registry.kernels(op)}
        assert found & {"ref/torch", registry.PARTS}
        assert any(path.startswith(("cpu/", "triton/")) for path in found), op
        assert callable(getattr(ops, op))
        assert getattr(ops, op).__doc__


def test_the_best_supported_kernel_is_chosen_and_the_rest_explained(extra: list[tuple[str, str]]) -> None:
    registry.load()
    for path, priority, limits, dtypes, device in (
        ("test/best", 99, {"width": Limit(64, 128, 64)}, ["float32"], "cpu"),
        ("test/device", 98, {}, [], "cuda"),
        ("test/isa", 97, {}, [], "cpu"),
    ):
        needs = ["warp_drive"] if path == "test/isa" else []
        registry.register(
            op="rms_norm", path=path, device=device, isa=needs, dtypes=dtypes, limits=limits, priority=priority
        )(lambda *_: None)
        extra.append(("rms_norm", path))
    explanation = registry.explain("rms_norm", device="cpu", dtype="float32", width=128)
    assert explanation.chosen is not None
    assert explanation.chosen.path == "test/best"
    assert registry.select("rms_norm", width=128).path == "test/best"
    reasons = {v.kernel.path: v.reason for v in explanation.verdicts}
    assert reasons["test/best"] == "chosen: priority 99"
    assert reasons["test/device"] == "device: required cpu, supported cuda"
    assert reasons["test/isa"] == "isa: required this machine lacks warp_drive, supported warp_drive"
    assert reasons["ref/torch"] == "priority 0, test/best has 99"
    smaller = registry.explain("rms_norm", dtype="bfloat16", width=96)
    verdict = next(v for v in smaller.verdicts if v.kernel.path == "test/best")
    assert [str(u) for u in verdict.unmet] == [
        "dtype: required bfloat16, supported float32",
        "width: required 96, supported 64..128, a multiple of 64",
    ]
    assert smaller.chosen is not None
    assert smaller.chosen.path.startswith("cpu/")
    text = str(smaller)
    assert "rms_norm device=cpu dtype=bfloat16 width=96" in text
    assert "* cpu/" in text


def test_dispatch_finds_a_new_kernel_and_forgets_an_old_one(extra: list[tuple[str, str]]) -> None:
    x, weight = torch.ones(1, 4), torch.ones(4)
    before = ops.rms_norm(x, weight, 0.0)
    registry.register(op="rms_norm", path="test/zero", priority=99)(lambda x, weight, eps: torch.zeros_like(x))
    extra.append(("rms_norm", "test/zero"))
    assert torch.equal(ops.rms_norm(x, weight, 0.0), torch.zeros(1, 4))
    registry.unregister(*extra.pop())
    assert torch.equal(ops.rms_norm(x, weight, 0.0), before)


def test_dispatch_searches_once(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = torch.ones(1, 12), torch.ones(12)
    ops.rms_norm(x, weight, 0.0)
    monkeypatch.setattr(registry, "select", lambda *_, **__: pytest.fail("searched again"))
    ops.rms_norm(x, weight, 0.0)


def test_force() -> None:
    with registry.force("rms_norm", "ref/torch"):
        explanation = registry.explain("rms_norm")
        assert explanation.chosen is not None
        assert explanation.chosen.path == "ref/torch"
        assert {v.reason for v in explanation.verdicts if not v.unmet} == {"chosen: forced", "ref/torch is forced"}
        with registry.force("rms_norm", "cpu/baseline"):
            assert registry.select("rms_norm").path == "cpu/baseline"
            with pytest.raises(KernelUnavailable, match="dtype: required float64, supported bfloat16, float32"):
                ops.rms_norm(torch.ones(1, 4).double(), torch.ones(4).double(), 0.0)
        assert registry.select("rms_norm").path == "ref/torch"
    assert registry.select("rms_norm").path != "ref/torch"
    with pytest.raises(KernelUnavailable, match="no kernel 'cpu/none'"), registry.force("rms_norm", "cpu/none"):
        pass


def test_mistakes_in_registration_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown op 'fly'"):
        registry.register(op="fly", path="x")
    with pytest.raises(ValueError, match="no dimension wings"):
        registry.register(op="rms_norm", path="x", limits={"wings": Limit()})
    with pytest.raises(ValueError, match="already"):
        registry.register(op="rms_norm", path="ref/torch")(lambda: None)
    with pytest.raises(ValueError, match="unknown op"):
        registry.kernels("fly")
    with pytest.raises(ValueError, match="no dimension wings"):
        registry.explain("rms_norm", wings=2)


PLUGIN = """
from tokenrelay.kernels.registry import register

def good():
    register(op="silu_mul", path="acme/fast", priority=77)(lambda gate_up: "acme")

def bad():
    raise RuntimeError("no licence")
"""


def test_plugins_register_through_entry_points(tmp_path: Path) -> None:
    """A real distribution on the path; a plugin that fails is reported and does no harm."""
    (tmp_path / "acme_kernels.py").write_text(PLUGIN)
    for name in ("good", "bad"):
        info = tmp_path / f"acme_{name}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: acme-{name}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[tokenrelay.kernels]\n{name} = acme_kernels:{name}\n")
    code = (
        "import torch; from tokenrelay.kernels import ops, registry; k = registry.select('silu_mul');"
        "print(k.path, k.source, ops.silu_mul(torch.zeros(1, 2)), registry.plugin_errors())"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout.strip() == "acme/fast acme-good acme {'acme-bad': 'RuntimeError: no licence'}"


def test_without_the_extension_the_references_run() -> None:
    code = (
        "import sys; sys.modules['tokenrelay.kernels._cpu'] = None\n"
        "import torch; from tokenrelay.kernels import isa, ops, registry\n"
        "print(registry.select('sample').path, sorted(isa.features()) == sorted(isa.features()),"
        " ops.silu_mul(torch.zeros(1, 2)).shape)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "ref/torch True torch.Size([1, 1])"


def test_importing_the_registry_is_light() -> None:
    code = "import sys, tokenrelay.kernels.registry, tokenrelay.kernels.layout; print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"


def test_isa_probe_agrees_with_the_system() -> None:
    listed = isa._from_proc_cpuinfo(Path("/proc/cpuinfo"))
    assert isa.features() == listed
    for variant in VARIANTS:
        from tokenrelay.kernels import _cpu

        assert _cpu.isa_runs(variant.code) == (variant.isa <= isa.features())


def test_an_unknown_machine_has_no_instruction_sets(tmp_path: Path) -> None:
    assert isa._from_proc_cpuinfo(tmp_path / "nothing") == frozenset()
    (tmp_path / "cpuinfo").write_text("processor: 0\nflags\t\t: fpu avx2 fma frob\n")
    assert isa._from_proc_cpuinfo(tmp_path / "cpuinfo") == {"avx2", "fma"}


def test_a_variant_this_machine_lacks_is_refused_by_the_extension() -> None:
    from tokenrelay.kernels import _cpu

    with pytest.raises(ValueError, match="cannot run instruction set variant 9"):
        _cpu.silu_mul(9, 0, 0, 1, 0, 0, 0)
    with pytest.raises(ValueError, match="dtype code"):
        _cpu.silu_mul(0, 5, 0, 1, 0, 0, 0)


def test_numerics_is_stable_and_names_what_decides() -> None:
    text = registry.numerics()
    assert text == registry.numerics()
    assert text.startswith("cpu/")
    assert f"torch-{torch.__version__.split('+')[0]}" in text
    with registry.force("mla_decode", "ref/torch"):
        assert registry.numerics() != text
    assert registry.numerics() == text


def test_layouts() -> None:
    mla = MlaLayout(rank=512, rope=64, block_tokens=64)
    assert mla.shape(10) == (10, 64, 576)
    assert mla.bytes_per_block(torch.bfloat16) == 64 * 576 * 2
    gqa = GqaLayout(kv_heads=8, head_dim=128, block_tokens=16)
    assert gqa.shape(3) == (3, 2, 8, 16, 128)
    assert gqa.bytes_per_block(torch.float32) == 2 * 8 * 16 * 128 * 4
    assert MlaLayout(1, 1, 1) != MlaLayout(1, 1, 2)
    with pytest.raises(ValueError, match=r"MlaLayout\.rope is 0"):
        MlaLayout(512, 0, 64)


def test_threads() -> None:
    before = cpu.threads()
    assert 1 <= before <= (os.cpu_count() or 1)
    try:
        cpu.set_threads(3)
        assert cpu.threads() == 3
        for bad in (0, 257):
            with pytest.raises(ValueError, match="1 to 256"):
                cpu.set_threads(bad)
    finally:
        cpu.set_threads(before)


def test_calls_from_several_threads_at_once() -> None:
    x, weight = torch.randn(500, 1000), torch.randn(1000)
    expected = ops.rms_norm(x, weight, 1e-5)
    wrong: list[int] = []

    def work(number: int) -> None:
        for _ in range(30):
            if not torch.equal(ops.rms_norm(x, weight, 1e-5), expected):
                wrong.append(number)

    workers = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(timeout=60)
        assert not worker.is_alive()
    assert wrong == []


def test_a_forked_child_can_call_kernels() -> None:
    """The pool's threads do not live on in a child; it starts its own."""
    code = (
        "import os, torch; from tokenrelay.kernels import ops, cpu; cpu.set_threads(3)\n"
        "x, w = torch.randn(500, 1000), torch.ones(1000); expected = ops.rms_norm(x, w, 1e-5)\n"
        "child = os.fork()\n"
        "if child == 0:\n"
        "    same = torch.equal(ops.rms_norm(x, w, 1e-5), expected)\n"
        "    os._exit(0 if same and len(os.listdir('/proc/self/task')) >= 3 else 3)\n"
        "print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert result.stdout.strip() == "0"
