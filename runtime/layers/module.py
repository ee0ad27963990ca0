"""The base of all modules here: `nn.Module` without what inference never uses.

At batch 1 a decode step of a small model is made of Python, and nn.Module has a large part in it: its calls (hooks) and
its `__getattr__` (parameters and children live in side tables). About 14 calls and 33 look-ups a layer took 25 to 35 us
of 55 to 77 us. So calls go straight to `forward`, and `freeze_all` puts parameters and children where Python looks
first.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn


class Module(nn.Module):
    """An nn.Module that runs no hooks. Call `freeze_all` once its parameters are final."""

    _frozen = False

    def __call__(self, *args: Any) -> Any:
        """`forward`, with no hooks around it."""
        return self.forward(*args)

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if self._frozen and (name in self._parameters or name in self._modules):
            self.__dict__[name] = value

    def __delattr__(self, name: str) -> None:
        super().__delattr__(name)
        self.__dict__.pop(name, None)  # where a frozen module has it too: else its memory would stay

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Module:
        """What `.to(...)` is built on: it may replace parameters, so a frozen module is thawed around it."""
        frozen = self._frozen
        if frozen:
            for name in [*self._parameters, *self._modules]:
                del self.__dict__[name]
            self._frozen = False
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if frozen:
            self._freeze()
        return self

    def _freeze(self) -> None:
        if not self._frozen:
            self.__dict__.update(self._parameters)
            self.__dict__.update(self._modules)
            self._frozen = True


def freeze_all(model: nn.Module) -> None:
    """Freeze every `Module` within `model`; `.to(...)` and its kin still work."""
    for module in model.modules():
        if isinstance(module, Module):
            module._freeze()
