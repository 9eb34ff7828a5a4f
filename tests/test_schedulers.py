"""Schedules against closed forms, finite differences and diffusers."""

import math

import pytest
import torch
from diffusers import DDIMScheduler
from hypothesis import given
from hypothesis import strategies as st

from flowgym_gym import (
    ConstantNoiseSchedule,
    CosineScheduler,
    DiffusionScheduler,
    FlowTensor,
    OptimalTransportScheduler,
)
from flowgym_gym.errors import OptionError

TIMES = torch.linspace(0.05, 0.95, 19, dtype=torch.float64)


@pytest.mark.parametrize(
    "scheduler", [OptimalTransportScheduler(), CosineScheduler(1.0), CosineScheduler(2.5)]
)
def test_derivatives_agree_with_finite_differences(scheduler):
    h = 1e-6
    for name in ("alpha", "beta"):
        f = getattr(scheduler, name)
        torch.testing.assert_close(
            getattr(scheduler, f"{name}_dot")(TIMES),
            (f(TIMES + h) - f(TIMES - h)) / (2 * h),
            rtol=1e-6,
            atol=1e-8,
        )


@given(st.floats(0.01, 0.99))
def test_optimal_transport_closed_forms(t):
    scheduler, t = OptimalTransportScheduler(), torch.tensor([t], dtype=torch.float64)
    torch.testing.assert_close(scheduler.kappa(t), 1 / t)
    torch.testing.assert_close(scheduler.eta(t), (1 - t) / t)
    torch.testing.assert_close(scheduler.sigma(t) ** 2, 2 * (1 - t) / t)


@given(st.floats(0.05, 0.95), st.floats(0.5, 3))
def test_cosine_closed_forms(t, nu):
    scheduler, time = CosineScheduler(nu), torch.tensor([t], dtype=torch.float64)
    angle, speed = 0.5 * math.pi * t**nu, 0.5 * math.pi * nu * t ** (nu - 1)
    assert scheduler.alpha(time).item() == pytest.approx(1 - math.cos(angle) ** 2)
    assert scheduler.beta(time).item() == pytest.approx(math.cos(angle) ** 2)
    assert scheduler.kappa(time).item() == pytest.approx(2 * speed / math.tan(angle))
    eta = 2 * speed * math.cos(angle) ** 2 / math.tan(angle)
    assert scheduler.eta(time).item() == pytest.approx(eta)
    assert scheduler.sigma(time).item() == pytest.approx(math.sqrt(2 * eta))


def test_diffusion_schedule_closed_forms():
    abar = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"
    ).alphas_cumprod.double()
    scheduler = DiffusionScheduler(abar)
    k = torch.tensor([0, 1, 400, 999])
    t = 1 - k.double() / 1000
    previous = torch.cat([torch.ones(1, dtype=torch.float64), abar])[k]
    speed = 1000 * (previous - abar[k])
    torch.testing.assert_close(scheduler.alpha(t), abar[k].sqrt())
    torch.testing.assert_close(scheduler.beta(t), (1 - abar[k]).sqrt())
    torch.testing.assert_close(scheduler.alpha_dot(t), speed / (2 * abar[k].sqrt()))
    torch.testing.assert_close(scheduler.beta_dot(t), -speed / (2 * (1 - abar[k]).sqrt()))
    # On a variance-preserving schedule eta equals kappa, half the derivative of log abar.
    torch.testing.assert_close(scheduler.kappa(t), speed / (2 * abar[k]))
    torch.testing.assert_close(scheduler.eta(t), speed / (2 * abar[k]))
    torch.testing.assert_close(scheduler.sigma(t), (speed / abar[k]).sqrt())


def test_coefficients_broadcast_over_a_batch():
    x = FlowTensor(torch.ones(3, 4, 8, 8))
    alpha = OptimalTransportScheduler().alpha(x, torch.tensor([0.0, 0.5, 1.0]))
    assert alpha.shape == (3, 1, 1, 1)
    assert (x * alpha).aggregate("mean").tolist() == [0.0, 0.5, 1.0]


def test_noise_schedule_can_be_replaced():
    scheduler = OptimalTransportScheduler()
    scheduler.noise_schedule = ConstantNoiseSchedule(0.3)
    assert scheduler.sigma(torch.tensor([0.2, 0.4])).tolist() == pytest.approx([0.3, 0.3])
    with pytest.raises(OptionError, match=r"sigma is -0\.3"):
        ConstantNoiseSchedule(-0.3)


@pytest.mark.parametrize(
    "alphas_cumprod",
    [
        [0.9, 0.95],
        [0.9, 0.9],
        [1.1, 0.5],
        [0.5, -0.1],
        [0.5, 0.0, 0.0],
        [[0.9, 0.8]],
        [0.9],
        [math.nan, 0.4],
    ],
)
def test_alphas_cumprod_must_decrease_within_0_and_1(alphas_cumprod):
    with pytest.raises(OptionError, match="alphas_cumprod"):
        DiffusionScheduler(torch.tensor(alphas_cumprod))


def test_a_schedule_may_end_without_signal():
    ddim = DDIMScheduler(rescale_betas_zero_snr=True)
    scheduler = DiffusionScheduler.from_diffusers(ddim)
    assert torch.equal(scheduler.alphas_cumprod, ddim.alphas_cumprod.double())
    assert scheduler.alphas_cumprod[-1] == 0
    scheduler, t = (
        DiffusionScheduler(torch.tensor([0.81, 0.25, 0.0])),
        torch.tensor([1 / 3, 2 / 3], dtype=torch.float64),
    )
    assert scheduler.alpha_dot(t).tolist() == pytest.approx([3 * 0.5, 3 * 0.56 / (2 * 0.5)])
    assert scheduler.beta_dot(t).tolist() == pytest.approx(
        [-3 * 0.25 / 2, -3 * 0.56 / (2 * 0.75**0.5)]
    )


def test_other_schedule_options_are_checked():
    abar = torch.tensor([0.9, 0.5, 0.1])
    with pytest.raises(OptionError, match=r"final_alpha_cumprod is 0\.2"):
        DiffusionScheduler(abar, final_alpha_cumprod=0.2)
    with pytest.raises(OptionError, match="spacing"):
        DiffusionScheduler(abar, spacing="even")
    with pytest.raises(OptionError, match="nu"):
        CosineScheduler(0)
