"""``check_vector_env``: whether a vector environment keeps Gymnasium's rules, which has no such
checker itself.

The yardstick is Gymnasium's own ``SyncVectorEnv`` over the single environment: everything that a
vector environment returns, in any autoreset mode and at any time, must be what that one returns.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from copy import deepcopy
from typing import Any

import gymnasium
import numpy as np
from gymnasium.vector import AutoresetMode, SyncVectorEnv, VectorEnv, VectorWrapper
from gymnasium.vector.utils import batch_space

from flowgym_gym.errors import OptionError, VectorEnvError

KEPT = 20
SingleMaker = Callable[[], gymnasium.Env[Any, Any]]


def check_vector_env(
    envs: VectorEnv[Any, Any, Any],
    make_single: SingleMaker | None = None,
    *,
    episodes: int = 2,
    max_steps: int = 1000,
    tolerance: float = 1e-4,
    seed: int = 0,
) -> int:
    """Check a vector environment against ``SyncVectorEnv`` over the single one, step for step.

    In turn: spaces and attributes; resets with an integer, a list of seeds, and none; whole
    episodes with random actions through the environment's own autoreset mode; resets of some
    sub-environments through ``reset_mask``, after which they are at different times; arrays that a
    later step changes; and closing twice. Observations, rewards, terminations, truncations and
    infos (keys, masks, dtypes, ``final_obs``, ``final_info``) must agree. The environment is closed
    at the end.

    Args:
        envs: The vector environment, new or not.
        make_single: Makes the single environment; by default from the specification of ``envs``.
        episodes: How many episodes every sub-environment goes through.
        max_steps: Steps after which a phase of the check ends even if the episodes have not.
        tolerance: Largest difference, absolute and relative, of floating-point numbers.
        seed: Where the seeds begin.

    Returns:
        Number of steps that were compared.

    Raises:
        VectorEnvError: What differs, and where.
        OptionError: If the single environment cannot be made.

    >>> import gymnasium, flowgym_gym
    >>> id = "flowgym/GaussianMixture-Gaussian-v0"
    >>> envs = gymnasium.make_vec(id, num_envs=3, discretization_steps=4)
    >>> check_vector_env(envs) > 0
    True
    """
    if make_single is None and isinstance(envs, VectorWrapper):
        raise OptionError(
            f"envs is wrapped in a {type(envs).__name__}; give make_single, which wraps the single "
            "one"
        )
    single = _single_maker(envs) if make_single is None else make_single
    mode = _autoreset_mode(envs)
    sync = SyncVectorEnv([single] * envs.num_envs, autoreset_mode=mode)
    try:
        return _Comparison(envs, sync, mode, tolerance).run(episodes, max_steps, seed)
    finally:
        sync.close()


class _Comparison:
    """Two vector environments that are sent the same calls."""

    def __init__(
        self,
        mine: VectorEnv[Any, Any, Any],
        sync: SyncVectorEnv,
        mode: AutoresetMode,
        tolerance: float,
    ) -> None:
        self.mine, self.sync, self.mode, self.tolerance = mine, sync, mode, tolerance
        self.steps = 0
        # What the latest calls returned, each with a copy of it as it was.
        self.kept: deque[tuple[Any, Any]] = deque(maxlen=KEPT)

    def run(self, episodes: int, max_steps: int, seed: int) -> int:
        self.check_spaces()
        n = self.mine.num_envs
        seeds = [seed + 100 + 7 * i for i in reversed(range(n))]
        actions = self.actions(seed)
        for kwargs in ({"seed": seed}, {"seed": seeds}, {}):
            self.reset(**kwargs)
            self.advance(next(actions))
        self.reset(seed=seed)
        self.play(actions, episodes, max_steps)
        self.reset(seed=seed + 1)
        self.advance(next(actions))
        mask = np.arange(n) % 2 == 1 if n > 1 else np.ones(1, dtype=np.bool_)
        self.reset(seed=[*seeds], options={"reset_mask": mask})
        self.play(actions, episodes, max_steps)
        self.reset(seed=seed + 2)
        self.mine.close()
        self.mine.close()
        return self.steps

    def check_spaces(self) -> None:
        mine, sync = self.mine, self.sync
        for name in (
            "num_envs",
            "single_observation_space",
            "single_action_space",
            "observation_space",
            "action_space",
        ):
            found, expected = getattr(mine, name, None), getattr(sync, name)
            if found != expected:
                raise VectorEnvError(
                    f"{name} is {found}, but of the single environment it is {expected}"
                )
        for name in ("observation", "action"):
            single = getattr(mine, f"single_{name}_space")
            if getattr(mine, f"{name}_space") != batch_space(single, mine.num_envs):
                raise VectorEnvError(
                    f"{name}_space is not batch_space(single_{name}_space, {mine.num_envs})"
                )

    def actions(self, seed: int) -> Iterator[Any]:
        self.sync.action_space.seed(seed)
        while True:
            yield self.sync.action_space.sample()

    def reset(self, **kwargs: Any) -> None:
        described = ", ".join(f"{key}={value}" for key, value in kwargs.items())
        result = self.both(f"reset({described})", lambda env, given: env.reset(**given), kwargs)
        observations, _ = result
        if observations not in self.mine.observation_space:
            raise VectorEnvError(
                f"reset({described}) returned observations outside observation_space: "
                f"{observations}"
            )

    def step(self, actions: Any) -> np.ndarray:
        self.steps += 1
        result = self.both(f"step {self.steps}", lambda env, given: env.step(given), actions)
        if len(result) != 5:
            raise VectorEnvError(f"step {self.steps} returned {len(result)} values, expected 5")
        done: np.ndarray = result[2] | result[3]
        return done

    def advance(self, actions: Any) -> np.ndarray:
        """Step, and reset what has ended where the environment does not do so itself."""
        done = self.step(actions)
        if self.mode is AutoresetMode.DISABLED and done.any():
            self.reset(options={"reset_mask": done.copy()})
        return done

    def play(self, actions: Iterator[Any], episodes: int, max_steps: int) -> None:
        ended = np.zeros(self.mine.num_envs, dtype=np.int64)
        for _ in range(max_steps):
            ended += self.advance(next(actions))
            if (ended >= episodes).all():
                return
        if not ended.any():
            raise OptionError(f"no episode ended within {max_steps} steps; give a larger max_steps")

    def both(
        self, call: str, act: Callable[[VectorEnv[Any, Any, Any], Any], Any], given: Any
    ) -> Any:
        """The same call of both; compares the results, and that nothing else has been
        written over.
        """
        sent = deepcopy(given)
        result = act(self.mine, sent)
        for before, as_it_was in self.kept:
            changed = difference(before, as_it_was, tolerance=0.0)
            if changed:
                raise VectorEnvError(f"{call} changed what a call before had returned: {changed}")
        self.kept.append((result, deepcopy(result)))
        # Gymnasium's own environments take the mask out of the options; its values are the caller's
        # all the same.
        for name, mine, theirs in (
            ("actions", sent, given)
            if not isinstance(given, dict)
            else ("seed", sent.get("seed"), given.get("seed")),
        ):
            changed = difference(mine, theirs, tolerance=0.0, path=name)
            if changed:
                raise VectorEnvError(f"{call} changed what it was given: {changed}")
        different = difference(result, act(self.sync, deepcopy(given)), self.tolerance)
        if different:
            raise VectorEnvError(
                f"{call} differs from SyncVectorEnv over the single environment: {different}"
            )
        return result


def difference(mine: Any, theirs: Any, tolerance: float, path: str = "result") -> str | None:
    """The first difference of two results of ``reset`` or ``step``, in words; None if they agree.

    Args:
        mine: Nested tuples, dictionaries and arrays.
        theirs: What they should be.
        tolerance: Largest difference, absolute and relative, of floating-point numbers.
        path: Where in the result this is.
    """
    if type(mine) is not type(theirs):
        return f"{path} is a {type(mine).__name__}, expected a {type(theirs).__name__}"
    if isinstance(mine, dict):
        if set(mine) != set(theirs):
            return f"{path} has the keys {sorted(mine)}, expected {sorted(theirs)}"
        parts = [(mine[key], theirs[key], f"{path}[{key!r}]") for key in mine]
    elif isinstance(mine, tuple | list) or (
        isinstance(mine, np.ndarray) and mine.dtype == theirs.dtype == object
    ):
        if len(mine) != len(theirs):
            return f"{path} has {len(mine)} entries, expected {len(theirs)}"
        parts = [(a, b, f"{path}[{i}]") for i, (a, b) in enumerate(zip(mine, theirs, strict=True))]
    elif isinstance(mine, np.ndarray | np.generic | float):
        return _array_difference(np.asarray(mine), np.asarray(theirs), tolerance, path)
    else:
        return None if mine == theirs else f"{path} is {mine!r}, expected {theirs!r}"
    found = (difference(a, b, tolerance, name) for a, b, name in parts)
    return next((words for words in found if words), None)


def _array_difference(
    mine: np.ndarray, theirs: np.ndarray, tolerance: float, path: str
) -> str | None:
    if (mine.shape, mine.dtype) != (theirs.shape, theirs.dtype):
        return (
            f"{path} has shape {mine.shape} and {mine.dtype}, expected {theirs.shape} and "
            f"{theirs.dtype}"
        )
    if mine.dtype.kind in "fc":
        equal = np.isclose(mine, theirs, rtol=tolerance, atol=tolerance, equal_nan=True)
    else:
        equal = mine == theirs
    if equal.all():
        return None
    at = tuple(int(i) for i in np.argwhere(~equal)[0]) if mine.ndim else ()
    return f"{path} is {mine[at]!r} at index {at}, expected {theirs[at]!r}"


def _autoreset_mode(envs: VectorEnv[Any, Any, Any]) -> AutoresetMode:
    mode = envs.metadata.get("autoreset_mode")
    if not isinstance(mode, AutoresetMode):
        raise VectorEnvError(f"metadata['autoreset_mode'] is {mode!r}, expected an AutoresetMode")
    return mode


def _single_maker(envs: VectorEnv[Any, Any, Any]) -> SingleMaker:
    if envs.spec is None:
        raise OptionError(
            "the vector environment has no specification; give make_single, such as a call of make"
        )
    spec = deepcopy(envs.spec)
    for name in ("num_envs", "vectorization_mode", "autoreset_mode", "vector_kwargs", "wrappers"):
        spec.kwargs.pop(name, None)
    spec.additional_wrappers = ()

    def make() -> gymnasium.Env[Any, Any]:
        try:
            return gymnasium.make(spec, disable_env_checker=True)
        except TypeError as error:
            raise OptionError(
                f"the single {spec.id} cannot be made as the vector one was; give make_single"
            ) from error

    return make
