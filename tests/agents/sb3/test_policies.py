import math

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Dict
from sb3_contrib import TQC
from sb3_contrib.tqc.policies import MultiInputPolicy
from stable_baselines3 import PPO, SAC

from flowgym_gym.agents import LatentActorCriticPolicy, LatentSACPolicy, LatentTQCPolicy, SB3VecEnv
from flowgym_gym.agents.sb3.networks import Convolution, LatentEncoder, sinusoidal
from flowgym_gym.errors import OptionError
from flowgym_gym.wrappers.vector import CoarseAction
from tests.conftest import RED

POLICIES = [LatentActorCriticPolicy, LatentSACPolicy, LatentTQCPolicy]
ALGORITHMS = {
    "ppo": (PPO, LatentActorCriticPolicy, {"n_steps": 4, "batch_size": 8, "n_epochs": 1}),
    "sac": (SAC, LatentSACPolicy, {"buffer_size": 64, "learning_starts": 4, "batch_size": 8}),
    "tqc": (TQC, LatentTQCPolicy, {"buffer_size": 64, "learning_starts": 4, "batch_size": 8}),
}


def spaces(latent, action, prompt=None):
    observation = {
        "latent": Box(-np.inf, np.inf, latent, np.float32),
        "time": Box(0, 1, (1,), np.float32),
    }
    if prompt:
        observation["prompt"] = Box(-np.inf, np.inf, (prompt,), np.float32)
    return Dict(observation), Box(-1, 1, action, np.float32)


def observe(space, n=3, seed=0):
    rng = np.random.default_rng(seed)
    return {
        key: rng.uniform(0, 1, (n, *box.shape)).astype(np.float32) for key, box in space.items()
    }


def parameters(module):
    return sum(p.numel() for p in module.parameters())


def make_agent(name, resolution=1, num_envs=2, **policy_kwargs):
    algorithm, policy, kwargs = ALGORITHMS[name]
    env = gymnasium.make_vec(
        RED, num_envs=num_envs, autoreset_mode="SameStep", discretization_steps=2
    )
    env = SB3VecEnv(CoarseAction(env, resolution))
    return algorithm(
        policy, env, policy_kwargs={"width": 8, **policy_kwargs}, seed=0, device="cpu", **kwargs
    )


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(
    ("latent", "action"),
    [
        ((4, 8, 8), (4, 1, 1)),
        ((4, 8, 8), (4, 3, 3)),
        ((4, 8, 8), (4, 8, 8)),
        ((4, 16, 24), (4, 2, 2)),
        ((16, 5, 5), (16, 5, 5)),
        ((2,), (2,)),
    ],
)
@pytest.mark.parametrize("prompt", [None, 7])
def test_untrained_deterministic_action_is_exactly_zero(policy, latent, action, prompt):
    observation_space, action_space = spaces(latent, action, prompt)
    agent = policy(observation_space, action_space, lambda _: 1e-3, width=8)
    actions, _ = agent.predict(observe(observation_space), deterministic=True)
    assert actions.shape == (3, *action)
    np.testing.assert_array_equal(actions, np.zeros_like(actions))
    exploring, _ = agent.predict(observe(observation_space), deterministic=False)
    assert np.abs(exploring).min() > 0


@pytest.mark.parametrize("policy", POLICIES)
def test_initial_standard_deviation_is_the_one_asked_for(policy):
    observation_space, action_space = spaces((4, 8, 8), (4, 8, 8))
    torch.manual_seed(0)
    agent = policy(observation_space, action_space, lambda _: 1e-3, width=8, log_std_init=-2.0)
    actions, _ = agent.predict(observe(observation_space, n=64), deterministic=False)
    # tanh, which squashes SAC's actions, changes a deviation of 0.135 by 2 %.
    assert actions.std() == pytest.approx(np.exp(-2.0), rel=0.04)


