"""`tokenrelay bench agent` against an endpoint without a model: lengths, figures, the search, what it writes."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import math
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from mock_endpoint import MockEndpoint
from typer.testing import CliRunner

from tokenrelay.base.errors import ConfigError, TokenRelayError
from tokenrelay.cli.agent_bench.command import Target, run_agent_bench
from tokenrelay.cli.agent_bench.endpoint import Endpoint
from tokenrelay.cli.agent_bench.measure import best, figures, spread
from tokenrelay.cli.agent_bench.records import Record, Settings
from tokenrelay.cli.agent_bench.report import page, pareto
from tokenrelay.cli.agent_bench.search import Search
from tokenrelay.cli.agent_bench.text import Ruler
from tokenrelay.cli.agent_bench.workload import Ideal, Session, read_trace, trace_ideal, trace_messages
from tokenrelay.cli.main import app

SMALL = Settings(scale=0.01, seconds=2.0, floor=5.0, turns=(3, 4), loads=(2.0,))
ROWS = [
    {"timestamp": 0, "input_length": 1500, "output_length": 20, "hash_ids": [1, 2, 3]},
    {"timestamp": 500, "input_length": 2000, "output_length": 10, "hash_ids": [1, 2, 4, 5]},
    {"timestamp": 500, "input_length": 600, "output_length": 0, "hash_ids": [9, 1]},
    {"timestamp": 1000, "input_length": 1024, "output_length": 5, "hash_ids": [1, 2]},
]


def write_trace(path: Path, rows: list[Any] = ROWS) -> Path:
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows))
    return path


def measured(endpoint: MockEndpoint, settings: Settings, folder: Path, **target: Any) -> dict[str, Any]:
    """What the JSON has."""
    out = folder / "result.json"
    run_agent_bench(Target(url=endpoint.url, model=None, json=out, **target), settings)
    result: dict[str, Any] = json.loads(out.read_text())
    return result


# -- end to end -------------------------------------------------------------------------------------------------------
def test_sessions_are_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with MockEndpoint(tps=400) as endpoint:
        result = measured(endpoint, SMALL, tmp_path, html=tmp_path / "report.html", api_key="k1")
    assert endpoint.keys == {"Bearer k1"}
    (load,) = result["loads"]
    assert load["held"] and result["best"]["load"] == 2 and load["failed"] == load["refused"] == 0
    assert 2 < load["tps"]["p50"] <= 410, "the endpoint paces; a loaded machine is slower"
    assert load["itl_s"]["p95"] >= 1 / 410
    assert load["requests"] >= 4 and load["output_tokens"] == 5 * load["requests"]
    minutes = load["seconds"] / 60
    assert load["tpm_per_device"] == pytest.approx((load["prompt_tokens"] + load["output_tokens"]) / minutes, rel=0.01)
    assert load["hit_rate"] == pytest.approx(load["ideal_hit_rate"], abs=0.05), "it caches every prefix"
    assert 0.4 < load["ideal_hit_rate"] < 0.99
    first = endpoint.bodies[2]
    assert first["ignore_eos"] is True and first["stream_options"] == {"include_usage": True}
    assert [message["role"] for message in first["messages"]] == ["system", "user"]
    assert sum(len(message["content"]) for message in first["messages"]) == pytest.approx(4 * 500, rel=0.05)
    report = (tmp_path / "report.html").read_text()
    assert "<svg" in report and "http://" not in report.replace(endpoint.url, "") and "src=" not in report
    assert "held" in capsys.readouterr().err


def test_a_next_turn_holds_what_was_answered(tmp_path: Path) -> None:
    with MockEndpoint() as endpoint:
        measured(endpoint, dataclasses.replace(SMALL, loads=(1.0,), seconds=1.0), tmp_path)
    turns = [body["messages"] for body in endpoint.bodies[2:]]
    later = next(messages for messages in turns if len(messages) == 6)
    assert [message["role"] for message in later] == ["system", "user", "assistant", "user", "assistant", "user"]
    assert later[2]["content"] == "tok " * 5
    assert any(messages == later[:4] for messages in turns), "the turn before is its beginning"
    systems = {messages[0]["content"] for messages in turns}
    assert len(systems) == 1, "one system prompt for everybody"
    tasks = [messages[1]["content"] for messages in turns if len(messages) == 2]
    assert len(set(tasks)) == len(tasks) > 1, "and a task of each session's own"


def test_the_search_finds_what_keeps_the_floor(tmp_path: Path) -> None:
    """Users share 60 tokens/s: more than six of them cannot have ten each."""
    settings = dataclasses.replace(SMALL, loads=(), seconds=1.5, floor=10.0, load_max=64)
    with MockEndpoint(tps=60, together=1, first_s=0.0) as endpoint:
        result = measured(endpoint, settings, tmp_path)
    loads = {load["load"]: load["held"] for load in result["loads"]}
    assert loads[1.0] and not all(loads.values()), loads
    assert 1 <= result["best"]["load"] <= 8 and max(loads) <= 16


def test_a_trace_is_replayed_at_its_pace(tmp_path: Path) -> None:
    trace = write_trace(tmp_path / "trace.jsonl")
    settings = dataclasses.replace(SMALL, trace=trace, scale=0.1, loads=(1.0,), seconds=3.0, floor=0.0)
    with MockEndpoint() as endpoint:
        result = measured(endpoint, settings, tmp_path)
    sent = sorted(endpoint.bodies[2:], key=lambda body: -body["max_tokens"])
    assert [body["max_tokens"] for body in sent[:2]] == [2, 1] and len(sent) >= 3
    lengths = sorted(len(body["messages"][0]["content"]) for body in sent)
    assert lengths[-1] == pytest.approx(4 * 200, abs=4)
    assert result["loads"][0]["unit"] == "x the trace's rate" and result["workload"].startswith("trace.jsonl")


def test_an_endpoint_without_ignore_eos_or_cached_tokens(tmp_path: Path) -> None:
    with MockEndpoint(takes_ignore_eos=False) as endpoint:
        endpoint.says_cached = False
        result = measured(endpoint, dataclasses.replace(SMALL, seconds=1.0), tmp_path)
    assert result["answers_as_long_as_asked"] is False and all("ignore_eos" not in b for b in endpoint.bodies[1:])
    assert result["loads"][0]["hit_rate"] is None and result["loads"][0]["ideal_hit_rate"] > 0


def test_an_endpoint_that_streams_no_usage(tmp_path: Path) -> None:
    """As some of llama.cpp's servers."""
    loads = []
    for streams in (True, False):
        with MockEndpoint(tps=500.0) as endpoint:
            endpoint.streams_usage = streams
            result = measured(endpoint, SMALL, tmp_path)
        assert result["tokens_counted_by"].startswith("usage" if streams else "chunks")
        assert result["chars_per_token"] == pytest.approx(4, rel=0.02)
        loads.append(result["loads"][0])
    assert loads[1]["tpm_per_device"] == pytest.approx(loads[0]["tpm_per_device"], rel=0.3)
    assert loads[1]["tps"]["p50"] == pytest.approx(loads[0]["tps"]["p50"], rel=0.3)


