"""The compose file as data, with the defaults of its variables, for tests that need no Docker."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
COMPOSE = DEPLOY / "docker-compose.yml"
VARIABLE = re.compile(r"\$\{([A-Z_]+)(?::-([^}]*))?\}")


def variables(path: Path = COMPOSE) -> dict[str, set[str]]:
    """Each variable of the file and the defaults it is given there."""
    found: dict[str, set[str]] = {}
    for name, default in VARIABLE.findall(path.read_text()):
        found.setdefault(name, set()).add(default)
    return found


def load(path: Path = COMPOSE) -> dict[str, Any]:
    """The file as Docker Compose reads it where no variable is set: anchors resolved, then defaults filled in."""
    filled: dict[str, Any] = _fill(yaml.safe_load(path.read_text()))
    return filled


def _fill(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _fill(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_fill(item) for item in value]
    return VARIABLE.sub(lambda match: match[2] or "", value) if isinstance(value, str) else value


def seconds(duration: str) -> float:
    """`1m30s` in seconds."""
    units = {"h": 3600.0, "m": 60.0, "s": 1.0}
    return sum(float(number) * units[unit] for number, unit in re.findall(r"([\d.]+)([hms])", duration))
