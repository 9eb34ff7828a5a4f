"""stable-baselines3 on the batched environment, with a convolutional policy that keeps the latent's
layout.

Thirty-two environments share each call of the network. The agent sees the whole latent and answers
with one number for each of its channels, which keeps the search small.
"""

import gymnasium
from stable_baselines3 import PPO

import flowgym_gym  # noqa: F401 (registers the ids)
from flowgym_gym.agents import LatentActorCriticPolicy, SB3VecEnv, evaluate
from flowgym_gym.wrappers.vector import CoarseAction

ID = "flowgym/StableDiffusion-Redness-v0"
PROCESS = {"discretization_steps": 5, "action_type": "noise", "action_scale": 0.3}
PAY = {"reward_scale": 100.0, "control_cost_weight": 0.05}
ROLLOUT = {"n_steps": 5, "batch_size": 40, "n_epochs": 5, "gamma": 1.0}
LEARNING = {"learning_rate": 1e-3, "vf_coef": 5e-5, "seed": 0, "device": "cpu"}


def make(num_envs, autoreset_mode):
    envs = gymnasium.make_vec(ID, num_envs, autoreset_mode=autoreset_mode, **PROCESS, **PAY)
    return CoarseAction(envs, 1)


def main(timesteps=4_800, episodes=64):
    envs = SB3VecEnv(make(32, "SameStep"))
    network = {"width": 16, "value_scale": 100.0}  # and vf_coef is 0.5 / value_scale**2
    agent = PPO(LatentActorCriticPolicy, envs, policy_kwargs=network, **ROLLOUT, **LEARNING)
    agent.learn(timesteps)

    # The same held-out seeds for both; the agent acts without exploring.
    report = evaluate(agent, episodes, vector_env=make(min(32, episodes), "Disabled"))
    for who in ("base", "agent"):
        redness, cost, paid = (
            report[who][name]["mean"] for name in ("terminal_reward", "control_cost", "return")
        )
        print(f"{who:5}: redness {redness:.3f}, control cost {cost:.1f} nats, return {paid:.1f}")
    return report


if __name__ == "__main__":
    main()
