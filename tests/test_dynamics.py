"""The transition against diffusers' schedulers, torch's divergences, and closed forms."""

import math
import warnings

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from hypothesis import given
from hypothesis import strategies as st
from torch.distributions import Independent, Normal, kl_divergence

from flowgym_gym import CosineScheduler, DiffusionScheduler, OptimalTransportScheduler
from flowgym_gym.dynamics import (
    ACTION_TYPES,
    OUTPUTS,
    Schedule,
    Transitions,
    control_cost,
    default_action_scale,
)
from flowgym_gym.errors import OptionError

SD = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
}


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def ddim_steps(ddim, steps, output, noise, eta, x):
    """The latents after each step of diffusers' own sampler for a fixed network output per step."""
    ddim.set_timesteps(steps)
    for i, k in enumerate(ddim.timesteps):
        x = ddim.step(
            output[i], int(k), x, eta=eta, variance_noise=noise[i] if eta > 0 else None
        ).prev_sample
        yield x


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("set_alpha_to_one", [False, True])
@pytest.mark.parametrize(
    ("spacing", "steps"), [("leading", 7), ("leading", 50), ("trailing", 10), ("trailing", 50)]
)
def test_zero_action_reproduces_ddim(prediction, eta, set_alpha_to_one, spacing, steps):
    ddim = DDIMScheduler(
        **SD,
        set_alpha_to_one=set_alpha_to_one,
        steps_offset=1,
        timestep_spacing=spacing,
        prediction_type=prediction,
    )
    output, noise, x = (
        draw(steps, 2, 4, 8, 8),
        draw(steps, 2, 4, 8, 8, seed=1),
        draw(2, 4, 8, 8, seed=2),
    )
    output_type = "endpoint" if prediction == "sample" else prediction
    grid = DiffusionScheduler.from_diffusers(ddim).time_grid(steps)
    transitions = Transitions.build(grid, output_type, "noise", "ddim", eta)
    mine = x
    for i, theirs in enumerate(ddim_steps(ddim, steps, output, noise, eta, x)):
        mine, _ = transitions.at(torch.tensor([i, i]), 4).step(
            mine, output[i], torch.zeros_like(x), noise[i]
        )
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_the_expected_sample_is_that_of_ddim(prediction):
    ddim = DDIMScheduler(**SD, steps_offset=1, prediction_type=prediction)
    ddim.set_timesteps(10)
    x, output = draw(10, 4, 8, 8), draw(10, 4, 8, 8, seed=1)
    transitions = Transitions.build(
        DiffusionScheduler.from_diffusers(ddim).time_grid(10), prediction, "velocity", "ddim", 1.0
    )
    mine = transitions.at(torch.arange(10), 4).endpoint(x, output)
    for i, k in enumerate(ddim.timesteps):
        theirs = ddim.step(output[i], int(k), x[i], eta=0.0).pred_original_sample
        torch.testing.assert_close(mine[i], theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("eta", [0.0, 0.7, 1.0])
def test_a_noise_correction_is_a_changed_prediction(eta):
    ddim = DDIMScheduler(**SD, steps_offset=1, set_alpha_to_one=False)
    steps, c = 10, draw(2, 4, 8, 8, seed=3)
    output, noise, x = (
        draw(steps, 2, 4, 8, 8),
        draw(steps, 2, 4, 8, 8, seed=1),
        draw(2, 4, 8, 8, seed=2),
    )
    transitions = Transitions.build(
        DiffusionScheduler.from_diffusers(ddim).time_grid(steps), "epsilon", "noise", "ddim", eta
    )
    mine = x
    for i, theirs in enumerate(ddim_steps(ddim, steps, output + c, noise, eta, x)):
        mine, _ = transitions.at(torch.tensor([i, i]), 4).step(mine, output[i], c, noise[i])
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("eta", [0.0, 0.7, 1.0])
def test_a_velocity_correction_is_a_changed_prediction_of_the_noise(eta):
    """With x_1 = (x - beta eps) / alpha the velocity changes by (beta_dot - kappa beta) per unit of
    eps.
    """
    ddim = DDIMScheduler(**SD, steps_offset=1, set_alpha_to_one=False)
    steps, c = 10, draw(2, 4, 8, 8, seed=3)
    output, noise, x = (
        draw(steps, 2, 4, 8, 8),
        draw(steps, 2, 4, 8, 8, seed=1),
        draw(2, 4, 8, 8, seed=2),
    )
    scheduler = DiffusionScheduler.from_diffusers(ddim)
    transitions = Transitions.build(scheduler.time_grid(steps), "epsilon", "velocity", "ddim", eta)
    ddim.set_timesteps(steps)
    t = 1 - ddim.timesteps.double() / 1000
    factor = 1 / (scheduler.beta_dot(t) - scheduler.kappa(t) * scheduler.beta(t))
    mine = x
    for i, theirs in enumerate(
        ddim_steps(ddim, steps, output + factor.reshape(-1, 1, 1, 1, 1) * c, noise, eta, x)
    ):
        mine, _ = transitions.at(torch.tensor([i, i]), 4).step(mine, output[i], c, noise[i])
        torch.testing.assert_close(mine.double(), theirs, rtol=1e-4, atol=1e-4, check_dtype=False)


@pytest.mark.parametrize("set_alpha_to_one", [False, True])
@pytest.mark.parametrize("steps", [501, 700, 999])
def test_every_step_of_a_long_leading_grid_is_that_of_ddim(set_alpha_to_one, steps):
    """Step by step: over a thousand steps in float32 both drift."""
    ddim = DDIMScheduler(**SD, set_alpha_to_one=set_alpha_to_one, steps_offset=1)
    ddim.set_timesteps(steps)
    transitions = Transitions.build(
        DiffusionScheduler.from_diffusers(ddim).time_grid(steps), "epsilon", "noise", "ddim", 1.0
    )
    x, output, noise = draw(steps, 5), draw(steps, 5, seed=1), draw(steps, 5, seed=2)
    mine, _ = transitions.at(torch.arange(steps), 2).step(x, output, torch.zeros_like(x), noise)
    for i, k in enumerate(ddim.timesteps):
        theirs = ddim.step(output[i], int(k), x[i], eta=1.0, variance_noise=noise[i]).prev_sample
        torch.testing.assert_close(mine[i], theirs, rtol=1e-4, atol=1e-4)


def test_optimal_transport_without_noise_is_diffusers_flow_matching_euler():
    scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000)
    scheduler.set_timesteps(sigmas=np.linspace(1, 0.1, 10))
    grid = OptimalTransportScheduler().time_grid(10)
    for sampler in ("ddim", "euler"):
        transitions = Transitions.build(grid, "velocity", "velocity", sampler, 0.0)
        scheduler.set_timesteps(sigmas=np.linspace(1, 0.1, 10))
        mine = theirs = draw(2, 3)
        for i, t in enumerate(scheduler.timesteps):
            velocity = draw(2, 3, seed=i)
            # diffusers' time runs from noise at sigma = 1 to data at 0: its velocity is the
            # negative of ours.
            theirs = scheduler.step(-velocity, t, theirs).prev_sample
            mine, _ = transitions.at(torch.tensor([i, i]), 2).step(
                mine, velocity, torch.zeros(2, 3), torch.zeros(2, 3)
            )
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("action_type", ACTION_TYPES)
@pytest.mark.parametrize("sampler", ["ddim", "euler"])
@pytest.mark.parametrize("noise_level", [0.3, 1.0])
def test_control_cost_is_the_divergence_of_the_two_transitions(action_type, sampler, noise_level):
    grid = DiffusionScheduler.from_diffusers(DDIMScheduler(**SD, steps_offset=1)).time_grid(12)
    transitions = Transitions.build(grid, "epsilon", action_type, sampler, noise_level)
    x, output, c, zero = (
        draw(12, 6),
        draw(12, 6, seed=1),
        0.1 * draw(12, 6, seed=2),
        torch.zeros(12, 6),
    )
    here = transitions.at(torch.arange(12), 2)
    free, _ = here.step(x, output, zero, zero)
    steered, cost = here.step(x, output, c, zero)
    noisy = transitions.std > 0  # onto alpha = 1 there is no noise, no effect and no cost
    std = transitions.std[noisy].double()[:, None].expand(-1, 6)
    expected = kl_divergence(
        Independent(Normal(steered[noisy].double(), std), 1),
        Independent(Normal(free[noisy].double(), std), 1),
    )
    torch.testing.assert_close(cost[noisy].double(), expected, rtol=2e-3, atol=1e-5)
    assert noisy.sum() >= 11
    assert (cost[~noisy] == 0).all()
    assert torch.equal(steered[~noisy], free[~noisy])


