"""The tests' helpers are imported by their bare names: each has its own, whichever folders are run together."""

from __future__ import annotations

import sys
from collections import defaultdict
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from sources import Source, script_sources, tracked

CONTAINER = Path("tests/compose/inside")  # scripts that run elsewhere
SOURCES = [source for source in script_sources() if source.part == "tests"]
ON_THE_PATH = ("tests", "bench")


def is_for_pytest(name: str) -> bool:
    """A module that pytest finds and loads itself, several of one name beside each other."""
    return name == "conftest" or name.startswith("test_")


def test_each_helper_has_a_name_of_its_own() -> None:
    """Of two with one name, whichever is imported first would be both."""
    found = defaultdict(list)
    for path in tracked(".py"):
        if path.parts[0] in ON_THE_PATH and not is_for_pytest(path.stem):
            found[path.stem].append(path)
    twice = {
        name: [str(path) for path in paths]
        for name, paths in found.items()
        if len(paths) > 1 and any(path.parts[0] == "tests" for path in paths)
    }
    assert not twice, f"helpers of one name: {twice}"
    known = sys.stdlib_module_names | packages_distributions().keys()
    hidden = [str(s.path) for s in SOURCES if s.path.stem in known and not s.path.is_relative_to(CONTAINER)]
    assert not hidden, f"an installed module has this name: {hidden}"


def test_helpers_lie_where_the_path_leads() -> None:
    """tests/conftest.py names the folders right below tests/."""
    lost = [s.path for s in SOURCES if len(s.path.parts) > 3 and not s.path.is_relative_to(CONTAINER)]
    assert not lost, f"in no folder right below tests/: {[str(path) for path in lost]}"


@pytest.mark.parametrize("source", SOURCES, ids=lambda s: str(s.path))
def test_nothing_is_imported_from_what_pytest_loads(source: Source) -> None:
    """A second copy would be, and of whichever folder comes first: what is shared lies in a helper."""
    wrong = [
        f"{source.path}:{line}: {dotted}"
        for line, dotted in source.imports()
        if any(is_for_pytest(word) for word in dotted.split("."))
    ]
    assert not wrong, f"move it to a helper module: {wrong}"
