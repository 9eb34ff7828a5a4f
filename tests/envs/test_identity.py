"""Which environments a state belongs to."""

import json

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import data_equivalence

from flowgym_gym import (
    BaseModel,
    FlowTensor,
    OptimalTransportScheduler,
    base_model_registry,
    reward_registry,
)
from flowgym_gym.envs.environment import VelocityEnvironment
from flowgym_gym.envs.rollout import Rollout
from flowgym_gym.errors import StateError
from flowgym_gym.models.gaussian_mixture import GaussianMixtureBaseModel
from flowgym_gym.models.loading import from_pipeline, load_base_model
from flowgym_gym.rewards.images import RedReward
from flowgym_gym.rewards.loading import load_reward
from flowgym_gym.rewards.vectors import GaussianReward
from tests.conftest import RED
from tests.models import tiny

MIXTURE = "flowgym/GaussianMixture-Gaussian-v0"
# What get_state wrote before the arguments of base model and reward were part of it.
BRIEF = {
    MIXTURE: {
        "action_scale": 5.0,
        "action_type": "velocity",
        "base_model": "1d/gaussian_mixture",
        "checkpoint": "None",
        "control_cost_weight": 1.0,
        "distilled_guidance": None,
        "guidance_scale": None,
        "negative_prompt": None,
        "noise_level": 1.0,
        "noise_schedule": None,
        "reward": "1d/gaussian",
        "reward_scale": 30.0,
        "sampler": "ddim",
    },
    RED: {
        "action_scale": 1.0,
        "action_type": "velocity",
        "base_model": "images/stable_diffusion",
        "checkpoint": "tiny",
        "control_cost_weight": 1.0,
        "distilled_guidance": None,
        "guidance_scale": 1.0,
        "negative_prompt": "",
        "noise_level": 1.0,
        "noise_schedule": None,
        "reward": "images/red",
        "reward_scale": 100.0,
        "sampler": "ddim",
    },
}


def make(id, **options):
    options = {"discretization_steps": 2, **({"action_scale": 1.0} if id == RED else {}), **options}
    return gymnasium.make(id, **options).unwrapped


def begun(id, **options):
    env = make(id, **options)
    env.reset(seed=0)
    return env


def fits(state, env):
    """Whether an environment takes a state, and says which setting differs where it does not."""
    try:
        env.set_state(state)
    except StateError as error:
        found = str(error)
    else:
        return True
    assert "the state is of an environment with" in found, found
    return found


@pytest.fixture(scope="module")
def lora(tmp_path_factory):
    from diffusers import StableDiffusionPipeline, UNet2DConditionModel
    from peft import LoraConfig, get_peft_model_state_dict

    unet = UNet2DConditionModel.from_pretrained(tiny.folder("stable_diffusion"), subfolder="unet")
    unet.add_adapter(LoraConfig(r=1, target_modules=["to_q"], init_lora_weights=False))
    folder = tmp_path_factory.mktemp("lora")
    StableDiffusionPipeline.save_lora_weights(folder, get_peft_model_state_dict(unet))
    return str(folder)


MIXTURE_CHANGES = [
    {"reward_kwargs": {"std": 0.5}},
    {"reward_kwargs": {"mean": [-2.0]}},
    {"base_model_kwargs": {"means": [[0.0], [2.5]]}},
    {"base_model_kwargs": {"stds": [1.0, 0.5]}},
    {
        "base_model_kwargs": {"schedule": "cosine", "output_type": "epsilon"},
        "discretization_steps": [0.2, 0.5],
    },
]


@pytest.mark.parametrize("options", MIXTURE_CHANGES)
def test_states_of_other_mixtures_and_rewards_are_refused(options):
    steps = {"discretization_steps": options.get("discretization_steps", 2)}
    state = begun(MIXTURE, **steps).get_state()
    other = begun(MIXTURE, **options)
    name = next(iter(next(iter(options.values()))))
    assert f"/{name} = " in fits(state, other)
    assert f"/{name} = " in fits(other.get_state(), make(MIXTURE, **steps))
    assert fits(other.get_state(), make(MIXTURE, **options)) is True


@pytest.mark.parametrize("options", [{}, *MIXTURE_CHANGES])
def test_a_state_of_today_is_still_taken_by_the_environment_that_made_it(options):
    """States of old checkpoints say less of their environment; what they say decides."""
    env = begun(MIXTURE, **options)
    state = {**env.get_state(), "settings": np.array(json.dumps(BRIEF[MIXTURE]))}
    expected = env.step(np.zeros(1, np.float32)), env.reset()
    twin = make(MIXTURE, **options)
    twin.set_state(state)
    assert data_equivalence(
        (twin.step(np.zeros(1, np.float32)), twin.reset()), expected, exact=True
    )
    for name, value in (("reward", "1d/binary"), ("noise_level", 0.5), ("action_type", "noise")):
        other = {**state, "settings": np.array(json.dumps({**BRIEF[MIXTURE], name: value}))}
        assert f"{name} = {value!r}" in fits(other, twin)


