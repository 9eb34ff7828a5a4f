"""The trainings of a frontier's agents."""

from __future__ import annotations

from pathlib import Path

from flowgym_gym.agents.frontier.spec import Agent, Plan, as_json
from flowgym_gym.agents.kinds import Options
from flowgym_gym.agents.runs.config import read_config
from flowgym_gym.agents.runs.evaluation import evaluate
from flowgym_gym.agents.runs.files import CONFIG
from flowgym_gym.agents.runs.preparation import (
    PreparedRun,
    TrainRequest,
    differences,
    prepare,
    settings_of_run,
)
from flowgym_gym.agents.runs.results import save_curve
from flowgym_gym.agents.runs.training import carry_out
from flowgym_gym.console import say
from flowgym_gym.errors import CheckpointError, OptionError, shown


def prepare_agent(plan: Plan, agent: Agent) -> PreparedRun:
    """The training of an agent, new or to be gone on with.

    Raises:
        OptionError: If its folder holds another run.
    """
    out, asked = plan.out / "runs" / agent.name, agent.asked["overrides"]
    request = TrainRequest(
        plan.env_id,
        agent.algo,
        out=out,
        timesteps=plan.spec.timesteps,
        seed=plan.spec.seed,
        overrides=asked,
    )
    if not (out / CONFIG).is_file():
        return prepare(request)
    # Resuming alone would go on with whatever the run has and this call does not name.
    own, (settings, _) = read_config(out), settings_of_run(request)
    found = differences(as_json(settings), own.settings)
    found += [
        f"{name} is {shown(value)}, but the run has {shown(has)}"
        for name, value, has in (
            ("timesteps", settings.timesteps, own.settings.timesteps),
            ("seed", plan.spec.seed, own.seed),
        )
        if value != has
    ]
    if found:
        raise OptionError(
            f"{out} holds another run, move it away to train this agent anew: {'; '.join(found)}"
        )
    return prepare(TrainRequest(plan.env_id, agent.algo, out=out, resume=True))


def train_agent(plan: Plan, prepared: PreparedRun) -> Options | int:
    """Train an agent; its evaluation, or the signal that interrupted the training."""
    result = carry_out(prepared)
    if result.signal is not None:
        return result.signal
    played = evaluate(prepared.out, plan.spec.episodes, plan.spec.seed)
    _save_curve(prepared.out)
    return played


def _save_curve(out: Path) -> None:
    """Draw an agent's curve; that it cannot be drawn is no reason to lose the agent's point."""
    try:
        save_curve(out)
    except CheckpointError as error:
        say(str(error))
