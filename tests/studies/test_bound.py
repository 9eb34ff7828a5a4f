"""The bound that is printed for an environment is the free energy."""

import re

import numpy as np
import pytest

from flowgym_gym.agents import load_preset
from flowgym_gym.agents.runs.environments import make_vector_env
from flowgym_gym.agents.runs.episodes import held_out_seeds
from flowgym_gym.errors import OptionError
from flowgym_gym.optimal_control.bound import continued_returns, free_energies, free_energy
from flowgym_gym.optimal_control.optimum import uncontrolled_value
from studies import bound

ID, GAUSSIAN = "flowgym/GaussianMixture-Binary-v0", "flowgym/GaussianMixture-Gaussian-v0"


@pytest.mark.second
def test_it_is_that_of_dynamic_programming(capsys):
    bound.main([ID, "--noises", "100", "--continuations", "200", "--set", "control_cost_weight=5"])
    settings = load_preset(ID)
    settings["env"]["control_cost_weight"] = 5.0
    env = make_vector_env(ID, settings, 1)
    lines = capsys.readouterr().out.splitlines()
    for line, exact in zip(lines, (uncontrolled_value(env), free_energy(env)), strict=True):
        mean, half = map(float, re.search(r"([\d.]+) \+- ([\d.]+)$", line).groups())
        assert abs(mean - exact) < 1.5 * half
        assert half < 0.3 * exact


def test_too_few_continuations_give_no_estimate_but_what_is_certain(capsys):
    bound.main([GAUSSIAN, "--noises", "64", "--continuations", "64"])
    (line,) = capsys.readouterr().out.splitlines()[1:]
    least = float(
        re.fullmatch(
            r"the bound is at least ([\d.]+); 64 continuations are too few to estimate it", line
        )[1]
    )
    exact = free_energy(make_vector_env(GAUSSIAN, load_preset(GAUSSIAN), 1))
    assert 0.5 * exact < least < exact - 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--noises", "1"], "--noises is 1, expected at least 2"),
        (["--continuations", "7"], "--continuations is 7, expected at least 8"),
        (["--set", "control_cost_weight=0"], "control_cost_weight is 0, expected a number above 0"),
    ],
)
def test_numbers_that_give_no_bound_are_refused(arguments, message, capsys):
    with pytest.raises(SystemExit):
        bound.main([GAUSSIAN, *arguments])
    assert message in capsys.readouterr().err


def test_a_process_without_noise_has_no_bound():
    with pytest.raises(OptionError, match=r"draws no noise.* take a noise_level above 0"):
        bound.main([GAUSSIAN, "--set", "noise_level=0"])


def test_continuations_share_their_beginning_and_nothing_else():
    settings = load_preset(GAUSSIAN)
    found = continued_returns(
        make_vector_env(GAUSSIAN, settings, 4, "Disabled"), held_out_seeds(12)[::4]
    )
    assert len(np.unique(found)) > 6
    settings["env"]["noise_level"] = 1e-6
    still = continued_returns(
        make_vector_env(GAUSSIAN, settings, 4, "Disabled"), held_out_seeds(12)[::4]
    )
    assert still == pytest.approx(np.repeat(still[:, :1], 4, axis=1), abs=1e-5)
    assert len(np.unique(still.round(3))) == 3


def test_free_energies_make_up_for_the_logarithm_of_few_continuations():
    weight, std = 4.0, 2.0
    found = free_energies(np.random.default_rng(0).normal(1.0, std, (100_000, 8)), weight)
    # That of a Gaussian; without the correction it would be 0.07 less.
    assert found.mean() == pytest.approx(1 + std**2 / (2 * weight), abs=0.01)
