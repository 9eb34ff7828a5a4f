"""Where noise comes from: seeds of any width, and what a model draws for an episode.

Each sub-environment has a CPU generator of its own. An episode's initial noise and prompt come from
a second one, whose seed the first one gives. A model whose methods take a ``generator`` is handed
that one, and no global generator is touched; for others the global generators of torch, numpy and
Python are seeded around the call and restored.
"""

from __future__ import annotations

import inspect
import random
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch

# torch's CPU generators keep 32 bits of a seed, so that 2**32 + i would be i.
NARROW = 2**32
# A generator's state begins with its seed (8 bytes) and three counters; then come the words of its
# Mersenne twister, 64 bits for each of 32: CPUGeneratorImplStateLegacy in torch's sources,
# unchanged since version 1.0.
SEED, WORDS = slice(0, 8), slice(24, 24 + 8 * 624)
# What draws an episode, where a model has it.
METHODS = ("sample_p0", "preprocess", "draw_noise")


def seed_generator(generator: torch.Generator, seed: int) -> None:
    """Seed a CPU generator: below ``2**32`` as torch does, from there on with all bits of the seed.

    A wide seed fills the whole state of the Mersenne twister by way of numpy's ``SeedSequence``.
    """
    if seed < NARROW:
        generator.manual_seed(seed)
        return
    words = np.random.SeedSequence(seed).generate_state(624)
    state = torch.Generator().manual_seed(0).get_state().numpy()
    state[SEED] = np.array([seed], dtype=np.uint64).view(np.uint8)
    state[WORDS] = words.astype(np.uint64).view(np.uint8)
    generator.set_state(torch.from_numpy(state))


@dataclass(frozen=True)
class EpisodeSeed:
    """The seed of an episode's initial noise and prompt.

    Attributes:
        value: The seed, 62 bits.
        whole: Whether all of its bits count, as where the sub-environment has a wide seed; else
            torch's 32.
    """

    value: int
    whole: bool = False

    @classmethod
    def draw(cls, generator: torch.Generator) -> EpisodeSeed:
        """The next episode's seed, from the generator of its sub-environment."""
        value = torch.randint(2**62, (), generator=generator, dtype=torch.int64, device="cpu")
        return cls(int(value), generator.initial_seed() >= NARROW)

    def generator(self) -> torch.Generator:
        """A new generator with this seed."""
        generator = torch.Generator()
        if self.whole:
            seed_generator(generator, self.value)
        else:
            generator.manual_seed(self.value)
        return generator


class Streams:
    """A CPU generator for each sub-environment: seeds of its episodes, and the noise of its steps.

    What was drawn can be undone. A copy of a generator's state takes as long as a draw, so one is
    kept where an episode begins, and the noise of its steps is drawn again to get back to one.

    Args:
        n: Number of sub-environments.
        shape: Of one step's noise in one of them.
    """

    def __init__(self, n: int, shape: tuple[int, ...]) -> None:
        self.shape = shape
        self.replace([torch.Generator() for _ in range(n)])

    def replace(self, generators: list[torch.Generator]) -> None:
        """Take other generators."""
        self.generators = generators
        self._kept = [generator.get_state() for generator in generators]
        self._drawn = [0] * len(generators)

    def seed(self, i: int, seed: int) -> None:
        """Seed the generator of sub-environment ``i``."""
        self._drawn[i] = -1  # unlike any mark, should this be interrupted
        seed_generator(self.generators[i], seed)
        self._keep(i)

    def episode(self, i: int) -> EpisodeSeed:
        """The seed of the next episode of sub-environment ``i``."""
        self._drawn[i] = -1
        seed = EpisodeSeed.draw(self.generators[i])
        self._keep(i)
        return seed

    def noise(self, where: Sequence[int]) -> torch.Tensor:
        """Standard normal noise of a step in some sub-environments, float32, on the CPU."""
        noise = torch.empty((len(where), *self.shape), dtype=torch.float32, device="cpu")
        for row, i in zip(noise.unbind(), where, strict=True):
            self._drawn[i] += 1
            row.normal_(generator=self.generators[i])
        return noise

    def mark(self) -> tuple[list[torch.Generator], list[torch.Tensor], list[int]]:
        """What :meth:`back_to` needs."""
        return self.generators, list(self._kept), list(self._drawn)

    def back_to(self, mark: tuple[list[torch.Generator], list[torch.Tensor], list[int]]) -> None:
        """Undo what was drawn since :meth:`mark`."""
        generators, kept, drawn = mark
        for i, generator in enumerate(generators):
            if self._kept[i] is not kept[i] or self._drawn[i] != drawn[i]:
                generator.set_state(kept[i])
                for _ in range(drawn[i]):
                    noise = torch.empty(self.shape, dtype=torch.float32, device="cpu")
                    noise.normal_(generator=generator)
        self.generators, self._kept, self._drawn = generators, list(kept), list(drawn)

    def _keep(self, i: int) -> None:
        self._kept[i], self._drawn[i] = self.generators[i].get_state(), 0


@contextmanager
def randomness(model: Any, seed: EpisodeSeed | None) -> Iterator[dict[str, torch.Generator]]:
    """What to hand to a model's ``sample_p0`` and ``preprocess`` inside.

    Yields:
        ``{"generator": ...}`` for a model whose methods take one. For others nothing, and the
        global generators are seeded inside. With ``seed`` None nothing, and the global generators
        are as they are.
    """
    if seed is None:
        yield {}
    elif takes_generator(model):
        yield {"generator": seed.generator()}
    else:
        with _global_generators:
            yield from ({} for _ in _seeded(seed))


def takes_generator(model: Any) -> bool:
    """Whether all methods of a model that draw an episode name an argument ``generator``."""
    methods = [getattr(model, name) for name in METHODS if hasattr(model, name)]
    return all(_names_generator(getattr(method, "__func__", method)) for method in methods)


@lru_cache(maxsize=256)
def _names_generator(method: Callable[..., Any]) -> bool:
    return "generator" in inspect.signature(method).parameters


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed the global generators of torch, numpy and Python inside, and restore them afterwards."""
    with _global_generators:
        yield from _seeded(EpisodeSeed(seed))


# The global generators are shared by all threads.
_global_generators = threading.RLock()


def _seeded(seed: EpisodeSeed) -> Iterator[None]:
    python_state, numpy_state = random.getstate(), np.random.get_state()
    # Before CUDA has been used, torch.manual_seed would keep a whole stack trace for later, which
    # costs half a millisecond for every episode.
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices):
        torch.default_generator.set_state(seed.generator().get_state())
        if devices:
            torch.cuda.manual_seed_all(seed.value)
        low, high = seed.value % NARROW, seed.value // NARROW
        np.random.seed([low, high] if seed.whole else low)
        random.seed(seed.value)
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)


@contextmanager
def undone_on_failure(device: torch.device) -> Iterator[None]:
    """Put torch's global generators, also that of a device, back if something is raised inside."""
    before = torch.get_rng_state()
    on_device = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    try:
        yield
    except BaseException:
        torch.set_rng_state(before)
        if on_device is not None:
            torch.cuda.set_rng_state(on_device, device)
        raise