def test_a_change_in_a_corner_of_the_latent_moves_the_action_there_only():
    observation_space, action_space = spaces((4, 32, 32), (4, 8, 8))
    agent = LatentActorCriticPolicy(observation_space, action_space, lambda _: 1e-3, width=8)
    torch.nn.init.normal_(
        agent.action_net[0].weight, std=0.05
    )  # small, so that no action is clipped
    observations = observe(observation_space, n=1)
    before, _ = agent.predict(observations, deterministic=True)
    observations["latent"][:, :, :4, :4] += 1
    after, _ = agent.predict(observations, deterministic=True)
    moved = np.abs(after - before)[0].max(axis=0)
    assert moved[0, 0] > 0
    assert moved[3:, 3:].max() == 0


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("key", ["latent", "time", "prompt"])
def test_the_action_depends_on_every_part_of_the_observation(policy, key):
    observation_space, action_space = spaces((4, 8, 8), (4, 2, 2), prompt=5)
    agent = policy(observation_space, action_space, lambda _: 1e-3, width=8)
    head = agent.action_net if policy is LatentActorCriticPolicy else agent.actor.mu
    torch.nn.init.normal_(head[0].weight, std=0.05)  # small, so that no action is clipped
    first, second = observe(observation_space), observe(observation_space)
    second[key] = observe(observation_space, seed=1)[key]
    actions = [agent.predict(o, deterministic=True)[0] for o in (first, second)]
    assert np.abs(actions[0] - actions[1]).min(axis=(1, 2, 3)).max() > 0


def test_sac_critic_depends_on_the_action():
    observation_space, action_space = spaces((4, 8, 8), (4, 2, 2))
    agent = LatentSACPolicy(observation_space, action_space, lambda _: 1e-3, width=8)
    observations = agent.obs_to_tensor(observe(observation_space))[0]
    values = [agent.critic(observations, torch.full((3, 16), a)) for a in (0.0, 0.5)]
    assert len(values[0]) == 2
    assert values[0][0].shape == (3, 1)
    assert (values[0][0] != values[1][0]).all()
    assert (agent.critic.q1_forward(observations, torch.zeros(3, 16)) == values[0][0]).all()


def test_tqc_critics_give_quantiles_of_the_action_in_the_shape_of_sb3_contribs_own():
    observation_space, action_space = spaces((4, 8, 8), (4, 2, 2))
    kwargs = {"n_critics": 3, "n_quantiles": 7}
    ours = LatentTQCPolicy(
        observation_space, action_space, lambda _: 1e-3, width=8, **kwargs
    ).critic
    theirs = MultiInputPolicy(observation_space, action_space, lambda _: 1e-3, **kwargs).critic
    agent = LatentTQCPolicy(observation_space, action_space, lambda _: 1e-3, width=8)
    observations = agent.obs_to_tensor(observe(observation_space))[0]
    values = [ours(observations, torch.full((3, 16), a)) for a in (0.0, 0.5)]
    assert values[0].shape == theirs(observations, torch.zeros(3, 16)).shape == (3, 3, 7)
    for name in ("quantiles_total", "n_critics", "n_quantiles"):
        assert getattr(ours, name) == getattr(theirs, name)
    assert (values[0] != values[1]).all()


def test_value_scale_is_the_unit_of_the_critic():
    observation_space, action_space = spaces((4, 8, 8), (4, 2, 2))
    values = []
    for scale in (1.0, 100.0):
        torch.manual_seed(0)
        agent = LatentActorCriticPolicy(
            observation_space, action_space, lambda _: 1e-3, width=8, value_scale=scale
        )
        values.append(agent.predict_values(agent.obs_to_tensor(observe(observation_space))[0]))
    torch.testing.assert_close(values[1], 100 * values[0])


def test_sinusoidal_embedding_tells_neighbouring_times_apart():
    times = torch.linspace(0, 1, 51)[:, None]
    distances = torch.cdist(sinusoidal(times), sinusoidal(times)) + 10 * torch.eye(51)
    assert distances.min() > 0.5


def test_parameter_counts_are_those_of_the_docstrings():
    observation_space, action_space = spaces((4, 8, 8), (4, 1, 1))
    ppo = LatentActorCriticPolicy(observation_space, action_space, lambda _: 1e-3)
    assert parameters(ppo.pi_features_extractor) + parameters(ppo.action_net) == 24_036
    assert parameters(ppo.vf_features_extractor) + parameters(ppo.value_net) == 24_993
    assert parameters(ppo) == 24_036 + 24_993 + 4
    sac = LatentSACPolicy(observation_space, action_space, lambda _: 1e-3)
    assert parameters(sac.actor) == 24_168
    assert parameters(sac.critic) == 26_338
    tqc = LatentTQCPolicy(observation_space, action_space, lambda _: 1e-3)
    assert parameters(tqc.actor) == 24_168
    assert parameters(tqc.critic) == 27_922
    observation_space, _ = spaces((4, 8, 8), (4, 1, 1), prompt=5)
    w = 16
    encoder = LatentEncoder(observation_space, (1, 1), width=w, blocks=2)
    expected = (9 * 4 * w + w) + (w**2 + 34 * w) + (5 * w + w) + 2 * (20 * w**2 + 4 * w)
    assert parameters(encoder) == expected
    observation_space, _ = spaces((1,), (1,))
    assert parameters(LatentEncoder(observation_space, (1, 1), width=32, blocks=0)) == 2_176
    assert parameters(LatentEncoder(observation_space, (1, 1), width=32, blocks=1)) == 2_176 + 4_224


