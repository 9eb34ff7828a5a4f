"""torch's own defaults, for libraries whose tensors name neither number format nor device."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

# The default number format is one for all threads: who comes first keeps the user's, who leaves
# last restores it.
_lock = threading.Lock()
_inside: list[torch.dtype] = []


@contextmanager
def plain_defaults() -> Iterator[None]:
    """Inside, tensors are float32 on the CPU unless something else is asked for; also a decorator.

    What a seed means then does not depend on ``torch.set_default_dtype``,
    ``torch.set_default_device`` or ``with torch.device(...)`` around the call. Where these are not
    in use it costs next to nothing.
    """
    probe = torch.empty(0)
    if probe.dtype is torch.float32 and probe.device.type == "cpu" and not _inside:
        yield
        return
    with ExitStack() as stack:
        stack.enter_context(_float32())
        if probe.device.type != "cpu":
            stack.enter_context(torch.device("cpu"))
        yield


@contextmanager
def _float32() -> Iterator[None]:
    with _lock:
        _inside.append(_inside[-1] if _inside else torch.get_default_dtype())
        torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        with _lock:
            users = _inside.pop()
            if not _inside:
                torch.set_default_dtype(users)
