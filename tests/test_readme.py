"""The README's Python runs as it stands."""

import re
from pathlib import Path

import pytest

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


@pytest.mark.parametrize("block", BLOCKS, ids=[b.split("\n")[0][:40] for b in BLOCKS])
def test_readme_block_runs(block):
    from flowgym_gym import base_model_registry, reward_registry

    before = [dict(r._entries) for r in (base_model_registry, reward_registry)]
    try:
        exec(compile(block, "README.md", "exec"), {"__name__": "readme"})
    finally:
        for registry, entries in zip((base_model_registry, reward_registry), before, strict=True):
            registry._entries.clear()
            registry._entries.update(entries)


def test_readme_lists_every_environment():
    import gymnasium

    import flowgym_gym  # noqa: F401

    for id in gymnasium.registry:
        if id.startswith("flowgym/"):
            assert f"`{id}`" in README
