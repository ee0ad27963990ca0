"""Whether the bundled model gets through whole agent's sessions, by each API: generated ones of 5 and of 10 turns.

    python bench/sessions.py --count 60                       # an own server with the bundled model
    python bench/sessions.py --url http://127.0.0.1:8000 --turns 5 --api chat --json result.json

Unlike the exam (assets/training/evaluate.py), where every turn is written from the right history, here the model lives
with what it wrote: a mistake stays in its conversation. A turn is one request of the user, with as many tool calls as
the model makes (ROUNDS_MAX); a call that was expected gets its result, any other an error. A session ends right when
its last answer says what it must. Sessions come from the exam's seeds and wordings, which training never draws.
"""

from __future__ import annotations

import argparse
import asyncio
import datetime
import json
import os
import platform
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from tokenrelay.assets.training import skills, tools, world
from tokenrelay.cli.own import OwnServer

ROUNDS_MAX = 4
TOKENS_MAX = 160
REPLY_S = 300.0
SEED = 500_000  # of the exam's, away from those of evaluate.py
MINIMUM = {5: 0.9, 10: 0.8}  # of sessions that end right, by turns


@dataclass
class Turn:
    """What the user says, the calls it takes with their results, and what the answer must say."""

    text: str
    skill: str
    results: dict[tuple[str, str], str] = field(default_factory=dict)
    facts: tuple[str, ...] = ()


@dataclass
class Session:
    """One user's."""

    system: str
    tools: list[dict[str, Any]]
    turns: list[Turn]


def generate(seed: int, count: int) -> Session:
    """A session of `count` turns with tools; the same seed gives the same one."""
    rng = random.Random(f"sessions:{seed}")
    chosen = skills.choose(rng, count)
    while not any(skill.needs for skill in chosen):
        chosen = skills.choose(rng, count)
    offered = tools.offer(rng, [skill.needs for skill in chosen], 0.0)
    while not offered:  # the world has clients without tools, too; these sessions have some
        offered = tools.offer(rng, [skill.needs for skill in chosen], 0.0)
    script = world.Script(rng, "exam", offered)
    turns: list[Turn] = []
    for skill in chosen:
        begin = len(script.messages)
        skill.play(script)
        turns += _turns(script, begin, skill.name)
    return Session(world.system_text(rng), list(script.tools.values()), turns[:count])


def _turns(script: world.Script, begin: int, skill: str) -> list[Turn]:
    found: list[Turn] = []
    calls: dict[str, tuple[str, str]] = {}
    for place in range(begin, len(script.messages)):
        message = script.messages[place]
        if message["role"] == "user":
            found.append(Turn(message["content"], skill))
        elif message["role"] == "tool":
            found[-1].results[calls[message["tool_call_id"]]] = message["content"]
        elif message.get("tool_calls"):
            for call in message["tool_calls"]:
                calls[call["id"]] = call["function"]["name"], _canonical(call["function"]["arguments"])
        else:
            found[-1].facts = script.facts.get(place, ())
    return found


def _canonical(arguments: Any) -> str:
    return json.dumps(arguments, sort_keys=True)


# -- the three APIs ---------------------------------------------------------------------------------------------------
@dataclass
class Said:
    """One reply: (id, name, arguments) of its calls, or its text."""

    calls: list[tuple[str, str, Any]]
    text: str


class Chat:
    """OpenAI's chat completions."""

    path = "/v1/chat/completions"

    def __init__(self, session: Session) -> None:
        self.messages: list[Any] = [{"role": "system", "content": session.system}]
        self.tools = session.tools

    def body(self) -> dict[str, Any]:
        return {"messages": self.messages, "tools": self.tools, "max_tokens": TOKENS_MAX, "temperature": 0}

    def user(self, text: str) -> None:
        self.messages.append({"role": "user", "content": text})

    def results(self, given: list[tuple[str, str]]) -> None:
        self.messages += [{"role": "tool", "tool_call_id": call, "content": text} for call, text in given]

    def take(self, reply: dict[str, Any]) -> Said:
        message = reply["choices"][0]["message"]
        self.messages.append({name: value for name, value in message.items() if value is not None})
        calls = [
            (one["id"], one["function"]["name"], one["function"]["arguments"])
            for one in message.get("tool_calls") or ()
        ]
        return Said([(one, name, _read(arguments)) for one, name, arguments in calls], message.get("content") or "")


