"""SPIN explores the handover: the protocol keeps the laws, and without any one of its guards it does not."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tokenrelay.libscheduler import fsm_tables, promela

ROOT = Path(__file__).resolve().parents[2]
_spec = importlib.util.spec_from_file_location("model_check", ROOT / "tools" / "model_check.py")
assert _spec is not None and _spec.loader is not None
model_check = importlib.util.module_from_spec(_spec)
sys.modules["model_check"] = model_check
_spec.loader.exec_module(model_check)


class Models:
    """Each fleet is compiled once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.built: dict[object, model_check.Model] = {}

    def __getitem__(self, fleet: model_check.Fleet) -> model_check.Model:
        if fleet not in self.built:
            folder = self.folder / str(len(self.built))
            folder.mkdir()
            self.built[fleet] = model_check.Model(fleet, folder)
        return self.built[fleet]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Models]:
    yield Models(tmp_path_factory.mktemp("models"))


def test_transitions_come_from_the_constexpr_tables() -> None:
    text = promela.preamble()
    handle = fsm_tables()["kv_handle"]
    for event in handle.events:
        (line,) = [line for line in text.splitlines() if line.startswith(f"#define NEXT_{event}(s) ")]
        for row in handle.rows:
            if row.event == event:
                lists = f"((s) == H_{row.state} -> H_{row.next} :" in line
                assert lists == (row.next is not None), (row.state, event)
    assert len({mutation.name for mutation in promela.MUTATIONS}) == len(promela.MUTATIONS)
    for mutation in promela.MUTATIONS:  # a guard of the model's own that the model does not know would change nothing
        assert mutation.changes or f"MUTATED({mutation.name})" in model_check.MODEL.read_text(encoding="utf-8")


@pytest.mark.parametrize("search", model_check.SMALL, ids=lambda search: search.claim or "assertions")
def test_the_small_fleet_keeps_the_laws(models: Models, search: model_check.Search) -> None:
    result = models[search.fleet].run(search)
    assert result.error is None, "\n".join([str(result), *models[search.fleet].trace(search)])
    assert result.complete and result.states > 100_000, str(result)


@pytest.mark.parametrize("mutation", promela.MUTATIONS, ids=lambda mutation: mutation.name)
def test_without_a_guard_a_law_breaks(models: Models, mutation: promela.Mutation) -> None:
    search = model_check.without(mutation)
    result = models[search.fleet].run(search)
    assert result.error is not None, f"without {mutation.without} nothing happened: {result}"
    assert result.error.startswith(f"law_{mutation.law}_"), str(result)
    assert models[search.fleet].trace(search), "the counter-example has steps"


def test_without_the_fence_a_quarantine_does_not_end(models: Models) -> None:
    (mutation,) = [mutation for mutation in promela.MUTATIONS if mutation.name == "NOBODY_FENCES"]
    search = model_check.Search(model_check.PAIR_LTL, mutation=mutation, claim="quarantines_end")
    result = models[search.fleet].run(search)
    assert result.error is not None and "acceptance cycle" in result.error, str(result)


def test_a_missing_spin_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(model_check.ModelError, match=r"`spin` is not installed.*apt-get install spin"):
        model_check.Model(model_check.PAIR, tmp_path)


@pytest.mark.slow
def test_the_small_fleet_takes_every_transition_of_the_table(models: Models) -> None:
    """So that no law holds only because nothing happens. Filling stays in the owner's process."""
    handle = fsm_tables()["kv_handle"]
    rows = [row for row in handle.rows if row.next is not None and row.event != "Fill"]
    taken = {(row.state, row.next) for row in rows if row.state != row.next or row.event == "Seal"}
    assert len(taken) > 20
    for state, after in sorted(taken):
        never = (handle.states.index(state), handle.states.index(after))
        result = models[model_check.PAIR].run(model_check.Search(model_check.PAIR, faults=1, never=never))
        assert result.error is not None and "forbidden" in result.error, f"{state} -> {after}: {result}"


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("search", model_check.LARGE, ids=str)
def test_larger_fleets_keep_the_laws(models: Models, search: model_check.Search) -> None:
    result = models[search.fleet].run(search)
    print(result)
    assert result.error is None, "\n".join([str(result), *models[search.fleet].trace(search)])
    assert result.complete or search.fleet.bitstate, str(result)
