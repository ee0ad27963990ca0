"""A recording of device work with the rules of a graph, on the CPU: what was put in the queue runs again, on the same
memory, with the same numbers, and without any Python of the model between.

torch's operations and Triton's launches (in the interpreter) are written down as they run. A replay repeats them:
results go where they went, new memory holds rubbish, and Python's numbers stay what they were. Reading one from the
device is refused, as a device refuses it. So a launch that depends on what stands in a tensor, or a result that was
kept from an earlier step, gives a wrong token here.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.interpreter import GridExecutor

from tokenrelay.runtime.executor.graphs import Eager

RUBBISH = -77
READS = ("tolist", "item", "__int__", "__bool__", "__float__", "__index__", "numpy")  # of Tensor: the host waits


class Recorder(TorchDispatchMode):
    """Writes down what runs inside."""

    def __init__(self) -> None:
        super().__init__()
        self.entries: list[Callable[[], None]] = []
        self.launches = 0
        self._inside_launch = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if not self._inside_launch:
            self._note(func, args, kwargs, out)
        return out

    def _note(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        results = [x for x in pytree.tree_leaves(out) if isinstance(x, Tensor)]
        if func._schema.is_mutable:
            self.entries.append(lambda: func(*args, **kwargs))
            return
        inputs = {x.untyped_storage().data_ptr() for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        if all(x.untyped_storage().data_ptr() in inputs for x in results if x.numel()):
            return  # a view: it shows whatever stands there
        empty = func.overloadpacket in (torch.ops.aten.empty, torch.ops.aten.empty_like, torch.ops.aten.new_empty)

        def again() -> None:
            if empty:
                for x in results:
                    x.fill_(RUBBISH)
                return
            for old, new in zip(results, pytree.tree_leaves(func(*args, **kwargs)), strict=True):
                old.copy_(new)

        self.entries.append(again)

    @contextlib.contextmanager
    def no_reads(self) -> Iterator[None]:
        """Inside, this thread cannot ask for a tensor's numbers, but in the interpreter; others prepare the next."""
        recording = threading.get_ident()

        def guarded(read: Callable[..., Any]) -> Callable[..., Any]:
            def asked(*arguments: Any, **options: Any) -> Any:
                if threading.get_ident() == recording and not self._inside_launch:
                    raise RuntimeError("operation not permitted when recording: the host reads from the device")
                return read(*arguments, **options)

            return asked

        before = {name: getattr(Tensor, name) for name in READS}
        for name, read in before.items():
            setattr(Tensor, name, guarded(read))
        try:
            yield
        finally:
            for name, read in before.items():
                setattr(Tensor, name, read)

    @contextlib.contextmanager
    def launched(self) -> Iterator[None]:
        """Inside, the interpreter's own operations are no part of the recording."""
        self._inside_launch, before = True, self._inside_launch
        try:
            yield
        finally:
            self._inside_launch = before


class Recording(Eager):
    """See the module."""

    def __init__(self) -> None:
        self.launches: list[int] = []  # of each recording

    def capture(self, run: Callable[[], None]) -> Callable[[], None]:
        """See `graphs.Backend`."""
        recorder = Recorder()
        call = GridExecutor.__call__

        def launch(executor: Any, *arguments: Any, **options: Any) -> Any:
            with recorder.launched():
                result = call(executor, *arguments, **options)
            recorder.entries.append(lambda: call(executor, *arguments, **options))
            recorder.launches += 1
            return result

        GridExecutor.__call__ = launch
        try:
            with recorder, recorder.no_reads():
                run()
        finally:
            GridExecutor.__call__ = call
        self.launches.append(recorder.launches)

        def replay() -> None:
            for entry in recorder.entries:
                entry()

        return replay