def test_failures_are_counted_and_a_load_with_many_is_not_held(tmp_path: Path) -> None:
    with MockEndpoint() as endpoint:
        endpoint.refuse, endpoint.troubles_from = (429, "too much <b>at once</b>"), 5
        result = measured(endpoint, SMALL, tmp_path, html=tmp_path / "report.html")
    (load,) = result["loads"]
    assert load["refused"] > 0 and not load["held"] and "failed" in load["why_not"] and result["best"] is None
    assert any("429" in error for error in load["errors"])
    assert "No load kept" in result["summary"]


def test_a_stream_that_is_cut_is_a_failure(tmp_path: Path) -> None:
    with MockEndpoint() as endpoint:
        endpoint.cut_after, endpoint.troubles_from = 2, 5
        result = measured(endpoint, SMALL, tmp_path)
    assert result["loads"][0]["failed"] > 0
    assert any("before its end" in error for error in result["loads"][0]["errors"])


def test_an_interrupt_writes_what_was_measured(tmp_path: Path) -> None:
    out, report = tmp_path / "result.json", tmp_path / "report.html"
    with MockEndpoint(tps=400) as endpoint:
        command = [sys.executable, "-Pm", "tokenrelay.cli.main", "bench", "agent", "--url", endpoint.url]
        command += ["--scale", "0.01", "--load", "1,2,4", "--seconds", "60", "--json", str(out), "--html", str(report)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            deadline_s = time.monotonic() + 30
            while len(endpoint.bodies) < 12 and time.monotonic() < deadline_s:
                time.sleep(0.02)
            process.send_signal(signal.SIGINT)
            said, problems = process.communicate(timeout=20)
    assert process.returncode == 130, problems
    result = json.loads(out.read_text())
    assert result["interrupted"] and len(result["loads"]) == 1 and result["loads"][0]["cut_short"]
    assert result["loads"][0]["requests"] > 0 and result["loads"][0]["seconds"] < 30
    assert "Interrupted" in report.read_text() and "TPM/device" in said


# -- what is wrong is said --------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--turns", "5-2"], "--turns '5-2'"),
        (["--turns", "x"], "--turns 'x'"),
        (["--load", "1,two"], "--load '1,two'"),
        (["--load", "1.5"], "whole numbers of users"),
        (["--load", "0"], "--load '0'"),
        (["--scale", "0"], "--scale must be above 0"),
        (["--scale", "nan"], "--scale must be above 0"),
        (["--ttft-max", "-1"], "--ttft-max must be above 0"),
        (["--first-tokens", "100"], "--first-tokens must be more than --system-tokens"),
        (["--devices", "0"], "--devices"),
    ],
)
def test_wrong_arguments_are_named(arguments: list[str], said: str) -> None:
    result = CliRunner().invoke(app, ["bench", "agent", "--url", "http://127.0.0.1:1", *arguments])
    assert result.exit_code == 2
    plain = re.sub(r"\x1b\[[0-9;]*m|[│\n]", " ", result.output)
    assert said in re.sub(r"\s+", " ", plain)


