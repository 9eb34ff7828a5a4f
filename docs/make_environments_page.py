"""Makes the table of docs/environments.md: ``python docs/make_environments_page.py``.

Ids and their settings come from Gymnasium's registry, what they pay in words from the docstrings of
the registered classes.
"""

from __future__ import annotations

import re
from pathlib import Path

import gymnasium

from flowgym_gym import base_model_registry, reward_registry
from flowgym_gym.parameters import parameters_of
from flowgym_gym.registry import RegistryEntry

PAGE = Path(__file__).with_name("environments.md")
BEGIN, END = "<!-- table made by make_environments_page.py -->\n\n", "\n\n<!-- end of the table -->"


def named(id: str) -> tuple[RegistryEntry, RegistryEntry] | None:
    """Base model and reward of an id; None for the one that takes any."""
    kwargs = gymnasium.spec(id).kwargs
    if "reward" not in kwargs:
        return None
    return base_model_registry.get(kwargs["base_model"]), reward_registry.get(kwargs["reward"])


def wanted(id: str) -> str:
    """What a user has to name before an id opens; nothing if it opens offline as it is."""
    parts = named(id)
    if parts is None:
        return ""
    model, reward = parts
    weights = [need for need in re.split("[;,] ", reward.needs) if ":" in need]
    checkpoint = ["checkpoint"] if getattr(model.cls, "default_checkpoint", "") is None else []
    return ", ".join(
        f"`{name}`" for name in (*checkpoint, *(need.partition(":")[0] for need in weights))
    )


def said(entry: RegistryEntry) -> str:
    """The first paragraph of a class's docstring, as Markdown in a table."""
    text = " ".join((entry.cls.__doc__ or "").partition("\n\n")[0].split())
    text = re.sub(r":math:`([^`]*)`", r"$\1$", text)
    return re.sub(r":\w+:`([^`]*)`", r"`\1`", text).replace("``", "`").replace("|", "\\|")


def arguments(entry: RegistryEntry) -> str:
    """The arguments of a class in brackets, with the defaults that its id gives them."""
    own = entry.default_kwargs
    listed = [p.replace(default=own.get(p.name, p.default)) for p in parameters_of(entry.cls)]
    texts = [p.name if p.default is p.empty else f"{p.name}={p.default!r}" for p in listed]
    return f"({', '.join(texts)})" if texts else ""


def settings(id: str) -> str:
    """What an id sets, besides its base model and its reward."""
    own = {k: v for k, v in gymnasium.spec(id).kwargs.items() if k not in ("base_model", "reward")}
    return ", ".join(f"`{name}={value!r}`" for name, value in own.items())


def row(id: str) -> str:
    """An id's line of the table."""
    parts = named(id)
    if parts is None:
        return f"| `{id}` | any, `base_model=` | any, `reward=` | {settings(id)} | {wanted(id)} |"
    model, reward = parts
    pays = f"`{reward.id}{arguments(reward)}`: {said(reward)}"
    return f"| `{id}` | `{model.id}` | {pays} | {settings(id)} | {wanted(id)} |"


def table() -> str:
    """How many ids open offline, and a line for each, those first."""
    ids = [id for id in gymnasium.registry if id.startswith("flowgym/")]
    ready = sum(wanted(id) == "" for id in ids)
    lines = [
        f"{ready} of the {len(ids)} ids open offline as they are, {len(ids) - ready} want weights.",
        "",
        "| id | base model | reward | own settings | to be named |",
        "| --- | --- | --- | --- | --- |",
    ]
    return "\n".join([*lines, *(row(id) for id in sorted(ids, key=lambda id: wanted(id) != ""))])


def page(text: str) -> str:
    """The page with the table as it is now."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END.strip("\n"))
    return f"{before}{BEGIN}{table()}{END}{after}"


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
