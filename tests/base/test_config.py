"""Configuration: defaults < file < environment < flags, with origins and clear errors."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

from tokenrelay.base.config import resolve, setting
from tokenrelay.base.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Example:
    port: int = setting(8000, "TCP port", minimum=0, maximum=65535)
    ratio: float = setting(0.5, "a ratio")
    name: str | None = setting(None, "a name")
    quiet: bool = setting(False, "say less")
    level: Literal["debug", "info"] = setting("info", "log level")
    workers: tuple[str, ...] = setting((), "worker targets")


def write(folder: Path, text: str) -> Path:
    file = folder / "relay.toml"
    file.write_text(text)
    return file


def test_each_layer_overrides_the_one_below(tmp_path: Path) -> None:
    file = write(tmp_path, '[router]\nport = 1\nratio = 0.25\nname = "file"\n')
    resolved = resolve(
        Example,
        "router",
        file=file,
        environ={"TOKENRELAY_ROUTER_PORT": "2", "TOKENRELAY_ROUTER_NAME": "env"},
        flags={"port": 3, "quiet": None},
    )
    assert resolved.values == Example(port=3, ratio=0.25, name="env", quiet=False)
    assert resolved.origins["port"] == "flag --port"
    assert resolved.origins["name"] == "environment TOKENRELAY_ROUTER_NAME"
    assert resolved.origins["ratio"] == f"file {file}"
    assert resolved.origins["quiet"] == "default"
    assert ("router.port", "3", "flag --port") in resolved.rows()


def test_text_is_converted() -> None:
    environ = {
        "TOKENRELAY_R_QUIET": "Yes",
        "TOKENRELAY_R_RATIO": "1e-3",
        "TOKENRELAY_R_WORKERS": "a, b,",
        "TOKENRELAY_R_LEVEL": "debug",
    }
    assert resolve(Example, "r", environ=environ).values == Example(
        quiet=True, ratio=1e-3, workers=("a", "b"), level="debug"
    )


@pytest.mark.parametrize(
    ("environ", "text", "expected"),
    [
        (
            {"TOKENRELAY_ROUTER_PORT": "many"},
            "",
            "router.port (environment TOKENRELAY_ROUTER_PORT) is 'many', expected a whole number",
        ),
        ({"TOKENRELAY_ROUTER_PORT": "70000"}, "", "expected at most 65535"),
        ({"TOKENRELAY_ROUTER_QUIET": "perhaps"}, "", "expected true or false"),
        ({"TOKENRELAY_ROUTER_LEVEL": "loud"}, "", "expected one of 'debug', 'info'"),
        ({}, "[router]\nprot = 1\n", "has no setting 'prot'; known: level, name, port"),
        ({}, "[router]\nport = 1.5\n", "expected a whole number"),
        ({}, "[router]\nname = 1\n", "expected text"),
        ({}, "router = 1\n", "must be a table"),
        ({}, "[router\n", "is not valid TOML"),
    ],
)
def test_errors_name_the_field_and_its_origin(
    tmp_path: Path, environ: dict[str, str], text: str, expected: str
) -> None:
    with pytest.raises(ConfigError) as error:
        resolve(Example, "router", file=write(tmp_path, text), environ=environ)
    assert expected in str(error.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read the configuration file .*nowhere\.toml"):
        resolve(Example, "router", file=tmp_path / "nowhere.toml")