@pytest.mark.parametrize("sampler", ["ddim", "euler"])
def test_a_control_is_a_shift_of_the_noise_that_a_transition_draws(sampler):
    grid = DiffusionScheduler.from_diffusers(
        DDIMScheduler(**SD, steps_offset=1, set_alpha_to_one=False)
    ).time_grid(12)
    here = Transitions.build(grid, "epsilon", "control", sampler, 1.0).at(torch.arange(12), 2)
    x, output, c, z = (draw(12, 6, seed=seed) for seed in range(4))
    steered, cost = here.step(x, output, c, z)
    shifted, nothing = here.step(x, output, torch.zeros_like(c), z + c)
    torch.testing.assert_close(steered, shifted)
    torch.testing.assert_close(cost, 0.5 * c.square().sum(dim=1))
    assert (nothing == 0).all()


def test_costs_without_noise_are_measured_in_the_memoryless_noise():
    grid = DiffusionScheduler.from_diffusers(DDIMScheduler(**SD, set_alpha_to_one=False)).time_grid(
        10
    )
    ode = Transitions.build(grid, "epsilon", "noise", "ddim", 0.0)
    memoryless = Transitions.build(grid, "epsilon", "noise", "ddim", 1.0)
    assert (ode.std == 0).all()
    torch.testing.assert_close(ode.cost_std, memoryless.std)


