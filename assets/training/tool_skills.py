"""Episodes that call tools, and what is said when the tool is not on offer."""

from __future__ import annotations

import json
import random

from tokenrelay.assets.training import chat_skills, pools
from tokenrelay.assets.training.world import Call, Script

SPOKEN = {
    "+": ["plus", "added to", "+"],
    "-": ["minus", "-"],
    "*": ["times", "multiplied by", "*"],
    "/": ["divided by", "over", "/"],
}
BOUGHT = ["apples", "eggs", "plums", "beans", "nuts", "books", "cups", "hats"]


def ask(script: Script, questions: str, commands: str, **slots: object) -> None:
    """A user turn that asks or that commands; `questions` and `commands` are alternatives of the middle part."""
    if script.rng.random() < 0.5:
        opening, closing = "[|hey, |please tell me: |I need to know: |quick question: ]", "[?|?|, please?||, thanks]"
        script.user(f"{opening}[{questions}]{closing}", **slots)
    else:
        opening = "[|please |can you |could you |now |I want you to |would you |hey, ]"
        script.user(f"{opening}[{commands}][.|.|, please.| for me.| now.|, thanks.||?]", **slots)


def refuse(script: Script, what: str) -> None:
    """The tool that this takes is not on offer."""
    answer = f"I am sorry, I have no tool to {what}."
    script.say(answer, "no tool", think=f"To {what} I need a tool that is not on offer.")


def value_of(expression: str) -> str:
    """What the calculator shows: whole numbers without a point, others to at most three places."""
    value = round(eval(expression, {"__builtins__": {}}), 3)
    return str(int(value)) if value == int(value) else str(value)


def expression(rng: random.Random) -> tuple[str, str]:
    """An expression as the calculator wants it and as a user writes it."""
    kind = rng.random()
    if kind < 0.12:
        first, second, third = (pools.number(rng, 2) for _ in range(3))
        text = f"({first} {rng.choice('+-')} {second}) {rng.choice('*/')} {third}"
        return text, text
    count = 2 if kind < 0.75 else 3
    parts = [_operand(rng, 4)]
    spoken = list(parts)
    words = rng.random() < 0.5
    for _ in range(count - 1):
        sign = rng.choice("+-*/" if count == 2 else "+-*")
        other = _operand(rng, 4 if sign in "+-" else 3)
        parts += [sign, other]
        spoken += [rng.choice(SPOKEN[sign]) if words else sign, other]
    tight = not words and rng.random() < 0.3
    return " ".join(parts), ("" if tight else " ").join(spoken)


def _operand(rng: random.Random, digits_max: int) -> str:
    text = str(pools.number(rng, digits_max))
    return f"{text}.{rng.randint(1, 9)}" if rng.random() < 0.08 else text


def _computed(rng: random.Random, wanted: str) -> tuple[str, str]:
    """The value, and what the tool prints."""
    value = value_of(wanted)
    return value, f'{{"result": {value}}}' if rng.random() < 0.2 else value


def arithmetic(script: Script) -> None:
    """The calculator computes; the model copies the expression there and the value back."""
    rng = script.rng
    if rng.random() < 0.2:
        first, second, food = pools.number(rng, 3), pools.number(rng, 2), rng.choice(BOUGHT)
        wanted = f"{first} * {second}"
        script.user(
            "[I buy|we buy|she sells|he orders|they need|I need] {first} {food} at {second} euros each."
            " [How much is that?|How much is it?|What do I pay?|What is the price?]",
            first=first,
            second=second,
            food=food,
        )
    else:
        wanted, spoken = expression(rng)
        questions = "what is {x}|what's {x}|how much is {x}|what do I get for {x}|what is the value of {x}"
        ask(script, questions, "compute {x}|calculate {x}|work out {x}|evaluate {x}|solve {x}", x=spoken)
    if not script.offers("calculator"):
        refuse(script, "calculate")
        return
    value, printed = _computed(rng, wanted)
    think = f"The user wants {wanted}. I use the calculator."
    script.call([("calculator", {"expression": wanted})], [printed], think=think)
    script.say(f"{wanted} = {value}", value)


def listing(rng: random.Random, names: list[str]) -> str:
    """A folder's content as a tool may print it."""
    return json.dumps(names) if rng.random() < 0.4 else "\n".join(names)


