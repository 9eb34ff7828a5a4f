"""Rewards made of other rewards: sums, bounds and statistics per prompt, from plain data, against
numpy.
"""

import copy
import pickle

import gymnasium
import numpy as np
import pytest
import torch

from flowgym_gym import FlowTensor, Reward
from flowgym_gym.errors import (
    OptionError,
    RewardError,
    StateError,
    UnknownIdError,
    UnknownOptionError,
)
from flowgym_gym.rewards.compose import Clip, Standardize, WeightedSum
from flowgym_gym.rewards.loading import load_reward
from tests.conftest import PROMPTS, RED

PROMPT_LIST = ["cat", "dog", "cat", "cat", "dog", "owl"]


def pictures(n=6, seed=0):
    return FlowTensor(torch.rand(n, 3, 8, 8, generator=torch.Generator().manual_seed(seed)))


class Brittle(Reward):
    """Takes the mean of the picture; dark pictures are invalid."""

    def forward(self, x, **kwargs):
        means = x.data.mean(dim=(1, 2, 3))
        return means, means > 0.5


def test_a_weighted_sum_is_the_sum_of_its_parts():
    x = pictures()
    reward = load_reward(
        "images/weighted_sum",
        weights={"images/redness": 2.0, "images/incompression": -0.5},
        reward_kwargs={"images/incompression": {"units": "kilobytes"}},
    )
    redness = load_reward("images/redness")(x)[0].numpy()
    size = load_reward("images/incompression", units="kilobytes")(x)[0].numpy()
    np.testing.assert_allclose(reward(x)[0], 2 * redness - 0.5 * size, rtol=1e-5)
    assert reward.value_range == (-float("inf"), 2.0)
    assert not reward.differentiable
    assert WeightedSum({"images/red": 1.0}).differentiable
    torch.testing.assert_close(
        WeightedSum({"images/red": 1.0})(x)[0], load_reward("images/red")(x)[0]
    )


def test_a_sum_is_valid_where_all_its_parts_are(monkeypatch):
    from flowgym_gym import reward_registry

    monkeypatch.setitem(reward_registry._entries, "images/brittle", None)
    del reward_registry._entries["images/brittle"]
    reward_registry.register("images/brittle", Brittle)
    try:
        x = FlowTensor(torch.tensor([0.2, 0.9])[:, None, None, None].expand(2, 3, 8, 8))
        assert WeightedSum({"images/red": 1.0, "images/brittle": 0.0})(x)[1].tolist() == [
            False,
            True,
        ]
    finally:
        del reward_registry._entries["images/brittle"]


def test_parts_may_be_composed_themselves():
    x = pictures()
    inner = {"id": "images/weighted_sum", "weights": {"images/red": 3.0}}
    reward = load_reward(
        "images/clip", reward={"id": "images/clip", "reward": inner, "high": 1.5}, low=1.45
    )
    expected = (3 * x.data[:, 0].mean(dim=(1, 2))).clamp(1.45, 1.5)
    torch.testing.assert_close(reward(x)[0], expected)
    assert len(expected.unique()) > 1
    assert reward.value_range == (1.45, 1.5)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: WeightedSum({}), OptionError, "expected rewards' ids with their weights"),
        (
            lambda: WeightedSum({"images/red": float("nan")}),
            OptionError,
            r"weights\['images/red'\] is nan",
        ),
        (lambda: WeightedSum({"images/rde": 1.0}), UnknownIdError, "did you mean 'images/red'"),
        (
            lambda: WeightedSum({"images/red": 1.0}, {"images/redness": {}}),
            OptionError,
            r"arguments of \['images/red",
        ),
        (
            lambda: WeightedSum({"images/red": 1.0}, {"images/red": {"x": 1}}),
            UnknownOptionError,
            "no option 'x'",
        ),
        (lambda: Clip("images/red"), OptionError, "expected a bound at least"),
        (lambda: Clip("images/red", 1.0, 0.0), OptionError, r"low is 1\.0 and high 0\.0"),
        (lambda: Clip(3, 1.0), OptionError, "part of the reward is 3, expected a reward's id"),
        (
            lambda: Standardize("images/red", min_count=40),
            OptionError,
            "min_count is 40, expected a whole number",
        ),
        (lambda: Standardize("images/red", buffer_size=1), OptionError, "buffer_size is 1"),
    ],
)
def test_bad_compositions_are_named(make, error, message):
    with pytest.raises(error, match=message):
        make()


def ddpo(history, batch, window, least):
    """What DDPO's tracker gives for a batch, written with lists: standardised by the prompt's last
    rewards.
    """
    result = []
    for prompt, value in batch:
        own = [v for p, v in history + batch if p == prompt][-window:]
        known = own if len(own) >= least else [v for _, v in history + batch][-window:]
        result.append((value - np.mean(known)) / (np.std(known) + 1e-6))
    return result


def test_standardized_rewards_are_those_of_a_running_mean_and_std_of_each_prompt():
    reward, red = Standardize("images/red", buffer_size=5, min_count=3), load_reward("images/red")
    history = []
    for seed in range(4):
        x = pictures(seed=seed)
        batch = list(zip(PROMPT_LIST, red(x)[0].double().tolist(), strict=True))
        expected = ddpo(history, batch, window=5, least=3)
        np.testing.assert_allclose(reward(x, prompt=PROMPT_LIST)[0], expected, rtol=1e-3, atol=1e-4)
        history += batch
    own = [v for p, v in history if p == "cat"][-5:]
    assert reward.statistics("cat") == pytest.approx((np.mean(own), np.std(own) + 1e-6))


