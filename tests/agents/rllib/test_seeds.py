import itertools

import numpy as np
import pytest

pytest.importorskip("ray.rllib", reason="RLlib is in the extra rllib; run .ci/run rllib")
pytestmark = pytest.mark.second

from ray.rllib.env.single_agent_env_runner import SingleAgentEnvRunner

from flowgym_gym.agents.rllib import LatentEnvRunner, config
from tests.agents.rllib.conftest import MIXTURE, quick


def initial_noises(runner, rounds=1, **kwargs):
    """The initial noise of each episode that a runner plays."""
    found = []
    for _ in range(rounds):
        for episode in runner.sample(**kwargs):
            if episode.t_started == 0:
                found.append(tuple(np.ravel(episode.get_observations(0)["latent"])))
    return found


def runner_of(seed, index=1, cls=LatentEnvRunner, num_envs=8, **changes):
    made = quick(config(MIXTURE, discretization_steps=2), num_envs=num_envs).debugging(seed=seed)
    if cls is SingleAgentEnvRunner:
        made.env_config = {"discretization_steps": 2}
    made.env_runners(**changes)
    return cls(config=made, worker_index=index, num_workers=4)


def shared(streams):
    """How many noises are in more than one of some streams."""
    pairs = itertools.combinations(map(set, streams), 2)
    return sum(len(first & second) for first, second in pairs)


@pytest.mark.parametrize(("cls", "count"), [(LatentEnvRunner, 0), (SingleAgentEnvRunner, 38)])
def test_neighbouring_runners_and_runs_share_no_noise(cls, count):
    # RLlib's own have seeds 1, 2, 3 and 1 + 3, of which neighbours have seven streams of eight in
    # common, the next six, and the first and the last five: 3 * 7 + 2 * 6 + 5.
    runners = [runner_of(0, index, cls) for index in (1, 2, 3)] + [runner_of(1, 3, cls)]
    streams = [initial_noises(runner, num_timesteps=16) for runner in runners]
    assert all(len(set(stream)) == 8 for stream in streams)
    assert shared(streams) == count


def test_no_noise_comes_again_at_the_next_sample_of_complete_episodes():
    runner = runner_of(0, batch_mode="complete_episodes")
    noises = initial_noises(runner, rounds=4)
    assert len(noises) == len(set(noises)) == 32
    theirs = runner_of(0, cls=SingleAgentEnvRunner, batch_mode="complete_episodes")
    assert len(set(initial_noises(theirs, rounds=4))) == 8


def test_a_seed_gives_the_same_training_again():
    streams = [initial_noises(runner_of(7), num_timesteps=64) for _ in range(2)]
    assert streams[0] == streams[1]
    assert len(set(streams[0])) == 32


def test_a_runner_that_comes_back_draws_other_noise_than_at_the_beginning():
    first, back, remade = runner_of(0), runner_of(0), runner_of(0)
    back.set_state({"num_env_steps_sampled_lifetime": 1000})
    remade.make_env()
    streams = [initial_noises(runner, num_timesteps=16) for runner in (first, back, remade)]
    assert shared(streams) == 0


def test_evaluations_have_held_out_seeds_the_same_each_time():
    training = initial_noises(runner_of(0), num_timesteps=64)
    runner = runner_of(0)
    runner.config.in_evaluation = True
    rounds = [initial_noises(runner, num_episodes=8) for _ in range(2)]
    assert rounds[0] == rounds[1]
    assert not set(rounds[0]) & set(training)


def test_actions_of_neighbouring_runners_share_no_noise():
    actions = []
    for runner in (runner_of(0, 1), runner_of(0, 2), runner_of(1, 1)):
        episodes = runner.sample(num_timesteps=16)
        actions.append({float(np.ravel(episode.get_actions(0))[0]) for episode in episodes})
    assert shared(actions) == 0


def test_without_a_seed_noise_is_random():
    streams = [initial_noises(runner_of(None), num_timesteps=16) for _ in range(2)]
    assert shared(streams) == 0
