"""``SB3VecEnv``: a Gymnasium vector environment as a stable-baselines3 ``VecEnv``."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv, VectorWrapper
from stable_baselines3.common.vec_env import VecEnv
from stable_baselines3.common.vec_env.base_vec_env import VecEnvIndices, VecEnvObs, VecEnvStepReturn

from flowgym_gym import wrappers
from flowgym_gym.agents.kinds import AnyVectorEnv, Options
from flowgym_gym.checks import check_seed
from flowgym_gym.errors import OptionError
from flowgym_gym.seeding import seeds
from flowgym_gym.wrappers import vector as vector_wrappers

# What a sub-environment calls differently from the vector environment that holds it.
SINGLE = {"observation_space": "single_observation_space", "action_space": "single_action_space"}


class SB3VecEnv(VecEnv):
    """The batched environment for stable-baselines3, which does not take Gymnasium's vector
    environments.

    It equals SB3's ``DummyVecEnv`` over the single environments, with one network call per step
    instead of ``num_envs``, and with seeds that other runs do not share. Arrays of the vector
    environment are passed on, not copied.

    Args:
        vector_env: A Gymnasium vector environment, wrapped or not, that resets ended episodes in
            the same step.

    Raises:
        OptionError: If it is not a vector environment, or has another autoreset mode.

    >>> import gymnasium, flowgym_gym
    >>> from flowgym_gym.agents import SB3VecEnv
    >>> envs = gymnasium.make_vec(
    ...     "flowgym/StableDiffusion-Red-v0",
    ...     num_envs=3,
    ...     autoreset_mode="SameStep",
    ...     discretization_steps=4,
    ... )
    >>> SB3VecEnv(envs).reset()["latent"].shape
    (3, 4, 8, 8)
    """

    def __init__(self, vector_env: AnyVectorEnv) -> None:
        if not isinstance(vector_env, VectorEnv):
            raise OptionError(
                f"vector_env is a {type(vector_env).__name__}, expected a gymnasium VectorEnv; "
                "make one with "
                'gymnasium.make_vec(id, num_envs=..., autoreset_mode="SameStep")'
            )
        mode = vector_env.metadata.get("autoreset_mode")
        if mode != AutoresetMode.SAME_STEP:
            raise OptionError(
                f"vector_env has autoreset mode {getattr(mode, 'value', mode)!r}, but "
                "stable-baselines3 needs 'SameStep'; "
                'make it with gymnasium.make_vec(id, num_envs=..., autoreset_mode="SameStep")'
            )
        self.vector_env = vector_env
        self._actions: np.ndarray | None = None
        super().__init__(
            vector_env.num_envs, vector_env.single_observation_space, vector_env.single_action_space
        )
        self.metadata = vector_env.metadata

    def reset(self) -> VecEnvObs:
        """Reset all sub-environments with the seeds and options that were set for this reset."""
        options = self._options[0]
        if any(other != options for other in self._options):
            raise OptionError(
                "sub-environments have different reset options, expected the same for all"
            )
        observations, infos = self.vector_env.reset(seed=self._seeds, options=options or None)  # type: ignore[arg-type]
        self.reset_infos = [_info(infos, i) for i in range(self.num_envs)]
        self._reset_seeds()
        self._reset_options()
        return observations  # type: ignore[no-any-return]

    def seed(self, seed: int | None = None) -> Sequence[int | None]:
        """Seeds for the next reset, :func:`flowgym_gym.seeds`, which no other seed has.

        stable-baselines3's own rule, ``seed + i``, would give agents with neighbouring seeds almost
        the same noise.

        Args:
            seed: Of all sub-environments; None for a random one, from numpy's global generator.
        """
        check_seed(seed)
        if seed is None:
            seed = int(np.random.randint(0, np.iinfo(np.uint32).max, dtype=np.uint32))
        self._seeds = [*seeds(seed, self.num_envs)]
        return self._seeds

    def step_async(self, actions: np.ndarray) -> None:
        """Keep the actions for ``step_wait``."""
        self._actions = actions

    def step_wait(self) -> VecEnvStepReturn:
        """Step all sub-environments.

        Returns:
            Observations, rewards ``(n,)`` float32, dones ``(n,)`` bool, and one info dict per
            sub-environment; where an episode ended, its last observation is there as
            ``terminal_observation``.
        """
        observations, rewards, terminations, truncations, infos = self.vector_env.step(
            self._actions
        )
        dones = terminations | truncations
        final_infos = infos.pop("final_info", {})
        final_observations = infos.pop("final_obs", None)
        list_of_infos = []
        for i in range(self.num_envs):
            info = _info(final_infos if dones[i] else infos, i)
            info["TimeLimit.truncated"] = bool(truncations[i] and not terminations[i])
            if dones[i]:
                # What is left in infos belongs to the episode that has just begun.
                self.reset_infos[i] = _info(infos, i)
                info["terminal_observation"] = final_observations[i]
            list_of_infos.append(info)
        return observations, rewards.astype(np.float32), dones, list_of_infos

    def close(self) -> None:
        """Close the vector environment."""
        self.vector_env.close()

    def get_images(self) -> Sequence[np.ndarray | None]:
        """One picture per sub-environment, uint8, shape ``(H, W, 3)``; None each without a render
        mode.
        """
        if self.render_mode != "rgb_array":
            warnings.warn(
                f"render_mode is {self.render_mode!r}; make the environment with 'rgb_array'",
                stacklevel=2,
            )
            return [None] * self.num_envs
        return self.vector_env.render()  # type: ignore[return-value]

    def get_attr(self, attr_name: str, indices: VecEnvIndices = None) -> list[Any]:
        """An attribute of the outermost wrapper that has it, once per sub-environment, which share
        it.

        Raises:
            AttributeError: If neither a wrapper nor the environment has it.
        """
        value = getattr(self._owner(attr_name), SINGLE.get(attr_name, attr_name))
        return [value for _ in self._get_indices(indices)]

    def set_attr(self, attr_name: str, value: Any, indices: VecEnvIndices = None) -> None:
        """Set an attribute for all sub-environments, where it is, or else on the outermost wrapper.

        Raises:
            OptionError: If ``indices`` leaves some out: they share their attributes.
        """
        self._check_all(f"attribute {attr_name!r}", indices)
        setattr(
            self._owner(attr_name) if self.has_attr(attr_name) else self.vector_env,
            attr_name,
            value,
        )

    def env_method(
        self,
        method_name: str,
        *method_args: Any,
        indices: VecEnvIndices = None,
        **method_kwargs: Any,
    ) -> list[Any]:
        """Call a method of the vector environment once; its result, once per sub-environment.

        Raises:
            OptionError: If ``indices`` leaves some out: one call is for all.
            AttributeError: If there is no such method.
        """
        self._check_all(f"method {method_name!r}", indices)
        result = getattr(self._owner(method_name), method_name)(*method_args, **method_kwargs)
        return [result] * self.num_envs

    def env_is_wrapped(self, wrapper_class: type, indices: VecEnvIndices = None) -> list[bool]:
        """Whether the environment is wrapped with this class, or with the vector version of this
        package's class.
        """
        classes = [wrapper_class]
        if getattr(wrappers, wrapper_class.__name__, None) is wrapper_class:
            classes.append(getattr(vector_wrappers, wrapper_class.__name__))
        wrapped = any(isinstance(env, cls) for env in self._layers() for cls in classes)
        return [wrapped for _ in self._get_indices(indices)]

    def _layers(self) -> list[AnyVectorEnv]:
        layers = [self.vector_env]
        while isinstance(layers[-1], VectorWrapper):
            layers.append(layers[-1].env)
        return layers

    def _owner(self, name: str) -> AnyVectorEnv:
        for env in self._layers():
            if hasattr(env, name):
                return env
        raise AttributeError(f"{self.vector_env} has no attribute {name!r}")

    def _check_all(self, what: str, indices: VecEnvIndices) -> None:
        if indices is not None and sorted(self._get_indices(indices)) != list(range(self.num_envs)):
            raise OptionError(
                f"{what} is shared by all sub-environments and cannot be used for {indices} alone"
            )


def _info(infos: Options, i: int) -> Options:
    """The info of sub-environment ``i`` out of Gymnasium's arrays with ``_key`` masks."""
    info: Options = {}
    for key, values in infos.items():
        if not infos.get(f"_{key}", np.zeros(i + 1, dtype=bool))[i]:
            continue
        value = _info(values, i) if isinstance(values, dict) else values[i]
        info[key] = value.item() if isinstance(value, np.generic) else value
    return info
