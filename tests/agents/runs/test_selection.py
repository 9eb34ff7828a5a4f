"""Evaluations while a run trains: the best agent, the budget of control costs, and nothing else
changes.
"""

import json
import signal

import gymnasium
import numpy as np
import pytest
import torch

from flowgym_gym.agents import evaluate, load_agent, train
from flowgym_gym.agents.runs import records as recording
from flowgym_gym.agents.runs import results, training
from flowgym_gym.agents.runs.checkpoints import best_checkpoint, best_return, checkpoints
from flowgym_gym.agents.runs.episodes import held_out_seeds, selection_seeds
from flowgym_gym.agents.runs.evaluation import Evaluations, table
from flowgym_gym.agents.runs.metrics import Metrics, read_metrics
from flowgym_gym.agents.runs.preparation import TrainRequest, prepare
from flowgym_gym.agents.runs.records import Records
from flowgym_gym.cli import main
from flowgym_gym.errors import OptionError
from flowgym_gym.statistics import mean_and_interval
from flowgym_gym.wrappers import CoarseAction
from tests.agents.conftest import TINY, finished, resume, same_weights, tiny, untimed
from tests.agents.runs.test_rewards_in_runs import STANDARDIZED
from tests.conftest import PROMPTS, RED, further

EVERY = {"evaluate_every": 8, "evaluation_episodes": 3}


def evaluations(out):
    return read_metrics(out / "evaluations.csv")


@pytest.fixture
def costs(monkeypatch):
    """Gives the evaluations the mean control costs and returns that a test wants, one after
    another.
    """

    really = Evaluations.play

    def install(*wanted):
        given = iter(wanted)

        def play(self, model):
            episodes = really(self, model)
            cost, paid = next(given)
            episodes.control_costs += cost - episodes.control_costs.mean()
            episodes.returns += paid - episodes.returns.mean()
            return episodes

        monkeypatch.setattr(Evaluations, "play", play)

    return install


@pytest.mark.parametrize("algo", ["ppo", *further("sac")])
def test_a_run_with_evaluations_trains_as_one_without(algo, tmp_path):
    changes = {"env.prompts": PROMPTS, "checkpoint_every": 4}
    tiny(tmp_path / "without", algo, 16, changes)
    tiny(tmp_path / "with", algo, 16, {**changes, "evaluate_every": 4, "evaluation_episodes": 3})
    assert untimed(tmp_path / "with") == untimed(tmp_path / "without")
    assert same_weights(tmp_path / "with", tmp_path / "without")
    assert len(evaluations(tmp_path / "with")) == (3 if algo == "ppo" else 5)
    states = [
        json.loads((checkpoints(tmp_path / name)[0] / "state.json").read_text())
        for name in ("with", "without")
    ]
    for name in ("python_random", "numpy_random", "action_space_random"):
        assert states[0][name] == states[1][name]


def test_evaluations_are_episodes_of_the_deterministic_agent_on_seeds_of_their_own(tmp_path):
    tiny(tmp_path, timesteps=16, overrides=EVERY)
    rows = evaluations(tmp_path)
    assert [row["timesteps"] for row in rows] == [0, 8, 16]
    assert rows[0]["control_cost"] == 0
    agent = load_agent(tmp_path, "newest")
    kwargs = json.loads((tmp_path / "config.json").read_text())["settings"]["env"]
    env = CoarseAction(gymnasium.make(RED, **kwargs), 1)
    found = {"terminal_reward": [], "control_cost": [], "return": []}
    for seed in (2**31, 2**31 + 1, 2**31 + 2):
        observation, _ = env.reset(seed=seed)
        cost, paid, terminated = 0.0, 0.0, False
        while not terminated:
            action, _ = agent.predict(observation, deterministic=True)
            observation, reward, terminated, _, info = env.step(action)
            cost, paid = cost + info["control_cost"], paid + reward
        for name, value in zip(found, (info["terminal_reward"], cost, paid), strict=True):
            found[name].append(value)
    for name, values in found.items():
        expected = mean_and_interval(np.array(values))
        for end, what in (("", "mean"), ("_low", "low"), ("_high", "high")):
            assert rows[2][name + end] == pytest.approx(expected[what], rel=1e-3, abs=1e-5)


def test_the_last_agent_of_a_run_is_evaluated_wherever_it_ends(tmp_path):
    tiny(tmp_path, timesteps=24, overrides={**EVERY, "evaluate_every": 16})
    assert [row["timesteps"] for row in evaluations(tmp_path)] == [0, 16, 24]


def test_the_seeds_of_choosing_reporting_and_training_lie_apart():
    largest = 2**30 - 256
    assert held_out_seeds(256, largest)[-1] < selection_seeds(1)[0] == 2**31
    assert held_out_seeds(1)[0] == 2**30
    with pytest.raises(OptionError, match="seed is"):
        evaluate(object(), 256, seed=largest + 1)
    with pytest.raises(OptionError, match="seed is"):
        prepare(TrainRequest(RED, out="nowhere", num_envs=2, seed=2**30 - 1))


