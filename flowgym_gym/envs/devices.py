"""Sub-environments split over several devices: a copy of the base model on each, called in a thread
of its own.

Only the two calls that take time are split, the network and the decoding of finished samples.
States, noise, transitions, prompts and rewards stay on the first device, whose model also draws and
encodes prompts, so that seeds, states and rewards mean what they mean on one device: a reward sees
all samples that are finished at a step in one call, in order.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from flowgym_gym.envs.answers import as_output, check_finished
from flowgym_gym.envs.environment import Environment
from flowgym_gym.errors import FlowGymError, OptionError, shown
from flowgym_gym.models.base import BaseModel
from flowgym_gym.models.loading import as_device, load_base_model
from flowgym_gym.types import FlowTensor

T = TypeVar("T")
# Arguments of some sub-environments' episodes, from their numbers and those of their part.
Arguments = Callable[[list[int], "Part"], dict[str, Any]]


@dataclass(frozen=True)
class Part:
    """The sub-environments that one device serves.

    Attributes:
        model: The base model there.
        device: Where it lies.
        where: Which sub-environments, one after another.
    """

    model: BaseModel[Any]
    device: torch.device
    where: range


def find_devices(device: Sequence[Any], num_envs: int) -> list[torch.device]:
    """The devices of a list, in its order.

    Raises:
        OptionError: If there is none, one cannot be used, an accelerator is named twice, or there
            are more of them than sub-environments.
    """
    if not device:
        raise OptionError(f"device is {device!r}, expected at least one device, such as ['cuda:0']")
    devices = [as_device(one) for one in device]
    check_distinct(devices)
    if len(devices) > num_envs:
        raise OptionError(
            f"device is {shown(list(device))}, {len(devices)} devices, but num_envs is {num_envs}; "
            "give no more devices than sub-environments"
        )
    return devices


def check_distinct(devices: Sequence[torch.device]) -> None:
    """Raise an OptionError if an accelerator is named twice, which would only take twice its
    memory; the CPU may be, to try out how a split behaves.
    """
    known: dict[torch.device, torch.device] = {}
    for device in devices:
        if device.type == "cpu":
            continue
        index = device.index
        if index is None:  # "cuda" is whichever is the current one
            index = torch.cuda.current_device() if device.type == "cuda" else 0
        first = known.setdefault(torch.device(device.type, index), device)
        if first is not device:
            both = f"'{first}'" if first == device else f"'{first}' and '{device}', which are one"
            raise OptionError(
                f"device names {both} twice; name each accelerator once, and give more "
                "sub-environments instead"
            )


class Split:
    """An environment's base model on several devices, each for some of the sub-environments.

    Args:
        environment: The environment; its base model, on the first device, comes from the registry.
        devices: Where the model is to be.
        num_envs: Number of sub-environments, which are divided as evenly as possible, in order.

    Attributes:
        parts: What each device serves.
    """

    def __init__(
        self, environment: Environment[Any], devices: Sequence[torch.device], num_envs: int
    ) -> None:
        self._environment, self._devices, self._num_envs = environment, list(devices), num_envs
        self._load()

    def _load(self) -> None:
        assert self._environment.parts is not None
        arguments = self._environment.parts["base_model"]
        others = [
            load_base_model(**{**arguments, "device": str(device)}) for device in self._devices[1:]
        ]
        shares = np.array_split(np.arange(self._num_envs), len(self._devices))
        self.parts = [
            Part(model, model.device, range(int(share[0]), int(share[-1]) + 1))
            for model, share in zip([self._environment.base_model, *others], shares, strict=True)
        ]
        self._forget_threads()

    def __deepcopy__(self, memo: dict[int, Any]) -> Split:
        return Split(deepcopy(self._environment, memo), self._devices, self._num_envs)

    def __getstate__(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("_environment", "_devices", "_num_envs")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._load()

    def predict(self, x: Tensor, t: Tensor, where: Sequence[int], arguments: Arguments) -> Tensor:
        """The networks' output for states of some sub-environments; see
        :meth:`flowgym_gym.envs.Environment.predict`.

        Args:
            x: States, shape ``(n, *)``.
            t: Their times, shape ``(n,)``.
            where: Whose they are, in ascending order.
            arguments: Gives the keyword arguments of a part's episodes, on its device.
        """

        def call(part: Part, rows: slice, kwargs: dict[str, Any]) -> Tensor:
            states = FlowTensor(x[rows].to(part.device))
            output = part.model(states, t[rows].to(part.device), **kwargs)
            return as_output(part.model, output, states.data).to(x.device)

        return torch.cat(self._each(call, where, arguments))

    def finish(self, x: Tensor, where: Sequence[int]) -> FlowTensor:
        """Finished samples of states of some sub-environments, on the device of ``x``; see
        :meth:`flowgym_gym.envs.Environment.finish`.
        """

        def call(part: Part, rows: slice, kwargs: dict[str, Any]) -> FlowTensor:
            states = FlowTensor(x[rows].to(part.device))
            sample = part.model.postprocess(states)
            check_finished(part.model, sample, len(states))
            finished: FlowTensor = sample.to(x.device)
            return finished

        samples = self._each(call, where, lambda indices, part: {})
        return type(samples[0]).collate(samples)

    def close(self) -> None:
        """End the threads."""
        for thread in self._threads.values():
            thread.shutdown()
        self._forget_threads()

    def _each(
        self,
        call: Callable[[Part, slice, dict[str, Any]], T],
        where: Sequence[int],
        arguments: Arguments,
    ) -> list[T]:
        """What a call returns for each part that has some of the sub-environments, all at once.

        All are waited for, so that nothing goes on behind an error; of several errors the first
        part's is raised.
        """
        pending, begin = [], 0
        for number, part in enumerate(self.parts):
            mine = [i for i in where if i in part.where]
            if not mine:
                continue
            rows, begin = slice(begin, begin + len(mine)), begin + len(mine)
            task = _task(call, part, rows, arguments(mine, part))
            pending.append((part, mine, self._thread(number).submit(task)))
        wait([future for _, _, future in pending])
        results = []
        for part, mine, future in pending:
            with _named(part, mine):
                results.append(future.result())
        return results

    def _thread(self, number: int) -> ThreadPoolExecutor:
        """The thread of a part; a forked child has none of its parent's."""
        if self._process != os.getpid():
            self._forget_threads()
        if number not in self._threads:
            name = f"flowgym-device-{number}"
            self._threads[number] = ThreadPoolExecutor(max_workers=1, thread_name_prefix=name)
        return self._threads[number]

    def _forget_threads(self) -> None:
        self._threads: dict[int, ThreadPoolExecutor] = {}
        self._process = os.getpid()


