"""Registers the environment ids with Gymnasium: one flat list."""

from __future__ import annotations

from typing import Any

import gymnasium

DENOISING = "flowgym_gym.envs.denoising:DenoisingEnv"
DENOISING_VECTOR = "flowgym_gym.envs.vector:DenoisingVectorEnv"

ENVIRONMENTS: dict[str, dict[str, Any]] = {
    "flowgym/Denoising-v0": {},
    "flowgym/StableDiffusion-Red-v0": {"base_model": "images/stable_diffusion", "reward": "images/red"},
    "flowgym/StableDiffusion-Redness-v0": {"base_model": "images/stable_diffusion", "reward": "images/redness"},
    "flowgym/StableDiffusion-Brightness-v0": {"base_model": "images/stable_diffusion", "reward": "images/brightness"},
    "flowgym/StableDiffusion-Colorfulness-v0": {
        "base_model": "images/stable_diffusion",
        "reward": "images/colorfulness",
        "reward_scale": 0.5,
    },
    "flowgym/StableDiffusion-Sharpness-v0": {
        "base_model": "images/stable_diffusion",
        "reward": "images/sharpness",
        "reward_scale": 2000.0,
    },
    "flowgym/StableDiffusion-Symmetry-v0": {
        "base_model": "images/stable_diffusion",
        "reward": "images/symmetry",
        "reward_scale": 300.0,
    },
    "flowgym/StableDiffusion-Compression-v0": {
        "base_model": "images/stable_diffusion",
        "reward": "images/compression",
        "reward_scale": 30.0,
    },
    "flowgym/StableDiffusion-Incompression-v0": {
        "base_model": "images/stable_diffusion",
        "reward": "images/incompression",
        "reward_scale": 30.0,
    },
    "flowgym/StableDiffusionXL-Red-v0": {"base_model": "images/stable_diffusion_xl", "reward": "images/red"},
    "flowgym/StableDiffusion3-Red-v0": {"base_model": "images/stable_diffusion_3", "reward": "images/red"},
    "flowgym/Flux-Red-v0": {"base_model": "images/flux", "reward": "images/red"},
    "flowgym/PixArt-Red-v0": {"base_model": "images/pixart", "reward": "images/red"},
    "flowgym/DiT-Red-v0": {"base_model": "images/dit", "reward": "images/red"},
    "flowgym/DDPM-Red-v0": {"base_model": "images/ddpm", "reward": "images/red"},
    "flowgym/StableDiffusion-Alignment-v0": {"base_model": "images/stable_diffusion", "reward": "images/alignment"},
    "flowgym/StableDiffusion-ClipScore-v0": {"base_model": "images/stable_diffusion", "reward": "images/clip_score"},
    "flowgym/StableDiffusion-PickScore-v0": {
        "base_model": "images/stable_diffusion",
        "reward": "images/pickscore",
        "reward_scale": 10.0,
    },
    "flowgym/StableDiffusion-Aesthetic-v0": {
        "base_model": "images/stable_diffusion",
        "reward": "images/aesthetic",
        "reward_scale": 10.0,
    },
    "flowgym/StableDiffusion-ImageReward-v0": {
        "base_model": "images/stable_diffusion",
        "reward": "images/image_reward",
        "reward_scale": 10.0,
    },
    "flowgym/StableDiffusion-HPSv2-v0": {"base_model": "images/stable_diffusion", "reward": "images/hpsv2"},
    "flowgym/GaussianMixture-Binary-v0": {
        "base_model": "1d/gaussian_mixture",
        "reward": "1d/binary",
        "discretization_steps": 20,
        "action_scale": 5.0,
        "reward_scale": 10.0,
    },
    "flowgym/GaussianMixture-Gaussian-v0": {
        "base_model": "1d/gaussian_mixture",
        "reward": "1d/gaussian",
        "discretization_steps": 20,
        "action_scale": 5.0,
        "reward_scale": 30.0,
    },
    "flowgym/GaussianMixture-Gaussian2D-v0": {
        "base_model": "2d/gaussian_mixture",
        "reward": "2d/gaussian",
        "discretization_steps": 20,
        "action_scale": 5.0,
        "reward_scale": 50.0,
    },
}


def register_environments() -> None:
    """Register every ``flowgym/...`` id; safe to call again."""
    for id, kwargs in ENVIRONMENTS.items():
        if id not in gymnasium.registry:
            gymnasium.register(id, entry_point=DENOISING, vector_entry_point=DENOISING_VECTOR, kwargs=dict(kwargs))
