"""Three harmless tools that `tokenrelay chat` can run by itself: a calculator, and reading in the current folder.

    run("calculator", '{"expression": "2 * (3 + 4)"}')    # "14"

Results are text, errors too (`error: …`), since it is the model that reads them. Nothing outside of the folder is read,
nothing is written, and every result is bounded.
"""

from __future__ import annotations

import ast
import json
import operator
from collections.abc import Callable
from pathlib import Path
from typing import Any

RESULT_CHARS_MAX = 4000
LISTED_MAX = 200
NUMBER_MAX = 10**15  # beyond this the calculator declines: exactness ends, and powers must not run for minutes

_OPERATORS: dict[type[ast.AST], Callable[..., float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.USub: operator.neg,
    ast.UAdd: operator.pos,
}


def _tool(name: str, description: str, parameter: str) -> dict[str, Any]:
    parameters = {"type": "object", "properties": {parameter: {"type": "string"}}, "required": [parameter]}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


TOOLS = (
    _tool("calculator", "Evaluate an arithmetic expression.", "expression"),
    _tool("list_files", "List the files in a folder.", "path"),
    _tool("read_file", "Read a text file.", "path"),
)
NAMES = tuple(str(tool["function"]["name"]) for tool in TOOLS)


def run(name: str, arguments: str, folder: Path | None = None) -> str:
    """The result of one call; `folder` (default: the current one) is all that may be read."""
    folder = (folder or Path.cwd()).resolve()
    try:
        given = json.loads(arguments)
        if name == "calculator":
            return calculate(str(given["expression"]))
        path = (folder / str(given["path"])).resolve()
        if not path.is_relative_to(folder):
            return "error: outside of the current folder"
        return _list(path) if name == "list_files" else _read(path)
    except (ValueError, KeyError, TypeError):
        return "error: wrong arguments"
    except OSError as error:
        return f"error: {(error.strerror or 'cannot read').lower()}"


def calculate(expression: str) -> str:
    """The value of an arithmetic expression with + - * / and parentheses, whole numbers without a point."""
    try:
        value = _value(ast.parse(expression[:1000].strip(), mode="eval").body)
    except ZeroDivisionError:
        return "error: division by zero"
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return "error: not an arithmetic expression"
    rounded = round(value, 6)
    return str(int(rounded)) if rounded == int(rounded) else str(rounded)


def _value(node: ast.AST) -> float:
    """ValueError for anything but numbers and the four operations."""
    value: float
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float) and not isinstance(node.value, bool):
        value = node.value
    elif isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        value = _OPERATORS[type(node.op)](_value(node.left), _value(node.right))
    elif isinstance(node, ast.UnaryOp) and type(node.op) in _OPERATORS:
        value = _OPERATORS[type(node.op)](_value(node.operand))
    else:
        raise ValueError("not arithmetic")
    if not abs(value) <= NUMBER_MAX:
        raise ValueError("too large")
    return value


def _list(path: Path) -> str:
    names = sorted(entry.name + ("/" if entry.is_dir() else "") for entry in path.iterdir())
    more = len(names) - LISTED_MAX
    return "\n".join(names[:LISTED_MAX] + ([f"and {more} more"] if more > 0 else [])) or "(empty)"


def _read(path: Path) -> str:
    if path.is_dir():
        return "error: is a folder"
    with path.open("rb") as file:
        data = file.read(4 * RESULT_CHARS_MAX)
    if b"\0" in data:
        return "error: not a text file"
    text = data.decode("utf-8", errors="replace")
    return text[:RESULT_CHARS_MAX] + (" …" if len(text) > RESULT_CHARS_MAX else "")
