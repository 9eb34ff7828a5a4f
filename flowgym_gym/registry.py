"""Base models and rewards by name, as ``"domain/name"``: ``"images/stable_diffusion"``,
``"images/red"``.

>>> from flowgym_gym.registry import Registry
>>> registry = Registry("fruit")
>>> @registry.register("trees/apple", colour="green")
... class Apple:
...     def __init__(self, colour):
...         self.colour = colour
>>> registry.get("trees/apple").instantiate().colour
'green'
"""

from __future__ import annotations

import importlib
import json
import sys
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar, overload

from flowgym_gym.errors import (
    OptionError,
    UnknownIdError,
    UnknownOptionError,
    did_you_mean,
    reason,
    shown,
)
from flowgym_gym.parameters import NAMED, parameters_of
from flowgym_gym.sharing import Shared, places

C = TypeVar("C", bound=type)


@dataclass
class RegistryEntry:
    """A registered class, or the ``"module:Class"`` it is to be imported from.

    Attributes:
        id: ``"domain/name"``.
        entry_point: The class, or where it is.
        default_kwargs: Its default arguments.
        needs: What it needs besides this package, in words.
        kind: What is registered, for error messages.
        instances: Where :meth:`shared` keeps what it makes; one for all entries of a registry.
    """

    id: str
    entry_point: type | str
    default_kwargs: dict[str, Any] = field(default_factory=dict)
    needs: str = ""
    kind: str = "base_model"
    instances: Shared = field(default_factory=Shared, repr=False, compare=False)

    @property
    def cls(self) -> type:
        """The registered class; imports its module on first use, whose own errors come as they are.

        Raises:
            OptionError: If there is no such module or class.
        """
        if isinstance(self.entry_point, str):
            self.entry_point = _import_class(self.entry_point, f"{self.kind} {self.id!r}")
        return self.entry_point

    def options(self) -> set[str] | None:
        """Names of the keyword arguments that the class takes; None if it takes any.

        ``**kwargs`` that the class hands to ``super().__init__`` are those that the next class
        takes.
        """
        parameters = parameters_of(self.cls)
        if any(p.kind is p.VAR_KEYWORD for p in parameters):
            return None
        return {p.name for p in parameters if p.kind in NAMED}

    def instantiate(self, **kwargs: Any) -> Any:
        """Make an instance; ``kwargs`` override the defaults given at registration.

        Raises:
            UnknownOptionError: If the class has no argument of that name.
            OptionError: If an argument is missing that the class has no default for, or the class
                is abstract.
        """
        options = self.options()
        given = {**self.default_kwargs, **kwargs}
        for name in given:
            if options is not None and name not in options:
                raise UnknownOptionError(
                    f"{self.id!r} has no option {shown(name)}{did_you_mean(name, options)}: "
                    f"unexpected keyword argument {shown(name)} (it has {sorted(options)})"
                )
        for p in parameters_of(self.cls):
            required = p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
            if required and (p.name not in given or p.kind is p.POSITIONAL_ONLY):
                needs = f" (it needs {self.needs})" if self.needs else ""
                raise OptionError(
                    f"{self.id!r} needs the argument {p.name!r}, which was not given{needs}; give "
                    f"it in {self.kind}_kwargs={{{p.name!r}: ...}}"
                )
        missing = sorted(getattr(self.cls, "__abstractmethods__", ()))
        if missing:
            raise OptionError(
                f"{self.id!r} is a {self.cls.__name__}, which does not define {', '.join(missing)}"
            )
        return self.cls(**given)

    def shared(
        self, arguments: Mapping[str, Any], resolved: Mapping[str, Any] | None = None
    ) -> Any:
        """The instance with these arguments, made once per process for all who ask for it.

        It is made anew where a file that the arguments name has changed, and for everyone where it
        is not what others mean by these arguments: where it is ``stateful``, where it was
        ``moved``, and where an argument is no plain value and so has no name to be found under.

        Args:
            arguments: Arguments of the class, by which it is known.
            resolved: What the class is given in place of arguments of the same names: the same
                thing, such as a checkpoint that was found already.

        Raises:
            OptionError: As :meth:`instantiate`.
        """
        given = {**arguments, **(resolved or {})}
        known = {**self.default_kwargs, **arguments}
        try:
            text = json.dumps(known, sort_keys=True, default=_device_name)
        except (TypeError, ValueError, RecursionError):
            return self.instantiate(**given)
        files = tuple(places(known))
        return self.instances.get(
            (self.cls, text, files),
            files,
            make=lambda: self.instantiate(**given),
            good=lambda made: (
                not getattr(made, "stateful", False) and not getattr(made, "moved", False)
            ),
        )


