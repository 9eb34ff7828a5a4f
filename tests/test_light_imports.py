"""What is known without learning, the command ``sample`` and a frontier without agents need few
libraries.
"""

import subprocess
import sys

import pytest


def test_what_is_known_without_learning_needs_torch_and_the_environments_alone():
    code = "import sys, flowgym_gym.optimal_control\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    loaded = set(done.stdout.split())
    assert "flowgym_gym.optimal_control.optimum" in loaded, done.stderr
    assert loaded & {"matplotlib", "stable_baselines3", "yaml", "scipy"} == set()


WITHOUT = """
import importlib.abc, sys

class Missing(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "stable_baselines3":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Missing())
from flowgym_gym.cli import main
raise SystemExit(main(sys.argv[1:]))
"""
MIXTURE = "GaussianMixture-Gaussian2D-v0"


def without_sb3(*arguments):
    command = [sys.executable, "-c", WITHOUT, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.second
@pytest.mark.parametrize("name", [MIXTURE, "StableDiffusion-Red-v0"])
def test_samples_are_drawn_without_stable_baselines3(name, tmp_path):
    out = tmp_path / "grid.png"
    done = without_sb3("sample", name, "--n", 2, "--out", out, "--set", "discretization_steps=2")
    assert done.returncode == 0, done.stderr
    assert out.is_file()


@pytest.mark.second
def test_a_frontier_without_agents_is_measured_without_stable_baselines3(tmp_path):
    sizes = ("--pool", 16, "--best-of", 2, "--episodes", 2, "--strengths", 1)
    settings = ("--set", "noise_level=0.5", "--set", "wrappers.time_grid=3")
    command = ("frontier", MIXTURE, "--out", tmp_path / "out", "--algos", *sizes)
    done = without_sb3(*command, *settings)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "frontier.png").is_file()
    wrong = without_sb3(*command, "--set", "discretization_step=2")
    assert wrong.returncode == 2
    assert "did you mean 'env.discretization_steps'" in wrong.stderr


@pytest.mark.second
@pytest.mark.parametrize(
    "arguments",
    [("train",), ("frontier", "--algos", "ppo"), ("frontier", "--algos", "--set", "algo.gamma=1")],
)
def test_what_needs_stable_baselines3_says_which_extra_brings_it(arguments, tmp_path):
    command, *rest = arguments
    done = without_sb3(command, MIXTURE, "--out", tmp_path / "out", *rest)
    assert done.returncode == 2
    assert (
        'needs stable_baselines3, which is not installed; run: pip install "flowgym_gym[agents]"'
        in done.stderr
    )
    assert not (tmp_path / "out").exists()
