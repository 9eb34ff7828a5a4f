"""``DenoisingVectorEnv``: many denoising episodes with one network call per step, as a Gymnasium
vector environment.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import gymnasium
import numpy as np
from gymnasium.envs.registration import EnvSpec
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from flowgym_gym.checks import check_mapping, check_seed, check_whole
from flowgym_gym.envs.denoising import DenoisingEnv, as_info_keys, as_render_mode
from flowgym_gym.envs.devices import find_devices
from flowgym_gym.envs.rollout import MAX_ENVS, Observation, Outcome, Rollout, RolloutSettings
from flowgym_gym.envs.state import State, as_array_of_state, pack_random, restore
from flowgym_gym.errors import (
    ClosedEnvironmentError,
    OptionError,
    ResetNeededError,
    RewardError,
    did_you_mean,
    shown,
)


class DenoisingVectorEnv(RolloutSettings, VectorEnv[Observation, np.ndarray, np.ndarray]):
    """:class:`DenoisingEnv` for ``num_envs`` sub-environments: one batched call of the network for
    all of them.

    It equals ``SyncVectorEnv`` over the single environment: the same observations (to the rounding
    of a batched network call), rewards, terminations and infos, in every autoreset mode.

    Args:
        num_envs: Number of sub-environments.
        autoreset_mode: ``"NextStep"``, ``"SameStep"`` or ``"Disabled"``, or the ``AutoresetMode``
            of that value.
        render_mode: None or ``"rgb_array"``.
        info_keys: ``"varying"`` or ``"numeric"``, of which each number has its mask ``_key``.
        **options: The arguments of :class:`DenoisingEnv`. ``device`` may be a list here: the
            sub-environments are split over these devices as evenly as possible, in order, each
            with a copy of the base model, called in a thread of its own
            (:mod:`flowgym_gym.envs.devices`).

    >>> import gymnasium, flowgym_gym
    >>> id = "flowgym/StableDiffusion-Red-v0"
    >>> envs = gymnasium.make_vec(id, num_envs=3, discretization_steps=4)
    >>> observations, infos = envs.reset(seed=0)
    >>> observations["latent"].shape
    (3, 4, 8, 8)
    """

    # A copy, as Gymnasium's SyncVectorEnv before 1.4 writes its mode into the single environments'
    # own.
    metadata = {**DenoisingEnv.metadata}  # noqa: RUF012

    def __init__(
        self,
        num_envs: int = 1,
        *,
        autoreset_mode: AutoresetMode | str = AutoresetMode.NEXT_STEP,
        render_mode: str | None = None,
        info_keys: str = "varying",
        **options: Any,
    ) -> None:
        try:
            self.autoreset_mode = AutoresetMode(autoreset_mode)
        except ValueError as error:
            modes = [mode.value for mode in AutoresetMode]
            hint = did_you_mean(autoreset_mode, modes)
            raise OptionError(
                f"autoreset_mode is {shown(autoreset_mode)}, expected one of {modes}{hint}"
            ) from error
        self.metadata = {**type(self).metadata, "autoreset_mode": self.autoreset_mode}
        self.render_mode = as_render_mode(render_mode)
        self.info_keys = as_info_keys(info_keys)
        self.rollout = _make_rollout(num_envs, options)
        self.num_envs = self.rollout.num_envs
        self.single_observation_space = self.rollout.observation_space
        self.single_action_space = self.rollout.action_space
        self.observation_space = batch_space(self.single_observation_space, self.num_envs)
        self.action_space = batch_space(self.single_action_space, self.num_envs)
        self._needs_reset = np.zeros(self.num_envs, dtype=np.bool_)
        self._spec: EnvSpec | None = None

    @property
    def spec(self) -> EnvSpec | None:
        """The specification this was made from."""
        return self._spec

    @spec.setter
    def spec(self, spec: EnvSpec | None) -> None:
        # make_vec keeps the arguments it was given; an enum or a device among them would keep the
        # specification from JSON.
        if spec is not None and "autoreset_mode" in spec.kwargs:
            spec.kwargs["autoreset_mode"] = self.autoreset_mode.value
        if spec is not None and isinstance(spec.kwargs.get("device"), list | tuple):
            spec.kwargs["device"] = [str(device) for device in spec.kwargs["device"]]
        self._spec = spec

    def get_state(self) -> State:
        """The running episodes and random states as a dictionary of arrays; see
        :meth:`DenoisingEnv.get_state`.
        """
        state = {**self.rollout.get_state(), "random": pack_random(self.np_random)}
        return {**state, "needs_reset": self._needs_reset.copy()}

    def set_state(
        self, state: Mapping[str, np.ndarray], *, seed: int | Sequence[int | None] | None = None
    ) -> None:
        """Go on from a state; see :meth:`DenoisingEnv.set_state`.

        Args:
            state: What :meth:`get_state` returned.
            seed: Draw fresh noise from here on, from ``seed + i`` in sub-environment ``i``, or from
                a list of seeds.

        Raises:
            StateError: If the state is damaged or belongs to another environment; nothing has
                changed then.
        """
        self._check_open()
        seeds = self._seeds(seed)
        needs_reset = as_array_of_state(state, "needs_reset", self._needs_reset)
        with self._all_or_nothing():
            restore(self, state)
            self.rollout.seed(range(self.num_envs), seeds)
        self._needs_reset = needs_reset.copy()

    def reset(
        self,
        *,
        seed: int | Sequence[int | None] | None = None,
        options: dict[str, Any] | None = None,
    ) -> tuple[Observation, dict[str, Any]]:
        """Start episodes from fresh noise.

        Args:
            seed: An integer gives ``seed + i`` to sub-environment ``i``; a list gives each its own;
                None goes on with the present random state.
            options: ``{"reset_mask": mask}``, a bool array of shape ``(num_envs,)``, resets only
                some; ``{"prompt": ...}`` fixes the prompt.

        Raises:
            OptionError: If the number of seeds, the mask or the prompt does not fit.
            ModelError: If the model fails. Nothing has changed after an error.
        """
        self._check_open()
        check_mapping("options", options)
        options = dict(options or {})
        mask = self._reset_mask(options.pop("reset_mask", None))
        self.rollout.check_options(options)
        seeds = self._seeds(seed)
        indices = np.flatnonzero(mask).tolist()
        with self._all_or_nothing():
            super().reset(seed=seeds[0])
            for i in np.flatnonzero(mask & ~self.rollout.seeded).tolist():
                if seeds[i] is None:
                    seeds[i] = int(self.np_random.integers(2**62))
            self.rollout.seed(indices, [seeds[i] for i in indices])
            infos = self._reset_some(indices, {}, options)
        if self.info_keys == "numeric":
            infos = Outcome.zeros(self.num_envs).numbers(mask, mask)
        self._needs_reset[mask] = False
        return self.rollout.observe(), infos

    def step(
        self, actions: np.ndarray
    ) -> tuple[Observation, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Take one denoising step in every sub-environment, or reset it, as the autoreset mode
        says.

        Args:
            actions: Array or tensor, shape ``(num_envs, C, H, W)``. In NEXT_STEP mode those of
                ended episodes are not used.

        Returns:
            Observations, rewards ``(num_envs,)`` float64, terminations and truncations
            ``(num_envs,)`` bool, and infos.

        Raises:
            FlowGymError: If an action cannot be used, or the model fails; nothing has changed then.
            RewardError: If the reward fails; the episodes that it should have scored are over then.
        """
        self._check_open()
        if not self.rollout.started.all():
            raise ResetNeededError(
                f"{self._first(~self.rollout.started)} has no episode; call reset first"
            )
        resetting = self._needs_reset.copy()
        if self.autoreset_mode is AutoresetMode.DISABLED and resetting.any():
            raise ResetNeededError(
                f"the episode of {self._first(resetting)} is over; call "
                f"reset(options={{'reset_mask': mask}})"
            )
        checked = self.rollout.as_actions(actions, unused=resetting)
        try:
            with self.rollout.all_or_nothing():
                outcome, infos = self._advance(checked, resetting)
        except RewardError:
            self._needs_reset = resetting | self.rollout.finished
            raise
        self._needs_reset = outcome.finished & (self.autoreset_mode is not AutoresetMode.SAME_STEP)
        truncations = np.zeros(self.num_envs, dtype=np.bool_)
        return self.rollout.observe(), outcome.rewards, outcome.finished, truncations, infos

    def _advance(self, actions: Any, resetting: np.ndarray) -> tuple[Outcome, dict[str, Any]]:
        """Step those that are not ``resetting``, and reset those that are, or that end now."""
        stepping = np.flatnonzero(~resetting).tolist()
        outcome = self.rollout.step(actions, stepping) if stepping else Outcome.zeros(self.num_envs)
        infos: dict[str, Any] = {}
        if resetting.any():
            infos = self._reset_some(np.flatnonzero(resetting).tolist(), infos)
        ended = np.flatnonzero(outcome.finished).tolist()
        same_step = self.autoreset_mode is AutoresetMode.SAME_STEP and ended
        if same_step:
            final = self.rollout.observe()
            infos["final_obs"] = np.full(self.num_envs, None, dtype=object)
            for i in ended:
                infos["final_obs"][i] = {key: value[i].copy() for key, value in final.items()}
            infos["final_info"] = self._infos(outcome, outcome.finished, outcome.finished)
            infos["_final_obs"], infos["_final_info"] = (
                outcome.finished.copy(),
                outcome.finished.copy(),
            )
            infos = self._reset_some(ended, infos)
        going_on = ~resetting & ~outcome.finished if same_step else ~resetting
        infos.update(self._infos(outcome, np.ones_like(going_on), going_on))
        return outcome, infos

    def _infos(self, outcome: Outcome, told: np.ndarray, stepped: np.ndarray) -> dict[str, Any]:
        """Infos of a step: numbers of all who are ``told`` of, or what those that took it tell."""
        numeric = self.info_keys == "numeric"
        return outcome.numbers(told, stepped) if numeric else outcome.infos(stepped)

    def render(self) -> tuple[np.ndarray, ...] | None:
        """The sample that each sub-environment's model now expects, uint8, shape ``(H, W, 3)``
        each.
        """
        if self.render_mode is None:
            gymnasium.logger.warn(
                "render was called without a render mode; make the environment with 'rgb_array'"
            )
            return None
        self._check_open()
        if not self.rollout.started.all():
            raise ResetNeededError(
                f"{self._first(~self.rollout.started)} has no episode; call reset first"
            )
        with self.rollout.all_or_nothing():
            return tuple(self.rollout.frames())

    def _reset_some(
        self, indices: list[int], infos: dict[str, Any], options: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Begin episodes; the infos with their prompts, unless numbers alone are wanted."""
        varying = self.rollout.reset(indices, options)
        if self.info_keys == "varying":
            for i, info in zip(indices, varying, strict=True):
                infos = self._add_info(infos, info, i)
        return infos

    def _seeds(self, seed: int | Sequence[int | None] | None) -> list[int | None]:
        if seed is None:
            return [None] * self.num_envs
        if isinstance(seed, list | tuple) or (isinstance(seed, np.ndarray) and seed.ndim == 1):
            if len(seed) != self.num_envs:
                raise OptionError(
                    f"seed is a list of {len(seed)}, expected one for each of {self.num_envs} "
                    "environments"
                )
            for one in seed:
                check_seed(one)
            return [None if one is None else int(one) for one in seed]
        check_seed(seed)
        return [int(seed) + i for i in range(self.num_envs)]  # type: ignore[arg-type]

    def _reset_mask(self, mask: object) -> np.ndarray:
        if mask is None:
            return np.ones(self.num_envs, dtype=np.bool_)
        if (
            not isinstance(mask, np.ndarray)
            or mask.dtype != np.bool_
            or mask.shape != (self.num_envs,)
        ):
            raise OptionError(
                f"reset_mask is {shown(mask)}, expected a bool array of shape ({self.num_envs},)"
            )
        if not mask.any():
            raise OptionError("reset_mask selects no sub-environment, expected at least one True")
        return mask

    def close_extras(self, **kwargs: Any) -> None:
        """End the threads of several devices; the models stay loaded for others."""
        # Gymnasium closes what could not be made, too, when it is forgotten.
        if hasattr(self, "rollout"):
            self.rollout.close()

    def _first(self, mask: np.ndarray) -> str:
        return f"sub-environment {int(np.flatnonzero(mask)[0])}"

    def _check_open(self) -> None:
        if self.closed:
            raise ClosedEnvironmentError("the environment is closed; make a new one")


def _make_rollout(num_envs: int, options: dict[str, Any]) -> Rollout:
    """Episodes on the device or devices that the options name."""
    if not isinstance(options.get("device"), list | tuple):
        return Rollout.make(num_envs, **options)
    check_whole("num_envs", num_envs, maximum=MAX_ENVS)
    devices = find_devices(options["device"], num_envs)
    rollout = Rollout.make(num_envs, **{**options, "device": str(devices[0])})
    if len(devices) > 1:
        rollout.split_over(devices)
    return rollout
