"""The worker's settings: sizes as people write them, every field a flag."""

from __future__ import annotations

from typing import Any

import pytest

from tokenrelay.base.errors import ConfigError
from tokenrelay.cli import worker
from tokenrelay.services.decode.config import WorkerConfig, parse_bytes


@pytest.mark.parametrize(
    ("text", "expected"),
    [("1048576", 1 << 20), ("4GiB", 4 << 30), ("512 MB", 512 * 10**6), ("1.5g", 1_500_000_000), ("2ki", 2048)],
)
def test_sizes(text: str, expected: int) -> None:
    assert parse_bytes(text, "kv") == expected


@pytest.mark.parametrize("text", ["", "many", "-1GiB", "4 GiBs", "1e9"])
def test_what_is_no_size_names_the_setting(text: str) -> None:
    with pytest.raises(ConfigError, match=r"worker\.kv_memory is"):
        _ = WorkerConfig(kv_memory=text).kv_memory_bytes


def test_flags_win_and_origins_are_printed(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKENRELAY_WORKER_SLOTS", "9")
    monkeypatch.setenv("TOKENRELAY_WORKER_BLOCKS", "77")
    monkeypatch.setenv("TOKENRELAY_WORKER_TPS_FLOOR", "120")
    monkeypatch.setenv("TOKENRELAY_PREFILL_HANDLE_DEADLINE_S", "5")
    assert worker.main(["--slots", "3", "--host-cache-gib", "1.5", "--draft-tokens", "5", "--print-config"]) == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert lines["worker.slots"].split()[1] == "3" and "flag --slots" in lines["worker.slots"]
    assert lines["worker.blocks"].split()[1] == "77" and "TOKENRELAY_WORKER_BLOCKS" in lines["worker.blocks"]
    assert lines["worker.tps_floor"].split()[1] == "120.0"
    assert lines["worker.floor_wait_s"].split()[1] == "10.0"
    assert lines["worker.host_cache_gib"].split()[1] == "1.5"
    assert lines["worker.draft_tokens"].split()[1] == "5"
    assert lines["prefill.handle_deadline_s"].split()[1] == "5.0"


def test_predicted_drafts_are_for_one_rank() -> None:
    with pytest.raises(ConfigError, match=r"worker\.drafts mtp is for one rank; this worker has 2: use ngram"):
        WorkerConfig(tp=2, drafts="mtp").check()
    WorkerConfig(tp=2, draft_tokens=4).check()
    WorkerConfig(draft_tokens=15).check()


class Quiet:
    """A status pipe that nobody reads."""

    def progress(self, *_: Any, **__: Any) -> None:
        pass


@pytest.mark.parametrize(("drafts", "loaded"), [("auto", False), ("mtp", True), ("ngram", False)])
def test_on_a_cpu_the_prediction_layer_is_asked_for_by_name(drafts: Any, loaded: bool) -> None:
    """The bundled model has one."""
    config = WorkerConfig(drafts=drafts, draft_tokens=2, device="cpu", kernels_file="none")
    model: Any = worker.load(config, Quiet())  # type: ignore[arg-type]
    assert (model.prediction is not None) == loaded


@pytest.mark.parametrize(
    ("drafts", "tokens", "width", "prediction"),
    [
        ("auto", 0, 0, "off"),
        ("auto", 5, 5, "auto"),
        ("ngram", 0, 8, "off"),
        ("ngram", 2, 2, "off"),
        ("mtp", 0, 3, "on"),
        ("mtp", 1, 1, "on"),
        ("off", 7, 0, "off"),
    ],
)
def test_who_drafts_and_how_much(drafts: Any, tokens: int, width: int, prediction: str) -> None:
    config = WorkerConfig(drafts=drafts, draft_tokens=tokens)
    assert (config.draft_width, config.prediction) == (width, prediction)
