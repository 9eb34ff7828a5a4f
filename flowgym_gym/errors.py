"""The errors that this package raises for input it cannot use.

Each also derives from the standard error of its kind, so ``except ValueError`` and Gymnasium's own
error classes work as everywhere else.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

import gymnasium


class FlowGymError(Exception):
    """Base class of every error of this package."""


class OptionError(FlowGymError, ValueError):
    """A constructor or command-line option has a value that cannot be used."""


class UnknownOptionError(FlowGymError, TypeError):
    """An option with this name does not exist."""


class UnknownIdError(FlowGymError, KeyError):
    """No base model or reward is registered under this id."""

    def __str__(self) -> str:
        return str(self.args[0]) if self.args else ""


class CheckpointError(FlowGymError, OSError):
    """A checkpoint is missing, damaged, or of a kind that cannot be opened."""


class MissingExtraError(FlowGymError, ImportError):
    """An optional package that this part needs is not installed, or cannot be imported."""


class ActionError(FlowGymError, ValueError):
    """An action has the wrong shape or type, or holds NaN or infinity."""


class ModelError(FlowGymError, RuntimeError):
    """A base model returned something of the wrong shape, or NaN."""


class RewardError(FlowGymError, RuntimeError):
    """A reward function raised, or returned something of the wrong shape, or NaN.

    Args:
        message: What is wrong.
        sample: Which sample of the batch it concerns; None where it is not one of them.
    """

    def __init__(self, message: str, sample: int | None = None) -> None:
        super().__init__(message)
        self.sample = sample


class DivergedError(FlowGymError, ArithmeticError):
    """A training has diverged: the agent's numbers are no longer finite."""


class StateError(FlowGymError, ValueError):
    """A state given to ``set_state`` is damaged, or belongs to another environment."""


class VectorEnvError(FlowGymError, AssertionError):
    """A vector environment does not do what ``check_vector_env`` expects of it."""


class ResetNeededError(FlowGymError, gymnasium.error.ResetNeeded):
    """``step`` or ``render`` was called before ``reset``, or after the end of an episode."""


class ClosedEnvironmentError(FlowGymError, gymnasium.error.ClosedEnvironmentError):
    """The environment has been closed."""


def did_you_mean(word: object, choices: Iterable[str]) -> str:
    """The choice that ``word`` is a misspelling of, as the end of an error message, or an empty
    string.

    Names are compared part by part (``images/red``, ``learning_rate``), so that a long part that
    agrees does not make up for another that means something else; leading or trailing parts may be
    left out.

    >>> did_you_mean("images/rde", ["images/red", "images/redness"])
    "; did you mean 'images/red'?"
    >>> did_you_mean("a2c", ["ppo", "sac", "tqc"])
    ''
    """
    if not isinstance(word, str) or len(word) > 200:
        return ""
    near = [choice for choice in choices if _is_near(word, choice)]
    best = max(near, key=lambda choice: _likeness(word, choice), default=None)
    return "" if best is None else f"; did you mean {best!r}?"


def _is_near(word: str, choice: str) -> bool:
    ours, theirs = (re.findall(r"[^\W_]+", name.lower()) for name in (word, choice))
    if not ours or len(ours) > len(theirs):
        return _likeness("_".join(ours), "_".join(theirs)) >= 0.8
    if _are_near(ours, theirs[: len(ours)]) or _are_near(ours, theirs[-len(ours) :]):
        return True
    return len(ours) < len(theirs) and _likeness("".join(ours), "".join(theirs)) >= 0.8


def _are_near(ours: list[str], theirs: list[str]) -> bool:
    """Whether names of as many parts are near in each."""
    # Which version there is, a hint may tell.
    pairs = [(a, b) for a, b in zip(ours, theirs, strict=True) if not re.fullmatch(r"v\d+", b)]
    return bool(pairs) and all(_likeness(a, b) >= 0.7 or sorted(a) == sorted(b) for a, b in pairs)


def _likeness(word: str, choice: str) -> float:
    return difflib.SequenceMatcher(None, word.lower(), choice.lower()).ratio()


def shown(value: object, limit: int = 200) -> str:
    """A value as an error message shows it: its ``repr``, of which long ones keep the beginning.

    >>> shown("a cat"), shown("ab" * 500, limit=4)
    ("'a cat'", "'abab'... (1000 characters)")
    """
    if isinstance(value, str | bytes) and len(value) > limit:
        unit = "characters" if isinstance(value, str) else "bytes"
        return f"{value[:limit]!r}... ({len(value)} {unit})"
    try:
        text = repr(value)
    except Exception as error:  # of objects that are not this package's
        text = f"a {type(value).__name__} whose repr raises {type(error).__name__}"
    return text if len(text) <= limit else f"{text[:limit]}... ({len(text)} characters)"


def reason(error: BaseException, limit: int = 600) -> str:
    r"""What a library's error says, all of its lines joined into one; its name where it says
    nothing.

    >>> reason(ValueError("two\n  lines")), reason(KeyError())
    ('two lines', 'KeyError')
    """
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else f"{text[:limit]}..."
