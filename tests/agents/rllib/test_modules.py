import gymnasium
import numpy as np
import pytest
import torch

pytest.importorskip("ray.rllib", reason="RLlib is in the extra rllib; run .ci/run rllib")
pytestmark = pytest.mark.second

from ray.rllib.core.columns import Columns
from stable_baselines3 import PPO, SAC

from flowgym_gym.agents import LatentActorCriticPolicy, LatentSACPolicy, SB3VecEnv, load_policy
from flowgym_gym.agents.rllib import LatentPPOModule, LatentSACModule, as_policy, config, export
from flowgym_gym.agents.rllib.distributions import LatentGaussian, LatentSquashedGaussian
from flowgym_gym.agents.runs.export import _actor
from flowgym_gym.errors import OptionError, UnknownOptionError
from tests.agents.rllib.conftest import MIXTURE, quick
from tests.conftest import RED

POLICY = {"width": 8, "blocks": 1, "value_scale": 10.0}


def observed(id, **options):
    """An environment for stable-baselines3, observations of it, and actions for these."""
    options = {"discretization_steps": 2, **options}
    envs = gymnasium.make_vec(id, num_envs=3, autoreset_mode="SameStep", **options)
    observations, _ = envs.reset(seed=0)
    envs.action_space.seed(0)
    actions = 0.9 * envs.action_space.sample()
    tensors = {name: torch.as_tensor(array) for name, array in observations.items()}
    return SB3VecEnv(envs), tensors, torch.as_tensor(actions)


def trained(policy):
    """Weights that are not zero where they begin at zero."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return policy


@pytest.mark.parametrize("id", [RED, MIXTURE])
@pytest.mark.parametrize("dependent", [False, True])
def test_ppo_acts_and_judges_as_the_policy_of_stable_baselines3(id, dependent):
    env, observations, actions = observed(id)
    options = {**POLICY, "state_dependent_std": dependent}
    policy = trained(PPO(LatentActorCriticPolicy, env, policy_kwargs=options, device="cpu").policy)
    module = LatentPPOModule(
        observation_space=env.observation_space,
        action_space=env.action_space,
        model_config=options,
    )
    module.actor.load_state_dict(_actor(policy)[0])
    module.value_encoder.load_state_dict(policy.vf_features_extractor.state_dict())
    module.value_head.load_state_dict(policy.value_net.state_dict())
    batch = {Columns.OBS: observations}
    distribution = LatentGaussian.from_logits(
        module.forward_inference(batch)[Columns.ACTION_DIST_INPUTS]
    )
    values, log_probabilities, entropies = policy.evaluate_actions(observations, actions.flatten(1))
    torch.testing.assert_close(module.compute_values(batch), values.squeeze(1))
    torch.testing.assert_close(distribution.logp(actions), log_probabilities)
    torch.testing.assert_close(distribution.entropy(), entropies)
    assert distribution.sample().shape == actions.shape


@pytest.mark.parametrize("id", [RED, MIXTURE])
def test_sac_acts_and_judges_as_the_policy_of_stable_baselines3(id):
    env, observations, actions = observed(id)
    agent = SAC(LatentSACPolicy, env, policy_kwargs=POLICY, buffer_size=10, device="cpu")
    policy = trained(agent.policy)
    module = LatentSACModule(
        observation_space=env.observation_space,
        action_space=env.action_space,
        model_config={**POLICY, "twin_q": True},
    )
    module.pi.actor.load_state_dict(_actor(policy)[0])
    encoder = policy.critic.features_extractor.state_dict()
    for mine, theirs in ((module.qf_encoder, module.qf), (module.qf_twin_encoder, module.qf_twin)):
        mine.encoder.load_state_dict(encoder)
        theirs.load_state_dict(
            policy.critic.q_networks[0 if theirs is module.qf else 1].state_dict()
        )
    batch = {Columns.OBS: observations}
    values = torch.cat(policy.critic(observations, actions.flatten(1)), dim=1).min(dim=1).values
    found = module.compute_q_values({**batch, Columns.ACTIONS: actions})
    torch.testing.assert_close(found, values)
    distribution = LatentSquashedGaussian.from_logits(
        module.forward_inference(batch)[Columns.ACTION_DIST_INPUTS]
    )
    mean = policy.actor(observations, deterministic=True).reshape(actions.shape)
    torch.testing.assert_close(distribution.to_deterministic().sample(), mean)
    torch.manual_seed(1)
    theirs, log_probabilities = policy.actor.action_log_prob(observations)
    torch.manual_seed(1)
    mine, found = distribution.rsample_and_logp()
    torch.testing.assert_close(mine, theirs.reshape(actions.shape))
    torch.testing.assert_close(found, log_probabilities, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(distribution.logp(mine), found, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("algo", ["ppo", "sac"])
def test_an_untrained_agent_is_the_base_model(algo, build):
    algorithm = build(quick(config(RED, algo, discretization_steps=2), algo))
    runner = algorithm.env_runner
    episode = runner.sample(num_episodes=1, explore=False)[0]
    assert not np.any(episode.get_actions())
    assert episode.get_actions(0).shape == runner.env.single_action_space.shape == (4, 1, 1)


@pytest.mark.parametrize("algo", ["ppo", "sac"])
def test_an_exported_policy_acts_as_the_runner(algo, build, tmp_path):
    algorithm = build(quick(config(RED, algo, discretization_steps=2), algo))
    algorithm.train()
    episode = algorithm.env_runner.sample(num_episodes=1, explore=False)[0].to_numpy()
    observations = {
        name: values[: len(episode)] for name, values in episode.get_observations().items()
    }
    assert np.any(episode.get_actions())
    for policy in (as_policy(algorithm), load_policy(export(algorithm, tmp_path / "policy"))):
        actions, _ = policy.predict(observations, deterministic=True)
        np.testing.assert_allclose(actions, episode.get_actions(), atol=1e-5)
    description = load_policy(tmp_path / "policy").description
    assert (description["env_id"], description["wrappers"]) == (RED, {"coarse_action": 1})
    with pytest.raises(OptionError, match="not an empty folder"):
        export(algorithm, tmp_path / "policy")


def test_other_spaces_and_options_are_refused_by_name():
    flat = gymnasium.spaces.Box(-1, 1, (8,))
    with pytest.raises(OptionError, match="expected Dict"):
        LatentPPOModule(observation_space=flat, action_space=flat, model_config={})
    from flowgym_gym.agents.rllib.modules import as_model_config

    with pytest.raises(UnknownOptionError, match="'widht'; did you mean 'width'"):
        as_model_config("ppo", {"widht": 8})
