"""The bound that is printed for an environment is the free energy."""

import re

import numpy as np
import pytest

from benchmarks import bound
from flowgym_gym.agents import load_preset
from flowgym_gym.agents.settings import make_vector_env
from flowgym_gym.optimal_control import free_energy, uncontrolled_value

ID, GAUSSIAN = "flowgym/GaussianMixture-Binary-v0", "flowgym/GaussianMixture-Gaussian-v0"


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


def test_continuations_share_their_beginning_and_nothing_else():
    settings = load_preset(GAUSSIAN)
    found = bound.returns(GAUSSIAN, settings, 3, 4)
    assert len(np.unique(found)) > 6
    settings["env"]["noise_level"] = 0.0
    still = bound.returns(GAUSSIAN, settings, 3, 4)
    assert still == pytest.approx(np.repeat(still[:, :1], 4, axis=1), abs=1e-5)
    assert len(np.unique(still.round(3))) == 3


def test_free_energies_make_up_for_the_logarithm_of_few_continuations():
    weight, std = 4.0, 2.0
    found = bound.free_energies(np.random.default_rng(0).normal(1.0, std, (100_000, 8)), weight)
    # That of a Gaussian; without the correction it would be 0.07 less.
    assert found.mean() == pytest.approx(1 + std**2 / (2 * weight), abs=0.01)
