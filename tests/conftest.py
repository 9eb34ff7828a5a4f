"""Fixtures shared by all tests; nothing here or below touches the network."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import gymnasium
import hypothesis
import pytest
import torch

import flowgym_gym
from flowgym_gym.models.loading import load_base_model

# How long a case takes says nothing on a busy machine.
hypothesis.settings.register_profile("default", deadline=None)
hypothesis.settings.load_profile("default")

RED = "flowgym/StableDiffusion-Red-v0"
PROMPTS = ["a photo of a cat", "a red heart"]
ALL_IDS = sorted(id for id in gymnasium.registry if id.startswith("flowgym/"))


def differs_in_reward_only(id):
    """Whether an id is Red's but for the reward; tests/envs/test_reward_ids.py goes over those."""
    kwargs = gymnasium.spec(id).kwargs
    return kwargs.get("base_model") == "images/stable_diffusion" and kwargs.get("reward") != "images/red"


REWARD_IDS = [id for id in ALL_IDS if differs_in_reward_only(id)]
FLOWGYM_IDS = [id for id in ALL_IDS if id not in REWARD_IDS]


def reward_options(id, request):
    """Options with which an id of REWARD_IDS runs offline: small weights that a fixture saved, where it needs any."""
    return {}


def prompted(id):
    """Options that give an environment several prompts, if its model takes any."""
    return {} if "GaussianMixture" in id else {"prompts": PROMPTS}


@pytest.fixture(scope="session")
def model():
    """The embedded Stable Diffusion, as environments load it."""
    return load_base_model("images/stable_diffusion")


@pytest.fixture
def env():
    """A short episode on the embedded checkpoint."""
    env = gymnasium.make(RED, discretization_steps=4)
    yield env
    env.close()


@pytest.fixture
def torch_env():
    return flowgym_gym.make("images/stable_diffusion", "images/red", discretization_steps=5)


@pytest.fixture(autouse=True)
def _fixed_randomness():
    torch.manual_seed(0)
