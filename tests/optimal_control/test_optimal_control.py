"""The optimum in low dimensions: between the zero policy and the bound, and earned when rolled out."""

import functools
import math

import gymnasium
import numpy as np
import pytest
import torch

import flowgym_gym
from flowgym_gym import FlowTensor, Reward, VelocityEnvironment
from flowgym_gym.errors import ActionError, OptionError
from flowgym_gym.models.gaussian_mixture import GaussianMixtureBaseModel
from flowgym_gym.optimal_control.bound import free_energy
from flowgym_gym.optimal_control.optimum import optimal_value, policy_value, uncontrolled_value
from flowgym_gym.rewards.vectors import GaussianReward
from flowgym_gym.wrappers import RewardScale, TimeGrid
from tests.conftest import further

IDS = ["flowgym/GaussianMixture-Binary-v0", "flowgym/GaussianMixture-Gaussian-v0"]
PLANE = "flowgym/GaussianMixture-Gaussian2D-v0"


def returns_of(id, policy, episodes=1000, **kwargs):
    envs = gymnasium.make_vec(id, num_envs=episodes, **kwargs)
    observation, _ = envs.reset(seed=0)
    total = np.zeros(episodes)
    for _ in range(envs.unwrapped.discretization_steps):
        observation, reward, *_ = envs.step(policy(observation))
        total += reward
    return total


FAR = {"reward_kwargs": {"mean": [10.0], "std": 1.0}, "action_scale": 30.0, "reward_scale": 1000.0}
EULER = {"sampler": "euler", "noise_schedule": 0.5}


@pytest.mark.parametrize("id", IDS)
@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"noise_level": 0.5},
        {"control_cost_weight": 4.0},
        {"reward_scale": 2000.0},
        EULER,
        {"base_model_kwargs": {"schedule": "diffusion"}},
    ],
)
def test_zero_policy_optimum_and_bound_are_in_order(id, kwargs):
    env = gymnasium.make(id, **kwargs)
    zero, best, bound = (
        uncontrolled_value(env, 801),
        optimal_value(env, 801, 51).value,
        free_energy(env, 801),
    )
    assert zero < best <= bound


class Separable(Reward[FlowTensor]):
    def forward(self, x, **kwargs):
        return -((x.data - 1) ** 2).sum(dim=1), torch.ones(len(x), dtype=torch.bool)


def test_a_problem_of_two_dimensions_that_do_not_meet_is_two_problems_of_one():
    def solve(mean, cells):
        model = GaussianMixtureBaseModel(means=[mean], stds=[0.5], weights=[1.0])
        return optimal_value(
            VelocityEnvironment(model, Separable(), 5, 3.0, action_scale=1.5), cells
        ).value

    apart = [solve([mean], 1001) for mean in (0.3, -1.0)]
    assert abs(apart[0] - apart[1]) > 1
    assert solve([0.3, -1.0], 301) == pytest.approx(sum(apart), rel=5e-3)


def linear_quadratic(environment):
    """Uncontrolled value, optimum and bound in one dimension, where values are ``-a x^2 + b x + c``
    at every time.
    """
    transitions, weight = environment.transitions, environment.control_cost_weight
    scale = environment.reward_scale
    a, b, c = [scale] * 3, [2 * scale] * 3, [-scale] * 3
    a[2], b[2], c[2] = (coefficients[2] / weight for coefficients in (a, b, c))
    for i in reversed(range(environment.discretization_steps)):
        points = FlowTensor(torch.tensor([[0.0], [1.0]]))
        output = environment.predict(points, torch.full((2,), i))
        at_0, at_1 = (
            (transitions.mean_x[i] * points.data + transitions.mean_output[i] * output)
            .flatten()
            .tolist()
        )
        variance, price = float(transitions.std[i]) ** 2, math.inf
        if transitions.gain[i] != 0:
            price = weight / (2 * float(transitions.cost_std[i]) ** 2)
        # The value at the free mean m of the next state: without actions, with the best one, in the
        # exponent.
        kept = (
            1.0,
            1.0 if price == math.inf else price / (a[1] + price),
            1 / (1 + 2 * a[2] * variance),
        )
        c[0] -= a[0] * variance
        c[1] += b[1] ** 2 / (4 * (a[1] + price)) - a[1] * variance
        c[2] += b[2] ** 2 * variance / 2 * kept[2] + math.log(kept[2]) / 2
        for j, (slope, start) in enumerate([(at_1 - at_0, at_0)] * 3):
            p, q = kept[j] * a[j], kept[j] * b[j]
            a[j], b[j], c[j] = (
                p * slope**2,
                q * slope - 2 * p * slope * start,
                c[j] + q * start - p * start**2,
            )
    values = [c[j] - a[j] for j in range(3)]
    return values[0], values[1], weight * values[2]


