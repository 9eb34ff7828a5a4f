"""``DenoisingEnv``: one denoising step of a pre-trained model as one ``gymnasium.Env.step``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import gymnasium
import numpy as np

from flowgym_gym.checks import check_choice, check_seed
from flowgym_gym.envs.rollout import Observation, Outcome, Rollout, RolloutSettings
from flowgym_gym.envs.state import State, pack_random, restore
from flowgym_gym.errors import ClosedEnvironmentError, ResetNeededError


class DenoisingEnv(RolloutSettings, gymnasium.Env[Observation, np.ndarray]):
    r"""Steer the denoising of a diffusion or flow model towards a reward.

    ## Observation
    ``Dict(latent=Box(C, H, W), time=Box(0, 1, (1,)))``, float32: the current state and its time,
    from 0 (noise) to 1 (data); with more than one prompt also ``prompt``, the prompt's pooled
    embedding.

    ## Action
    ``Box(-1, 1, (C, H, W), float32)``. ``action_scale * action`` is added to the model's predicted
    velocity (or noise). Finite values outside [-1, 1] are clipped; NaN and infinity are errors.

    ## Reward
    Each step pays ``-control_cost_weight * control_cost``, where the control cost is the divergence
    (KL, nats) of the steered transition from the free one. The last step adds ``reward_scale *
    reward(sample)``.

    ## Episode
    Exactly ``discretization_steps`` steps, then ``terminated`` is True; an episode is never
    truncated. So the ids register no ``max_episode_steps``: Gymnasium's ``TimeLimit`` would say
    ``truncated`` at the last step, too, or cut longer episodes. Wrappers and loops that want a
    limit get one that is never reached, ``gymnasium.make(id, discretization_steps=n,
    max_episode_steps=n + 1)``; the time is in the observation anyway.

    ## Info
    ``control_cost`` at every step; ``prompt`` at reset; ``terminal_reward`` (unscaled) and
    ``valid`` at the end. ``reset(options={"prompt": ...})`` fixes the prompt of an episode. With
    ``info_keys="numeric"`` ``control_cost``, ``terminal_reward`` and ``valid`` are there at any
    time, as float32 numbers, 0 before there is something to tell; and nothing else.

    Args:
        base_model: Registered id of the base model.
        reward: Registered id of the reward.
        base_model_kwargs: Arguments of the base model, plain values.
        reward_kwargs: Arguments of the reward, plain values.
        action_type: What an action corrects: the predicted ``"velocity"`` or ``"noise"``, or for
            ``"control"`` the transition's mean, in its own standard deviations.
        action_scale: Size of the correction that an action of 1 makes. By default it is worked out
            from the grid and the latent's size so that a uniformly random agent's control cost over
            an episode is 10 nats on average, a tenth of the default reward scale: for the embedded
            Stable Diffusion with 50 steps 0.321 (velocity) and 0.103 (noise).
        discretization_steps: Number of steps of an episode; or the times they start from: for
            Stable Diffusion a decreasing list of time steps, as the ``timesteps=`` of diffusers'
            pipelines.
        sampler: ``"ddim"``, or ``"euler"`` (Euler-Maruyama).
        noise_level: 0 (deterministic, ODE) to 1 (ancestral, memoryless).
        spacing: Which time steps are visited, ``"leading"``, ``"trailing"`` or ``"linspace"``; by
            default the checkpoint's own.
        noise_schedule: For ``"euler"``: a constant diffusion coefficient instead of the memoryless
            one.
        reward_scale: Weight of the terminal reward.
        control_cost_weight: Weight of the control costs.
        device: Where the model runs.
        dtype: Number format of the network, ``"float32"``, ``"float16"`` or ``"bfloat16"``; the
            step's own mathematics is always in float32.
        render_mode: None or ``"rgb_array"``: ``render`` shows the sample that the model now
            expects.
        info_keys: ``"varying"``: infos hold what there is to tell at the time; ``"numeric"``: the
            same numbers at any time, and no text, for libraries that keep infos as arrays.
        **model_options: Arguments of the base model, given directly; for diffusers' pipelines
            ``checkpoint``, ``prompts``, ``guidance_scale``, ``negative_prompt``, ``height``,
            ``width``, ``lora`` and more (:class:`flowgym_gym.models.pipeline.LatentBaseModel`).

    Raises:
        FlowGymError: One of :mod:`flowgym_gym.errors` that names the argument that cannot be used.

    >>> import gymnasium, flowgym_gym
    >>> env = gymnasium.make("flowgym/StableDiffusion-Red-v0", discretization_steps=4)
    >>> observation, info = env.reset(seed=0)
    >>> info["prompt"], observation["latent"].shape
    ('a photo of a cat', (4, 8, 8))
    """

    metadata: dict[str, Any] = {"render_modes": ["rgb_array"], "render_fps": 10}  # noqa: RUF012

    def __init__(
        self, *, render_mode: str | None = None, info_keys: str = "varying", **options: Any
    ) -> None:
        self.render_mode = as_render_mode(render_mode)
        self.info_keys = as_info_keys(info_keys)
        self.rollout = Rollout.make(1, **options)
        self.observation_space: gymnasium.Space[Any] = self.rollout.observation_space
        self.action_space = self.rollout.action_space
        self._closed = False

    def get_state(self) -> State:
        """The running episode and the random state as a dictionary of arrays, which ``numpy.savez``
        can write.

        With :meth:`set_state` an episode can be branched in the middle, or gone on with in another
        process.

        >>> import gymnasium, flowgym_gym
        >>> env = gymnasium.make("flowgym/GaussianMixture-Gaussian-v0").unwrapped
        >>> _ = env.reset(seed=0)
        >>> state = env.get_state()
        >>> first, *_ = env.step(env.action_space.sample() * 0)
        >>> env.set_state(state)
        >>> again, *_ = env.step(env.action_space.sample() * 0)
        >>> bool(first["latent"] == again["latent"])
        True
        """
        return {**self.rollout.get_state(), "random": pack_random(self.np_random)}

    def set_state(self, state: Mapping[str, np.ndarray], *, seed: int | None = None) -> None:
        """Go on from a state: the same actions then give the same observations and rewards, bit by
        bit.

        Args:
            state: What :meth:`get_state` returned, in this environment or one made with the same
                arguments.
            seed: Draw fresh noise from here on; None goes on with the state's own.

        Raises:
            StateError: If the state is damaged or belongs to another environment; nothing has
                changed then.
        """
        self._check_open()
        check_seed(seed)
        with self._all_or_nothing():
            restore(self, state)
            self.rollout.seed([0], [seed])

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Start an episode from fresh noise; see :meth:`gymnasium.Env.reset`.

        Raises:
            FlowGymError: If an argument cannot be used, or the model fails; nothing has changed
                then.
        """
        self._check_open()
        check_seed(seed)
        self.rollout.check_options(options)
        seed = None if seed is None else int(seed)
        with self._all_or_nothing():
            super().reset(seed=seed)
            if seed is None and not self.rollout.seeded[0]:
                seed = int(self.np_random.integers(2**62))
            self.rollout.seed([0], [seed])
            (info,) = self.rollout.reset([0], options)
        return self._observe(), self._info(info, Outcome.zeros(1))

    def step(self, action: np.ndarray) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        """Take one denoising step; see :meth:`gymnasium.Env.step`.

        Raises:
            FlowGymError: If the action cannot be used, or the model fails; nothing has changed
                then.
            RewardError: If the reward fails; the episode is over then.
        """
        self._check_open()
        self._check_started()
        if self.rollout.finished[0]:
            raise ResetNeededError("the episode is over; call reset before the next step")
        actions = self.rollout.as_actions(action, batched=False)
        with self.rollout.all_or_nothing():
            outcome = self.rollout.step(actions, [0])
        return (
            self._observe(),
            float(outcome.rewards[0]),
            bool(outcome.finished[0]),
            False,
            self._info(outcome.info(0), outcome),
        )

    def render(self) -> np.ndarray | None:
        """The sample that the model now expects, uint8, shape ``(H, W, 3)``; None without a render
        mode.
        """
        if self.render_mode is None:
            gymnasium.logger.warn(
                "render was called without a render mode; make the environment with 'rgb_array'"
            )
            return None
        self._check_open()
        self._check_started()
        with self.rollout.all_or_nothing():
            return self.rollout.frames()[0]

    def close(self) -> None:
        """End the use of the environment; the model stays loaded for others."""
        self._closed = True

    def _info(self, varying: dict[str, Any], outcome: Outcome) -> dict[str, Any]:
        return varying if self.info_keys == "varying" else outcome.number()

    def _observe(self) -> Observation:
        return {key: value[0] for key, value in self.rollout.observe().items()}

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedEnvironmentError("the environment is closed; make a new one")

    def _check_started(self) -> None:
        if not self.rollout.started[0]:
            raise ResetNeededError("no episode has been started; call reset first")


def as_render_mode(render_mode: str | None) -> str | None:
    """The render mode, or an OptionError if it is neither None nor ``"rgb_array"``."""
    check_choice("render_mode", render_mode, (None, "rgb_array"))
    return render_mode


def as_info_keys(info_keys: str) -> str:
    """Which keys infos have, or an OptionError if it is neither ``"varying"`` nor ``"numeric"``."""
    check_choice("info_keys", info_keys, ("varying", "numeric"))
    return info_keys
