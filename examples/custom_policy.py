"""A policy of one's own for stable-baselines3 on the dictionary of latent and time.

The features are what one might try first: mean and standard deviation of every channel, and the
time. The policy is stable-baselines3's own, but for its last layer, which starts at zero, so that
the untrained agent is the base model.
"""

import gymnasium
import torch
from stable_baselines3 import PPO
from stable_baselines3.common.policies import MultiInputActorCriticPolicy
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor

import flowgym_gym  # noqa: F401 (registers the ids)
from flowgym_gym.agents import SB3VecEnv, evaluate
from flowgym_gym.wrappers.vector import CoarseAction

ID = "flowgym/StableDiffusion-Brightness-v0"
PROCESS = {"discretization_steps": 5, "action_type": "noise", "action_scale": 0.3}
PAY = {"reward_scale": 10.0, "control_cost_weight": 0.005}
HYPERPARAMETERS = {"n_steps": 5, "batch_size": 40, "learning_rate": 1e-3, "gamma": 1.0}


class ChannelStatistics(BaseFeaturesExtractor):
    def __init__(self, observation_space):
        super().__init__(observation_space, 2 * observation_space["latent"].shape[0] + 1)

    def forward(self, observations):
        x = observations["latent"]
        return torch.cat([x.mean(dim=(2, 3)), x.std(dim=(2, 3)), observations["time"]], dim=1)


class BaseModelFirst(MultiInputActorCriticPolicy):
    def __init__(self, *args, **kwargs):
        network = {"features_extractor_class": ChannelStatistics, "net_arch": [64]}
        super().__init__(*args, **network, log_std_init=-1.0, **kwargs)

    def _build(self, lr_schedule):
        super()._build(lr_schedule)
        torch.nn.init.zeros_(self.action_net.weight), torch.nn.init.zeros_(self.action_net.bias)


def make(num_envs, mode):
    return CoarseAction(gymnasium.make_vec(ID, num_envs, autoreset_mode=mode, **PROCESS, **PAY), 1)


def main(timesteps=4_800, episodes=64):
    envs = SB3VecEnv(make(32, "SameStep"))
    agent = PPO(BaseModelFirst, envs, seed=0, device="cpu", **HYPERPARAMETERS)
    agent.learn(timesteps)
    report = evaluate(agent, episodes, vector_env=make(min(32, episodes), "Disabled"))
    for who in ("base", "agent"):
        bright, paid = (report[who][name]["mean"] for name in ("terminal_reward", "return"))
        print(f"{who:5}: brightness {bright:.3f}, return {paid:.2f}")
    return report


if __name__ == "__main__":
    main()