@pytest.mark.parametrize("noise_level", [0.0, 0.01, 1.0])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("set_alpha_to_one", [False, True])
@pytest.mark.parametrize("steps", [1, 2, 50, 999])
def test_costs_are_finite_on_every_grid(noise_level, spacing, set_alpha_to_one, steps):
    ddim = DDIMScheduler(**SD, set_alpha_to_one=set_alpha_to_one)
    grid = DiffusionScheduler.from_diffusers(ddim).time_grid(steps, spacing)
    for action_type in ACTION_TYPES:
        transitions = Transitions.build(grid, "epsilon", action_type, "ddim", noise_level)
        x = torch.ones(steps, 3)
        following, cost = transitions.at(torch.arange(steps), 2).step(x, x, x, x)
        assert torch.isfinite(following).all()
        assert torch.isfinite(cost).all()


@given(
    timesteps=st.lists(st.integers(0, 999), min_size=1, max_size=12, unique=True),
    noise_level=st.just(0.0) | st.floats(1e-6, 1),
    sampler=st.sampled_from(["ddim", "euler"]),
    action_type=st.sampled_from(ACTION_TYPES),
    set_alpha_to_one=st.booleans(),
)
def test_costs_are_finite_whatever_time_steps_are_visited(
    timesteps, noise_level, sampler, action_type, set_alpha_to_one
):
    ddim = DDIMScheduler(**SD, set_alpha_to_one=set_alpha_to_one)
    grid = DiffusionScheduler.from_diffusers(ddim).time_grid(sorted(timesteps, reverse=True))
    transitions = Transitions.build(grid, "epsilon", action_type, sampler, noise_level)
    x = torch.ones(len(timesteps), 3)
    following, cost = transitions.at(torch.arange(len(timesteps)), 2).step(x, x, x, x)
    assert torch.isfinite(following).all()
    assert torch.isfinite(cost).all()


def test_variance_is_preserved_whatever_the_noise_level():
    grid = DiffusionScheduler.from_diffusers(DDIMScheduler(**SD)).time_grid(25)
    for noise_level in (0.0, 0.4, 1.0):
        transitions = Transitions.build(grid, "endpoint", "noise", "ddim", noise_level)
        # With x_1 = 0 the state is pure noise of standard deviation beta, before the step and after
        # it.
        after = (transitions.mean_x.double() * grid.beta[:-1]) ** 2 + transitions.std.double() ** 2
        torch.testing.assert_close(after, grid.beta[1:] ** 2, rtol=1e-5, atol=1e-9)


