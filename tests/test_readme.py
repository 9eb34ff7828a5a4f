"""The Python in the README and the documentation runs as it stands, and the README is complete."""

import importlib.util
import re
import shlex
from pathlib import Path

import gymnasium
import pytest

from flowgym_gym import base_model_registry, reward_registry
from flowgym_gym.agents.frontier import measure
from flowgym_gym.agents.runs import training
from flowgym_gym.cli import main
from flowgym_gym.errors import CheckpointError
from flowgym_gym.models.checkpoints import EMBEDDED
from tests.conftest import further, wants_checkpoint, wants_weights

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
DOCS = sorted((ROOT / "docs").rglob("*.md"))
# Pages that train or measure once more what the README's own block does.
TRAINING = ("training", "frontier")


def name_of(page):
    return page.relative_to(ROOT).as_posix()


def blocks_of(page):
    return re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL)


@pytest.fixture
def _registries_restored():
    before = [dict(registry._entries) for registry in (base_model_registry, reward_registry)]
    yield
    for registry, entries in zip((base_model_registry, reward_registry), before, strict=True):
        registry._entries.clear()
        registry._entries.update(entries)


@pytest.mark.usefixtures("_registries_restored")
@pytest.mark.parametrize("block", blocks_of(README), ids=lambda block: block.split("\n")[0][:40])
def test_each_readme_block_runs_by_itself(block):
    exec(compile(block, "README.md", "exec"), {"__name__": "readme"})


@pytest.mark.usefixtures("_registries_restored")
@pytest.mark.parametrize(
    "page",
    [
        *(page for page in DOCS if page.stem not in TRAINING),
        *further(*(page for page in DOCS if page.stem in TRAINING)),
    ],
    ids=name_of,
)
def test_the_blocks_of_a_page_run_from_top_to_bottom(page):
    exec(compile("\n".join(blocks_of(page)), page.name, "exec"), {"__name__": page.stem})


CARDS = [
    ROOT / "flowgym_gym" / part / "README.md"
    for part in ("models/embedded/tiny", "rewards/embedded/clip")
]


@pytest.mark.filterwarnings("error::FutureWarning", "error::DeprecationWarning")
@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.parent.name)
def test_the_code_of_a_model_card_runs_without_a_deprecated_argument(card, monkeypatch):
    monkeypatch.chdir(ROOT)
    (block,) = blocks_of(card)
    exec(compile(block, card.name, "exec"), {"__name__": "card"})


def test_the_recipes_write_the_code_of_the_cards():
    for card, recipe in zip(CARDS, ("embedded_checkpoint", "embedded_clip"), strict=True):
        template = blocks_of(ROOT / "recipes" / recipe / "model_card.md")
        assert [block.replace("$$", "$") for block in template] == blocks_of(card)


def commands_of(page):
    text = "\n".join(
        re.findall(r"```bash\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    )
    lines = text.replace("\\\n", " ").splitlines()
    return [
        line.partition("flowgym-gym ")[2]
        for line in lines
        if re.search(r"flowgym-gym (train|frontier) ", line)
    ]


COMMANDS = [command for page in (README, *DOCS) for command in commands_of(page)]


@pytest.mark.parametrize("command", [command for command in COMMANDS if "--resume" not in command])
def test_the_long_commands_are_accepted(command, tmp_path, monkeypatch):
    class AcceptedError(Exception):
        pass

    def accept(*args, **kwargs):
        raise AcceptedError

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(training, "carry_out", accept)
    monkeypatch.setattr(measure, "_begin", accept)
    with pytest.raises(AcceptedError):
        main(shlex.split(command, comments=True))


def script_of(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_table_of_environments_is_what_its_script_makes():
    page = (ROOT / "docs" / "environments.md").read_text(encoding="utf-8")
    made = script_of("make_environments_page").page(page)
    assert made == page, "run python docs/make_environments_page.py"


def test_ids_that_open_offline_come_first_and_the_others_say_what_they_want():
    text = (ROOT / "docs" / "environments.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(flowgym/\S+)` \|.*\| (.*?) ?\|$", text, flags=re.MULTILINE)
    wants = [wants_checkpoint(id) or wants_weights(id) for id, _ in rows]
    assert wants == [bool(named) for _, named in rows]
    assert wants == sorted(wants)
    assert 0 < sum(wants) < len(rows)


def test_the_readme_is_short():
    lines = README.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 130
    assert max(map(len, lines)) <= 120


PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md")]


@pytest.mark.parametrize("page", [*PAGES, *DOCS], ids=name_of)
def test_links_of_a_page_lead_to_files_that_exist(page):
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    links = [link for link in re.findall(r"\]\(([^)#]+)[^)]*\)", text) if "://" not in link]
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_the_environments_page_lists_every_environment():
    text = (ROOT / "docs" / "environments.md").read_text(encoding="utf-8")
    for id in gymnasium.registry:
        if id.startswith("flowgym/"):
            assert f"`{id}`" in text


def test_readme_says_how_large_the_checkpoint_is_and_that_nearly_half_of_the_ids_want_weights():
    ids = [id for id in gymnasium.registry if id.startswith("flowgym/")]
    want = [id for id in ids if wants_checkpoint(id) or wants_weights(id)]
    size = sum(path.stat().st_size for path in (EMBEDDED / "tiny").rglob("*.safetensors")) / 1e6
    text = " ".join(README.read_text(encoding="utf-8").split())
    assert f" 64 pictures, {size:.1f} MB)" in text
    assert "Nearly half of the ids want weights" in text
    assert 0.4 < len(want) / len(ids) < 0.5
    for id in want:
        with pytest.raises(CheckpointError):
            gymnasium.make(id)


def test_the_mathematics_page_names_tests_that_exist():
    named = set(
        re.findall(r"`(test_\w+)`", (ROOT / "docs" / "mathematics.md").read_text(encoding="utf-8"))
    )
    defined = "\n".join(
        path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py")
    )
    assert len(named) >= 20
    assert not [name for name in named if f"def {name}(" not in defined]