def joined(names: list[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def list_files(script: Script) -> None:
    """What is in a folder."""
    rng = script.rng
    here = rng.random() < 0.15
    path = "." if here else pools.folder(rng)
    if here:
        questions = "what files are here|which files are there|what is in this folder|which files do I have here"
        ask(script, questions, "list the files here|show me the files here|list this folder|list all files")
    else:
        questions = "what files are in {path}|what is in the folder {path}|which files are in {path}|what is in {path}"
        commands = (
            "list the files in {path}|show me the files in {path}|list the folder {path}|list {path}|"
            "show what is in {path}|look into the folder {path}"
        )
        ask(script, questions, commands, path=path)
    if not script.offers("list_files"):
        refuse(script, "list files")
        return
    names = [] if rng.random() < 0.08 else sorted({pools.filename(rng) for _ in range(rng.randint(1, 4))})
    printed = listing(rng, names) if names else rng.choice(["(empty)", "[]"])
    think = f"The user wants the files in {path}. I use list_files."
    script.call([("list_files", {"path": path})], [printed], think=think)
    if names:
        script.say(f"I found {joined(names)}.", *names)
    else:
        script.say(f"The folder {path} is empty.", "empty")


def file_text(rng: random.Random) -> str:
    """The content of a file: a statement or two."""
    texts = [pools.fact(rng) for _ in range(2 if rng.random() < 0.12 else 1)]
    return " ".join(text[0].upper() + text[1:] + "." for text in texts)


def read_file(script: Script) -> None:
    """What a file says, or that it is not there."""
    rng = script.rng
    path = pools.filename(rng, pools.folder(rng) if rng.random() < 0.4 else None)
    questions = "what does {path} say|what is in the file {path}|what is in {path}|what does the file {path} say"
    commands = (
        "read {path}|open {path}|show me {path}|print {path}|read the file {path}|open the file {path}|show {path}"
    )
    ask(script, questions, commands, path=path)
    if not script.offers("read_file"):
        refuse(script, "read files")
        return
    think = f"The user wants to read {path}. I use read_file."
    if rng.random() < 0.1:
        error = rng.choice(["error: file not found", "error: no such file", "file not found"])
        script.call([("read_file", {"path": path})], [error], think=think)
        script.say(f"I could not read {path}.", "could not read", path)
        return
    text = file_text(rng)
    script.call([("read_file", {"path": path})], [text], think=think)
    script.say(f"{path} says: {text}", text)


def list_then_read(script: Script) -> None:
    """Two steps: look into a folder, read the file that is there."""
    rng = script.rng
    path, name = pools.folder(rng), pools.filename(rng)
    questions = (
        "what does the only file in {path} say|what is in the one file in {path}|what does the file in {path} say"
    )
    commands = (
        "read the only file in {path}|open the only file in {path}|read the file that is in {path}|"
        "show me the one file in {path}|find the file in {path} and read it|read the single file in {path}"
    )
    ask(script, questions, commands, path=path)
    if not script.offers("list_files", "read_file"):
        refuse(script, "do that")
        return
    think = f"I list {path} with list_files, then I read the file."
    script.call([("list_files", {"path": path})], [listing(rng, [name])], think=think)
    text, full = file_text(rng), f"{path}/{name}"
    script.call([("read_file", {"path": full})], [text])
    script.say(f"{full} says: {text}", text)


def write_file(script: Script) -> None:
    """Put a text into a file."""
    rng = script.rng
    path, text = pools.filename(rng, pools.folder(rng) if rng.random() < 0.3 else None), pools.fact(rng)
    opening = "[|please |can you |could you |now |I want you to ]"
    if rng.random() < 0.5:
        script.user(
            opening + "[write|save|put|store] '{text}' [to|into|in] [|the file ]{path}[|.]", text=text, path=path
        )
    else:
        script.user(
            opening + "[write to|save to|put into|create|make] [|the file ]{path}[:| this:| with the text:] {text}",
            text=text,
            path=path,
        )
    if not script.offers("write_file"):
        refuse(script, "write files")
        return
    arguments = {"path": path, "content": text}
    think = f"The user wants text in {path}. I use write_file."
    script.call([("write_file", arguments)], [rng.choice(["ok", "done", "written"])], think=think)
    script.say(f"I wrote it to {path}.", path)


def search(script: Script) -> None:
    """Look a topic up and pass on what was found."""
    rng = script.rng
    topic = pools.topic(rng)
    questions = "what can you find about {topic}|what does the web say about {topic}|is there news about {topic}"
    commands = (
        "search for {topic}|look up {topic}|find out about {topic}|find information on {topic}|"
        "search the web for {topic}|find something about {topic}|google {topic}"
    )
    ask(script, questions, commands, topic=topic)
    if not script.offers("search"):
        refuse(script, "search")
        return
    text = file_text(rng)
    think = f"The user wants to know about {topic}. I use search."
    script.call([("search", {"query": topic})], [text], think=think)
    script.say(f"I found this about {topic}: {text}", text)


def weather_report(rng: random.Random, city: str) -> tuple[str, str, tuple[str, ...]]:
    """(what the tool says, what is answered, its facts)."""
    sky, degrees = rng.choice(pools.SKIES), rng.randint(-9, 38)
    result = rng.choice(
        [
            json.dumps({"city": city, "sky": sky, "temperature": degrees}),
            json.dumps({"temperature_c": degrees, "condition": sky}),
            json.dumps({"city": city, "temperature": degrees, "condition": sky}),
            f"{sky}, {degrees} degrees",
            f"{sky}, {degrees} C",
            f"{degrees} degrees and {sky}",
        ]
    )
    return result, f"In {city} it is {sky} with {degrees} degrees.", (city, sky, str(degrees))


def time_report(rng: random.Random, city: str) -> tuple[str, str, tuple[str, ...]]:
    """(what the tool says, what is answered, its facts)."""
    clock = pools.clock(rng)
    result = rng.choice([clock, clock, json.dumps({"city": city, "time": clock}), json.dumps({"time": clock})])
    return result, f"In {city} it is {clock}.", (city, clock)


def weather(script: Script) -> None:
    """The weather in a city."""
    rng = script.rng
    city = pools.pick(rng, pools.CITIES, 0.06)
    questions = (
        "what is the weather in {city}|how is the weather in {city}|what's the weather like in {city}|"
        "is it warm in {city}|is it raining in {city} today|what is the temperature in {city} right now|"
        "how is the weather today in {city}"
    )
    commands = (
        "give me the weather in {city}|check the weather in {city}|tell me the weather for {city}|"
        "get the weather in {city}"
    )
    ask(script, questions, commands, city=city)
    if not script.offers("get_weather"):
        refuse(script, "get the weather")
        return
    result, answer, facts = weather_report(rng, city)
    think = f"The user wants the weather in {city}. I use get_weather."
    script.call([("get_weather", {"city": city})], [result], think=think)
    script.say(answer, *facts)


def time(script: Script) -> None:
    """The time in a city."""
    rng = script.rng
    city = pools.pick(rng, pools.CITIES, 0.06)
    questions = (
        "what time is it in {city}|what is the time in {city}|how late is it in {city}|"
        "what is the local time in {city}|what time is it now in {city}"
    )
    commands = "give me the time in {city}|tell me the time in {city}|get the time in {city}|check the time in {city}"
    ask(script, questions, commands, city=city)
    if not script.offers("get_time"):
        refuse(script, "get the time")
        return
    result, answer, facts = time_report(rng, city)
    think = f"The user wants the time in {city}. I use get_time."
    script.call([("get_time", {"city": city})], [result], think=think)
    script.say(answer, *facts)


def parallel_city(script: Script) -> None:
    """Weather of two or three cities, times of two, or both of one: all calls in one turn."""
    rng = script.rng
    cities = rng.sample(pools.CITIES, rng.choice((2, 2, 2, 3)))
    kind = rng.choice(["weather", "weather", "time", "both"])
    wanted, where = ("weather and the time", cities[0]) if kind == "both" else (kind, joined(cities))
    questions = "what is the {wanted} in {where}|how about the {wanted} in {where}|do you know the {wanted} in {where}"
    commands = (
        "give me the {wanted} in {where}|show me the {wanted} in {where}|check the {wanted} in {where}|"
        "get me the {wanted} in {where}"
    )
    ask(script, questions, commands, wanted=wanted, where=where)
    tools = ["get_weather", "get_time"] if kind == "both" else [f"get_{kind}"] * len(cities)
    if not script.offers(*tools):
        refuse(script, {"weather": "get the weather", "time": "get the time", "both": "do that"}[kind])
        return
    pairs = list(zip(tools, [cities[0]] * 2 if kind == "both" else cities, strict=True))
    reports = [(weather_report if tool == "get_weather" else time_report)(rng, city) for tool, city in pairs]
    calls: list[Call] = [(tool, {"city": city}) for tool, city in pairs]
    think = f"The user wants the {wanted} in {where}. I make {len(calls)} calls."
    script.call(calls, [report[0] for report in reports], think=think)
    script.say(" ".join(report[1] for report in reports), *(fact for report in reports for fact in report[2]))


def parallel_files(script: Script) -> None:
    """Two files read in one turn."""
    rng = script.rng
    paths = [pools.filename(rng), pools.filename(rng)]
    questions = "what is in {paths}|what do {paths} say|what is in the files {paths}"
    ask(
        script,
        questions,
        "read {x}|open {x}|show me {x}|read the files {x}|open the files {x}".replace("{x}", "{paths}"),
        paths=joined(paths),
    )
    if not script.offers("read_file"):
        refuse(script, "read files")
        return
    texts = [file_text(rng) for _ in paths]
    think = f"The user wants to read {joined(paths)}. I make 2 calls."
    script.call([("read_file", {"path": path}) for path in paths], texts, think=think)
    script.say("\n".join(f"{path} says: {text}" for path, text in zip(paths, texts, strict=True)), *texts)


def parallel_mixed(script: Script) -> None:
    """A sum and the weather in one turn."""
    rng = script.rng
    city = rng.choice(pools.CITIES)
    wanted, spoken = expression(rng)
    questions = "what is {x}, and how is the weather in {city}|how much is {x}, and what is the weather in {city}"
    commands = "compute {x}, and give me the weather in {city}|calculate {x}, and check the weather in {city}"
    ask(script, questions, commands, x=spoken, city=city)
    if not script.offers("calculator", "get_weather"):
        refuse(script, "do that")
        return
    (value, printed), (report, answer, facts) = _computed(rng, wanted), weather_report(rng, city)
    calls: list[Call] = [("calculator", {"expression": wanted}), ("get_weather", {"city": city})]
    think = f"The user wants {wanted} and the weather in {city}. I make 2 calls."
    script.call(calls, [printed, report], think=think)
    script.say(f"{wanted} = {value}\n{answer}", value, *facts)


def any_action(script: Script) -> None:
    """A tool that only this client has: its name is in the request's words, its arguments too."""
    rng = script.rng
    own = [name for name, tool in script.tools.items() if tool["function"]["name"] not in pools.CATALOGUE_NAMES]
    if not own:
        verb, noun = rng.choice(pools.VERBS), rng.choice(pools.NOUNS)
        ask(script, f"can we {verb} {noun} {{x}}", f"{verb} {noun} {{x}}|{verb} the {noun} {{x}}", x=pools.number(rng))
        refuse(script, "do that")
        return
    name = rng.choice(own)
    verb, noun = name.split("_")
    properties = script.tools[name]["function"]["parameters"]["properties"]
    arguments: dict[str, object] = {}
    wording = [f"{verb} {noun}", f"{verb} the {noun}"]
    for parameter, kind in properties.items():
        if kind["type"] == "integer":
            arguments[parameter] = pools.number(rng)
            said = f"{{{parameter}}}" if rng.random() < 0.6 else f"number {{{parameter}}}"
        else:
            arguments[parameter] = pools.pick(rng, pools.NAMES, 0.08)
            link = "to" if len(properties) > 1 else rng.choice(["called", "named", "of", "for"])
            said = f"{link} {{{parameter}}}"
        wording = [f"{words} {said}" for words in wording]
    ask(script, "|".join(f"can we {words}" for words in wording), "|".join(wording), **arguments)
    told = " and ".join(f"{parameter} {value}" for parameter, value in arguments.items())
    result = rng.choice(["ok", "done", "success"])
    script.call([(name, dict(arguments))], [result], think=f"I use {name} with {told}.")
    values = [str(value) for value in arguments.values()]
    script.say(f"Done: {verb} {noun} {' '.join(values)}.", *values)


def weather_at_home(script: Script) -> None:
    """The city comes from what the user told earlier."""
    rng = script.rng
    if "city" not in script.memory and rng.random() < 0.85:
        chat_skills.tell(script, "city")
    questions = "what is the weather {x}|how is the weather {x}|is it warm {x}".replace("{x}", "where I live")
    ask(script, questions, "give me the weather at home|check the weather where I live|get the weather in my city")
    if not script.offers("get_weather"):
        refuse(script, "get the weather")
        return
    if "city" not in script.memory:
        script.say(chat_skills.UNKNOWN["city"], "not told", think="The user asks about the city, which was not told.")
        return
    city = script.memory["city"]
    result, answer, facts = weather_report(rng, city)
    think = f"The user lives in {city}. I use get_weather."
    script.call([("get_weather", {"city": city})], [result], think=think)
    script.say(answer, *facts)


def send_message(script: Script) -> None:
    """Tell someone something."""
    rng = script.rng
    name, text = pools.pick(rng, pools.NAMES, 0.06), pools.fact(rng)
    script.user(
        "[|please |can you |could you |now |I want you to ][tell {name} that|send {name} the message|write to {name}:|"
        "message {name}:|let {name} know that|send a message to {name}:|text {name}:] {text}",
        name=name,
        text=text,
    )
    if not script.offers("send_message"):
        refuse(script, "send messages")
        return
    arguments = {"to": name, "text": text}
    think = f"The user has a message for {name}. I use send_message."
    script.call([("send_message", arguments)], [rng.choice(["sent", "ok", "delivered"])], think=think)
    script.say(f"I sent your message to {name}.", name)
