"""Checks of what models, rewards and policies return: the error names the method, what came back
and what was expected.

What they raise themselves is not touched here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flowgym_gym.errors import ModelError, shown
from flowgym_gym.types import FlowTensor, oddity


def described(value: object) -> str:
    """What a method returned, in a few words."""
    if isinstance(value, FlowTensor):
        return f"a FlowTensor of shape {tuple(value.shape)} and {value.dtype} on {value.device}"
    if isinstance(value, Tensor):
        return (
            oddity(value)
            or f"a tensor of shape {tuple(value.shape)} and {value.dtype} on {value.device}"
        )
    if isinstance(value, tuple | list):
        inside = ", ".join(type(entry).__name__ for entry in value[:5])
        return (
            f"a {type(value).__name__} of {len(value)} "
            f"({inside}{', ...' if len(value) > 5 else ''})"
        )
    return f"a {type(value).__name__}" if value is not None else "None"


def is_real(tensor: Tensor) -> bool:
    """Whether a tensor holds numbers that are not complex."""
    return not tensor.is_complex() and tensor.dtype is not torch.bool


def check_states(name: str, value: Any, shape: tuple[int, ...]) -> None:
    """Raise a ModelError unless ``value`` is a FlowTensor of real states of this shape."""
    good = isinstance(value, FlowTensor) and isinstance(value.data, Tensor)
    good = good and tuple(value.data.shape) == shape and is_real(value.data)
    odd = oddity(value.data) if good else None
    if not good or odd:
        raise ModelError(
            f"{name} returned {odd or described(value)}, expected a FlowTensor of shape {shape} of "
            "real numbers"
        )


def as_output(model: object, prediction: object, x: Tensor) -> Tensor:
    """What ``forward`` returned for states ``x``, or a ModelError unless it is a FlowTensor like
    them.
    """
    name = f"{type(model).__name__}.forward"
    if not isinstance(prediction, FlowTensor):
        raise ModelError(f"{name} returned {type(prediction).__name__}, expected a FlowTensor")
    output: Tensor = prediction.data
    odd = oddity(output) or (None if output.is_floating_point() else f"{output.dtype} numbers")
    if odd:
        raise ModelError(f"{name} returned {odd}, expected floating-point numbers")
    if output.shape != x.shape:
        raise ModelError(
            f"{name} returned shape {tuple(output.shape)}, expected that of the states, "
            f"{tuple(x.shape)}"
        )
    if output.device != x.device:
        raise ModelError(
            f"{name} returned a tensor on {output.device}, expected that of the states, {x.device}"
        )
    return output


def check_started(model: object, result: object, n: int, state_shape: tuple[int, ...]) -> None:
    """Raise a ModelError unless ``preprocess`` returned states and arguments with one entry per
    state.
    """
    name = f"{type(model).__name__}.preprocess"
    if not (isinstance(result, tuple) and len(result) == 2 and isinstance(result[1], dict)):
        raise ModelError(
            f"{name} returned {described(result)}, expected the states and a dict of arguments"
        )
    check_states(name, result[0], (n, *state_shape))
    # As they will be kept; small floating-point formats have no isfinite.
    if not bool(torch.isfinite(result[0].data.to(torch.float32)).all()):
        raise ModelError(f"{name} returned states that hold NaN or infinity")
    _check_arguments(name, result[1], n)
    own = sorted({"x", "t"} & set(result[1]))
    if own:
        raise ModelError(
            f"{name} returned an argument {own[0]!r}, which forward and rewards have already; "
            "rename it"
        )


def _check_arguments(name: str, kwargs: Mapping[Any, Any], n: int) -> None:
    for key, value in kwargs.items():
        if not isinstance(key, str):
            raise ModelError(
                f"{name} returned an argument named {shown(key)}, expected a name of letters"
            )
        if isinstance(value, Mapping):
            _check_arguments(name, value, n)
        batched = isinstance(value, list | FlowTensor) or (
            isinstance(value, Tensor) and value.ndim > 0
        )
        if batched and len(value) != n:
            raise ModelError(
                f"{name} returned {key!r} with {len(value)} entries, expected one for each of {n} "
                "states"
            )


def check_finished(model: object, sample: object, n: int) -> None:
    """Raise a ModelError unless ``postprocess`` returned a FlowTensor of ``n`` samples."""
    odd = oddity(sample.data) if isinstance(sample, FlowTensor) else None
    if not isinstance(sample, FlowTensor) or len(sample) != n or odd:
        raise ModelError(
            f"{type(model).__name__}.postprocess returned {odd or described(sample)}, expected a "
            f"FlowTensor of {n} samples"
        )


def as_prompts(model: Any) -> list[str] | None:
    """The prompts that episodes draw from, or a ModelError unless they are None or a list
    of text.
    """
    prompts = getattr(model, "prompts", None)
    if prompts is None:
        return None
    if (
        not isinstance(prompts, list | tuple)
        or not prompts
        or not all(isinstance(p, str) for p in prompts)
    ):
        raise ModelError(
            f"prompts of {type(model).__name__} is {shown(prompts)}, expected None or a list of at "
            "least one string"
        )
    return list(prompts)


def as_embeddings(model: object, vectors: Any, n: int, features: int | None = None) -> np.ndarray:
    """What ``embed_prompts`` returned as a float32 array, shape ``(n, features)``; any number of
    features if None.
    """
    good = (
        isinstance(vectors, Tensor)
        and not oddity(vectors)
        and vectors.ndim == 2
        and len(vectors) == n
    )
    if not good or features not in (None, vectors.shape[1]) or not vectors.shape[1]:
        raise ModelError(
            f"{type(model).__name__}.embed_prompts returned {described(vectors)}, expected a "
            f"tensor of shape ({n}, {features or 'features'})"
        )
    array: np.ndarray = vectors.detach().to("cpu", torch.float32).numpy()
    if not np.isfinite(array).all():
        raise ModelError(f"{type(model).__name__}.embed_prompts returned NaN or infinity")
    return array


def as_pictures(model: object, pictures: Any, n: int) -> Tensor:
    """What ``picture`` returned, or a ModelError unless it is ``n`` pictures ``(3, H, W)`` in [0,
    1].
    """
    good = isinstance(pictures, Tensor) and not oddity(pictures) and pictures.is_floating_point()
    good = (
        good and pictures.ndim == 4 and tuple(pictures.shape[:2]) == (n, 3) and pictures.numel() > 0
    )
    if not good:
        raise ModelError(
            f"{type(model).__name__}.picture returned {described(pictures)}, expected a float "
            f"tensor of shape ({n}, 3, H, W)"
        )
    numbers: Tensor = pictures.detach()
    numbers = numbers.float() if numbers.element_size() == 1 else numbers
    low, high = (float(end) for end in numbers.float().aminmax())
    if not (low >= -1e-3 and high <= 1 + 1e-3):
        raise ModelError(
            f"{type(model).__name__}.picture returned pixels from {low:.4g} to {high:.4g}, "
            "expected [0, 1]"
        )
    return numbers.clamp(0, 1)
