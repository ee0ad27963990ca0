"""Reads the fields of a config.json one by one, with an error that names file, field, what was expected and found."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from tokenrelay.base.errors import CheckpointError

INTEGER_MAX = 1 << 31
_FILE_BYTES_MAX = 64 << 20  # the largest configuration that makes sense is far smaller


class Fields:
    """A JSON object of a checkpoint folder. A field that is null counts as missing."""

    def __init__(self, values: Mapping[str, Any], file: str, path: str = "") -> None:
        self._values = values
        self._path = path
        self.file = file

    @staticmethod
    def read(path: Path) -> Fields:
        """Parse `path`. Raises CheckpointError when it is not there, cannot be read or holds no JSON object."""
        return Fields(read_json(path), str(path))

    def __contains__(self, name: str) -> bool:
        return self._values.get(name) is not None

    def raw(self, name: str) -> Any:
        """The value as parsed, None when missing."""
        return self._values.get(name)

    def fail(self, name: str, expected: str) -> NoReturn:
        """Raise the error for field `name`."""
        where = f"{self._path}{name}"
        if self._values.get(name) is None:
            raise CheckpointError(f"{self.file}: {where} is missing; expected {expected}", file=self.file)
        found = json.dumps(self._values[name])[:80]
        raise CheckpointError(f"{self.file}: {where} is {found}; expected {expected}", file=self.file)

    def integer(self, name: str, default: int | None = None, *, minimum: int = 1, maximum: int = INTEGER_MAX) -> int:
        """An integer within the bounds; `default` when missing, and an error when that is None."""
        value = self._values.get(name)
        if value is None and default is not None:
            return default
        if isinstance(value, bool) or not isinstance(value, int) or not minimum <= value <= maximum:
            self.fail(name, f"an integer from {minimum} to {maximum}")
        return value

    def number(self, name: str, default: float | None = None, *, above: float = 0.0) -> float:
        """A finite number greater than `above`."""
        value = self._values.get(name)
        if value is None and default is not None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float):
            self.fail(name, f"a number above {above:g}")
        if not math.isfinite(value) or value <= above:
            self.fail(name, f"a finite number above {above:g}")
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        """true or false."""
        value = self._values.get(name, default)
        if value is None:
            return default
        if not isinstance(value, bool):
            self.fail(name, "true or false")
        return value

    def integers(self, name: str) -> tuple[int, ...]:
        """An integer or a list of integers, none of them negative; () when missing."""
        value = self._values.get(name)
        values = value if isinstance(value, list) else [] if value is None else [value]
        if any(isinstance(item, bool) or not isinstance(item, int) or item < 0 for item in values):
            self.fail(name, "an integer of at least 0 or a list of them")
        return tuple(values)

    def texts(self, name: str) -> tuple[str, ...]:
        """A string or a list of strings; () when missing."""
        value = self._values.get(name)
        values = value if isinstance(value, list) else [] if value is None else [value]
        if any(not isinstance(item, str) for item in values):
            self.fail(name, "a string or a list of strings")
        return tuple(values)

    def table(self, name: str) -> Fields | None:
        """A nested object, None when missing."""
        value = self._values.get(name)
        if value is None:
            return None
        if not isinstance(value, dict):
            self.fail(name, "an object")
        return Fields(value, self.file, f"{self._path}{name}.")

    def only(self, name: str, *allowed: Any, why: str) -> None:
        """Refuse a value that is present and not one of `allowed`: what this build does not compute."""
        if name in self and self._values[name] not in allowed:
            known = " or ".join(json.dumps(value) for value in allowed)
            self.fail(name, f"{known} ({why})")


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`. Raises CheckpointError that says what is wrong with the file."""
    file = str(path)
    try:
        if path.stat().st_size > _FILE_BYTES_MAX:
            raise CheckpointError(f"{path} is larger than {_FILE_BYTES_MAX >> 20} MiB", file=file)
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist", file=file) from None
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}", file=file) from error
    except RecursionError:
        raise CheckpointError(f"{path} is nested too deeply", file=file) from None
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError
        raise CheckpointError(f"{path} is not valid JSON: {error}", file=file) from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds {type(value).__name__}, expected a JSON object", file=file)
    return value
