"""``LatentEnvRunner``: RLlib's runner with a batched, wrapped environment and seeds of its own.

RLlib gives runner ``w`` the seed ``seed + w`` and Gymnasium gives sub-environment ``i`` of that
``seed + w + i``, so that neighbouring runners would share all but one of their streams; and it
seeds anew whenever it resets, as it does at every sample of complete episodes. Here streams are
spawned by :func:`flowgym_gym.seeds`, and an environment is seeded once.
"""

from __future__ import annotations

from typing import Any

import ray
import torch
from gymnasium.vector import AutoresetMode, VectorEnv
from ray.rllib.algorithms.algorithm_config import AlgorithmConfig
from ray.rllib.env.single_agent_env_runner import SingleAgentEnvRunner

from flowgym_gym.agents.kinds import AnyVectorEnv, Options
from flowgym_gym.agents.runs.environments import wrapped
from flowgym_gym.errors import FlowGymError, OptionError, shown
from flowgym_gym.seeding import seeds

WRAPPERS = "wrappers"
# Where a runner that could not be made keeps its error, among its spaces.
FAILURE = "__failure__"
# Ranks: of runners, of the environments that one of them makes after the first, of evaluation.
REMADE, EVALUATION = 2**20, 2**31


class LatentEnvRunner(SingleAgentEnvRunner):
    """RLlib's runner for one agent, whose environments never share noise.

    ``config.env_config`` holds arguments of the environment and, as ``wrappers``, a section of that
    name as in the presets. Where the first runner cannot make its environment, as from a damaged
    checkpoint, the driver raises that error.

    Args:
        config: Of the algorithm.
        **kwargs: From RLlib.

    Raises:
        OptionError: If the environment does not reset ended episodes in the next step, which is
            what RLlib's runner takes for granted.
    """

    def __init__(self, *, config: AlgorithmConfig, **kwargs: Any) -> None:
        failure = (kwargs.get("spaces") or {}).get(FAILURE)
        if failure is not None:  # in the driver
            raise failure
        self._made = 0
        self._seeded = False
        self._failure: Exception | None = None
        remote = bool(kwargs.get("worker_index"))
        if remote:
            torch.set_num_threads(max(1, int(config.num_cpus_per_env_runner)))
        try:
            super().__init__(config=config, **kwargs)
        except Exception as error:
            # The driver asks the first runner for its spaces. Were its error raised here, RLlib
            # would log it, and fail for want of spaces.
            if kwargs.get("worker_index") != 1 or _restarted():
                raise
            self._failure = _portable(error)

    def get_spaces(self) -> Options:
        """Spaces by name, or the error that kept this runner from having any."""
        return super().get_spaces() if self._failure is None else {FAILURE: self._failure}

    def assert_healthy(self) -> None:
        """Called once the runner is there; what keeps it from sampling, ``get_spaces`` says."""
        if self._failure is None:
            super().assert_healthy()

    def make_env(self) -> None:
        """Make the environment that ``config`` describes, with its wrappers."""
        options: Options = dict(self.config.env_config)
        wrappers = options.pop(WRAPPERS, None) or {}
        given = self.config.env_config
        self.config.env_config = options
        try:
            super().make_env()
        finally:
            self.config.env_config = given
        vector_env: AnyVectorEnv = self.env.env
        check_autoreset_mode(vector_env)
        # Within RLlib's own wrapper: one that is dropped closes what it wraps.
        self.env.env = wrapped(vector_env, wrappers)
        self._made += 1
        self._seeded = False

    def _try_env_reset(
        self, *, seed: int | None = None, options: Options | None = None
    ) -> tuple[Any, Any]:
        streams = None
        if self.config.seed is not None and (self.config.in_evaluation or not self._seeded):
            streams = self._streams()
        self._seeded = True
        observations, infos = super()._try_env_reset(seed=streams, options=options)
        return observations, infos

    def _streams(self) -> list[int]:
        """A seed for each sub-environment, that no other runner has, and none of a life before.

        A runner that is killed and comes back, or goes on from a checkpoint, finds steps that were
        sampled before, and draws other noise than at the beginning. Evaluations have held-out seeds
        of their own, the same each time.
        """
        rank = self.worker_index or 0
        if self.config.in_evaluation:
            return seeds(self.config.seed, self.num_envs, rank=EVALUATION + rank)
        # Beyond the 64 bits that a seed usually has.
        entropy = self.config.seed + (int(self.num_env_steps_sampled_lifetime) << 64)
        remade = (self._made - 1) % (EVALUATION // REMADE)
        *streams, of_actions = seeds(entropy, self.num_envs + 1, rank=rank + REMADE * remade)
        torch.manual_seed(of_actions)
        return streams


def check_autoreset_mode(vector_env: VectorEnv[Any, Any, Any]) -> None:
    """Raise an OptionError unless ended episodes are reset in the next step."""
    mode = vector_env.metadata.get("autoreset_mode")
    if mode != AutoresetMode.NEXT_STEP:
        raise OptionError(
            f"autoreset_mode is {shown(getattr(mode, 'value', mode))}, but RLlib's runner needs "
            "'NextStep', and would learn from false transitions; leave autoreset_mode out"
        )


def _restarted() -> bool:
    context = ray.get_runtime_context()
    return bool(ray.is_initialized() and context.was_current_actor_reconstructed)


def _portable(error: Exception) -> Exception:
    """An error that another process can raise: this package's own as it is, others in words."""
    if isinstance(error, FlowGymError):
        return error.with_traceback(None)
    return RuntimeError(f"{type(error).__name__}: {error}")
