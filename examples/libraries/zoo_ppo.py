"""rl_zoo3: PPO by its own command, with the entry of ``zoo_ppo.yml``."""

import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from mixture import report
from stable_baselines3 import PPO

HERE = Path(__file__).parent
COMMAND = (
    "-m rl_zoo3.train --algo ppo --env flowgym/GaussianMixture-Gaussian-v0 --device cpu --seed 0 "
    "--gym-packages flowgym_gym --env-kwargs discretization_steps:10 --eval-freq -1 "
    f"--conf-file {HERE / 'zoo_ppo.yml'}"
)


def main(timesteps=30_000):
    with TemporaryDirectory() as folder:
        asked = ["--log-folder", folder, "--n-timesteps", str(timesteps)]
        subprocess.run([sys.executable, *COMMAND.split(), *asked], check=True)
        (saved,) = Path(folder).glob("ppo/*/flowgym-*.zip")
        agent = PPO.load(saved, device="cpu")
    act = lambda observations: agent.predict(observations, deterministic=True)[0]  # noqa: E731
    return report("rl_zoo3 PPO", agent.num_timesteps, act)


if __name__ == "__main__":
    main()
