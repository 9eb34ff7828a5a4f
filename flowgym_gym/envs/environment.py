"""The torch-native batched environment: a base model, a reward, a time grid, and the transitions
between its times.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Generic

import torch
from torch import Tensor

from flowgym_gym.checks import check_choice, check_number, check_weight, check_whole
from flowgym_gym.defaults import plain_defaults
from flowgym_gym.dynamics import OUTPUTS, Transitions, check_costs, default_action_scale
from flowgym_gym.envs.answers import as_output, check_finished, check_started, described
from flowgym_gym.envs.identity import describe, describe_arguments
from flowgym_gym.envs.randomness import EpisodeSeed, randomness, undone_on_failure
from flowgym_gym.envs.randomness import seeded as seeded
from flowgym_gym.errors import ActionError, ModelError, OptionError, RewardError, reason, shown
from flowgym_gym.models.base import BaseModel
from flowgym_gym.models.loading import load_base_model
from flowgym_gym.rewards import Reward
from flowgym_gym.rewards.loading import load_reward
from flowgym_gym.schedulers import Scheduler
from flowgym_gym.time_grid import Grid, Steps
from flowgym_gym.types import D, FlowTensor, oddity

# Called as ``policy(x, t, **kwargs)``; gives the corrections.
Controller = Callable[..., Any]
# Id and arguments of a base model and of a reward, by "base_model" and "reward".
Parts = Mapping[str, Mapping[str, Any]]

# Nats that a uniformly random agent spends in an episode on average at the default action scale: a
# tenth of the default reward scale of the Gymnasium environments, 100.
RANDOM_AGENT_COST = 10.0


@dataclass
class Sample(Generic[D]):
    """Trajectories of a batch.

    Attributes:
        sample: Finished samples, batch first; images are ``(n, 3, H, W)`` in [0, 1].
        latents: Final states, shape ``(n, *)``.
        trajectory: States at every visited time, ``steps + 1`` batches of shape ``(n, *)``.
        control_costs: Cost of each step in nats, shape ``(steps, n)``.
        rewards: Unscaled terminal rewards, shape ``(n,)``.
        valids: Whether each sample is valid, bool, shape ``(n,)``.
        kwargs: The keyword arguments of the episodes, such as ``prompt``.
    """

    sample: D
    latents: D
    trajectory: list[D]
    control_costs: Tensor
    rewards: Tensor
    valids: Tensor
    kwargs: dict[str, Any]

    def __len__(self) -> int:
        return len(self.sample)

    def to(self, device: torch.device | str) -> Sample[D]:
        """The same trajectories on another device."""
        return replace(
            self,
            sample=self.sample.to(device),
            latents=self.latents.to(device),
            trajectory=[x.to(device) for x in self.trajectory],
            control_costs=self.control_costs.to(device),
            rewards=self.rewards.to(device),
            valids=self.valids.to(device),
            kwargs={
                k: v.to(device) if isinstance(v, Tensor | FlowTensor) else v
                for k, v in self.kwargs.items()
            },
        )


class Environment(Generic[D]):
    """A base model whose denoising steps can be corrected, and a reward for what comes out.

    Args:
        base_model: The model that is steered.
        reward: Scores the finished samples.
        discretization_steps: Number of transitions of an episode; or the times they start from, as
            :meth:`flowgym_gym.schedulers.Scheduler.time_grid` takes them.
        reward_scale: Weight of the terminal reward.
        control_cost_weight: Weight of the control costs.
        action_scale: The correction is ``action_scale * action``. None takes the scale at which
            uniformly random actions in [-1, 1] cost 10 nats over an episode on average
            (:func:`flowgym_gym.dynamics.default_action_scale`).
        sampler: ``"ddim"`` or ``"euler"``.
        noise_level: 0 (deterministic) to 1 (memoryless).
        spacing: Which time steps are visited; by default as the checkpoint's own scheduler says.
        noise_schedule: For the ``"euler"`` sampler, a constant diffusion coefficient ``sigma``;
            None for the scheduler's own noise schedule, which is memoryless unless it was changed.
        parts: How base model and reward were made, where both come from the registries: ``"id"``
            and arguments of each, under ``"base_model"`` and ``"reward"``. Copies and pickles then
            name them instead of holding weights.

    Attributes:
        parts: The same; None for a base model and a reward that were made by hand.

    Raises:
        OptionError: If an argument is out of range.
    """

    action_type: ClassVar[str]

    def __init__(
        self,
        base_model: BaseModel[D],
        reward: Reward[D],
        discretization_steps: Steps = 50,
        reward_scale: float = 1.0,
        *,
        control_cost_weight: float = 1.0,
        action_scale: float | None = 1.0,
        sampler: str = "ddim",
        noise_level: float = 1.0,
        spacing: str | None = None,
        noise_schedule: float | None = None,
        parts: Parts | None = None,
    ) -> None:
        for name, part, kind in (("base_model", base_model, BaseModel), ("reward", reward, Reward)):
            if not isinstance(part, kind):
                raise OptionError(
                    f"{name} is {shown(part)}, expected an instance of flowgym_gym.{kind.__name__}"
                )
        check_weight("reward_scale", reward_scale)
        check_weight("control_cost_weight", control_cost_weight, minimum=0)
        if action_scale is not None:
            check_number("action_scale", action_scale, minimum=0)
        if noise_schedule is not None:
            check_number("noise_schedule", noise_schedule, minimum=0)
            if sampler != "euler":
                raise OptionError(
                    f"noise_schedule is {noise_schedule}, but only sampler 'euler' has one; "
                    f"{shown(sampler)} takes a noise_level"
                )
        self.base_model = base_model
        self.reward = reward
        self.parts = parts
        self._arguments: dict[str, Any] | None = None
        self.reward_scale = float(reward_scale)
        self.control_cost_weight = float(control_cost_weight)
        self.sampler = sampler
        self.noise_level = noise_level
        self.noise_schedule = noise_schedule
        self._action_scale = action_scale
        check_choice(
            f"output_type of {type(base_model).__name__}",
            getattr(base_model, "output_type", None),
            OUTPUTS,
        )
        with torch.no_grad(), plain_defaults(), randomness(base_model, EpisodeSeed(0)) as own:
            probe, _ = self._draw(1, **own)
        self.state_shape: tuple[int, ...] = tuple(probe.data.shape[1:])
        self.set_time_grid(discretization_steps, spacing)

    def settings(self) -> dict[str, Any]:
        """What decides how an episode goes on, as plain values: states belong to equal settings.

        These are the arguments of base model, reward and transitions, defaults aside, without those
        that change nothing but the device, the speed or the prompts of later episodes
        (:mod:`flowgym_gym.envs.identity`).
        """
        return describe(self)

    @property
    def arguments(self) -> dict[str, Any]:
        """The settings that tell with which arguments base model and reward were made."""
        if self.parts is None:
            return describe_arguments(self)
        if self._arguments is None:
            self._arguments = describe_arguments(self)
        return self._arguments

    def __deepcopy__(self, memo: dict[int, Any]) -> Environment[D]:
        return copy(self)

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        if self.parts is not None:
            del state["base_model"], state["reward"]
            state["_reward_state"] = self.reward.get_state()
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        remembered = state.pop("_reward_state", {})
        self.__dict__.update(state)
        if self.parts is not None:
            self.base_model = load_base_model(**self.parts["base_model"])
            self.reward = load_reward(**self.parts["reward"])
            if remembered:
                self.reward.set_state(remembered)

    @property
    def device(self) -> torch.device:
        """Where the model lies.

        Raises:
            ModelError: If the model does not say it.
        """
        device = getattr(self.base_model, "device", None)
        if not isinstance(device, torch.device):
            raise ModelError(
                f"device of {type(self.base_model).__name__} is {shown(device)}, expected a "
                "torch.device; call super().__init__(device) in its __init__"
            )
        return device

    @property
    def discretization_steps(self) -> int:
        """Number of transitions of an episode."""
        return self.grid.steps

    def set_time_grid(self, steps: Steps, spacing: str | None = None) -> None:
        """Take another time grid from the next episode on.

        Args:
            steps: Number of transitions, or the times they start from.
            spacing: Which time steps are visited; None for the checkpoint's own way.

        Raises:
            OptionError: If the model's schedule has no such grid, or control costs would be
                infinite on it.
            ModelError: If the model has no schedule.
        """
        scheduler = self.base_model.scheduler
        if not isinstance(scheduler, Scheduler):
            raise ModelError(
                f"scheduler of {type(self.base_model).__name__} is {shown(scheduler)}, expected a "
                "flowgym_gym.Scheduler"
            )
        grid = scheduler.time_grid(steps, spacing)
        if not isinstance(grid, Grid):
            raise ModelError(
                f"{type(scheduler).__name__}.time_grid returned {described(grid)}, expected a Grid"
            )
        if self.noise_schedule is not None:
            grid = replace(grid, sigma=torch.full_like(grid.sigma, self.noise_schedule))
        transitions = Transitions.build(
            grid,
            self.base_model.output_type,
            self.action_type,
            self.sampler,
            self.noise_level,
            self.device,
        )
        dimensions, scale = math.prod(self.state_shape), self._action_scale
        if scale is None:
            scale = default_action_scale(transitions, dimensions, RANDOM_AGENT_COST)
        check_costs(transitions, dimensions, float(scale), self.control_cost_weight)
        self.times = grid.times.to(self.device, torch.float32)
        self.grid, self.transitions, self.action_scale = grid, transitions, float(scale)

    def start(self, n: int, **kwargs: Any) -> tuple[D, dict[str, Any]]:
        """Initial states, shape ``(n, *)``, float32, and the keyword arguments for the model.

        They are drawn from torch's global generator.

        Raises:
            ModelError: If the model returns something else.
        """
        return self.start_from(None, n, kwargs)

    def start_from(
        self, seed: EpisodeSeed | None, n: int, kwargs: Mapping[str, Any]
    ) -> tuple[D, dict[str, Any]]:
        """As :meth:`start`, from a seed of their own; the global generators are as before then."""
        with plain_defaults(), randomness(self.base_model, seed) as own:
            x, kwargs = self._draw(n, **own, **kwargs)
            started = self.base_model.preprocess(x, **own, **kwargs)
        check_started(self.base_model, started, n, self.state_shape)
        x, kwargs = started
        return x.to(torch.float32), kwargs

    def _draw(self, n: int, **kwargs: Any) -> tuple[D, dict[str, Any]]:
        result = self.base_model.sample_p0(n, **kwargs)
        name = f"{type(self.base_model).__name__}.sample_p0"
        if not (isinstance(result, tuple) and len(result) == 2 and isinstance(result[1], dict)):
            raise ModelError(
                f"{name} returned {type(result).__name__}, expected the noise and a dict of "
                "arguments"
            )
        if not isinstance(result[0], FlowTensor) or len(result[0]) != n:
            got = (
                f"{len(result[0])} states"
                if isinstance(result[0], FlowTensor)
                else type(result[0]).__name__
            )
            raise ModelError(f"{name} returned {got}, expected a FlowTensor of {n} states")
        return result

    def predict(self, x: D, index: Tensor, **kwargs: Any) -> Tensor:
        """The network's output.

        Args:
            x: States, shape ``(n, *)``.
            index: Which visited time each state is at, int64, shape ``(n,)``.
            **kwargs: What :meth:`start` returned.

        Raises:
            ModelError: If the output is no FlowTensor of real numbers, or has another shape than
                ``x``.
        """
        return as_output(self.base_model, self.base_model(x, self.times[index], **kwargs), x.data)

    def advance(
        self, x: Tensor, output: Tensor, action: Tensor, noise: Tensor, index: Tensor
    ) -> tuple[Tensor, Tensor]:
        """One transition of every state.

        Args:
            x: States, shape ``(n, *)``.
            output: The network's output there, same shape.
            action: Correction in units of ``action_scale``, same shape.
            noise: Standard normal, same shape.
            index: Which visited time each state is at, int64, shape ``(n,)``.

        Returns:
            The next states, shape ``(n, *)``, and control costs in nats, shape ``(n,)``.
        """
        transitions = self.transitions.at(index, x.ndim)
        # States keep their number format, whatever a model or a policy answers in.
        correction = self.action_scale * action.to(x.dtype)
        return transitions.step(x, output.to(x.dtype), correction, noise.to(x.dtype))

    def log_prob(
        self, x: Tensor, output: Tensor, action: Tensor, following: Tensor, index: Tensor
    ) -> Tensor:
        r"""Log density of transitions that were drawn: the likelihood of a policy that is the
        steered sampler itself.

        .. math:: \log \mathcal N(x_s;\, \mu + g_t c,\, \tau^2 I)

        Args:
            x: States, shape ``(n, *)``.
            output: The network's output there, same shape.
            action: Correction in units of ``action_scale``, same shape; gradients reach it.
            following: The states that came next, same shape.
            index: Which visited time each state is at, int64, shape ``(n,)``.

        Returns:
            Log density, shape ``(n,)``; 0 where the transition draws no noise.

        References:
            Black et al., Training diffusion models with reinforcement learning (DDPO), ICLR 2024,
            section 4.3.
        """
        mean, _ = self.advance(x, output, action, torch.zeros_like(x), index)
        std = self.transitions.at(index, x.ndim).std
        drawn = std > 0
        log_density = torch.distributions.Normal(mean, torch.where(drawn, std, 1.0)).log_prob(
            following
        )
        return torch.where(drawn, log_density, 0.0).flatten(1).sum(dim=1)

    def expected_endpoint(self, x: Tensor, output: Tensor, index: Tensor) -> Tensor:
        """The final state that the model expects from states ``x``, shape ``(n, *)``."""
        return self.transitions.at(index, x.ndim).endpoint(x, output.to(x.dtype))

    def finish(self, x: D) -> D:
        """Finished samples of states ``(n, *)``, batch first.

        Raises:
            ModelError: If the model's ``postprocess`` returns something else.
        """
        sample = self.base_model.postprocess(x)
        check_finished(self.base_model, sample, len(x))
        return sample

    def score(self, x: D, **kwargs: Any) -> tuple[D, Tensor, Tensor]:
        """Finish states and score them.

        Returns:
            Samples, unscaled rewards ``(n,)`` and validity ``(n,)``.

        Raises:
            ModelError: If the model's ``postprocess`` returns something else than samples.
            RewardError: If the reward function fails; the cause is attached.
        """
        sample = self.finish(x)
        return sample, *self.rate(sample, **kwargs)

    def rate(self, sample: D, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Score finished samples.

        Returns:
            Unscaled rewards ``(n,)`` and validity ``(n,)``.

        Raises:
            RewardError: If the reward function fails; the cause is attached.
        """
        try:
            return self.reward(sample, **kwargs)
        except RewardError:
            raise
        except Exception as error:
            raise RewardError(
                f"{type(self.reward).__name__} raised {type(error).__name__}: {reason(error)}"
            ) from error

    @torch.no_grad()
    def sample(self, n: int, policy: Controller | None = None, **kwargs: Any) -> Sample[D]:
        """Roll out ``n`` whole trajectories.

        Args:
            n: Number of trajectories.
            policy: Called as ``policy(x, t, **kwargs)`` with states ``(n, *)`` and times ``(n,)``;
                returns the action, a ``FlowTensor`` or tensor like ``x``. None for no correction.
            **kwargs: Passed to the model's ``sample_p0``, such as ``prompt``.

        Raises:
            OptionError: If ``n`` is not a positive whole number.
            ActionError: If the policy returns something else.
            ModelError: If a state becomes NaN or infinite.

        After an error torch's global generators are as before the call.
        """
        with undone_on_failure(self.device):
            return self._scored(self._roll_out(n, policy, kwargs), self.score)

    @torch.no_grad()
    def stream(
        self, n: int, batches: int, policy: Controller | None = None, **kwargs: Any
    ) -> Iterator[Sample[D]]:
        """Roll out batch after batch; a batch is scored while the next one is rolled out.

        That takes a reward that scores in threads, ``reward="images/asynchronous"``
        (:class:`flowgym_gym.rewards.asynchronous.Asynchronous`); any other is waited for at once.

        Args:
            n: Trajectories in a batch.
            batches: Number of batches.
            policy: As for :meth:`sample`, as are the errors.
            **kwargs: Passed to the model's ``sample_p0``, such as ``prompt``.

        Yields:
            The batches, in order; the same that ``batches`` calls of :meth:`sample` return.
        """
        check_whole("batches", batches)
        waiting: Callable[[], Sample[D]] | None = None
        for _ in range(batches):
            with undone_on_failure(self.device):
                rolled_out = self._roll_out(n, policy, kwargs)
            if waiting is not None:
                yield waiting()
            waiting = self._begin_to_score(rolled_out)
        assert waiting is not None
        yield waiting()

    def _begin_to_score(self, sample: Sample[D]) -> Callable[[], Sample[D]]:
        """Hand a batch to the reward; the result waits for its rewards."""
        submit = getattr(self.reward, "submit", None)
        if submit is None:
            scored = self._scored(sample, self.score)
            return lambda: scored
        finished = self.finish(sample.latents)
        pending = submit(finished, **sample.kwargs)
        return lambda: self._scored(sample, lambda x, **kwargs: (finished, *pending.result()))

    def _scored(
        self, sample: Sample[D], score: Callable[..., tuple[D, Tensor, Tensor]]
    ) -> Sample[D]:
        finished, rewards, valids = score(sample.latents, **sample.kwargs)
        return replace(sample, sample=finished, rewards=rewards, valids=valids)

    def _roll_out(self, n: int, policy: Controller | None, kwargs: dict[str, Any]) -> Sample[D]:
        """Trajectories that have no rewards yet."""
        check_whole("n", n)
        x, kwargs = self.start(n, **kwargs)
        trajectory, costs = [x], []
        for i in range(self.discretization_steps):
            index = torch.full((n,), i, dtype=torch.int64, device=self.device)
            action = (
                torch.zeros_like(x.data) if policy is None else self._act(policy, x, index, kwargs)
            )
            output = self.predict(x, index, **kwargs)
            following, cost = self.advance(x.data, output, action, torch.randn_like(x.data), index)
            x = type(x)(following)
            trajectory.append(x)
            costs.append(cost)
        if not bool(torch.isfinite(x.data).all()):
            raise ModelError(
                f"{type(self.base_model).__name__}{'' if policy is None else ' or the policy'} "
                "returned NaN or infinity"
            )
        control_costs = torch.stack(costs)
        if not bool(torch.isfinite(control_costs).all()):
            raise ActionError(
                "the policy returned actions whose control cost is infinite (action_scale is "
                f"{self.action_scale:.3g})"
            )
        unknown = torch.full((n,), math.nan, dtype=torch.float32, device="cpu")
        invalid = torch.zeros(n, dtype=torch.bool, device="cpu")
        return Sample(x, x, trajectory, control_costs, unknown, invalid, kwargs)

    def _act(self, policy: Controller, x: D, index: Tensor, kwargs: dict[str, Any]) -> Tensor:
        action = policy(x, self.times[index], **kwargs)
        try:
            tensor: Tensor = (
                action.data
                if isinstance(action, FlowTensor)
                else torch.as_tensor(action, device=x.device)
            )
            odd = oddity(tensor) or ("truth values" if tensor.dtype is torch.bool else None)
            if odd:
                raise TypeError(odd)
            return tensor.to(x.data).expand_as(x.data)
        except (TypeError, ValueError, RuntimeError) as error:
            got = (
                f"shape {tuple(action.shape)}"
                if hasattr(action, "shape")
                else type(action).__name__
            )
            raise ActionError(
                f"the policy returned {got}, expected a tensor of shape {tuple(x.data.shape)} "
                f"({reason(error)})"
            ) from error