def test_episodes_of_choosing_reporting_and_training_have_different_noise():
    seeds = [*range(4), *held_out_seeds(4), *selection_seeds(4)]
    env = gymnasium.make_vec("flowgym/GaussianMixture-Gaussian2D-v0", len(seeds))
    latents = env.reset(seed=seeds)[0]["latent"]
    assert len(np.unique(latents, axis=0)) == len(seeds)


def test_the_best_agent_is_kept_and_used(tmp_path, costs):
    costs((0, 1.0), (1, 7.0), (1, 5.0), (1, 6.0))
    tiny(tmp_path, timesteps=24, overrides={**EVERY, "checkpoint_every": 8})
    assert best_checkpoint(tmp_path).name == "000000008"
    assert best_return(tmp_path) == pytest.approx(7.0)
    assert [path.name for path in (tmp_path / "best").iterdir()] == ["000000008"]
    best, newest = load_agent(tmp_path), load_agent(tmp_path, "newest")
    assert (best.num_timesteps, newest.num_timesteps) == (8, 24)
    finished(tmp_path / "short", timesteps=8)
    short = load_agent(tmp_path / "short").policy.state_dict()
    assert all(torch.equal(value, short[key]) for key, value in best.policy.state_dict().items())
    report = evaluate(tmp_path, 2)
    assert (report["checkpoint"], report["timesteps"]) == ("best", 8)
    assert "agent: the best of the run, after 8 timesteps" in table(report)
    report = evaluate(tmp_path, 2, which="newest")
    assert (report["checkpoint"], report["timesteps"]) == ("newest", 24)


def test_without_evaluations_the_newest_agent_is_used(tmp_path):
    finished(tmp_path, timesteps=8)
    assert not (tmp_path / "best").exists()
    assert not (tmp_path / "evaluations.csv").exists()
    assert load_agent(tmp_path, "best").num_timesteps == 8
    assert evaluate(tmp_path, 2)["checkpoint"] == "newest"
    with pytest.raises(OptionError, match=r"which is 'last', expected one of \('best', 'newest'\)"):
        load_agent(tmp_path, "last")


def test_the_pictures_after_training_are_of_the_best_agent(tmp_path, costs, monkeypatch):
    played = []
    monkeypatch.setattr(
        results, "_save_film", lambda path, config, agent: played.append(agent.num_timesteps)
    )
    costs((0, 1.0), (1, 7.0), (1, 5.0))
    tiny(tmp_path, timesteps=16, overrides=EVERY)
    assert played == [8]


@pytest.mark.parametrize("algo", ["ppo", *further("sac")])
def test_a_terminated_and_resumed_run_has_the_evaluations_of_an_uninterrupted_one(
    algo, tmp_path, monkeypatch
):
    changes = {**EVERY, "checkpoint_every": 12}
    tiny(tmp_path / "whole", algo, 24, changes)

    def append(self, row, append=Metrics.append):
        append(self, row)
        if self.path.name == "metrics.csv" and row["timesteps"] in (8, 16):
            signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(Metrics, "append", append)
        assert tiny(tmp_path / "parts", algo, 24, changes).timesteps == 8
        assert resume(tmp_path / "parts", algo).timesteps == 16
    assert resume(tmp_path / "parts", algo).timesteps == 24
    assert evaluations(tmp_path / "parts") == evaluations(tmp_path / "whole")
    assert untimed(tmp_path / "parts") == untimed(tmp_path / "whole")
    for which in ("best", "newest"):
        assert same_weights(tmp_path / "parts", tmp_path / "whole", which)


def test_evaluations_of_lost_work_are_made_anew(tmp_path, monkeypatch, costs):
    costs((0, 1.0), (1, 2.0), (1, 9.0), (1, 9.0), (1, 3.0))

    def killed(self, row=None, since=0, add=Records.add):
        if isinstance(row, dict):
            add(self, row, since)
        if not isinstance(row, dict) or row["timesteps"] == 16:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(recording.Records, "add", killed)
        # A process that is killed saves nothing.
        patch.setattr(training.Boundary, "save", killed)
        with pytest.raises(KeyboardInterrupt):
            tiny(tmp_path, timesteps=24, overrides={**EVERY, "checkpoint_every": 1000})
    assert [row["timesteps"] for row in evaluations(tmp_path)] == [0, 8, 16]
    # From the start: nothing else was saved.
    costs((0, 1.0), (1, 2.0), (1, 9.0), (1, 3.0))
    resume(tmp_path)
    assert [row["return"] for row in evaluations(tmp_path)] == pytest.approx([1.0, 2.0, 9.0, 3.0])
    assert [path.name for path in (tmp_path / "best").iterdir()] == ["000000016"]


