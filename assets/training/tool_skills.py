"""Episodes that call tools, and what is said when the tool is not on offer."""

from __future__ import annotations

import json
import random

from tokenrelay.assets.training import pools
from tokenrelay.assets.training.world import Call, Script

SPOKEN = {"+": ["plus", "added to", "+"], "-": ["minus", "-"], "*": ["times", "multiplied by", "*"], "/": ["divided by", "over", "/"]}  # fmt: skip
ASK = "[|please |can you |could you |hey, |I need to know: |tell me: ]"
DO = "[|please |can you |could you |hey, |now |I want you to |would you ]"
END = "[?|.|, please.|, thanks.| for me.| now.]"


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
        text = f"({first} {rng.choice('+-')} {second}) * {third}"
        return text, text
    count = 2 if kind < 0.75 else 3
    parts, spoken = [str(pools.number(rng))], []
    spoken.append(parts[0])
    words = rng.random() < 0.5
    for _ in range(count - 1):
        sign = rng.choice("+-*/" if count == 2 else "+-*")
        other = str(pools.number(rng, 4 if sign in "+-" else 3))
        parts += [sign, other]
        spoken += [rng.choice(SPOKEN[sign]) if words else sign, other]
    tight = not words and rng.random() < 0.3
    return " ".join(parts), ("" if tight else " ").join(spoken)


def arithmetic(script: Script) -> None:
    """The calculator computes; the model copies the expression there and the value back."""
    rng = script.rng
    if rng.random() < 0.2:
        first, second, food = pools.number(rng, 3), pools.number(rng, 2), rng.choice(["apples", "eggs", "plums", "beans", "nuts", "books", "cups"])
        wanted = f"{first} * {second}"
        script.user(DO + "[|tell me: ][I buy|we buy|she sells|he orders|they need] {first} {food} at {second} euros each. How much is [that|it]?", first=first, second=second, food=food)
    else:
        wanted, spoken = expression(rng)
        script.user(ASK + "[what is|what's|compute|calculate|how much is|work out|evaluate] {spoken}" + END, spoken=spoken)
    if not script.offers("calculator"):
        refuse(script, "calculate")
        return
    result = value_of(wanted)
    script.call([("calculator", {"expression": wanted})], [result], think=f"The user wants {wanted}. I use the calculator.")
    script.say(f"{wanted} = {result}", result)


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
        script.user(DO + "[list the files here|show me the files here|list the current folder|show the current folder]" + END)
    else:
        script.user(
            ASK + "[list the files in|show me the files in|what files are in|what is in the folder|list the folder|which files are in|show the content of the folder|look into the folder] {path}" + END, path=path
        )
    if not script.offers("list_files"):
        refuse(script, "list files")
        return
    names = sorted({pools.filename(rng) for _ in range(rng.randint(1, 4))})
    if rng.random() < 0.08:
        names = []
    script.call([("list_files", {"path": path})], [listing(rng, names) if names else "(empty)"], think=f"The user wants the files in {path}. I use list_files.")
    if names:
        script.say(f"I found {joined(names)}.", *names)
    else:
        script.say(f"The folder {path} is empty.", "empty")


def file_text(rng: random.Random) -> str:
    """The content of a file: one statement."""
    text = pools.fact(rng)
    return text[0].upper() + text[1:] + "."


def read_file(script: Script) -> None:
    """What a file says, or that it is not there."""
    rng = script.rng
    path = pools.filename(rng, pools.folder(rng) if rng.random() < 0.4 else None)
    script.user(ASK + "[read|open|show me|what does|print|what is in|read the file|open the file|show the file] {path}[| say][?|.|, please.|, thanks.| now.]", path=path)
    if not script.offers("read_file"):
        refuse(script, "read files")
        return
    think = f"The user wants to read {path}. I use read_file."
    if rng.random() < 0.1:
        script.call([("read_file", {"path": path})], [rng.choice(["error: file not found", "error: no such file"])], think=think)
        script.say(f"I could not read {path}.", "could not read", path)
        return
    text = file_text(rng)
    script.call([("read_file", {"path": path})], [text], think=think)
    script.say(f"{path} says: {text}", text)


def list_then_read(script: Script) -> None:
    """Two steps: look into a folder, read the file that is there."""
    rng = script.rng
    path, name = pools.folder(rng), pools.filename(rng)
    script.user(DO + "[read the only file in|open the only file in|read the file that is in|show me the one file in|find the file in|read the single file in] {path}" + END, path=path)
    if not script.offers("list_files", "read_file"):
        refuse(script, "do that")
        return
    script.call([("list_files", {"path": path})], [listing(rng, [name])], think=f"I list {path} with list_files, then I read the file.")
    text, full = file_text(rng), f"{path}/{name}"
    script.call([("read_file", {"path": full})], [text])
    script.say(f"{full} says: {text}", text)


