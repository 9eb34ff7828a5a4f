"""The table of agents against the optimum means what it says."""

import json

import numpy as np
import pytest

from flowgym_gym.agents import load_agent, load_preset
from flowgym_gym.agents.runs.config import read_config
from flowgym_gym.agents.runs.episodes import held_out_seeds, play
from flowgym_gym.agents.runs.evaluation import deterministic, evaluation_env
from flowgym_gym.errors import OptionError
from studies import optimality
from tests.agents.conftest import draw_little

ID = "flowgym/GaussianMixture-Binary-v0"
LITTLE = [
    "num_envs=4",
    "timesteps=80",
    "checkpoint_every=80",
    "algo.n_steps=20",
    "algo.batch_size=20",
]


def call(folder, *arguments, settings=LITTLE):
    sets = [part for setting in settings for part in ("--set", setting)]
    paths = ["--out", str(folder / "results.json"), "--runs", str(folder / "runs")]
    optimality.main([*paths, *sets, "--ids", ID, "--algos", "ppo", "--seeds", "2", *arguments])
    return json.loads((folder / "results.json").read_text())


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("optimality")
    with pytest.MonkeyPatch.context() as patch:
        draw_little(patch)
        return folder, call(folder)


def test_what_is_done_is_not_trained_again(trained, monkeypatch, capsys):
    folder, results = trained
    done = [(t["algo"], t["seed"], t["timesteps"]) for t in results["trainings"]]
    assert done == [("ppo", 0, 80), ("ppo", optimality.SEED_STEP, 80)]
    monkeypatch.setattr(optimality, "train", lambda *args, **kwargs: pytest.fail("trained again"))
    assert call(folder) == results
    assert f"| `{ID}` | PPO | 80 |" in capsys.readouterr().out


def test_other_settings_are_trained_and_replace_the_old(trained, monkeypatch):
    folder, results = trained
    seeds = []

    def learn(id, algo, seed, changes, out):
        seeds.append(seed)
        return {"timesteps": changes["timesteps"], "seconds": 1.0, "value": 5.0, "machine": {}}

    monkeypatch.setattr(optimality, "learn", learn)
    other = folder / "other"
    other.mkdir()
    (other / "results.json").write_text(json.dumps(results))
    changed = call(other, settings=[LITTLE[0], "timesteps=160", *LITTLE[2:]])
    assert seeds == [0, optimality.SEED_STEP]
    assert [t["timesteps"] for t in changed["trainings"]] == [160, 160]


def test_results_from_before_a_setting_existed_have_its_default(trained, monkeypatch):
    folder, results = trained
    for training in results["trainings"]:
        del training["settings"]["kl_budget"]
    older = folder / "older"
    older.mkdir()
    (older / "results.json").write_text(json.dumps(results))
    monkeypatch.setattr(optimality, "train", lambda *args, **kwargs: pytest.fail("trained again"))
    assert call(older) == results


def test_an_agent_is_measured_against_the_optimum_of_its_own_process(trained):
    coarse = optimality.reference(ID, {"env": {"discretization_steps": 5}, "wrappers": {}})
    assert coarse != optimality.reference(ID, trained[1]["trainings"][0]["settings"])
    assert coarse["uncontrolled"] < coarse["optimum"] < coarse["bound"]


def test_the_return_of_a_training_is_that_of_episodes_of_its_agent(trained):
    folder, results = trained
    run = optimality.folder_of(folder / "runs", ID, "ppo", optimality.SEED_STEP)
    episodes = play(
        evaluation_env(read_config(run), 500), held_out_seeds(500), deterministic(load_agent(run))
    )
    error = 3 * episodes.returns.std() / np.sqrt(len(episodes.returns))
    assert results["trainings"][1]["value"] == pytest.approx(episodes.returns.mean(), abs=error)


def test_the_table_gives_the_share_of_the_way_with_its_interval():
    reference = {"uncontrolled": 2.0, "optimum": 12.0, "bound": 13.0}
    trainings = [
        {
            "id": ID,
            "algo": "sac",
            "seed": s,
            "timesteps": 1000,
            "seconds": 10.0 * s,
            "value": v,
            "reference": reference,
        }
        for s, v in enumerate([11.0, 11.5, 12.0])
    ]
    *_, row = optimality.table(trainings).splitlines()
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    # A standard deviation of 5 %, times 4.303 / sqrt(3).
    assert cells[1:] == [
        "SAC",
        "1,000",
        "10",
        "2.000",
        "11.500 ± 1.242",
        "12.000",
        "13.000",
        "95.0 ± 12.4",
        "90.0",
    ]
    *_, row = optimality.table(trainings[:1]).splitlines()
    assert row.endswith("| 11.000 | 12.000 | 13.000 | 90.0 | 90.0 |")


def test_the_optimum_is_drawn_beside_the_agents(tmp_path, monkeypatch):
    monkeypatch.setattr(optimality, "TRAJECTORIES", 20)
    nothing = {"none": lambda observation: np.zeros_like(observation["latent"])}
    optimality.draw(nothing, load_preset(ID), tmp_path / "fields.png")
    assert (tmp_path / "fields.png").stat().st_size > 10_000


def test_what_cannot_be_drawn_is_refused_before_any_training(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(optimality, "train", lambda *args, **kwargs: pytest.fail("trained"))
    with pytest.raises(SystemExit):
        call(tmp_path, "--draw", str(tmp_path / "fields.png"))
    assert "not among --ids" in capsys.readouterr().err


def test_an_agent_that_cannot_be_drawn_is_missed_before_the_training(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(optimality, "learn", lambda *args: pytest.fail("trained"))
    arguments = ["--draw", str(tmp_path / "x.png"), "--runs", str(tmp_path / "runs")]
    with pytest.raises(SystemExit):
        optimality.main(arguments)
    message = capsys.readouterr().err
    assert (
        f"--draw needs the agent of {tmp_path / 'runs' / 'GaussianMixture-Gaussian-v0-ppo-0'}"
        in message
    )
    assert "take a new file for --out to train it again" in message


def test_an_environment_without_a_known_optimum_is_refused_before_the_training(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(optimality, "learn", lambda *args: pytest.fail("trained"))
    with pytest.raises(OptionError, match="may change the problem; take it off"):
        optimality.main(
            ["--ids", "StableDiffusion-Red-v0", "--out", str(tmp_path / "results.json")]
        )