class Messages:
    """Anthropic's."""

    path = "/v1/messages"

    def __init__(self, session: Session) -> None:
        self.system = session.system
        self.messages: list[Any] = []
        functions = [tool["function"] for tool in session.tools]
        self.tools = [
            {"name": one["name"], "description": one.get("description", ""), "input_schema": one["parameters"]}
            for one in functions
        ]

    def body(self) -> dict[str, Any]:
        return {
            "system": self.system,
            "messages": self.messages,
            "tools": self.tools,
            "max_tokens": TOKENS_MAX,
            "temperature": 0,
        }

    def user(self, text: str) -> None:
        self.messages.append({"role": "user", "content": text})

    def results(self, given: list[tuple[str, str]]) -> None:
        blocks = [{"type": "tool_result", "tool_use_id": call, "content": text} for call, text in given]
        self.messages.append({"role": "user", "content": blocks})

    def take(self, reply: dict[str, Any]) -> Said:
        blocks = reply["content"]
        self.messages.append({"role": "assistant", "content": blocks or [{"type": "text", "text": "."}]})
        calls = [(one["id"], one["name"], one["input"]) for one in blocks if one["type"] == "tool_use"]
        return Said(calls, "".join(one["text"] for one in blocks if one["type"] == "text"))


class Responses:
    """OpenAI's; the server keeps the conversation."""

    path = "/v1/responses"

    def __init__(self, session: Session) -> None:
        self.input: list[Any] = []
        self.instructions = session.system
        self.previous: str | None = None
        self.tools = [{"type": "function", "strict": False, **tool["function"]} for tool in session.tools]

    def body(self) -> dict[str, Any]:
        body: dict[str, Any] = {"input": self.input, "instructions": self.instructions, "tools": self.tools}
        return {**body, "previous_response_id": self.previous, "max_output_tokens": TOKENS_MAX, "temperature": 0}

    def user(self, text: str) -> None:
        self.input = [{"role": "user", "content": text}]

    def results(self, given: list[tuple[str, str]]) -> None:
        self.input = [{"type": "function_call_output", "call_id": call, "output": text} for call, text in given]

    def take(self, reply: dict[str, Any]) -> Said:
        self.previous = reply["id"]
        items = reply["output"]
        calls = [
            (one["call_id"], one["name"], _read(one["arguments"])) for one in items if one["type"] == "function_call"
        ]
        texts = [part["text"] for one in items if one["type"] == "message" for part in one["content"]]
        return Said(calls, "".join(texts))


Api = Chat | Messages | Responses
APIS: dict[str, Callable[[Session], Api]] = {"chat": Chat, "messages": Messages, "responses": Responses}


def _read(arguments: str) -> Any:
    try:
        return json.loads(arguments)
    except ValueError:
        return arguments


# -- playing ----------------------------------------------------------------------------------------------------------
async def play(http: aiohttp.ClientSession, url: str, model: str, session: Session, api: Api) -> list[bool]:
    """Which of its turns were right."""
    right = []
    for turn in session.turns:
        api.user(turn.text)
        said = await _say(http, url, model, api)
        for _ in range(ROUNDS_MAX):
            if not said.calls:
                break
            given = [
                (call, turn.results.get((name, _canonical(arguments)), "error: not found"))
                for call, name, arguments in said.calls
            ]
            api.results(given)
            said = await _say(http, url, model, api)
        right.append(not said.calls and all(fact in said.text for fact in turn.facts))
        if said.calls:  # it only calls: answer them, so that the conversation can go on
            api.results([(call, "error: stop") for call, _, _ in said.calls])
            await _say(http, url, model, api)
    return right


async def _say(http: aiohttp.ClientSession, url: str, model: str, api: Api) -> Said:
    async with http.post(f"{url}{api.path}", json={"model": model, **api.body()}) as response:
        reply = await response.json()
        if response.status != 200:
            raise RuntimeError(f"{api.path} answered {response.status}: {reply}")
    return api.take(reply)