@pytest.mark.parametrize(("dimensions", "cells", "tolerance"), [(1, 801, 5e-5), (2, 151, 1e-3)])
@pytest.mark.parametrize("noise_level", [1.0, *further(0.5)])
def test_gaussian_samples_and_a_quadratic_reward_have_the_values_of_a_linear_quadratic_problem(
    dimensions, cells, tolerance, noise_level
):
    def make(dimensions):
        model = GaussianMixtureBaseModel(means=[[0.3] * dimensions], stds=[0.5], weights=[1.0])
        return VelocityEnvironment(
            model,
            Separable(),
            6,
            1.5,
            control_cost_weight=0.7,
            action_scale=8.0,
            noise_level=noise_level,
        )

    env = make(dimensions)
    found = (
        uncontrolled_value(env, cells),
        optimal_value(env, cells, 33).value,
        free_energy(env, cells),
    )
    assert found == pytest.approx(
        [dimensions * value for value in linear_quadratic(make(1))], rel=tolerance
    )


@pytest.mark.second
@pytest.mark.parametrize("kwargs", [{}, *further({"action_type": "control", "action_scale": 2.0})])
def test_the_optimum_in_the_plane_is_what_its_policy_is_worth_and_earns(kwargs):
    env = gymnasium.make(PLANE, discretization_steps=8, **kwargs)
    solution = optimal_value(env, 251, 9)
    assert solution.actions.shape == (8, 251, 251, 2)
    assert policy_value(env, solution.policy, 251) == pytest.approx(solution.value, abs=1e-5)
    zero, bound = uncontrolled_value(env, 251), free_energy(env, 251)
    assert zero + 1 < solution.value < bound
    earned = returns_of(PLANE, solution.policy, episodes=4000, discretization_steps=8, **kwargs)
    assert solution.value == pytest.approx(
        earned.mean(), abs=3 * earned.std() / math.sqrt(len(earned))
    )
    # No single action of the policy can be bettered by much: those tried were refined.
    assert optimal_value(env, 251, 15).value == pytest.approx(solution.value, rel=2e-3)


def test_a_reward_that_the_free_process_never_earns_is_still_solved():
    """The cells cover what actions lead to, not only what the model samples by itself."""
    env = gymnasium.make(IDS[1], **FAR)
    pushed = returns_of(
        IDS[1], lambda observation: np.full_like(observation["latent"], 0.24), **FAR
    )
    assert uncontrolled_value(env, 4001) < 1e-6
    assert 100 < pushed.mean() < optimal_value(env, 4001, 51).value <= free_energy(env, 4001)


def test_refining_the_grid_changes_the_optimum_by_less_than_a_thousandth():
    for id in IDS:
        env = gymnasium.make(id)
        default = optimal_value(env)
        finer = optimal_value(env, 2 * len(default.states), 401)
        assert default.value == pytest.approx(finer.value, rel=1e-3)


@pytest.mark.parametrize("id", IDS)
def test_few_actions_are_refined_to_the_best_one(id):
    env = gymnasium.make(id)
    assert optimal_value(env, 801, 21).value == pytest.approx(
        optimal_value(env, 801, 401).value, rel=6e-4
    )


@pytest.mark.parametrize(
    ("id", "kwargs"),
    [
        (IDS[0], {}),
        (IDS[1], {}),
        (IDS[1], {"control_cost_weight": 0.0, "action_scale": 1.0}),
        (IDS[1], {"control_cost_weight": 4.0}),
        (IDS[1], {"action_scale": 0.7}),  # the limits of the actions bind
        (IDS[1], {"noise_level": 0.0}),
        (
            IDS[1],
            {
                "noise_level": 0.5,
                "action_type": "noise",
                "base_model_kwargs": {"schedule": "diffusion"},
            },
        ),
        (IDS[1], EULER),
        (IDS[1], FAR),
    ],
)
def test_rolling_out_the_optimal_policy_earns_its_value(id, kwargs):
    solution = optimal_value(gymnasium.make(id, **kwargs), 2001, 101)
    earned = returns_of(id, solution.policy, episodes=2000, **kwargs)
    interval = 3 * earned.std() / math.sqrt(len(earned)) + 1e-3 * abs(solution.value)
    assert earned.mean() == pytest.approx(solution.value, abs=interval)
    assert interval < 0.2 * solution.value


def test_the_limits_of_the_actions_cost_value():
    values = [
        optimal_value(gymnasium.make(IDS[1], action_scale=scale), 801, 101).value
        for scale in (0.3, 0.7, 5.0)
    ]
    assert values[0] < values[1] - 0.5 < values[2] - 1


def test_no_action_is_preferred_where_none_has_an_effect():
    solution = optimal_value(gymnasium.make(IDS[1]), 401, 51)
    assert (solution.actions[-1] == 0).all()
    assert np.abs(solution.actions[10]).max() > 0.1


@pytest.mark.parametrize("id", [*IDS, *further(PLANE)])
def test_rolling_out_no_policy_earns_the_uncontrolled_value(id):
    environment = gymnasium.make(id).unwrapped.environment
    earned = environment.reward_scale * environment.sample(100_000).rewards.double().numpy()
    interval = 3 * earned.std() / math.sqrt(len(earned))
    assert earned.mean() == pytest.approx(uncontrolled_value(environment), abs=interval)


