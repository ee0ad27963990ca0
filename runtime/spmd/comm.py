"""Collectives of one rank over gloo: groups made as they are needed, each with a deadline for every operation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tokenrelay.runtime.placement import Mesh
from tokenrelay.runtime.placement.ir import Move

Experts = Callable[[Tensor, Tensor, Tensor], Tensor]

HOST = "127.0.0.1"
LOAD_MAX_S = 300.0  # a rank starts and reads its shard
MEET_MAX_S = 30.0  # ranks meet once each has said that it read its shard


class Comm:
    """The groups that one rank is a member of. Made alike by all ranks of a mesh; `name` keeps meshes apart."""

    def __init__(
        self,
        store: Any,
        name: str,
        mesh: Mesh,
        rank: int,
        timeout_s: float,
        host: str = HOST,
        device: torch.device | None = None,
        *,
        ordered: bool = False,
    ) -> None:
        """`host`: this machine's address, for gloo. `device`: of the tensors; NCCL moves those of a GPU.

        `ordered`: terms are added in the order of ranks, whatever stands beside them in a tensor. A ring adds each part
        of a tensor in another order, so that a token's bits would depend on how many others the step has.
        """
        self._ordered = ordered
        self._store = store
        self._name = name
        self._mesh = mesh
        self._rank = rank
        self._host = host
        self._device = device or torch.device("cpu")
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
        at = members.index(self._rank)
        make = self._nccl if self._device.type == "cuda" else self._gloo
        self._groups[axes] = (make(store, at, len(members)), at, len(members))

    def _gloo(self, store: Any, at: int, count: int) -> Any:
        options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
        options._devices = [dist.ProcessGroupGloo.create_device(hostname=self._host)]
        options._timeout = timedelta(seconds=MEET_MAX_S)
        return dist.ProcessGroupGloo(store, at, count, options)

    def _nccl(self, store: Any, at: int, count: int) -> Any:
        """Never run on more than one GPU so far. A rank has one GPU, chosen before its first tensor."""
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = self._timeout
        return dist.ProcessGroupNCCL(store, at, count, options)

    def mover(self, move: Move) -> Callable[[Tensor], Tensor]:
        """What `move` makes of this rank's tensor, bound once. May write to its argument: nobody else reads a term."""
        begin = self.beginner(move)

        def moved(x: Tensor) -> Tensor:
            return begin(x)()

        return moved

    def beginner(self, move: Move) -> Callable[[Tensor], Callable[[], Tensor]]:
        """The same in two halves: the first begins, and what it answers waits. Others may compute in between."""
        group, at, count = self._groups[move.axes]
        dim = move.dim

        def all_reduce(x: Tensor) -> Callable[[], Tensor]:
            x = x.contiguous()
            work, timeout = group.allreduce([x]), self._timeout

            def wait() -> Tensor:
                work.wait(timeout)
                return x

            return wait

        def all_reduce_in_order(x: Tensor) -> Callable[[], Tensor]:
            gathered = self._gather(group, count, x)
            return lambda: _added(gathered())

        def all_gather(x: Tensor) -> Callable[[], Tensor]:
            gathered = self._gather(group, count, x)
            return lambda: torch.cat(gathered(), dim)

        def reduce_scatter(x: Tensor) -> Callable[[], Tensor]:
            exchanged = self._exchange(group, torch.stack(x.chunk(count, dim)))  # gloo deals out whole tensors
            return lambda: _added(exchanged())

        def all_to_all(x: Tensor) -> Callable[[], Tensor]:
            exchanged = self._exchange(group, torch.stack(x.chunk(count, dim)))
            return lambda: torch.cat(list(exchanged()), move.from_dim)

        def cut(x: Tensor) -> Callable[[], Tensor]:
            part = x.chunk(count, dim)[at].contiguous()
            return lambda: part

        kinds = {
            "all_reduce": all_reduce_in_order if self._ordered else all_reduce,
            "all_gather": all_gather,
            "reduce_scatter": reduce_scatter,
            "all_to_all": all_to_all,
        }
        return kinds.get(move.kind, cut)

    def begin_send(self, axis: str, target: int, x: Tensor) -> Callable[[], None]:
        """`x` goes to the rank at place `target` along `axis`, which receives it; the answer waits until it is gone."""
        x = x.contiguous()  # kept until then: the wait holds it
        work = self._groups[(axis,)][0].send([x], target, 0)

        def wait(_: Tensor = x) -> None:
            work.wait(self._timeout)

        return wait

    def send(self, axis: str, target: int, x: Tensor) -> None:
        """`x` to the rank at place `target` along `axis`, which receives it."""
        self.send_in((axis,), target, x)

    def receive(self, axis: str, source: int, like: Tensor) -> Tensor:
        """What the rank at place `source` along `axis` sends; written to `like`, which has its shape and type."""
        return self.receive_in((axis,), source, like)

    def send_in(self, axes: tuple[str, ...], target: int, x: Tensor) -> None:
        """`x` to the rank numbered `target` in the group along `axes`."""
        self._groups[axes][0].send([x.contiguous()], target, 0).wait(self._timeout)

    def receive_in(self, axes: tuple[str, ...], source: int, like: Tensor) -> Tensor:
        """What the rank numbered `source` in the group along `axes` sends, written to `like`."""
        self._groups[axes][0].recv([like], source, 0).wait(self._timeout)
        return like

    def exchange(
        self,
        axes: tuple[str, ...],
        x: Tensor,
        experts: Tensor,
        weights: Tensor,
        *,
        firsts: Sequence[int],
        held: int,
        work: Experts,
    ) -> Tensor:
        """Each token [t, d] to the ranks along `axes` whose experts it chose [t, k], and their answers' sum back.

        The i-th rank of the group holds `held` experts from `firsts[i]` on. `work` gets (x, experts, weights) of the
        tokens that came; experts are numbered as they are held, and -1 is another rank's.
        """
        group, _, count = self._groups[axes]
        rows, packed, sizes = [], [], []
        for first in firsts:
            local = experts - first
            local = local.masked_fill((local < 0) | (local >= held), -1)
            wanted = (local >= 0).any(1).nonzero().flatten()
            rows.append(wanted)
            sizes.append(len(wanted))
            packed.append(_pack(x[wanted], local[wanted], weights[wanted]))
        arriving = torch.empty(count, dtype=torch.int64, device=x.device)
        group.alltoall_base(arriving, torch.tensor(sizes, device=x.device), [], []).wait(self._timeout)
        counts = arriving.tolist()
        sent = torch.cat(packed)
        came = sent.new_empty((sum(counts), sent.shape[1]))
        group.alltoall_base(came, sent, counts, sizes).wait(self._timeout)
        answered = work(*_unpack(came, x, experts))
        back = answered.new_empty((sum(sizes), answered.shape[1]))
        group.alltoall_base(back, answered.contiguous(), sizes, counts).wait(self._timeout)
        total = torch.zeros_like(x)
        for wanted, part in zip(rows, torch.split(back, sizes), strict=True):  # in the order of ranks
            total[wanted] += part
        return total

    def _gather(self, group: Any, count: int, x: Tensor) -> Callable[[], list[Tensor]]:
        """Begins; the answer has every rank's."""
        x = x.contiguous()
        parts = [torch.empty_like(x) for _ in range(count)]
        work, timeout = group.allgather([parts], [x]), self._timeout

        def wait(_: Tensor = x) -> list[Tensor]:  # what is sent is kept until it is gone
            work.wait(timeout)
            return parts

        return wait

    def _exchange(self, group: Any, parts: Tensor) -> Callable[[], Tensor]:
        """parts [ranks, …]: the i-th goes to rank i. Begins; the answer has what came from each."""
        received = torch.empty_like(parts)
        work, timeout = group.alltoall_base(received, parts, [], []), self._timeout

        def wait(_: Tensor = parts) -> Tensor:
            work.wait(timeout)
            return received

        return wait


def _added(terms: Sequence[Tensor] | Tensor) -> Tensor:
    """One term after the other."""
    total = terms[0] + terms[1]
    for term in terms[2:]:
        total += term
    return total


def _pack(x: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
    """[n, d], int32 [n, k], float32 [n, k] -> bytes [n, ...]: one exchange instead of three."""
    parts = (x.contiguous(), experts.int().contiguous(), weights.contiguous())
    return torch.cat([part.view(torch.uint8) for part in parts], 1)


def _unpack(rows: Tensor, x: Tensor, experts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The inverse of `_pack`; `x` and `experts` are of the same type and width."""
    k = experts.shape[1] * 4
    parts = rows.split_with_sizes((x.shape[1] * x.element_size(), k, k), 1)
    kinds = (x.dtype, torch.int32, torch.float32)
    made = [part.contiguous().view(kind) for part, kind in zip(parts, kinds, strict=True)]
    return made[0], made[1], made[2]
