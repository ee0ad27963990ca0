"""The tools that the chat runs by itself: right, bounded, and kept to their folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from tokenrelay.cli.chat import BUNDLED_NAME, wants_demo
from tokenrelay.cli.demo_tools import LISTED_MAX, RESULT_CHARS_MAX, calculate, run
from tokenrelay.cli.serve import BUNDLED_MODEL


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("123 * 45", "5535"),
        ("2 * (3 + 4)", "14"),
        ("7 / 2", "3.5"),
        ("1 / 3", "0.333333"),
        ("-4 - -4", "0"),
        ("1 / 0", "error: division by zero"),
        ("__import__('os').getcwd()", "error: not an arithmetic expression"),
        ("9 ** 9 ** 9", "error: not an arithmetic expression"),
        ("'a' * 10", "error: not an arithmetic expression"),
        ("True + 1", "error: not an arithmetic expression"),
        ("999999999 * 999999999", "error: not an arithmetic expression"),
        ("1e400", "error: not an arithmetic expression"),
        ("(" * 900, "error: not an arithmetic expression"),
        ("", "error: not an arithmetic expression"),
    ],
)
def test_calculator(expression: str, value: str) -> None:
    assert calculate(expression) == value


def test_files_of_the_folder_only(tmp_path: Path) -> None:
    here = tmp_path / "here"
    (here / "sub").mkdir(parents=True)
    (here / "notes.txt").write_text("Grüße")
    (here / "data.bin").write_bytes(b"\0\1")
    (here / "long.txt").write_text("x" * 10_000)
    (tmp_path / "secret.txt").write_text("secret")
    (here / "link.txt").symlink_to(tmp_path / "secret.txt")

    def call(name: str, path: str) -> str:
        return run(name, f'{{"path": "{path}"}}', here)

    assert call("read_file", "notes.txt") == "Grüße"
    assert call("list_files", ".") == "data.bin\nlink.txt\nlong.txt\nnotes.txt\nsub/"
    assert call("list_files", "sub") == "(empty)"
    for outside in ("../secret.txt", "/etc/passwd", "link.txt", ".."):
        assert call("read_file", outside) == "error: outside of the current folder"
    assert call("read_file", "absent.txt") == "error: no such file or directory"
    assert call("read_file", "sub") == "error: is a folder"
    assert call("read_file", "data.bin") == "error: not a text file"
    assert len(call("read_file", "long.txt")) == RESULT_CHARS_MAX + 2
    for number in range(LISTED_MAX + 5):
        (here / "sub" / f"{number}").touch()
    assert call("list_files", "sub").endswith("\nand 5 more")


@pytest.mark.parametrize("arguments", ["", "[]", "{}", "7", '{"path": "\\u0000"}'])
def test_arguments_that_make_no_sense(arguments: str) -> None:
    assert run("read_file", arguments) == "error: wrong arguments"


def test_who_gets_the_demo_tools() -> None:
    assert BUNDLED_MODEL.name == BUNDLED_NAME
    assert wants_demo(None, BUNDLED_NAME, local=True)
    assert not wants_demo(None, BUNDLED_NAME, local=False), "what they read would leave this machine"
    assert not wants_demo("none", BUNDLED_NAME, local=True)
    assert not wants_demo("tools.json", BUNDLED_NAME, local=True)
    assert not wants_demo(None, "other", local=True)
    assert wants_demo("demo", "other", local=False)