def write_file(script: Script) -> None:
    """Put a text into a file."""
    rng = script.rng
    path, text = pools.filename(rng, pools.folder(rng) if rng.random() < 0.3 else None), pools.fact(rng)
    if rng.random() < 0.5:
        script.user(DO + "[write|save|put|store] '{text}' [to|into|in] [|the file ]{path}[|.]", text=text, path=path)
    else:
        script.user(DO + "[write to|save to|put into|create|make] [|the file ]{path}[:| this:| with the text:] {text}", text=text, path=path)
        script.messages[-1]["content"] = script.messages[-1]["content"].rstrip(".?!")
    if not script.offers("write_file"):
        refuse(script, "write files")
        return
    arguments = {"path": path, "content": text}
    script.call([("write_file", arguments)], [rng.choice(["ok", "done", "written"])], think=f"The user wants text in {path}. I use write_file.")
    script.say(f"I wrote it to {path}.", path)


def search(script: Script) -> None:
    """Look a topic up and pass on what was found."""
    rng = script.rng
    topic = rng.choice(pools.TOPICS)
    if rng.random() < 0.1:
        topic = f"{topic} in {rng.choice(pools.CITIES)}"
    script.user(ASK + "[search for|look up|find out about|find information on|search the web for|find something about|google] {topic}" + END, topic=topic)
    if not script.offers("search"):
        refuse(script, "search")
        return
    text = file_text(rng)
    script.call([("search", {"query": topic})], [text], think=f"The user wants to know about {topic}. I use search.")
    script.say(f"I found this about {topic}: {text}", text)


def weather_report(rng: random.Random, city: str) -> tuple[str, str, tuple[str, ...]]:
    """(what the tool says, what is answered, its facts)."""
    sky, degrees = rng.choice(pools.SKIES), rng.randint(-9, 38)
    if rng.random() < 0.5:
        result = json.dumps({"city": city, "sky": sky, "temperature": degrees})
    else:
        result = rng.choice([f"{sky}, {degrees} degrees", f"{sky}, {degrees} C"])
    return result, f"In {city} it is {sky} with {degrees} degrees.", (city, sky, str(degrees))


def time_report(rng: random.Random, city: str) -> tuple[str, str, tuple[str, ...]]:
    """(what the tool says, what is answered, its facts)."""
    clock = pools.clock(rng)
    result = json.dumps({"city": city, "time": clock}) if rng.random() < 0.4 else clock
    return result, f"In {city} it is {clock}.", (city, clock)


def weather(script: Script) -> None:
    """The weather in a city."""
    rng = script.rng
    city = pools.pick(rng, pools.CITIES, 0.06)
    script.user(ASK + "[what is the weather in|how is the weather in|what's the weather like in|the weather in|is it warm in|is it raining in|give me the weather in|what is the temperature in] {city}[| today| right now]" + END, city=city)
    if not script.offers("get_weather"):
        refuse(script, "get the weather")
        return
    result, answer, facts = weather_report(rng, city)
    script.call([("get_weather", {"city": city})], [result], think=f"The user wants the weather in {city}. I use get_weather.")
    script.say(answer, *facts)


def time(script: Script) -> None:
    """The time in a city."""
    rng = script.rng
    city = pools.pick(rng, pools.CITIES, 0.06)
    script.user(ASK + "[what time is it in|what is the time in|how late is it in|the time in|give me the time in|what is the local time in] {city}[| right now]" + END, city=city)
    if not script.offers("get_time"):
        refuse(script, "get the time")
        return
    result, answer, facts = time_report(rng, city)
    script.call([("get_time", {"city": city})], [result], think=f"The user wants the time in {city}. I use get_time.")
    script.say(answer, *facts)


def parallel_city(script: Script) -> None:
    """Weather of two or three cities, times of two, or both of one: all calls in one turn."""
    rng = script.rng
    cities = rng.sample(pools.CITIES, rng.choice((2, 2, 2, 3)))
    kind = rng.choice(["weather", "weather", "time", "both"])
    if kind == "both":
        pairs = [("get_weather", cities[0]), ("get_time", cities[0])]
        script.user(ASK + "[what are|give me|show me|I want|get me] the weather and the time in {city}" + END, city=cities[0])
    else:
        tool = f"get_{kind}"
        pairs = [(tool, city) for city in cities]
        script.user(ASK + "[what is the|give me the|show me the|I want the|compare the] {kind} in {cities}" + END, kind=kind, cities=joined(cities))
    if not script.offers(*(tool for tool, _ in pairs)):
        refuse(script, {"weather": "get the weather", "time": "get the time", "both": "do that"}[kind])
        return
    reports = [(weather_report if tool == "get_weather" else time_report)(rng, city) for tool, city in pairs]
    calls: list[Call] = [(tool, {"city": city}) for tool, city in pairs]
    wanted = "weather and time" if kind == "both" else kind
    where = cities[0] if kind == "both" else joined(cities)
    script.call(calls, [report[0] for report in reports], think=f"The user wants the {wanted} in {where}. I make {len(calls)} calls.")
    script.say(" ".join(report[1] for report in reports), *(fact for report in reports for fact in report[2]))


