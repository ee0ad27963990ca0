"""The ranks of one worker: this process is rank 0 and leads, the others are children that follow.

    ranks = Ranks(4, on_death=engine_dies)                       # starts three processes, kept until `close`
    model = ranks.load(folder, Mesh(tp=4), dtype=torch.float32)  # the executor's `model`
    ranks.allocate(blocks)

The leader schedules. Followers get each step's plan through a pipe and answer nothing: the program's collectives are
what ranks wait for each other in, with a deadline. A rank that dies is waited for by a thread of its own; a
rank that hangs makes the collective time out. Either way the whole group is torn down and every later step is refused:
half a group computes nothing.
"""

from __future__ import annotations

import json
import os
import select
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor

from tokenrelay.base.errors import PlacementError, TokenRelayError, Unavailable
from tokenrelay.base.logging import get_logger
from tokenrelay.kernels.batch import AttentionBatch
from tokenrelay.runtime.layers.moe import ExpertSplit
from tokenrelay.runtime.models.decoder import Model
from tokenrelay.runtime.placement import STAGES, Mesh
from tokenrelay.runtime.spmd import frames
from tokenrelay.runtime.spmd.balance import Replaced
from tokenrelay.runtime.spmd.comm import HOST, LOAD_MAX_S
from tokenrelay.runtime.spmd.followers import JOIN_MAX_S, Child, Follower, Rendezvous
from tokenrelay.runtime.spmd.load import code_identity, kernel_choices, load_shard, meet
from tokenrelay.runtime.spmd.micro import MICRO_TOKENS_MIN
from tokenrelay.runtime.spmd.mirror import Unseen
from tokenrelay.runtime.spmd.rank_model import RankModel

STEP_MAX_S = 60.0  # a collective that takes longer means that a rank hangs
RANKS_MAX = 64
REPLACE_STEPS = 3000  # vLLM's default too: some minutes of decoding, and reading a few experts is soon repaid
REPLY_BYTES_MAX = 1 << 16

log = get_logger("ranks")


