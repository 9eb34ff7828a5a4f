"""sb3-contrib: TQC, TRPO, RecurrentPPO, CrossQ and ARS on the batched environment.

CrossQ and ARS have no policy for dictionaries, so all of them get flat observations; a vector
environment of this package is flattened by Gymnasium's own wrapper around single ones.
"""

import sys

import numpy as np
from gymnasium.wrappers import FlattenObservation
from mixture import ID, OPTIONS, flat, report
from sb3_contrib import ARS, TQC, TRPO, CrossQ, RecurrentPPO
from stable_baselines3.common.env_util import make_vec_env

ON_POLICY = {"n_steps": 64, "batch_size": 256, "gamma": 1.0, "learning_rate": 1e-3}
OFF_POLICY = {"learning_starts": 500, "gamma": 1.0, "learning_rate": 1e-3, "train_freq": 4}
SMALL = {"policy_kwargs": {"log_std_init": -1.5}}
NETWORK = {"policy_kwargs": {"net_arch": [64, 64]}}
AGENTS = {
    "TQC": (TQC, "MlpPolicy", {**OFF_POLICY, **NETWORK, "gradient_steps": 4}, 8_000),
    "TRPO": (TRPO, "MlpPolicy", {**ON_POLICY, **SMALL}, 30_000),
    "RecurrentPPO": (RecurrentPPO, "MlpLstmPolicy", {**ON_POLICY, **SMALL}, 20_000),
    "CrossQ": (CrossQ, "MlpPolicy", {**OFF_POLICY, **NETWORK, "gradient_steps": 4}, 8_000),
    "ARS": (ARS, "LinearPolicy", {"n_delta": 16, "n_top": 8, "delta_std": 0.05}, 60_000),
}


def main(name="TQC", timesteps=None):
    algorithm, policy, options, default = AGENTS[name]
    envs = make_vec_env(ID, 8, env_kwargs=OPTIONS, wrapper_class=FlattenObservation)
    agent = algorithm(policy, envs, **options, seed=0, device="cpu")
    agent.learn(timesteps or default)

    memory = None

    def act(observations):
        nonlocal memory
        starts = np.full(len(observations["time"]), memory is None)
        actions, memory = agent.predict(flat(observations), memory, starts, deterministic=True)
        return actions

    return report(f"sb3-contrib {name}", agent.num_timesteps, act)


if __name__ == "__main__":
    for name in sys.argv[1:] or AGENTS:
        main(name)
