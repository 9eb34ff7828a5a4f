"""Running episodes as plain arrays, for ``get_state`` and ``set_state``.

A state is a dictionary of numpy arrays without objects, so that ``numpy.savez(file, **state)`` writes it and
``numpy.load(file)`` reads it back without pickle. The keyword arguments of the episodes, such as prompts and their
embeddings, are laid out by :func:`pack`: arrays with one row per sub-environment, and one JSON text that says what
each array was.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flowgym_gym.errors import StateError, shown
from flowgym_gym.types import FlowTensor

State = dict[str, np.ndarray]

KWARGS = "kwargs"
PLAIN = (str, bool, int, float, type(None))


def pack(kwargs: Mapping[str, Any]) -> State:
    """Keyword arguments of a batch of episodes as arrays.

    Args:
        kwargs: Tensors, ``FlowTensor`` and lists with one entry per episode, plain values, and dictionaries of these.

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


def unpack_random(generator: np.random.Generator, text: np.ndarray) -> None:
    """Undo :func:`pack_random`.

    Raises:
        StateError: If the text is of another kind of generator.
    """
    try:
        generator.bit_generator.state = json.loads(str(text))
    except (ValueError, TypeError, KeyError) as error:
        raise StateError(f"random state cannot be restored: {error}") from error


def restore(env: Any, state: Mapping[str, np.ndarray]) -> None:
    """Put an environment's ``rollout`` and ``np_random`` back to a state.

    Raises:
        StateError: If the state does not fit; nothing has changed then.
    """
    check_state(state)
    if "random" not in state:
        raise StateError(f"the state holds {shown(sorted(state, key=str))}, expected what get_state returned")
    previous = env.np_random.bit_generator.state
    unpack_random(env.np_random, state["random"])
    try:
        env.rollout.set_state(state)
    except StateError:
        env.np_random.bit_generator.state = previous
        raise


def check_state(state: object) -> None:
    """Raise a StateError unless this is a dictionary of arrays."""
    # What numpy.load returns is a Mapping, too.
    if not isinstance(state, Mapping):
        raise StateError(f"the state is {shown(state)}, expected the dictionary of arrays that get_state returned")


def check_settings(found: str, expected: str) -> None:
    """Raise a StateError unless two descriptions of environments agree; names what differs."""
    theirs, ours = json.loads(found), json.loads(expected)
    different = [
        f"{name} = {theirs.get(name)!r}, but this one has {ours[name]!r}"
        for name in ours
        if theirs.get(name) != ours[name]
    ]
    if different:
        raise StateError(f"the state is of an environment with {'; '.join(different)}")


def check_array(state: Mapping[str, np.ndarray], name: str, like: np.ndarray) -> np.ndarray:
    """The array ``name`` of a state, or a StateError unless it has the shape and dtype of ``like``."""
    check_state(state)
    if name not in state:
        raise StateError(f"the state has no {name!r}; expected what get_state of this kind of environment returned")
    array = state[name]
    if not isinstance(array, np.ndarray) or array.shape != like.shape or array.dtype != like.dtype:
        found = f"shape {array.shape} and {array.dtype}" if isinstance(array, np.ndarray) else type(array).__name__
        raise StateError(f"{name} of the state has {found}, this environment needs shape {like.shape} and {like.dtype}")
    return array


def _pack(name: str, value: Any, arrays: State) -> Any:
    if isinstance(value, dict):
        return {"dict": {key: _pack(f"{name}/{key}", entry, arrays) for key, entry in value.items()}}
    if isinstance(value, PLAIN):
        return {"plain": value}
    if isinstance(value, list) and all(isinstance(entry, PLAIN) and entry is not None for entry in value):
        arrays[name] = np.array(value)
        return "list"
    if isinstance(value, Tensor) or type(value) is FlowTensor:
        tensor = (value if isinstance(value, Tensor) else value.data).detach()
        # numpy has no bfloat16; float32 holds every one of its values.
        arrays[name] = (tensor.float() if tensor.dtype is torch.bfloat16 else tensor).cpu().numpy().copy()
        kind = "tensor" if isinstance(value, Tensor) else "flow"
        return {kind: str(tensor.dtype).removeprefix("torch.")}
    raise StateError(
        f"{name} is a {type(value).__name__}, which cannot be kept as an array; a model's keyword arguments are "
        "tensors, FlowTensor, lists of text or numbers, plain values, or dictionaries of these"
    )


def _unpack(name: str, kind: Any, state: Mapping[str, np.ndarray], device: torch.device) -> Any:
    if kind == "list":
        return state[name].tolist()
    ((what, content),) = kind.items()
    if what == "dict":
        return {key: _unpack(f"{name}/{key}", entry, state, device) for key, entry in content.items()}
    if what == "plain":
        return content
    tensor = torch.from_numpy(state[name].copy()).to(device, getattr(torch, content))
    return tensor if what == "tensor" else FlowTensor(tensor)


def _row(value: Any, i: int) -> Any:
    if isinstance(value, dict):
        return row(value, i)
    if isinstance(value, list | FlowTensor) or (isinstance(value, Tensor) and value.ndim):
        return value[i : i + 1]
    return value
