"""stable-baselines3's callbacks of whoever trains, to whom a run of many intervals is one
training.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import TracebackType
from typing import TypeAlias

from stable_baselines3.common.callbacks import BaseCallback, ConvertCallback

from flowgym_gym.agents.kinds import Options
from flowgym_gym.errors import OptionError, shown

# A function of local and global variables that returns whether to go on, as stable-baselines3 takes
# it.
Function: TypeAlias = Callable[[Options, Options], bool]
CallbacksArgument: TypeAlias = BaseCallback | Function | Sequence[BaseCallback | Function] | None


def as_callbacks(callbacks: CallbacksArgument) -> list[BaseCallback]:
    """Callbacks as a list.

    Raises:
        OptionError: If one is neither a callback nor a function.
    """
    if callbacks is None:
        return []
    return [
        _as_callback(c) for c in (callbacks if isinstance(callbacks, list | tuple) else [callbacks])
    ]


def _as_callback(callback: object) -> BaseCallback:
    if isinstance(callback, BaseCallback):
        return callback
    if callable(callback) and not isinstance(callback, type):
        return ConvertCallback(callback)
    raise OptionError(
        f"callbacks is or has {shown(callback)}, expected a stable-baselines3 callback (a "
        "BaseCallback that has been made, or a function of local and global variables), or a list "
        "of them"
    )


class Callbacks(BaseCallback):
    """Passes on what happens in a training whose intervals are one call of ``learn`` each.

    To the callbacks the training starts once and, where the context that this is ends without an
    error, ends once. When one has returned False, none is asked any more, and the training stops
    when it can.

    Args:
        callbacks: Those to call.
    """

    def __init__(self, callbacks: Sequence[BaseCallback]) -> None:
        super().__init__()
        self._callbacks = list(callbacks)
        self._started = False
        self.stopped: str | None = None

    def __enter__(self) -> Callbacks:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._started and error is None:
            for callback in self._callbacks:
                callback.on_training_end()

    def _init_callback(self) -> None:
        if not self._started:
            for callback in self._callbacks:
                callback.init_callback(self.model)

    def _on_training_start(self) -> None:
        if not self._started:
            self._started = True
            for callback in self._callbacks:
                callback.on_training_start(self.locals, self.globals)

    def _on_rollout_start(self) -> None:
        for callback in self._active():
            callback.on_rollout_start()

    def _on_step(self) -> bool:
        for callback in self._active():
            # Whatever counts as false, None too, as stable-baselines3 has it.
            answer = callback.on_step()
            if not answer:
                self.stopped = self.stopped or f"{_name(callback)} returned {answer}"
        # Within an interval there is no state that a run could go on from.
        return True

    def _on_rollout_end(self) -> None:
        for callback in self._active():
            callback.on_rollout_end()

    def update_child_locals(self, locals_: Options) -> None:
        """Show the callbacks the local variables of the training."""
        for callback in self._callbacks:
            callback.update_locals(locals_)

    def _active(self) -> list[BaseCallback]:
        return [] if self.stopped is not None else self._callbacks


def _name(callback: BaseCallback) -> str:
    if isinstance(callback, ConvertCallback):
        return getattr(callback.callback, "__name__", repr(callback.callback))
    return type(callback).__name__
