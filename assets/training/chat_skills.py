"""Episodes without tools: small talk, memory over turns, a few facts."""

from __future__ import annotations

from dataclasses import dataclass

from tokenrelay.assets.training import pools
from tokenrelay.assets.training.world import Script

CHAT = "The user is making small talk. I need no tool."
ABOUT_ME = "The user asks about me. I need no tool."
BY_THE_WAY = "[|by the way, |just so you know, |you know, |hey, ]"
QUESTION = "[|please: |quick question: |so, |hey, ]"


@dataclass(frozen=True)
class Memory:
    """Something a user may tell: how it is told and answered, how it is asked for, recalled, and missed."""

    told: str
    answer: str
    asked: str
    recalled: str
    unknown: str


MEMORIES = {
    "name": Memory(
        "[|hi, |hello, |hey, |by the way, ]"
        "[my name is|I am|I'm called|call me|this is|the name is|people call me] {value}[.|!|]",
        "Nice to meet you, {value}!",
        QUESTION + "[what is my name?|what's my name?|do you remember my name?|who am I?|tell me my name.|"
        "do you know my name?|say my name.]",
        "Your name is {value}.",
        "You have not told me your name yet.",
    ),
    "city": Memory(
        BY_THE_WAY + "[I live in|my home is in|I am from|my city is|I moved to|I am living in] {value}[.|!|]",
        "{value} is a lovely place to live.",
        QUESTION + "[where do I live?|what is my city?|where am I from?|which city do I live in?|tell me where I live.|"
        "do you know where I live?]",
        "You live in {value}.",
        "You have not told me where you live yet.",
    ),
    "color": Memory(
        BY_THE_WAY + "[my favorite color is|I like the color|the color I like most is|I love the color] {value}[.|!|]",
        "I will remember that you like {value}.",
        QUESTION + "[what is my favorite color?|which color do I like?|what color do I like most?|"
        "tell me my favorite color.]",
        "Your favorite color is {value}.",
        "You have not told me your favorite color yet.",
    ),
    "pet": Memory(
        BY_THE_WAY + "[I have a pet|my pet is a|I own a|at home I have a] {value}[.|!|]",
        "A {value} is a fine pet.",
        QUESTION + "[what pet do I have?|which animal do I own?|what is my pet?|do you remember my pet?]",
        "You have a {value}.",
        "You have not told me about a pet yet.",
    ),
    "number": Memory(
        BY_THE_WAY + "[my lucky number is|remember the number|keep this number in mind:|"
        "the number to remember is] {value}[.|!|]",
        "I will remember the number {value}.",
        QUESTION + "[what is my number?|which number did I tell you?|what was the number?|tell me the number again.]",
        "The number is {value}.",
        "You have not told me a number yet.",
    ),
}
UNKNOWN = {key: memory.unknown for key, memory in MEMORIES.items()}

TALK = [
    (
        "[hello|hi|hey|good morning|good evening|hello there|hi there|hey there][!|.|]",
        "Hello! How can I help you?",
    ),
    (
        "[how are you|how are you today|how do you do|how is it going|are you well][?|]",
        "I am fine, thank you. How can I help?",
    ),
    ("[thanks|thank you|many thanks|thank you very much|thanks a lot|cheers][!|.|]", "You are welcome!"),
    (
        "[bye|goodbye|see you|see you later|good night|that is all|I have to go][!|.|]",
        "Goodbye! Have a nice day.",
    ),
    ("[ok|okay|good|great|nice|cool|perfect|well done][!|.|]", "Good. Is there anything else?"),
    (
        "[I am sad|I feel bad|I had a bad day|I am tired|I am not well][.|]",
        "I am sorry to hear that. I hope it gets better.",
    ),
    (
        "[I am happy|I feel great|I had a good day|today is a good day|I am so glad][.|!|]",
        "That is good to hear!",
    ),
    (
        "[are you a human|are you a robot|are you real|are you a person|are you an AI][?|]",
        "I am a small language model, not a person.",
    ),
]

STORY = (
    "Once there was a {animal} that found a {thing}. The {animal} carried the {thing} home and showed it to everyone. "
    "At night the {thing} began to shine, and the {animal} was not afraid of the dark any more. The end."
)


def tell(script: Script, key: str = "") -> None:
    """The user tells something about themself."""
    rng = script.rng
    key = key or rng.choice(list(MEMORIES))
    if key in ("name", "city"):
        value = pools.pick(rng, pools.NAMES, 0.08) if key == "name" else pools.pick(rng, pools.CITIES, 0.05)
    elif key == "number":
        value = str(pools.number(rng))
    else:
        value = rng.choice(pools.COLORS if key == "color" else pools.ANIMALS)
    script.memory[key] = value
    script.user(MEMORIES[key].told, value=value)
    answer = MEMORIES[key].answer.format(value=value)
    script.say(answer, value, think="The user tells me something. I need no tool.")


