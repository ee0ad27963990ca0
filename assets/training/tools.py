"""The tools of the toy world, as a client would offer them, and which of them a dialogue offers."""

from __future__ import annotations

import random
from typing import Any

from tokenrelay.assets.training import pools

# name -> (parameter -> type), wordings of the description
CATALOGUE: dict[str, tuple[dict[str, str], list[str]]] = {
    "calculator": (
        {"expression": "string"},
        [
            "Evaluate an arithmetic expression.",
            "Do arithmetic.",
            "Compute the value of an expression.",
            "A calculator.",
        ],
    ),
    "list_files": (
        {"path": "string"},
        ["List the files in a folder.", "List a directory.", "Show what is in a folder."],
    ),
    "read_file": (
        {"path": "string"},
        ["Read a text file.", "Return the content of a file.", "Read a file from disk."],
    ),
    "write_file": (
        {"path": "string", "content": "string"},
        ["Write text to a file.", "Save text in a file.", "Create or replace a file."],
    ),
    "search": (
        {"query": "string"},
        ["Search the web.", "Look something up.", "Search for information on a topic."],
    ),
    "get_weather": (
        {"city": "string"},
        ["Get the current weather for a city.", "The weather in a city.", "Current weather."],
    ),
    "get_time": (
        {"city": "string"},
        ["Get the local time in a city.", "The current time in a city.", "Tell the time."],
    ),
    "send_message": (
        {"to": "string", "text": "string"},
        ["Send a message to a person.", "Send a short text to someone.", "Message a person."],
    ),
}


def schema(name: str, parameters: dict[str, str], description: str) -> dict[str, Any]:
    """One tool in the shape of OpenAI's API."""
    return {
        "type": "function",
        "function": {
            "name": name,
            "description": description,
            "parameters": {
                "type": "object",
                "properties": {parameter: {"type": kind} for parameter, kind in parameters.items()},
                "required": list(parameters),
            },
        },
    }


def from_catalogue(rng: random.Random, name: str) -> dict[str, Any]:
    """A tool of the catalogue in one of its wordings; sometimes with none."""
    parameters, descriptions = CATALOGUE[name]
    return schema(name, parameters, "" if rng.random() < 0.05 else rng.choice(descriptions))


def action(rng: random.Random) -> tuple[str, dict[str, Any]]:
    """A tool in no catalogue: `open_ticket(id: integer)`, `find_user(name: string)`, or with both parameters."""
    verb, noun = rng.choice(pools.VERBS), rng.choice(pools.NOUNS)
    number = {rng.choice(["id", "id", "number", "index"]): "integer"}
    person = {rng.choice(["name", "name", "user", "owner"]): "string"}
    parameters = rng.choice([number, number, person, person, number | person])
    name = f"{verb}_{noun}"
    text = rng.choice([f"{verb.capitalize()} a {noun}.", f"{verb.capitalize()} the {noun} that is named.", ""])
    return name, schema(name, parameters, text)


def offer(rng: random.Random, needs: list[tuple[str, ...]], missing: float) -> dict[str, dict[str, Any]]:
    """The tools on offer: what the episodes need, each left out with probability `missing`, and a few more, in any
    order; sometimes none at all."""
    wanted = [name for need in needs for name in need]
    if rng.random() < (0.06 if wanted else 0.5):
        return {}
    names = [name for name in dict.fromkeys(wanted) if name != "action" and rng.random() < 1 - missing]
    others = [name for name in CATALOGUE if name not in names and name not in wanted]
    names += rng.sample(others, min(len(others), rng.choice((0, 0, 1, 1, 2, 3))))
    offered = {name: from_catalogue(rng, name) for name in names}
    for _ in range((2 if rng.random() < 0.3 else 1) if "action" in wanted else rng.random() < 0.1):
        name, tool = action(rng)
        offered[name] = tool
    names = list(offered)
    rng.shuffle(names)
    return {name: offered[name] for name in names}