def test_nobody_answers() -> None:
    with pytest.raises(TokenRelayError, match="no server answers at"):
        run_agent_bench(Target(url="http://127.0.0.1:1", model=None), SMALL)
    with pytest.raises(ConfigError, match="is not an http address"):
        Endpoint("ftp://x")


def test_a_folder_that_is_not_there_is_named_before_anything_runs(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="its folder does not exist"):
        run_agent_bench(Target(url="http://127.0.0.1:1", model=None, json=tmp_path / "no/r.json"), SMALL)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", r"trace.jsonl:2: expected an object"),
        ('{"timestamp": 1, "input_length": 5, "output_length": 1}', "hash_ids"),
        ('{"timestamp": 1, "input_length": 0, "output_length": 1, "hash_ids": [1]}', "input_length must be positive"),
        ("[]", "expected an object"),
    ],
)
def test_a_wrong_line_of_a_trace_is_named(tmp_path: Path, line: str, said: str) -> None:
    trace = write_trace(tmp_path / "trace.jsonl", [ROWS[0], line])
    with pytest.raises(ConfigError, match=said):
        read_trace(trace, 10)
    with pytest.raises(ConfigError, match="has no requests"):
        read_trace(write_trace(tmp_path / "empty.jsonl", []), 10)
    with pytest.raises(ConfigError, match="cannot read the trace"):
        read_trace(tmp_path / "none.jsonl", 10)


# -- parts ------------------------------------------------------------------------------------------------------------
def test_texts_have_their_length_and_share_nothing_by_chance() -> None:
    ruler = Ruler.measured(((400, 110), (2400, 610)))
    assert ruler == Ruler(4.0, 10.0)
    one, other = ruler.text("a", 1000), ruler.text("b", 1000)
    assert len(one) == len(other) == 4000 and one == ruler.text("a", 1000) and one[:4] != other[:4]
    assert len(ruler.text("long", 600_000)) == 2_400_000
    assert ruler.text("a", 10) == one[:40]
    with pytest.raises(ValueError, match="no more tokens"):
        Ruler.measured(((400, 5), (2400, 5)))


def test_requests_of_one_instant_of_a_trace_are_spread(tmp_path: Path) -> None:
    rows = read_trace(write_trace(tmp_path / "trace.jsonl"), 10)
    assert [row.at_s for row in rows] == [0.0, 0.5, 0.75, 1.0]
    assert len(read_trace(tmp_path / "trace.jsonl", 2)) == 2


def test_equal_blocks_of_a_trace_are_equal_text(tmp_path: Path) -> None:
    rows, ruler = read_trace(write_trace(tmp_path / "trace.jsonl"), 10), Ruler(4.0)
    settings, ideal = Settings(), Ideal(0)
    texts = [trace_messages(row, settings, ruler, "x")[0]["content"] for row in rows]
    assert len(texts[0]) == 6000 and texts[0][:4096] == texts[1][:4096] and texts[0][4096:6000] != texts[1][4096:6000]
    assert [trace_ideal(row, settings, ideal) for row in rows] == [0, 1024, 0, 1024]
    assert trace_messages(rows[0], settings, ruler, "y")[0]["content"][:9] != texts[0][:9]


def test_what_an_infinite_cache_would_have() -> None:
    ideal = Ideal(system_tokens=120)
    first, second = (Session(name, SMALL, Ruler(4.0), ideal) for name in ("one", "two"))
    assert first.asked() == 0 and second.asked() == 120, "the system prompt of the one before"
    more = first.answered(Record("one", 0, 0.0, prompt_tokens=500, output_tokens=5, text="tok"))
    assert more and first.asked() == 505


