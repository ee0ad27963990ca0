"""The prefix directory: longest prefixes, old and missing batches, restarts, its bound; against a plain model."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from tokenrelay.ledger.directory import Applied, CacheFeed, PrefixDirectory


def h(number: int) -> bytes:
    return number.to_bytes(16, "big")


def sealed(*numbers: int) -> list[tuple[str, bytes]]:
    return [("sealed", h(n)) for n in numbers]


def evicted(*numbers: int) -> list[tuple[str, bytes]]:
    return [("evicted", h(n)) for n in numbers]


def test_each_holder_has_its_own_longest_prefix() -> None:
    directory = PrefixDirectory()
    directory.apply("w1", "a", 1, sealed(1, 2, 3))
    directory.apply("w2", "a", 1, sealed(1, 2, 9))
    directory.apply("w3", "a", 1, sealed(2, 3))
    assert directory.match([h(1), h(2), h(3), h(4)]) == {"w1": 3, "w2": 2}
    directory.apply("w1", "a", 2, evicted(2))
    assert directory.match([h(1), h(2), h(3)]) == {"w1": 1, "w2": 2}
    assert directory.match([]) == {} and directory.match([h(7)]) == {}


def test_an_old_batch_changes_nothing_and_a_gap_asks_for_everything() -> None:
    directory = PrefixDirectory()
    assert directory.apply("w1", "a", 1, sealed(1)) is Applied.APPLIED
    assert directory.apply("w1", "a", 2, evicted(1)) is Applied.APPLIED
    for repeated in (2, 1):
        assert directory.apply("w1", "a", repeated, sealed(1)) is Applied.REPEATED
    assert directory.match([h(1)]) == {}
    assert directory.apply("w1", "a", 4, sealed(5)) is Applied.RESYNC
    assert directory.match([h(5)]) == {}, "nothing is believed until the resync"
    directory.resync("w1", "a", 4, [h(5), h(6)])
    assert directory.match([h(5), h(6)]) == {"w1": 2}
    assert directory.apply("w1", "a", 5, evicted(6)) is Applied.APPLIED
    assert directory.match([h(5), h(6)]) == {"w1": 1}


def test_a_restarted_worker_holds_nothing_of_before() -> None:
    directory = PrefixDirectory()
    directory.apply("w1", "a", 1, sealed(1, 2))
    assert directory.apply("w1", "b", 3, sealed(9)) is Applied.RESYNC
    assert directory.match([h(1)]) == {} and len(directory) == 0
    assert directory.apply("w1", "b", 1, sealed(1)) is Applied.APPLIED
    assert directory.match([h(1), h(2)]) == {"w1": 1}


def test_a_feed_that_lost_events_forgets_rather_than_lies() -> None:
    directory, feed = PrefixDirectory(), CacheFeed("w1", "a")
    feed.publish(directory, sealed(1, 2))
    feed.publish(directory, [("lost", bytes(16)), *sealed(3)])
    assert directory.match([h(1)]) == {} and directory.match([h(3)]) == {"w1": 1}
    feed.publish(directory, sealed(1))
    assert directory.match([h(1), h(2)]) == {"w1": 1}


def test_it_is_bounded_and_forgets_the_oldest() -> None:
    directory = PrefixDirectory(entries_max=3, holders_max=2)
    directory.apply("w1", "a", 1, sealed(1, 2, 3, 4))
    assert len(directory) == 3 and directory.match([h(1)]) == {} and directory.match([h(4)]) == {"w1": 1}
    directory.apply("w1", "a", 2, evicted(1, 4))  # 1 was forgotten already
    directory.apply("w2", "a", 1, sealed(2))
    directory.apply("w3", "a", 1, sealed(2))  # the oldest holder makes room
    assert directory.match([h(2)]) == {"w2": 1, "w3": 1}


@given(seed=st.integers(0, 2**32))
def test_it_agrees_with_a_plain_model_over_a_lossy_link(seed: int) -> None:
    rng = random.Random(seed)
    directory = PrefixDirectory()
    feeds = {name: CacheFeed(name, "1") for name in ("w1", "w2")}
    for _ in range(60):
        name = rng.choice(list(feeds))
        feed = feeds[name]
        if rng.random() < 0.05:
            feeds[name] = feed = CacheFeed(name, feed.incarnation + "x")
        events = [
            ("evicted" if block_hash in feed.held else "sealed", block_hash)
            for block_hash in {h(rng.randrange(12)) for _ in range(rng.randrange(4))}
        ]
        if rng.random() < 0.1:  # lost on the way
            lost = PrefixDirectory()
            feed.publish(lost, events)
        else:
            feed.publish(directory, events)
            prompt = [h(rng.randrange(12)) for _ in range(4)]
            length = next((i for i, block in enumerate(prompt) if block not in feed.held), len(prompt))
            assert directory.match(prompt).get(name, 0) == length
