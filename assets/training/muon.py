"""Muon for matrices, AdamW for the rest.

Muon (Keller Jordan, https://kellerjordan.github.io/posts/muon) steps along the orthogonalised momentum; stacked
experts [E, rows, columns] are E matrices. It needs about half the tokens AdamW needs here.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


def orthogonalise(matrices: Tensor, rounds: int = 5) -> Tensor:
    """The nearest semi-orthogonal matrices, roughly: [..., rows, columns] -> the same shape."""
    a, b, c = NEWTON_SCHULZ
    x: Tensor = matrices.bfloat16()
    wide = x.shape[-2] <= x.shape[-1]
    x = x if wide else x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(rounds):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    x = x if wide else x.mT
    return x.to(matrices.dtype)


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalised; decoupled weight decay. Ranks share the orthogonalisation: each does every
    ranks-th matrix and they exchange the results, so all make the same update."""

    def __init__(
        self, parameters: list[nn.Parameter], pairs: list[nn.Parameter], lr: float, decay: float = 0.01
    ) -> None:
        """`pairs` are those parameters [E, 2 * rows, columns] that hold two matrices an expert."""
        super().__init__(parameters, {"lr": lr, "momentum": 0.95, "decay": decay})
        self.pairs = {id(parameter) for parameter in pairs}
        self.rank, self.ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of every parameter. All have gradients: the ranks count on it."""
        for group in self.param_groups:
            updates = self._shared([self._momentum(parameter, group["momentum"]) for parameter in group["params"]])
            for parameter, update in zip(group["params"], updates, strict=True):
                scale = max(1.0, update.shape[-2] / update.shape[-1]) ** 0.5
                parameter.mul_(1 - group["lr"] * group["decay"])
                parameter.add_(update.view_as(parameter), alpha=-group["lr"] * scale)

    def _momentum(self, parameter: nn.Parameter, momentum: float) -> Tensor:
        """What to orthogonalise."""
        assert parameter.grad is not None
        state = self.state[parameter]
        if not state:
            state["momentum"] = torch.zeros_like(parameter)
        state["momentum"].lerp_(parameter.grad, 1 - momentum)
        matrices = parameter.grad.lerp(state["momentum"], momentum)
        half = matrices.shape[1] // 2
        return matrices.view(-1, half, matrices.shape[2]) if id(parameter) in self.pairs else matrices

    def _shared(self, matrices: list[Tensor]) -> list[Tensor]:
        """All matrices orthogonalised, a rank's share by this one."""
        for index in range(self.rank, len(matrices), self.ranks):
            matrices[index] = orthogonalise(matrices[index])
        for rank in range(self.ranks if self.ranks > 1 else 0):
            theirs = matrices[rank :: self.ranks]
            flat = torch.cat([matrix.flatten() for matrix in theirs])
            dist.broadcast(flat, rank)
            pieces = torch.split(flat, [matrix.numel() for matrix in theirs])
            for offset, piece in enumerate(pieces):
                index = rank + offset * self.ranks
                matrices[index] = piece.view_as(matrices[index])
        return matrices


def optimizers(model: nn.Module, matrix_lr: float, other_lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the layers' matrices; AdamW for embedding, head, routers and norms."""
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    pairs: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        plain = name.startswith(("embed", "head")) or name.endswith("gate") or parameter.ndim < 2
        (others if plain else matrices).append(parameter)
        if name.endswith("gate_up"):
            pairs.append(parameter)
    return [
        Muon(matrices, pairs, matrix_lr),
        torch.optim.AdamW(others, lr=other_lr, betas=(0.9, 0.99), weight_decay=0.0, fused=True),
    ]
