"""The trained agent of a run folder."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from stable_baselines3.common.base_class import BaseAlgorithm

from flowgym_gym.agents.runs.checkpoints import (
    best_checkpoint,
    checkpoints,
    load_weights,
    newest_checkpoint,
    read_numbers,
    unreadable,
)
from flowgym_gym.agents.runs.config import Config, read_config
from flowgym_gym.agents.runs.contents import check_contents, drawn_prompts
from flowgym_gym.agents.runs.environments import make_vector_env
from flowgym_gym.agents.runs.files import UNREADABLE
from flowgym_gym.agents.runs.state import load_arrays, reward_of
from flowgym_gym.agents.sb3.algorithms import make_algorithm
from flowgym_gym.agents.sb3.vec_env import SB3VecEnv
from flowgym_gym.console import say
from flowgym_gym.defaults import plain_defaults
from flowgym_gym.errors import CheckpointError, OptionError

WHICH = ("best", "newest")


def load_agent(run: str | os.PathLike[str], which: str = "best") -> BaseAlgorithm:
    """The trained agent of a run folder with its environment (and an empty replay buffer).

    Args:
        run: The run folder, or what ``train`` returned.
        which: ``"best"``, the agent with the highest return in the run's evaluations, or the newest
            if it had none; or ``"newest"``, that of the newest checkpoint.

    Returns:
        A stable-baselines3 algorithm; ``agent.predict(observation, deterministic=True)`` acts.

    Raises:
        OptionError: If the folder holds no run or no checkpoint, ``which`` is something else, or
            prompts or weights that the run's settings name are no longer those that it was trained
            on.
        CheckpointError: If no checkpoint can be read; a damaged one gives way to an older one,
            which is said.
    """
    return open_agent(Path(run), which)[0]


@plain_defaults()
def open_agent(out: Path, which: str, only_policy: bool = False) -> tuple[BaseAlgorithm, Path]:
    """The agent of a run, and the checkpoint it comes from; see :func:`load_agent`.

    Args:
        out: The run folder.
        which: ``"best"`` or ``"newest"``.
        only_policy: Whether its environment does not matter: then files that have changed since the
            training are said, and no error.
    """
    config = read_config(out)
    candidates = _candidates(out, which)
    settings = config.settings
    _check_contents(out, config, only_policy)
    env = SB3VecEnv(make_vector_env(config.env_id, settings, settings.num_envs))
    _check_contents(out, config, only_policy, drawn_prompts(env.vector_env))
    model = make_algorithm(config.algo, env, settings, seed=None, buffer_size=settings.num_envs)
    failures: list[str] = []
    for checkpoint in candidates:
        try:
            model.num_timesteps = read_numbers(checkpoint)["timesteps"]
            load_weights(checkpoint, model)
            if reward_of(env.vector_env).stateful:
                load_arrays(checkpoint / "state.npz")
        except UNREADABLE as error:
            failures.append(str(unreadable(checkpoint, error)))
            continue
        for failure in failures:
            say(f"{failure}; taking {checkpoint} instead")
        return model, checkpoint
    raise CheckpointError(
        f"{failures[0]}; {'no other checkpoint of' if failures[1:] else 'there is no other in'} "
        f"{out} {'can be read either' if failures[1:] else 'to take instead'}"
    )


def _check_contents(
    out: Path, config: Config, only_said: bool, prompts: Sequence[str] | None = None
) -> None:
    try:
        check_contents(out, config, prompts)
    except OptionError as error:
        if not only_said:
            raise
        if prompts is None:
            say(str(error))


def _candidates(out: Path, which: str) -> list[Path]:
    """Checkpoints of a run in the order in which they are taken: one that is damaged gives way to
    the next.
    """
    if which not in WHICH:
        raise OptionError(f"which is {which!r}, expected one of {WHICH}")
    newest_checkpoint(out)
    best = best_checkpoint(out) if which == "best" else None
    return [*([] if best is None else [best]), *checkpoints(out)]
