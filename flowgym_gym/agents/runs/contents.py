"""What the settings of a run name on this machine: where that is, and what it holds.

A run stores absolute paths, so that it can go on from another folder, and fingerprints of what lies
there (:mod:`flowgym_gym.models.fingerprint`), so that it does not go on, or is evaluated, with
other weights or prompts than it was trained on. All prompts that come from a file or dataset are
kept in ``prompts.json``.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TypeAlias

import gymnasium

from flowgym_gym import prompts as sources
from flowgym_gym.agents.kinds import AnyVectorEnv, Options, SomeOptions
from flowgym_gym.envs import DenoisingVectorEnv
from flowgym_gym.errors import OptionError, shown
from flowgym_gym.models.checkpoints import EMBEDDED
from flowgym_gym.models.fingerprint import Fingerprint, differences, fingerprint
from flowgym_gym.registry import base_model_registry, reward_registry

Contents: TypeAlias = Options

PROMPTS = "prompts.json"
# Arguments that name weights: a bare word may be a folder. Others do where they are spelled like a
# path.
WEIGHTS = (
    "checkpoint",
    "denoiser",
    "vae",
    "lora",
    "weights",
    "head",
    "processor",
    "clip",
    "tokenizer",
)
TEXTS = ("prompt", "negative_prompt")
# What rewards take for published weights, before they look for a folder of that name.
PUBLISHED = ("ImageReward-v1.0", "v2.0", "v2.1")
SHOWN = 5


def resolved(env: SomeOptions) -> Options:
    """Arguments of an environment with the paths of everything that is on this machine made
    absolute.

    Links are not followed, so that a link can take the place of what has moved. Names of embedded
    checkpoints, Hub ids and what does not exist stay as they are.
    """
    return {name: _map(name, value, _resolved) for name, value in env.items()}


def contents_of(env_id: str, env: SomeOptions, prompts: Sequence[str] | None) -> Contents:
    """What an environment's arguments name holds.

    Args:
        env_id: The environment's id, whose own arguments count too.
        env: Its arguments.
        prompts: The prompts that its model draws from, if it has any.

    Raises:
        CheckpointError: If a file cannot be read.
    """
    places = dict(_places("env", {**gymnasium.spec(env_id).kwargs, **env}))
    files = {
        label: {"place": place, "holds": fingerprint(place)} for label, place in places.items()
    }
    contents: Contents = {
        "files": {label: found for label, found in files.items() if found["holds"]}
    }
    setting = _prompts_setting(env)
    if isinstance(setting, str) and prompts and list(prompts) != [setting]:
        place = sources.resolved(setting)
        contents["prompts"] = {"place": place, "count": len(prompts), "sha256": _hash(prompts)}
    return contents


def drawn_prompts(env: AnyVectorEnv) -> list[str] | None:
    """The prompts that an environment draws from; None where it takes none."""
    inner = env.unwrapped
    prompts = (
        inner.environment.base_model.prompts if isinstance(inner, DenoisingVectorEnv) else None
    )
    return None if prompts is None else [str(prompt) for prompt in prompts]


def check_contents(out: Path, config: SomeOptions, prompts: Sequence[str] | None = None) -> None:
    """Raise an OptionError if what a run's settings name holds something else than when the run
    began.

    Args:
        out: The run folder.
        config: Its configuration; one from before runs kept contents passes.
        prompts: The prompts that are drawn now; where they are not known, a file of prompts is
            read.

    Raises:
        OptionError: It names each file and the first prompt that differs.
        CheckpointError: If a file cannot be read.
    """
    known = config.get("contents") or {}
    found = [
        line
        for label, was in known.get("files", {}).items()
        for line in _changed_files(label, was["place"], was["holds"])
    ]
    if "prompts" in known:
        found += _changed_prompts(out, known["prompts"], prompts)
    if found:
        raise OptionError(
            f"the run in {out} was trained with something else: {'; '.join(found)}; put back what "
            "was there, or, where it is at another place now, resume the run once with --set "
            "NAME=PLACE"
        )


def check_form(contents: Contents | None) -> None:
    """Raise a TypeError, KeyError, AttributeError or ValueError unless a configuration's contents
    can be read.
    """
    if contents is None:
        return
    texts = [text for pair in contents.get("files", {}).items() for text in _texts(*pair)]
    if "prompts" in contents:
        prompts = contents["prompts"]
        texts += [prompts["place"], prompts["sha256"], f"{prompts['count']:d}"]
    if not all(isinstance(text, str) for text in texts):
        raise ValueError(f"contents is {shown(contents, 60)}, expected places and what they hold")


def _texts(label: str, file: SomeOptions) -> list[object]:
    return [label, file["place"], *(text for pair in file["holds"].items() for text in pair)]


def note(config: SomeOptions) -> list[str]:
    """What to tell of a run from before runs kept contents, if its settings name anything on this
    machine.
    """
    if config.get("contents") is not None:
        return []
    env = config["settings"]["env"]
    names = [label for label, place in _places("env", env) if fingerprint(place)]
    if _is_place(_prompts_setting(env)):
        names.append("env.prompts")
    if not names:
        return []
    return [
        f"this run kept no fingerprint of {', '.join(names)} when it began, so that changes since "
        "then are not noticed; from now on they are"
    ]


def moved(config: SomeOptions, env: SomeOptions) -> dict[str, str]:
    """Places of a run, each with the new one in ``env`` that holds the same."""
    known = config.get("contents") or {}
    now = dict(_places("env", env))
    found = {
        was["place"]: now[label]
        for label, was in known.get("files", {}).items()
        if label in now and now[label] != was["place"] and fingerprint(now[label]) == was["holds"]
    }
    was, prompts = known.get("prompts"), _prompts_setting(env)
    if was is not None and isinstance(prompts, str) and prompts != was["place"]:
        with suppress(OptionError):
            if _hash(sources.read_prompts(prompts)) == was["sha256"]:
                found[was["place"]] = prompts
    return found


def replaced(env: SomeOptions, names: Mapping[str, str]) -> Options:
    """Arguments of an environment with some texts replaced by others."""
    return {
        key: _map(key, value, lambda _, text: names.get(text, text)) for key, value in env.items()
    }


def different(was: Contents, now: Contents) -> str:
    """Names of the arguments whose contents differ between two environments."""
    labels = {*was.get("files", {}), *now["files"]}
    names = [
        label for label in labels if was.get("files", {}).get(label) != now["files"].get(label)
    ]
    if was.get("prompts") != now.get("prompts"):
        names.append("env.prompts")
    return ", ".join(sorted(names))


def write_prompts(out: Path, contents: Contents, prompts: Sequence[str] | None) -> None:
    """Keep the prompts of a run that come from a file or dataset."""
    from flowgym_gym.agents.runs.files import write_json

    if "prompts" in contents and _kept_prompts(out, contents["prompts"]["sha256"]) is None:
        write_json(out / PROMPTS, list(prompts or ()))


def relocated(contents: Contents, moves: Mapping[str, str]) -> Contents:
    """The contents of a run some of whose places have moved."""
    found: Contents = {
        "files": {
            label: {**was, "place": moves.get(was["place"], was["place"])}
            for label, was in contents.get("files", {}).items()
        }
    }
    if "prompts" in contents:
        was = contents["prompts"]
        found["prompts"] = {**was, "place": moves.get(was["place"], was["place"])}
    return found


def _prompts_setting(env: SomeOptions) -> object:
    nested = env.get("base_model_kwargs")
    return env.get("prompts", nested.get("prompts") if isinstance(nested, Mapping) else None)


def _changed_files(label: str, place: str, was: Fingerprint) -> list[str]:
    now = fingerprint(place)
    if not now and not Path(place).is_absolute():
        # A Hub id that is no longer in the cache: nobody knows which commit would come.
        return []
    if not now:
        return [f"{label} is not at {place} any more (put it, or a link to it, there)"]
    names = differences(was, now)
    if not names:
        return []
    if "" in was and "" in now:
        return [f"{label}: {place} has changed"]
    if "@" in was and "@" in now:
        return [f"{label}: {place} is at commit {now['@']} in the cache, and was at {was['@']}"]
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return [f"{label}: of {place} {', '.join(names[:SHOWN])}{more}"]


def _changed_prompts(out: Path, was: SomeOptions, prompts: Sequence[str] | None) -> list[str]:
    place = was["place"]
    file = sources.prompts_file(place)
    if prompts is None:
        if file is None:
            return []
        if not file.exists():
            return [f"env.prompts is not at {file} any more{_advice(out, was)}"]
        prompts = sources.read_prompts(place)
    if _hash(prompts) == was["sha256"]:
        return []
    before = _kept_prompts(out, was["sha256"])
    if before is None:
        what = f"are {len(prompts)} prompts, and were {was['count']}; at least one differs"
    else:
        i = next(
            (i for i, (a, b) in enumerate(zip(before, prompts, strict=False)) if a != b),
            min(len(before), len(prompts)),
        )
        now, then = (shown(some[i]) if i < len(some) else "missing" for some in (prompts, before))
        count = (
            f" ({len(prompts)} prompts, and had {len(before)})"
            if len(before) != len(prompts)
            else ""
        )
        what = f"prompt {i + 1} is {now}, and was {then}{count}"
    return [f"env.prompts: in {place} {what}{_advice(out, was)}"]


def _advice(out: Path, was: SomeOptions) -> str:
    if _kept_prompts(out, was["sha256"]) is None:
        return ""
    return f" (the run's own are kept: --set env.prompts={out / PROMPTS})"


def _kept_prompts(out: Path, sha256: str) -> list[str] | None:
    """The prompts in ``prompts.json``; None where it is missing, damaged or of something else."""
    try:
        found = json.loads((out / PROMPTS).read_text(encoding="utf-8"))
        return found if isinstance(found, list) and _hash(found) == sha256 else None
    except (OSError, ValueError, RecursionError):
        return None


def _hash(prompts: Sequence[str]) -> str:
    return hashlib.sha256(json.dumps(list(prompts)).encode()).hexdigest()


def _map(name: str, value: object, change: Callable[[str, str], str]) -> object:
    """A value with the texts in it changed; ``change`` is given the name of the innermost argument,
    and the text.
    """
    if isinstance(value, Mapping):
        return {key: _map(key, inner, change) for key, inner in value.items()}
    if isinstance(value, list | tuple) and name != "prompts":
        return [_map(name, inner, change) for inner in value]
    if isinstance(value, str | os.PathLike):
        text = os.fspath(value)
        return change(name, text) if isinstance(text, str) else value
    return value


def _resolved(name: str, text: str) -> str:
    if name == "prompts":
        return str(sources.resolved(text))
    return os.path.abspath(os.path.expanduser(text)) if _is_here(name, text) else text


def _is_here(name: str, text: str) -> bool:
    """Whether an argument names a file or folder on this machine."""
    if name in TEXTS or text in base_model_registry or text in reward_registry:
        return False
    if name in WEIGHTS:
        if text in PUBLISHED or (EMBEDDED / text / "model_index.json").is_file():
            return False
    elif os.sep not in text and "/" not in text and not os.path.splitext(text)[1]:
        return False
    try:
        return os.path.exists(os.path.expanduser(text))
    except ValueError:  # It has a character that no path has.
        return False


def _is_place(prompts: object) -> bool:
    return isinstance(prompts, str) and (
        sources.prompts_file(prompts) is not None or prompts.startswith(("set:", "dataset:"))
    )


def _places(label: str, value: object, name: str = "") -> Iterator[tuple[str, str]]:
    """Each argument that names weights, with its place: an absolute path, or a Hub id."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _places(f"{label}.{key}", inner, str(key))
    elif isinstance(value, list | tuple) and name != "prompts":
        for i, inner in enumerate(value):
            yield from _places(f"{label}[{i}]", inner, name)
    elif isinstance(value, str) and name != "prompts":
        if _is_here(name, value):
            yield label, os.path.abspath(os.path.expanduser(value))
        elif os.path.isabs(value) or (name in WEIGHTS and "/" in value):
            yield label, value.removeprefix("hub:")