class Registry:
    """Maps ids of the form ``"domain/name"`` to classes.

    Args:
        kind: What is registered, for error messages.
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._entries: dict[str, RegistryEntry] = {}
        self._instances = Shared()

    @overload
    def register(
        self, id: str, entry_point: None = None, *, needs: str = "", **default_kwargs: Any
    ) -> Callable[[C], C]: ...

    @overload
    def register(
        self, id: str, entry_point: type | str, *, needs: str = "", **default_kwargs: Any
    ) -> type | str: ...

    def register(
        self,
        id: str,
        entry_point: type | str | None = None,
        *,
        needs: str = "",
        **default_kwargs: Any,
    ) -> Any:
        """Register a class, as a decorator or directly; a string ``"module:Class"`` is imported on
        first use.

        Args:
            id: ``"domain/name"``; a base model and a reward go together if their domains are the
                same.
            entry_point: The class; left out when used as a decorator.
            needs: What it needs besides this package, such as a prompt or weights; ``flowgym-gym
                list`` shows it.
            **default_kwargs: Arguments of the class that an id fixes.

        Raises:
            OptionError: If ``id`` is not of that form, or what is registered is no class, such as a
                function that makes one.
        """
        if not isinstance(id, str) or not all(id.partition("/")):
            raise OptionError(
                f"a {self.kind} id reads 'domain/name', such as 'images/my_{self.kind}'; got "
                f"{shown(id)}"
            )

        def add(cls: Any) -> Any:
            _check_entry_point(cls, f"{self.kind} {id!r}")
            old = self._entries.get(id)
            if old is not None and _name(old.entry_point) != _name(cls):
                warnings.warn(
                    f"{self.kind} {id!r} is registered again: {_name(cls)} replaces it",
                    stacklevel=3,
                )
            self._entries[id] = RegistryEntry(
                id, cls, default_kwargs, needs, self.kind, self._instances
            )
            return cls

        return add if entry_point is None else add(entry_point)

    def get(self, id: str) -> RegistryEntry:
        """The entry of an id.

        Raises:
            UnknownIdError: If nothing is registered under ``id``; the message lists what is.
        """
        if not isinstance(id, str) or id not in self._entries:
            raise UnknownIdError(
                f"no {self.kind} is registered as {shown(id)}{did_you_mean(id, self._entries)} "
                f"(registered: {', '.join(sorted(self._entries))})"
            )
        return self._entries[id]

    def forget_instances(self) -> None:
        """Forget what :meth:`RegistryEntry.shared` made, so that its memory is freed once nobody
        uses it.
        """
        self._instances.clear()

    def list(self) -> list[str]:
        """All registered ids, sorted."""
        return sorted(self._entries)

    def __contains__(self, id: object) -> bool:
        return id in self._entries


def _device_name(value: object) -> str:
    torch = sys.modules.get("torch")  # without which nobody has a device
    if torch is not None and isinstance(value, torch.device):
        return str(value)
    raise TypeError(f"{type(value).__name__} is not a plain value")


def _name(entry_point: type | str) -> str:
    if isinstance(entry_point, str):
        return entry_point
    return f"{entry_point.__module__}:{entry_point.__qualname__}"


def _check_entry_point(entry_point: object, what: str) -> None:
    """Raise an OptionError unless it is a class, or reads ``"module:Class"``."""
    good = isinstance(entry_point, type)
    if isinstance(entry_point, str):
        module, colon, name = entry_point.partition(":")
        good = bool(colon) and all(
            part.isidentifier() for part in (*module.split("."), *name.split("."))
        )
    if not good:
        function = (
            "; of a function make a subclass whose __init__ does the same"
            if callable(entry_point)
            else ""
        )
        raise OptionError(
            f"{what} is {shown(entry_point)}, expected a class or 'module:Class'{function}"
        )


def _import_class(entry_point: str, what: str) -> type:
    module_name, _, name = entry_point.partition(":")
    where = f"{what} is registered as {entry_point!r}"
    try:
        found: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise  # The module exists, and imports another that does not.
        raise OptionError(f"{where}, but there is no such module ({reason(error)})") from error
    for part in name.split("."):
        if not hasattr(found, part):
            classes = [
                key
                for key, value in getattr(found, "__dict__", {}).items()
                if isinstance(value, type)
            ]
            raise OptionError(
                f"{where}, but there is no {part!r} in it{did_you_mean(part, classes)}"
            )
        found = getattr(found, part)
    if not isinstance(found, type):
        _check_entry_point(None if isinstance(found, str) else found, f"{where}, which")
    cls: type = found
    return cls


base_model_registry = Registry("base_model")
reward_registry = Registry("reward")
