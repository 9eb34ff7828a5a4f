"""Gaussian mixtures: every prediction against torch's own distributions."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal, Normal

import flowgym_gym
from flowgym_gym.dynamics import OUTPUTS
from flowgym_gym.errors import OptionError
from flowgym_gym.models.gaussian_mixture import SCHEDULES, GaussianMixtureBaseModel
from flowgym_gym.types import FlowTensor

TWO = {"means": ((0.0, 1.0), (3.0, -1.0)), "stds": (1.0, 0.4), "weights": (1.0, 3.0)}


def state_law(model, t):
    """Law of the state at a time, built by torch."""
    time = torch.tensor([t], dtype=torch.float64)
    alpha, beta = model.scheduler.alpha(time), model.scheduler.beta(time)
    variance = (alpha * model.stds) ** 2 + beta**2
    covariance = variance[:, None, None] * torch.eye(model.dimensions, dtype=torch.float64)
    return MixtureSameFamily(
        Categorical(model.weights), MultivariateNormal(alpha * model.means, covariance)
    )


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("t", [0.0, 0.3, 0.9])
def test_score_is_the_gradient_of_the_log_density(schedule, t):
    model = GaussianMixtureBaseModel(**TWO, schedule=schedule, output_type="score")
    x = torch.randn(50, 2, dtype=torch.float64, requires_grad=True)
    log_prob = state_law(model, t).log_prob(x)
    (gradient,) = torch.autograd.grad(log_prob.sum(), x)
    torch.testing.assert_close(model.log_prob(x.detach(), t), log_prob.detach())
    score = model(FlowTensor(x.detach()), torch.full((50,), t, dtype=torch.float64)).data
    torch.testing.assert_close(score, gradient, rtol=1e-6, atol=1e-8)


@given(st.floats(0.02, 0.98), st.floats(-4, 4), st.sampled_from(sorted(OUTPUTS)))
def test_every_output_describes_the_same_sample_and_noise(t, x, output_type):
    time, state = torch.tensor([t], dtype=torch.float64), torch.tensor([[x]], dtype=torch.float64)
    model = GaussianMixtureBaseModel(output_type=output_type)
    endpoint, noise = model.conditional_means(state, time)
    alpha, beta = model.scheduler.alpha(time), model.scheduler.beta(time)
    torch.testing.assert_close(alpha * endpoint[0] + beta * noise[0], state[0])
    loss = model.train_loss(FlowTensor(endpoint), FlowTensor(state), time)
    assert loss.item() == pytest.approx(0, abs=1e-10)


@pytest.mark.parametrize("sampler", ["ddim", "euler"])
@pytest.mark.parametrize("noise_level", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_descriptions_of_one_model_give_the_same_trajectory(schedule, noise_level, sampler):
    # At time 0 of a flow model the sample cannot be read off the noise or the score.
    grid = 25 if schedule == "diffusion" else torch.linspace(0.02, 1, 26)[:-1].tolist()
    start = torch.randn(64, 2)
    trajectories = {}
    for output_type in OUTPUTS:
        kwargs = {**TWO, "schedule": schedule, "output_type": output_type}
        env = flowgym_gym.make(
            "2d/gaussian_mixture",
            "2d/gaussian",
            grid,
            noise_level=noise_level,
            sampler=sampler,
            base_model_kwargs=kwargs,
        )
        x, visited = start, []
        torch.manual_seed(3)
        for i in range(25):
            index = torch.full((64,), i)
            x, _ = env.advance(
                x, env.predict(FlowTensor(x), index), torch.zeros(64, 2), torch.randn(64, 2), index
            )
            visited.append(x)
        trajectories[output_type] = torch.stack(visited)
    for trajectory in trajectories.values():
        torch.testing.assert_close(trajectory, trajectories["velocity"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("noise_schedule", [None, 0.7, 0.0])
@pytest.mark.parametrize("noise_level", [0.6, 1.0])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_an_euler_step_follows_the_gradient_of_the_log_density(
    schedule, noise_level, noise_schedule
):
    r"""dx = (v + sigma^2 / 2 grad log p) dt + sigma dB with v = kappa x + eta grad log p; the
    gradient is torch's.
    """
    grid = 40 if schedule == "diffusion" else torch.linspace(0.02, 1, 41)[:-1].tolist()
    env = flowgym_gym.make(
        "2d/gaussian_mixture",
        "2d/gaussian",
        grid,
        sampler="euler",
        noise_level=noise_level,
        noise_schedule=noise_schedule,
        base_model_kwargs={**TWO, "schedule": schedule},
    )
    model, times = env.base_model, env.grid.times
    for i in (0, 13, 38):
        x = torch.randn(20, 2, dtype=torch.float64, requires_grad=True)
        (gradient,) = torch.autograd.grad(state_law(model, times[i].item()).log_prob(x).sum(), x)
        t, dt = times[i : i + 1], (times[i + 1] - times[i]).item()
        kappa, eta = model.scheduler.kappa(t), model.scheduler.eta(t)
        sigma = noise_level * ((2 * eta).sqrt() if noise_schedule is None else noise_schedule)
        expected = x.detach() + (kappa * x.detach() + (eta + sigma**2 / 2) * gradient) * dt
        state, zero, index = x.detach().float(), torch.zeros(20, 2), torch.full((20,), i)
        output = env.predict(FlowTensor(state), index)
        torch.testing.assert_close(
            env.advance(state, output, zero, zero, index)[0].double(),
            expected,
            rtol=1e-4,
            atol=1e-5,
        )
        assert env.transitions.std[i].item() == pytest.approx(
            float(sigma) * math.sqrt(dt), rel=1e-5
        )


@pytest.mark.parametrize(
    "options",
    [
        {"noise_level": 0.0},
        {"noise_level": 0.5},
        {"noise_level": 1.0},
        {"noise_level": 0.0, "sampler": "euler"},
        {"noise_schedule": 0.5, "sampler": "euler"},
        {"discretization_steps": (torch.arange(200) / 200).pow(1.5).tolist()},
    ],
)
def test_many_steps_reach_the_mixture(options):
    """Kolmogorov-Smirnov distance of the samples from the law they should have."""
    n = 20_000
    env = flowgym_gym.make(
        "1d/gaussian_mixture", "1d/gaussian", **{"discretization_steps": 200, **options}
    )
    x = env.sample(n).latents.data.flatten().double().sort().values
    expected = 0.5 * Normal(0.0, 1.0).cdf(x) + 0.5 * Normal(3.0, 0.4).cdf(x)
    distance = (expected - (torch.arange(n) + 0.5) / n).abs().max().item()
    assert distance < 1.95 / math.sqrt(n) + 0.01


def test_exact_samples_have_the_moments_of_the_mixture():
    x = GaussianMixtureBaseModel().sample_p1(100_000).data
    assert x.mean().item() == pytest.approx(1.5, abs=0.03)
    assert x.var().item() == pytest.approx(0.5 * (1 + 0.16) + 2.25, abs=0.05)


def test_path_divergence_is_the_expected_log_ratio_of_the_path_densities():
    env = flowgym_gym.make("1d/gaussian_mixture", "1d/gaussian", 12, action_scale=1.5)
    n = 20_000
    x = torch.randn(n, 1)
    log_ratio, costs = torch.zeros(n, dtype=torch.float64), torch.zeros(n, dtype=torch.float64)
    for i in range(12):
        index = torch.full((n,), i)
        output, action = env.predict(FlowTensor(x), index), torch.tanh(x)
        free, _ = env.advance(x, output, torch.zeros(n, 1), torch.zeros(n, 1), index)
        steered, _ = env.advance(x, output, action, torch.zeros(n, 1), index)
        following, cost = env.advance(x, output, action, torch.randn(n, 1), index)
        std = env.transitions.std[i].double()
        if std > 0:
            log_ratio += Normal(steered.double(), std).log_prob(following.double()).flatten()
            log_ratio -= Normal(free.double(), std).log_prob(following.double()).flatten()
        costs += cost
        x = following
    difference = log_ratio - costs
    assert costs.mean() > 1
    assert abs(difference.mean().item()) < 3 * difference.std().item() / math.sqrt(n)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"means": [[0.0]]}, r"\(1, 1\), \(2,\) and \(2,\)"),
        ({"means": [0.0, 3.0]}, r"expected \(k, d\)"),
        ({"stds": [1.0, 0.0]}, "stds is"),
        ({"weights": [1.0, -1.0]}, "weights is"),
        ({"output_type": "noise"}, "output_type is 'noise'"),
        ({"schedule": "linear"}, "schedule is 'linear'"),
    ],
)
def test_bad_options_are_named(kwargs, message):
    with pytest.raises(OptionError, match=message):
        GaussianMixtureBaseModel(**kwargs)
