"""Settings of a worker process, the table `[worker]`: the model, its memory, the bounds of its steps.

They stand with the decode role because a worker that decodes is one that holds sequences; no heavy import here.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tokenrelay.base.config import setting
from tokenrelay.base.errors import ConfigError

KERNELS_FILE = Path("~/.cache/tokenrelay/kernels.json").expanduser()
BLOCK_TOKENS = (16, 32, 64, 128)
DRAFT_WIDTHS = {"ngram": 8, "mtp": 3}  # where nobody says how many
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


@dataclass(frozen=True, kw_only=True)
class WorkerConfig:
    """One worker (`TOKENRELAY_WORKER_…`)."""

    model: str = setting("", "model folder in Hugging Face's format; empty: the bundled one")
    socket: str = setting("", "path of the Unix socket to serve on")
    served_model_name: str = setting("", "what clients call the model; empty: the folder's name")
    dtype: Literal["auto", "float32", "bfloat16"] = setting(
        "auto", "of weights and KV; auto: bfloat16 where the machine computes in it, else float32"
    )
    weight_dtype: Literal["auto", "fp8", "int8", "int4", "int4-32", "int4-128"] = setting(
        "auto",
        "int8, or int4 in groups of 64 (32, 128): matrices are quantized at load; fp8: those of a float8 checkpoint "
        "stay as they are; auto: they are as dtype says",
    )
    kv_dtype: Literal["auto", "fp8"] = setting(
        "auto", "of the KV caches; fp8: float8 with factors, for more context in the same memory; auto: as dtype says"
    )
    deterministic: bool = setting(
        False,
        "equal bits whatever the batch, chunks, cached prefix or worker; models without latent attention are anyway",
    )
    kernels_file: str = setting(
        "", "choices of `tokenrelay kernels tune`; empty: ~/.cache/tokenrelay/kernels.json where it is; none: no file"
    )
    tp: int = setting(1, "rank processes that heads and features are cut over (CPU)", minimum=1, maximum=64)
    ep: int = setting(1, "rank processes that whole experts are dealt out to (CPU)", minimum=1, maximum=64)
    dp: int = setting(
        1, "rank processes that sequences, their KV and experts are dealt out to (CPU)", minimum=1, maximum=64
    )
    cp: int = setting(1, "rank processes that a prompt's tokens are cut over (CPU)", minimum=1, maximum=64)
    pp: int = setting(1, "rank processes that layers are dealt out to, in stages (CPU)", minimum=1, maximum=64)
    experts: str = setting(
        "",
        "by comma, send: tokens go to their experts' ranks; whole: uncut over tp too; cut: cut over dp too; spare:N: N "
        "places more on each rank, for replicas of busy experts",
    )
    replace_steps: int = setting(3000, "steps between re-placements of experts by load (experts: spare:N)", minimum=1)
    rendezvous: str = setting("", "host:port of this host where ranks of other hosts come; empty: all ranks are here")
    local_ranks: int = setting(
        1, "with worker.rendezvous: ranks on this host, itself among them", minimum=1, maximum=64
    )
    rendezvous_key: str = setting("", "what ranks of other hosts must know (TOKENRELAY_RENDEZVOUS_KEY there)")
    device: Literal["auto", "cpu", "cuda"] = setting("auto", "where the model runs; auto: a GPU if there is one")
    context_tokens: int | None = setting(
        None,
        "prompt and output of one sequence, at most; default: the model's, as far as the pool holds it",
        minimum=16,
    )
    block_tokens: int = setting(64, "tokens per KV block: 16, 32, 64 or 128; one value in a fleet")
    kv_memory: str | None = setting(None, "memory of the KV pool, such as 4GiB; default: a quarter of what is free")
    kv_sharers: int = setting(1, "workers on this machine between which that default is divided", minimum=1)
    blocks: int | None = setting(None, "KV pool in blocks, instead of kv_memory", minimum=2)
    eviction: Literal["reuse", "lru"] = setting(
        "reuse",
        "which cached block goes when room is needed: the least likely to come back, or the least recently used",
    )
    host_cache_gib: float = setting(
        0.0,
        "host memory (GiB) to which KV blocks are written back, for a GPU worker; 0: none",
        minimum=0,
        maximum=65_536,
    )
    slots: int = setting(64, "sequences resident at once; others wait", minimum=1, maximum=4096)
    step_tokens: int = setting(2048, "tokens of one step, all sequences together", minimum=1, maximum=1 << 20)
    chunk_tokens: int = setting(512, "prompt tokens of one sequence in one step", minimum=1, maximum=1 << 20)
    waiting_max: int = setting(1024, "sequences that may wait; one more is refused", minimum=1, maximum=1 << 20)
    tps_floor: float = setting(
        70.0,
        "tokens per second that every running answer keeps: prompts and new requests wait rather than break it; 0: off",
        minimum=0,
        maximum=100_000,
    )
    tps_fraction: float = setting(
        0.5, "of what one answer alone runs at here: the floor in force is no higher", minimum=0.05, maximum=1
    )
    floor_wait_s: float = setting(
        10.0, "seconds a request waits for the floor's sake, at most; 0: as long as it takes", minimum=0, maximum=86_400
    )
    drafts: Literal["auto", "ngram", "mtp", "off"] = setting(
        "auto",
        "who guesses tokens ahead: ngram, the answer's own text; mtp, the checkpoint's multi-token prediction layer; "
        "auto, with --draft-tokens: mtp on a GPU where there is one, else ngram. Workers that hand over to each other "
        "need the same",
    )
    draft_tokens: int = setting(
        0,
        "tokens guessed ahead and checked in one step, at most, where that pays; 0: none, or with drafts = ngram 8 and "
        "with mtp 3",
        minimum=0,
        maximum=15,
    )
    threads: int | None = setting(
        None, "CPU threads of a step; default: one per core, or one alone for a small model", minimum=1
    )
    claim_deadline_s: float = setting(600.0, "seconds a KV handle may wait for its first token", minimum=1)
    drain_s: float = setting(120.0, "seconds that running requests get after the first SIGTERM", minimum=0)
    log_level: Literal["debug", "info", "warning", "error"] = setting("info", "least severe level that is logged")

    def check(self) -> None:
        """What bounds of single fields cannot say. Raises ConfigError."""
        if self.block_tokens not in BLOCK_TOKENS:
            raise ConfigError(f"worker.block_tokens is {self.block_tokens}, expected one of {BLOCK_TOKENS}")
        if self.blocks is not None and self.kv_memory is not None:
            raise ConfigError("worker.blocks and worker.kv_memory both size the KV pool: give one of them")

        if self.ranks > 1 and self.weight_dtype != "auto":
            raise ConfigError(f"worker.weight_dtype {self.weight_dtype} is for one rank; this worker has {self.ranks}")
        if self.ranks > 1 and self.kv_dtype != "auto":
            raise ConfigError(f"worker.kv_dtype {self.kv_dtype} is for one rank; this worker has {self.ranks}")
        if self.deterministic and "spare" in self.experts:
            raise ConfigError("worker.deterministic and experts spare:N exclude each other: replicas take turns")
        if self.ranks > 1 and self.prediction == "on":
            raise ConfigError(f"worker.drafts mtp is for one rank; this worker has {self.ranks}: use ngram")
        if self.ranks > 1 and self.host_cache_gib:
            raise ConfigError(f"worker.host_cache_gib is for one rank; this worker has {self.ranks}")

    @property
    def draft_width(self) -> int:
        """Tokens of one draft, at most; 0: nobody drafts."""
        return 0 if self.drafts == "off" else self.draft_tokens or DRAFT_WIDTHS.get(self.drafts, 0)

    @property
    def prediction(self) -> Literal["off", "auto", "on"]:
        """Whether the prediction layer is loaded."""
        if self.draft_width == 0 or self.drafts == "ngram":
            return "off"
        return "on" if self.drafts == "mtp" else "auto"

    @property
    def ranks(self) -> int:
        """Rank processes of this worker, itself among them."""
        return self.tp * self.ep * self.dp * self.cp * self.pp

    @property
    def kv_memory_bytes(self) -> int | None:
        """`kv_memory` in bytes. Raises ConfigError."""
        return None if self.kv_memory is None else parse_bytes(self.kv_memory, "worker.kv_memory")


def parse_bytes(text: str, where: str) -> int:
    """`4GiB`, `512 MB`, `1.5g`, `1048576` -> bytes. Raises ConfigError that names `where`."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]i?|)b?\s*", text.lower())
    if match is None:
        raise ConfigError(f"{where} is {text!r}, expected a size such as 4GiB")
    return int(float(match[1]) * _UNITS[match[2]])