def test_one_memory_for_all_prompts_needs_no_prompt():
    x = pictures()
    values = load_reward("images/red")(x)[0].double().numpy()
    scores = Standardize("images/red", per_prompt=False, min_count=2)(x)[0]
    np.testing.assert_allclose(scores, (values - values.mean()) / values.std(), rtol=1e-3)
    with pytest.raises(RewardError, match="Standardize needs the prompt of each sample"):
        Standardize("images/red")(x)


def test_invalid_samples_are_not_remembered():
    reward = Standardize(Brittle(), per_prompt=False, min_count=2)
    levels = torch.tensor([0.1, 0.6, 0.8])
    reward(FlowTensor(levels[:, None, None, None].expand(3, 3, 4, 4)))
    assert reward.statistics() == pytest.approx((0.7, 0.1 + 1e-6))


def test_a_frozen_reward_remembers_no_more_and_an_empty_one_changes_nothing():
    x, reward = pictures(), Standardize("images/red")
    reward.freeze()
    torch.testing.assert_close(reward(x, prompt=PROMPT_LIST)[0], load_reward("images/red")(x)[0])
    assert reward.get_state()["everything"].size == 0


def test_a_restored_state_goes_on_as_if_nothing_had_happened(tmp_path):
    nested = {
        "id": "images/clip",
        "reward": {"id": "images/standardize", "reward": "images/red", "min_count": 2},
    }
    first, second = (
        load_reward("images/clip", reward=nested | {"low": -1.0}, high=1.0) for _ in range(2)
    )
    assert first.stateful
    assert first is not second
    for seed in range(3):
        first(pictures(seed=seed), prompt=PROMPT_LIST)
    np.savez(tmp_path / "state.npz", **first.get_state())
    with np.load(tmp_path / "state.npz", allow_pickle=False) as state:
        second.set_state(state)
    x = pictures(seed=9)
    fresh = load_reward("images/clip", reward=nested | {"low": -1.0}, high=1.0)(
        x, prompt=PROMPT_LIST
    )[0]
    expected = first(x, prompt=PROMPT_LIST)[0]
    torch.testing.assert_close(second(x, prompt=PROMPT_LIST)[0], expected, rtol=0, atol=0)
    assert not torch.equal(fresh, expected)


def test_damaged_statistics_are_named():
    reward = Standardize("images/red")
    reward(pictures(), prompt=PROMPT_LIST)
    state = reward.get_state()
    for damaged in (
        {},
        {**state, "counts": state["counts"] + 1},
        {**state, "prompts": state["prompts"][:1]},
    ):
        with pytest.raises(StateError, match="statistics of Standardize are damaged"):
            Standardize("images/red").set_state(damaged)


STANDARDIZED = {
    "reward": "images/standardize",
    "reward_kwargs": {"reward": "images/red", "min_count": 2},
}


def finish(env, seed):
    env.reset(seed=seed)
    for _ in range(2):
        *_, info = env.step(np.zeros(env.action_space.shape, np.float32))
    return info["terminal_reward"]


def test_environments_made_from_plain_data_pay_composed_rewards():
    weights = {"images/redness": 1.0, "images/brightness": 5.0}
    options = {
        "reward": "images/weighted_sum",
        "reward_kwargs": {"weights": weights},
        "discretization_steps": 2,
    }
    parts = [
        gymnasium.make("flowgym/Denoising-v0", reward=id, discretization_steps=2) for id in weights
    ]
    whole = gymnasium.make("flowgym/Denoising-v0", **options)
    again = gymnasium.make(gymnasium.envs.registration.EnvSpec.from_json(whole.spec.to_json()))
    redness, brightness = (finish(env, 4) for env in parts)
    assert finish(whole, 4) == pytest.approx(redness + 5 * brightness, rel=1e-5)
    assert finish(again, 4) == finish(whole, 4)


def test_environments_do_not_share_what_a_reward_remembers_but_a_pickle_keeps_it():
    env, other = (
        gymnasium.make("flowgym/Denoising-v0", discretization_steps=2, **STANDARDIZED)
        for _ in range(2)
    )
    values = [finish(gymnasium.make(RED, discretization_steps=2), seed) for seed in range(4)]
    for seed in range(3):
        finish(env, seed)
    finish(other, 3)
    assert other.unwrapped.environment.reward.get_state()["counts"].tolist() == [1]
    for copied in (pickle.loads(pickle.dumps(env)), copy.deepcopy(env)):
        expected = (values[3] - np.mean(values)) / (np.std(values) + 1e-6)
        assert finish(copied, 3) == pytest.approx(expected, rel=1e-3)
        assert copied.unwrapped.environment.reward.get_state()["counts"].tolist() == [4]
        break  # A deep copy shares the reward with its original, and both would remember the same episode.


def test_statistics_are_kept_for_each_prompt_of_a_vector():
    envs = gymnasium.make_vec(
        "flowgym/Denoising-v0", num_envs=6, discretization_steps=1, prompts=PROMPTS, **STANDARDIZED
    )
    _, infos = envs.reset(seed=1)
    envs.step(np.zeros(envs.action_space.shape, np.float32))
    state = envs.unwrapped.environment.reward.get_state()
    counts = dict(zip(state["prompts"].tolist(), state["counts"].tolist(), strict=True))
    assert counts == {prompt: list(infos["prompt"]).count(prompt) for prompt in PROMPTS}
