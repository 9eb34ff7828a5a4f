"""Is the subject still there? Scores a run's pictures with the embedded checkpoint's own
classifier.

``python -m studies.recognition runs/red`` plays 256 episodes of the trained agent and of the base
model on the same held-out seeds and prints how many pictures the classifier takes for the prompt's
subject. It works for runs on the embedded checkpoint with a single prompt that names one of its
concepts.
"""

import argparse
from pathlib import Path

import numpy as np
import torch

from flowgym_gym.agents import load_agent
from flowgym_gym.agents.runs.config import read_config
from flowgym_gym.agents.runs.episodes import held_out_seeds, play
from flowgym_gym.agents.runs.evaluation import deterministic, evaluation_env
from flowgym_gym.envs import environment_of
from recipes.embedded_checkpoint import classifier

BATCH = 32


def recognised(pictures: list[np.ndarray], subject: str) -> tuple[float, float]:
    """Share of uint8 pictures ``(H, W, 3)`` with the subject as the classifier's first, and among
    its first five.
    """
    model = classifier.load()
    label = model.names.index(subject)
    images = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 255
    with torch.no_grad():
        ranks = torch.cat([model(part) for part in images.split(64)]).argsort(
            dim=1, descending=True
        )
    return (ranks[:, 0] == label).float().mean().item(), (ranks[:, :5] == label).any(
        1
    ).float().mean().item()


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="run folder")
    parser.add_argument("--episodes", type=int, default=256)
    options = parser.parse_args()
    config = read_config(options.run)
    env = evaluation_env(config, min(options.episodes, BATCH))
    prompts = environment_of(env).base_model.prompts or []
    if len(prompts) > 1:
        parser.error(
            f"the run has {len(prompts)} prompts, expected a single one that names a subject"
        )
    (prompt,) = prompts
    names = [name for name in classifier.load().names if f" {name} " in f" {prompt} "]
    if not names:
        parser.error(f"prompt {prompt!r} names none of the classifier's subjects")
    subject = max(names, key=len)
    seeds = held_out_seeds(options.episodes)
    for who, predict in (("base model", None), ("agent", deterministic(load_agent(options.run)))):
        episodes = play(env, seeds, predict, pictures=options.episodes)
        first, five = recognised(episodes.pictures, subject)
        reward = episodes.terminal_rewards.mean()
        print(
            f"{who:10}  mean reward {reward:.4f}  {subject!r} first {first:.1%}, among the first "
            f"five {five:.1%}"
        )


if __name__ == "__main__":
    main()
