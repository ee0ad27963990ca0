"""How the sources read: sizes, places where things may be done, words. Exemption lists may only shrink."""

from __future__ import annotations

import ast
import re

import pytest
from sources import ROOT, Source, package_sources, tracked

FILE_LINES_MAX = 600
FUNCTION_LINES_MAX = 90
LONG_FILES: dict[str, int] = {}  # path -> lines; may only shrink
LONG_FUNCTIONS: dict[str, int] = {}


def test_files_can_be_read_in_one_sitting() -> None:
    long = []
    for path in tracked(".py", ".cpp", ".hpp", ".h"):
        if "_pb2" in path.name:
            continue
        lines = len((ROOT / path).read_text(encoding="utf-8").splitlines())
        if lines > LONG_FILES.get(str(path), FILE_LINES_MAX):
            long.append(f"{path}: {lines} lines, at most {FILE_LINES_MAX}")
    assert not long, "\n".join(long)


def test_functions_fit_a_screen() -> None:
    long = []
    for source in package_sources():
        for node in ast.walk(source.tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or node.lineno) - node.body[0].lineno + 1  # a signature may be a long list
                if lines > LONG_FUNCTIONS.get(f"{source.path}:{node.name}", FUNCTION_LINES_MAX):
                    long.append(f"{source.path}:{node.lineno} {node.name}: {lines} lines, at most {FUNCTION_LINES_MAX}")
    assert not long, "\n".join(long)


@pytest.mark.parametrize("source", package_sources(), ids=lambda s: str(s.path))
def test_environment_is_read_in_config_only(source: Source) -> None:
    """Reading is for config.py; composing a child's environment is the supervisor's, and parent.py's."""
    if source.path.name in {"config.py", "supervisor.py"} or str(source.path) == "base/parent.py":
        return
    wrong = [
        f"{source.path}:{node.lineno}"
        for node in ast.walk(source.tree)
        if isinstance(node, ast.Attribute)
        and node.attr in {"environ", "getenv"}
        and isinstance(node.value, ast.Name)
        and node.value.id == "os"
    ]
    assert not wrong, f"os.environ outside config.py: {wrong}"


@pytest.mark.parametrize("source", package_sources(), ids=lambda s: str(s.path))
def test_no_swallowed_exceptions(source: Source) -> None:
    for node in ast.walk(source.tree):
        if isinstance(node, ast.ExceptHandler):
            broad = node.type is None or (
                isinstance(node.type, ast.Name) and node.type.id in {"Exception", "BaseException"}
            )
            silent = all(isinstance(statement, ast.Pass | ast.Continue) for statement in node.body)
            assert not (broad and silent), f"{source.path}:{node.lineno}: a broad except that says nothing"


@pytest.mark.parametrize(
    "source", [s for s in package_sources() if s.path.name != "__main__.py"], ids=lambda s: str(s.path)
)
def test_modules_and_public_names_have_docstrings(source: Source) -> None:
    missing = [] if ast.get_docstring(source.tree) else [f"{source.path}: the module"]
    for node in source.tree.body:
        if (
            isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
            and not node.name.startswith("_")
            and not ast.get_docstring(node)
        ):
            missing.append(f"{source.path}:{node.lineno} {node.name}")
    assert not missing, "\n".join(missing)


def test_services_have_the_same_files() -> None:
    """Every service: its config, its service, a README; those that run alone also a __main__."""
    for name in ("router", "prefill", "decode", "kvstore"):
        for file in ("__init__.py", "config.py", "service.py", "README.md"):
            assert (ROOT / "services" / name / file).is_file(), f"services/{name}/{file} is missing"
    for name in ("router", "kvstore"):
        assert (ROOT / "services" / name / "__main__.py").is_file()


def test_request_md_names_symbols_that_exist() -> None:
    """docs/request.md follows a request as `file:function`; each must be defined there."""
    text = (ROOT / "docs/request.md").read_text()
    references = re.findall(r"`([\w./-]+\.(?:py|cpp|hpp|proto)):([\w.:~]+)`", text)
    assert len(references) >= 20, "docs/request.md follows a request hop by hop"
    missing = []
    for file, symbol in references:
        path = ROOT / file
        if not path.is_file():
            missing.append(f"{file} does not exist")
        elif path.suffix == ".py":
            if symbol not in _defined(path.read_text()):
                missing.append(f"{file} does not define {symbol}")
        elif not re.search(rf"\b{re.escape(symbol.split('::')[-1])}\b", path.read_text()):
            missing.append(f"{file} does not mention {symbol}")
    assert not missing, "\n".join(missing)


def _defined(text: str) -> set[str]:
    names: set[str] = set()
    for node in ast.parse(text).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
            if isinstance(node, ast.ClassDef):
                names |= {
                    f"{node.name}.{m.name}" for m in node.body if isinstance(m, ast.FunctionDef | ast.AsyncFunctionDef)
                }
    return names
