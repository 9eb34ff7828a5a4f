"""Registers the environment ids with Gymnasium: one flat list."""

from __future__ import annotations

import gymnasium

DENOISING = "flowgym_gym.envs.denoising:DenoisingEnv"
DENOISING_VECTOR = "flowgym_gym.envs.vector:DenoisingVectorEnv"

STABLE_DIFFUSION_REWARDS = {"Red": "images/red"}


def register_environments() -> None:
    """Register every ``flowgym/...`` id; safe to call again."""
    _register("flowgym/Denoising-v0")
    for name, reward in STABLE_DIFFUSION_REWARDS.items():
        _register(f"flowgym/StableDiffusion-{name}-v0", base_model="images/stable_diffusion", reward=reward)


def _register(id: str, **kwargs: str) -> None:
    if id not in gymnasium.registry:
        gymnasium.register(id, entry_point=DENOISING, vector_entry_point=DENOISING_VECTOR, kwargs=kwargs)
