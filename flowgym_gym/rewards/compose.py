r"""Rewards made of other rewards, from plain data.

``WeightedSum({"images/redness": 1.0, "images/alignment": 5.0})`` pays :math:`\sum_i w_i r_i`; in
``gymnasium.make`` the same is ``reward="images/weighted_sum", reward_kwargs={"weights": {...}}``. A
part is given by its id, or as ``{"id": ..., **arguments}`` where it has arguments, and a part may
be composed itself.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flowgym_gym.checks import check_choice, check_mapping, check_once, check_weight, check_whole
from flowgym_gym.errors import OptionError, StateError, shown
from flowgym_gym.rewards.base import Reward, as_prompts
from flowgym_gym.rewards.loading import load_reward
from flowgym_gym.types import D

# How a part of a composed reward is given: its id, its id with arguments, or the reward itself.
Spec = str | Mapping[str, Any] | Reward[Any]


def make_part(spec: Spec, kwargs: Mapping[str, Any] | None = None) -> Reward[Any]:
    """The reward of a specification.

    Args:
        spec: Registered id, ``{"id": ..., **arguments}``, or a reward.
        kwargs: Arguments of the reward whose id ``spec`` is.

    Raises:
        OptionError: If it is none of these, or the arguments name another id.
        UnknownIdError: If nothing is registered under the id.
    """
    if isinstance(spec, Reward):
        return spec
    if isinstance(spec, str):
        check_once("the reward's id", spec, "its arguments", kwargs or {}, "id")
        return load_reward(spec, **(kwargs or {}))
    if isinstance(spec, Mapping) and isinstance(spec.get("id"), str):
        check_mapping("a part of the reward", spec)
        return load_reward(**spec)
    raise OptionError(
        f"a part of the reward is {shown(spec)}, expected a reward's id, or "
        "{'id': ..., 'argument': ...}"
    )


class ComposedReward(Reward[D]):
    """A reward of other rewards; it remembers what they remember.

    Args:
        parts: The other rewards, by name.
    """

    def __init__(self, parts: Mapping[str, Reward[Any]]) -> None:
        self.parts = dict(parts)
        self.differentiable = all(part.differentiable for part in self.parts.values())

    @property
    def stateful(self) -> bool:  # type: ignore[override]
        """Whether a part is."""
        return any(part.stateful for part in self.parts.values())

    def get_state(self) -> dict[str, np.ndarray]:
        """What the parts remember, by part."""
        return {
            f"{name}:{key}": v
            for name, part in self.parts.items()
            for key, v in part.get_state().items()
        }

    def set_state(self, state: Mapping[str, np.ndarray]) -> None:
        """Give each part what is its own."""
        for name, part in self.parts.items():
            own = {
                key.removeprefix(f"{name}:"): v
                for key, v in state.items()
                if key.startswith(f"{name}:")
            }
            part.set_state(own)

    def freeze(self) -> None:
        """Freeze the parts."""
        for part in self.parts.values():
            part.freeze()


class WeightedSum(ComposedReward[D]):
    r"""The weighted sum of rewards, :math:`\sum_i w_i r_i`; a sample is valid where it is for all
    of them.

    Args:
        weights: Weight of each reward, by id. Negative weights punish.
        reward_kwargs: Arguments of rewards that have some, by id.

    Raises:
        OptionError: If there is no reward, or a weight is not a finite number.

    >>> from flowgym_gym import FlowTensor
    >>> reward = WeightedSum({"images/redness": 1.0, "images/brightness": -0.5})
    >>> round(reward(FlowTensor(torch.tensor([1.0, 0.0, 0.0]).view(1, 3, 1, 1)))[0].item(), 4)
    0.8505
    """

    units = "a weighted sum"

    def __init__(
        self,
        weights: Mapping[str, float],
        reward_kwargs: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        check_mapping("weights", weights)
        check_mapping("reward_kwargs", reward_kwargs)
        if not weights:
            raise OptionError(
                f"weights is {shown(weights)}, expected rewards' ids with their weights"
            )
        for id, weight in weights.items():
            check_weight(f"weights[{shown(id)}]", weight)
            check_mapping(f"reward_kwargs[{shown(id)}]", (reward_kwargs or {}).get(id))
        unknown = sorted(set(reward_kwargs or {}) - set(weights))
        if unknown:
            raise OptionError(
                f"reward_kwargs has arguments of {shown(unknown)}, but weights only names "
                f"{sorted(weights)}"
            )
        super().__init__({id: make_part(id, (reward_kwargs or {}).get(id)) for id in weights})
        self.weights = {id: float(weight) for id, weight in weights.items()}
        ends = [
            sorted(_times(w, end) for end in self.parts[id].value_range)
            for id, w in self.weights.items()
        ]
        self.value_range = (sum(low for low, _ in ends), sum(high for _, high in ends))

    def forward(self, x: D, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """See :class:`Reward`."""
        total = torch.zeros((), dtype=torch.float32, device="cpu")
        valid = torch.ones((), dtype=torch.bool, device="cpu")
        for id, part in self.parts.items():
            rewards, valids = part(x, **kwargs)
            total = total.to(rewards) + self.weights[id] * rewards
            valid = valid.to(valids) & valids
        return total, valid


class Clip(ComposedReward[D]):
    """Another reward, held between two bounds.

    Args:
        reward: The other reward's id, ``{"id": ..., **arguments}``, or a reward.
        low: Smallest reward; None for no bound.
        high: Largest reward; None for no bound.

    Raises:
        OptionError: If there is no bound, or ``low`` is above ``high``.
    """

    def __init__(self, reward: Spec, low: float | None = None, high: float | None = None) -> None:
        for name, value in (("low", low), ("high", high)):
            if value is not None:
                check_weight(name, value)
        if (low is None and high is None) or (low is not None and high is not None and low > high):
            raise OptionError(
                f"low is {low} and high {high}, expected a bound at least, and low no higher than "
                "high"
            )
        super().__init__({"reward": make_part(reward)})
        self.low, self.high = low, high
        inner = self.parts["reward"]
        self.units = inner.units
        bounds = (
            torch.tensor(inner.value_range, dtype=torch.float64, device="cpu")
            .clamp(low, high)
            .tolist()
        )
        self.value_range = (bounds[0], bounds[1])

    def forward(self, x: D, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """See :class:`Reward`."""
        rewards, valids = self.parts["reward"](x, **kwargs)
        return rewards.clamp(self.low, self.high), valids


class Standardize(ComposedReward[D]):
    r"""Another reward, standardised for each prompt by its own recent history, as DDPO does.

    With the last ``buffer_size`` rewards of the prompt, those of this batch among them, and their
    mean :math:`\mu` and population standard deviation :math:`\sigma`, the reward is :math:`(r -
    \mu) / (\sigma + 10^{-6})`. A prompt with fewer than ``min_count`` rewards takes mean and
    deviation of the last ``buffer_size`` of all prompts, where DDPO takes those of its batch:
    environments score as episodes end, often a single one. Invalid samples are not remembered.

    What it remembers is saved and restored with a training run; in an evaluation it is frozen, so
    that agent and base model are measured alike. Rewards depend on the order of the episodes:
    environments in a vector share one memory, which separate environments do not.

    Args:
        reward: The other reward's id, ``{"id": ..., **arguments}``, or a reward.
        buffer_size: Rewards remembered of each prompt.
        min_count: How many of them it takes to use them.
        per_prompt: False for one memory of all prompts.

    Raises:
        OptionError: If a number is out of range.

    References:
        Black et al., Training diffusion models with reinforcement learning (DDPO), ICLR 2024,
        section 4.
    """

    stateful = True
    units = "standard deviations"

    def __init__(
        self, reward: Spec, buffer_size: int = 32, min_count: int = 16, per_prompt: bool = True
    ) -> None:
        check_whole("buffer_size", buffer_size, minimum=2)
        check_whole("min_count", min_count, minimum=2, maximum=buffer_size)
        check_choice("per_prompt", per_prompt, (True, False))
        super().__init__({"reward": make_part(reward)})
        self.buffer_size, self.min_count, self.per_prompt = (
            int(buffer_size),
            int(min_count),
            per_prompt,
        )
        self.differentiable = False
        self.frozen = False
        self._everything: deque[float] = deque(maxlen=self.buffer_size)
        self._by_prompt: dict[str, deque[float]] = {}

    def forward(self, x: D, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """See :class:`Reward`; with ``per_prompt`` the samples need their ``prompt``."""
        rewards, valids = self.parts["reward"](x, **kwargs)
        name = type(self).__name__
        prompts = as_prompts(name, len(x), kwargs) if self.per_prompt else [""] * len(x)
        if not self.frozen:
            for prompt, value, valid in zip(
                prompts, rewards.tolist(), valids.tolist(), strict=True
            ):
                if valid:
                    self._everything.append(value)
                    self._by_prompt.setdefault(prompt, deque(maxlen=self.buffer_size)).append(value)
        statistics = [self.statistics(prompt) for prompt in prompts]
        means, stds = torch.tensor(statistics, dtype=torch.float32, device="cpu").to(rewards).T
        return (rewards.detach() - means) / stds, valids

    def statistics(self, prompt: str = "") -> tuple[float, float]:
        """Mean of a prompt's rewards, and their standard deviation plus 1e-6; 0 and 1 where nothing
        is known.
        """
        known = self._by_prompt.get(prompt, ())
        values = np.array(known if len(known) >= self.min_count else self._everything)
        if not len(values):
            return 0.0, 1.0
        return float(values.mean()), float(values.std()) + 1e-6

    def get_state(self) -> dict[str, np.ndarray]:
        """The remembered rewards: all of them, the prompts, how many of each, and those one after
        another.
        """
        prompts = list(self._by_prompt)
        return {
            **super().get_state(),
            "everything": np.array(self._everything, dtype=np.float64),
            "prompts": np.array(prompts, dtype=np.str_),
            "counts": np.array(
                [len(self._by_prompt[prompt]) for prompt in prompts], dtype=np.int64
            ),
            "rewards": np.array(
                [r for prompt in prompts for r in self._by_prompt[prompt]], dtype=np.float64
            ),
        }

    def set_state(self, state: Mapping[str, np.ndarray]) -> None:
        """Go on from what :meth:`get_state` returned.

        Raises:
            StateError: If it is damaged; nothing has changed then.
        """
        try:
            everything, prompts, counts, rewards = (
                state[k] for k in ("everything", "prompts", "counts", "rewards")
            )
            if len(prompts) != len(counts) or counts.sum() != len(rewards) or (counts < 0).any():
                raise ValueError(
                    f"{len(rewards)} rewards for {len(prompts)} prompts with counts "
                    f"{counts.tolist()}"
                )
            parts = np.split(rewards, np.cumsum(counts)[:-1]) if len(counts) else []
            remembered = {
                str(prompt): deque(part.tolist(), maxlen=self.buffer_size)
                for prompt, part in zip(prompts, parts, strict=True)
            }
            super().set_state(state)
        except (KeyError, ValueError, TypeError, AttributeError) as error:
            raise StateError(
                f"the statistics of {type(self).__name__} are damaged: {shown(error)}"
            ) from error
        self._everything = deque(everything.tolist(), maxlen=self.buffer_size)
        self._by_prompt = remembered

    def freeze(self) -> None:
        """Remember no more rewards."""
        super().freeze()
        self.frozen = True


def _times(weight: float, end: float) -> float:
    """Their product, 0 where the weight is 0 and the end infinite."""
    return 0.0 if weight == 0 else weight * end
