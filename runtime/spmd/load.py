"""A rank's part of loading, the same on the leader and on its followers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tokenrelay.runtime.layers.moe import ExpertSplit
from tokenrelay.runtime.models.decoder import Model
from tokenrelay.runtime.placement import Mesh
from tokenrelay.runtime.spmd.comm import Comm
from tokenrelay.runtime.spmd.rank_model import Programs, RankModel, compile_programs
from tokenrelay.runtime.weights.loader import load_model


def load_shard(order: dict[str, Any], rank: int, **more: Any) -> tuple[Model, Programs]:
    """This rank's shard and the programs. `order` is the leader's word to all; `more` goes to `load_model`.

    Raises CheckpointError and PlacementError.
    """
    mesh = Mesh(**order["mesh"])
    dtype = getattr(torch, order["dtype"]) if order["dtype"] else None
    experts = ExpertSplit(tuple(order["experts"]["whole"]), order["experts"]["send"])
    options = {**order["options"], **more}
    model = load_model(Path(order["folder"]), dtype=dtype, mesh=mesh, rank=rank, experts=experts, **options)
    return model, compile_programs(model.architecture, mesh, experts)


def meet(store: Any, order: dict[str, Any], rank: int, timeout_s: float, shard: tuple[Model, Programs]) -> RankModel:
    """Connect with the others, once every rank has its shard. Raises RuntimeError when one does not come."""
    model, programs = shard
    return RankModel(
        model, programs, Comm(store, order["name"], programs.mesh, rank, timeout_s), rank, shared=order["shared"]
    )
