"""The package as a user gets it: a light import, and a wheel that holds everything."""

import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

import flowgym_gym

ROOT = Path(__file__).parents[1]


def run(*command, **kwargs):
    # What the caller's own variables add to the path is no part of the wheel.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    result = subprocess.run(
        command, capture_output=True, text=True, check=False, env=environment, **kwargs
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_importing_the_package_imports_no_torch():
    heavy = run(
        sys.executable,
        "-c",
        "import sys, flowgym_gym; flowgym_gym.base_model_registry.list();"
        "heavy = ('torch', 'diffusers', 'transformers', 'stable_baselines3', 'matplotlib');"
        "print([m for m in heavy if m in sys.modules])",
    )
    assert heavy.strip() == "[]"


def test_every_public_name_can_be_imported():
    for name in flowgym_gym.__all__:
        assert getattr(flowgym_gym, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'Velocity'"):
        flowgym_gym.Velocity  # noqa: B018


@pytest.mark.second
def test_subpackages_are_there_without_a_further_import():
    found = run(
        sys.executable,
        "-c",
        "import flowgym_gym as f; print(f.optimal_control.optimal_value.__name__, "
        "f.envs.check_vector_env.__name__,f.wrappers.vector.ToTorch.__name__, "
        "f.models.from_pretrained.__name__, f.agents.train.__name__)",
    )
    assert found.split() == [
        "optimal_value",
        "check_vector_env",
        "ToTorch",
        "from_pretrained",
        "train",
    ]


@pytest.mark.second
def test_the_wheel_makes_the_environment_in_a_clean_virtual_environment(tmp_path):
    """Only the dependencies are shared with this environment; the package itself comes from the
    wheel.
    """
    run(
        sys.executable,
        "-m",
        "build",
        "--wheel",
        "--no-isolation",
        "--outdir",
        str(tmp_path / "dist"),
        cwd=ROOT,
    )
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    home = tmp_path / "venv"
    venv.create(home, with_pip=False)
    python = home / "bin" / "python"
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    run(sys.executable, "-m", "pip", "install", "--no-deps", "--target", str(site), str(wheel))
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    output = run(
        python,
        "-c",
        "import gymnasium, flowgym_gym; print(flowgym_gym.__file__);"
        "env = gymnasium.make('flowgym/StableDiffusion-Red-v0', discretization_steps=2);"
        "env.reset(seed=0); env.step(env.action_space.sample());"
        "print(env.step(env.action_space.sample())[4]['terminal_reward'])",
        cwd=tmp_path,
    ).splitlines()
    assert Path(output[-2]).is_relative_to(site)
    assert 0 < float(output[-1]) < 1
