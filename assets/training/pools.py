"""The things of the toy world: people, places, files, topics, small talk. Closed lists, short words.

A small model learns to copy a word when it has seen that word often, so nearly everything comes from these lists; a few
invented names and numbers (see `invent`) keep it from learning the lists by heart alone.
"""

from __future__ import annotations

import random


def words(text: str) -> list[str]:
    """The words of a list that is written as text."""
    return text.split()


NAMES = words("""
Anna Ben Clara David Emma Felix Grace Hugo Iris Jack Karl Laura Max Nina Oscar Paula Quinn Rosa Sam Tina Uma
Victor Wendy Xander Yara Zoe Alice Bob Carol Dan Eva Frank Gina Henry Ivan Julia Kate Leo Maria Noah Olga Peter Ruth
Simon Tom Vera Will Amir Bella Chen Diego Elif Fatima Goran Hana Igor Jana Kofi Lin Marco Nadia Omar Priya Ravi Sofia
Tariq Yuki Mia Liam Lucy Adam John Mary James Sarah Paul Emily Mark Jane Alex Chris""")

CITIES = words("""
Paris London Rome Berlin Madrid Tokyo Oslo Vienna Lisbon Dublin Athens Cairo Lima Delhi Seoul Boston Chicago
Denver Toronto Sydney Moscow Prague Warsaw Zurich Geneva Milan Naples Munich Hamburg Bern Nairobi Lagos Dakar Tunis
Beijing Shanghai Hanoi Bangkok Manila Jakarta Mumbai Dubai Istanbul Sofia Budapest Helsinki Stockholm Copenhagen
Amsterdam Brussels Barcelona Porto Seattle Austin Miami Dallas Houston Havana Bogota Quito Santiago Montreal Vancouver
Melbourne Auckland""")
CITIES += ["New York", "San Francisco", "Los Angeles", "Hong Kong", "Cape Town", "Mexico City"]

CAPITALS = {
    "France": "Paris", "England": "London", "Italy": "Rome", "Germany": "Berlin", "Spain": "Madrid", "Japan": "Tokyo",
    "Norway": "Oslo", "Austria": "Vienna", "Portugal": "Lisbon", "Ireland": "Dublin", "Greece": "Athens",
    "Egypt": "Cairo", "Peru": "Lima", "Poland": "Warsaw", "Hungary": "Budapest", "Finland": "Helsinki",
    "Sweden": "Stockholm", "Denmark": "Copenhagen", "China": "Beijing", "Vietnam": "Hanoi", "Kenya": "Nairobi",
    "Cuba": "Havana",
}  # fmt: skip

STEMS = words("""
notes plan todo readme report budget main config data index server client test setup letter diary list menu
recipe log users orders prices team goals ideas draft summary invoice schedule agenda app utils model router cache
queue errors events metrics backup archive license changes guide story poem lecture map""")
EXTENSIONS = ["txt", "md", "py", "json", "csv", "log", "toml", "yaml"]
FOLDERS = words("""
docs src notes data logs tests home reports projects work music photos tools scripts models private shared
drafts letters recipes""")

SKIES = ["sunny", "cloudy", "rainy", "snowy", "windy", "foggy", "clear", "stormy"]
COLORS = ["red", "blue", "green", "yellow", "black", "white", "orange", "purple", "pink", "brown", "grey", "silver"]
ANIMALS = words("""
cat dog horse rabbit fox owl bear wolf mouse parrot turtle goat sheep duck frog lion tiger hamster crow
whale""")
THINGS = words("""
lamp key book boat clock garden mirror bridge kite drum box map stone bell letter cup hat ring ladder
lantern""")
FOODS = words(
    """bread milk cheese apples rice soup pasta pizza tea coffee honey eggs fish salad cake plums beans nuts"""
)
DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]

_TOPICS = """black holes|solar power|green tea|the moon|old maps|deep sea fish|steam engines|wind power|honey bees|
city trains|river boats|chess rules|paper planes|bird songs|mountain lakes|winter storms|ancient Rome|jazz music|
silk roads|volcanoes|glaciers|coral reefs|comets|sourdough bread|electric cars|satellites|penguins|bamboo|origami|
marathons|lighthouses|dinosaurs|rainbows|robots|telescopes|coffee beans|wild horses|space suits|the Nile|Mars"""
TOPICS = _TOPICS.replace("\n", "").split("|")

