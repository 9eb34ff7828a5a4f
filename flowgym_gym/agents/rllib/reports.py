"""What runners tell of the episodes that ended, for the metrics of a run."""

from __future__ import annotations

from typing import Any

from ray.rllib.callbacks.callbacks import RLlibCallback

ENDED = "ended_episodes"
# In this order, as the statistics of a run take them.
QUANTITIES = ("terminal_reward", "control_cost", "return", "valid")


class EpisodeReports(RLlibCallback):
    """Sums up control costs and rewards of running episodes, and reports those of each that ended.

    One is in each runner. An episode that a sample cuts in two is one here.
    """

    def __init__(self) -> None:
        super().__init__()
        self._sums: dict[str, list[float]] = {}

    def on_episode_step(self, *, episode: Any, **kwargs: Any) -> None:
        """Add a step."""
        info = episode.get_infos(-1)
        sums = self._sums.setdefault(episode.id_, [0.0, 0.0])
        sums[0] += float(info["control_cost"])
        sums[1] += float(episode.get_rewards(-1))

    def on_episode_end(self, *, episode: Any, metrics_logger: Any, **kwargs: Any) -> None:
        """Report an episode; called after its last step."""
        info = episode.get_infos(-1)
        cost, total = self._sums.pop(episode.id_)
        values = (float(info["terminal_reward"]), cost, total, float(info.get("valid", True)))
        for name, value in zip(QUANTITIES, values, strict=True):
            metrics_logger.log_value((ENDED, name), value, reduce="item_series")
