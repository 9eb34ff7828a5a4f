"""Latents stay float32 and states can be kept, whatever format a model or reward answers in."""

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import data_equivalence

import flowgym_gym
from flowgym_gym import FlowTensor, base_model_registry, reward_registry
from flowgym_gym.errors import ModelError
from flowgym_gym.models.gaussian_mixture import GaussianMixtureBaseModel
from flowgym_gym.rewards.base import Reward

DTYPES = [torch.float64, torch.bfloat16, torch.float16]


class Answering(GaussianMixtureBaseModel):
    """Answers in other number formats."""

    start = output = torch.float32

    def sample_p0(self, n, *, generator=None, **kwargs):
        x, kwargs = super().sample_p0(n, generator=generator, **kwargs)
        return x.to(self.start), kwargs

    def forward(self, x, t, **kwargs):
        assert x.dtype is torch.float32
        return super().forward(x, t).to(self.output)


class Scoring(Reward):
    """Scores in a number format of its own."""

    dtype = torch.float32

    def forward(self, x, **kwargs):
        rewards = x.data[:, 0].round()
        return rewards.to(self.dtype), torch.ones(len(x), dtype=torch.uint8)


@pytest.fixture
def options(monkeypatch):
    for registry, id, cls in (
        (base_model_registry, "1d/answering", Answering),
        (reward_registry, "1d/scoring", Scoring),
    ):
        monkeypatch.setattr(registry, "_entries", dict(registry._entries))
        registry.register(id, cls)
    return {"base_model": "1d/answering", "reward": "1d/scoring", "discretization_steps": 3}


def episode(options):
    env = gymnasium.make("flowgym/Denoising-v0", **options)
    record = [env.reset(seed=0)]
    for _ in range(3):
        state = env.unwrapped.get_state()
        assert state["latents"].dtype == np.float32
        env.unwrapped.set_state(state)
        record.append(env.step(np.full(1, 0.5, np.float32)))
        assert env.unwrapped.rollout.latents.dtype is torch.float32
    return record


@pytest.mark.parametrize("dtype", DTYPES)
def test_latents_stay_float32_whatever_a_model_answers_in(options, monkeypatch, dtype):
    expected = episode(options)
    monkeypatch.setattr(Answering, "output", dtype)
    found = episode(options)
    tolerance = 0 if dtype is torch.float64 else 0.05
    assert abs(found[-1][0]["latent"] - expected[-1][0]["latent"]) <= tolerance
    if dtype is torch.float64:  # the same numbers, in more digits
        assert data_equivalence(found, expected, exact=True)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.int32])
def test_latents_stay_float32_whatever_format_they_are_drawn_in(options, monkeypatch, dtype):
    monkeypatch.setattr(Answering, "start", dtype)
    episode(options)


@pytest.mark.parametrize("dtype", [torch.float64, torch.int64, torch.bool, torch.bfloat16])
def test_rewards_of_any_real_format_are_paid(options, monkeypatch, dtype):
    expected = episode(options)[-1]
    monkeypatch.setattr(Scoring, "dtype", dtype)
    _, reward, _, _, info = episode(options)[-1]
    assert type(reward) is type(info["terminal_reward"]) is float
    score = torch.tensor(expected[4]["terminal_reward"]).to(dtype).double().item()
    assert info["terminal_reward"] == score


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_torch_environment_keeps_float32_too(options, monkeypatch, dtype):
    monkeypatch.setattr(Answering, "start", dtype)
    monkeypatch.setattr(Answering, "output", dtype)
    env = flowgym_gym.make(**options)
    sample = env.sample(3, lambda x, t, **kwargs: FlowTensor(x.data.to(dtype)))
    assert {x.dtype for x in sample.trajectory} == {torch.float32}
    assert sample.control_costs.dtype is torch.float32
    x, _ = env.start(2)
    index = torch.zeros(2, dtype=torch.int64)
    output = env.predict(x, index)
    following, cost = env.advance(
        x.data, output.to(dtype), x.data.to(dtype), x.data.to(dtype), index
    )
    assert following.dtype is cost.dtype is torch.float32
    assert env.expected_endpoint(x.data, output.to(dtype), index).dtype is torch.float32
    assert (
        env.log_prob(x.data, output.to(dtype), x.data.to(dtype), following, index).dtype
        is torch.float32
    )


def test_complex_states_are_refused(options, monkeypatch):
    monkeypatch.setattr(Answering, "start", torch.complex64)
    with pytest.raises(
        ModelError, match=r"preprocess returned .* torch\.complex64 .* expected .* real"
    ):
        gymnasium.make("flowgym/Denoising-v0", **options).reset(seed=0)