def recall(script: Script) -> None:
    """The user asks for what was told, or for what was not."""
    rng = script.rng
    if not script.memory and rng.random() < 0.8:
        tell(script)
    known = bool(script.memory) and rng.random() < 0.85
    key = rng.choice([key for key in MEMORIES if (key in script.memory) == known] or list(script.memory))
    script.user(MEMORIES[key].asked)
    if key in script.memory:
        value = script.memory[key]
        answer = MEMORIES[key].recalled.format(value=value)
        script.say(answer, value, think=f"The user asks about the {key}, which was {value}.")
    else:
        script.say(UNKNOWN[key], "not told", think=f"The user asks about the {key}, which was not told.")


def small_talk(script: Script) -> None:
    """Hello, thanks, goodbye; sometimes a joke."""
    rng = script.rng
    if rng.random() < 0.15:
        script.user("[|please |can you |could you ][tell me a joke|make me laugh|say something funny|tell a joke][.|]")
        script.say(pools.JOKE, think=CHAT)
        return
    said, answer = rng.choice(TALK)
    script.user(said)
    script.say(answer, answer, think=CHAT)


def who_are_you(script: Script) -> None:
    """The model knows its name."""
    script.user(
        "[|so, |please, |tell me, |hey, ]"
        "[who are you|what are you|what is your name|what's your name|who am I talking to][?|]"
    )
    answer = "I am TokenRelay Tiny, a small language model that ships with TokenRelay."
    script.say(answer, "TokenRelay Tiny", think=ABOUT_ME)


def what_can_you_do(script: Script) -> None:
    """It names the tools on offer, in their order."""
    script.user(
        "[|so, |please, |tell me, ][what can you do|how can you help me|what are you good at|"
        "which tools do you have|what tools can you use][?|]"
    )
    names = list(script.tools)
    if names:
        script.say(f"I can use these tools: {', '.join(names)}.", *names, think=ABOUT_ME)
    else:
        script.say("I can chat with you and remember what you tell me. I have no tools here.", "no tools")


def capital(script: Script) -> None:
    """The few facts that are known by heart."""
    country = script.rng.choice(list(pools.CAPITALS))
    script.user(
        QUESTION + "[what is the capital of|what's the capital of|name the capital of|which city is the capital of|"
        "do you know the capital of|tell me the capital of] {country}[?|]",
        country=country,
    )
    city = pools.CAPITALS[country]
    script.say(f"The capital of {country} is {city}.", city, think="I know this. I need no tool.")


def unknown(script: Script) -> None:
    """What it does not know."""
    rng = script.rng
    script.user(
        "[|please tell me: |quick question: |so, ][why is the {thing} {color}|who made the {thing}|"
        "how old is the {animal}|what does a {animal} eat|how big is a {animal}|when was the {thing} made|"
        "why is a {animal} {color}|how does a {thing} work][?|]",
        thing=rng.choice(pools.THINGS),
        color=rng.choice(pools.COLORS),
        animal=rng.choice(pools.ANIMALS),
    )
    answer = "I do not know that. I am only a small model."
    script.say(answer, "do not know", think="I do not know this, and no tool helps.")


def repeat(script: Script) -> None:
    """Say it again, word for word."""
    text = pools.fact(script.rng)
    script.user(
        "[|please |can you |now ][repeat after me|say this|repeat this|say exactly|echo this][:| -] {text}", text=text
    )
    script.say(text, text, think="I repeat the words. I need no tool.")


def count(script: Script) -> None:
    """Count up."""
    first = script.rng.randint(1, 20)
    last = first + script.rng.randint(3, 9)
    script.user(
        "[|please |can you |now ][count from|list the numbers from|say the numbers from|give me the numbers from]"
        " {first} to {last}[.|]",
        first=first,
        last=last,
    )
    answer = ", ".join(str(value) for value in range(first, last + 1))
    script.say(answer + ".", answer, think="I count. I need no tool.")


def story(script: Script) -> None:
    """A longer answer about the two things asked for."""
    animal, thing = script.rng.choice(pools.ANIMALS), script.rng.choice(pools.THINGS)
    script.user(
        "[|please |can you |now ][tell me a story about|write a short story about|make up a story about|tell a tale of]"
        " a {animal} and a {thing}[.|]",
        animal=animal,
        thing=thing,
    )
    script.say(STORY.format(animal=animal, thing=thing), animal, thing, think="The user wants a story. I need no tool.")
