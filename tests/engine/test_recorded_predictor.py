"""What recorded steps may write of a prediction layer's KV: entries of blocks that the step holds, and no other."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from harness import BLOCK_TOKENS
from predictions import make_steady_checkpoint

from tokenrelay.runtime.executor.batch import Rows
from tokenrelay.runtime.executor.graphs import _sections
from tokenrelay.runtime.executor.predictor import NOTHING, Predictor
from tokenrelay.runtime.executor.recorded_predictor import RecordedPredictor, proposals_of
from tokenrelay.runtime.weights.loader import load_model

TABLE = np.array([[7, 3, 5, -1], [2, 9, -1, -1], [4, 6, 8, 1]], np.int32)  # -1: not a block of the sequence's
ROWS = 8


@pytest.fixture(scope="module")
def predictor(tmp_path_factory: pytest.TempPathFactory) -> Predictor:
    folder = make_steady_checkpoint(tmp_path_factory.mktemp("steady") / "model")
    model = load_model(folder, dtype=torch.float32, block_tokens=BLOCK_TOKENS, prediction="on")
    cache = torch.zeros(model.config.kv_layout.shape(12))
    found = Predictor(model, cache, TABLE, block_tokens=BLOCK_TOKENS, tokens_max=3)
    found.width, found.wanted = 3, {70, 72}
    return found


def slot(sequence: int, position: int) -> int:
    return int(TABLE[sequence, position // BLOCK_TOKENS]) * BLOCK_TOKENS + position % BLOCK_TOKENS


def staged(predictor: Predictor) -> tuple[RecordedPredictor, dict[str, torch.Tensor], Any]:
    """A step: slot 0 drafts two tokens across a block's end, slot 1 fills a block, slot 2 begins one; then padding."""
    part = RecordedPredictor(predictor, TABLE, block_tokens=BLOCK_TOKENS)
    sections, count = _sections(ROWS, TABLE.shape[1], part.sections(ROWS))
    buffer = torch.full((count,), 0x55, dtype=torch.uint8)
    views = {name: section.of(buffer) for name, section in sections.items()}
    starts = np.array([30, 31, 32, 31, 48], np.int32)
    rows = Rows(
        slots=np.array([0, 0, 0, 1, 2], np.int32),
        starts=starts,
        lengths=np.ones(5, np.int32),
        samples=np.ones(5, np.uint8),
        feedback=np.zeros(5, np.uint8),
        decodes=5,
        groups=np.array([0, 3, 4, 5], np.int32),
    )
    plan: Any = SimpleNamespace(sequence_ids=np.array([70, 71, 72]), admitted_slots=np.zeros(0, np.int32))
    asked = part.fill({name: view.numpy() for name, view in views.items()}, rows, plan)
    return part, views, asked


def test_entries_are_of_blocks_that_the_step_holds(predictor: Predictor) -> None:
    _, views, asked = staged(predictor)
    assert (asked.sequence_ids, asked.width) == ([70, 71, 72], 3)
    # A token behind a draft's own rows is in their blocks; the last row's is not where it would begin a block.
    assert views["entry_slots"].tolist() == [slot(0, 31), slot(0, 32), slot(0, 33), -1, slot(2, 49), -1, -1, -1]
    assert views["first_slots"].tolist() == [-1, -1, -1, -1, slot(2, 48), -1, -1, -1]
    assert views["head"].tolist() == [0, 0, 0, 3, 4, 5, 6, 7]
    assert views["group_first"].tolist() == [0, 3, 4] and views["group_slot"].tolist() == [0, 1, 2]
    assert views["wanted"].tolist() == [1, 0, 1]
    assert views["limits"].tolist() == [48, 32, 64]  # where the block of each one's last row ends


def test_what_came_true_is_found_and_nothing_is_written_behind_a_limit(predictor: Predictor) -> None:
    """Two of sequence 70's rows come true; sequence 72 is asked until its block ends."""
    part, views, asked = staged(predictor)
    views["positions"][:] = torch.tensor([30, 31, 32, 31, 62, 0, 0, 0])
    views["entry_slots"][4], views["first_slots"][4] = slot(2, 63), -1
    views["slot"][:] = torch.tensor([0, 0, 0, 1, 2, 3, 3, 3])
    views["position"][:] = torch.arange(ROWS)
    for name in ("temperature", "min_p", "top_k", "seed", "choice"):
        views[name][:] = 0
    views["top_p"][:] = 1
    views["table"].view(ROWS, -1)[:5] = torch.from_numpy(np.where(TABLE < 0, 11, TABLE))[[0, 0, 0, 1, 2]]  # 11: others'
    views["table"].view(ROWS, -1)[5:] = 0
    predictor.cache.zero_()
    asking, hidden = part.asking(ROWS), torch.randn(ROWS, predictor.carried.shape[1])
    token_ids, said = torch.tensor([5, 6, 9, 4, 8, 0, 0, 0]), torch.tensor([6, 7, 3, 2, 1, 0, 0, 0])
    with torch.inference_mode():
        part.after_step(asking, views, True, token_ids, hidden, said)
        assert asking.token.tolist()[::2] == [7, 1]  # 6 came true, 9 was not what was said behind it
        assert asking.alive.tolist() == [True, False, True]
        assert asking.position.tolist() == [32, 0, 63]
        assert torch.equal(predictor.carried[:3], hidden[[1, 3, 4]])
        for _ in range(asked.width):
            part.ask(asking, views, ROWS)
    out = asking.out.numpy()
    found = proposals_of(asked, out, 7)
    assert found is not None and found.sequence_ids == [70, 72] and found.contexts.tolist() == [33, 64]
    assert (found.token_ids[0] >= 0).all()
    assert (found.token_ids[1] >= 0).tolist() == [True, False, False] and found.token_ids[1, 1] == NOTHING
    written = predictor.cache.flatten(0, 1).any(-1).nonzero().flatten().tolist()
    expected = [slot(0, p) for p in (31, 32, 33, 34)] + [slot(2, 63)]
    assert written == sorted(expected)
