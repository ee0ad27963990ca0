"""`tokenrelay chat`: a terminal chat against a running server, or one of its own. Works piped as well.

On a terminal: streaming, reasoning dimmed, tool calls shown and answered by the user, Ctrl-C stops the generation only.
Piped (or with a message on the command line): the answer alone goes to stdout, everything else to stderr.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console

from tokenrelay.base.errors import ConfigError, TokenRelayError, Unavailable
from tokenrelay.cli import demo_tools
from tokenrelay.cli.client import ApiClient, Delta, join_tool_calls
from tokenrelay.cli.console import bars
from tokenrelay.cli.own import OwnServer

TOOL_ROUNDS_MAX = 16  # tool rounds of one turn: a model that only calls tools must come to an end

HELP = """\
/reset         forget the conversation (the system message stays)
/system TEXT   set the system message and forget the conversation
/help          this list
/quit          leave (Ctrl-D does, too)
Ctrl-C stops a running answer; what it said so far stays in the conversation.
A line that ends in a backslash goes on in the next line."""

_CONTROLS = {
    code: "\N{REPLACEMENT CHARACTER}" for code in (*range(32), 127, *range(128, 160)) if chr(code) not in "\n\t"
}


DEFAULT_URL = "http://127.0.0.1:8000"
BUNDLED_NAME = "tokenrelay-tiny"  # as the bundled model is served


@dataclass(frozen=True)
class ChatRequest:
    """What stood on the command line; None is not given."""

    message: str | None = None
    url: str | None = None
    model: str | None = None
    system: str = ""
    temperature: float | None = None
    tokens_max: int | None = None
    seed: int | None = None
    tools: str | None = None  # a file, "demo" or "none"
    api_key: str = ""


@dataclass(frozen=True)
class ChatOptions:
    """What the user chose; None leaves a sampling parameter to the server."""

    model: str
    system: str = ""
    temperature: float | None = None
    tokens_max: int | None = None
    seed: int | None = None
    tools: tuple[dict[str, Any], ...] = ()
    demo: bool = False  # calls of demo_tools are run here, without asking


@dataclass
class Answer:
    """One reply of the model, as far as it came."""

    content: str = ""
    reasoning: str = ""
    tool_calls: list[dict[str, Any]] = field(default_factory=list)
    finish_reason: str | None = None
    usage: dict[str, Any] = field(default_factory=dict)
    interrupted: bool = False
    seconds: float = 0.0  # from the first token to the last

    def add(self, delta: Delta) -> None:
        """Take in one chunk."""
        self.content += delta.content
        self.reasoning += delta.reasoning
        join_tool_calls(self.tool_calls, delta.tool_calls)
        self.finish_reason = delta.finish_reason or self.finish_reason
        self.usage = delta.usage or self.usage

    def message(self) -> dict[str, Any]:
        """As it goes into the conversation; an interrupted tool call is dropped, since its arguments are not whole."""
        message: dict[str, Any] = {"role": "assistant", "content": self.content}
        if self.tool_calls and not self.interrupted:
            message["tool_calls"] = self.tool_calls
        return message


class Chat:
    """A conversation with one model."""

    def __init__(self, client: ApiClient, options: ChatOptions, screen: Screen) -> None:
        self._client = client
        self._options = options
        self._screen = screen
        self._system = options.system
        self.messages: list[dict[str, Any]] = []
        self.reset()

    def reset(self, system: str | None = None) -> None:
        """Forget the conversation; a new system message replaces the old one."""
        self._system = self._system if system is None else system
        self.messages = [{"role": "system", "content": self._system}] if self._system else []

    def ask(self, text: str) -> Answer:
        """One turn of the user: answers, and tool rounds between them as long as the user gives results."""
        self.messages.append({"role": "user", "content": text})
        for _ in range(TOOL_ROUNDS_MAX):
            answer = self._generate()
            if answer.content or answer.tool_calls or not answer.interrupted:
                self.messages.append(answer.message())
            if not answer.tool_calls or answer.interrupted or not self._run_tools(answer):
                break
        return answer

    def _generate(self) -> Answer:
        body: dict[str, Any] = {"model": self._options.model, "messages": self.messages}
        for name in ("temperature", "seed"):
            if getattr(self._options, name) is not None:
                body[name] = getattr(self._options, name)
        if self._options.tokens_max is not None:
            body["max_completion_tokens"] = self._options.tokens_max
        if self._options.tools:
            body["tools"] = list(self._options.tools)
        answer = Answer()
        first_s = last_s = time.monotonic()
        stream = self._client.stream_chat(body)
        try:
            for delta in stream:
                last_s = time.monotonic()
                if not answer.content and not answer.reasoning and not answer.tool_calls:
                    first_s = last_s
                answer.add(delta)
                self._screen.delta(delta)
        except KeyboardInterrupt:
            answer.interrupted = True
        finally:
            stream.close()  # type: ignore[attr-defined]  # a generator: closing it closes the connection
            answer.seconds = last_s - first_s
        self._screen.end(answer)
        return answer

    def _run_tools(self, answer: Answer) -> bool:
        """Run each call, or ask for its result. False: the user gives none, so the turn ends; the calls are dropped."""
        results = []
        for call in answer.tool_calls:
            function = call["function"]
            if self._options.demo and function["name"] in demo_tools.NAMES:
                result: str | None = demo_tools.run(function["name"], function["arguments"])
                self._screen.say(f"← {result}")
            else:
                result = self._screen.tool_result(call)
            if result is None:
                del self.messages[-1]["tool_calls"]
                return False
            results.append({"role": "tool", "tool_call_id": call["id"], "content": result})
        self.messages += results
        return True


class Screen:
    """Where a chat shows up: a terminal with colours, or plain stdout for the answer and nothing else."""

    def __init__(self, out: TextIO, *, terminal: bool) -> None:
        self._terminal = terminal
        self._out = out
        self._console = Console(file=out, highlight=False, soft_wrap=True) if terminal else None
        self._last = ""  # what kind of text was shown last
        self._at_line_start = True

    def say(self, text: str, *, style: str = "dim") -> None:
        """A remark of the program itself; not part of any answer. What an answer left unfinished ends here."""
        self._newline()
        if self._console is not None:
            self._console.print(clean(text), style=style, markup=False)

    def delta(self, delta: Delta) -> None:
        """Show one chunk at once."""
        if delta.reasoning and self._terminal:
            self._show("reasoning", delta.reasoning, "dim italic")
        if delta.content:
            self._show("content", delta.content, None)

    def end(self, answer: Answer) -> None:
        """The answer is over: its tool calls, and a line of figures."""
        self._newline()
        self._last = ""
        for call in answer.tool_calls:
            line = f"{call['function']['name']}({call['function']['arguments']})"
            if self._console is not None:
                self._console.print(f"→ {clean(line)}", style="cyan", markup=False)
            else:
                self._out.write(f"{clean(line)}\n")
        self._out.flush()
        if answer.interrupted:
            self.say("(stopped)")
        elif answer.usage:
            self.say(figures(answer))

    def tool_result(self, call: dict[str, Any]) -> str | None:
        """Ask the user what the tool answers; None: nothing."""
        if not self._terminal:
            return None
        try:
            result = input(f"  result of {clean(call['function']['name'])} (empty: none) = ")
        except (EOFError, KeyboardInterrupt):
            print()
            return None
        return result or None

    def _show(self, kind: str, text: str, style: str | None) -> None:
        if self._last not in ("", kind):
            self._newline()
        self._last = kind
        text = clean(text)
        if self._console is not None and style is not None:
            self._console.out(text, style=style, end="", highlight=False)
        else:
            self._out.write(text)
        self._out.flush()
        self._at_line_start = text.endswith("\n")

    def _newline(self) -> None:
        if not self._at_line_start:
            self._out.write("\n")
            self._at_line_start = True


def clean(text: str) -> str:
    """Without control characters: a model's text must not steer the terminal."""
    return text.translate(_CONTROLS)


