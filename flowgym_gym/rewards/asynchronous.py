"""Slow and remote rewards: scored in threads, with a time-out and retries.

``submit`` starts to score and returns at once; ``Environment.stream`` uses it to roll out the next
batch meanwhile. Called like any other reward, it waits. A thread cannot be stopped: one that does
not answer in time is left behind, and does not keep the process from ending.
"""

from __future__ import annotations

import threading
import time
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, ClassVar, Generic

import torch
from torch import Tensor

from flowgym_gym.checks import check_number, check_whole
from flowgym_gym.errors import OptionError, RewardError, reason, shown
from flowgym_gym.rewards.compose import ComposedReward, Spec, make_part
from flowgym_gym.types import D

Scores = tuple[Tensor, Tensor]


@dataclass
class Pending(Generic[D]):
    """Scores that are on their way; ``result()`` waits for them."""

    reward: Asynchronous[D]
    x: D
    kwargs: dict[str, Any]
    future: Future[Scores]
    started: float

    def done(self) -> bool:
        """Whether there is an answer."""
        return self.future.done()

    def result(self) -> Scores:
        """Rewards and validity, both of shape ``(n,)``.

        Raises:
            RewardError: If the scorer stays away, or fails in every attempt; the last cause is
                attached.
        """
        return self.reward.wait(self)


class Asynchronous(ComposedReward[D]):
    """Another reward, scored in a thread, with a time-out and retries.

    Args:
        reward: The other reward's id, ``{"id": ..., **arguments}``, or a reward.
        timeout: Seconds that an attempt may take.
        retries: Further attempts after the first one failed or took too long.
        backoff: Seconds before the first retry; each further retry waits twice as long.

    Raises:
        OptionError: If a number is out of range, or the other reward remembers what it has scored:
            an attempt that was given up may still be remembered.
    """

    incidental: ClassVar[tuple[str, ...]] = (
        *ComposedReward.incidental,
        "timeout",
        "retries",
        "backoff",
    )

    def __init__(
        self, reward: Spec, timeout: float = 60.0, retries: int = 2, backoff: float = 1.0
    ) -> None:
        check_number("timeout", timeout, minimum=0)
        check_whole("retries", retries, minimum=0)
        check_number("backoff", backoff, minimum=0)
        longest = max(timeout, backoff * 2.0 ** min(max(retries - 1, 0), 1000))
        if longest > threading.TIMEOUT_MAX:
            raise OptionError(
                f"timeout is {timeout}, backoff {backoff} and retries {shown(retries)}: that would "
                f"wait for {longest:.3g} seconds, expected at most {threading.TIMEOUT_MAX:.3g}"
            )
        super().__init__({"reward": make_part(reward)})
        self.inner = self.parts["reward"]
        if self.inner.stateful:
            raise OptionError(
                f"reward is {type(self.inner).__name__}, which remembers what it has scored; put "
                "it around this one instead"
            )
        self.timeout, self.retries, self.backoff = float(timeout), int(retries), float(backoff)
        self.units, self.value_range = self.inner.units, self.inner.value_range
        self.differentiable = False

    def submit(self, x: D, **kwargs: Any) -> Pending[D]:
        """Begin to score a batch in a thread."""
        return Pending(self, x, kwargs, self._start(x, kwargs), time.monotonic())

    def forward(self, x: D, **kwargs: Any) -> Scores:
        """Score a batch and wait for it; see :class:`Reward`."""
        return self.submit(x, **kwargs).result()

    def wait(self, pending: Pending[D]) -> Scores:
        """Wait for scores, starting again where they do not come; see :meth:`Pending.result`."""
        causes: list[Exception] = []
        future, deadline = pending.future, pending.started + self.timeout
        for attempt in range(self.retries + 1):
            if attempt:
                time.sleep(self.backoff * 2 ** (attempt - 1))
                future, deadline = (
                    self._start(pending.x, pending.kwargs),
                    time.monotonic() + self.timeout,
                )
            try:
                return future.result(max(0.0, deadline - time.monotonic()))
            except RewardError as error:
                if error.sample is not None:
                    raise  # The sample is at fault, not the scorer.
                causes.append(error)
            except Exception as error:
                # A scorer may raise a TimeoutError of its own, say of its connection; else it is
                # ours, without words.
                causes.append(error if future.done() else TimeoutError("no answer in time"))
        last = causes[-1]
        raise RewardError(
            f"{type(self.inner).__name__} gave no scores in {self.retries + 1} attempts of at most "
            f"{self.timeout:g} s; the last: {type(last).__name__}: {reason(last)}. Check that the "
            "scorer runs, or give it a longer timeout or more retries"
        ) from last

    def _start(self, x: D, kwargs: dict[str, Any]) -> Future[Scores]:
        future: Future[Scores] = Future()
        inference, gradients = torch.is_inference_mode_enabled(), torch.is_grad_enabled()

        def work() -> None:
            try:
                # Both modes belong to a thread.
                with (
                    torch.inference_mode(inference),
                    torch.set_grad_enabled(gradients and not inference),
                ):
                    future.set_result(self.inner(x, **kwargs))
            except BaseException as error:
                future.set_exception(error)

        threading.Thread(target=work, name="flowgym-reward", daemon=True).start()
        return future