@pytest.mark.parametrize("name", ALGORITHMS)
def test_learning_changes_what_it_should_and_save_and_load_keep_it(name, tmp_path):
    agent = make_agent(name, resolution=2, value_scale=10.0)
    before = {key: value.clone() for key, value in agent.policy.state_dict().items()}
    agent.learn(16)
    after = agent.policy.state_dict()
    unchanged = [key for key, value in after.items() if torch.equal(value, before[key])]
    assert not unchanged
    observations = agent.env.reset()
    agent.save(tmp_path / "agent")
    loaded = ALGORITHMS[name][0].load(tmp_path / "agent", device="cpu")
    assert type(loaded.policy) is type(agent.policy)
    actions = [a.predict(observations, deterministic=True)[0] for a in (agent, loaded)]
    np.testing.assert_array_equal(*actions)
    assert np.abs(actions[0]).max() > 0


@pytest.mark.parametrize("name", ALGORITHMS)
def test_a_policy_alone_can_be_saved_and_loaded(name, tmp_path):
    agent = make_agent(name, blocks=2, value_scale=10.0, log_std_init=-1.5)
    agent.learn(16)
    agent.policy.save(tmp_path / "policy.pth")
    loaded = type(agent.policy).load(tmp_path / "policy.pth", device="cpu")
    for key, value in agent.policy.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[key], value)
    assert loaded.value_scale == 10.0


@pytest.mark.parametrize("policy", POLICIES)
def test_spaces_it_cannot_act_in_are_refused(policy):
    observation_space, action_space = spaces((4, 8, 8), (4, 1, 1))
    with pytest.raises(OptionError, match="observation space"):
        policy(observation_space["latent"], action_space, lambda _: 1e-3)
    with pytest.raises(OptionError, match="action space"):
        policy(observation_space, gymnasium.spaces.Discrete(3), lambda _: 1e-3)
    with pytest.raises(OptionError, match="use_sde"):
        policy(observation_space, action_space, lambda _: 1e-3, use_sde=True)


def test_a_convolution_of_a_single_cell_is_the_convolution():
    torch.manual_seed(0)
    for shape, kernel in [((5, 6, 1, 1), 1), ((5, 6, 2, 3), 1), ((5, 6, 1, 1), 3)]:
        layer = Convolution(6, 4, kernel, padding=kernel // 2)
        features = torch.randn(shape)
        expected = torch.nn.functional.conv2d(
            features, layer.weight, layer.bias, padding=kernel // 2
        )
        torch.testing.assert_close(layer(features), expected)


def test_exploration_can_depend_on_the_observation(tmp_path):
    observation_space, action_space = spaces((4, 8, 8), (4, 2, 2))
    kwargs = {"width": 8, "log_std_init": -1.5}
    agent = LatentActorCriticPolicy(
        observation_space, action_space, lambda _: 1e-3, state_dependent_std=True, **kwargs
    )
    fixed = LatentActorCriticPolicy(observation_space, action_space, lambda _: 1e-3, **kwargs)
    assert parameters(agent) == parameters(fixed) + 4 * (8 + 1)
    observations = agent.obs_to_tensor(observe(observation_space))[0]
    for policy in (agent, fixed):
        std = policy.get_distribution(observations).distribution.stddev
        torch.testing.assert_close(std, torch.full((3, 16), math.exp(-1.5)))
    torch.nn.init.normal_(agent.log_std_net[0].weight)
    before = agent.get_distribution(observations).distribution
    assert (before.stddev[0] - before.stddev[1]).abs().min() > 0
    assert (before.mean == 0).all()
    actions = torch.rand(3, 16)
    _, log_prob, _ = agent.evaluate_actions(observations, actions)
    torch.testing.assert_close(
        log_prob, torch.distributions.Normal(0.0, before.stddev).log_prob(actions).sum(1)
    )
    agent.save(tmp_path / "policy.pth")
    loaded = LatentActorCriticPolicy.load(tmp_path / "policy.pth", device="cpu")
    torch.testing.assert_close(
        loaded.get_distribution(observations).distribution.stddev, before.stddev
    )
    torch.nn.init.constant_(agent.log_std_net[0].bias, -50.0)
    least = agent.get_distribution(observations).distribution.stddev.min().item()
    assert least == pytest.approx(math.exp(-4))  # else the ratios of PPO overflow