class Ranks:
    """A group of rank processes, on this machine or on several. One thread may use it at a time."""

    def __init__(
        self,
        count: int,
        *,
        step_max_s: float = STEP_MAX_S,
        threads: int = 1,
        on_death: Callable[[BaseException], None] | None = None,
        rendezvous: Rendezvous | None = None,
        local: int | None = None,
        join_max_s: float = JOIN_MAX_S,
    ) -> None:
        """`local` of the ranks, this one among them, are processes of this machine; the others come to `rendezvous`.

        Raises PlacementError, and Unavailable when one does not come in time.
        """
        if not 1 <= count <= RANKS_MAX:
            raise PlacementError(f"{count} ranks; a worker has 1 to {RANKS_MAX}")
        self.count = count
        self._step_max_s = step_max_s
        self.on_death = on_death  # called once, from any thread
        self._lock = threading.Lock()
        self._dead: TokenRelayError | None = None
        self._closing = False
        self._loads = 0
        self._store = dist.TCPStore(HOST, 0, None, True, wait_for_workers=False)  # type: ignore[attr-defined]
        self._rendezvous = rendezvous
        self._host = rendezvous.host if rendezvous is not None else HOST
        here = count if rendezvous is None or local is None else local
        self._followers: list[Follower] = [Child(rank, self._command(rank, threads)) for rank in range(1, here)]
        if rendezvous is not None:
            welcome = {"port": self._store.port, "step_max_s": step_max_s, "threads": threads}
            try:
                self._followers += rendezvous.meet(set(range(here, count)), welcome, join_max_s)
            except BaseException:
                self._watchers: list[threading.Thread] = []
                self.close()
                raise
        self._watchers = [
            threading.Thread(target=self._watch, args=(follower,), name=f"rank {follower.rank}", daemon=True)
            for follower in self._followers
        ]
        for watcher in self._watchers:
            watcher.start()

    def _command(self, rank: int, threads: int) -> list[str]:
        command = [sys.executable, "-Pm", "tokenrelay.runtime.spmd.follower", str(rank), str(self._store.port)]
        return [*command, str(self._step_max_s), str(threads), self._host]

    def load(
        self,
        folder: Path,
        mesh: Mesh,
        *,
        dtype: torch.dtype | None = None,
        progress: Any = None,
        experts: ExpertSplit | None = None,
        shared: bool = False,
        device: str = "cpu",
        **options: Any,
    ) -> LeadingModel:
        """Load `folder` on the first `mesh.ranks` ranks. Raises CheckpointError, PlacementError, Unavailable.

        `shared`: the pool that the leader is given is as one rank would have it, for peers of any width (`mirror.py`).
        """
        if device == "cuda":
            refuse_devices(len(self.pids) + 1, shared=shared or bool(experts and experts.spare))
        if mesh.ranks > self.count:
            raise PlacementError(f"{mesh!r} has {mesh.ranks} ranks, and {self.count} were started")
        self._check()
        self._loads += 1
        order: dict[str, Any] = {
            "folder": str(folder),
            "mesh": mesh.sizes,
            "dtype": str(dtype or "").removeprefix("torch."),
        }
        order |= {
            "name": f"load{self._loads}",
            "code": code_identity(),
            "shared": shared,
            "device": device,
            "options": options,
            "experts": asdict(experts or ExpertSplit()),
            "micro_tokens_min": MICRO_TOKENS_MIN,
            "kernels": kernel_choices(),
        }
        followers = self._followers[: mesh.ranks - 1]
        try:
            self._send(followers, frames.LOAD, frames.pack_json(order))
            shard = load_shard(order, 0, **({"progress": progress} if progress else {}))
            for follower in followers:
                reply = self._reply(follower)
                if reply.get("identity") != shard[0].config.identity.hex():
                    said = reply.get("error") or "it has other weights or another configuration"
                    raise Unavailable(f"rank {follower.rank} does not fit rank 0: {said}")
            model = meet(self._store, order, 0, self._step_max_s, shard, self._host)
        except BaseException as error:
            self._tear_down(error)
            raise
        return LeadingModel(self, model, followers)

    def close(self) -> None:
        """End the followers: they stop at the end of their pipe, and are killed if they do not."""
        with self._lock:
            self._closing = True
            self._dead = self._dead or Unavailable("the ranks were closed")
        if self._rendezvous is not None:
            self._rendezvous.close()
        for follower in self._followers:
            follower.stop()
        end = time.monotonic() + 5
        for follower in self._followers:
            follower.reap(max(0.0, end - time.monotonic()))
        for watcher in self._watchers:
            watcher.join(5)

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def pids(self) -> list[int]:
        """Of the followers on this machine, in rank order."""
        return [follower.pid for follower in self._followers if follower.pid is not None]

    # -- for LeadingModel ---------------------------------------------------------------------------------------------
    def run(self, followers: list[Follower], kind: bytes, payload: bytes, work: Callable[[], Any]) -> Any:
        """Tell `followers`, then do this rank's part. A failure of either tears the group down. Raises Unavailable."""
        self._check()
        try:
            self._send(followers, kind, payload)
            return work()
        except BaseException as error:
            self._tear_down(error)
            raise (self._dead or Unavailable(str(error))) from error

    def _send(self, followers: list[Follower], kind: bytes, payload: bytes) -> None:
        for follower in followers:
            frames.write_frame(follower.orders, kind, payload, self._step_max_s)

    def _check(self) -> None:
        if self._dead is not None:
            raise self._dead

    # -- ends ---------------------------------------------------------------------------------------------------------
    def _reply(self, follower: Follower) -> dict[str, Any]:
        """The one line with which a follower answers a load."""
        end, line = time.monotonic() + LOAD_MAX_S, b""
        while not line.endswith(b"\n") and len(line) < REPLY_BYTES_MAX:
            left = end - time.monotonic()
            if left <= 0 or not select.select([follower.answers], [], [], left)[0]:
                raise Unavailable(f"rank {follower.rank} did not load within {LOAD_MAX_S:g} s")
            part = os.read(follower.answers, 4096)
            if not part:
                raise Unavailable(f"rank {follower.rank} died while it loaded ({follower.ending()})")
            line += part
        reply: dict[str, Any] = json.loads(line)
        return reply

    def _watch(self, follower: Follower) -> None:
        """Sleeps until a follower ends."""
        follower.wait()
        if not self._closing:
            self._tear_down(Unavailable(f"rank {follower.rank} died ({follower.ending()})"))

    def _tear_down(self, error: BaseException) -> None:
        """Kill what is left of the group, once, and say so."""
        with self._lock:
            if self._dead is not None:
                return
            reason = error if isinstance(error, TokenRelayError) else Unavailable(f"the ranks failed: {error}")
            self._dead = reason
        log.error("the group of ranks is torn down", reason=reason.message, ranks=self.count)
        for follower in self._followers:
            follower.kill()
        if self.on_death is not None:
            self.on_death(reason)