@given(
    t=st.floats(0.05, 0.95),
    x1=st.floats(-3, 3),
    eps=st.floats(-3, 3),
    output_type=st.sampled_from(sorted(OUTPUTS)),
    nu=st.sampled_from([None, 1.0, 2.0]),
)
def test_every_output_is_read_back_as_sample_and_noise(t, x1, eps, output_type, nu):
    scheduler = OptimalTransportScheduler() if nu is None else CosineScheduler(nu)
    t = torch.tensor([t], dtype=torch.float64)
    a, b, ad, bd = (getattr(scheduler, f)(t) for f in ("alpha", "beta", "alpha_dot", "beta_dot"))
    x = a * x1 + b * eps
    output = {
        "epsilon": torch.full_like(t, eps),
        "endpoint": torch.full_like(t, x1),
        "velocity": ad * x1 + bd * eps,
        "score": -eps / b,
        "v_prediction": a * eps - b * x1,
    }[output_type]
    (p, q), (r, s) = OUTPUTS[output_type](Schedule(a, b, ad, bd))
    assert (p * x + q * output).item() == pytest.approx(x1, abs=1e-6)
    assert (r * x + s * output).item() == pytest.approx(eps, abs=1e-6)


def test_random_actions_cost_what_the_default_action_scale_promises():
    grid = DiffusionScheduler.from_diffusers(
        DDIMScheduler(**SD, steps_offset=1, set_alpha_to_one=False)
    ).time_grid(20)
    for action_type in ACTION_TYPES:
        transitions = Transitions.build(grid, "epsilon", action_type, "ddim", 1.0)
        scale = default_action_scale(transitions, 4 * 8 * 8, 10.0)
        actions = torch.rand(200, 20, 256, generator=torch.Generator().manual_seed(0)) * 2 - 1
        shift = scale * transitions.gain[:, None] * actions / transitions.cost_std[:, None]
        assert 0.5 * shift.square().sum(dim=(1, 2)).mean().item() == pytest.approx(10, rel=0.02)


def test_control_cost_by_hand():
    cost = control_cost(torch.tensor([[3.0, 4.0], [1.0, 1.0]]), torch.tensor([[2.0], [0.0]]))
    assert cost.tolist() == [3.125, 0.0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"output_type": "noise"}, "output_type is 'noise'"),
        ({"action_type": "score"}, "action_type is 'score'"),
        ({"sampler": "heun"}, "sampler is 'heun'"),
        ({"noise_level": 1.5}, "noise_level is 1.5"),
        ({"noise_level": math.nan}, "noise_level is nan"),
        ({"noise_level": 1e-30}, "noise_level is 1e-30"),
        ({"noise_level": "1"}, "noise_level is '1'"),
    ],
)
def test_bad_options_are_named(change, message):
    grid = OptimalTransportScheduler().time_grid(4)
    options = {
        "output_type": "velocity",
        "action_type": "velocity",
        "sampler": "ddim",
        "noise_level": 1.0,
        **change,
    }
    with pytest.raises(OptionError, match=message):
        Transitions.build(grid, **options)


def test_a_singular_combination_is_an_error_and_not_nan():
    grid = OptimalTransportScheduler().time_grid(4)
    with pytest.raises(
        OptionError,
        match=r"singular at time 0 .*; take velocity corrections, or controls, or list the times",
    ):
        Transitions.build(grid, "velocity", "noise", "ddim", 1.0)
    with pytest.raises(
        OptionError, match=r"; take the 'ddim' sampler or a constant noise_schedule, or list"
    ):
        Transitions.build(grid, "velocity", "velocity", "euler", 1.0)
    with pytest.raises(
        OptionError, match=r"; take a model that predicts the velocity or the endpoint, or list"
    ):
        Transitions.build(grid, "epsilon", "velocity", "ddim", 1.0)
    clean = DiffusionScheduler(torch.tensor([1.0, 0.5, 0.1])).time_grid(3)
    with pytest.raises(OptionError, match=r"beta = 0\); leave that time out of the grid"):
        Transitions.build(clean, "epsilon", "velocity", "ddim", 1.0)


def test_an_unstable_grid_of_euler_is_said_to_be_one():
    with pytest.warns(UserWarning, match=r"unstable on this grid: .* by -1[0-9]\.\d"):
        Transitions.build(CosineScheduler().time_grid(10), "velocity", "velocity", "euler", 1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Transitions.build(CosineScheduler().time_grid(10), "velocity", "velocity", "ddim", 1.0)
        Transitions.build(
            DiffusionScheduler.from_diffusers(DDIMScheduler(**SD)).time_grid(20),
            "epsilon",
            "velocity",
            "euler",
            1.0,
        )
