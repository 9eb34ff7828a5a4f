"""What keeps runners from sampling, told to the driver.

RLlib restarts a runner in which an error came, and only logs the error. Where every runner fails
again and again, as when a reward's server is gone, it would go on without samples for ever. Here a
runner leaves a word of its error with the cluster, and the driver raises it.
"""

from __future__ import annotations

import json
from typing import Any

import ray
from ray.experimental import internal_kv
from ray.rllib.utils.metrics import ENV_RUNNER_RESULTS, NUM_ENV_STEPS_SAMPLED_LIFETIME

from flowgym_gym.errors import FlowGymError, reason

# How often a runner may fail, on average, without any of them having sampled meanwhile.
FAILURES = 3
PREFIX = "flowgym_gym:failures"


def keep(error: BaseException, worker_index: int) -> None:
    """Leave an error of a runner, and how many there were before it; called in the runner."""
    # RLlib's own wrap what the environment raised.
    cause = error.__cause__ or error
    key = f"{_prefix()}:{worker_index}"
    count = (_read(key) or (0, ""))[0]
    text = f"{type(cause).__name__}: {reason(cause)}"
    internal_kv._internal_kv_put(key, json.dumps([count + 1, text]), overwrite=True)


def raise_what_keeps_failing(*, algorithm: Any, **kwargs: Any) -> None:
    """A callback for ``on_env_runners_recreated``, in the driver.

    Raises:
        FlowGymError: If runners have failed several times each since there were samples.
    """
    keys = [key.decode() for key in internal_kv._internal_kv_list(_prefix())]
    lifetime = (ENV_RUNNER_RESULTS, NUM_ENV_STEPS_SAMPLED_LIFETIME)
    sampled = int(algorithm.metrics.peek(lifetime, default=0))
    if sampled != getattr(algorithm, "_sampled_before_failures", None):
        algorithm._sampled_before_failures = sampled
        algorithm._failures_before = {key: (_read(key) or (0, ""))[0] - 1 for key in keys}
    before = algorithm._failures_before
    found = {key: _read(key) or (0, "") for key in keys}
    failures = sum(count - before.get(key, 0) for key, (count, _) in found.items())
    if failures >= FAILURES * algorithm.config.num_env_runners:
        raise FlowGymError(
            f"runners have failed {failures} times since the last of {sampled} steps was sampled: "
            f"{next(text for _, text in found.values())}"
        )


def _prefix() -> str:
    return f"{PREFIX}:{ray.get_runtime_context().get_job_id()}"


def _read(key: str) -> tuple[int, str] | None:
    value = internal_kv._internal_kv_get(key)
    return None if value is None else tuple(json.loads(value))
