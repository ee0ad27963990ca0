"""What the slots that ask for penalties or biases have seen and said so far, as `ops.apply_penalties` takes it.

A slot that asks for nothing costs nothing. Executor's thread only: a token counts for the next step before the host
knows it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tokenrelay.kernels.batch import PenaltyBatch
from tokenrelay.runtime.requests import SamplingParams

Int64s = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class PenaltyAdmission:
    """A sequence that asks took `slot`; `token_ids` int64: prompt, then output from `output_start`."""

    slot: int
    params: SamplingParams
    token_ids: Int64s
    output_start: int


class _Seen:
    """The distinct tokens of one sequence, and how often each stands in its output."""

    def __init__(self, admission: PenaltyAdmission) -> None:
        params = admission.params
        self.factors = (params.presence_penalty, params.frequency_penalty, params.repetition_penalty)
        biases = dict(params.logit_bias)  # a token named twice: the last one counts
        self.bias_token_ids = np.fromiter(biases.keys(), np.int64, len(biases))
        self.bias = np.fromiter(biases.values(), np.float32, len(biases))
        output, output_counts = np.unique(admission.token_ids[admission.output_start :], return_counts=True)
        # Only the repetition penalty looks at the prompt.
        prompt = admission.token_ids[: admission.output_start] if params.repetition_penalty != 1.0 else output[:0]
        unsaid = np.setdiff1d(prompt, output)
        self.size = len(output) + len(unsaid)
        self._token_ids = np.concatenate([output, unsaid]).astype(np.int64)
        self._counts = np.concatenate([output_counts, np.zeros(len(unsaid), np.int64)]).astype(np.int32)
        self._at = {token: at for at, token in enumerate(self._token_ids.tolist())} if params.penalized else None

    @property
    def token_ids(self) -> Int64s:
        return self._token_ids[: self.size]

    @property
    def counts(self) -> npt.NDArray[np.int32]:
        return self._counts[: self.size]

    def count(self, token: int) -> None:
        """One more token of output."""
        if self._at is None:  # biases alone
            return
        at = self._at.get(token)
        if at is None:
            if self.size == len(self._token_ids):
                room = max(64, self.size)
                self._token_ids = np.concatenate([self._token_ids, np.zeros(room, np.int64)])
                self._counts = np.concatenate([self._counts, np.zeros(room, np.int32)])
            at = self._at[token] = self.size
            self._token_ids[at] = token
            self.size += 1
        self._counts[at] += 1


class PenaltyState:
    """Bounded by the slots, each by the distinct tokens of one context."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._seen: dict[int, _Seen] = {}  # by slot; the next sequence of the slot that asks replaces it

    def admit(self, admission: PenaltyAdmission) -> None:
        """Count what the sequence holds already."""
        self._seen[admission.slot] = _Seen(admission)

    def batch(self, rows: Int64s, slots: Int64s) -> PenaltyBatch:
        """What `apply_penalties` needs for the logits' `rows` [p], which the sequences in `slots` [p] hold."""
        seen = [self._seen[slot] for slot in slots.tolist()]
        factors = np.array([entry.factors for entry in seen], np.float32)  # [p, 3]
        return PenaltyBatch(
            rows=self._to_device(rows),
            presence=self._to_device(factors[:, 0].copy()),
            frequency=self._to_device(factors[:, 1].copy()),
            repetition=self._to_device(factors[:, 2].copy()),
            offsets=self._to_device(_offsets([entry.size for entry in seen])),
            token_ids=self._to_device(np.concatenate([entry.token_ids for entry in seen])),
            output_counts=self._to_device(np.concatenate([entry.counts for entry in seen])),
            bias_offsets=self._to_device(_offsets([len(entry.bias) for entry in seen])),
            bias_token_ids=self._to_device(np.concatenate([entry.bias_token_ids for entry in seen])),
            bias=self._to_device(np.concatenate([entry.bias for entry in seen])),
        )

    def count(self, slots: Int64s, token_ids: Tensor) -> None:
        """The sequences in `slots` [p] now also hold `token_ids` int64 [p]."""
        for slot, token in zip(slots.tolist(), token_ids.tolist(), strict=True):
            self._seen[slot].count(token)

    def _to_device(self, array: npt.NDArray[np.generic]) -> Tensor:
        return torch.from_numpy(array).to(self._device)


def _offsets(sizes: list[int]) -> Int64s:
    offsets = np.zeros(len(sizes) + 1, np.int64)
    np.cumsum(sizes, out=offsets[1:])
    return offsets
