"""What the documentation shows of RLlib runs as it stands."""

import re
import shlex
from pathlib import Path

import pytest

pytest.importorskip("ray.rllib", reason="RLlib is in the extra rllib; run .ci/run rllib")
pytestmark = [pytest.mark.second, pytest.mark.usefixtures("_ray")]

from benchmarks import scaling
from flowgym_gym.agents import load_policy
from flowgym_gym.cli import parser
from studies import rllib
from tests.agents.rllib.conftest import MIXTURE

DOCS = Path(__file__).parents[3] / "docs"


def blocks(language, page="scale.md"):
    text = (DOCS / page).read_text(encoding="utf-8")
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


def test_the_code_of_the_page_runs(tmp_path):
    (block,) = blocks("py")
    exec(compile(block, "scale.md", "exec"), {"folder": tmp_path})
    assert load_policy(tmp_path / "policy").description["engine"] == "rllib"


def test_the_commands_of_the_page_exist():
    text = (
        "\n".join(blocks("sh") + blocks("sh", "training.md"))
        .replace("\\\n", " ")
        .replace("$resume", "--resume")
    )
    commands = re.findall(r"flowgym-gym (train .*?)&?$", text, flags=re.MULTILINE)
    options = [parser().parse_args(shlex.split(command)) for command in commands]
    assert [option.runners for option in options] == [None, None, 4, 32, 4]
    assert options[3].address == "auto"


def test_the_benchmark_of_scaling_counts_what_travels(monkeypatch, capsys):
    for name in ("init", "shutdown"):
        monkeypatch.setattr(scaling.ray, name, lambda **kwargs: None)
    (row,) = scaling.main(["--env", MIXTURE, "--runners", "1", "--num-envs", "2", "--rounds", "1"])
    assert row["steps_per_second"] > 0
    # A number of latent, time, action, reward, and mean and deviation of the action, at least.
    assert row["bytes_per_step"] > 6 * 4
    # The actor alone: stem, time, two blocks, and heads of mean and deviation, of 64 features.
    parameters = 2 * 64 + (64**2 + 34 * 64) + 2 * (4 * 64**2 + 4 * 64) + 2 * 65 + 1
    assert 4 * parameters < row["bytes_of_policy"] < 4 * parameters + 4000
    assert "| 1 | " in capsys.readouterr().out


def test_the_study_trains_and_measures_against_the_optimum(tmp_path, monkeypatch, capsys):
    for name in ("init", "shutdown"):
        monkeypatch.setattr(rllib.ray, name, lambda **kwargs: None)
    arguments = [MIXTURE, "--seeds", "0", "--timesteps", "1", "--out", str(tmp_path / "r.json")]
    rllib.main(arguments)
    rllib.main(arguments)  # what is there is not trained again
    (line,) = set(capsys.readouterr().out.splitlines())
    cells = line.split("|")
    assert cells[2:4] == [" PPO ", " 20,480 "]
    assert float(cells[6]) < 8.708
