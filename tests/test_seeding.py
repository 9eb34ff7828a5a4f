"""Seeds of many sub-environments, and the noise that they stand for."""

import subprocess
import sys

import gymnasium
import numpy as np
import pytest
import torch

from flowgym_gym import seeds
from flowgym_gym.envs.randomness import EpisodeSeed, seed_generator
from flowgym_gym.errors import OptionError

# Sixteen dimensions: numbers of 24 random bits alone would meet by chance.
MIXTURE = {
    "base_model": "2d/gaussian_mixture",
    "reward": "2d/gaussian",
    "reward_kwargs": {"mean": [0.0] * 16, "std": 1.0},
    "base_model_kwargs": {"means": [[0.0] * 16], "stds": [1.0], "weights": [1.0]},
    "discretization_steps": 1,
}


def reference(seed):
    """numpy's own Mersenne twister with the words that its SeedSequence makes of a seed."""
    twister = np.random.MT19937()
    words = np.random.SeedSequence(seed).generate_state(624)
    twister.state = {"bit_generator": "MT19937", "state": {"key": words, "pos": 624}}
    return twister


@pytest.mark.parametrize("seed", [2**32, 2**40 + 3, 2**63 - 1, 2**63 + 5])
def test_a_wide_seed_fills_the_whole_twister_as_numpy_would(seed):
    generator = torch.Generator()
    seed_generator(generator, seed)
    drawn = torch.empty(2000, dtype=torch.int32).random_(0, 2**16, generator=generator)
    assert drawn.tolist() == (reference(seed).random_raw(2000) % 2**16).tolist()
    assert generator.initial_seed() == seed
    assert torch.Generator().set_state(generator.get_state()).initial_seed() == seed


@pytest.mark.parametrize("seed", [0, 7, 2**31, 2**32 - 1])
def test_a_narrow_seed_is_torchs_own(seed):
    generator = torch.Generator()
    seed_generator(generator, seed)
    assert torch.equal(generator.get_state(), torch.Generator().manual_seed(seed).get_state())


def test_an_episodes_seed_counts_whole_where_that_of_its_sub_environment_is_wide():
    for seed, whole in ((3, False), (2**32 + 3, True)):
        generator = torch.Generator()
        seed_generator(generator, seed)
        episode = EpisodeSeed.draw(generator)
        assert episode.whole is whole
        same = torch.Generator().manual_seed(episode.value % 2**32)
        assert (torch.rand(1, generator=same) == torch.rand(1, generator=episode.generator())) == (
            not whole
        )


def test_seeds_are_those_of_numpys_seed_sequence():
    found = seeds(5, 3, rank=2)
    for i, seed in enumerate(found):
        (bits,) = np.random.SeedSequence(5, spawn_key=(2, i)).generate_state(1, np.uint64)
        assert seed == 2**32 + int(bits) % (2**63 - 2**32)
    assert all(type(seed) is int for seed in found)
    assert seeds(5, 2, rank=2) == found[:2]
    assert seeds(np.int64(5), np.int32(3), rank=np.uint8(2)) == found


def test_no_two_seeds_ranks_and_sub_environments_have_a_seed_in_common():
    found = [one for seed in range(40) for rank in range(8) for one in seeds(seed, 32, rank)]
    found += [
        one
        for seed in (2**32, 2**64, 2**200)
        for rank in (2**31, 2**32 - 1)
        for one in seeds(seed, 32, rank)
    ]
    assert len(set(found)) == len(found)
    assert min(found) >= 2**32
    assert max(found) < 2**63


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((-1, 2), "seed is -1"),
        ((0.5, 2), "seed is 0.5"),
        ((True, 2), "seed is True"),
        (("0", 2), "seed is '0'"),
        ((0, 0), "num_envs is 0"),
        ((0, None), "num_envs is None"),
        ((0, 2, -1), "rank is -1"),
        ((0, 2, 2**32), "rank is 4294967296"),
    ],
)
def test_arguments_that_make_no_seeds_are_named(arguments, message):
    with pytest.raises(OptionError, match=message):
        seeds(*arguments)


def test_seeds_need_no_torch():
    code = "import sys, flowgym_gym; flowgym_gym.seeds(0, 4); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


@pytest.fixture(scope="module")
def many():
    """A vector environment of 32 with states of sixteen numbers."""
    return gymnasium.make_vec(
        "flowgym/Denoising-v0", num_envs=32, autoreset_mode="SameStep", **MIXTURE
    )


def test_no_two_initial_states_are_equal_over_seeds_ranks_and_sub_environments(many):
    rows = []
    for seed in range(12):
        for rank in range(4):
            observations, _ = many.reset(seed=seeds(seed, 32, rank))
            following, *_ = many.step(np.zeros(many.action_space.shape, np.float32))
            rows += [row.tobytes() for row in (*observations["latent"], *following["latent"])]
    assert len(rows) == 12 * 4 * 64
    assert len(set(rows)) == len(rows)


def test_neighbouring_integer_seeds_share_all_but_one_of_the_sub_environments_as_in_gymnasium(many):
    first, second = (many.reset(seed=seed)[0]["latent"] for seed in (0, 1))
    assert np.array_equal(first[1:], second[:-1])


def test_a_wide_seed_means_the_same_alone_and_in_a_batch(many):
    given = seeds(3, 32)
    together = many.reset(seed=given)[0]["latent"]
    alone = gymnasium.make("flowgym/Denoising-v0", **MIXTURE)
    for i in (0, 31):
        assert np.array_equal(alone.reset(seed=given[i])[0]["latent"], together[i])


def test_a_state_remembers_that_its_seed_is_wide(many):
    many.reset(seed=seeds(0, 32))
    state = many.unwrapped.get_state()
    expected = many.reset()[0]["latent"]
    many.reset(seed=5)
    many.unwrapped.set_state(state)
    assert np.array_equal(many.reset()[0]["latent"], expected)
