"""CPU kernels in C++ (../csrc), registered where the native extension is built.

Each variant of the inner loops is a path: `cpu/baseline`, `cpu/avx2`, `cpu/avx512`, `cpu/avx512bf16`. The extension has
threads of its own (never OpenMP's, which torch brings along) and works without the GIL.
"""

from __future__ import annotations

from tokenrelay.base.logging import get_logger

try:
    import tokenrelay.kernels._cpu as _native
except ImportError as _error:
    # A machine without the extension still runs, slowly, on the references; `kernels list` shows it too.
    get_logger("kernels").warning("the native kernels are not there, references run instead", reason=str(_error))
else:
    from tokenrelay.kernels.cpu import attention, elementwise, integer, linear, moe, packed, sampling
    from tokenrelay.kernels.cpu.variants import VARIANTS

    for _variant in VARIANTS:
        for _part in (attention, elementwise, linear, moe, sampling):
            _part.register_variant(_variant)
    integer.register_all()
    packed.register_all()


def threads() -> int:
    """Threads that work on one call, the caller included; at first the processors this process may use."""
    return _native.threads()


def set_threads(count: int) -> None:
    """Change that: 1 to 256, else ValueError. Results do not depend on it."""
    _native.set_threads(count)