def record(begin: float, first: float, last: float, tokens: int = 11, **more: Any) -> Record:
    return Record(
        "s", 0, begin, first, last, last, "done", prompt_tokens=100, output_tokens=tokens, cached_tokens=50, **more
    )


def test_figures_of_a_load() -> None:
    records = [
        record(0.0, 0.5, 1.0),  # before the window
        record(1.0, 3.0, 4.0, ideal_tokens=80),
        record(3.0, 3.5, 8.5, gaps_s=[0.5] * 10),
        Record("s", 0, 5.0, end_s=6.0, end="failed", error="500: oops"),
        Record("s", 0, 9.0),
    ]
    found = figures(records, (2.0, 12.0), 2, Settings(floor=2.0, devices=2))
    assert (found["requests"], found["failed"], found["turns_open_at_the_end"]) == (2, 1, 1)
    assert found["tpm_per_device"] == 2 * 111 * 6 / 2 and found["output_tpm_per_device"] == 22 * 6 / 2
    assert (found["tps"]["p5"], found["tps"]["p50"]) == (2.0, 2.0) and found["tps"]["mean"] == 6.0
    assert (found["ttft_s"]["p50"], found["ttft_s"]["p99"]) == (0.5, 2.0)
    assert (found["hit_rate"], found["ideal_hit_rate"]) == (0.5, 0.4)
    assert not found["held"] and found["why_not"] == "1 of 3 requests failed" and found["errors"] == {"500: oops": 1}
    good = [one for one in records if one.end == "done"]
    assert figures(good, (2.0, 12.0), 2, Settings(floor=2.0))["held"]
    slow = figures(good, (2.0, 12.0), 2, Settings(floor=3.0))
    assert (slow["held"], slow["why_not"]) == (False, "the slowest 5 % got 2.0 tokens/s")
    late = figures(good, (2.0, 12.0), 2, Settings(floor=2.0, ttft_max_s=1.0))
    assert "first tokens" in late["why_not"] and best([slow, late]) is None
    assert figures([], (0.0, 1.0), 1, Settings())["why_not"] == "no request ended"
    assert math.isnan(record(0, 1, 1).tps) and spread([])["p50"] is None


def played(settings: Settings, holds_up_to: float) -> list[float]:
    search, tried = Search(settings), []
    while (load := search.next()) is not None:
        assert len(tried) < 40, tried
        assert search.steps_left >= 0
        tried.append(load)
        search.result(load, load <= holds_up_to)
    return tried


def test_the_search() -> None:
    users, rate = Settings(), Settings(trace=Path("t"))
    assert played(users, 11) == [1, 2, 4, 8, 16, 12, 10, 11]
    assert played(users, 0) == [1], "there is less than one user of nothing"
    assert played(dataclasses.replace(users, load_max=4), 99) == [1, 2, 4]
    assert played(rate, 0.3) == [1, 0.5, 0.25, 0.375, 0.312, 0.281]
    assert played(rate, 0) == [1, 0.5, 0.25, 0.125, 0.0625]
    assert played(dataclasses.replace(users, loads=(4.0, 1.0)), 2) == [4, 1]


def test_a_report_is_text_and_knows_its_front() -> None:
    records = [record(0.0, 0.5, 1.0, gaps_s=[0.01])]
    loads = [figures(records, (0.0, 10.0), load, Settings(floor=5.0)) for load in (1, 2)]
    loads[1]["tpm_per_device"] /= 2
    loads[1]["tps"]["p50"] /= 2
    assert [one["load"] for one in pareto(loads)] == [1]
    evil = "<script>alert(1)</script>"
    result = {
        "model": evil,
        "endpoint": evil,
        "date": "now",
        "workload": evil,
        "version": "1",
        "summary": evil,
        "interrupted": False,
        "settings": {"floor": 5.0, "seconds": 10.0, "devices": 1, "ttft_max_s": 2.0},
        "loads": loads,
    }
    text = page(result)
    assert "<script" not in text and text.count("&lt;script&gt;") >= 4
    assert "No load gave a point" in page({**result, "loads": []})


def test_a_request_that_hangs_ends_at_its_timeout() -> None:
    async def ask(url: str) -> Record:
        found = Record("s", 0, 0.0)
        async with Endpoint(url, model="m", timeout_s=0.2) as client:
            await client.ask(found, [{"role": "user", "content": "x"}], 5, time.monotonic)
        return found

    with MockEndpoint(first_s=5.0) as endpoint:
        found = asyncio.run(ask(endpoint.url))
    assert (found.end, found.error) == ("failed", "no end within 0.2 s") and found.end_s > 0
