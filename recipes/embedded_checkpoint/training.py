"""What every training stage shares: a wall-clock cosine schedule, an exponential moving average,
atomic checkpoints.

A stage is given minutes, not steps. Its learning rate is a function of the share of the budget that
is used up, so the schedule reaches its end on any machine, and a resumed stage goes on where it
stopped.
"""

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from recipes.embedded_checkpoint.muon import Muon

CHECKPOINT_SECONDS = 120.0
EMA_DECAY = 0.998
WARMUP_STEPS = 50
ADAM_LAYERS = ("embedding", "conv_in", "conv_out", "quant_conv", "head")
"""Tables and first and last layers, which Adam trains although they are matrices."""


def learning_rate_factor(progress: float, step: int) -> float:
    """Linear warm-up over the first steps, then a cosine over the budget.

    Args:
        progress: Share of the time budget used up, in [0, 1].
        step: Optimiser steps taken.
    """
    return min(1.0, (step + 1) / WARMUP_STEPS) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


class ExponentialMovingAverage:
    """Averaged copy of parameters; the decay grows from 0 so that the start is forgotten.

    Args:
        parameters: Parameters to follow.
        decay: Final decay per step.
    """

    def __init__(self, parameters: Iterable[Tensor], decay: float = EMA_DECAY) -> None:
        self.parameters = list(parameters)
        self.average = [p.detach().clone() for p in self.parameters]
        self.decay = decay
        self.step = 0

    @torch.no_grad()
    def update(self) -> None:
        """Take in the current parameters."""
        self.step += 1
        decay = min(self.decay, self.step / (self.step + 10))
        torch._foreach_lerp_(self.average, self.parameters, 1 - decay)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange the parameters and their average."""
        for parameter, average in zip(self.parameters, self.average, strict=True):
            kept = parameter.detach().clone()
            parameter.copy_(average)
            average.copy_(kept)

    def state_dict(self) -> dict:
        """State to save."""
        return {"average": self.average, "step": self.step}

    def load_state_dict(self, state: dict) -> None:
        """Restore a saved state."""
        self.step = state["step"]
        for average, saved in zip(self.average, state["average"], strict=True):
            average.copy_(saved)


def split_parameters(named: Sequence[tuple[str, Tensor]]) -> tuple[list[Tensor], list[Tensor]]:
    """Parameters for Muon (the matrices of hidden layers) and for Adam (everything else)."""
    hidden = [p.ndim > 1 and not any(part in key for part in ADAM_LAYERS) for key, p in named]
    muon = [p for (_, p), is_hidden in zip(named, hidden, strict=True) if is_hidden]
    adam = [p for (_, p), is_hidden in zip(named, hidden, strict=True) if not is_hidden]
    return muon, adam


def save_atomically(state: dict, path: Path) -> None:
    """Write a checkpoint so that a crash leaves either the old or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    torch.save(state, temporary)
    temporary.replace(path)


@dataclass
class Outcome:
    """How a stage ended: optimiser steps, minutes of training, and the last averaged losses."""

    steps: int
    minutes: float
    losses: dict[str, float]


def train(
    name: str,
    modules: nn.Module,
    loss_function: Callable[[int], dict[str, Tensor]],
    *,
    minutes: float,
    learning_rate: float,
    weight_decay: float,
    checkpoint: Path,
    on_checkpoint: Callable[[ExponentialMovingAverage, int, float], None] | None = None,
    ema_decay: float = EMA_DECAY,
) -> Outcome:
    """Train until the time budget is used up, resuming from ``checkpoint`` where there is one.

    On return the modules hold the averaged weights.

    Args:
        name: Stage name for the log.
        modules: Module that holds everything that is trained.
        loss_function: Given the step (which seeds its batch), the losses; the entry ``"loss"`` is
            minimised.
        minutes: Training time over all resumed parts together, evaluation and checkpoints excluded.
        learning_rate: Peak learning rate of both optimisers.
        weight_decay: Weight decay of the matrices.
        checkpoint: File of the resumable state.
        on_checkpoint: Called with the moving average, the step and the progress after each
            checkpoint.
        ema_decay: Decay of the moving average.
    """
    named = [(key, p) for key, p in modules.named_parameters() if p.requires_grad]
    parameters = [p for _, p in named]
    muon, adam = split_parameters(named)
    optimizers: list[torch.optim.Optimizer] = [
        Muon(muon, lr=learning_rate, weight_decay=weight_decay),
        torch.optim.AdamW(adam, lr=learning_rate, betas=(0.9, 0.99), weight_decay=0.0, fused=True),
    ]
    ema = ExponentialMovingAverage(parameters, ema_decay)
    step, elapsed = 0, 0.0
    running: dict[str, float] = {}
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location=parameters[0].device, weights_only=True)
        modules.load_state_dict(state["modules"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        ema.load_state_dict(state["ema"])
        step, elapsed, running = state["step"], state["elapsed"], state["running"]
        print(f"{name}: resumed at step {step}, {elapsed / 60:.1f} of {minutes} min", flush=True)

    def write() -> None:
        state = {
            "modules": modules.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in optimizers],
            "ema": ema.state_dict(),
            "step": step,
            "elapsed": elapsed,
            "running": running,
        }
        save_atomically(state, checkpoint)

    budget = minutes * 60
    torch.set_flush_denormal(True)
    modules.train()
    last_write = elapsed
    while elapsed < budget:
        start = time.perf_counter()
        factor = learning_rate_factor(elapsed / budget, step)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate * factor
        losses = loss_function(step)
        losses["loss"].backward()
        norm = nn.utils.clip_grad_norm_(parameters, 1.0)
        for optimizer in optimizers:
            if torch.isfinite(norm):
                optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        ema.update()
        step += 1
        for key, value in losses.items():
            running[key] = value.item() if step == 1 else 0.99 * running[key] + 0.01 * value.item()
        elapsed += time.perf_counter() - start
        if step % 50 == 0:
            shown = " ".join(f"{key} {value:.4f}" for key, value in running.items())
            print(f"{name}: step {step} at {elapsed / 60:.2f} min, {shown}", flush=True)
        if elapsed - last_write >= CHECKPOINT_SECONDS:
            last_write = elapsed
            write()
            if on_checkpoint is not None:
                on_checkpoint(ema, step, elapsed / budget)
    write()
    ema.swap()
    modules.eval()
    return Outcome(step, elapsed / 60, dict(running))
