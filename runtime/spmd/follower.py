"""A rank that follows:
`python -Pm tokenrelay.runtime.spmd.follower RANK PORT STEP_MAX_S THREADS HOST`, started by `Ranks`.

Orders come on stdin, answers to loads go to stdout, one JSON line each. It ends when stdin ends, or with its parent.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tokenrelay.base.errors import TokenRelayError
from tokenrelay.base.parent import die_with_parent
from tokenrelay.runtime.executor.threads import use_threads
from tokenrelay.runtime.spmd import frames
from tokenrelay.runtime.spmd.comm import HOST, LOAD_MAX_S
from tokenrelay.runtime.spmd.load import load_shard, meet
from tokenrelay.runtime.spmd.rank_model import RankModel


def follow(rank: int, store: Any, timeout_s: float, orders: int, answers: int, *, host: str = HOST) -> None:
    """Carry out orders until there are no more. Whatever fails ends the process: the leader sees its pipe end.

    `host`: the address of this machine that the other ranks reach.
    """
    model: RankModel | None = None
    caches: list[Tensor] = []
    with torch.inference_mode():
        while (frame := frames.read_frame(orders)) is not None:
            kind, payload = frame
            if kind == frames.STEP:
                assert model is not None, "a step before a load"
                token_ids, batch, sample_rows = frames.unpack_step(payload)
                model(token_ids, batch, caches, sample_rows)
                if model.mirror is not None:
                    model.mirror.collect(batch.cache_slots, model.part_blocks, caches, [])
                continue
            order = json.loads(payload)
            if kind == frames.REPLACE:
                assert model is not None and model.balancer is not None, "experts that have no spare places"
                model.balancer.replace()
                continue
            if kind == frames.SPREAD:
                assert model is not None and model.mirror is not None, "a pool that is not shared is not spread"
                model.mirror.spread(order["blocks"], model.part_blocks, caches, [])
                continue
            if kind == frames.CACHES:
                assert model is not None, "caches before a load"
                config = model.config
                shape = config.kv_layout.shape(model.allocate(order["blocks"]))
                device = model.cos_sin.device
                caches = [torch.zeros(shape, dtype=config.dtype, device=device) for _ in range(config.layers)]
            else:
                model, caches = None, []
                try:
                    shard = load_shard(order, rank)
                except TokenRelayError as error:
                    os.write(answers, json.dumps({"error": error.message}).encode() + b"\n")
                    continue
                os.write(answers, json.dumps({"identity": shard[0].config.identity.hex()}).encode() + b"\n")
                model = meet(store, order, rank, timeout_s, shard, host)


def main() -> None:
    """Read the command line, find the leader's store, follow."""
    die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the leader, which drains first
    rank, port, timeout_s, threads = int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]), int(sys.argv[4])
    answers = os.dup(1)
    os.dup2(2, 1)  # whoever prints must not answer
    use_threads(threads)
    store = dist.TCPStore(HOST, port, None, False, timeout=timedelta(seconds=LOAD_MAX_S))  # type: ignore[attr-defined]
    follow(rank, store, timeout_s, 0, answers, host=sys.argv[5])
    os._exit(0)  # gloo's threads may wait for a peer that has ended first


if __name__ == "__main__":
    main()
