"""The documentation as a whole: navigation, index, API reference, defaults, and the map."""

import ast
import importlib
import re
from pathlib import Path

import gymnasium
import pytest
import yaml

from flowgym_gym.dynamics import Transitions
from flowgym_gym.envs import environment_of
from flowgym_gym.models.checkpoints import load_pipeline, resolve

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = {page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md")}

PUBLIC = (
    "flowgym_gym",
    "flowgym_gym.envs",
    "flowgym_gym.wrappers",
    "flowgym_gym.wrappers.vector",
    "flowgym_gym.models",
    "flowgym_gym.rewards",
    "flowgym_gym.schedulers",
    "flowgym_gym.optimal_control",
    "flowgym_gym.agents",
    "flowgym_gym.agents.frontier",
)


def pages_of(nav):
    for entry in nav:
        (value,) = entry.values()
        yield from pages_of(value) if isinstance(value, list) else [value]


def test_every_page_is_once_in_the_navigation():
    site = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    assert sorted(pages_of(site["nav"])) == sorted(PAGES)


def test_the_index_leads_to_every_page():
    text = (DOCS / "index.md").read_text(encoding="utf-8")
    elsewhere = {page for page in PAGES if page.startswith("api/")} - {"api/index.md"}
    assert [
        page for page in sorted(PAGES - elsewhere - {"index.md"}) if f"]({page})" not in text
    ] == []


def test_contributing_shows_every_room_and_names_places_that_exist():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    tree = text.partition("## Where what is")[2].split("```")[1]
    package = [path for path in (ROOT / "flowgym_gym").iterdir() if path.name[0] not in "_."]
    rooms = {path.name + "/" for path in package if path.is_dir()}
    assert rooms == {room for room in re.findall(r"(\w+/)(?=\s)", tree) if room in rooms}
    modules = set(re.findall(r"\w+\.py", tree)) - {"checkpoints.py"}
    assert modules <= {path.name for path in package}
    places = re.findall(r"`((?:flowgym_gym|tests|docs)/[\w/]+(?:\.\w+)?)`", text)
    assert len(places) >= 10
    assert [place for place in places if not (ROOT / place).exists()] == []
    for sought in (Transitions.step, resolve, load_pipeline):
        assert f"`{sought.__qualname__}`" in text
        assert f"{sought.__module__.replace('.', '/')}.py" in text


def reference():
    """What the API reference has an entry for, and of which packages it has all names."""
    text = "\n".join(
        page.read_text(encoding="utf-8") for page in sorted((DOCS / "api").glob("*.md"))
    )
    described = set(re.findall(r"^::: (\S+)$", text, flags=re.MULTILINE))
    summary = re.findall(r"^\| (`.*) \|", text, flags=re.MULTILINE)
    return described, {name for row in summary for name in re.findall(r"`(\w+)`", row)}


@pytest.mark.parametrize("package", PUBLIC)
def test_the_api_reference_has_every_public_name(package):
    described, summary = reference()
    if package in described:
        return
    names = set(importlib.import_module(package).__all__)
    if package == "flowgym_gym":
        assert summary == names
    else:
        from flowgym_gym import reward_registry

        registered = {reward_registry.get(id).cls.__name__ for id in reward_registry.list()}
        assert {name for name in names if f"{package}.{name}" not in described} <= registered


def stated_defaults():
    """The literal defaults of the table of arguments."""
    text = (DOCS / "environments.md").read_text(encoding="utf-8")
    rows = re.findall(
        r"^\| (`.*?) \| (.*?) \| .* \|$", text.split("## Arguments")[1], flags=re.MULTILINE
    )
    for names, defaults in rows:
        pairs = zip(names.split(", "), defaults.split(", "), strict=True)
        yield from ((name.strip("`"), value) for name, value in pairs)


def test_the_defaults_in_the_table_of_arguments_are_those_of_the_environment():
    stated = list(stated_defaults())
    given = {name: ast.literal_eval(value.strip("`")) for name, value in stated if value[0] == "`"}
    assert {"checkpoint", "prompts", "sampler", "reward_scale", "render_mode"} <= given.keys()
    assert {name for name, _ in stated} - given.keys() == {"action_scale", "spacing"}
    plain = gymnasium.make("flowgym/StableDiffusion-Red-v0")
    told = gymnasium.make("flowgym/StableDiffusion-Red-v0", **given)
    ours, theirs = environment_of(plain), environment_of(told)
    assert ours.settings() == theirs.settings()
    assert ours.base_model.prompts == theirs.base_model.prompts
    assert ours.device == theirs.device
    assert plain.render_mode == told.render_mode
    for name in ("discretization_steps", "reward_scale", "control_cost_weight"):
        assert getattr(ours, name) == given[name]