def test_a_reward_with_a_memory_scores_every_evaluation_by_the_same_measure(tmp_path):
    """With an empty memory, ``images/standardize`` is the reward that it standardises, here the red
    channel.
    """
    tiny(tmp_path / "red", timesteps=8, overrides={**EVERY, "env.prompts": PROMPTS})
    red = evaluations(tmp_path / "red")[0]["terminal_reward"]
    changes = {**TINY["ppo"], **STANDARDIZED, **EVERY, "evaluate_every": 16}
    out = tmp_path / "standardized"
    train(
        "flowgym/Denoising-v0", out=out, timesteps=16, num_envs=2, overrides=changes, progress=False
    )
    rows = evaluations(out)
    assert rows[0]["terminal_reward"] == pytest.approx(red, abs=1e-4)
    # By the statistics of the run, which knows eight rewards by now, it would be about 0.
    assert rows[1]["terminal_reward"] == pytest.approx(red, abs=0.2)
    with np.load(checkpoints(out)[0] / "state.npz") as state:
        assert state["reward.counts"].sum() == 8


# --- the budget of control costs
# -------------------------------------------------------------------------------------


def test_training_stops_at_the_first_evaluation_that_passes_the_budget(tmp_path, costs, capsys):
    costs((0, 1.0), (2.9, 5.0), (3.1, 9.0))
    result = tiny(tmp_path, timesteps=40, overrides={**EVERY, "kl_budget": 3.0})
    assert (result.timesteps, result.target, result.signal) == (16, 40, None)
    message = "the mean control cost in the evaluation, 3.1 nats, passes the kl_budget of 3"
    assert result.stopped == message
    assert f"stopped at 16 of 40 timesteps: {message}" in capsys.readouterr().err
    # The agent beyond the budget is not the best, however high its return.
    assert load_agent(tmp_path).num_timesteps == 8
    assert checkpoints(tmp_path)[0].name == "000000016"
    again = resume(tmp_path)
    assert (again.timesteps, again.stopped) == (16, message)


@pytest.mark.parametrize("algo", ["sac", *further("ppo")])
def test_a_run_with_a_budget_is_evaluated_and_exploration_does_not_count(
    algo, tmp_path, costs, capsys
):
    costs((0, 1.0), (0, 2.0), (0, 3.0))
    changes = {"kl_budget": 1e-6, "checkpoint_every": 8}
    changes |= {"algo.learning_starts": 8} if algo == "sac" else {}
    result = tiny(tmp_path, algo, 16, changes)
    assert (result.timesteps, result.stopped) == (16, None)
    assert (
        "evaluations every 8 timesteps (evaluate_every) are held against the kl_budget"
        in capsys.readouterr().err
    )
    assert [row["timesteps"] for row in read_metrics(tmp_path / "evaluations.csv")] == [0, 8, 16]
    assert min(row["control_cost"] for row in read_metrics(tmp_path / "metrics.csv")) > 1e-6
    # The same command again is not another run.
    assert resume(tmp_path, algo, overrides=changes).timesteps == 16


def test_a_run_from_before_budgets_meant_evaluations_is_evaluated_when_it_goes_on(tmp_path, costs):
    finished(tmp_path, timesteps=8)
    config = json.loads((tmp_path / "config.json").read_text())
    config["settings"] |= {"kl_budget": 3.0, "checkpoint_every": 8}
    (tmp_path / "config.json").write_text(json.dumps(config))
    costs((4.0, 1.0))
    assert resume(tmp_path, timesteps=24).timesteps == 16


def test_a_run_within_its_budget_goes_on_to_its_end(tmp_path):
    result = tiny(tmp_path, timesteps=16, overrides={**EVERY, "kl_budget": 1e6})
    assert (result.timesteps, result.stopped) == (16, None)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("evaluate_every", 0),
        ("evaluate_every", 1.5),
        ("evaluation_episodes", 1),
        ("evaluation_episodes", None),
        ("kl_budget", 0),
        ("kl_budget", -1.0),
        ("kl_budget", "much"),
        ("kl_budget", True),
    ],
)
def test_settings_out_of_range_are_refused(name, value, tmp_path):
    with pytest.raises(OptionError, match=f"{name} is {value!r}"):
        tiny(tmp_path / "run", overrides={name: value})


def test_runs_from_before_there_were_evaluations_resume(tmp_path):
    finished(tmp_path, timesteps=8)
    config = json.loads((tmp_path / "config.json").read_text())
    for name in ("evaluate_every", "evaluation_episodes", "kl_budget"):
        del config["settings"][name]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert resume(tmp_path, timesteps=16).timesteps == 16


def test_the_command_line_evaluates_the_agent_that_is_asked_for(tmp_path, costs, capsys):
    costs((0, 1.0), (1, 7.0), (1, 5.0))
    tiny(tmp_path, timesteps=16, overrides=EVERY)
    for arguments, said in (
        ([], "the best of the run, after 8"),
        (["--which", "newest"], "the newest of the run, after 16"),
    ):
        assert main(["evaluate", str(tmp_path), "--episodes", "2", *arguments]) == 0
        assert said in capsys.readouterr().out
