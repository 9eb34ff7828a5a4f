"""stable-baselines3 on the batched environment, with a convolutional policy that keeps the latent's layout.

Thirty-two environments share each call of the network. The agent sees the whole latent and answers with one number for
each of its channels, which keeps the search small.

    pip install "flowgym_gym[agents]"
    python examples/batched.py
"""

import argparse

import gymnasium
from stable_baselines3 import PPO

import flowgym_gym  # noqa: F401 (registers the ids)
from flowgym_gym.agents import LatentActorCriticPolicy, SB3VecEnv, evaluate
from flowgym_gym.wrappers.vector import CoarseAction


def make(num_envs, autoreset_mode):
    envs = gymnasium.make_vec(
        "flowgym/StableDiffusion-Redness-v0",
        num_envs,
        autoreset_mode=autoreset_mode,
        discretization_steps=5,
        action_type="noise",
        action_scale=0.3,
        reward_scale=100.0,
        control_cost_weight=0.05,
    )
    return CoarseAction(envs, 1)


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--timesteps", type=int, default=4_800)
    parser.add_argument("--episodes", type=int, default=64, help="episodes of the evaluation")
    options = parser.parse_args(arguments)

    agent = PPO(
        LatentActorCriticPolicy,
        SB3VecEnv(make(32, "SameStep")),
        n_steps=5,
        batch_size=40,
        n_epochs=5,
        learning_rate=1e-3,
        gamma=1.0,
        vf_coef=5e-5,  # 0.5 / value_scale**2
        policy_kwargs={"width": 16, "value_scale": 100.0},
        seed=0,
        device="cpu",
    )
    agent.learn(options.timesteps)

    # The same held-out seeds for both; the agent acts without exploring.
    report = evaluate(agent, options.episodes, vector_env=make(min(32, options.episodes), "Disabled"))
    for who in ("base", "agent"):
        redness, cost, paid = (report[who][name]["mean"] for name in ("terminal_reward", "control_cost", "return"))
        print(f"{who:5}: redness {redness:.3f}, control cost {cost:.1f} nats, return {paid:.1f}")
    return report


if __name__ == "__main__":
    main()