class VelocityEnvironment(Environment[D]):
    """Actions are corrections of the predicted velocity; see :class:`Environment`."""

    action_type = "velocity"


class NoiseEnvironment(Environment[D]):
    """Actions are corrections of the predicted noise; see :class:`Environment`."""

    action_type = "noise"


class ControlEnvironment(Environment[D]):
    """Actions move a transition's mean, in units of its standard deviation; see
    :class:`Environment`.

    This is the control of stochastic optimal control: half its squared norm is the control cost, at
    every step.
    """

    action_type = "control"


def merge_kwargs(items: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Join the keyword arguments of single samples into those of a batch.

    Raises:
        ModelError: If they have different names, or values that make no batch.
    """
    first = items[0]
    for item in items:
        if item.keys() != first.keys():
            raise ModelError(
                f"episodes of one batch have the arguments {sorted(first)} and {sorted(item)}; a "
                "model's sample_p0 and preprocess must return the same names for all"
            )
    merged = {}
    for key in first:
        try:
            merged[key] = _merge([item[key] for item in items])
        except (TypeError, ValueError, RuntimeError, AttributeError) as error:
            if isinstance(error, ModelError):
                raise
            raise ModelError(
                f"the argument {key!r} of several episodes makes no batch: {reason(error)}"
            ) from error
    return merged


def _merge(values: list[Any]) -> Any:
    first = values[0]
    if len(values) == 1:
        return first
    if isinstance(first, Tensor):
        return torch.cat(values) if first.ndim else first
    if isinstance(first, FlowTensor):
        return type(first).collate(values)
    if isinstance(first, list):
        return [entry for value in values for entry in value]
    if isinstance(first, dict):
        return merge_kwargs(values)
    return first
