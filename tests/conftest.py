"""Fixtures shared by all tests; nothing here or below touches the network."""

import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
if "PYTEST_XDIST_WORKER" in os.environ:  # Processes side by side have a core each.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import gymnasium
import hypothesis
import pytest
import torch

import flowgym_gym
from flowgym_gym import base_model_registry, reward_registry
from flowgym_gym.models.loading import load_base_model

# A plugin that registers an id when it is imported, which looking for doctests would do.
collect_ignore = ["toy.py"]

# How long a case takes says nothing on a busy machine.
hypothesis.settings.register_profile("explore", deadline=None)
# The same code passes or fails each time; --hypothesis-profile=explore draws other examples.
hypothesis.settings.register_profile("default", deadline=None, derandomize=True)
hypothesis.settings.load_profile("default")

# The longest files by what they take, so that none of them is the last to begin.
LONGEST = (
    "optimal_control/test_optimal_control.py", "test_readme.py", "agents/frontier/test_frontier.py",
    "models/test_families.py", "agents/runs/test_training.py", "agents/runs/test_damaged.py",
    "envs/test_denoising.py",
    "envs/test_checker.py", "envs/test_state.py", "models/test_lora.py", "agents/runs/test_contents.py",
    "agents/runs/test_nothing_is_lost.py", "agents/runs/test_selection.py", "models/test_fitting.py",
    "interop/test_gymnasium_wrappers.py", "test_cli.py", "envs/test_bad_input.py",
    "agents/runs/test_failures.py",
)  # fmt: skip


def pytest_collection_modifyitems(items):
    order = {Path(__file__).parent / name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path, len(order)))


def further(*cases):
    """Cases that show the promise of those before them once more, for the second lane."""
    return [
        pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.second)
        for case in cases
    ]


RED = "flowgym/StableDiffusion-Red-v0"
PROMPTS = ["a photo of a cat", "a red heart"]
ALL_IDS = sorted(id for id in gymnasium.registry if id.startswith("flowgym/"))


def differs_in_reward_only(id):
    """Whether an id is Red's but for the reward; tests/envs/test_reward_ids.py goes over those."""
    kwargs = gymnasium.spec(id).kwargs
    return (
        kwargs.get("base_model") == "images/stable_diffusion"
        and kwargs.get("reward") != "images/red"
    )


REWARD_IDS = [id for id in ALL_IDS if differs_in_reward_only(id)]
FLOWGYM_IDS = [id for id in ALL_IDS if id not in REWARD_IDS]


def reward_options(id, request):
    """Options with which an id of REWARD_IDS runs offline: small weights that a fixture saves,
    where it needs any.
    """
    if not wants_weights(id):
        return {}
    return {
        "reward_kwargs": request.getfixturevalue("small_weights")[
            gymnasium.spec(id).kwargs["reward"]
        ]
    }


def wants_weights(id):
    """Whether the reward of an id has weights, which the user names."""
    needs = reward_registry.get(gymnasium.spec(id).kwargs.get("reward", "images/red")).needs
    return "weights:" in needs or "head:" in needs


@pytest.fixture(scope="session")
def small_weights(tmp_path_factory):
    """Arguments of the rewards that need weights, with small models, by id."""
    from tests.rewards.small_weights import save_all

    return save_all(tmp_path_factory.mktemp("small_weights"))


def model_of(id):
    """The registered base model of an id: its name without the domain, and its entry."""
    entry = base_model_registry.get(
        gymnasium.spec(id).kwargs.get("base_model", "images/stable_diffusion")
    )
    return entry.id.partition("/")[2], entry


def wants_checkpoint(id):
    """Whether the base model of an id has no checkpoint in the package, so that the user names one."""
    return getattr(model_of(id)[1].cls, "default_checkpoint", "") is None


def tiny_options(id):
    """Options with which an id whose family has no checkpoint in the package opens a tiny one with
    random weights.
    """
    if not wants_checkpoint(id):
        return {}
    name, _ = model_of(id)
    from tests.models import tiny

    return {"checkpoint": tiny.folder(name), **tiny.OPTIONS.get(name, {})}


def prompted(id):
    """Options that give an environment several prompts, if its model takes any."""
    _, entry = model_of(id)
    if "prompts" not in (entry.options() or ()):
        return {}
    classes = getattr(entry.cls, "default_prompt", "").isdecimal()
    return {"prompts": ["1", "2"] if classes else PROMPTS}


@pytest.fixture(autouse=True)
def _tiny_checkpoints(request, monkeypatch):
    """Give ids without a checkpoint a tiny one in the tests that are parametrised over them."""
    callspec = getattr(request.node, "callspec", None)
    for id in callspec.params.values() if callspec else ():
        if isinstance(id, str) and id in FLOWGYM_IDS:
            for name, value in tiny_options(id).items():
                monkeypatch.setitem(gymnasium.registry[id].kwargs, name, value)


@pytest.fixture
def model():
    """The embedded Stable Diffusion, the very one that environments share."""
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
