"""Episodes of ``n`` sub-environments that may be at different times: the state behind both
Gymnasium interfaces.

Randomness: each sub-environment has one CPU generator. It gives the seed of an episode's initial
noise and prompt, and the noise of every step, so a seed means the same episode on every device, in
every batch, alone or vectorised.
"""

from __future__ import annotations

import inspect
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import gymnasium
import numpy as np
import torch

from flowgym_gym.checks import LARGEST, check_mapping, check_whole
from flowgym_gym.envs.answers import as_embeddings, as_pictures, as_prompts
from flowgym_gym.envs.devices import Part, Split, on_device
from flowgym_gym.envs.environment import Environment, merge_kwargs
from flowgym_gym.envs.identity import check_settings
from flowgym_gym.envs.making import make
from flowgym_gym.envs.randomness import EpisodeSeed, Streams
from flowgym_gym.envs.state import (
    State,
    as_array_of_state,
    check_arguments,
    form,
    pack,
    row,
    unpack,
)
from flowgym_gym.errors import (
    ActionError,
    ModelError,
    OptionError,
    ResetNeededError,
    RewardError,
    StateError,
    reason,
    shown,
)
from flowgym_gym.time_grid import Steps
from flowgym_gym.types import FlowTensor, oddity

Observation = dict[str, np.ndarray]

# A forked child, such as a worker of AsyncVectorEnv, has none of torch's threads and would wait for
# them for ever.
_forked: list[bool] = []
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=lambda: _forked.append(True))


def settle_after_fork() -> None:
    """In a forked child, and only once, make torch do without the threads that stayed behind."""
    if _forked:
        _forked.clear()
        torch.set_num_threads(1)


# Each has a generator of 5 kB, and a copy of its state.
MAX_ENVS = 2**20
# How far apart machines put the same time.
ROUNDING = 1e-6
DEFAULTS: dict[str, Any] = {
    "base_model": "images/stable_diffusion",
    "reward": "images/red",
    "discretization_steps": 50,
    "action_scale": None,
    "reward_scale": 100.0,
}


@dataclass
class Outcome:
    """What a step did to each sub-environment; arrays of shape ``(n,)``, meaningless where it took
    no step.

    Attributes:
        costs: Control cost in nats, float64.
        finished: Whether the episode ended.
        terminal_rewards: Unscaled reward of the finished sample, float64; 0 before the end.
        valids: Whether the finished sample is valid.
        rewards: What the agent is paid, float64.
    """

    costs: np.ndarray
    finished: np.ndarray
    terminal_rewards: np.ndarray
    valids: np.ndarray
    rewards: np.ndarray

    @classmethod
    def zeros(cls, n: int) -> Outcome:
        """An outcome in which nothing has happened yet."""
        return cls(*(np.zeros(n, dtype=dtype) for dtype in (float, bool, float, bool, float)))

    def info(self, i: int) -> dict[str, Any]:
        """The ``info`` of a sub-environment that took the step."""
        info: dict[str, Any] = {"control_cost": float(self.costs[i])}
        if self.finished[i]:
            info["terminal_reward"] = float(self.terminal_rewards[i])
            info["valid"] = bool(self.valids[i])
        return info

    def infos(self, mask: np.ndarray) -> dict[str, Any]:
        """The infos of the sub-environments in ``mask``, as Gymnasium's vector environments put
        them together.
        """
        infos: dict[str, Any] = {}
        ended = mask & self.finished
        for key, values, where in (
            ("control_cost", self.costs, mask),
            ("terminal_reward", self.terminal_rewards, ended),
            ("valid", self.valids, ended),
        ):
            if where.any():
                infos[key], infos[f"_{key}"] = (
                    np.where(where, values, values.dtype.type(0)),
                    where.copy(),
                )
        return infos

    def numbers(self, told: np.ndarray, stepped: np.ndarray) -> dict[str, Any]:
        """Infos with the same keys at any time, float32, as ``info_keys="numeric"`` asks for.

        Args:
            told: Which sub-environments they are of, bool, shape ``(n,)``.
            stepped: Which of these took the step; the others have begun an episode and say 0.
        """
        infos: dict[str, Any] = {}
        for key, values in (
            ("control_cost", self.costs),
            ("terminal_reward", self.terminal_rewards),
            ("valid", self.valids),
        ):
            infos[key] = np.where(stepped, values, 0).astype(np.float32)
            infos[f"_{key}"] = told.copy()
        return infos

    def number(self) -> dict[str, Any]:
        """As :meth:`numbers`, of one environment alone."""
        everyone = np.ones(1, dtype=np.bool_)
        infos = self.numbers(everyone, everyone)
        return {key: value[0] for key, value in infos.items() if not key.startswith("_")}


