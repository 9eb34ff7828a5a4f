"""The tests over all registered ids need to be told nothing about a new one."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import FLOWGYM_IDS, model_of, prompted

ROOT = Path(__file__).parents[1]


@pytest.mark.second
def test_an_id_of_a_model_without_prompts_passes_the_tests_over_all_ids():
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "tests.toy",
        "-p",
        "no:cacheprovider",
        "-n",
        "0",
        "-m",
        "",
    ]
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    command += ["-k", "Toy-Red", "tests/envs"]
    run = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert len(re.findall(r"\.", run.stdout.partition("[")[0])) >= 15


def test_whether_an_id_gets_prompts_follows_from_its_model():
    found = {model_of(id)[0]: "prompts" in prompted(id) for id in FLOWGYM_IDS}
    prompted_ones = ("stable_diffusion", "stable_diffusion_xl", "stable_diffusion_3", "flux")
    expected = dict.fromkeys((*prompted_ones, "pixart", "dit"), True)
    expected |= dict.fromkeys(("ddpm", "gaussian_mixture"), False)
    assert {name: found[name] for name in expected} == expected
