"""Whether weights filled the model that they were loaded into, all of it and with all of them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from torch import nn

from flowgym_gym.errors import CheckpointError

SHOWN = 3


def check_filled(where: str, model: nn.Module, report: Mapping[str, Any]) -> None:
    """Raise a CheckpointError unless weights and model are of one architecture.

    Args:
        where: Where the weights are, for messages.
        model: What they were loaded into.
        report: What ``from_pretrained(..., output_loading_info=True)`` of diffusers or transformers
            returned; what the libraries themselves regard as harmless is not in it.
    """
    kind = type(model).__name__
    if missing := sorted(report["missing_keys"]):
        unused = sorted(report["unexpected_keys"])
        left_over = f"; left over: {some(unused)}" if unused else ""
        raise CheckpointError(
            f"{where} does not fill a {kind}; missing: {some(missing)}{left_over}"
        )
    if mismatched := sorted(report["mismatched_keys"]):
        name, got, expected = mismatched[0]
        raise CheckpointError(
            f"{where} does not fit a {kind}; of another shape: "
            f"{some([key for key, *_ in mismatched])}; {name} has shape {tuple(got)}, expected "
            f"{tuple(expected)}"
        )
    if left := _left_over(model, report["unexpected_keys"]):
        raise CheckpointError(
            f"{where} holds more than the {kind} of its configuration; left over: {some(left)}; "
            "either the configuration is another model's, or the weights were saved before "
            "adapters were merged"
        )


def some(keys: Collection[str]) -> str:
    """Names of weights for a message: how many, and the first of them."""
    names = sorted(keys)
    more = ", ..." if len(names) > SHOWN else ""
    return f"{len(names)} weight{'s' * (len(names) != 1)} ({', '.join(names[:SHOWN])}{more})"


def _left_over(model: nn.Module, unused: Collection[str]) -> list[str]:
    """Which of the weights that were not used the model should have had a place for.

    Not a buffer that it makes by itself; and in models of transformers, which are saved whole and
    loaded in parts, not a weight of another part, such as CLIP's picture encoder beside its text
    encoder.
    """
    from transformers import PreTrainedModel

    buffers, inside = dict(model.named_buffers()), dict(model.named_children())
    left = sorted(key for key in unused if key not in buffers)
    if not isinstance(model, PreTrainedModel):
        return left
    prefix = f"{model.base_model_prefix}."
    return [key for key in left if key.removeprefix(prefix).partition(".")[0] in inside]