class Rollout:
    """The running episodes of an environment.

    Args:
        environment: The torch environment that makes the transitions.
        num_envs: Number of sub-environments.
    """

    def __init__(self, environment: Environment[Any], num_envs: int = 1) -> None:
        check_whole("num_envs", num_envs, maximum=MAX_ENVS)
        self.environment = environment
        self.num_envs = int(num_envs)
        self.streams = Streams(self.num_envs, environment.state_shape)
        shape = (self.num_envs, *environment.state_shape)
        # What follows is replaced, never changed in place, so that a call can be undone.
        self.latents = torch.zeros(shape, dtype=torch.float32, device=environment.device)
        self.index = np.zeros(self.num_envs, dtype=np.int64)
        self.started = np.zeros(self.num_envs, dtype=np.bool_)
        self.seeded = np.zeros(self.num_envs, dtype=np.bool_)
        self._kwargs: list[dict[str, Any]] = [{} for _ in range(self.num_envs)]
        # Arguments of all episodes of the first device, and of a part: by where they begin and end.
        self._merged: dict[tuple[int, int], dict[str, Any]] = {}
        self._output: torch.Tensor | None = None
        self.split: Split | None = None
        # What a stateful reward remembered before the call that is being made.
        self._remembered: dict[str, np.ndarray] | None = None
        prompts = as_prompts(environment.base_model)
        self._embeddings: np.ndarray | None = None
        if prompts is not None and len(prompts) > 1:
            features = self._embed(prompts[:1]).shape[1]
            self._embeddings = np.zeros((self.num_envs, features), dtype=np.float32)

    @classmethod
    def make(cls, num_envs: int = 1, **options: Any) -> Rollout:
        """Episodes of the environment that :func:`flowgym_gym.make` makes, with the Gymnasium ids'
        defaults.
        """
        settle_after_fork()
        return cls(make(**{**DEFAULTS, **options}), num_envs)

    def split_over(self, devices: Sequence[torch.device]) -> None:
        """Call a copy of the base model on each device from now on; the first is where it lies.

        Only for an environment whose base model comes from the registry.
        """
        self.split = Split(self.environment, devices, self.num_envs)

    def close(self) -> None:
        """End what runs beside this."""
        if self.split is not None:
            self.split.close()

    @property
    def latents(self) -> torch.Tensor:
        """States of all sub-environments, shape ``(n, *)``, float32, on the model's device."""
        return self._latents

    @latents.setter
    def latents(self, latents: torch.Tensor) -> None:
        self._latents = latents
        self._host: np.ndarray | None = None

    @property
    def observation_space(self) -> gymnasium.spaces.Dict:
        """Space of one sub-environment's observation: ``latent``, ``time``, and ``prompt`` where
        there are several.
        """
        spaces: dict[str, gymnasium.Space[Any]] = {
            "latent": gymnasium.spaces.Box(
                -np.inf, np.inf, self.environment.state_shape, np.float32
            ),
            "time": gymnasium.spaces.Box(0.0, 1.0, (1,), np.float32),
        }
        if self._embeddings is not None:
            spaces["prompt"] = gymnasium.spaces.Box(
                -np.inf, np.inf, self._embeddings.shape[1:], np.float32
            )
        return gymnasium.spaces.Dict(spaces)

    @property
    def action_space(self) -> gymnasium.spaces.Box:
        """Space of one sub-environment's action."""
        return gymnasium.spaces.Box(-1.0, 1.0, self.environment.state_shape, np.float32)

    @property
    def finished(self) -> np.ndarray:
        """Which sub-environments are at the end of their episode, bool, shape ``(n,)``."""
        return np.equal(self.index, self.environment.discretization_steps)

    def seed(self, indices: Sequence[int], seeds: Sequence[int | None]) -> None:
        """Seed the generators of some sub-environments; None leaves one as it is."""
        self.seeded = self.seeded.copy()
        for i, seed in zip(indices, seeds, strict=True):
            if seed is not None:
                self.streams.seed(i, int(seed))
                self.seeded[i] = True

    @contextmanager
    def all_or_nothing(self) -> Iterator[None]:
        """Put episodes, generators and the reward's memory back if something is raised inside.

        After a RewardError the step that it is about stays taken.
        """
        self._remembered = None
        before, mark = self.__dict__.copy(), self.streams.mark()
        try:
            yield
        except RewardError:
            raise
        except BaseException:
            remembered = self._remembered
            self.__dict__.update(before)
            self.streams.back_to(mark)
            if remembered is not None:
                self.environment.reward.set_state(remembered)
            raise

    def set_time_grid(self, steps: Steps, spacing: str | None = None) -> None:
        """Take another time grid; every episode must be reset before its next step."""
        self.environment.set_time_grid(steps, spacing)
        self.index = np.zeros_like(self.index)
        self.started = np.zeros_like(self.started)
        self._output = None

    def check_options(self, options: Any) -> None:
        """Raise an OptionError unless these are options of :meth:`reset`."""
        check_mapping("options", options)
        given: Mapping[str, Any] = options or {}
        unknown = sorted(set(given) - {"prompt"})
        if unknown:
            raise OptionError(
                f"reset options {shown(unknown)} are not known, expected 'prompt' or none"
            )
        if given.get("prompt") is not None:
            self._check_prompt(given["prompt"])

    def _check_prompt(self, prompt: Any) -> None:
        model = self.environment.base_model
        if model.prompts is None:
            if "prompt" in inspect.signature(model.sample_p0).parameters:
                return
            raise OptionError(
                f"prompt is {shown(prompt)}, but {type(model).__name__} has no prompts; leave the "
                "option out"
            )
        listed = prompt.tolist() if isinstance(prompt, np.ndarray) and prompt.ndim == 1 else prompt
        (text,) = listed if isinstance(listed, list | tuple) and len(listed) == 1 else (listed,)
        if not isinstance(text, str):
            raise OptionError(
                f"prompt is {shown(prompt)}, expected a string, the prompt of every episode that "
                "begins"
            )
        model.check_prompt(text)

    @torch.no_grad()
    def reset(
        self, indices: Sequence[int], options: dict[str, Any] | None = None
    ) -> list[dict[str, Any]]:
        """Start a new episode in some sub-environments.

        Args:
            indices: Which ones.
            options: ``{"prompt": ...}`` fixes the prompt of these episodes.

        Returns:
            The ``info`` of each, with its ``prompt`` if the model has one.

        Raises:
            OptionError: If ``options`` has another key, or a prompt that the model does not take.
            ModelError: If episodes that run side by side have arguments that make no batch.
        """
        settle_after_fork()
        self.check_options(options)
        asked = {name: value for name, value in (options or {}).items() if value is not None}
        states, all_kwargs = [], []
        for i in indices:
            x, kwargs = self.environment.start_from(self.streams.episode(i), 1, asked)
            states.append(x.data)
            all_kwargs.append(kwargs)
        where = list(indices)
        self._check_batch(where, all_kwargs)
        prompts = [kwargs.get("prompt") for kwargs in all_kwargs]
        embeddings = None if self._embeddings is None else self._embeddings.copy()
        for i, prompt in zip(where, prompts, strict=True):
            if embeddings is not None and prompt is not None:
                embeddings[i] = self._embed(prompt)[0]

        self.latents = _replaced(self.latents, where, torch.cat(states))
        self.index, self.started = self.index.copy(), self.started.copy()
        self.index[where] = 0
        self.started[where] = True
        self._merged, self._output = {}, None
        self._embeddings = embeddings
        self._kwargs = list(self._kwargs)
        for i, kwargs in zip(where, all_kwargs, strict=True):
            self._kwargs[i] = kwargs
        return [{"prompt": prompt[0]} if isinstance(prompt, list) else {} for prompt in prompts]

    def _check_batch(self, where: list[int], new: list[dict[str, Any]]) -> None:
        """Raise a ModelError unless new episodes' arguments make a batch with running ones."""
        running = set(np.flatnonzero(self.started & ~self.finished).tolist()) - set(where)
        side_by_side = [*(self._kwargs[i] for i in sorted(running)[:1]), *new]
        first = form(side_by_side[0])
        for kwargs in side_by_side[1:]:
            if form(kwargs) != first:
                raise ModelError(
                    f"{type(self.environment.base_model).__name__} makes episodes with the "
                    f"arguments {first} and {form(kwargs)}, which cannot run side by side; its "
                    "sample_p0 and preprocess must return the same names, kinds and shapes for all"
                )

    @torch.no_grad()
    def step(self, actions: np.ndarray | torch.Tensor, indices: Sequence[int]) -> Outcome:
        """Take a step in some sub-environments, with one call of the network for all of them.

        Args:
            actions: From :meth:`as_actions`, shape ``(n, *)``; only the rows in ``indices`` are
                read.
            indices: Which sub-environments take the step.

        Raises:
            ModelError: If the model returns NaN or infinity.
            RewardError: If the reward fails; the episodes that it should have scored are over.
            ResetNeededError: If one of the episodes is over.
        """
        settle_after_fork()
        environment, where = self.environment, list(indices)
        everyone = len(where) == self.num_envs
        at, last = self.index[where], environment.discretization_steps - 1
        over = [i for i, time in zip(where, at.tolist(), strict=True) if time > last]
        if over:
            raise ResetNeededError(f"the episode{self._named(over)} is over; call reset")
        x = self.latents if everyone else self.latents[where]
        noise = self.streams.noise(where).to(x.device)
        taken = actions if everyone else actions[where]
        action = (torch.from_numpy(taken) if isinstance(taken, np.ndarray) else taken).to(x.device)
        index = torch.from_numpy(at).to(x.device)
        output = self._predict(x, index, where)
        following, costs = environment.advance(x, output, action, noise, index)
        # One copy out, which is the only time that a step waits for the device.
        host = torch.cat([following.flatten(1), costs[:, None].to(following)], dim=1).cpu().numpy()
        self._check_finite(host[:, :-1], where)

        self.latents = following if everyone else _replaced(self.latents, where, following)
        if everyone:
            self._host = host[:, :-1].reshape(following.shape)
        self._output = None
        self.index = self.index.copy()
        self.index[where] = at + 1

        outcome = Outcome.zeros(self.num_envs)
        outcome.costs[where] = host[:, -1]
        outcome.rewards[where] = -environment.control_cost_weight * outcome.costs[where]
        ended = [i for i, time in zip(where, at.tolist(), strict=True) if time == last]
        if ended:
            outcome.finished[ended] = True
            rewards, valids = self._score(ended)
            outcome.terminal_rewards[ended] = rewards.numpy()
            outcome.valids[ended] = valids.cpu().numpy()
            outcome.rewards[ended] += environment.reward_scale * outcome.terminal_rewards[ended]
        return outcome

    def observe(self) -> Observation:
        """Observations of all sub-environments, batch first; the arrays are new."""
        times = self.environment.grid.times.numpy()
        observation = {
            "latent": (self.latents.cpu().numpy() if self._host is None else self._host).astype(
                np.float32
            ),
            "time": times[self.index].astype(np.float32)[:, None],
        }
        if self._embeddings is not None:
            observation["prompt"] = self._embeddings.copy()
        return observation

    @torch.inference_mode()
    def frames(self) -> list[np.ndarray]:
        """The sample that the model now expects in each sub-environment, uint8, shape ``(H, W,
        3)``.

        The network's output is kept for the next step, so that rendering costs no second call.
        """
        finished = self.finished
        states = self.latents.clone()
        running = [i for i in range(self.num_envs) if not finished[i]]
        if running:
            index = torch.from_numpy(self.index[running]).to(states.device)
            output = self._predict(states[running], index, running)
            # A copy, so that what was known before comes back if the picture cannot be drawn.
            known = torch.zeros_like(self.latents) if self._output is None else self._output.clone()
            known[running] = output.to(known.dtype)
            self._output = known
            states[running] = self.environment.expected_endpoint(states[running], output, index)
        model = self.environment.base_model
        pictures = model.picture(self._finish(states, range(self.num_envs)))
        pictures = (as_pictures(model, pictures, self.num_envs) * 255).round().to(torch.uint8)
        return list(np.ascontiguousarray(pictures.permute(0, 2, 3, 1).cpu().numpy()))

    def get_state(self) -> State:
        """The running episodes as plain arrays, one row per sub-environment, and the times that
        they visit.

        Raises:
            StateError: If the model's keyword arguments cannot be kept as arrays.
        """
        state: State = {
            "latents": self.latents.cpu().numpy().copy(),
            "index": self.index.copy(),
            "started": self.started.copy(),
            "seeded": self.seeded.copy(),
            "generators": np.stack(
                [generator.get_state().numpy() for generator in self.streams.generators]
            ),
            "times": self.environment.grid.times.numpy().copy(),
            "settings": np.array(json.dumps(self.environment.settings(), sort_keys=True)),
        }
        if self._embeddings is not None:
            state["embeddings"] = self._embeddings.copy()
        running = (
            self.started & ~self.finished if (self.started & ~self.finished).any() else self.started
        )
        if not running.any():
            return {**state, **pack({})}
        # Where no episode runs no arguments are needed; those of another sub-environment hold their
        # place.
        filler = self._kwargs[int(np.flatnonzero(running)[0])]
        kwargs = [
            mine if self.started[i] and form(mine) == form(filler) else filler
            for i, mine in enumerate(self._kwargs)
        ]
        return {**state, **pack(merge_kwargs(kwargs))}

    def set_state(self, state: Mapping[str, np.ndarray]) -> None:
        """Go on from what :meth:`get_state` returned.

        Raises:
            StateError: If the state is damaged, or of an environment with other sub-environments,
                latents, times or settings; nothing has changed then.
        """
        try:
            arrays, generators, kwargs = self._read_state(state)
        except StateError:
            raise
        except Exception as error:  # whatever a damaged state makes of json, numpy and torch
            raise StateError(
                f"part of the state is damaged: {type(error).__name__}: {reason(error)}"
            ) from error
        self.latents = torch.from_numpy(arrays["latents"].copy()).to(self.latents.device)
        for name in ("index", "started", "seeded"):
            setattr(self, name, arrays[name].copy())
        self.streams.replace(generators)
        if self._embeddings is not None:
            self._embeddings = arrays["embeddings"].copy()
        self._kwargs = kwargs
        self._merged, self._output = {}, None

    def _read_state(
        self, state: Mapping[str, np.ndarray]
    ) -> tuple[dict[str, np.ndarray], list[torch.Generator], list[dict[str, Any]]]:
        """Arrays, generators and arguments of a state that fits, all checked."""
        current = self.get_state()
        own = [name for name, array in current.items() if array.ndim and "/" not in name]
        arrays = {name: as_array_of_state(state, name, current[name]) for name in own}
        # Machines round the times of one grid differently by some units in the last place.
        if not np.allclose(arrays["times"], current["times"], rtol=0, atol=ROUNDING):
            raise StateError(
                "times of the state are not those that this environment visits; give it the same "
                "grid"
            )
        for name, array in state.items():
            if name.startswith("kwargs/") and array.ndim and len(array) != self.num_envs:
                raise StateError(
                    f"{name} of the state has {len(array)} rows, expected {self.num_envs}"
                )
        check_settings(str(state["settings"]), self.environment)
        for name in {"latents", "embeddings"} & set(arrays):
            if not np.isfinite(arrays[name]).all():
                raise StateError(f"{name} of the state hold NaN or infinity")
        outside = (arrays["index"] < 0) | (arrays["index"] > self.environment.discretization_steps)
        if outside.any():
            raise StateError(
                f"index of the state is {arrays['index'][outside][0]}, expected 0 to "
                f"{self.environment.discretization_steps}"
            )
        generators = [
            torch.Generator().set_state(torch.from_numpy(bits.copy()))
            for bits in arrays["generators"]
        ]
        batch = unpack(state, self.latents.device)
        if batch and not arrays["started"].any():
            raise StateError(
                f"the state has the arguments {sorted(batch)}, but no episode that they belong to"
            )
        kwargs = [row(batch, i) if started else {} for i, started in enumerate(arrays["started"])]
        self._check_kwargs(
            [mine for mine, started in zip(kwargs, arrays["started"], strict=True) if started]
        )
        return arrays, generators, kwargs

    @torch.no_grad()
    def _check_kwargs(self, episodes: list[dict[str, Any]]) -> None:
        """Raise a StateError unless a state's arguments are such as the model makes."""
        asked: dict[str, Any] = {}
        for prompt in {
            repr(kwargs["prompt"]): kwargs["prompt"] for kwargs in episodes if "prompt" in kwargs
        }.values():
            try:
                self._check_prompt(prompt)
            except OptionError as error:
                raise StateError(
                    f"kwargs/prompt of the state cannot be used here: {error}"
                ) from error
        for kwargs in episodes[:1]:
            if "prompt" in kwargs:
                asked = {"prompt": kwargs["prompt"]}
            _, like = self.environment.start_from(EpisodeSeed(0), 1, asked)
            check_arguments(kwargs, like)
        for kwargs in episodes[1:]:
            check_arguments(kwargs, episodes[0])

    def as_actions(
        self, actions: Any, batched: bool = True, unused: np.ndarray | None = None
    ) -> np.ndarray | torch.Tensor:
        """Actions, clipped to [-1, 1], as a float32 array of shape ``(n, *)``; tensors stay
        tensors.

        Args:
            actions: Numbers of shape ``(n, *)``, or ``(*)`` if not ``batched``.
            batched: Whether there is a batch dimension.
            unused: Whose actions are not looked at, bool, shape ``(n,)``.

        Raises:
            ActionError: If they are not numbers, have another shape, or hold NaN or infinity.
        """
        shape = (self.num_envs, *self.environment.state_shape)[0 if batched else 1 :]
        if isinstance(actions, torch.Tensor):
            odd = oddity(actions)
            if odd:
                raise ActionError(f"action is {odd}, expected float32 numbers of shape {shape}")
            numbers = actions.detach()
            # Small floating-point formats have no isfinite; float32 holds their values.
            if numbers.is_floating_point() and numbers.dtype is not torch.float64:
                numbers = numbers.to(torch.float32)
            if (
                numbers.dtype is torch.bool
                or numbers.shape != shape
                or not bool(torch.isfinite(numbers).all())
            ):
                return self.as_actions(numbers.cpu().numpy(), batched, unused)
            tensor = numbers.clamp(-1, 1).to(torch.float32)
            return tensor if batched else tensor[None]
        array = as_array(actions, shape)
        if array.dtype.kind not in "fiu":
            raise ActionError(f"action has dtype {array.dtype}, expected float32")
        if array.shape != shape:
            raise ActionError(f"action has shape {array.shape}, expected {shape}")
        finite = np.isfinite(array)
        bad = np.argwhere(
            ~finite if unused is None else ~finite & ~unused.reshape(-1, *[1] * (array.ndim - 1))
        )
        if len(bad):
            at = tuple(int(i) for i in bad[0])
            where = f" of sub-environment {at[0]}" if batched else ""
            raise ActionError(
                f"action{where} is {array[at]} at index {at}, expected finite numbers; "
                "an agent that returns NaN has usually diverged (lower its learning rate)"
            )
        clipped: np.ndarray = np.clip(array, -1, 1).astype(np.float32, copy=False)
        return clipped if batched else clipped[None]

    def _predict(self, x: torch.Tensor, index: torch.Tensor, where: list[int]) -> torch.Tensor:
        if self._output is not None:
            return self._output[where]
        environment = self.environment
        with torch.inference_mode():
            if self.split is None:
                return environment.predict(FlowTensor(x), index, **self._batch_kwargs(where))
            return self.split.predict(x, environment.times[index], where, self._batch_kwargs)

    def _finish(self, x: torch.Tensor, where: Sequence[int]) -> FlowTensor:
        if self.split is not None:
            return self.split.finish(x, where)
        finished: FlowTensor = self.environment.finish(FlowTensor(x))
        return finished

    def _score(self, ended: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        reward = self.environment.reward
        self._remembered = reward.get_state() if reward.stateful else None
        try:
            rewards, valids = self.environment.rate(
                self._finish(self.latents[ended], ended), **self._batch_kwargs(ended)
            )
        except RewardError as error:
            wrong = ended if error.sample is None else [ended[error.sample]]
            over = f" (over{self._named(ended)})" if wrong != ended else ""
            raise RewardError(
                f"{error}{self._named(wrong)}; reset to go on{over}"
            ) from error.__cause__
        rewards, scale = rewards.detach().double().cpu(), self.environment.reward_scale
        beyond = torch.nonzero(~(rewards.abs() * abs(scale) <= LARGEST)).flatten().tolist()
        if beyond:
            raise RewardError(
                f"{type(self.environment.reward).__name__} returned "
                f"{rewards[beyond[0]].item():.4g}, which times reward_scale {scale:.4g} is beyond "
                f"float32{self._named([ended[i] for i in beyond])}; reset to go on"
            )
        return rewards, valids

    def _embed(self, prompts: list[str]) -> np.ndarray:
        model = self.environment.base_model
        features = None if self._embeddings is None else self._embeddings.shape[1]
        return as_embeddings(model, model.embed_prompts(prompts), len(prompts), features)

    def _named(self, indices: Sequence[int]) -> str:
        """Which sub-environments, for an error message; nothing where there is only one."""
        if self.num_envs == 1:
            return ""
        return (
            f" in sub-environment{'s' if len(indices) > 1 else ''} {', '.join(map(str, indices))}"
        )

    def _batch_kwargs(self, where: list[int], part: Part | None = None) -> dict[str, Any]:
        """Arguments of some episodes, on the first device or on that of their part."""
        whole = range(self.num_envs) if part is None else part.where
        key = (whole.start, whole.stop)
        if len(where) == len(whole) and key in self._merged:
            return self._merged[key]
        merged = merge_kwargs([self._kwargs[i] for i in where])
        if part is not None:
            merged = on_device(merged, part.device)
        if len(where) == len(whole):
            self._merged[key] = merged
        return merged

    def _check_finite(self, x: np.ndarray, where: list[int]) -> None:
        if np.isfinite(x.sum()):
            return
        bad = [i for i, state in zip(where, x, strict=True) if not np.isfinite(state).all()]
        if bad:
            name = type(self.environment.base_model).__name__
            raise ModelError(
                f"{name} returned NaN or infinity{self._named(bad)} at step {self.index[bad[0]]}; "
                "reset to go on (a float16 network often overflows: try dtype='float32')"
            )


class RolloutSettings:
    """What both Gymnasium interfaces show of the environment behind their ``rollout``."""

    rollout: Rollout
    _np_random: np.random.Generator | None
    _np_random_seed: int | None

    @property
    def environment(self) -> Environment[Any]:
        """The torch-native environment behind: base model, reward, time grid and transitions.

        Of a wrapped environment :func:`flowgym_gym.envs.environment_of` gives it.
        """
        return self.rollout.environment

    @property
    def reward_scale(self) -> float:
        """Weight of the terminal reward."""
        return self.environment.reward_scale

    @property
    def action_scale(self) -> float:
        """Size of the correction that an action of 1 makes."""
        return self.environment.action_scale

    @property
    def discretization_steps(self) -> int:
        """Number of steps of an episode."""
        return self.environment.discretization_steps

    def set_time_grid(self, steps: Steps, spacing: str | None = None) -> None:
        """Take another time grid; the next call must be ``reset``."""
        self.rollout.set_time_grid(steps, spacing)

    @contextmanager
    def _all_or_nothing(self) -> Iterator[None]:
        """Leave everything as it was if a call fails; see :meth:`Rollout.all_or_nothing`."""
        generator, seed = self._np_random, self._np_random_seed
        bits = None if generator is None else generator.bit_generator.state
        with self.rollout.all_or_nothing():
            try:
                yield
            except RewardError:
                raise
            except BaseException:
                self._np_random, self._np_random_seed = generator, seed
                if generator is not None:
                    generator.bit_generator.state = bits  # type: ignore[assignment]
                raise


def rollout_of(env: object) -> Rollout:
    """The running episodes of a Gymnasium environment of this package; see
    :func:`environment_of`.
    """
    inner = getattr(env, "unwrapped", None)
    if not isinstance(inner, RolloutSettings):
        raise OptionError(
            f"env is {shown(env)}, expected a flowgym environment or its own vector environment; "
            "for Gymnasium's SyncVectorEnv and AsyncVectorEnv take or wrap the single environments"
        )
    return inner.rollout


def environment_of(env: object) -> Environment[Any]:
    """The torch-native environment behind a Gymnasium environment, single or vector, wrapped or
    not.

    Args:
        env: The Gymnasium environment; an :class:`Environment` is returned as it is.

    Returns:
        The one that ``env`` steps with, not a copy.

    Raises:
        OptionError: If ``env`` is no environment of this package. Gymnasium's own vector
            environments hold many, each with its own.

    >>> import gymnasium, flowgym_gym
    >>> env = gymnasium.make("flowgym/GaussianMixture-Gaussian-v0")
    >>> environment_of(env).state_shape
    (1,)
    """
    return env if isinstance(env, Environment) else rollout_of(env).environment


def as_array(actions: object, shape: tuple[int, ...]) -> np.ndarray:
    """Actions as a numpy array, or an ActionError if they are no array."""
    if np.ma.isMaskedArray(actions):
        raise ActionError(f"action is a masked array, expected plain numbers of shape {shape}")
    try:
        return np.asarray(actions)
    except ValueError as error:
        raise ActionError(
            f"action is a ragged {type(actions).__name__}, expected shape {shape}"
        ) from error
    except Exception as error:  # whatever an object's own conversion raises
        raise ActionError(
            f"action is {shown(actions)}, expected float32 numbers of shape {shape} "
            f"({reason(error)})"
        ) from error


def _replaced(batch: torch.Tensor, where: list[int], rows: torch.Tensor) -> torch.Tensor:
    """A copy of ``batch`` with other rows, so that what was handed out before stays as it was."""
    batch = batch.clone()
    batch[where] = rows.to(batch.device)
    return batch
