"""Opening a checkpoint says nothing that the user did not ask for."""

import subprocess
import sys

import pytest


@pytest.mark.second
def test_opening_a_checkpoint_without_accelerate_gives_no_advice():
    code = (
        "import diffusers.utils.import_utils as available; available._accelerate_available = False\n"
        "import gymnasium, flowgym_gym\n"
        "gymnasium.make('flowgym/StableDiffusion-Red-v0', discretization_steps=1).reset(seed=0)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")
