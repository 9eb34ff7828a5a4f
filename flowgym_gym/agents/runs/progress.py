"""What a training shows, sums up and listens to while it runs."""

from __future__ import annotations

import signal
import threading
import time
from types import FrameType
from typing import Any

import numpy as np
from stable_baselines3.common.callbacks import BaseCallback

from flowgym_gym.agents.kinds import Options, SomeOptions
from flowgym_gym.agents.runs.bars import Bar
from flowgym_gym.agents.runs.metrics import Row
from flowgym_gym.console import say

PLAIN_LINE_SECONDS = 10.0


class Statistics(BaseCallback):
    """Sums up control costs and returns of running episodes, and keeps those of the episodes that
    ended.

    Args:
        num_envs: Number of sub-environments.
    """

    def __init__(self, num_envs: int) -> None:
        super().__init__()
        self.episodes = 0
        self.seconds = 0.0
        self._costs = np.zeros(num_envs)
        self._returns = np.zeros(num_envs)
        self._ended: list[tuple[float, float, float, bool]] = []

    def _on_step(self) -> bool:
        infos, dones = self.locals["infos"], self.locals["dones"]
        self._costs += [info["control_cost"] for info in infos]
        self._returns += self.locals["rewards"]
        for i in np.flatnonzero(dones):
            valid = infos[i].get("valid", True)
            self.add(infos[i]["terminal_reward"], self._costs[i], self._returns[i], valid)
        self._costs[dones] = self._returns[dones] = 0.0
        return True

    def add(self, terminal_reward: float, cost: float, total: float, valid: bool) -> None:
        """Count an episode that ended, with its control cost and its return in all."""
        self._ended.append((terminal_reward, cost, total, valid))

    def take(self) -> Row:
        """Means of the episodes that ended since the last call; None where none did."""
        ended = np.array(self._ended, dtype=float)
        self.episodes += len(ended)
        self._ended = []
        names = ("terminal_reward", "control_cost", "return", "valid")
        means = [float(mean) for mean in ended.mean(axis=0)] if len(ended) else [None] * len(names)
        row: Row = dict(zip(names, means, strict=True))
        return {**row, "terminal_reward_std": float(ended[:, 0].std()) if len(ended) else None}

    def state(self) -> Options:
        """What a checkpoint keeps."""
        return {
            "episodes": self.episodes,
            "seconds": self.seconds,
            "costs": self._costs,
            "returns": self._returns,
        }

    def restore(self, state: SomeOptions) -> None:
        """Go on from a checkpoint."""
        self.episodes, self.seconds = state["episodes"], state["seconds"]
        self._costs, self._returns = state["costs"].copy(), state["returns"].copy()


class Interruption:
    """Remembers SIGINT, SIGTERM and SIGHUP instead of dying of them; a second SIGINT interrupts at
    once.

    Signals can only be caught in the main thread; in another one this does nothing. A SIGHUP, which
    a terminal sends when it is closed, stays ignored under ``nohup``.
    """

    # Windows has no SIGHUP.
    SIGNALS = tuple(
        getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
    )

    def __init__(self) -> None:
        self.signal: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Interruption:
        if threading.current_thread() is threading.main_thread():
            self._previous = {
                number: signal.signal(number, self._remember)
                for number in self.SIGNALS
                if number in (signal.SIGINT, signal.SIGTERM)
                or signal.getsignal(number) != signal.SIG_IGN
            }
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = number


class Progress:
    """A progress bar on standard error where that is a terminal, else a line every ten seconds.

    Args:
        target: Timesteps of the whole run.
        done: Timesteps so far.
        bar: Whether a bar is wanted.
    """

    def __init__(self, target: int, done: int, bar: bool) -> None:
        self.target = target
        self._bar = Bar(target, done) if bar else None
        self._last_line = time.monotonic()

    def update(self, steps: int, row: Row) -> None:
        """Show how far the run is."""
        shown = {
            "reward": row["terminal_reward"],
            "cost": row["control_cost"],
            "return": row["return"],
        }
        text = {name: f"{value:.4g}" for name, value in shown.items() if value is not None}
        if self._bar is not None and self._bar.shown:
            self._bar.update(steps, text)
        elif time.monotonic() - self._last_line > PLAIN_LINE_SECONDS:
            self._last_line = time.monotonic()
            values = " ".join(f"{name} {value}" for name, value in text.items())
            line = (
                f"{row['timesteps']}/{self.target} timesteps, {row['steps_per_second']:.0f} a "
                "second"
            )
            say(f"{line}: {values}" if values else line)

    def close(self) -> None:
        """Leave the bar as it is."""
        if self._bar is not None:
            self._bar.close()
