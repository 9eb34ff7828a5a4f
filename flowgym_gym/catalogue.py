"""What this package has: base models, rewards and environment ids. The only place to add one.

A base model or a reward is a class, in a file of its own, and one line in its table here; an
environment id is one line in the last. ``flowgym-gym list``, the checks of options and the tests
over everything that is registered then know of it. Nothing is imported before it is used.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import gymnasium

from flowgym_gym.registry import Registry, base_model_registry, reward_registry

DENOISING = "flowgym_gym.envs.denoising:DenoisingEnv"
DENOISING_VECTOR = "flowgym_gym.envs.vector:DenoisingVectorEnv"


class Item(NamedTuple):
    """A base model or a reward.

    Attributes:
        where: Its class, ``"module:Class"`` within ``flowgym_gym``.
        needs: What it needs besides this package, in words.
        defaults: Arguments of the class that the id fixes.
    """

    where: str
    needs: str = ""
    defaults: dict[str, Any] = {}  # noqa: RUF012


def _pays(base_model: str, reward: str, **options: Any) -> dict[str, Any]:
    """The defaults of an environment id, as options of :func:`flowgym_gym.make`."""
    return {"base_model": base_model, "reward": reward, **options}


THREE = {
    "means": ((0.0, 0.0), (3.0, 0.0), (0.0, 3.0)),
    "stds": (1.0, 0.4, 0.4),
    "weights": (1.0, 1.0, 1.0),
}
SD = "images/stable_diffusion"
SHORT = {"discretization_steps": 20, "action_scale": 5.0}

# The id is "domain/name"; a base model goes with the rewards of its domain.
BASE_MODELS: dict[str, Item] = {
    "images/stable_diffusion": Item("models.stable_diffusion:StableDiffusionBaseModel"),
    "images/stable_diffusion_xl": Item("models.stable_diffusion_xl:StableDiffusionXLBaseModel"),
    "images/stable_diffusion_3": Item("models.stable_diffusion_3:StableDiffusion3BaseModel"),
    "images/flux": Item("models.flux:FluxBaseModel"),
    "images/pixart": Item("models.pixart:PixArtBaseModel"),
    "images/dit": Item("models.dit:DiTBaseModel"),
    "images/ddpm": Item("models.ddpm:DDPMBaseModel"),
    "1d/gaussian_mixture": Item("models.gaussian_mixture:GaussianMixtureBaseModel"),
    "2d/gaussian_mixture": Item("models.gaussian_mixture:GaussianMixtureBaseModel", defaults=THREE),
}

# Weights are never looked for, so what they were made with is named here.
REWARDS: dict[str, Item] = {
    "images/red": Item("rewards.images:RedReward"),
    "images/redness": Item("rewards.images:RednessReward"),
    "images/brightness": Item("rewards.images:BrightnessReward"),
    "images/colorfulness": Item("rewards.images:ColorfulnessReward"),
    "images/sharpness": Item("rewards.images:SharpnessReward"),
    "images/symmetry": Item("rewards.images:SymmetryReward"),
    "images/compression": Item("rewards.images:CompressionReward"),
    "images/incompression": Item("rewards.images:IncompressionReward"),
    "images/alignment": Item("rewards.alignment:AlignmentReward", "a prompt"),
    "images/clip_score": Item(
        "rewards.clip:CLIPScoreReward",
        "a prompt; weights: openai/clip-vit-large-patch14",
    ),
    "images/pickscore": Item(
        "rewards.clip:PickScoreReward",
        "a prompt; weights: yuvalkirstain/PickScore_v1, processor: "
        "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
    ),
    "images/aesthetic": Item(
        "rewards.clip:AestheticReward",
        "clip: openai/clip-vit-large-patch14, head: a file of sac+logos+ava1-l14-linearMSE or "
        "sa_0_4_vit_l_14_linear",
    ),
    "images/image_reward": Item(
        "rewards.preference:ImageRewardReward",
        "a prompt; weights: ImageReward-v1.0, tokenizer: google-bert/bert-base-uncased",
    ),
    "images/hpsv2": Item(
        "rewards.preference:HPSv2Reward",
        "a prompt; weights: v2.1, processor: laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
    ),
    "1d/binary": Item("rewards.vectors:BinaryReward"),
    "1d/gaussian": Item("rewards.vectors:GaussianReward"),
    "2d/gaussian": Item(
        "rewards.vectors:GaussianReward", defaults={"mean": (-2.0, -2.0), "std": 0.8}
    ),
}

# Rewards made of rewards, which score whatever those score: each is there in every domain.
COMPOSED: dict[str, Item] = {
    "weighted_sum": Item("rewards.compose:WeightedSum", "weights={id: number}"),
    "clip": Item("rewards.compose:Clip", "reward=, low= or high="),
    "standardize": Item("rewards.compose:Standardize", "reward="),
    "asynchronous": Item("rewards.asynchronous:Asynchronous", "reward="),
}
DOMAINS = ("images", "1d", "2d")

# `-v0` becomes `-v1` when a change can alter learning results.
ENVIRONMENTS: dict[str, dict[str, Any]] = {
    "flowgym/Denoising-v0": {},
    "flowgym/StableDiffusion-Red-v0": _pays(SD, "images/red"),
    "flowgym/StableDiffusion-Redness-v0": _pays(SD, "images/redness"),
    "flowgym/StableDiffusion-Brightness-v0": _pays(SD, "images/brightness"),
    "flowgym/StableDiffusion-Colorfulness-v0": _pays(SD, "images/colorfulness", reward_scale=0.5),
    "flowgym/StableDiffusion-Sharpness-v0": _pays(SD, "images/sharpness", reward_scale=2000.0),
    "flowgym/StableDiffusion-Symmetry-v0": _pays(SD, "images/symmetry", reward_scale=300.0),
    "flowgym/StableDiffusion-Compression-v0": _pays(SD, "images/compression", reward_scale=30.0),
    "flowgym/StableDiffusion-Incompression-v0": _pays(
        SD, "images/incompression", reward_scale=30.0
    ),
    "flowgym/StableDiffusionXL-Red-v0": _pays("images/stable_diffusion_xl", "images/red"),
    "flowgym/StableDiffusion3-Red-v0": _pays("images/stable_diffusion_3", "images/red"),
    "flowgym/Flux-Red-v0": _pays("images/flux", "images/red"),
    "flowgym/PixArt-Red-v0": _pays("images/pixart", "images/red"),
    "flowgym/DiT-Red-v0": _pays("images/dit", "images/red"),
    "flowgym/DDPM-Red-v0": _pays("images/ddpm", "images/red"),
    "flowgym/StableDiffusion-Alignment-v0": _pays(SD, "images/alignment"),
    "flowgym/StableDiffusion-ClipScore-v0": _pays(SD, "images/clip_score"),
    "flowgym/StableDiffusion-PickScore-v0": _pays(SD, "images/pickscore", reward_scale=10.0),
    "flowgym/StableDiffusion-Aesthetic-v0": _pays(SD, "images/aesthetic", reward_scale=10.0),
    "flowgym/StableDiffusion-ImageReward-v0": _pays(SD, "images/image_reward", reward_scale=10.0),
    "flowgym/StableDiffusion-HPSv2-v0": _pays(SD, "images/hpsv2"),
    "flowgym/GaussianMixture-Binary-v0": _pays(
        "1d/gaussian_mixture", "1d/binary", **SHORT, reward_scale=10.0
    ),
    "flowgym/GaussianMixture-Gaussian-v0": _pays(
        "1d/gaussian_mixture", "1d/gaussian", **SHORT, reward_scale=30.0
    ),
    "flowgym/GaussianMixture-Gaussian2D-v0": _pays(
        "2d/gaussian_mixture", "2d/gaussian", **SHORT, reward_scale=50.0
    ),
}


def register_all() -> None:
    """Register what the tables hold; what is registered already stays as it is."""
    composed = {f"{domain}/{name}": item for domain in DOMAINS for name, item in COMPOSED.items()}
    _register(base_model_registry, BASE_MODELS)
    _register(reward_registry, {**REWARDS, **composed})
    for id, kwargs in ENVIRONMENTS.items():
        if id not in gymnasium.registry:
            gymnasium.register(
                id,
                entry_point=DENOISING,
                vector_entry_point=DENOISING_VECTOR,
                kwargs=dict(kwargs),
            )


def _register(registry: Registry, items: dict[str, Item]) -> None:
    for id, item in items.items():
        if id not in registry:
            registry.register(id, f"flowgym_gym.{item.where}", needs=item.needs, **item.defaults)
