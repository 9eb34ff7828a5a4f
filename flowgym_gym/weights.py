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
        report: What ``from_pretrained(..., output_loading_info=True)`` of diffusers or transformers returned; what the
            libraries themselves regard as harmless is not in it.
    """
    kind = type(model).__name__
    if missing := sorted(report["missing_keys"]):
        unused = sorted(report["unexpected_keys"])
        left_over = f"; left over: {some(unused)}" if unused else ""
        raise CheckpointError(f"{where} does not fill a {kind}; missing: {some(missing)}{left_over}")
    if mismatched := sorted(report["mismatched_keys"]):
        name, got, expected = mismatched[0]
        raise CheckpointError(
            f"{where} does not fit a {kind}; of another shape: {some([key for key, *_ in mismatched])}; "
            f"{name} has shape {tuple(got)}, expected {tuple(expected)}"
        )
    if left := sorted(key for key in report["unexpected_keys"] if not _harmless(key, model)):
        raise CheckpointError(
            f"{where} holds more than the {kind} of its configuration; left over: {some(left)}; either the "
            "configuration is another model's, or the weights were saved before adapters were merged"
        )


def some(keys: Collection[str]) -> str:
    """Names of weights for a message: how many, and the first of them."""
    names = sorted(keys)
    more = ", ..." if len(names) > SHOWN else ""
    return f"{len(names)} weight{'s' * (len(names) != 1)} ({', '.join(names[:SHOWN])}{more})"


def _harmless(key: str, model: nn.Module) -> bool:
    """Whether an unused weight is none of this model's.

    That is a buffer that the model makes by itself, or in models of transformers, which are saved whole and loaded in
    parts, a weight of another part, such as CLIP's picture encoder beside the text encoder.
    """
    if key in dict(model.named_buffers()):
        return True
    from transformers import PreTrainedModel

    inside = key.removeprefix(f"{getattr(model, 'base_model_prefix', '')}.").partition(".")[0]
    return isinstance(model, PreTrainedModel) and inside not in dict(model.named_children())
