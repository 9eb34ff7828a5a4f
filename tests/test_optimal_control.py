"""The optimum of one-dimensional environments: between the zero policy and the bound, and earned when rolled out."""

import math

import gymnasium
import numpy as np
import pytest

import flowgym_gym
from flowgym_gym.errors import OptionError
from flowgym_gym.optimal_control import free_energy, optimal_value, uncontrolled_value
from flowgym_gym.wrappers import RewardScale, TimeGrid

IDS = ["flowgym/GaussianMixture-Binary-v0", "flowgym/GaussianMixture-Gaussian-v0"]


def returns_of(id, policy, episodes=1000, **kwargs):
    envs = gymnasium.make_vec(id, num_envs=episodes, **kwargs)
    observation, _ = envs.reset(seed=0)
    total = np.zeros(episodes)
    for _ in range(envs.unwrapped.discretization_steps):
        observation, reward, *_ = envs.step(policy(observation))
        total += reward
    return total


@pytest.mark.parametrize("id", IDS)
@pytest.mark.parametrize("kwargs", [{}, {"noise_level": 0.5}, {"base_model_kwargs": {"schedule": "diffusion"}}])
def test_zero_policy_optimum_and_bound_are_in_order(id, kwargs):
    env = gymnasium.make(id, **kwargs)
    zero, best, bound = uncontrolled_value(env, 801), optimal_value(env, 801, 51).value, free_energy(env, 801)
    assert zero < best <= bound


def test_refining_the_grid_changes_the_optimum_by_less_than_a_thousandth():
    for id in IDS:
        env = gymnasium.make(id)
        assert optimal_value(env, 1001, 101).value == pytest.approx(optimal_value(env, 2001, 201).value, rel=1e-3)


@pytest.mark.parametrize("id", IDS)
def test_rolling_out_the_optimal_policy_earns_its_value(id):
    solution = optimal_value(gymnasium.make(id), 1001, 101)
    earned = returns_of(id, solution.policy)
    interval = 3 * earned.std() / math.sqrt(len(earned))
    assert earned.mean() == pytest.approx(solution.value, abs=interval)
    assert interval < 0.15 * solution.value


@pytest.mark.parametrize("id", [*IDS, "flowgym/GaussianMixture-Gaussian2D-v0"])
def test_rolling_out_no_policy_earns_the_uncontrolled_value(id):
    environment = gymnasium.make(id).unwrapped.rollout.environment
    earned = environment.reward_scale * environment.sample(100_000).rewards.double().numpy()
    interval = 3 * earned.std() / math.sqrt(len(earned))
    assert earned.mean() == pytest.approx(uncontrolled_value(environment), abs=interval)


def test_the_bound_is_the_free_energy_of_sampled_rewards():
    """Memoryless: the sample does not depend on the noise, so the bound is a plain log mean exp of rewards."""
    env = flowgym_gym.make("2d/gaussian_mixture", "2d/gaussian", 20, 10.0)
    rewards = 10 * env.sample(200_000).rewards.double()
    weights = rewards.exp()
    error = 4 * (weights.std() / weights.mean() / math.sqrt(len(weights))).item()
    assert free_energy(env) == pytest.approx(weights.mean().log().item(), abs=error)


def test_free_actions_and_small_steps_close_the_gap_to_the_bound():
    """Shifted Gaussians only reach the free energy in the limit of small steps."""
    gaps = []
    for steps in (10, 40):
        env = gymnasium.make(IDS[1], action_scale=30.0, discretization_steps=steps)
        bound = free_energy(env, 801)
        gaps.append((bound - optimal_value(env, 801, 401).value) / bound)
    assert 0 < gaps[1] < 0.5 * gaps[0] < 0.05


def test_wrappers_change_the_problem():
    id = "flowgym/GaussianMixture-Gaussian-v0"
    wrapped = RewardScale(TimeGrid(gymnasium.make(id), steps=10), scale=5.0)
    made = gymnasium.make(id, discretization_steps=10, reward_scale=5.0)
    assert optimal_value(wrapped, 401, 51).value == optimal_value(made, 401, 51).value


def test_bad_input_is_named():
    with pytest.raises(OptionError, match="expected a flowgym environment"):
        optimal_value(gymnasium.make("CartPole-v1"))
    with pytest.raises(OptionError, match="env is a str"):
        free_energy("CartPole")
    with pytest.raises(OptionError, match=r"\(2,\)"):
        optimal_value(gymnasium.make("flowgym/GaussianMixture-Gaussian2D-v0"))
    with pytest.raises(OptionError, match="both above 0"):
        free_energy(gymnasium.make(IDS[0], noise_level=0.0))
