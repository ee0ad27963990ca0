"""A model between the engine and the real one, which a test breaks."""

from __future__ import annotations

import threading
from typing import Any

import torch
from harness import BLOCK_TOKENS, WAIT_S


class Flaky:
    """A model whose forward the test may break or hold up."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.config = model.config
        self.cos_sin = model.cos_sin
        self.shard = model  # what of it is here
        self.parts, self.whole_pool = 1, True  # and all of its KV
        self.break_next = threading.Event()
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Event()

    def __call__(self, token_ids: torch.Tensor, batch: Any, caches: list[torch.Tensor], rows: torch.Tensor) -> Any:
        self.entered.set()
        assert self.gate.wait(WAIT_S)
        if self.break_next.is_set():
            self.break_next.clear()
            for cache in caches:  # the worst case: it wrote rubbish wherever it may write, before it failed
                blocks, offsets = batch.cache_slots // BLOCK_TOKENS, batch.cache_slots % BLOCK_TOKENS
                if cache.dim() == 3:  # MLA [blocks, tokens, width]
                    cache[blocks, offsets] = 1e3
                else:  # GQA [blocks, 2, heads, tokens, width]
                    cache[blocks, :, :, offsets] = 1e3
            raise RuntimeError("the device fell off the bus")
        return self.model(token_ids, batch, caches, rows)
