"""SBX (stable-baselines3 in JAX): PPO, which takes observations and actions that are vectors."""

from gymnasium.wrappers import FlattenObservation
from mixture import ID, OPTIONS, flat, report
from sbx import PPO
from stable_baselines3.common.env_util import make_vec_env

from flowgym_gym.wrappers import FlattenAction


def main(timesteps=30_000):
    envs = make_vec_env(
        ID, 8, env_kwargs=OPTIONS, wrapper_class=lambda env: FlattenAction(FlattenObservation(env))
    )
    agent = PPO(
        "MlpPolicy",
        envs,
        n_steps=64,
        batch_size=256,
        gamma=1.0,
        learning_rate=1e-3,
        policy_kwargs={"log_std_init": -1.5},
        seed=0,
    )
    agent.learn(timesteps)
    act = lambda observations: agent.predict(flat(observations), deterministic=True)[0]  # noqa: E731
    return report("SBX PPO", agent.num_timesteps, act)


if __name__ == "__main__":
    main()
