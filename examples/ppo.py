"""PPO by hand: stable-baselines3 on the plain environment, about a minute on a laptop.

The agent steers samples of a Gaussian mixture on the line to where the reward is highest, at -2.5.
What an optimal agent would be paid is known, so the last line says how much of the way PPO has
come.
"""

import gymnasium
from stable_baselines3 import PPO
from stable_baselines3.common.evaluation import evaluate_policy

import flowgym_gym  # noqa: F401 (registers the ids)
from flowgym_gym.optimal_control import optimal_value, uncontrolled_value


def main(timesteps=30_000, episodes=500):
    env = gymnasium.make("flowgym/GaussianMixture-Gaussian-v0", discretization_steps=10)
    agent = PPO(
        "MultiInputPolicy",
        env,
        n_steps=500,
        batch_size=250,
        learning_rate=1e-3,
        gamma=1.0,
        policy_kwargs={"log_std_init": -1.5},
        seed=0,
        device="cpu",
    )
    agent.learn(timesteps)

    mean, _ = evaluate_policy(agent, agent.get_env(), episodes)
    base, best = uncontrolled_value(env), optimal_value(env).value
    print(f"return of the base model {base:.2f}, of PPO {mean:.2f}, of an optimal agent {best:.2f}")
    print(f"PPO has come {(mean - base) / (best - base):.0%} of the way")
    return base, mean, best


if __name__ == "__main__":
    main()