def test_a_state_of_today_with_a_pipeline_is_still_taken():
    env = begun(RED)
    state = {**env.get_state(), "settings": np.array(json.dumps(BRIEF[RED]))}
    assert fits(state, make(RED)) is True
    other = {
        **state,
        "settings": np.array(json.dumps({**BRIEF[RED], "checkpoint": "models/other"})),
    }
    assert "checkpoint = 'models/other', but this one has 'tiny'" in fits(other, make(RED))


def test_arguments_that_are_written_out_as_their_defaults_are_the_same():
    state = begun(MIXTURE).get_state()
    for options in (
        {"reward_kwargs": {"mean": (-2.5,), "std": 0.8}},
        {"reward_kwargs": {"mean": np.array([-2.5])}},
        {"base_model_kwargs": {"means": ((0, ), (3, )), "output_type": "velocity"}},
        {"base_model_kwargs": {"stds": torch.tensor([1.0, 0.4], dtype=torch.float64)}},
        {"device": "cpu"},
        {"base_model_kwargs": {"device": torch.device("cpu")}},
    ):  # fmt: skip
        assert fits(state, make(MIXTURE, **options)) is True
    two = "flowgym/GaussianMixture-Gaussian2D-v0"
    assert fits(begun(two).get_state(), make(two, reward_kwargs={"std": 0.8})) is True
    found = fits(
        begun(two, reward_kwargs={"std": 0.8}).get_state(), make(two, reward_kwargs={"std": 0.9})
    )
    assert "reward/std = its default, but this one has 0.9" in found


def test_what_changes_no_episode_is_no_setting():
    state = begun(RED, prompts=["a photo of a cat"]).get_state()
    for options in (
        {"decode_batch_size": 1},
        {"memory": ["attention_slicing"]},
        {"memory": "vae_slicing"},
        {"prompts": "a red heart"},
        {"height": 64, "width": 64},
        {"lora_scale": 0.5},
        {"checkpoint": "tiny", "guidance_scale": 1, "negative_prompt": "", "dtype": "float32"},
        {"reward_kwargs": {}},
    ):
        assert fits(state, make(RED, **options)) is True


def test_states_of_pipelines_with_other_parts_are_refused(lora):
    folder = tiny.folder("stable_diffusion")
    options = {"checkpoint": folder}
    state = begun(RED, **options).get_state()
    for change in (
        {"lora": lora},
        {"vae": f"{folder}/vae"},
        {"denoiser": f"{folder}/unet"},
    ):
        (name,) = change
        other = begun(RED, **options, **change)
        assert f"base_model/{name} = " in fits(state, other)
        assert f"base_model/{name} = " in fits(other.get_state(), make(RED, **options))
        assert fits(other.get_state(), other) is True
    assert "base_model/dtype" in fits(begun(RED, dtype="bfloat16").get_state(), make(RED))


def test_a_folder_has_many_names(tmp_path, monkeypatch):
    folder = tiny.folder("stable_diffusion")
    (tmp_path / "link").symlink_to(folder)
    monkeypatch.chdir(tmp_path)
    state = begun(RED, checkpoint=folder).get_state()
    for name in ("link", f"{folder}/", tmp_path / "link"):
        assert fits(state, make(RED, checkpoint=name)) is True


def test_states_of_other_open_pipelines_are_refused():
    from diffusers import StableDiffusionPipeline

    folder = tiny.folder("stable_diffusion")

    def opened(change=None):
        pipe = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
        if change is not None:
            with torch.no_grad():
                change(pipe)
        return pipe

    def everywhere(pipe):
        pipe.vae.post_quant_conv.weight += 1

    def in_the_middle(pipe):
        pipe.unet.mid_block.resnets[0].conv1.weight[1, 1] += 1

    def order(pipe):
        weight = pipe.unet.mid_block.resnets[0].conv1.weight
        weight[1:-1] = weight[1:-1].flip(0)

    def by_hand(**options):
        return rollout(from_pipeline(opened(**options)), RedReward())

    state = by_hand().get_state()
    assert fits(state, by_hand()) is True
    for change in (everywhere, in_the_middle, order):
        assert "base_model/weights = " in fits(state, by_hand(change=change))
    assert len(str(state["settings"])) < 2000


class Weighed(BaseModel[FlowTensor]):
    """A network of one's own."""

    output_type = "velocity"

    def __init__(self, weight, device=None):
        super().__init__(device)
        self.layer = torch.nn.Linear(1, 1)
        for parameter in self.layer.parameters():
            torch.nn.init.constant_(parameter, weight)

    @property
    def scheduler(self):
        return OptimalTransportScheduler()

    def sample_p0(self, n, **kwargs):
        return FlowTensor(torch.randn(n, 1)), kwargs

    def forward(self, x, t, **kwargs):
        return FlowTensor(self.layer.weight * x.data)


