"""A worker without a model: the real gRPC service, canned tokens. For the router's tests and its benchmark.

worker = MockWorker("unix:/tmp/w.sock", folder)      # folder: write_model_folder(path), or any with tokenizer files
worker.answer = lambda submit: Script(worker.ids("Hello"))
await worker.start()
worker.submits                                       # everything that was asked, in order
await worker.stop()

python tests/support/mock_worker.py --socket /tmp/w.sock --model DIR --tokens 128 --step-ms 2     # as a process
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import uvloop
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from tokenrelay.base.ids import incarnation
from tokenrelay.proto import worker_pb2
from tokenrelay.services.chassis.server import WorkerServer
from tokenrelay.services.chassis.session import WorkerServicer

BLOCKS = 1024
BLOCK_TOKENS = 64
CONTEXT_TOKENS = 4096

CHAT_TEMPLATE = """\
{%- if tools %}
{{- '<|im_start|>system\\n# Tools\\n' }}
{%- for tool in tools %}{{- tool | tojson }}{{- '\\n' }}{%- endfor %}
{{- '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\\n' }}
{%- if message.reasoning_content %}{{- '<think>\\n' + message.reasoning_content + '\\n</think>\\n' }}{%- endif %}
{{- message.content }}
{%- for call in message.tool_calls or [] %}
{{- '\\n<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' }}
{{- call.function.arguments | tojson }}{{- '}\\n</tool_call>' }}
{%- endfor %}
{{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
{%- if enable_thinking is defined and enable_thinking %}{{- '<think>\\n' }}{%- endif %}
"""
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TAGS = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
_CORPUS = (
    "The quick brown fox jumps over the lazy dog, and reads the file notes.txt. What is 12 + 30? It is 42.",
    '{"name": "read_file", "arguments": {"path": "notes.txt", "line": 3}} system user assistant tool',
    "Größe, naïve, 東京, Здравствуйте, 👋🏽 and other characters of many bytes.",
)


def tiny_tokenizer(*, special_tags: bool = False) -> Tokenizer:
    """A byte-level BPE of a few hundred tokens with ChatML's special tokens, the same one every time.

    `special_tags`: the tags are special tokens, too, as in some models' tokenizers.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(_CORPUS * 4, trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    tokenizer.add_tokens([AddedToken(token, special=special_tags, normalized=False) for token in TAGS])
    return tokenizer


def write_model_folder(
    folder: Path, *, chat_template: str | None = CHAT_TEMPLATE, special_tags: bool = False, **generation: object
) -> Path:
    """The files that a router reads of a model; `generation` goes to generation_config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    tiny_tokenizer(special_tags=special_tags).save(str(folder / "tokenizer.json"))
    config = {"eos_token": "<|im_end|>", "tokenizer_class": "PreTrainedTokenizerFast"}
    if chat_template is not None:
        config["chat_template"] = chat_template
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    if generation:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder


@dataclass
class Script:
    """What a sequence does: its tokens, `per_step` each step, then `finish`. FINISH_NONE: it hangs until it is
    aborted.
    """

    token_ids: Sequence[int]
    finish: int = worker_pb2.FINISH_STOP
    per_step: int = 1
    refuse: int = worker_pb2.REJECT_NONE
    error: str = ""
    cached_tokens: int = 0


@dataclass
class _Sequence:
    submit: worker_pb2.Submit
    script: Script
    sent: int = 0
    waiting_steps: int = 0


@dataclass
class MockHost:
    """The host behind the session: a step loop that reads scripts."""

    reply: worker_pb2.HandshakeReply
    answer: Callable[[worker_pb2.Submit], Script]
    step_s: float = 0.0
    submits: list[worker_pb2.Submit] = field(default_factory=list)
    aborted: list[int] = field(default_factory=list)  # ids of aborted submits, as the host knows them
    keep_submits: bool = True

    def __post_init__(self) -> None:
        self.running: dict[int, _Sequence] = {}
        self.texts: dict[int, bytes] = {}  # of every sequence so far, if it says that it takes next turns
        self.servicer: WorkerServicer | None = None
        self._work = asyncio.Event()
        self._stats = worker_pb2.Stats(blocks_free=BLOCKS)

    def handshake(self) -> worker_pb2.HandshakeReply:
        return self.reply

    def submit(self, sequence_id: int, submit: worker_pb2.Submit) -> worker_pb2.SequenceOutput | None:
        if self.keep_submits:
            self.submits.append(submit)
        if submit.parent_tokens and len(self.texts.get(submit.parent, b"")) < 4 * submit.parent_tokens:
            return worker_pb2.SequenceOutput(
                finish=worker_pb2.FINISH_REJECTED, reject_reason=worker_pb2.REJECT_PARENT_UNKNOWN
            )
        if self.reply.next_turns:
            self.texts[sequence_id] = self.whole(submit)
        script = self.answer(submit)
        if script.refuse:
            return worker_pb2.SequenceOutput(
                finish=worker_pb2.FINISH_REJECTED, reject_reason=script.refuse, error=script.error
            )
        self.running[sequence_id] = _Sequence(submit, script)
        self._stats.prompt_tokens += len(submit.token_ids) // 4
        self._stats.cached_tokens += script.cached_tokens
        self._work.set()
        return None

    def whole(self, submit: worker_pb2.Submit) -> bytes:
        """All token ids of a submission, those of its parent included."""
        return self.texts.get(submit.parent, b"")[: 4 * submit.parent_tokens] + submit.token_ids

    def abort(self, sequence_id: int) -> None:
        if self.running.pop(sequence_id, None) is not None:
            self.aborted.append(sequence_id)
            self._stats.aborts += 1
            output = worker_pb2.SequenceOutput(id=sequence_id, finish=worker_pb2.FINISH_ABORT)
            if self.servicer is not None:
                self.servicer.deliver([output], self.stats())

    def stats(self) -> worker_pb2.Stats:
        active = min(BLOCKS, len(self.running))
        self._stats.blocks_active, self._stats.blocks_free = active, BLOCKS - active
        self._stats.sequences_running = len(self.running)
        return self._stats

    async def run(self) -> None:
        """Steps while there is work."""
        while True:
            await self._work.wait()
            outputs = [output for output in map(self._step, list(self.running.items())) if output is not None]
            if outputs and self.servicer is not None:
                self._stats.steps += 1
                self.servicer.deliver(outputs, self.stats())
            hanging = all(one.sent >= len(one.script.token_ids) for one in self.running.values())
            if not self.running or (hanging and not outputs):
                self._work.clear()
            await asyncio.sleep(self.step_s)

    def _step(self, item: tuple[int, _Sequence]) -> worker_pb2.SequenceOutput | None:
        sequence_id, sequence = item
        submit, script, start = sequence.submit, sequence.script, sequence.sent
        sampling = submit.sampling
        stop_ids = set(sampling.stop_token_ids)
        if not sampling.ignore_eos:
            stop_ids.update(self.reply.eos_token_ids)
        output = worker_pb2.SequenceOutput(id=sequence_id)
        known = submit.parent_tokens + len(submit.token_ids) // 4
        room = submit.tokens_max - (known - submit.output_start)  # less what others emitted
        end = min(start + script.per_step, len(script.token_ids), room)
        token_ids = list(script.token_ids[start:end])
        finish = worker_pb2.FINISH_NONE
        for index, token_id in enumerate(token_ids):
            if token_id in stop_ids:
                token_ids, finish = token_ids[: index + 1], worker_pb2.FINISH_STOP
                break
        sequence.sent += len(token_ids)
        if finish == worker_pb2.FINISH_NONE:
            if sequence.sent == room:
                finish = worker_pb2.FINISH_LENGTH
            elif sequence.sent == len(script.token_ids):
                finish = script.finish
        if not token_ids and not finish:
            return None
        self._fill(output, sequence, token_ids, start, finish)
        if finish:
            del self.running[sequence_id]
        return output

    def _fill(
        self, output: worker_pb2.SequenceOutput, sequence: _Sequence, token_ids: list[int], start: int, finish: int
    ) -> None:
        output.token_ids = b"".join(token_id.to_bytes(4, "little") for token_id in token_ids)
        if self.reply.next_turns:
            self.texts[output.id] += output.token_ids
        output.finish = finish
        output.error = sequence.script.error if finish == worker_pb2.FINISH_ERROR else ""
        output.cached_tokens = sequence.script.cached_tokens if start == 0 else 0
        wanted = sequence.submit.sampling.logprobs
        if wanted:
            for token_id in token_ids:
                top = [(token_id + k) % self.reply.vocab_size for k in range(wanted - 1)]
                output.logprobs.add(
                    logprob=-0.5,
                    top_token_ids=top,
                    top_logprobs=[-0.5 - k if k < 3 else float("-inf") for k in range(wanted - 1)],
                )
        self._stats.output_tokens += len(token_ids)


class MockWorker:
    """The host, served."""

    def __init__(self, address: str, folder: Path, *, step_s: float = 0.0, model_name: str = "mock") -> None:
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.eos = self.tokenizer.token_to_id("<|im_end|>")
        reply = worker_pb2.HandshakeReply(
            incarnation=incarnation(),
            role="colocated",
            model_name=model_name,
            model_path=str(folder),
            model_identity=b"0123456789abcdef",
            context_tokens=CONTEXT_TOKENS,
            block_tokens=BLOCK_TOKENS,
            blocks=BLOCKS,
            slots=256,
            waiting_max=1024,
            vocab_size=self.tokenizer.get_vocab_size(),
            eos_token_ids=[self.eos],
            grammars=True,
        )
        self.address = address
        self.host = MockHost(reply, lambda submit: Script([*self.ids("Hello world!"), self.eos]), step_s)
        self._server: WorkerServer | None = None
        self._loop: asyncio.Task[None] | None = None

    def ids(self, text: str) -> list[int]:
        """Token ids of a text, its tags and special tokens included."""
        return list(self.tokenizer.encode(text, add_special_tokens=False).ids)

    def say(self, text: str, **script: object) -> None:
        """Every sequence from now on answers this, and ends as a model would."""
        token_ids = [*self.ids(text), self.eos]
        self.host.answer = lambda submit: Script(token_ids, **script)  # type: ignore[arg-type]

    @property
    def submits(self) -> list[worker_pb2.Submit]:
        """What was asked so far."""
        return self.host.submits

    @property
    def running(self) -> int:
        """Sequences that have not ended."""
        return len(self.host.running)

    async def start(self) -> None:
        """Serve, from now on as another incarnation."""
        self.host.reply.incarnation = incarnation()
        servicer = WorkerServicer(self.host)
        self.host.servicer = servicer
        self._server = WorkerServer(servicer, self.address)
        await self._server.start()
        self._loop = asyncio.create_task(self.host.run())

    async def stop(self) -> None:
        """Die: whatever is open is lost."""
        if self._loop is not None:
            self._loop.cancel()
        if self._server is not None:
            await self._server.stop(0)
        self.host.servicer = None
        self.host.running.clear()


def synthetic_ids(tokenizer: Tokenizer, count: int) -> list[int]:
    """Tokens whose text is plain words, for load."""
    words = tokenizer.encode("The quick brown fox jumps over the lazy dog, and reads the file. ").ids
    return random.Random(0).choices(words, k=count)


async def main() -> None:
    """Serve until killed."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--socket", required=True)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--step-ms", type=float, default=0.0)
    parser.add_argument("--per-step", type=int, default=1, help="tokens of a sequence in one step")
    parser.add_argument("--context-tokens", type=int, default=CONTEXT_TOKENS)
    options = parser.parse_args()
    worker = MockWorker(f"unix:{options.socket}", options.model, step_s=options.step_ms / 1000)
    worker.host.reply.context_tokens = options.context_tokens
    token_ids = synthetic_ids(worker.tokenizer, options.tokens)
    worker.host.keep_submits = False
    script = Script(token_ids, finish=worker_pb2.FINISH_LENGTH, per_step=options.per_step)
    worker.host.answer = lambda submit: script
    await worker.start()
    print("ready", flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    uvloop.run(main())
