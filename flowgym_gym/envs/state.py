"""Running episodes as plain arrays, for ``get_state`` and ``set_state``.

A state is a dictionary of numpy arrays without objects, so that ``numpy.savez(file, **state)``
writes it and ``numpy.load(file)`` reads it back without pickle. The keyword arguments of the
episodes, such as prompts and their embeddings, are laid out by :func:`pack`: arrays with one row
per sub-environment, and one JSON text that says what each array was.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flowgym_gym.errors import StateError, reason, shown
from flowgym_gym.types import FlowTensor, oddity

State = dict[str, np.ndarray]

KWARGS = "kwargs"
PLAIN = (str, bool, int, float, type(None))


def pack(kwargs: Mapping[str, Any]) -> State:
    """Keyword arguments of a batch of episodes as arrays.

    Args:
        kwargs: Tensors, ``FlowTensor`` and lists with one entry per episode, plain values, and
            dictionaries of these.

    Raises:
        StateError: If a value is something else.
    """
    arrays: State = {}
    kinds = {key: _pack(f"{KWARGS}/{key}", value, arrays) for key, value in kwargs.items()}
    return {KWARGS: np.array(json.dumps(kinds)), **arrays}


def unpack(state: Mapping[str, np.ndarray], device: torch.device) -> dict[str, Any]:
    """Undo :func:`pack`, with tensors on ``device``."""
    kinds = json.loads(str(state[KWARGS]))
    return {key: _unpack(f"{KWARGS}/{key}", kind, state, device) for key, kind in kinds.items()}


def row(kwargs: Mapping[str, Any], i: int) -> dict[str, Any]:
    """The keyword arguments of episode ``i`` alone, still with a batch dimension."""
    return {key: _row(value, i) for key, value in kwargs.items()}


def pack_random(generator: np.random.Generator) -> np.ndarray:
    """State of a numpy generator as JSON text."""
    return np.array(json.dumps(generator.bit_generator.state, default=np.ndarray.tolist))


def unpack_random(generator: np.random.Generator, text: object) -> dict[str, Any]:
    """Undo :func:`pack_random`: a state for the bit generator of ``generator``, not yet set.

    Raises:
        StateError: If the text is damaged, or of another kind of generator.
    """
    trial = type(generator.bit_generator)()
    try:
        trial.state = json.loads(str(text))
    except Exception as error:  # numpy raises whatever its conversions do
        raise StateError(
            f"random state cannot be restored: {type(error).__name__}: {reason(error)}"
        ) from error
    state: dict[str, Any] = trial.state  # type: ignore[assignment]
    return state


def restore(env: Any, state: Mapping[str, np.ndarray]) -> None:
    """Put an environment's ``rollout`` and ``np_random`` back to a state.

    Raises:
        StateError: If the state does not fit; nothing has changed then.
    """
    if not isinstance(state, Mapping) or "random" not in state:
        raise StateError(f"the state is {_listed(state)}, expected what get_state returned")
    random = unpack_random(env.np_random, state["random"])
    env.rollout.set_state(state)
    env.np_random.bit_generator.state = random


def form(value: Any) -> Any:
    """Kinds and shapes, which arguments of several episodes must share to make a batch."""
    if isinstance(value, dict):
        return {key: form(entry) for key, entry in value.items()}
    if isinstance(value, Tensor | FlowTensor):
        rows = list(value.shape[1:]) if len(value.shape) else None
        return (
            f"{type(value).__name__} of {str(value.dtype).removeprefix('torch.')}, rows of shape "
            f"{rows}"
        )
    if isinstance(value, list):
        return f"list of {type(value[0]).__name__ if value else 'nothing'}"
    return type(value).__name__


def check_arguments(found: Mapping[str, Any], like: Mapping[str, Any], path: str = KWARGS) -> None:
    """Raise a StateError unless arguments of an episode look like those that the model makes.

    Args:
        found: Keyword arguments of one episode, from a state.
        like: The same from the model.
        path: Where they are in the state.
    """
    if found.keys() != like.keys():
        raise StateError(
            f"{path} of the state has the arguments {sorted(found)}, but this environment's model "
            f"makes {sorted(like)}"
        )
    for key, value in found.items():
        if isinstance(value, dict) and isinstance(like[key], dict):
            check_arguments(value, like[key], f"{path}/{key}")
        elif form(value) != form(like[key]):
            raise StateError(
                f"{path}/{key} of the state is a {form(value)}, but this environment's model makes "
                f"a {form(like[key])}"
            )
        elif _has_nan(value) and not _has_nan(like[key]):
            raise StateError(f"{path}/{key} of the state holds NaN")


def as_array_of_state(state: Mapping[str, np.ndarray], name: str, like: np.ndarray) -> np.ndarray:
    """The array ``name`` of a state, or a StateError unless it has the shape and dtype of
    ``like``.
    """
    if not isinstance(state, Mapping):
        raise StateError(f"the state is {_listed(state)}, expected what get_state returned")
    if name not in state:
        raise StateError(
            f"the state has no {name!r}; expected what get_state of this kind of environment "
            "returned"
        )
    array = state[name]
    if not isinstance(array, np.ndarray) or array.shape != like.shape or array.dtype != like.dtype:
        found = (
            f"shape {array.shape} and {array.dtype}"
            if isinstance(array, np.ndarray)
            else type(array).__name__
        )
        raise StateError(
            f"{name} of the state has {found}, this environment needs shape {like.shape} and "
            f"{like.dtype}"
        )
    return array


def _listed(state: object) -> str:
    return shown(sorted(map(str, state))) if isinstance(state, Mapping) else shown(state)


def _has_nan(value: Any) -> bool:
    data = value.data if isinstance(value, FlowTensor) else value
    if isinstance(data, float):
        return math.isnan(data)
    floating = isinstance(data, Tensor) and (data.is_floating_point() or data.is_complex())
    return floating and bool(data.isnan().any())


def _pack(name: str, value: Any, arrays: State) -> Any:
    if isinstance(value, dict):
        return {
            "dict": {key: _pack(f"{name}/{key}", entry, arrays) for key, entry in value.items()}
        }
    if isinstance(value, PLAIN):
        return {"plain": value}
    if isinstance(value, list) and all(
        isinstance(entry, PLAIN) and entry is not None for entry in value
    ):
        arrays[name] = np.array(value)
        return "list"
    if isinstance(value, Tensor) or type(value) is FlowTensor:
        tensor = (value if isinstance(value, Tensor) else value.data).detach()
        odd = oddity(tensor)
        if odd:
            raise StateError(f"{name} is {odd}, which cannot be kept as an array")
        # numpy has no bfloat16; float32 holds every one of its values.
        arrays[name] = (
            (tensor.float() if tensor.dtype is torch.bfloat16 else tensor).cpu().numpy().copy()
        )
        kind = "tensor" if isinstance(value, Tensor) else "flow"
        return {kind: str(tensor.dtype).removeprefix("torch.")}
    raise StateError(
        f"{name} is a {type(value).__name__}, which cannot be kept as an array; a model's keyword "
        "arguments are tensors, FlowTensor, lists of text or numbers, plain values, or "
        "dictionaries of these"
    )


def _unpack(name: str, kind: Any, state: Mapping[str, np.ndarray], device: torch.device) -> Any:
    if kind == "list":
        return state[name].tolist()
    ((what, content),) = kind.items()
    if what == "dict":
        return {
            key: _unpack(f"{name}/{key}", entry, state, device) for key, entry in content.items()
        }
    if what == "plain":
        return content
    dtype = getattr(torch, content)
    tensor = torch.from_numpy(state[name].copy())
    if tensor.dtype is not (torch.float32 if dtype is torch.bfloat16 else dtype):
        raise StateError(
            f"{name} of the state has {state[name].dtype}, but was {content} when it was saved"
        )
    tensor = tensor.to(device, dtype)
    return tensor if what == "tensor" else FlowTensor(tensor)


def _row(value: Any, i: int) -> Any:
    if isinstance(value, dict):
        return row(value, i)
    if isinstance(value, list | FlowTensor) or (isinstance(value, Tensor) and value.ndim):
        return value[i : i + 1]
    return value