async def measure(url: str, model: str, names: list[str], turns: list[int], count: int, at_once: int) -> dict[str, Any]:
    """`count` sessions of each length by each API."""
    result: dict[str, Any] = {}
    gate = asyncio.Semaphore(at_once)
    console = Console(stderr=True)
    timeout = aiohttp.ClientTimeout(total=REPLY_S)
    async with aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(limit=at_once)) as http:
        with Progress(console=console, disable=not console.is_terminal) as progress:
            for name in names:
                for length in turns:
                    task = progress.add_task(f"{name}, {length} turns", total=count)

                    async def one(
                        seed: int, name: str = name, length: int = length, task: Any = task
                    ) -> tuple[Session, list[bool]]:
                        session = generate(SEED + seed, length)
                        async with gate:
                            right = await play(http, url, model, session, APIS[name](session))
                        progress.advance(task)
                        return session, right

                    played = await asyncio.gather(*(one(seed) for seed in range(count)))
                    result[f"{name} {length}"] = figures(name, length, played)
    return result


def figures(name: str, length: int, played: list[tuple[Session, list[bool]]]) -> dict[str, Any]:
    """Shares, and which skills went wrong."""
    turns = [(turn, good) for session, right in played for turn, good in zip(session.turns, right, strict=True)]
    wrong = Counter(turn.skill for turn, good in turns if not good)
    share = sum(right[-1] for _, right in played) / len(played)
    return {
        "api": name,
        "turns": length,
        "sessions": len(played),
        "ended_right": round(share, 4),
        "all_right": round(sum(all(right) for _, right in played) / len(played), 4),
        "turns_right": round(sum(good for _, good in turns) / len(turns), 4),
        "wanted": MINIMUM.get(length),
        "wrong_by_skill": dict(wrong.most_common(6)),
    }


def table(rows: list[dict[str, Any]]) -> Table:
    """For a terminal."""
    found = Table(box=None)
    for head in ("API", "turns", "sessions", "end right", "wanted", "all right", "turns right", "wrong, by skill"):
        found.add_column(head, justify="left" if head in ("API", "wrong, by skill") else "right")
    for row in rows:
        wrong = ", ".join(f"{skill} {count}" for skill, count in row["wrong_by_skill"].items())
        wanted = "–" if row["wanted"] is None else f"{row['wanted']:.0%}"
        shares = (f"{row['ended_right']:.1%}", wanted, f"{row['all_right']:.1%}", f"{row['turns_right']:.1%}")
        found.add_row(row["api"], str(row["turns"]), str(row["sessions"]), *shares, wrong)
    return found


def main() -> int:
    """1 where a share is below what is wanted."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", help="a server; without: an own one with the bundled model")
    parser.add_argument("--model", default="tokenrelay-tiny", help="as it is served")
    parser.add_argument("--api", action="append", choices=sorted(APIS), help="only these")
    parser.add_argument("--turns", action="append", type=int, help="only these lengths [5, 10]")
    parser.add_argument("--count", type=int, default=100, help="sessions of each [100]")
    parser.add_argument("--at-once", type=int, default=8, help="[8]")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    names, turns = options.api or list(APIS), options.turns or [5, 10]

    def run(url: str) -> dict[str, Any]:
        return asyncio.run(measure(url, options.model, names, turns, options.count, options.at_once))

    if options.url:
        result = run(options.url)
    else:
        with OwnServer(["--log-level", "error"], quiet=True) as server:
            result = run(server.url)
    Console(width=None if sys.stdout.isatty() else 140).print(table(list(result.values())))
    if options.json:
        commit = subprocess.run(
            ["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False
        ).stdout.strip()
        date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        machine = f"{platform.processor() or platform.machine()}, {os.cpu_count()} CPUs, {platform.system()}"
        about = {"bench": "sessions", "date": date, "commit": commit, "machine": machine, "model": options.model}
        options.json.write_text(json.dumps({**about, "result": result}, indent=2) + "\n")
    return int(any(row["wanted"] is not None and row["ended_right"] < row["wanted"] for row in result.values()))


if __name__ == "__main__":
    sys.exit(main())
