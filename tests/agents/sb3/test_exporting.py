"""Policies that act without stable-baselines3."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import gymnasium
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from flowgym_gym.agents import evaluate, export, load_agent, load_policy
from flowgym_gym.agents.runs.checkpoints import best_checkpoint
from flowgym_gym.errors import CheckpointError, OptionError
from flowgym_gym.wrappers.vector import CoarseAction
from tests.agents.conftest import ENGINES, draw_little, tiny
from tests.conftest import PROMPTS, RED

CHANGES = {
    "env.prompts": PROMPTS,
    "wrappers.coarse_action": 2,
    "policy.blocks": 2,
    "algo.learning_rate": 0.03,
}


@pytest.fixture(scope="module", params=[*ENGINES, "ppo, state-dependent"])
def run(request, tmp_path_factory):
    """A trained agent that reads prompts and acts on a grid."""
    algo, _, state_dependent = request.param.partition(",")
    out = tmp_path_factory.mktemp("exporting") / algo
    with pytest.MonkeyPatch.context() as patch:
        draw_little(patch)
        changes = {**CHANGES, "policy.state_dependent_std": True} if state_dependent else CHANGES
        tiny(out, algo, timesteps=16, overrides=changes)
    return out


@pytest.fixture
def policy(run, tmp_path):
    """The folder of its policy; a test may spoil it."""
    return export(run, tmp_path / "policy")


def observe(agent, n=5):
    rng = np.random.default_rng(0)
    shapes = {name: space.shape for name, space in agent.observation_space.items()}
    return {
        name: rng.uniform(0, 1, (n, *shape)).astype(np.float32) for name, shape in shapes.items()
    }


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX permissions")
def test_both_files_can_be_read_by_others(policy):
    assert {file.stat().st_mode & 0o777 for file in policy.iterdir()} == {0o644}


@pytest.mark.second
def test_it_acts_like_the_agent_where_stable_baselines3_cannot_be_imported(run, policy, tmp_path):
    agent = load_agent(run)
    observations = observe(agent)
    np.savez(tmp_path / "observations.npz", **observations)
    code = (
        "import sys, numpy as np\n"
        "for name in ('stable_baselines3', 'sb3_contrib', 'matplotlib', 'yaml'): sys.modules[name] = None\n"
        "from flowgym_gym.agents import load_policy\n"
        f"policy = load_policy({str(policy)!r})\n"
        f"observations = dict(np.load({str(tmp_path / 'observations.npz')!r}))\n"
        "first = {name: array[0] for name, array in observations.items()}\n"
        "batch, single = (policy.predict(o, deterministic=True) for o in (observations, first))\n"
        "assert batch[1] is single[1] is None\n"
        f"np.savez({str(tmp_path / 'actions.npz')!r}, batch=batch[0], single=single[0])\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    expected, _ = agent.predict(observations, deterministic=True)
    assert np.abs(expected).max() > 0.01, "an untrained agent would prove nothing"
    with np.load(tmp_path / "actions.npz") as actions:
        assert actions["batch"].dtype == expected.dtype
        np.testing.assert_allclose(actions["batch"], expected, rtol=0, atol=1e-6)
        np.testing.assert_allclose(actions["single"], expected[0], rtol=0, atol=1e-6)


def test_random_actions_are_those_of_the_agent(run, policy):
    agent, exported = load_agent(run), load_policy(policy)
    observations = observe(agent, n=64)
    actions = []
    for acting in (agent, exported):
        torch.manual_seed(5)
        actions.append(acting.predict(observations, deterministic=False)[0])
    np.testing.assert_allclose(*actions, rtol=0, atol=1e-6)
    assert actions[0].std() > 0.1


def test_a_state_is_given_back_as_stable_baselines3_does(policy):
    exported = load_policy(policy)
    assert exported.predict(observe(exported), "state", deterministic=True)[1] == "state"


def test_it_can_be_evaluated_in_the_environment_that_it_names(run, policy):
    exported = load_policy(policy)
    description = exported.description
    assert (description["env_id"], description["algo"], description["timesteps"]) == (
        RED,
        run.name,
        16,
    )
    assert {"torch", "stable_baselines3"} <= set(description["versions"])
    env = gymnasium.make_vec(
        description["env_id"], 2, autoreset_mode="Disabled", **description["env"]
    )
    env = CoarseAction(env, description["wrappers"]["coarse_action"])
    report, expected = evaluate(exported, 4, vector_env=env), evaluate(run, 4)
    for name, values in expected["agent"].items():
        assert report["agent"][name] == pytest.approx(values, rel=1e-4)


def test_it_holds_the_actor_alone(run, policy):
    assert {path.name for path in policy.iterdir()} == {"policy.json", "policy.safetensors"}
    agent = load_agent(run).policy
    if run.name == "ppo":
        actor = {"pi_features_extractor", "action_net", "log_std", "log_std_net"}
        sizes = [
            value.numel()
            for name, value in agent.state_dict().items()
            if name.partition(".")[0] in actor
        ]
    else:
        # The part of the deviation that does not depend on the observation is 0.
        sizes = [value.numel() for value in agent.actor.state_dict().values()] + [
            agent.action_space.low.size
        ]
    written = [tensor.numel() for tensor in load_file(policy / "policy.safetensors").values()]
    assert sorted(written) == sorted(sizes)


def test_the_best_or_the_newest_agent_is_exported(tmp_path, monkeypatch):
    tiny(tmp_path / "run", timesteps=16, overrides={"evaluate_every": 8, "evaluation_episodes": 2})
    best = int(best_checkpoint(tmp_path / "run").name)
    for which, timesteps in (("best", best), ("newest", 16)):
        assert (
            load_policy(export(tmp_path / "run", tmp_path / which, which)).description["timesteps"]
            == timesteps
        )


@pytest.mark.parametrize("file", ["policy.json", "policy.safetensors"])
@pytest.mark.parametrize("content", [None, b"", b"{", b"[]", b"{}", b"\xff" * 100])
def test_damaged_files_are_errors_that_name_the_folder(file, content, policy):
    if content is None:
        (policy / file).unlink()
    else:
        (policy / file).write_bytes(content)
    with pytest.raises(
        (CheckpointError, OptionError), match=r"(holds no policy|cannot be read).*"
    ) as error:
        load_policy(policy)
    assert str(policy) in str(error.value)


def change(policy, *keys, value):
    description = json.loads((policy / "policy.json").read_text())
    part = description
    for key in keys[:-1]:
        part = part[key]
    part[keys[-1]] = value
    (policy / "policy.json").write_text(json.dumps(description))


@pytest.mark.parametrize(
    ("keys", "value"),
    [
        (["format"], 99),
        (["architecture", "width"], 16),
        (["architecture", "width"], 100_000),
        (["architecture", "width"], "wide"),
        (["architecture", "blocks"], 3),
        (["architecture", "distribution"], "categorical"),
        (["architecture", "log_std_range"], "wide"),
        (["action_space", "shape"], [3, 2, 2]),
        (["action_space", "low"], None),
        (["observation_space", "latent"], [3, 8, 8]),
        (["observation_space"], {}),
    ],
)
def test_files_that_do_not_fit_each_other_are_refused(keys, value, policy):
    change(policy, *keys, value=value)
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_policy(policy)


def test_missing_and_foreign_weights_are_refused(policy):
    weights = load_file(policy / "policy.safetensors")
    name = next(iter(weights))
    for changed in (
        {k: v for k, v in weights.items() if k != name},
        {**weights, "other": torch.zeros(1)},
    ):
        save_file(changed, policy / "policy.safetensors")
        with pytest.raises(CheckpointError, match="cannot be read"):
            load_policy(policy)


def test_a_folder_that_is_taken_is_left_alone(run, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    for taken in (tmp_path, tmp_path / "notes.txt"):
        with pytest.raises(OptionError, match="choose another"):
            export(run, taken)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    with pytest.raises(OptionError, match="holds no run"):
        export(tmp_path, tmp_path / "policy")
    with pytest.raises(OptionError, match="which is 'last'"):
        export(run, tmp_path / "policy", which="last")


def test_observations_that_do_not_fit_are_refused(policy):
    exported = load_policy(policy)
    observations = observe(exported)
    wrong = [
        {name: array for name, array in observations.items() if name != "time"},
        {**observations, "extra": observations["time"]},
        {**observations, "latent": observations["latent"][:, :3]},
        {**observations, "time": observations["time"][0]},
    ]
    for observation in wrong:
        with pytest.raises(
            OptionError, match=r"observation has shapes .*, expected .*'latent': \(4, 8, 8\)"
        ):
            exported.predict(observation)


def test_a_policy_can_be_moved(policy, tmp_path):
    moved = Path(shutil.move(policy, tmp_path / "elsewhere"))
    assert load_policy(moved).action_space.shape == (4, 2, 2)
