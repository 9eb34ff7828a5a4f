"""What a run writes while it trains: metrics, evaluations, TensorBoard's events, and
checkpoints.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path

from stable_baselines3.common.base_class import BaseAlgorithm

from flowgym_gym.agents.kinds import SomeOptions
from flowgym_gym.agents.runs.checkpoints import save_checkpoint
from flowgym_gym.agents.runs.config import Config
from flowgym_gym.agents.runs.evaluation import Evaluations, over_budget
from flowgym_gym.agents.runs.loggers import CONNECT, Mirror
from flowgym_gym.agents.runs.metrics import METRICS, Metrics, Row
from flowgym_gym.agents.sb3.vec_env import SB3VecEnv
from flowgym_gym.console import say
from flowgym_gym.errors import reason

TENSORBOARD = "tensorboard"
# The group of evaluations in a logger.
EVALUATION = "evaluation"
COLUMNS = (
    "timesteps", "episodes", "seconds", "steps_per_second",
    "terminal_reward", "terminal_reward_std", "control_cost", "return", "valid",
)  # fmt: skip
# What the algorithms report of their updates, under stable-baselines3's names.
OFF_POLICY_COLUMNS = ("actor_loss", "critic_loss", "ent_coef", "learning_rate")
ALGORITHM_COLUMNS = {
    "ppo": (
        "approx_kl",
        "clip_fraction",
        "explained_variance",
        "value_loss",
        "std",
        "learning_rate",
    ),
    "sac": OFF_POLICY_COLUMNS,
    "tqc": OFF_POLICY_COLUMNS,
}


class Records:
    """Everything that a run writes while it trains.

    Args:
        out: The run folder.
        config: Its configuration.
        model: The agent.
        env: Its environment.
        progress: Returns what a checkpoint keeps of the training loop.
        logger: Where the rows are copied to, one of ``LOGGERS``; None for TensorBoard where it is
            installed.
    """

    def __init__(
        self,
        out: Path,
        config: Config,
        model: BaseAlgorithm,
        env: SB3VecEnv,
        progress: Callable[[], SomeOptions],
        logger: str | None = None,
    ) -> None:
        self.out, self._model, self._env, self._progress = out, model, env, progress
        self._settings = config.settings
        self._metrics = Metrics(out / METRICS, COLUMNS + ALGORITHM_COLUMNS[config.algo])
        self._evaluations = (
            Evaluations(out, config) if self._settings.evaluate_every is not None else None
        )
        # A copy of the rows, in the one place or in the other.
        self._mirror = Mirror(out, logger, config.as_json()) if logger in CONNECT else None
        self._board = open_board(out, model.num_timesteps) if self._mirror is None else None
        # The row that the budget of control costs is held against.
        self._judged: Row | None = None

    def start(self) -> None:
        """Begin all files, or go on with them, and write a checkpoint."""
        timesteps = self._model.num_timesteps
        metrics, evaluations = self._metrics.start(timesteps), []
        if self._evaluations is not None:
            evaluations = self._evaluations.metrics.start(timesteps)
            self._judged = evaluations[-1] if evaluations else None
        if self._mirror is not None:
            self._catch_up(metrics, evaluations)
        if self._evaluations is not None and timesteps == 0:
            self._evaluate()
        self.save()

    def _catch_up(self, metrics: list[Row], evaluations: list[Row]) -> None:
        """Copy the rows that are there already, as far as they have not been."""
        groups = [*((row, None) for row in metrics), *((row, EVALUATION) for row in evaluations)]
        for row, group in sorted(groups, key=lambda pair: pair[0]["timesteps"] or 0):
            self._copy(row, group)

    def add(self, row: Row, since: int) -> None:
        """Add the row of an interval that began after ``since`` timesteps; evaluate and save where
        that is due.
        """
        self._metrics.append(row)
        self._copy(row)
        done, every = self._model.num_timesteps, self._settings.evaluate_every
        evaluate = every is not None and (
            done // every > since // every or done >= self._settings.timesteps
        )
        if evaluate:
            self._evaluate()
        if done // self._settings.checkpoint_every > since // self._settings.checkpoint_every:
            self.save()

    def save(self) -> None:
        """Bring the rows to the disk, then write a checkpoint: none must be ahead of its rows."""
        self._metrics.sync()
        if self._evaluations is not None:
            self._evaluations.metrics.sync()
        if self._board is not None:
            self._board.flush()
        save_checkpoint(self.out, self._model, self._env, self._progress())

    @property
    def excess(self) -> str | None:
        """By what the control cost passes the budget; None if it does not, or there is none."""
        budget, row = self._settings.kl_budget, self._judged
        if row is None or not over_budget(budget, row):
            return None
        return (
            f"the mean control cost in the evaluation, {row['control_cost']:.4g} nats, passes the "
            f"kl_budget of {budget:.4g}"
        )

    def close(self) -> None:
        """Close what is open."""
        if self._evaluations is not None:
            self._evaluations.close()
        if self._board is not None:
            self._board.close()
        if self._mirror is not None:
            self._mirror.close()

    def _evaluate(self) -> None:
        assert self._evaluations is not None
        self._judged = self._evaluations.evaluate(self._model, self._env, self._progress())
        self._copy(self._judged, EVALUATION)

    def _copy(self, row: Row, group: str | None = None) -> None:
        numbers, timesteps = tagged(row, group), int(row["timesteps"] or 0)
        if self._board is not None:
            self._board.add(numbers, timesteps)
        if self._mirror is not None:
            self._mirror.add(group or "metrics", numbers, timesteps)


class Board:
    """TensorBoard's events of a run, in its folder ``tensorboard``.

    Args:
        out: The run folder.
        timesteps: Where the run goes on: events of later ones belong to work that was lost, and are
            hidden.
    """

    def __init__(self, out: Path, timesteps: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(
            str(out / TENSORBOARD), purge_step=timesteps + 1 if timesteps else 0
        )

    def add(self, numbers: Mapping[str, float], timesteps: int) -> None:
        """Write numbers by name."""
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, timesteps)

    def flush(self) -> None:
        """Write what is still in memory."""
        self._writer.flush()

    def close(self) -> None:
        """Write what is still in memory, and end."""
        self._writer.close()


def open_board(out: Path, timesteps: int) -> Board | None:
    """TensorBoard's events of a run; None, with a word why, where TensorBoard cannot write them.

    Its events are a copy of ``metrics.csv``, and no reason to do without the run.
    """
    if not tensorboard_installed():
        say(
            f"metrics go to {METRICS} alone; with TensorBoard (pip install tensorboard) they go "
            "there, too"
        )
        return None
    try:
        return Board(out, timesteps)
    except Exception as error:  # of an installation whose parts do not fit, or of a folder's name
        say(
            f"metrics go to {METRICS} alone: TensorBoard cannot be used ({type(error).__name__}: "
            f"{reason(error)})"
        )
        return None


def tensorboard_installed() -> bool:
    """Whether TensorBoard is installed."""
    try:
        return find_spec("tensorboard") is not None
    except ValueError:  # It has been replaced by something that is no module.
        return False


def tagged(row: Row, group: str | None = None) -> dict[str, float]:
    """The numbers of a row by their names in a logger: in one group, or in stable-baselines3's,
    ``rollout`` and ``train``.
    """
    return {
        f"{group or _group(name)}/{name}": value
        for name, value in row.items()
        if value is not None and name != "timesteps"
    }


def _group(column: str) -> str:
    return "rollout" if column in COLUMNS else "train"
