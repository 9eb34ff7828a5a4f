"""Muon: momentum with orthogonalised matrices, so that rare directions learn as fast as common
ones.

In short trainings on little compute it needs far fewer steps than Adam. Convolution kernels are
matrices of output channels against everything else. Updates are scaled to the size of Adam's, so
the learning rates of both agree.

References:
    Jordan et al., Muon: an optimizer for hidden layers in neural networks, 2024.
    Liu et al., Muon is scalable for LLM training, 2025 (the scale).
"""

from collections.abc import Iterable

import torch
from torch import Tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Quintic whose iteration drives all singular values into about [0.7, 1.2]."""
UPDATE_RMS = 0.2


def orthogonalize(matrices: Tensor, iterations: int = 3) -> Tensor:
    """Replace the singular values of each matrix by about 1.

    Args:
        matrices: Shape ``(n, rows, columns)``.
        iterations: Newton-Schulz iterations.
    """
    transpose = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if transpose else matrices
    x = x / (x.flatten(1).norm(dim=1).view(-1, 1, 1) + 1e-7)
    a, b, c = COEFFICIENTS
    for _ in range(iterations):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if transpose else x


class Muon(torch.optim.Optimizer):
    """Momentum with orthogonalised updates, for parameters of two and more dimensions.

    Args:
        parameters: Parameters or parameter groups.
        lr: Learning rate on Adam's scale.
        momentum: Decay of the momentum, which is Nesterov's.
        weight_decay: Decoupled weight decay.
    """

    def __init__(
        self,
        parameters: Iterable,
        lr: float = 1e-3,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        """Take one step; matrices of the same shape are orthogonalised together."""
        for group in self.param_groups:
            by_shape: dict[tuple[int, int], list[tuple[Tensor, Tensor]]] = {}
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["momentum"] = torch.zeros_like(parameter)
                buffer = state["momentum"]
                buffer.lerp_(parameter.grad, 1 - group["momentum"])
                update = parameter.grad.lerp(buffer, group["momentum"]).flatten(1)
                by_shape.setdefault(tuple(update.shape), []).append((parameter, update))
            for (rows, columns), entries in by_shape.items():
                updates = orthogonalize(torch.stack([update for _, update in entries]))
                scale = group["lr"] * UPDATE_RMS * max(rows, columns) ** 0.5
                for (parameter, _), update in zip(entries, updates, strict=True):
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                    parameter.sub_(update.view(parameter.shape), alpha=scale)