def towards_the_reward(observation):
    """Some policy that depends on state and time, and whose actions are sometimes out of range."""
    return 0.5 * (1 - observation["time"]) * (-2 - observation["latent"])


@pytest.mark.parametrize(
    ("id", "kwargs"),
    [
        (IDS[0], {}),
        (IDS[1], {}),
        (IDS[1], {"control_cost_weight": 4.0, "noise_level": 0.5}),
        (IDS[1], {"noise_level": 0.0, "base_model_kwargs": {"schedule": "diffusion"}}),
        (IDS[1], EULER),
        *further((PLANE, {})),
    ],
)
def test_the_value_of_a_policy_is_what_its_episodes_earn(id, kwargs):
    earned = returns_of(id, towards_the_reward, episodes=4000, **kwargs)
    value = policy_value(gymnasium.make(id, **kwargs), towards_the_reward)
    assert value == pytest.approx(earned.mean(), abs=3 * earned.std() / math.sqrt(len(earned)))
    assert abs(value - uncontrolled_value(gymnasium.make(id, **kwargs))) > 0.5


@pytest.mark.parametrize("id", IDS)
def test_the_value_of_the_optimal_policy_is_the_optimum(id):
    env = gymnasium.make(id)
    solution = optimal_value(env, 801, 51)
    assert policy_value(env, solution.policy, 801) == pytest.approx(solution.value, abs=1e-5)


def test_actions_out_of_range_are_worth_as_much_as_those_at_the_limit():
    env = gymnasium.make(IDS[1])
    values = [
        policy_value(env, lambda o, a=a: np.full_like(o["latent"], a), 401) for a in (-0.5, -1, -3)
    ]
    assert values[1] == values[2] != values[0]


@functools.cache
def rewards_of_the_process():
    env = flowgym_gym.make("2d/gaussian_mixture", "2d/gaussian", 20, 10.0)
    return 10 * env.sample(200_000).rewards.double()


@pytest.mark.parametrize("weight", [0.5, 1.0, 3.0])
def test_the_bound_is_the_free_energy_of_sampled_rewards(weight):
    """Memoryless: the sample does not depend on the noise, so the bound is a plain log mean exp of
    rewards.
    """
    env = flowgym_gym.make(
        "2d/gaussian_mixture", "2d/gaussian", 20, 10.0, control_cost_weight=weight
    )
    weights = (rewards_of_the_process() / weight).exp()
    error = 4 * weight * (weights.std() / weights.mean() / math.sqrt(len(weights))).item()
    assert free_energy(env) == pytest.approx(weight * weights.mean().log().item(), abs=error)


def test_free_actions_and_small_steps_close_the_gap_to_the_bound():
    """Shifted Gaussians only reach the free energy in the limit of small steps."""
    gaps = []
    for steps in (10, 40):
        env = gymnasium.make(IDS[1], action_scale=30.0, discretization_steps=steps)
        bound = free_energy(env, 6001)
        gaps.append((bound - optimal_value(env, 6001, 401).value) / bound)
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
    for actions, message in [(np.zeros(3), r"shape \(3,\)"), (np.full((401, 1), np.nan), "NaN")]:
        with pytest.raises(ActionError, match=f"the policy returned {message}"):
            policy_value(gymnasium.make(IDS[0]), lambda observation, a=actions: a, 401)
    cube = GaussianMixtureBaseModel(means=[[0.0, 0.0, 0.0]], stds=[0.5], weights=[1.0])
    with pytest.raises(OptionError, match=r"shape \(3,\), expected \(1,\) or \(2,\)"):
        optimal_value(VelocityEnvironment(cube, Separable(), 5))
    for kwargs in (
        {"noise_level": 0.0},
        {"control_cost_weight": 0},
        {"sampler": "euler", "noise_schedule": 0.0},
    ):
        with pytest.raises(OptionError, match="the bound needs"):
            free_energy(gymnasium.make(IDS[0], **kwargs))


def test_problems_that_this_solver_does_not_know_are_refused(monkeypatch):
    class Shifted(GaussianMixtureBaseModel):
        def sample_p0(self, n, **kwargs):
            return FlowTensor(torch.randn(n, 1) + 5), {}

    class Conditioned(GaussianMixtureBaseModel):
        def sample_p0(self, n, **kwargs):
            return FlowTensor(torch.randn(n, 1)), {"target": torch.randn(n, 1)}

    for model, message in [
        (Shifted(), r"initial states have mean 4\.99"),
        (Conditioned(), r"depend on \['target'\]"),
    ]:
        with pytest.raises(OptionError, match=message):
            optimal_value(VelocityEnvironment(model, GaussianReward(), 5))
    with pytest.raises(OptionError, match="the wrapper TransformReward may change the problem"):
        optimal_value(gymnasium.wrappers.TransformReward(gymnasium.make(IDS[0]), lambda r: 10 * r))
    recorded = gymnasium.wrappers.RecordEpisodeStatistics(gymnasium.make(IDS[0]))
    assert optimal_value(recorded, 401, 21).value > 7
