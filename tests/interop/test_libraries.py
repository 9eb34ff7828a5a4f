"""The scripts of ``examples/libraries``: other libraries as their own users would run them.

Each needs a library that no extra installs; ``.ci/run torchrl libraries`` has them all, in
environments of their own.
"""

import importlib.util
import re
import sys
from pathlib import Path

import gymnasium
import numpy as np
import pytest

FOLDER = Path(__file__).parents[2] / "examples" / "libraries"
PAGE = Path(__file__).parents[2] / "docs" / "libraries.md"
# What an agent must have come of the way from the base model to the optimum, in the steps that its
# script takes by itself; each from one seed, so that the bar is low.
LEARNERS = [
    ("sb3_plain_and_batched", "stable_baselines3", {"kind": "plain"}, 0.4),
    ("sb3_plain_and_batched", "stable_baselines3", {"kind": "batched"}, 0.4),
    ("sb3_contrib_agents", "sb3_contrib", {"name": "RecurrentPPO"}, 0.3),
    ("sb3_contrib_agents", "sb3_contrib", {"name": "CrossQ"}, 0.1),
    ("sb3_contrib_agents", "sb3_contrib", {"name": "TRPO"}, 0.1),
    ("sb3_contrib_agents", "sb3_contrib", {"name": "TQC"}, 0.0),
    ("sb3_contrib_agents", "sb3_contrib", {"name": "ARS"}, 0.0),
    ("sbx_ppo", "sbx", {}, 0.4),
    ("zoo_ppo", "rl_zoo3", {}, 0.4),
    ("torchrl_ppo", "torchrl", {}, 0.2),
    ("tianshou_ppo", "tianshou", {}, 0.3),
    ("skrl_ppo", "skrl", {}, 0.2),
    ("agilerl_ppo", "agilerl", {}, 0.3),
]
HEADINGS = {
    "stable-baselines3": "stable_baselines3", "sb3-contrib": "sb3_contrib", "SBX": "sbx",
    "TorchRL": "torchrl", "tianshou": "tianshou", "skrl": "skrl", "AgileRL": "agilerl",
    "In the manner of CleanRL": "torch", "Minari": "minari",
}  # fmt: skip


def load(name, library, monkeypatch):
    pytest.importorskip(library)
    monkeypatch.syspath_prepend(FOLDER)
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    return module


def test_every_library_has_a_short_script_that_is_run_here_and_is_on_the_page():
    tests, page = Path(__file__).read_text(encoding="utf-8"), PAGE.read_text(encoding="utf-8")
    for script in FOLDER.glob("*.py"):
        assert len(script.read_text(encoding="utf-8").splitlines()) < 80
        if script.stem != "mixture":
            assert f'"{script.stem}"' in tests
            assert f"examples/libraries/{script.name}" in page


@pytest.mark.nightly
@pytest.mark.parametrize(("heading", "library"), HEADINGS.items())
def test_the_code_of_the_page_is_short_and_runs(heading, library):
    pytest.importorskip(library)
    page = PAGE.read_text(encoding="utf-8")
    (setup,) = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    section = re.search(rf"^## {heading}\n(.*?)(?=^## |\Z)", page, re.DOTALL | re.MULTILINE)[1]
    blocks = re.findall(r"```py\n(.*?)```", section, flags=re.DOTALL)
    assert blocks
    for block in blocks:
        assert sum(bool(line.strip()) for line in block.splitlines()) <= 5
        exec(compile(setup + block, heading, "exec"), {"__name__": "page"})


@pytest.mark.nightly
@pytest.mark.parametrize(("script", "library", "arguments", "least"), LEARNERS)
def test_libraries_learn(script, library, arguments, least, monkeypatch):
    base, mean, best = load(script, library, monkeypatch).main(**arguments)
    assert base + least * (best - base) < mean < best + 0.5


@pytest.mark.nightly
def test_torchrl_makes_the_environment_by_its_id_and_reads_its_infos(monkeypatch):
    example = load("torchrl_ppo", "torchrl", monkeypatch)
    mixture = "flowgym_gym:flowgym/GaussianMixture-Gaussian-v0"
    envs = pytest.importorskip("torchrl.envs")
    check_env_specs = pytest.importorskip("torchrl.envs.utils").check_env_specs
    check_env_specs(envs.GymEnv(mixture, discretization_steps=3))
    env = example.make(2)
    check_env_specs(env)
    env.set_seed(0)
    told = env.rollout(10, break_when_any_done=False)["next"]
    paid = 30 * told["terminal_reward"] - told["control_cost"]
    np.testing.assert_allclose(paid, told["reward"].squeeze(-1), rtol=1e-4)
    np.testing.assert_array_equal(told["valid"], told["done"].squeeze(-1))
    assert (told["control_cost"][:, :9] > 0).all()

    # In this mode TorchRL reads infos by itself, for the last observations that are in them.
    same_step = example.make_vec(2, "SameStep", info_keys="numeric")
    check_env_specs(envs.GymWrapper(same_step))


@pytest.mark.nightly
def test_minari_records_infos_and_replays_episodes(monkeypatch, tmp_path):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    dataset = load("minari_dataset", "minari", monkeypatch).main(episodes=3)
    infos = next(dataset.iterate_episodes()).infos
    assert set(infos) == {"control_cost", "terminal_reward", "valid"}
    np.testing.assert_array_equal(infos["valid"], [0.0] * 10 + [1.0])
    env = gymnasium.make("flowgym/GaussianMixture-Gaussian-v0", discretization_steps=10)
    env.reset(seed=0)
    for action, cost in zip(
        next(dataset.iterate_episodes()).actions, infos["control_cost"][1:], strict=True
    ):
        assert env.step(action)[-1]["control_cost"] == pytest.approx(cost, rel=1e-6)
