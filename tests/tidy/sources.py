"""What the tidy tests look at: every tracked Python file, with its import path from the import table."""

from __future__ import annotations

import ast
import functools
import subprocess
import tomllib
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


@functools.cache
def import_table() -> dict[str, str]:
    """`tokenrelay/x` -> folder, as pyproject.toml has it."""
    table = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["scikit-build"]["wheel"]["packages"]
    return dict(table)


@dataclass(frozen=True)
class Source:
    """One Python file: its path from the root, and the part of the project it belongs to (see `part_of`)."""

    path: Path
    part: str

    @functools.cached_property
    def tree(self) -> ast.Module:
        """The parsed file."""
        return ast.parse((ROOT / self.path).read_text(encoding="utf-8"), filename=str(self.path))

    def imports(self) -> list[tuple[int, str]]:
        """(line, dotted module) of every import in the file, at any depth; `from a import b` counts as a.b."""
        found: list[tuple[int, str]] = []
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                found += [(node.lineno, alias.name) for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                base = "." * node.level + (node.module or "")
                found += [(node.lineno, f"{base}.{alias.name}") for alias in node.names]
        return found


def part_of(dotted: str) -> str:
    """`tokenrelay.services.router.app` -> `services/router`; `tokenrelay.kernels.ops` -> `kernels`."""
    words = dotted.split(".")[1:]
    return "/".join(words[:2]) if words[:1] == ["services"] and len(words) > 1 else (words[0] if words else "")


@functools.cache
def tracked(*suffixes: str) -> tuple[Path, ...]:
    """Files git tracks (or would, if added), with these suffixes, from the root."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    return tuple(Path(name) for name in sorted(set(listed)) if name.endswith(suffixes) and (ROOT / name).exists())


@functools.cache
def script_sources() -> tuple[Source, ...]:
    """The Python files of tests/, bench/ and tools/, which are no part of the package; `part` is the folder."""
    return tuple(Source(path, path.parts[0]) for path in tracked(".py") if path.parts[0] in {"tests", "bench", "tools"})


@functools.cache
def package_sources() -> tuple[Source, ...]:
    """The Python files of the package, generated ones left out."""
    found = []
    for path in tracked(".py"):
        if path.name.endswith(("_pb2.py", "_pb2_grpc.py")):
            continue
        for target, folder in import_table().items():
            if path.is_relative_to(folder):
                parts = path.relative_to(folder).with_suffix("").parts
                dotted = ".".join([*target.split("/"), *(part for part in parts if part != "__init__")])
                found.append(Source(path, part_of(dotted)))
    return tuple(found)