def on_device(value: Any, device: torch.device) -> Any:
    """Keyword arguments of episodes with their tensors on a device."""
    if isinstance(value, dict):
        return {key: on_device(entry, device) for key, entry in value.items()}
    return value.to(device) if isinstance(value, Tensor | FlowTensor) else value


def _task(
    call: Callable[[Part, slice, dict[str, Any]], T],
    part: Part,
    rows: slice,
    kwargs: dict[str, Any],
) -> Callable[[], T]:
    """A call for another thread, with what belongs to this one: torch's modes, and the stream that
    a device's work goes to.
    """
    inference, gradients = torch.is_inference_mode_enabled(), torch.is_grad_enabled()
    stream = torch.cuda.current_stream(part.device) if part.device.type == "cuda" else None
    casts = {
        kind: torch.get_autocast_dtype(kind)
        for kind in ("cpu", part.device.type)
        if torch.is_autocast_enabled(kind)
    }

    def task() -> T:
        with ExitStack() as modes:
            modes.enter_context(torch.inference_mode(inference))
            modes.enter_context(torch.set_grad_enabled(gradients and not inference))
            if stream is not None:
                modes.enter_context(torch.cuda.stream(stream))
            for kind, dtype in casts.items():
                modes.enter_context(torch.autocast(kind, dtype=dtype))
            return call(part, rows, kwargs)

    return task


@contextmanager
def _named(part: Part, where: list[int]) -> Iterator[None]:
    """Say in an error which part it is of."""
    try:
        yield
    except Exception as error:
        listed = ", ".join(map(str, where))
        whose = f"in the part on {part.device}, sub-environment{'s' * (len(where) > 1)} {listed}"
        if isinstance(error, FlowGymError) and error.args:
            error.args = (f"{error.args[0]} ({whose})", *error.args[1:])
        else:
            error.add_note(whose)
        raise
