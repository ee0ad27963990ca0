"""The scheduler's plan as the executor reads it (docs/contracts.md has the meaning of each field)."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


class Plan(Protocol):
    """One step, as arrays. n rows, decode rows first; the arrays live as long as the plan does."""

    @property
    def step(self) -> int:
        """Its number, from 1."""

    @property
    def decodes(self) -> int:
        """Rows [0, decodes) compute one token after their prompt."""

    @property
    def sequence_ids(self) -> npt.NDArray[np.uint64]:
        """[n]."""

    @property
    def slots(self) -> npt.NDArray[np.int32]:
        """[n] row of the block table and of the per-slot state."""

    @property
    def starts(self) -> npt.NDArray[np.int32]:
        """[n] tokens whose KV stands."""

    @property
    def lengths(self) -> npt.NDArray[np.int32]:
        """[n] tokens of this step."""

    @property
    def token_ids(self) -> npt.NDArray[np.uint32]:
        """[sum(lengths)] inputs; 0 where `feedback`."""

    @property
    def feedback(self) -> npt.NDArray[np.uint8]:
        """[n] 1: the input is the token that the slot sampled last."""

    @property
    def samples(self) -> npt.NDArray[np.uint8]:
        """[n] 1: sample after the row's last position."""

    @property
    def admitted_ids(self) -> npt.NDArray[np.uint64]:
        """[a] sequences that took a slot."""

    @property
    def admitted_slots(self) -> npt.NDArray[np.int32]:
        """[a]."""

    @property
    def admitted_cached(self) -> npt.NDArray[np.int32]:
        """[a] tokens found in the cache."""

    @property
    def admitted_output_start(self) -> npt.NDArray[np.int32]:
        """[a] where their output begins."""