def parallel_files(script: Script) -> None:
    """Two files read in one turn."""
    rng = script.rng
    paths = [pools.filename(rng), pools.filename(rng)]
    script.user(DO + "[read|open|show me|print|read the files|open the files] {paths}" + END, paths=joined(paths))
    if not script.offers("read_file"):
        refuse(script, "read files")
        return
    texts = [file_text(rng) for _ in paths]
    script.call([("read_file", {"path": path}) for path in paths], texts, think=f"The user wants to read {joined(paths)}. I make 2 calls.")
    script.say("\n".join(f"{path} says: {text}" for path, text in zip(paths, texts, strict=True)), *texts)


def parallel_mixed(script: Script) -> None:
    """A sum and the weather in one turn."""
    rng = script.rng
    city = rng.choice(pools.CITIES)
    wanted, spoken = expression(rng)
    script.user(ASK + "[what is|compute|calculate|how much is] {spoken}, and [what is|how is|give me] the weather in {city}" + END, spoken=spoken, city=city)
    if not script.offers("calculator", "get_weather"):
        refuse(script, "do that")
        return
    result, (report, answer, facts) = value_of(wanted), weather_report(rng, city)
    calls: list[Call] = [("calculator", {"expression": wanted}), ("get_weather", {"city": city})]
    script.call(calls, [result, report], think=f"The user wants {wanted} and the weather in {city}. I make 2 calls.")
    script.say(f"{wanted} = {result}\n{answer}", result, *facts)


def any_action(script: Script) -> None:
    """A tool that only this client has: the name is in the request's words, the argument too."""
    rng = script.rng
    actions = [name for name, tool in script.tools.items() if set(tool["function"]["parameters"]["properties"]) & {"id", "name"}]
    if not actions:
        verb, noun = rng.choice(pools.VERBS), rng.choice(pools.NOUNS)
        script.user(DO + "{verb} [the |]{noun} [number |]{value}" + END, verb=verb, noun=noun, value=pools.number(rng))
        refuse(script, "do that")
        return
    name = rng.choice(actions)
    verb, noun = name.split("_")
    parameter = next(iter(script.tools[name]["function"]["parameters"]["properties"]))
    value: int | str = pools.number(rng) if parameter == "id" else pools.pick(rng, pools.NAMES, 0.08)
    if parameter == "id":
        script.user(DO + "{verb} [the |]{noun} [number |with id |]{value}" + END, verb=verb, noun=noun, value=value)
    else:
        script.user(DO + "{verb} the {noun} [called|named|with the name|of] {value}" + END, verb=verb, noun=noun, value=value)
    script.call([(name, {parameter: value})], [rng.choice(["ok", "done", "success"])], think=f"I use {name} with {parameter} {value}.")
    script.say(f"Done: {verb} {noun} {value}.", f"{verb} {noun} {value}")


def weather_at_home(script: Script) -> None:
    """The city comes from what the user told earlier."""
    if "city" not in script.memory:
        city = script.rng.choice(pools.CITIES)
        script.memory["city"] = city
        script.user("[|by the way, |just so you know, |you know, ][I live in|my home is in|I am from|my city is|I moved to] {value}[.|!|]", value=city)
        script.say(f"{city} is a lovely place to live.", city, think="The user tells me something. I need no tool.")
    city = script.memory["city"]
    script.user(ASK + "[what is the weather|how is the weather|give me the weather] [where I live|at home|in my city]" + END)
    if not script.offers("get_weather"):
        refuse(script, "get the weather")
        return
    result, answer, facts = weather_report(script.rng, city)
    script.call([("get_weather", {"city": city})], [result], think=f"The user lives in {city}. I use get_weather.")
    script.say(answer, *facts)


def send_message(script: Script) -> None:
    """Tell someone something."""
    rng = script.rng
    name, text = pools.pick(rng, pools.NAMES, 0.06), pools.fact(rng)
    script.user(DO + "[tell {name} that|send {name} the message|write to {name}:|message {name}:|let {name} know that|send a message to {name}:|text {name}:] {text}", name=name, text=text)
    script.messages[-1]["content"] = script.messages[-1]["content"].rstrip(".?!")
    if not script.offers("send_message"):
        refuse(script, "send messages")
        return
    arguments = {"to": name, "text": text}
    script.call([("send_message", arguments)], [rng.choice(["sent", "ok", "delivered"])], think=f"The user has a message for {name}. I use send_message.")
    script.say(f"I sent your message to {name}.", name)
