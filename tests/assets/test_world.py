"""The toy world is deterministic, keeps its exam apart from its training, and never asks for the impossible."""

from __future__ import annotations

import random

from tokenrelay.assets.training import pools, skills, tools, world
from tokenrelay.assets.training.tool_skills import value_of

PATTERN = "[a|b|c|d] [e|f|g|h] [i|j|k|l]"


def test_a_seed_always_writes_the_same() -> None:
    for index in range(20):
        first, again = world.write_train(index), world.write_train(index)
        assert (first.messages, first.tools, first.facts) == (again.messages, again.tools, again.facts)
    assert world.write_train(1).messages != world.write_train(2).messages
    assert world.write_train(1).messages != world.write_exam(1).messages


def test_reserved_wordings_stay_in_the_exam() -> None:
    draws = {
        split: {world.Script(random.Random(seed), split, {}).phrase(PATTERN) for seed in range(400)}
        for split in ("train", "exam")
    }
    kept = {text for text in draws["train"] | draws["exam"] if world.reserved(PATTERN, text)}
    assert kept
    assert not kept & draws["train"]
    # An exam phrase is a reserved one unless twelve draws in a row were not, (7/8)^12 = 20 %; those are then ordinary.
    assert kept <= draws["exam"]


def test_calls_name_tools_on_offer_with_all_their_arguments() -> None:
    seen = set()
    for index in range(300):
        dialogue = world.write_exam(index)
        offered = {tool["function"]["name"]: tool["function"]["parameters"]["properties"] for tool in dialogue.tools}
        for message in dialogue.messages:
            for call in message.get("tool_calls", []):
                function = call["function"]
                assert set(function["arguments"]) == set(offered[function["name"]])
                seen.add(function["name"])
    assert seen > set(tools.CATALOGUE), "every tool of the catalogue is called, and some of the clients' own"
    assert set(tools.CATALOGUE) == pools.CATALOGUE_NAMES


def test_answers_hold_their_facts_and_every_skill_is_played() -> None:
    played = set()
    for index in range(400):
        dialogue = world.write_train(index, episodes_max=9)
        played.update(dialogue.skills)
        for place, facts in dialogue.facts.items():
            assert all(fact in dialogue.messages[place]["content"] for fact in facts)
        assert len(dialogue.episodes) == len(dialogue.messages)
    assert played == {skill.name for skill in skills.SKILLS}


def test_the_calculator_is_right() -> None:
    assert [value_of(text) for text in ("7 * 8", "1 / 3", "(3 - 5) * 2", "2.5 * 2")] == ["56", "0.333", "-4", "5"]
