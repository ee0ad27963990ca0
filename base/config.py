"""Configuration: one TOML file with a table per service, overridden by environment, overridden by flags.

    @dataclass(frozen=True, kw_only=True)
    class RouterConfig:
        port: int = setting(8000, "TCP port to listen on")

    resolved = resolve(RouterConfig, "router", file=Path("relay.toml"), flags={"port": 9000})
    resolved.values.port        # 9000
    resolved.origins["port"]    # "flag --port"

The environment variable of a field is `TOKENRELAY_<TABLE>_<FIELD>`. This file alone reads it.
"""

from __future__ import annotations

import dataclasses
import os
import tomllib
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from tokenrelay.base.errors import ConfigError

T = TypeVar("T")


def setting(default: Any, help: str, *, minimum: float | None = None, maximum: float | None = None) -> Any:
    """A field of a configuration class: its default, one sentence with its unit, and its bounds (both inclusive)."""
    return dataclasses.field(default=default, metadata={"help": help, "minimum": minimum, "maximum": maximum})


@dataclass(frozen=True)
class Resolved(Generic[T]):
    """The values in force, and for each field where it came from."""

    table: str
    values: T
    origins: dict[str, str]

    def rows(self) -> list[tuple[str, str, str]]:
        """(field, value, origin) of each field, for `--print-config`."""
        fields = dataclasses.fields(self.values)  # type: ignore[arg-type]
        return [(f"{self.table}.{f.name}", repr(getattr(self.values, f.name)), self.origins[f.name]) for f in fields]


def resolve(
    cls: type[T],
    table: str,
    *,
    file: Path | None = None,
    flags: Mapping[str, Any] | None = None,
    environ: Mapping[str, str] | None = None,
) -> Resolved[T]:
    """Build `cls` from its defaults, the file's table, the environment and the flags (None there means "not given").

    Raises ConfigError that names the field, where it was set and what was expected.
    """
    environ = os.environ if environ is None else environ
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    from_file = _read_table(file, table)
    for name in from_file:
        if name not in fields:
            raise ConfigError(f"{file}: [{table}] has no setting {name!r}; known: {', '.join(sorted(fields))}")
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for name, field in fields.items():
        variable = f"TOKENRELAY_{table.upper()}_{name.upper()}"
        if flags and flags.get(name) is not None:
            raw, origin = flags[name], f"flag --{name.replace('_', '-')}"
        elif variable in environ:
            raw, origin = environ[variable], f"environment {variable}"
        elif name in from_file:
            raw, origin = from_file[name], f"file {file}"
        else:
            values[name], origins[name] = field.default, "default"
            continue
        values[name] = _convert(raw, hints[name], field, f"{table}.{name} ({origin})")
        origins[name] = origin
    return Resolved(table, cls(**values), origins)


def _read_table(file: Path | None, table: str) -> dict[str, Any]:
    if file is None:
        return {}
    try:
        content = tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read the configuration file {file}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} is not valid TOML: {error}") from error
    found = content.get(table, {})
    if not isinstance(found, dict):
        raise ConfigError(f"{file}: {table!r} must be a table, as in [{table}]")
    return found


def _convert(raw: Any, hint: Any, field: dataclasses.Field[Any], where: str) -> Any:
    """Turn a string or a TOML value into the field's type, and check its bounds."""
    value = _convert_type(raw, hint, where)
    minimum, maximum = field.metadata.get("minimum"), field.metadata.get("maximum")
    if isinstance(value, int | float) and not isinstance(value, bool):
        if minimum is not None and value < minimum:
            raise ConfigError(f"{where} is {value}, expected at least {minimum}")
        if maximum is not None and value > maximum:
            raise ConfigError(f"{where} is {value}, expected at most {maximum}")
    return value


def _convert_type(raw: Any, hint: Any, where: str) -> Any:
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        options = [option for option in typing.get_args(hint) if option is not type(None)]
        return None if raw in (None, "") else _convert_type(raw, options[0], where)
    if origin is typing.Literal:
        choices = typing.get_args(hint)
        if raw not in choices:
            raise ConfigError(f"{where} is {raw!r}, expected one of {', '.join(map(repr, choices))}")
        return raw
    if origin is tuple:
        items = [item.strip() for item in raw.split(",") if item.strip()] if isinstance(raw, str) else list(raw)
        return tuple(_convert_type(item, typing.get_args(hint)[0], where) for item in items)
    if hint is bool:
        words = {
            "1": True,
            "true": True,
            "yes": True,
            "on": True,
            "0": False,
            "false": False,
            "no": False,
            "off": False,
        }
        if isinstance(raw, bool):
            return raw
        if isinstance(raw, str) and raw.lower() in words:
            return words[raw.lower()]
        raise ConfigError(f"{where} is {raw!r}, expected true or false")
    if hint is str and not isinstance(raw, str):
        raise ConfigError(f"{where} is {raw!r}, expected text")
    if hint in (int, float) and (isinstance(raw, bool) or (hint is int and isinstance(raw, float))):
        raise ConfigError(f"{where} is {raw!r}, expected {'a whole number' if hint is int else 'a number'}")
    try:
        return hint(raw)
    except (TypeError, ValueError) as error:
        kinds = {int: "a whole number", float: "a number"}
        raise ConfigError(f"{where} is {raw!r}, expected {kinds.get(hint, getattr(hint, '__name__', hint))}") from error
