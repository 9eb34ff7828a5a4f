"""Names of types that the rooms of :mod:`flowgym_gym.agents` share."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, TypeAlias

import gymnasium
from gymnasium.vector import VectorEnv

# Arguments by name, or what a JSON file holds: what type each has, its reader knows.
Options: TypeAlias = dict[str, Any]
SomeOptions: TypeAlias = Mapping[str, Any]
# What Gymnasium's types are parametrised with, no caller here can tell.
AnySpace: TypeAlias = gymnasium.Space[Any]
AnyVectorEnv: TypeAlias = VectorEnv[Any, Any, Any]


class Named(Mapping[str, Any]):
    """Base of dataclasses that read as mappings, too: ``settings["env"]``, ``{**settings}``."""

    if TYPE_CHECKING:
        __dataclass_fields__: dict[str, Any]

    def __getitem__(self, name: str) -> Any:
        if name not in self.__dataclass_fields__:
            raise KeyError(name)
        return getattr(self, name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.__dataclass_fields__)

    def __len__(self) -> int:
        return sum(1 for _ in self)
