"""On paper: how many accelerators a learner keeps busy. ``python -m benchmarks.saturation``.

Operations are counted, on networks of the published sizes without weights; bytes are those of the
arrays. What an accelerator and a network cable attain is assumed (the options say what), and the
answer is an estimate: with ``r`` steps a second from each of ``N`` accelerators and updates for
``L`` steps a second, a synchronous algorithm makes

.. math:: 1 / (1 / (N r) + 1 / L)

steps a second, which at ``N = L / r`` is half of what the accelerators could do.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import gymnasium
import numpy as np
import torch
from diffusers import FluxTransformer2DModel, UNet2DConditionModel
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from flowgym_gym.agents.sb3.networks import ActionHead, LatentEncoder, ValueHead

# One forward pass and a backward pass of twice its operations.
TRAINING = 3
SDXL = {
    "sample_size": 128,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (320, 640, 1280),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}


@dataclass(frozen=True)
class Model:
    """A base model of a published size.

    Attributes:
        name: What it is called.
        latent: Shape of its latent.
        passes: Of the network in a step: two with classifier-free guidance.
        call: Makes the network and calls it for one sample.
    """

    name: str
    latent: tuple[int, int, int]
    passes: int
    call: Callable[[], Any]


def _sd() -> Any:
    network = UNet2DConditionModel(sample_size=64, cross_attention_dim=768)
    return network(torch.zeros(1, 4, 64, 64), torch.zeros(1), torch.zeros(1, 77, 768))


def _sdxl() -> Any:
    network = UNet2DConditionModel(**SDXL)
    added = {"text_embeds": torch.zeros(1, 1280), "time_ids": torch.zeros(1, 6)}
    latent, prompt = torch.zeros(1, 4, 128, 128), torch.zeros(1, 77, 2048)
    return network(latent, torch.zeros(1), prompt, added_cond_kwargs=added)


def _flux() -> Any:
    return FluxTransformer2DModel(guidance_embeds=True)(
        hidden_states=torch.zeros(1, 4096, 64),
        encoder_hidden_states=torch.zeros(1, 512, 4096),
        pooled_projections=torch.zeros(1, 768),
        timestep=torch.zeros(1),
        img_ids=torch.zeros(4096, 3),
        txt_ids=torch.zeros(512, 3),
        guidance=torch.zeros(1),
    )


MODELS = (
    Model("Stable Diffusion 1.5, 512 pixels", (4, 64, 64), 2, _sd),
    Model("Stable Diffusion XL, 1024 pixels", (4, 128, 128), 2, _sdxl),
    Model("Flux.1 dev, 1024 pixels", (16, 128, 128), 1, _flux),
)


def main(arguments: Sequence[str] | None = None) -> list[dict[str, float]]:
    """Print a table, a row for each base model."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.saturation", description=__doc__.partition("\n")[0]
    )
    for name, default, what in (
        ("--accelerator", 300.0, "TFLOP/s that the base model attains"),
        ("--learner", 5.0, "TFLOP/s that the policy's small convolutions attain"),
        ("--overhead", 4000.0, "steps/s of RLlib's driver with a policy that costs nothing"),
        ("--network", 1.25, "GB/s into the learner's machine"),
    ):
        parser.add_argument(name, type=float, default=default, help=f"{what} (default: {default})")
    parser.add_argument("--epochs", type=int, default=5, help="of PPO (default: %(default)s)")
    parser.add_argument(
        "--width", type=int, default=24, help="of the policy (default: %(default)s)"
    )
    args = parser.parse_args(arguments)
    rows = [estimate(model, args) for model in MODELS]
    print(table(rows))
    return rows


def estimate(model: Model, args: argparse.Namespace) -> dict[str, Any]:
    """What one accelerator does, and how many of them a learner and its network take."""
    with torch.device("meta"):
        step = model.passes * operations(model.call)
    update = args.epochs * TRAINING * policy_operations(model.latent, args.width)
    rate = args.accelerator * 1e12 / step
    observation = 4 * int(np.prod(model.latent))
    updates = 1 / (1 / args.overhead + update / (args.learner * 1e12))
    return {
        "model": model.name,
        "step": step,
        "rate": rate,
        "observation": observation,
        "traffic": rate * observation,
        "update": update,
        "updates": updates,
        "half": updates / rate,
        "full_cable": args.network * 1e9 / (rate * observation),
        # Observation, action, and mean and deviation of the action, at the latent's resolution.
        "full_cable_fine": args.network * 1e9 / (rate * 4 * observation),
    }


def operations(call: Callable[[], Any]) -> int:
    """Floating-point operations of a call."""
    with FlopCounterMode(display=False) as counter:
        call()
    return int(counter.get_total_flops())


def policy_operations(latent: tuple[int, int, int], width: int) -> int:
    """Of a forward pass of actor and critic, with a control for each channel of the latent."""
    space = gymnasium.spaces.Dict(
        {
            "latent": gymnasium.spaces.Box(-np.inf, np.inf, latent),
            "time": gymnasium.spaces.Box(0, 1, (1,)),
        }
    )
    with torch.device("meta"):
        heads: tuple[nn.Module, ...] = (
            ActionHead(width, latent[0]),
            ValueHead(width, width, 1.0),
        )
        observation = {"latent": torch.zeros(1, *latent), "time": torch.zeros(1, 1)}
        encoders = [LatentEncoder(space, (1, 1), width) for _ in heads]
        return operations(
            lambda: [
                head(encoder(observation)) for head, encoder in zip(heads, encoders, strict=True)
            ]
        )


def table(rows: list[dict[str, Any]]) -> str:
    """The rows in Markdown."""
    lines = [
        "| base model | TFLOP a step | steps / s of an accelerator | KiB an observation | MB / s "
        "from it | GFLOP of updates a step | steps / s of the learner | accelerators at half "
        "speed | that fill the cable, coarse actions | full actions |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        lines.append(
            f"| {row['model']} | {row['step'] / 1e12:.1f} | {row['rate']:.1f} "
            f"| {row['observation'] / 1024:.0f} | {row['traffic'] / 1e6:.1f} "
            f"| {row['update'] / 1e9:.1f} | {row['updates']:.0f} | {row['half']:.0f} "
            f"| {row['full_cable']:.0f} | {row['full_cable_fine']:.0f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