def refuse_devices(here: int, *, shared: bool) -> None:
    """Raises PlacementError for ranks that this machine's GPUs cannot hold, and for what is not done on them."""
    if here > (count := torch.cuda.device_count()):
        raise PlacementError(f"{here} ranks on this host, and it has {count} GPUs: a rank needs one of its own")
    if shared:
        raise PlacementError(
            "on GPUs ranks are no members of a fleet and have no spare experts: a pool for peers lies in host memory, "
            "and experts that move are counted there"
        )


class LeadingModel:
    """The model as rank 0 has it: a call runs the step on all ranks."""

    def __init__(self, ranks: Ranks, model: RankModel, followers: list[Follower]) -> None:
        self.config = model.config
        self.cos_sin = model.cos_sin
        self._ranks = ranks
        self._model = model
        self._followers = followers
        self._block_tokens = model.config.kv_layout.block_tokens
        self.parts = model.mesh.size("dp")  # of the pool, for the scheduler: a sequence's blocks are of one
        self.whole_pool = model.mirror is not None  # the leader has all parts of it, and not only its own
        self._from_host = model.dealt or model.mesh.size(STAGES) > 1  # steps are dealt out on the CPU
        self.replace_steps = REPLACE_STEPS  # between two re-placements of experts, where these have spare places
        self._steps = 0
        self._unseen: Unseen | None = None
        self._caches: list[Tensor] | None = None  # rank 0's own, where the pool that it is given is laid out otherwise
        if model.mirror is not None:
            architecture = model.shard.architecture
            layout = architecture.kv_layout(self._block_tokens)
            self.config = replace(self.config, kv_layout=layout, layers=architecture.layers)

    def replace_experts(self) -> Replaced:
        """Move experts to where their load is even, now, between two steps. Raises Unavailable."""
        balancer = self._model.balancer
        assert balancer is not None, "this model's experts have no spare places"
        replaced: Replaced = self._ranks.run(self._followers, frames.REPLACE, b"{}", balancer.replace)
        log.info("experts re-placed", moved=replaced.moved, peak_before=replaced.before, peak_after=replaced.after)
        return replaced

    @property
    def shard(self) -> Model:
        """Rank 0's part of the model. It computes nothing alone."""
        return self._model.shard

    def allocate(self, blocks: int, generations: npt.NDArray[np.uint64] | None = None) -> None:
        """Ranks make their caches for a pool of so many blocks; before the first step.

        `generations` [blocks]: the scheduler's words, for a pool that others write to.
        """
        part_blocks = self._model.allocate(blocks)
        if self._model.mirror is not None:
            assert generations is not None, "a shared pool has generations"
            self._unseen = Unseen(generations, self._block_tokens)
            own = self._model.config
            if not self._model.mirror.in_place:
                shape = own.kv_layout.shape(part_blocks)
                self._caches = [torch.zeros(shape, dtype=own.dtype) for _ in range(own.layers)]
        payload = frames.pack_json({"blocks": blocks})
        self._ranks.run(self._followers, frames.CACHES, payload, lambda: None)

    def __call__(self, token_ids: Tensor, batch: AttentionBatch, caches: list[Tensor], sample_rows: Tensor) -> Tensor:
        """As `Model.forward`. Raises Unavailable once a rank is dead or hangs."""
        payload = frames.pack_step(token_ids, batch, sample_rows, self._block_tokens)
        if self._from_host and token_ids.is_cuda:
            token_ids, batch, sample_rows = frames.unpack_step(payload)
        self._steps += 1
        if self._model.balancer is not None and self._steps % self.replace_steps == 0:
            self.replace_experts()
        own, mirror = self._caches or caches[: self._model.config.layers], self._model.mirror
        part_blocks = self._model.part_blocks

        def step() -> Tensor:
            made = self._model(token_ids, batch, own, sample_rows)
            if mirror is not None:
                mirror.collect(batch.cache_slots, part_blocks, own, caches)
            return made

        if self._unseen is not None and mirror is not None and (blocks := self._unseen.choose(batch)):
            order = frames.pack_json({"blocks": blocks})
            self._ranks.run(
                self._followers, frames.SPREAD, order, lambda: mirror.spread(blocks, part_blocks, own, caches)
            )
        logits: Tensor = self._ranks.run(self._followers, frames.STEP, payload, step)
        return logits
