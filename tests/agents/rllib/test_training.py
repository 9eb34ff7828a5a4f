import numpy as np
import pytest

pytest.importorskip("ray.rllib", reason="RLlib is in the extra rllib; run .ci/run rllib")
pytestmark = pytest.mark.second

from ray.rllib.algorithms.algorithm import Algorithm

from flowgym_gym.agents.rllib import as_policy, config
from flowgym_gym.envs import environment_of
from tests.agents.rllib.conftest import MIXTURE, quick
from tests.conftest import RED


def count_calls(runner, steps):
    """How often the network is called in a number of vector steps of a runner."""
    calls = []
    unet = environment_of(runner.env.unwrapped).base_model.unet
    handle = unet.register_forward_hook(lambda *_: calls.append(1))
    runner.sample(num_timesteps=steps * runner.num_envs)
    handle.remove()
    return len(calls)


@pytest.mark.parametrize("runners", [0, 1])
def test_a_runner_calls_the_network_once_for_a_step_of_all_its_sub_environments(runners, build):
    made = quick(config(RED, runners=runners, discretization_steps=4), num_envs=8)
    algorithm = build(made)
    (calls,) = algorithm.env_runner_group.foreach_env_runner(
        lambda runner: count_calls(runner, 4), local_env_runner=runners == 0
    )
    assert calls == 4


@pytest.mark.parametrize("algo", ["ppo", "sac"])
def test_it_trains_on_pictures(algo, build):
    algorithm = build(quick(config(RED, algo, discretization_steps=4), algo))
    before = as_policy(algorithm)
    results = [algorithm.train() for _ in range(2)]
    assert results[1]["num_env_steps_sampled_lifetime"] >= 64
    assert 0 < results[1]["env_runners"]["episode_return_mean"] < 100
    observation, _ = algorithm.env_runner.env.reset(seed=0)
    actions = [
        policy.predict(observation, deterministic=True)[0]
        for policy in (before, as_policy(algorithm))
    ]
    assert not np.any(actions[0])
    assert np.all(np.isfinite(actions[1]))
    assert np.any(actions[1])


def test_sub_environments_split_over_runners_sample_as_much(build):
    made = quick(config(MIXTURE, runners=2), num_envs=4).training(
        train_batch_size_per_learner=160, minibatch_size=80
    )
    algorithm = build(made)
    result = algorithm.train()
    assert result["num_env_steps_sampled_lifetime"] == 160
    assert result["env_runners"]["num_episodes"] == 8
    assert np.isfinite(result["env_runners"]["episode_return_mean"])


@pytest.mark.parametrize("algo", ["ppo", "sac"])
def test_a_training_goes_on_from_a_checkpoint(algo, build, tmp_path):
    algorithm = build(quick(config(MIXTURE, algo), algo))
    done = algorithm.train()["num_env_steps_sampled_lifetime"]
    saved = algorithm.save_to_path(str(tmp_path))
    weights = algorithm.get_module().state_dict()
    algorithm.stop()
    restored = Algorithm.from_checkpoint(saved)
    try:
        found = restored.get_module().state_dict()
        assert all(np.array_equal(found[name], weights[name]) for name in weights)
        again = restored.train()
        assert again["num_env_steps_sampled_lifetime"] > done
        assert again["training_iteration"] == 2
    finally:
        restored.stop()
