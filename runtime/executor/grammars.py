"""What a slot's output must be: grammars, and the mask of tokens that may come next.

    grammars = GrammarSource(tokenizer_file, vocab_size, eos_token_ids)      # one per worker
    state = GrammarState(grammars)                                           # of the executor
    state.admit(GrammarAdmission(slot, grammar, output_ids))                 # begins to read it, in a thread
    state.apply(logits, rows, slots)                                         # waits for the masks, if it must
    state.expect(slot, drafted)                                              # a step has a draft of the slot
    state.advance(rows, slots, token_ids)                                    # begins the next masks, in a thread

A mask is computed in a thread while the device runs what comes before it: the first one during the prompt, each next
one from the moment its token is sampled, and those behind drafted tokens from the moment the step with the draft is
there, as far as the grammar allows the draft, since nothing behind that is kept. llguidance computes it and lets go of
the interpreter's lock; docs/adr/0012 says why it was chosen. A slot that asks for nothing costs nothing. Executor's
thread only.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tokenrelay.base.errors import InvalidRequest, TokenRelayError
from tokenrelay.base.logging import get_logger

log = get_logger("grammars")

Int64s = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]  # [V] true where a token may not come
THREADS = 2
CACHED_MAX = 32  # grammars that were read and may come again: choices, turns of a session
WAIT_MAX_S = 30.0  # a mask takes well under a millisecond, a grammar up to a second


class GrammarSource:
    """Grammars for one tokenizer, read when they are first asked for. Any thread."""

    def __init__(self, tokenizer_file: Path, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        self._file = tokenizer_file
        self._vocab_size = vocab_size
        self._eos = list(eos_token_ids)
        self._lock = threading.Lock()
        self._tokenizer: Any = None
        self._read: OrderedDict[str, Any] = OrderedDict()

    def matcher(self, grammar: str) -> Any:
        """An llguidance.LLMatcher at the grammar's beginning. Raises InvalidRequest for what is none."""
        import llguidance

        with self._lock:  # read once, whoever asks
            if self._tokenizer is None:
                self._tokenizer = llguidance.LLTokenizer(
                    str(self._file), n_vocab=self._vocab_size, eos_token=self._eos or None
                )
            known = self._read.get(grammar)
            if known is None:
                known = llguidance.LLMatcher(self._tokenizer, grammar, log_level=0)
                if known.is_error():
                    raise InvalidRequest(f"the grammar cannot be used: {known.get_error()[:500]}")
                self._read[grammar] = known
                if len(self._read) > CACHED_MAX:
                    self._read.popitem(last=False)
            self._read.move_to_end(grammar)
            return known.deep_copy()


@dataclass(frozen=True, slots=True)
class GrammarAdmission:
    """A sequence that asks took `slot`; `output`: its tokens so far, behind the prompt."""

    slot: int
    grammar: str
    output: tuple[int, ...]


class _Sequence:
    """One sequence's place in its grammar. Used by one thread at a time: each task waits for the one before."""

    def __init__(self, source: GrammarSource, admission: GrammarAdmission) -> None:
        self._source = source
        self._admission = admission
        self._matcher: Any = None

    def begin(self) -> list[Mask]:
        self._matcher = self._source.matcher(self._admission.grammar)
        for token_id in self._admission.output:
            self._consume(token_id)
        return [self._forbidden()]

    def go_on(self, token_ids: Sequence[int]) -> list[Mask]:
        for token_id in token_ids:
            self._consume(token_id)
        return [self._forbidden()]

    def look_ahead(self, before: Future[list[Mask]], drafted: Sequence[int]) -> list[Mask]:
        """What may come now, and behind each drafted token up to the first that may not. Leaves its place as it is."""
        masks = list(before.result(WAIT_MAX_S))  # it was begun earlier, so nobody waits for a thread that waits for him
        taken = 0
        for token_id in drafted:
            if self._matcher.is_stopped() or self._matcher.validate_tokens([token_id]) != 1:
                break
            self._matcher.consume_token(token_id)
            taken += 1
            masks.append(self._forbidden())
        if taken and not self._matcher.rollback(taken):
            raise TokenRelayError("the grammar could not go back to where its draft began")
        return masks

    def _consume(self, token_id: int) -> None:
        if not self._matcher.is_stopped():  # behind the end a step that was launched already may sample once more
            self._matcher.consume_token(token_id)

    def _forbidden(self) -> Mask:
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        if self._matcher.is_error():
            raise TokenRelayError(f"the output left its grammar: {self._matcher.get_error()[:500]}")
        forbidden: Mask = np.unpackbits(bits, bitorder="little") == 0
        return forbidden


class GrammarState:
    """The slots that ask."""

    def __init__(self, source: GrammarSource) -> None:
        self._source = source
        self._pool = ThreadPoolExecutor(THREADS, thread_name_prefix="grammar")
        self._sequences: dict[int, _Sequence] = {}
        self._masks: dict[int, Future[list[Mask]]] = {}
        self._drafted: dict[int, list[int]] = {}  # by slot, of the step that runs

    def admit(self, admission: GrammarAdmission) -> None:
        """A sequence took the slot; what the slot had is over."""
        sequence = _Sequence(self._source, admission)
        self._sequences[admission.slot] = sequence
        self._masks[admission.slot] = self._pool.submit(sequence.begin)

    def expect(self, slot: int, drafted: list[int]) -> None:
        """The step that begins has a draft of the slot: it samples behind each of these tokens, too."""
        self._drafted[slot] = drafted
        self._masks[slot] = self._pool.submit(self._sequences[slot].look_ahead, self._masks[slot], drafted)

    def apply(self, logits: Tensor, rows: Int64s, slots: Int64s) -> dict[int, str]:
        """Forbid, in `logits` f32 [s, V], what may not come; row -> why its sequence cannot go on, if any. Rows of one
        slot follow each other, in the order of its draft.
        """
        failures: dict[int, str] = {}
        last, within = -1, 0
        for row, slot in zip(rows.tolist(), slots.tolist(), strict=True):
            last, within = slot, within + 1 if slot == last else 0
            try:
                masks = self._masks[slot].result(WAIT_MAX_S)
            except TokenRelayError as error:
                failures[row] = error.message
            except Exception as error:  # of the library: this sequence fails, the others of the step do not
                log.exception("a grammar failed")
                failures[row] = f"the grammar failed: {type(error).__name__}"
            else:
                if within < len(masks):  # else the draft was left before: what is sampled here is not kept
                    mask = torch.from_numpy(masks[within][: logits.shape[1]]).to(logits.device, non_blocking=True)
                    logits[row].masked_fill_(mask, float("-inf"))
        return failures

    def advance(self, rows: Int64s, slots: Int64s, token_ids: Tensor) -> None:
        """The rows' tokens were sampled: begin the next masks."""
        sampled: dict[int, list[int]] = {}
        chosen = token_ids[torch.from_numpy(rows).to(token_ids.device)].tolist()
        for slot, token_id in zip(slots.tolist(), chosen, strict=True):
            sampled.setdefault(slot, []).append(token_id)
        for slot, tokens in sampled.items():
            drafted = self._drafted.pop(slot, ())
            true = next((n for n, (a, b) in enumerate(zip(tokens, drafted, strict=False)) if a != b), len(drafted))
            masks = self._masks[slot]
            if masks.done() and masks.exception() is None:
                self._masks[slot] = self._pool.submit(self._sequences[slot].go_on, tokens[: true + 1])

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown(wait=False, cancel_futures=True)
