"""A rank's part of loading, the same on the leader and on its followers."""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path
from typing import Any

import torch

import tokenrelay.runtime
from tokenrelay.base.errors import PlacementError
from tokenrelay.kernels import registry
from tokenrelay.runtime.layers.moe import ExpertSplit
from tokenrelay.runtime.models.decoder import Model
from tokenrelay.runtime.placement import STAGES, Mesh
from tokenrelay.runtime.spmd.comm import Comm
from tokenrelay.runtime.spmd.rank_model import Programs, RankModel, compile_programs
from tokenrelay.runtime.weights.loader import load_model


@functools.cache
def code_identity() -> str:
    """What computes here: torch's version, and the text of all that a rank runs. Equal on all ranks of a group."""
    digest = hashlib.blake2b(torch.__version__.encode(), digest_size=16)
    root = Path(tokenrelay.runtime.__file__).parent
    for package in (root, root.parent / "kernels"):
        for path in sorted(package.rglob("*.py")):
            digest.update(f"{path.relative_to(package)} {path.stat().st_size}\n".encode() + path.read_bytes())
    return digest.hexdigest()


def kernel_choices() -> dict[str, Any]:
    """What this process was told about kernels, for the other ranks: sums are the same where kernels are."""
    tuned = [
        [op, device, dtype, list(dims), path] for (op, device, dtype, dims), path in registry.tuned_choices().items()
    ]
    return {"deterministic": registry.is_deterministic(), "tuned": tuned}


def take_kernels(choices: dict[str, Any]) -> None:
    """As the leader has it."""
    registry.deterministic(choices["deterministic"])
    found = {(op, on, dtype, tuple(map(tuple, dims))): path for op, on, dtype, dims, path in choices["tuned"]}
    registry.tuned(found)


def device_of(kind: str, rank: int) -> torch.device:
    """A rank's device: on hosts with n GPUs each the ranks are numbered host by host, as torchrun does."""
    if kind != "cuda":
        return torch.device("cpu")
    device = torch.device("cuda", rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


def load_shard(order: dict[str, Any], rank: int, **more: Any) -> tuple[Model, Programs]:
    """This rank's shard and the programs. `order` is the leader's word to all; `more` goes to `load_model`.

    Raises CheckpointError and PlacementError, also for a leader that runs other code.
    """
    if order["code"] != code_identity():
        raise PlacementError(
            f"it runs other code than the leader (here {code_identity()[:12]}, torch {torch.__version__})"
        )
    if rank:
        take_kernels(order["kernels"])
    mesh = Mesh(**order["mesh"])
    dtype = getattr(torch, order["dtype"]) if order["dtype"] else None
    said = order["experts"]
    experts = ExpertSplit(tuple(said["whole"]), said["send"], said["spare"])
    options = {**order["options"], **more, "device": device_of(order["device"], rank)}
    model = load_model(Path(order["folder"]), dtype=dtype, mesh=mesh, rank=rank, experts=experts, **options)
    return model, compile_programs(model.architecture, mesh, experts)


def meet(
    store: Any, order: dict[str, Any], rank: int, timeout_s: float, shard: tuple[Model, Programs], host: str
) -> RankModel:
    """Connect with the others, once every rank has its shard. `host`: the address of this machine that they reach.

    Raises RuntimeError when one does not come.
    """
    model, programs = shard
    ordered = order["kernels"]["deterministic"]
    comm = Comm(store, order["name"], programs.mesh, rank, timeout_s, host, model.cos_sin.device, ordered=ordered)
    # Experts of one rank alone have nowhere to go.
    balanced = order["experts"]["spare"] > 0 and programs.mesh.ranks > programs.mesh.size(STAGES)
    folder = Path(order["folder"]) if balanced and model.architecture.moe is not None else None
    made = RankModel(model, programs, comm, rank, shared=order["shared"], folder=folder)
    made.micro_tokens_min = order["micro_tokens_min"]
    return made
