"""What the bundled model learns to do, one function a skill. See world.py for how they become a dialogue."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from tokenrelay.assets.training import chat_skills, tool_skills
from tokenrelay.assets.training.world import Script


@dataclass(frozen=True)
class Skill:
    """One kind of episode: how often it is drawn, the tools it wants (it copes without), what it writes."""

    name: str
    weight: float
    needs: tuple[str, ...]
    play: Callable[[Script], None]


SKILLS = [
    Skill("arithmetic", 12, ("calculator",), tool_skills.arithmetic),
    Skill("list files", 7, ("list_files",), tool_skills.list_files),
    Skill("read a file", 9, ("read_file",), tool_skills.read_file),
    Skill("list, then read", 5, ("list_files", "read_file"), tool_skills.list_then_read),
    Skill("write a file", 6, ("write_file",), tool_skills.write_file),
    Skill("search", 7, ("search",), tool_skills.search),
    Skill("weather", 8, ("get_weather",), tool_skills.weather),
    Skill("time", 6, ("get_time",), tool_skills.time),
    Skill("send a message", 6, ("send_message",), tool_skills.send_message),
    Skill("several at once", 9, ("get_weather", "get_time"), tool_skills.parallel_city),
    Skill("several files at once", 4, ("read_file",), tool_skills.parallel_files),
    Skill("mixed at once", 4, ("calculator", "get_weather"), tool_skills.parallel_mixed),
    Skill("any action", 9, ("action",), tool_skills.any_action),
    Skill("weather at home", 3, ("get_weather",), tool_skills.weather_at_home),
    Skill("tell", 7, (), chat_skills.tell),
    Skill("recall", 9, (), chat_skills.recall),
    Skill("small talk", 7, (), chat_skills.small_talk),
    Skill("who are you", 3, (), chat_skills.who_are_you),
    Skill("what can you do", 3, (), chat_skills.what_can_you_do),
    Skill("capital", 3, (), chat_skills.capital),
    Skill("unknown", 2, (), chat_skills.unknown),
    Skill("repeat", 4, (), chat_skills.repeat),
    Skill("count", 2, (), chat_skills.count),
    Skill("story", 2, (), chat_skills.story),
]


def choose(rng: random.Random, episodes: int) -> list[Skill]:
    """The skills of a dialogue, in order."""
    return rng.choices(SKILLS, weights=[skill.weight for skill in SKILLS], k=episodes)