def rollout(model, reward):
    """Episodes of an environment that is made by hand."""
    made = Rollout(VelocityEnvironment(model, reward, 2))
    made.seed([0], [0])
    made.reset([0])
    return made


def test_environments_made_by_hand_are_told_apart_by_what_can_be_had():
    mixture, reward = GaussianMixtureBaseModel(), GaussianReward()
    state = rollout(mixture, reward).get_state()
    assert (
        fits(state, rollout(GaussianMixtureBaseModel(device="cpu"), GaussianReward(std=0.8)))
        is True
    )
    assert "base_model/stds" in fits(
        state, rollout(GaussianMixtureBaseModel(stds=(1.0, 0.5)), reward)
    )
    assert "reward/std" in fits(state, rollout(mixture, GaussianReward(std=0.5)))
    state = rollout(Weighed(1.0), reward).get_state()
    assert fits(state, rollout(Weighed(1.0), reward)) is True
    assert "base_model/weights" in fits(state, rollout(Weighed(2.0), reward))


def test_a_class_says_itself_which_of_its_arguments_are_incidental(monkeypatch):
    for registry in (base_model_registry, reward_registry):
        monkeypatch.setattr(registry, "_entries", dict(registry._entries))

    class Hasty(GaussianReward):
        incidental = (*GaussianReward.incidental, "threads")

        def __init__(self, mean=(-2.5,), std=0.8, threads=1):
            super().__init__(mean, std)

    reward_registry.register("1d/hasty", Hasty)

    def env(**reward_kwargs):
        return begun("flowgym/Denoising-v0", base_model="1d/gaussian_mixture", reward="1d/hasty",
                     action_scale=1.0, reward_kwargs=reward_kwargs)  # fmt: skip

    state = env(threads=4).get_state()
    assert fits(state, env(threads=2)) is True
    assert "reward/std" in fits(state, env(std=0.5))


def test_composed_rewards_are_compared_by_their_parts():
    def env(**reward_kwargs):
        return begun(
            "flowgym/Denoising-v0",
            base_model="1d/gaussian_mixture",
            action_scale=1.0,
            **reward_kwargs,
        )

    first = {"reward": "1d/weighted_sum", "reward_kwargs": {"weights": {"1d/gaussian": 1.0}}}
    second = {"reward": "1d/weighted_sum", "reward_kwargs": {"weights": {"1d/gaussian": 2.0}}}
    assert fits(env(**first).get_state(), env(**first)) is True
    assert "reward/weights = {'1d/gaussian': 1.0}" in fits(env(**first).get_state(), env(**second))
    named, alone = ({"reward": "1d/clip", "reward_kwargs": {"reward": r, "low": 0}} for r in
                    ({"id": "1d/gaussian"}, "1d/gaussian"))  # fmt: skip
    assert fits(env(**named).get_state(), env(**alone)) is True
    written_out = {
        "reward": "1d/clip",
        "reward_kwargs": {"reward": {"id": "1d/gaussian", "std": 0.8}, "low": 0},
    }
    assert fits(env(**named).get_state(), env(**written_out)) is True
    for same in ({}, {"1d/gaussian": {}}, {"1d/gaussian": {"std": 0.8}}):
        other = {**first, "reward_kwargs": {**first["reward_kwargs"], "reward_kwargs": same}}
        assert fits(env(**first).get_state(), env(**other)) is True
    other["reward_kwargs"]["reward_kwargs"] = {"1d/gaussian": {"std": 0.9}}
    assert "0.9" in fits(env(**first).get_state(), env(**other))


def test_the_parts_of_an_environment_are_what_it_was_made_with():
    env = make(MIXTURE, reward_kwargs={"std": 0.5}).environment
    assert env.reward is load_reward("1d/gaussian", std=0.5)
    assert env.base_model is load_base_model("1d/gaussian_mixture")
    assert env.settings()["reward/std"] == 0.5
    assert "base_model/means" not in env.settings()


@pytest.mark.parametrize(
    ("name", "factor"), [("action_scale", 1 + 1e-4), ("reward_scale", 1 + 1e-9)]
)
def test_only_a_scale_that_follows_from_the_grid_may_be_rounded_differently(name, factor):
    env = gymnasium.make(RED, discretization_steps=2).unwrapped
    env.reset(seed=0)
    state = env.get_state()
    settings = json.loads(str(state["settings"]))
    rounded = {**settings, "action_scale": np.nextafter(settings["action_scale"], 1.0)}
    env.set_state({**state, "settings": np.array(json.dumps(rounded))})
    other = {**settings, name: settings[name] * factor}
    with pytest.raises(StateError, match=rf"{name} = "):
        env.set_state({**state, "settings": np.array(json.dumps(other))})
