"""Host memory as a second tier of KV: the buffer, and who copies between it and the caches.

    memory = HostMemory(caches, slots=4096)
    copier = Copier(memory, on_ended)
    copier.start(copies)            # what the scheduler wants copied; returns at once
    copier.close()                  # what was started ends first

A block of all layers is one copy: it lies in a slot as it lies in the cache, layer by layer, whatever the layout.
Copies run in a thread of their own, beside the steps; on a GPU on a stream of their own, from and to pinned memory.
Loads go before write-backs, since a sequence waits for them. Which blocks, and that no step touches them meanwhile, is
the scheduler's business (docs/scheduler.md, the host tier).
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tokenrelay.base.errors import ConfigError
from tokenrelay.base.logging import get_logger
from tokenrelay.libscheduler import Copies

log = get_logger("executor")

OnEnded = Callable[[list[int], list[int]], None]  # ids of copies that ended well, and in vain
RUN_MAX = 32  # copies that are reported together: a load is not kept waiting by more write-backs than that
CLOSE_MAX_S = 60.0


@dataclass(frozen=True, slots=True)
class Copy:
    """One block on its way. `load`: to the device."""

    id: int
    block: int
    slot: int
    load: bool


class HostMemory:
    """Room for `slots` blocks of every layer, in the layout of the caches."""

    def __init__(self, caches: Sequence[Tensor], slots: int) -> None:
        """`caches`: one per layer, [blocks, …]. Raises ConfigError when there is no such memory."""
        self.caches = list(caches)
        self.device = caches[0].device
        try:
            self.slots = [torch.empty((slots, *c.shape[1:]), dtype=c.dtype) for c in caches]
            self._pinned = [self._pin(layer) for layer in self.slots] if self.device.type == "cuda" else []
        except RuntimeError as error:
            raise ConfigError(f"cannot allocate host memory for {slots} KV blocks: {error}") from error
        # On a CPU moved by numpy, in the copier's thread alone: torch would take the threads of the steps for it.
        pairs = zip(self.caches, self.slots, strict=True) if self.device.type == "cpu" else ()
        self._bytes = [(cache.view(torch.uint8).numpy(), layer.view(torch.uint8).numpy()) for cache, layer in pairs]

    @staticmethod
    def _pin(layer: Tensor) -> int:
        """Else a copy to or from the device is not asynchronous. torch's own pinned memory is rounded up to powers of
        two, so what is there is registered (cudaHostRegister, CUDA runtime API)."""
        runtime = torch.cuda.cudart()  # type: ignore[no-untyped-call]
        status = runtime.cudaHostRegister(layer.data_ptr(), layer.nbytes, 0)
        if int(status) != 0:
            raise RuntimeError(f"cudaHostRegister of {layer.nbytes} bytes: error {int(status)}")
        return layer.data_ptr()

    def release(self) -> None:
        """Nobody copies any more. Idempotent."""
        while self._pinned:
            torch.cuda.cudart().cudaHostUnregister(self._pinned.pop())  # type: ignore[no-untyped-call]

    def move(self, run: Sequence[Copy]) -> None:
        """Copy blocks of one direction whose numbers and slots both follow each other: one move a layer.

        Raises IndexError for a block or a slot that is not there.
        """
        first, last = run[0], run[-1]
        if min(first.block, first.slot) < 0 or last.block >= len(self.caches[0]) or last.slot >= len(self.slots[0]):
            raise IndexError(f"blocks {first.block} to {last.block} or host slots {first.slot} to {last.slot}")
        blocks, slots = slice(first.block, last.block + 1), slice(first.slot, last.slot + 1)
        for block_bytes, slot_bytes in self._bytes:
            if first.load:
                np.copyto(block_bytes[blocks], slot_bytes[slots])
            else:
                np.copyto(slot_bytes[slots], block_bytes[blocks])
        if self.device.type != "cpu":
            for cache, layer in zip(self.caches, self.slots, strict=True):
                device, host = cache[blocks], layer[slots]
                if first.load:
                    device.copy_(host, non_blocking=True)
                else:
                    host.copy_(device, non_blocking=True)


def runs_of(copies: Sequence[Copy]) -> list[list[Copy]]:
    """Neighbours together, in the order given: the scheduler prefers runs of blocks."""
    runs: list[list[Copy]] = []
    for copy in copies:
        last = runs[-1][-1] if runs else None
        follows = last is not None and (last.load, last.block + 1, last.slot + 1) == (copy.load, copy.block, copy.slot)
        if follows:
            runs[-1].append(copy)
        else:
            runs.append([copy])
    return runs


class Copier:
    """The thread that copies. `start` and `close` are for the engine's thread."""

    def __init__(self, memory: HostMemory, on_ended: OnEnded) -> None:
        """`on_ended` is called from the copier's thread, with every started copy once."""
        self._memory = memory
        self._on_ended = on_ended
        on_gpu = memory.device.type == "cuda"
        self._stream = torch.cuda.Stream(memory.device) if on_gpu else None  # type: ignore[no-untyped-call]
        self._wake = threading.Condition()
        self._loads: deque[Copy] = deque()  # both bounded by the scheduler's table of copies
        self._stores: deque[Copy] = deque()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="host-tier", daemon=True)
        self._thread.start()

    @property
    def block_bytes(self) -> int:
        """Of one block, all layers."""
        return sum(layer[0].nbytes for layer in self._memory.slots)

    def start(self, copies: Copies) -> None:
        """Queue copies."""
        loads = zip(copies.load_ids.tolist(), copies.load_blocks.tolist(), copies.load_slots.tolist(), strict=True)
        stores = zip(copies.store_ids.tolist(), copies.store_blocks.tolist(), copies.store_slots.tolist(), strict=True)
        with self._wake:
            self._loads.extend(Copy(*copy, load=True) for copy in loads)
            self._stores.extend(Copy(*copy, load=False) for copy in stores)
            self._wake.notify()

    def close(self) -> None:
        """Let what was started end, then the thread."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        self._thread.join(CLOSE_MAX_S)
        if not self._thread.is_alive():
            self._memory.release()

    # -- copier's thread ----------------------------------------------------------------------------------------------
    def _run(self) -> None:
        with torch.inference_mode():
            while copies := self._next():
                done: list[int] = []
                failed: list[int] = []
                ids = [copy.id for copy in copies]
                try:
                    self._copy(copies)
                except Exception as error:  # the scheduler answers for it: a sequence computes, a block is not kept
                    log.exception("copies between device and host memory failed", copies=len(ids), error=repr(error))
                    failed = ids
                else:
                    done = ids
                self._on_ended(done, failed)

    def _next(self) -> list[Copy]:
        """Some copies of one direction; none when it is over."""
        with self._wake:
            self._wake.wait_for(lambda: self._loads or self._stores or self._closing)
            queue = self._loads or self._stores
            return [queue.popleft() for _ in range(min(len(queue), RUN_MAX))]

    def _copy(self, copies: Sequence[Copy]) -> None:
        """Returns when nothing is read or written for them any more."""
        if self._stream is None:
            for run in runs_of(copies):
                self._memory.move(run)
            return
        # A step whose plan was committed may still run on the device when it sampled nothing.
        self._stream.wait_stream(torch.cuda.default_stream(self._memory.device))
        with torch.cuda.stream(self._stream):
            try:
                for run in runs_of(copies):
                    self._memory.move(run)
            finally:
                self._stream.synchronize()
