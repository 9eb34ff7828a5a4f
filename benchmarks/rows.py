"""What is timed: every row is one way to denoise a batch from noise to scored pictures.

A row is opened for a case (a checkpoint, a device, a number of sub-environments and of steps) and
then runs episodes; opening, which loads the network and starts worker processes, is not timed.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import gymnasium
import numpy as np
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from gymnasium.vector import AsyncVectorEnv, SyncVectorEnv

import flowgym_gym
from flowgym_gym.agents import SB3VecEnv
from flowgym_gym.agents.runs.environments import make_vector_env
from flowgym_gym.agents.runs.presets import load_preset
from flowgym_gym.agents.sb3.algorithms import make_algorithm
from flowgym_gym.models.loading import load_base_model

ID = "flowgym_gym:flowgym/StableDiffusion-Red-v0"
DECODE_BATCH = 8
PROMPT = "a photo of a cat"


@dataclass(frozen=True)
class Case:
    """What every row of one comparison has in common.

    Attributes:
        checkpoint: Name or folder.
        num_envs: Number of sub-environments, or of pictures.
        steps: Denoising steps of an episode.
        device: Where the network runs.
        dtype: Its number format.
    """

    checkpoint: str
    num_envs: int
    steps: int
    device: str = "cpu"
    dtype: str = "float32"

    @property
    def options(self) -> dict[str, Any]:
        """Arguments of the environments."""
        return {
            "checkpoint": self.checkpoint,
            "prompts": PROMPT,
            "discretization_steps": self.steps,
            "device": self.device,
            "dtype": self.dtype,
            "decode_batch_size": DECODE_BATCH,
        }

    @property
    def pipe(self) -> StableDiffusionPipeline:
        """The pipeline that the environments use too, so that every row runs the very same
        network.
        """
        model = load_base_model(
            "images/stable_diffusion", **{k: v for k, v in self.options.items() if "steps" not in k}
        )
        return model.pipe


Episode = Callable[[], int]


@dataclass(frozen=True)
class Row:
    """One way to denoise.

    Attributes:
        key: Short name, as in the results file.
        title: What it is.
        open: Context manager from a case to a function that runs an episode and returns the number
            of steps of all sub-environments together.
        largest: Largest number of sub-environments it is run with, where more would only repeat the
            same.
        here: Whether the network that the rows share is what it calls, in this process.
    """

    key: str
    title: str
    open: Callable[[Case], object]
    largest: int = 10**9
    here: bool = True


@contextmanager
def bare_loop(case: Case) -> Iterator[Episode]:
    """The scheduler of diffusers, the network and the decoder, and nothing else."""
    pipe = case.pipe
    unet, vae, dtype = pipe.unet, pipe.vae, getattr(torch, case.dtype)
    ddim = DDIMScheduler.from_config(pipe.scheduler.config)
    ddim.set_timesteps(case.steps)
    shape = (
        case.num_envs,
        unet.config.in_channels,
        unet.config.sample_size,
        unet.config.sample_size,
    )
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        embeddings, _ = pipe.encode_prompt(PROMPT, case.device, case.num_envs, False)

    def episode() -> int:
        with torch.inference_mode():
            x = torch.randn(shape, generator=generator).to(case.device)
            for k in ddim.timesteps:
                output = unet(x.to(dtype), k, embeddings, return_dict=False)[0].float()
                noise = torch.randn(shape, generator=generator).to(case.device)
                x = ddim.step(output, k, x, eta=1.0, variance_noise=noise, return_dict=False)[0]
            latents = (x / vae.config.scaling_factor).to(dtype)
            pictures = torch.cat(
                [vae.decode(part, return_dict=False)[0] for part in latents.split(DECODE_BATCH)]
            )
            (pictures.float() / 2 + 0.5).clamp(0, 1)[:, 0].mean(dim=(1, 2)).cpu()
        return case.num_envs * case.steps

    yield episode


@contextmanager
def pipeline(case: Case) -> Iterator[Episode]:
    """The pipeline of diffusers with its DDIM scheduler, which decodes all pictures at once."""
    source = case.pipe
    pipe = StableDiffusionPipeline(
        **{**source.components, "scheduler": DDIMScheduler.from_config(source.scheduler.config)},
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)

    def episode() -> int:
        pictures = pipe(
            [PROMPT] * case.num_envs,
            num_inference_steps=case.steps,
            guidance_scale=1.0,
            eta=1.0,
            output_type="pt",
        ).images
        pictures[:, 0].float().mean(dim=(1, 2)).cpu()
        return case.num_envs * case.steps

    yield episode


@contextmanager
def torch_environment(case: Case) -> Iterator[Episode]:
    """``sample`` of the torch-native environment."""
    options = dict(case.options)
    env = flowgym_gym.make(
        "images/stable_diffusion",
        "images/red",
        int(options.pop("discretization_steps")),
        reward_scale=100,
        **options,
    )

    def episode() -> int:
        env.sample(case.num_envs).rewards.cpu()
        return case.num_envs * case.steps

    yield episode


@contextmanager
def relative(case: Case) -> Iterator[Episode]:
    """``sample`` of the library diffusiongym on the same network, where it can be imported."""
    from benchmarks.relative import environment

    env = environment(case.pipe, PROMPT, case.steps, DECODE_BATCH)

    def episode() -> int:
        with torch.inference_mode():
            env.sample(case.num_envs, pbar=False)
        return case.num_envs * case.steps

    yield episode


def _zero_actions(
    envs: Any, shape: tuple[int, ...] | None, case: Case, reset: bool = True
) -> Episode:
    actions = np.zeros(shape or (), np.float32)

    def episode() -> int:
        if reset:
            envs.reset()
        for _ in range(case.steps):
            envs.step(actions)
        return case.num_envs * case.steps

    return episode


def _denoising_vector(**options: Any) -> Callable[[Case], object]:
    @contextmanager
    def open_(case: Case) -> Iterator[Episode]:
        envs = gymnasium.make_vec(ID, num_envs=case.num_envs, **case.options, **options)
        yield _zero_actions(envs, envs.action_space.shape, case)
        envs.close()

    return open_


@contextmanager
def sb3_environment(case: Case) -> Iterator[Episode]:
    """The same through ``SB3VecEnv``, which resets in the last step of an episode."""
    envs = SB3VecEnv(
        gymnasium.make_vec(ID, num_envs=case.num_envs, autoreset_mode="SameStep", **case.options)
    )
    envs.reset()
    yield _zero_actions(envs, (case.num_envs, *(envs.action_space.shape or ())), case, reset=False)
    envs.close()


def _gymnasium_vector(cls: Callable[..., Any]) -> Callable[[Case], object]:
    @contextmanager
    def open_(case: Case) -> Iterator[Episode]:
        envs = cls(
            [lambda: gymnasium.make(ID, disable_env_checker=True, **case.options)] * case.num_envs
        )
        yield _zero_actions(envs, envs.action_space.shape, case)
        envs.close()

    return open_


@contextmanager
def training(case: Case) -> Iterator[Episode]:
    """A PPO training run: roll-outs, the policy's own calls, and updates, as many per step as in
    the preset.
    """
    env_id = ID.partition(":")[2]
    settings = load_preset(env_id, "ppo")
    settings = replace(settings, env={**settings.env, **case.options}, num_envs=case.num_envs)
    hyper = settings.algo
    episodes = max(1, -(-hyper["batch_size"] // (case.num_envs * case.steps)))
    hyper["n_steps"] = episodes * case.steps
    envs = SB3VecEnv(make_vector_env(env_id, settings, case.num_envs))
    agent = make_algorithm("ppo", envs, settings, seed=0)

    def episode() -> int:
        agent.learn(case.num_envs * hyper["n_steps"], reset_num_timesteps=False)
        return int(case.num_envs * hyper["n_steps"])

    yield episode
    envs.close()


def available(row: Row) -> bool:
    """Whether what a row needs can be imported."""
    if row.key != "diffusiongym":
        return True
    try:
        importlib.import_module("benchmarks.relative")
    except Exception as error:
        print(
            f"diffusiongym cannot be imported ({type(error).__name__}: {error}); its row is left "
            "out",
            file=sys.stderr,
        )
        return False
    return True


BARE = "bare"
ROWS = (
    Row(BARE, "bare loop: diffusers' scheduler, network, decoder", bare_loop),
    Row("pipeline", "diffusers' StableDiffusionPipeline", pipeline),
    Row("sample", "flowgym_gym.make(...).sample", torch_environment),
    Row("diffusiongym", "diffusiongym's env.sample", relative),
    Row("vector", "DenoisingVectorEnv", _denoising_vector()),
    Row(
        "compiled",
        "DenoisingVectorEnv with compile=True",
        _denoising_vector(compile=True),
        here=False,
    ),
    Row("sb3", "SB3VecEnv", sb3_environment),
    Row(
        "sync", "SyncVectorEnv of single environments", _gymnasium_vector(SyncVectorEnv), largest=16
    ),
    Row(
        "async",
        "AsyncVectorEnv of single environments",
        _gymnasium_vector(AsyncVectorEnv),
        largest=4,
        here=False,
    ),
    Row("ppo", "PPO training run", training),
)
