"""The visited time steps are those of diffusers."""

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from hypothesis import given
from hypothesis import strategies as st

from flowgym_gym import CosineScheduler, DiffusionScheduler, OptimalTransportScheduler
from flowgym_gym.errors import OptionError
from flowgym_gym.time_grid import Grid

SD = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("steps", [1, 2, 7, 10, 33, 50, 333, 999])
def test_visited_time_steps_are_those_of_diffusers(spacing, steps):
    ddim = DDIMScheduler(**SD, timestep_spacing=spacing)
    ddim.set_timesteps(steps)
    grid = DiffusionScheduler.from_diffusers(ddim).time_grid(steps)
    assert grid.timesteps.tolist() == ddim.timesteps.tolist()
    assert grid.steps == steps


@pytest.mark.parametrize("set_alpha_to_one", [False, True])
def test_grid_holds_the_schedule_of_diffusers_and_ends_at_its_final_alpha(set_alpha_to_one):
    ddim = DDIMScheduler(**{**SD, "set_alpha_to_one": set_alpha_to_one})
    ddim.set_timesteps(20)
    grid = DiffusionScheduler.from_diffusers(ddim).time_grid(20)
    expected = torch.cat(
        [ddim.alphas_cumprod[ddim.timesteps], ddim.final_alpha_cumprod.reshape(1)]
    ).double()
    torch.testing.assert_close(grid.alpha**2, expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(grid.beta**2, 1 - expected, rtol=1e-6, atol=0)
    assert grid.times[-1] == 1
    assert (grid.times.diff() > 0).all()


def test_rounding_of_the_time_never_changes_the_time_step():
    scheduler = DiffusionScheduler.from_diffusers(DDIMScheduler(**SD))
    k = torch.arange(1000)
    for dtype in (torch.float32, torch.float64):
        t = (1 - k.double() / 1000).to(dtype)
        assert torch.equal(scheduler.model_input(t), k)


@given(st.integers(0, 999), st.floats(0.01, 0.99))
def test_index_is_the_floor_of_remaining_time(k, fraction):
    scheduler = DiffusionScheduler.from_diffusers(DDIMScheduler(**SD))
    t = torch.tensor([1 - (k + fraction) / 1000], dtype=torch.float64)
    assert scheduler.index(t).item() == k


def test_continuous_schedule_divides_time_evenly():
    grid = OptimalTransportScheduler().time_grid(4)
    assert grid.times.tolist() == [0, 0.25, 0.5, 0.75, 1]
    assert grid.timesteps is None
    torch.testing.assert_close(grid.alpha + grid.beta, torch.ones(5, dtype=torch.float64))


@pytest.mark.parametrize("steps", [0, -3, 2.5, True, "4"])
def test_number_of_steps_must_be_a_positive_whole_number(steps):
    with pytest.raises(OptionError, match="discretization_steps"):
        OptimalTransportScheduler().time_grid(steps)


def test_more_steps_than_the_model_has_are_an_error():
    scheduler = DiffusionScheduler.from_diffusers(DDIMScheduler(**SD))
    with pytest.raises(OptionError, match="1001"):
        scheduler.time_grid(1001)
    with pytest.raises(OptionError, match="1 to 1000"):
        scheduler.time_grid(1000)  # offset 1: diffusers fails on time step 1000, too
    with pytest.raises(OptionError, match="spacing"):
        scheduler.time_grid(10, "karras")


def test_a_grid_may_list_its_times():
    scheduler = DiffusionScheduler.from_diffusers(DDIMScheduler(**SD))
    spaced = scheduler.time_grid(20)
    listed = scheduler.time_grid(spaced.timesteps.tolist())
    for name in ("times", "timesteps", "alpha", "beta", "sigma"):
        assert torch.equal(getattr(listed, name), getattr(spaced, name))
    uneven = scheduler.time_grid(np.array([999, 850, 736, 645, 545, 455, 343, 233, 124, 24]))
    assert uneven.timesteps.tolist() == [999, 850, 736, 645, 545, 455, 343, 233, 124, 24]
    grid = OptimalTransportScheduler().time_grid([0.0, 0.1, 0.5])
    assert grid.times.tolist() == [0, 0.1, 0.5, 1]
    assert grid.alpha.tolist() == [0, 0.1, 0.5, 1]


@pytest.mark.parametrize(
    ("scheduler", "listed", "message"),
    [
        ("diffusion", [500, 500, 1], "time step 500 is followed by 500"),
        ("diffusion", [1, 500], "time step 1 is followed by 500"),
        ("diffusion", [1000, 500], r"whole numbers from 999 \(noise\) to 0"),
        ("diffusion", [500, -1], "whole numbers from 999"),
        ("diffusion", [0.5, 0.25], "whole numbers from 999"),
        ("continuous", [0.5, 0.5], "times go from 0.5 to 0.5 at step 0"),
        ("continuous", [0.0, 0.6, 0.5], "times go from 0.6 to 0.5 at step 1"),
        ("continuous", [0.0, 1.0], "no step starts at time 1"),
        ("continuous", [-0.5, 0.5], r"lie in \[0, 1\]"),
        ("continuous", [0.0, 1.5], "times go|lie in"),
        ("continuous", [], "discretization_steps is"),
        ("continuous", [0.0, float("nan")], "discretization_steps is"),
    ],
)
def test_listed_times_that_are_repeated_unordered_or_outside_are_named(scheduler, listed, message):
    scheduler = (
        DiffusionScheduler.from_diffusers(DDIMScheduler(**SD))
        if scheduler == "diffusion"
        else OptimalTransportScheduler()
    )
    with pytest.raises(OptionError, match=message):
        scheduler.time_grid(listed)


def test_listed_times_leave_nothing_to_space():
    with pytest.raises(OptionError, match="leave one of them out"):
        OptimalTransportScheduler().time_grid([0.0, 0.5], "linspace")


def test_a_grid_of_ones_own_scheduler_is_checked():
    numbers, rising = torch.tensor(
        [[0.0, 0.5, 0.4, 1.0], [0.0, 0.4, 0.5, 1.0]], dtype=torch.float64
    )
    with pytest.raises(OptionError, match=r"times go from 0\.5 to 0\.4 at step 1"):
        Grid(numbers, None, rising, 1 - rising, rising, rising, rising)
    with pytest.raises(OptionError, match=r"beta of the grid has shape \(3,\), expected \(4,\)"):
        Grid(rising, None, rising, rising[:3], rising, rising, rising)
    with pytest.raises(
        OptionError, match="alpha goes from 1 to 0 along the grid; time runs from noise"
    ):
        Grid(rising, None, 1 - rising, rising, rising, rising, rising)
    with pytest.raises(OptionError, match="beta goes from 0 to 1 along the grid"):
        Grid(rising, None, rising, rising, rising, rising, rising)


def test_a_scheduler_whose_time_runs_from_data_to_noise_is_refused():
    class Backwards(OptimalTransportScheduler):
        def _alpha(self, t):
            return 1 - t

        def _alpha_dot(self, t):
            return -torch.ones_like(t)

    with pytest.raises(OptionError, match="time runs from noise"):
        Backwards().time_grid(5)


@pytest.mark.parametrize("nu", [0.2, 1.0, 3.0])
def test_grids_of_the_cosine_schedule_begin_with_next_to_no_data(nu):
    grid = CosineScheduler(nu).time_grid(20)
    assert grid.alpha[0].item() == pytest.approx(np.sin(0.5 * np.pi * 0.01) ** 2)
    assert grid.alpha_dot[0] > 0
