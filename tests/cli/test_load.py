"""The checks of bench/load.py, on which the soak and the end-to-end tests lean: each defect of a reply is found."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import run as runner
from load import Outcome, send


def chunk(index: int = 0, content: str | None = None, finish: str | None = None) -> bytes:
    delta = {} if content is None else {"content": content}
    body = {"choices": [{"index": index, "delta": delta, "finish_reason": finish}]}
    return b"data: " + json.dumps(body).encode() + b"\n\n"


DONE = b"data: [DONE]\n\n"
ERROR = b'data: {"error": {"message": "the worker died", "type": "x", "param": null, "code": "unavailable"}}\n\n'


async def stream(scripted: Any, *parts: bytes, abort_after: int | None = None, **body: Any) -> Outcome:
    scripted.say(*parts, cut=True)
    async with aiohttp.ClientSession() as session:
        request = {"stream": True, **body}
        return await send(session, scripted.url, "/v1/chat/completions", request, abort_after=abort_after)


async def test_a_whole_stream(scripted: Any) -> None:
    outcome = await stream(
        scripted,
        chunk(0, "a"),
        chunk(1, "x"),
        chunk(0, "b"),
        chunk(1, finish="length"),
        chunk(0, finish="stop"),
        DONE,
        n=2,
    )
    assert (outcome.kind, outcome.problems, outcome.text) == ("completed", [], "ab")
    assert outcome.finish_reasons == {0: "stop", 1: "length"}


@pytest.mark.parametrize(
    ("parts", "problem"),
    [
        ([chunk(0, "a"), chunk(0, finish="stop")], "the stream ended without [DONE]"),
        ([chunk(0, "a"), DONE], "choices that ended: [], expected [0]"),
        ([chunk(0, finish="stop"), chunk(0, "late"), DONE], "choice 0 goes on after its end"),
        ([chunk(0, finish="stop"), chunk(0, finish="stop"), DONE], "choice 0 goes on after its end"),
        ([chunk(0, finish="stop"), DONE, chunk(0, "late")], "data after [DONE]"),
        ([chunk(0, finish="stop"), DONE, DONE], "data after [DONE]"),
        ([chunk(1, finish="stop"), DONE], "choices that ended: [1], expected [0]"),
        ([chunk(0, finish="gone"), DONE], "finish_reason {'gone'}"),
        ([chunk(0, finish="error"), DONE], "finish_reason {'error'}"),
        ([ERROR, ERROR], "two error events"),
    ],
)
async def test_defects_of_a_stream(scripted: Any, parts: list[bytes], problem: str) -> None:
    outcome = await stream(scripted, *parts)
    assert any(problem in found for found in outcome.problems), outcome.problems
    assert outcome.kind != "completed"


async def test_broken_characters_are_not_mended(scripted: Any) -> None:
    outcome = await stream(scripted, b'data: {"choices": [{"index": 0, "delta": {"content": "\xe6\x97"}}]}\n\n')
    assert outcome.problems[0].startswith("not JSON in UTF-8: 'utf-8' codec can't decode")


async def test_errors_and_aborts(scripted: Any) -> None:
    failed = await stream(scripted, chunk(0, "a"), ERROR)
    assert (failed.kind, failed.error, failed.problems) == ("errored", "the worker died", [])
    cut = await stream(scripted, chunk(0, "a"), chunk(0, "b"), abort_after=1)
    assert (cut.kind, cut.text, cut.problems) == ("aborted", "a", [])


@pytest.mark.parametrize(
    ("status", "body", "kind", "problem"),
    [
        (
            429,
            {"error": {"message": "full", "type": "t", "param": None, "code": "c"}},
            "refused",
            "without Retry-After",
        ),
        (503, {"error": {"message": "away", "type": "t", "param": None, "code": "c"}}, "refused", None),
        (400, {"error": {"message": "bad", "type": "t", "param": "n", "code": "c"}}, "errored", None),
        (400, {"error": {"message": "bad"}}, "errored", "error without type, param or code"),
        (500, {"detail": "oops"}, "errored", "status 500 without an error object"),
    ],
)
async def test_refusals(scripted: Any, status: int, body: Any, kind: str, problem: str | None) -> None:
    scripted.refuse(status, body)
    async with aiohttp.ClientSession() as session:
        outcome = await send(session, scripted.url, "/v1/chat/completions", {})
    assert outcome.kind == kind
    assert [problem in found for found in outcome.problems] == ([True] if problem else [])


def test_results_of_benchmarks_as_rows() -> None:
    result = {
        "figures": {"requests_per_s": 12.3456, "count": 7},
        "results": [{"op": "rms_norm", "label": "t=1", "native_us": 1.5}],
        "problems": ["leak"],
        "error": "exit code 1",
    }
    assert runner.rows(result) == [
        ("requests_per_s", "12.35"),
        ("count", "7"),
        ("rms_norm t=1", "native_us 1.5"),
        ("problem", "leak"),
        ("error", "exit code 1"),
    ]
    assert {"router", "kernels", "soak"} <= {script.stem for script in runner.find([])}
    assert [script.stem for script in runner.find(["soak"])] == ["soak"]
    with pytest.raises(SystemExit, match="no benchmark is called nothing"):
        runner.find(["nothing"])


def test_a_benchmark_that_fails_is_a_failure(tmp_path: Path) -> None:
    script = tmp_path / "bad.py"
    script.write_text("import sys; sys.exit(3)")
    result = runner.run(script, quick=True)
    assert (result["ok"], result["error"]) == (False, "exit code 3, and no result")
    script.write_text("import sys, json; json.dump({'figures': {'a': 1}}, open(sys.argv[2], 'w'))")
    assert runner.run(script, quick=True)["figures"] == {"a": 1}