def figures(answer: Answer) -> str:
    """One line about an answer, for example `41 tokens, 95 per second; 64 of 80 prompt tokens from the cache`."""
    usage = answer.usage
    tokens = int(usage.get("completion_tokens", 0))
    speed = f", {(tokens - 1) / answer.seconds:.0f} per second" if tokens > 1 and answer.seconds > 0 else ""
    cached = int((usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0)
    prompt = int(usage.get("prompt_tokens", 0))
    why = " (cut at the token limit)" if answer.finish_reason == "length" else ""
    return f"{tokens} tokens{speed}; {cached} of {prompt} prompt tokens from the cache{why}"


def read_tools(path: Path) -> tuple[dict[str, Any], ...]:
    """Tools from a JSON file: a list in OpenAI's shape, {"type": "function", "function": {...}}, or of functions."""
    try:
        tools = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read the tools file {path}: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise ConfigError(f"{path} must hold a JSON list of tools")
    return tuple(tool if "function" in tool else {"type": "function", "function": tool} for tool in tools)


def wants_demo(wanted: str | None, model: str, *, local: bool) -> bool:
    """Whether the demo tools are offered: when asked for, and unasked to the bundled model, made to show tool calls.

    Unasked from a local server only, since what the tools read here goes to the server.
    """
    return wanted == "demo" or (wanted is None and local and model == BUNDLED_NAME)


def converse(chat: Chat, screen: Screen) -> None:
    """The loop on a terminal, until /quit or Ctrl-D."""
    import readline  # noqa: F401  line editing and history for input()

    while True:
        try:
            text = read_message()
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print()
            screen.say("(/quit or Ctrl-D leaves)")
            continue
        if text.startswith("/"):
            if not _command(chat, screen, text):
                return
        elif text.strip():
            before = len(chat.messages)
            try:
                chat.ask(text)
            except TokenRelayError as error:
                del chat.messages[before:]  # the failed turn leaves no trace
                screen.say(f"error: {error.message}", style="red")


def read_message() -> str:
    """One message from the terminal. Raises EOFError at its end."""
    lines = [input("› ")]
    while lines[-1].endswith("\\"):
        lines[-1] = lines[-1][:-1]
        lines.append(input("… "))
    return "\n".join(lines)


def _command(chat: Chat, screen: Screen, text: str) -> bool:
    """Run a /command; False: leave."""
    verb, _, argument = text.partition(" ")
    if verb in ("/quit", "/exit"):
        return False
    if verb == "/reset":
        chat.reset()
        screen.say("(a new conversation)")
    elif verb == "/system":
        chat.reset(argument.strip())
        screen.say("(a new conversation with this system message)" if argument.strip() else "(no system message)")
    else:
        screen.say(HELP if verb == "/help" else f"no command {clean(verb)}\n{HELP}")
    return True


def run_chat(request: ChatRequest) -> None:
    """Chat with the server that the request means, or with an own one. Raises TokenRelayError."""
    tools = () if request.tools is None or request.tools in ("demo", "none") else read_tools(Path(request.tools))
    with contextlib.ExitStack() as stack:
        client, model = _find_server(request, stack)
        demo = wants_demo(request.tools, model, local=request.url is None)
        options = ChatOptions(
            model=model,
            system=request.system,
            temperature=request.temperature,
            tokens_max=request.tokens_max,
            seed=request.seed,
            tools=demo_tools.TOOLS if demo else tools,
            demo=demo,
        )
        talk(client, options, request.message)


def talk(client: ApiClient, options: ChatOptions, message: str | None) -> None:
    """Chat on the terminal, or answer one message (given, or read from a pipe). Raises TokenRelayError."""
    interactive = message is None and sys.stdin.isatty()
    screen = Screen(sys.stdout, terminal=interactive and sys.stdout.isatty())
    chat = Chat(client, options, screen)
    if interactive:
        screen.say(f"{options.model} at {client.url}. /help lists the commands, Ctrl-D leaves.")
        if options.demo:
            screen.say(
                f"It may use {', '.join(demo_tools.NAMES)} (in this folder, read only); --tools none forbids it."
            )
        converse(chat, screen)
        return
    text = sys.stdin.read() if message is None else message
    if not text.strip():
        raise ConfigError("there is no message: type one, pipe one in, or give one on the command line")
    answer = chat.ask(text.removesuffix("\n"))
    if answer.interrupted:
        raise KeyboardInterrupt


def _find_server(request: ChatRequest, stack: contextlib.ExitStack) -> tuple[ApiClient, str]:
    """A client and the model's name: the server named, else the usual one if it answers, else one started here."""
    own_model = request.url is None and request.model is not None and Path(request.model).is_dir()
    if not own_model:
        client = ApiClient(request.url or DEFAULT_URL, api_key=request.api_key)
        try:
            models = client.models()
        except Unavailable:
            if request.url is not None:
                raise
        else:
            if not models:
                raise Unavailable(f"the server at {client.url} serves no model yet")
            return client, request.model or models[0]
    if request.model is not None and not own_model:
        raise ConfigError(f"no server answers at {DEFAULT_URL}, and {request.model} is no model folder to serve")
    server = _start_own(request.model, stack)
    client = ApiClient(server.url)
    return client, client.models()[0]


def _start_own(model: str | None, stack: contextlib.ExitStack) -> OwnServer:
    """Start a server for this chat; a bar on a terminal while it loads."""
    arguments = ([] if model is None else [model]) + ["--log-level", "error"]
    with bars(Console(stderr=True)) as progress:
        task = progress.add_task("starting a server", total=None)

        def on_progress(what: str, done: int, total: int) -> None:
            progress.update(task, description=f"loading {what}", completed=done, total=total)

        return stack.enter_context(OwnServer(arguments, on_progress=on_progress, quiet=True))