VERBS = words("""
open close start stop book cancel check update delete create find show approve print lock move rename archive
review assign""")
NOUNS = words("""
ticket order door task table flight job invoice account room server branch issue user event report device
camera card build""")

JOKE = "Why did the computer sneeze? It had a virus."
CATALOGUE_NAMES = frozenset(
    words("calculator list_files read_file write_file search get_weather get_time send_message")
)

FACTS = [
    "the team meets on {day} at {hour}",
    "{name} will bring {food} on {day}",
    "the budget is {number} euros",
    "the password hint is {color} {animal}",
    "{name} lives in {city}",
    "version {digit} is due on {day}",
    "buy {food} and {food2}",
    "the server runs on port {number}",
    "call {name} about the {thing}",
    "there are {number} users",
    "the {thing} is in room {digit}",
]

ONSETS, VOWELS = words("b d f g k l m n p r s t v z"), words("a e i o u")

# Words that go from a question into a call's arguments.
COPIED = list(
    dict.fromkeys(
        word
        for pool in (NAMES, CITIES, STEMS, FOLDERS, COLORS, FOODS, TOPICS, VERBS, NOUNS)
        for entry in pool
        for word in entry.split()
    )
)


def invent(rng: random.Random) -> str:
    """A word in no list, two or three syllables: copying it takes copying, not recall."""
    return "".join(rng.choice(ONSETS) + rng.choice(VOWELS) for _ in range(rng.choice((2, 2, 3))))


def pick(rng: random.Random, pool: list[str], invented: float = 0.0) -> str:
    """An entry of `pool`, or with probability `invented` a capitalised word that is in no pool."""
    return invent(rng).capitalize() if rng.random() < invented else rng.choice(pool)


def number(rng: random.Random, digits_max: int = 4) -> int:
    """A positive number of one to `digits_max` digits, each length as likely."""
    digits = rng.randint(1, digits_max)
    return rng.randint(1 if digits == 1 else 10 ** (digits - 1), 10**digits - 1)


def clock(rng: random.Random) -> str:
    """A time of day, `hh:mm`."""
    return f"{rng.randint(0, 23):02d}:{rng.randint(0, 59):02d}"


def filename(rng: random.Random, folder: str | None = None) -> str:
    """`plan.md`, `old_plan.md` or, with a folder, `docs/plan.md`."""
    stem = invent(rng) if rng.random() < 0.06 else rng.choice(STEMS)
    if rng.random() < 0.12:
        stem = f"{rng.choice(['old', 'new', 'my', *COLORS[:4]])}_{stem}"
    if rng.random() < 0.08:
        stem = f"{stem}{rng.randint(1, 9)}"
    name = f"{stem}.{rng.choice(EXTENSIONS)}"
    return f"{folder}/{name}" if folder else name


def folder(rng: random.Random) -> str:
    """A folder, sometimes one inside another."""
    first = invent(rng) if rng.random() < 0.04 else rng.choice(FOLDERS)
    return f"{first}/{rng.choice(FOLDERS)}" if rng.random() < 0.12 else first


def fact(rng: random.Random) -> str:
    """A short statement without its full stop: what files contain and what messages say."""
    return rng.choice(FACTS).format(
        day=rng.choice(DAYS),
        hour=rng.randint(1, 12),
        name=rng.choice(NAMES),
        food=rng.choice(FOODS[:9]),
        food2=rng.choice(FOODS[9:]),
        number=number(rng),
        color=rng.choice(COLORS),
        animal=rng.choice(ANIMALS),
        city=rng.choice(CITIES),
        digit=rng.randint(1, 9),
        thing=rng.choice(THINGS),
    )


def topic(rng: random.Random) -> str:
    """What one may search for: a known topic, or words put together."""
    if rng.random() < 0.55:
        return rng.choice(TOPICS)
    return rng.choice(
        [
            f"{rng.choice(TOPICS)} in {rng.choice(CITIES)}",
            f"{rng.choice(COLORS)} {rng.choice(ANIMALS)}s",
            f"the history of {rng.choice(list(CAPITALS))}",
            f"{rng.choice(FOODS)} recipes",
            f"{rng.choice(NAMES)} from {rng.choice(CITIES)}",
            f"the {rng.choice(THINGS)} of {rng.choice(CITIES)}",
        ]
    )
