"""What is known without learning, the command ``sample`` and a frontier without agents need few libraries."""

import subprocess
import sys

import pytest


def python(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("name", ["matplotlib", "stable_baselines3", "yaml", "scipy"])
def test_what_is_known_without_learning_needs_torch_and_the_environments_alone(name):
    done = python(f"import sys, flowgym_gym.optimal_control\nprint({name!r} in sys.modules)")
    assert done.stdout == "False\n", done.stderr
