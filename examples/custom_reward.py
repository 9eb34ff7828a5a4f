"""A reward of one's own, registered and at once an environment: samples on a ring."""

import gymnasium
import torch
from stable_baselines3 import PPO

from flowgym_gym import FlowTensor, Reward, reward_registry
from flowgym_gym.agents import SB3VecEnv, evaluate


@reward_registry.register("2d/ring")
class RingReward(Reward[FlowTensor]):
    """1 on the circle of a radius around the origin, and less by a normal curve beside it."""

    value_range = (0.0, 1.0)
    units = "1 on the ring"

    def __init__(self, radius: float = 2.0, width: float = 0.5):
        self.radius, self.width = radius, width

    def forward(self, x, **kwargs):
        distance = x.data.norm(dim=1) - self.radius
        rewards = torch.exp(-0.5 * (distance / self.width) ** 2)
        return rewards, torch.ones_like(rewards)  # Every sample is valid.


KWARGS = {
    "base_model": "2d/gaussian_mixture",
    "reward": "2d/ring",
    "reward_kwargs": {"radius": 4.0},
    "reward_scale": 20.0,
    "action_scale": 5.0,
    "discretization_steps": 10,
}
HYPERPARAMETERS = {"n_steps": 10, "batch_size": 160, "learning_rate": 1e-3, "gamma": 1.0}


def main(timesteps=60_000):
    envs = SB3VecEnv(
        gymnasium.make_vec("flowgym/Denoising-v0", 64, autoreset_mode="SameStep", **KWARGS)
    )
    exploration, rest = {"log_std_init": -1.5}, {**HYPERPARAMETERS, "seed": 0, "device": "cpu"}
    agent = PPO("MultiInputPolicy", envs, policy_kwargs=exploration, **rest)
    agent.learn(timesteps)

    held_out = gymnasium.make_vec("flowgym/Denoising-v0", 256, autoreset_mode="Disabled", **KWARGS)
    report = evaluate(agent, 1024, vector_env=held_out)
    for who in ("base", "agent"):
        ring, paid = (report[who][name]["mean"] for name in ("terminal_reward", "return"))
        print(f"{who:5}: on the ring {ring:.3f}, return {paid:.2f}")
    return report


if __name__ == "__main__":
    main()
