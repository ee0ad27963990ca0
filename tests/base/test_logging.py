"""Logs are one JSON object a line, with the fields given."""

from __future__ import annotations

import json

import pytest

from tokenrelay.base.logging import get_logger, setup_logging


def test_json_lines_carry_fields_and_tracebacks(capsys: pytest.CaptureFixture[str]) -> None:
    setup_logging("router", incarnation="abc", style="json")
    log = get_logger("router")
    log.debug("not shown")
    log.info("request done", request_id="req-1", output_tokens=12)
    try:
        raise ValueError("no")
    except ValueError:
        log.exception("failed")
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert [line["message"] for line in lines] == ["request done", "failed"]
    assert lines[0]["service"] == "router" and lines[0]["incarnation"] == "abc" and lines[0]["output_tokens"] == 12
    assert "ValueError: no" in lines[1]["traceback"]


def test_terminal_lines_are_readable(capsys: pytest.CaptureFixture[str]) -> None:
    setup_logging("router", style="terminal")
    get_logger("router").warning("slow", wait_ms=5)
    line = capsys.readouterr().err
    assert "slow" in line and "wait_ms=5" in line
