"""Collectives of one rank over gloo: groups made as they are needed, each with a deadline for every operation."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tokenrelay.runtime.placement import Mesh
from tokenrelay.runtime.placement.ir import Move

HOST = "127.0.0.1"
LOAD_MAX_S = 300.0  # a rank starts and reads its shard
MEET_MAX_S = 30.0  # ranks meet once each has said that it read its shard


class Comm:
    """The groups that one rank is a member of. Made alike by all ranks of a mesh; `name` keeps meshes apart."""

    def __init__(self, store: Any, name: str, mesh: Mesh, rank: int, timeout_s: float) -> None:
        self._store = store
        self._name = name
        self._mesh = mesh
        self._rank = rank
        self._timeout = timedelta(seconds=timeout_s)
        self._groups: dict[tuple[str, ...], tuple[Any, int, int]] = {}

    def connect(self, axes: tuple[str, ...]) -> None:
        """Make the group along `axes`. Waits for its other members; raises RuntimeError when they do not come."""
        if axes in self._groups:
            return
        members = next(group for group in self._mesh.groups(axes) if self._rank in group)
        store = dist.PrefixStore(  # type: ignore[attr-defined]
            f"{self._name}/{'+'.join(axes)}/{members[0]}", self._store
        )
        options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
        options._devices = [dist.ProcessGroupGloo.create_device(hostname=HOST)]
        options._timeout = timedelta(seconds=MEET_MAX_S)
        at = members.index(self._rank)
        self._groups[axes] = (dist.ProcessGroupGloo(store, at, len(members), options), at, len(members))

    def move(self, move: Move, x: Tensor) -> Tensor:
        """What `move` makes of this rank's `x`. May write to `x`: nobody else reads a term."""
        group, at, count = self._groups[move.axes]
        match move.kind:
            case "all_reduce":
                x = x.contiguous()
                group.allreduce([x]).wait(self._timeout)
                return x
            case "all_gather":
                return torch.cat(self._gather(group, count, x), move.dim)
            case "reduce_scatter":
                parts = torch.stack(x.chunk(count, move.dim))  # [ranks, …]: gloo deals out whole tensors
                received = self._exchange(group, parts)
                return received.sum(0)
            case "all_to_all":
                received = self._exchange(group, torch.stack(x.chunk(count, move.dim)))
                return torch.cat(list(received), move.from_dim)
            case _:
                return x.chunk(count, move.dim)[at].contiguous()

    def _gather(self, group: Any, count: int, x: Tensor) -> list[Tensor]:
        x = x.contiguous()
        parts = [torch.empty_like(x) for _ in range(count)]
        group.allgather([parts], [x]).wait(self._timeout)
        return parts

    def _exchange(self, group: Any, parts: Tensor) -> Tensor:
        """parts [ranks, …]: the i-th goes to rank i -> what came from each."""
        received = torch.empty_like(parts)
        group.alltoall_base(received, parts, [], []).wait(self._timeout)
        return received
