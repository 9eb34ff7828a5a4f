"""The table of docs/models.md is what its script makes."""

import importlib.util
from pathlib import Path

import pytest

from flowgym_gym import base_model_registry
from flowgym_gym.models.pipeline import PipelineBaseModel

DOCS = Path(__file__).parents[1] / "docs"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("make_models_page", DOCS / "make_models_page.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_table_is_what_the_script_makes(script):
    page = (DOCS / "models.md").read_text(encoding="utf-8")
    assert script.page(page) == page, "run python docs/make_models_page.py"


def test_every_known_checkpoint_has_its_row():
    page = (DOCS / "models.md").read_text(encoding="utf-8")
    classes = {
        base_model_registry.get(id).cls
        for id in base_model_registry.list()
        if id.startswith("images/")
    }
    checkpoints = [
        c for cls in classes if issubclass(cls, PipelineBaseModel) for c in cls.checkpoints
    ]
    assert len(checkpoints) >= 10
    for checkpoint in checkpoints:
        assert f"| `{checkpoint}` |" in page
