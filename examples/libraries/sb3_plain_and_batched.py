"""stable-baselines3: PPO on plain environments, or on the batched one."""

from mixture import ID, OPTIONS, make_vec, report
from stable_baselines3 import PPO
from stable_baselines3.common.env_util import make_vec_env

from flowgym_gym.agents import SB3VecEnv

KINDS = {
    "plain": lambda: make_vec_env(ID, 8, env_kwargs=OPTIONS),
    "batched": lambda: SB3VecEnv(make_vec(8, "SameStep")),
}
ROLLOUT = {"n_steps": 64, "batch_size": 256, "gamma": 1.0, "learning_rate": 1e-3}


def main(kind="batched", timesteps=30_000):
    agent = PPO(
        "MultiInputPolicy",
        KINDS[kind](),
        **ROLLOUT,
        policy_kwargs={"log_std_init": -1.5},
        seed=0,
        device="cpu",
    )
    agent.learn(timesteps)
    act = lambda observations: agent.predict(observations, deterministic=True)[0]  # noqa: E731
    return report(f"stable-baselines3 PPO ({kind})", agent.num_timesteps, act)


if __name__ == "__main__":
    for kind in KINDS:
        main(kind)
