"""stable-baselines3 and sb3-contrib on the plain Gymnasium environment, without this package's own
adapter.
"""

import copy

import gymnasium
import numpy as np
import pytest
import torch
from sb3_contrib import TQC
from stable_baselines3 import PPO, SAC
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_checker import check_env
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecFrameStack, VecNormalize

from tests.conftest import FLOWGYM_IDS, RED

MIXTURE = "flowgym/GaussianMixture-Gaussian-v0"
STEPS = 3
NETWORK = {"policy_kwargs": {"net_arch": [8]}, "seed": 0, "device": "cpu"}
OFF_POLICY = {**NETWORK, "buffer_size": 100, "learning_starts": 6, "batch_size": 4}
AGENTS = {
    "PPO": (PPO, {**NETWORK, "n_steps": 6, "batch_size": 6, "n_epochs": 2}),
    "SAC": (SAC, OFF_POLICY),
    "TQC": (TQC, OFF_POLICY),
}


class Paid(BaseCallback):
    """Keeps the rewards of every step."""

    def __init__(self):
        super().__init__()
        self.rewards = []

    def _on_step(self):
        self.rewards.append(self.locals["rewards"].copy())
        return True


def make(name, env):
    algorithm, options = AGENTS[name]
    # SB3 writes into policy_kwargs.
    return algorithm("MultiInputPolicy", env, **copy.deepcopy(options))


def learn(name, env, timesteps):
    """Train, and check what training says about itself and does to the networks."""
    agent = make(name, env)
    before = {key: value.clone() for key, value in agent.policy.state_dict().items()}
    paid = Paid()
    agent.learn(timesteps, callback=paid)
    assert agent.num_timesteps == timesteps
    after = agent.policy.state_dict()
    assert all(torch.isfinite(value).all() for value in after.values())
    assert any(not torch.equal(value, after[key]) for key, value in before.items())

    # What SB3's Monitor reports of the episodes is what was paid, and every episode has the
    # promised length.
    rewards = np.array(paid.rewards)
    returns = rewards.reshape(-1, STEPS, rewards.shape[1]).sum(axis=1)
    reported = [(episode["r"], episode["l"]) for episode in agent.ep_info_buffer]
    assert [length for _, length in reported] == [STEPS] * (timesteps // STEPS)
    # A Monitor rounds to six digits.
    np.testing.assert_allclose([r for r, _ in reported], returns.flatten(), atol=1e-4)
    return agent


@pytest.mark.parametrize("id", FLOWGYM_IDS)
def test_the_environment_checker_of_sb3_only_takes_latents_for_images(id, recwarn):
    check_env(gymnasium.make(id, discretization_steps=STEPS, render_mode="rgb_array"))
    said = [str(w.message) for w in recwarn if "stable_baselines3" in w.filename]
    assert all("image" in message for message in said)
    if "GaussianMixture" in id:
        assert not said


@pytest.mark.parametrize("id", [RED, MIXTURE])
@pytest.mark.parametrize("name", AGENTS)
def test_agents_learn_on_the_plain_environment(name, id, tmp_path):
    env = gymnasium.make(id, discretization_steps=STEPS)
    agent = learn(name, env, 12)
    observation, _ = env.reset(seed=0)
    action, _ = agent.predict(observation, deterministic=True)
    assert action in env.action_space
    agent.save(tmp_path / "agent.zip")
    again = AGENTS[name][0].load(tmp_path / "agent.zip", env=env, device="cpu")
    np.testing.assert_array_equal(again.predict(observation, deterministic=True)[0], action)


@pytest.mark.parametrize("name", AGENTS)
def test_agents_learn_on_several_environments_in_one_process(name):
    env = make_vec_env(RED, 2, seed=5, env_kwargs={"discretization_steps": STEPS})
    assert isinstance(env, DummyVecEnv)
    learn(name, env, 12)


def test_make_vec_env_gives_every_environment_its_own_seed():
    env = make_vec_env(RED, 2, seed=5, env_kwargs={"discretization_steps": STEPS})
    first = env.reset()["latent"]
    for i in range(2):
        alone = gymnasium.make(RED, discretization_steps=STEPS).reset(seed=5 + i)[0]["latent"]
        np.testing.assert_array_equal(first[i], alone)


@pytest.mark.second
def test_processes_of_their_own_give_the_same_episodes():
    # The processes know the ids only if they import the package: hence its name before the id.
    kwargs = {"seed": 5, "env_kwargs": {"discretization_steps": STEPS}}
    separate = make_vec_env(f"flowgym_gym:{RED}", 2, vec_env_cls=SubprocVecEnv, **kwargs)
    together = make_vec_env(RED, 2, **kwargs)
    try:
        assert separate.observation_space == together.observation_space
        observations = separate.reset(), together.reset()
        separate.action_space.seed(0)
        for step in range(STEPS + 1):
            for key, value in observations[1].items():
                np.testing.assert_allclose(observations[0][key], value, atol=1e-5)
            actions = np.stack([separate.action_space.sample() for _ in range(2)])
            results = separate.step(actions), together.step(actions)
            np.testing.assert_allclose(results[0][1], results[1][1], rtol=1e-5)
            assert results[0][2].tolist() == results[1][2].tolist() == [step == STEPS - 1] * 2
            observations = results[0][0], results[1][0]
        learn("PPO", separate, 12)
    finally:
        separate.close()


def test_evaluate_policy_plays_whole_episodes():
    env = make_vec_env(RED, 2, seed=5, env_kwargs={"discretization_steps": STEPS})
    agent = make("PPO", env)
    env.seed(5)
    returns, lengths = evaluate_policy(agent, env, n_eval_episodes=2, return_episode_rewards=True)
    assert lengths == [STEPS] * 2
    for i, expected in enumerate(returns):
        alone = gymnasium.make(RED, discretization_steps=STEPS)
        observation, _ = alone.reset(seed=5 + i)
        total, terminated = 0.0, False
        while not terminated:
            action, _ = agent.predict(observation, deterministic=True)
            observation, reward, terminated, _, _ = alone.step(action)
            total += reward
        assert total == pytest.approx(expected, rel=1e-4)


def test_wrappers_of_sb3_go_around_it():
    env = make_vec_env(MIXTURE, 2, env_kwargs={"discretization_steps": STEPS})
    stacked = VecFrameStack(env, 2)
    assert stacked.observation_space["latent"].shape == (2,)
    learn("PPO", stacked, 12)
    normalized = VecNormalize(
        make_vec_env(MIXTURE, 2, env_kwargs={"discretization_steps": STEPS}),
        norm_obs_keys=["latent"],
        norm_reward=False,
    )
    learn("PPO", normalized, 12)
    assert normalized.obs_rms["latent"].count > 12
