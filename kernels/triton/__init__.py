"""Kernels for accelerators, in Triton. Nothing outside this folder names a vendor.

Registering loads neither triton nor a kernel: a machine without a device lists them and says what it lacks. With
TRITON_INTERPRET=1 they run on the CPU, in Triton's interpreter, far below every other kernel's priority: for tests.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Mapping
from typing import Any

from tokenrelay.kernels import isa
from tokenrelay.kernels.registry import Limit, register
from tokenrelay.kernels.triton.config import interpreting

DEVICE = "cuda"  # torch's name for either vendor's devices
PRIORITY = 50
INTERPRETED = -100  # taken off each priority in the interpreter

_BF16 = ("float32", "bfloat16")
_TILES = ("dot_bf16", "shared_227k")  # what kernels with matrix products need: their tiles are large
_LATENT = {"rank": Limit(8, 512), "rope": Limit(2, 128), "heads": Limit(1, 256), "block_tokens": Limit(1, 1024)}


def _later(module: str, name: str, *first: object) -> Callable[..., Any]:
    """The function `name` of a module of this package, loaded at its first call; `first`: its first arguments."""
    found: Callable[..., Any] | None = None

    def call(*arguments: Any, **options: Any) -> Any:
        nonlocal found
        if found is None:
            function = getattr(importlib.import_module(f"{__name__}.{module}"), name)
            found = functools.partial(function, *first) if first else function
        return found(*arguments, **options)

    call.__name__ = name
    return call


def _add(
    op: str,
    path: str,
    call: Callable[..., Any],
    *,
    priority: int = PRIORITY,
    needs: tuple[str, ...] = (),
    dtypes: tuple[str, ...] = _BF16,
    limits: Mapping[str, Limit] | None = None,
    layout: str = "",
    invariant: bool = True,
) -> None:
    interpreted = interpreting()
    register(
        op=op,
        path=path,
        device="any" if interpreted else DEVICE,
        isa=() if interpreted else ("triton", *needs),
        dtypes=dtypes,
        limits=limits,
        layout=layout,
        priority=priority + (INTERPRETED if interpreted else 0),
        invariant=invariant,
    )(call)


def _features() -> frozenset[str]:
    from tokenrelay.kernels.triton.arch import features

    return features()


def register_all() -> None:
    """Register every kernel of this folder; the registry does it, once."""
    isa.register_device(DEVICE, _features)
    for op in ("rms_norm", "add_rms_norm"):
        _add(op, "triton/rows", _later("elementwise", op), limits={"width": Limit(1, 32768)})
    _add("silu_mul", "triton/rows", _later("elementwise", "silu_mul"))
    _add("rotary", "triton/rows", _later("elementwise", "rotary"), limits={"rope": Limit(2, 1024, 2)})
    mla_dims = {name: _LATENT[name] for name in ("rank", "rope")}
    write = _later("elementwise", "mla_cache_write")
    _add("mla_cache_write", "triton/rows", write, limits=mla_dims, layout="mla")
    _add("mla_cache_write", "triton/fp8", write, dtypes=("float8_e4m3fn",), limits=mla_dims, layout="mla-fp8")
    heads = {"kv_heads": Limit(1, 256), "head_dim": Limit(1, 512)}
    _add("gqa_cache_write", "triton/rows", _later("elementwise", "gqa_cache_write"), limits=heads, layout="gqa")
    _register_rotary_writes(mla_dims, heads)
    route = _later("moe", "moe_route")
    _add("moe_route", "triton/rows", route, dtypes=("float32",), limits={"experts": Limit(1, 1024)})
    _register_attention()
    for fixed, name in ((False, "tiles"), (True, "fixed")):
        call, priority, needs = (
            _later("scaled", "scaled_linear", fixed),
            PRIORITY - 5 * fixed,
            ("dot_fp8", "shared_227k"),
        )
        options: dict[str, Any] = {"dtypes": ("bfloat16",), "invariant": fixed}
        _add("scaled_linear", f"triton/{name}", call, priority=priority, needs=needs, **options)
    for fixed, name in ((False, "grouped"), (True, "fixed")):
        for op, needs, dtypes in (("moe", _TILES, _BF16), ("scaled_moe", ("dot_fp8", "shared_227k"), ("bfloat16",))):
            call, priority = _later("moe", op, fixed), PRIORITY - 5 * fixed
            _add(op, f"triton/{name}", call, priority=priority, needs=needs, dtypes=dtypes, invariant=fixed)
    sample = _later("sampling", "sample")
    _add("sample", "triton/rows", sample, dtypes=("float32",), limits={"vocab": Limit(1, 1 << 20)})
    _add("apply_penalties", "triton/rows", _later("sampling", "apply_penalties"), dtypes=("float32",))
    for op in ("linear", "mla_absorb", "mla_expand"):  # below torch's: where rows must not depend on others
        _add(op, "triton/invariant", _later("matmul", op), priority=-10, needs=_TILES)


def _register_rotary_writes(mla: Mapping[str, Limit], gqa: Mapping[str, Limit]) -> None:
    call = _later("rotary_write", "mla_rotary_write")
    mla = {**mla, "rope": Limit(2, 128, 2), "heads": Limit(1, 256)}
    _add("mla_rotary_write", "triton/rows", call, limits=mla, layout="mla")
    _add("mla_rotary_write", "triton/fp8", call, dtypes=("float8_e4m3fn",), limits=mla, layout="mla-fp8")
    limits = {**gqa, "heads": Limit(1, 1024), "head_dim": Limit(2, 512, 2)}
    call = _later("rotary_write", "gqa_rotary_write")
    _add("gqa_rotary_write", "triton/rows", call, limits=limits, layout="gqa")
    scaled = {**limits, "head_dim": Limit(4, 512, 4)}
    _add("gqa_rotary_write", "triton/fp8", call, dtypes=("float8_e4m3fn",), limits=scaled, layout="gqa-fp8")


def _register_attention() -> None:
    """Each operation twice: cut by load, and, for deterministic mode, at fixed places with invariant rows."""
    heads = {"heads": Limit(1, 1024), "kv_heads": Limit(1, 256), "head_dim": Limit(1, 256)}
    for op, module in (
        ("mla_decode", "mla"),
        ("mla_prefill", "mla_prefill"),
        ("gqa_decode", "gqa"),
        ("gqa_prefill", "gqa"),
    ):
        latent = op.startswith("mla")
        kinds: list[tuple[str, tuple[str, ...], str]] = [("", _BF16, module.partition("_")[0])]
        kinds.append(("-fp8", ("float8_e4m3fn",), f"{kinds[0][2]}-fp8"))
        for fixed, name in ((False, "balanced"), (True, "fixed")):
            for suffix, dtypes, layout in kinds:
                _add(
                    op,
                    f"triton/{name}{suffix}",
                    _later(module, op, fixed),
                    priority=PRIORITY - 5 * fixed,
                    needs=_TILES,
                    dtypes=dtypes,
                    limits=_LATENT if latent else {**heads, "block_tokens": Limit(1, 1024)},
                    layout=layout,
                    invariant=fixed,
                )
