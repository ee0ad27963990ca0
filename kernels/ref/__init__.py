"""The references: each operation in plain PyTorch, written to be read. They run on any device and in any floating
type, float64 included, which makes them the oracle that the other kernels are tested against."""

from tokenrelay.kernels.ref import attention, elementwise, linear, moe, sampling

__all__ = ["attention", "elementwise", "linear", "moe", "sampling"]
