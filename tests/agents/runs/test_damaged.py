"""Damaged run folders: what is sound is used, and what is not is named; nothing ends in a
traceback.
"""

import json
import shutil

import numpy as np
import pytest

from flowgym_gym.agents import evaluate, export, load_agent, train
from flowgym_gym.agents.frontier.measure import frontier
from flowgym_gym.agents.runs.checkpoints import checkpoints, restore_checkpoint
from flowgym_gym.agents.runs.config import read_config
from flowgym_gym.agents.runs.environments import make_vector_env
from flowgym_gym.agents.runs.metrics import read_metrics
from flowgym_gym.agents.runs.results import save_curve
from flowgym_gym.agents.runs.state import capture_state
from flowgym_gym.agents.sb3.algorithms import make_algorithm
from flowgym_gym.agents.sb3.vec_env import SB3VecEnv
from flowgym_gym.errors import CheckpointError, FlowGymError
from tests.agents.conftest import TINY, draw_little
from tests.conftest import further

MIXTURE = "flowgym/GaussianMixture-Gaussian2D-v0"
DEEP = "[" * 100_000
# The newest checkpoint of the run, and that of its best agent.
NEWEST, BEST = "checkpoints/000000016", "best/000000016"


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A small finished run with everything that a run can have."""
    out = tmp_path_factory.mktemp("finished") / "run"
    changes = {**TINY["sac"], "evaluate_every": 16, "evaluation_episodes": 2}
    with pytest.MonkeyPatch.context() as patch:
        draw_little(patch)
        train(MIXTURE, "sac", out=out, timesteps=16, num_envs=2, overrides=changes, progress=False)
    for best in (out / "best").iterdir():
        best.rename(out / BEST)
    state = json.loads((out / BEST / "state.json").read_text())
    (out / BEST / "state.json").write_text(json.dumps({**state, "timesteps": 16}))
    evaluate(out, 2)
    return out


@pytest.fixture
def run(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def folder_instead(path):
    path.unlink()
    path.mkdir()


def link_to_nothing(path):
    path.unlink()
    path.symlink_to(path.parent / "nowhere")


def flipped(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 40] = bytes(40)
    path.write_bytes(content)


MUTATIONS = {
    "truncated": truncate,
    "empty": lambda path: path.write_bytes(b""),
    "flipped": flipped,
    "no text": lambda path: path.write_bytes(b"\xff\xfe\x00" * 99),
    "deep": lambda path: path.write_text(DEEP),
    "huge": lambda path: path.write_text("9" * 100_000),
    "list": lambda path: path.write_text("[1, 2]\n3\n"),
    "object": lambda path: path.write_text('{"timesteps": {}, "base": 3}\n'),
    "folder": folder_instead,
    "link": link_to_nothing,
}
FIRST = ["truncated", "object"]
FILES = [
    "config.json", "metrics.csv", "evaluations.csv", "evaluation.json",
    *(f"{folder}/{name}" for folder in (NEWEST, BEST) for name in ("model.zip", "state.json", "state.npz")),
    f"{NEWEST}/replay_buffer.npz",
]  # fmt: skip


def contents(run, but=()):
    return {
        path.relative_to(run).as_posix(): path.read_bytes()
        for path in run.rglob("*")
        if path.is_file() and path.relative_to(run).as_posix() not in but
    }


@pytest.mark.parametrize("mutation", [*FIRST, *further(*(m for m in MUTATIONS if m not in FIRST))])
@pytest.mark.parametrize("file", FILES)
def test_every_way_into_a_damaged_run_works_or_names_the_file(
    file, mutation, run, tmp_path, capsys
):
    MUTATIONS[mutation](run / file)
    before = contents(run)
    ways = {
        "load": lambda: load_agent(run),
        "newest": lambda: load_agent(run, "newest"),
        "evaluate": lambda: evaluate(run, 2),
        "export": lambda: export(run, tmp_path / "policy"),
        "curve": lambda: save_curve(run),
        "resume": lambda: train(MIXTURE, out=run, resume=True, timesteps=20, progress=False),
    }
    for name, way in ways.items():
        capsys.readouterr()
        try:
            way()
        except FlowGymError as error:
            told = str(error)
            assert file.rpartition("/")[2] in told or str((run / file).parent) in told, told
            # What is sound has not been touched.
            after = contents(run)
            kept = {key: after[key] for key in before if key != "evaluation.json" and key in after}
            if name != "resume":
                assert kept.items() <= before.items()
        else:
            told = capsys.readouterr().err
        if (
            file.startswith("checkpoints")
            and file.endswith((".zip", "state.json"))
            and name == "newest"
        ):
            # The older checkpoint does, and it is said which and why.
            assert f"{run / NEWEST} cannot be read: " in told
            assert f"taking {run / 'checkpoints' / '000000008'} instead" in told


@pytest.mark.parametrize(
    ("file", "which"), [(f"{BEST}/model.zip", "best"), (f"{NEWEST}/model.zip", "newest")]
)
def test_a_damaged_checkpoint_gives_way_to_a_sound_one(file, which, run, tmp_path, capsys):
    truncate(run / file)
    instead = NEWEST if which == "best" else "checkpoints/000000008"
    done = int(instead[-9:])
    assert load_agent(run, which).num_timesteps == done
    report = evaluate(run, 2, which=which)
    assert (report["timesteps"], report["checkpoint"]) == (done, "newest")
    description = json.loads((export(run, tmp_path / "policy", which) / "policy.json").read_text())
    assert description["timesteps"] == done
    assert capsys.readouterr().err.count("cannot be read: ValueError: model.zip is cut off") == 3
    for path in checkpoints(run):
        (path / "model.zip").write_bytes(b"")
    with pytest.raises(
        CheckpointError, match=r"cannot be read: .*; no other checkpoint of .* can be read either"
    ):
        load_agent(run, "newest")


def test_a_checkpoint_damaged_twice_is_put_aside_twice(run, capsys):
    for _ in range(2):
        truncate(run / NEWEST / "model.zip")
        assert train(MIXTURE, out=run, resume=True, progress=False).timesteps == 16
    names = {path.name for path in (run / "checkpoints").iterdir()}
    assert {"damaged-000000016", "damaged-000000016-1", "000000016"} <= names


WRONG = [None, True, -1, 1.5, "x", [], {}, [[1]], {"a": 1}, 10**40, "nan"]


@pytest.fixture(scope="module")
def opened(finished):
    config = read_config(finished)
    env = SB3VecEnv(make_vector_env(MIXTURE, config["settings"], 2))
    model = make_algorithm("sac", env, config["settings"], 0)
    model.learn(0)
    return model, env


def fields(value, path=()):
    """Paths of all fields of a JSON value; of lists the first entry alone."""
    yield path
    if isinstance(value, dict):
        for key in value:
            yield from fields(value[key], (*path, key))
    elif isinstance(value, list) and value:
        yield from fields(value[0], (*path, 0))


def put(value, path, new):
    if not path:
        return new
    copied = value.copy()
    copied[path[0]] = put(value[path[0]], path[1:], new)
    return copied


def test_no_field_of_a_state_is_taken_for_what_it_is_not(run, opened):
    """Whatever stands in a field: the checkpoint is refused, or the next one that is read is as if
    nothing had been.
    """
    model, env = opened
    restore_checkpoint(run / NEWEST, model, env)
    sound = json.dumps(capture_state(model, env)[0], default=np.ndarray.tolist)
    state = json.loads((run / NEWEST / "state.json").read_text())
    for path in fields(state):
        for new in WRONG if path else ():
            (run / NEWEST / "state.json").write_text(json.dumps(put(state, path, new)))
            try:
                progress = restore_checkpoint(run / NEWEST, model, env)
            except CheckpointError:
                continue
            # It can go on, or it would have been refused.
            assert model.num_timesteps == 16, (path, new)
            assert isinstance(progress["episodes"], int), (path, new)
            model.action_space.sample()
            np.random.rand()
        if path and len(path) == 1:
            del (less := dict(state))[path[0]]
            (run / NEWEST / "state.json").write_text(json.dumps(less))
            with pytest.raises(CheckpointError, match=path[0]):
                restore_checkpoint(run / NEWEST, model, env)
    (run / NEWEST / "state.json").write_text(json.dumps(state))
    restore_checkpoint(run / NEWEST, model, env)
    assert json.dumps(capture_state(model, env)[0], default=np.ndarray.tolist) == sound


@pytest.mark.parametrize(
    "change",
    [
        lambda a: a[:1],
        lambda a: a.astype(str),
        lambda a: np.full_like(a, 7)[None],
        lambda a: np.array(3),
    ],
)
def test_no_array_of_a_state_is_taken_for_another(change, run, opened):
    model, env = opened
    with np.load(run / NEWEST / "state.npz") as file:
        arrays = dict(file)
    for name, array in arrays.items():
        if not array.ndim:
            continue
        np.savez(run / NEWEST / "state.npz", **{**arrays, name: change(array)})
        with pytest.raises(CheckpointError):
            restore_checkpoint(run / NEWEST, model, env)


@pytest.mark.parametrize("file", ["metrics.csv", "evaluations.csv"])
@pytest.mark.parametrize(
    "table", ["a,b\n1,2\n", "timesteps\nx\n", "timesteps\n1.5\n", "timesteps\n-4\n"]
)
def test_tables_with_other_columns_are_named_with_the_cure(file, table, run):
    (run / file).write_text(table)
    for way in (
        lambda: save_curve(run),
        lambda: train(MIXTURE, out=run, resume=True, timesteps=20, progress=False),
    ):
        with pytest.raises(
            CheckpointError, match=rf"{file} is damaged: .*move it away to go on without its rows"
        ):
            way()
    (run / file).unlink()
    assert train(MIXTURE, out=run, resume=True, timesteps=20, progress=False).timesteps == 20


def test_columns_of_another_version_are_no_damage(run):
    rows = (run / "metrics.csv").read_text().splitlines()
    (run / "metrics.csv").write_text("".join(f"{row},{i or 'new'}\n" for i, row in enumerate(rows)))
    train(MIXTURE, out=run, resume=True, timesteps=20, progress=False)
    assert [row["timesteps"] for row in read_metrics(run / "metrics.csv")] == [4, 8, 12, 16, 20]


def test_names_that_are_no_numbers_are_no_checkpoints(run):
    for name in ("²", "1" * 200, "12x", "-3"):
        (run / "checkpoints" / name).mkdir()
    assert [path.name for path in checkpoints(run)] == ["000000016", "000000008", "000000000"]


@pytest.mark.parametrize(
    "change",
    [
        lambda report: {**report, "pool": {}},
        lambda report: {**report, "pool": {**report["pool"], "rewards": ["x"]}},
        lambda report: {**report, "points": {"base": {"method": "base"}}},
        lambda report: {
            **report,
            "points": {"x": {**report["points"]["base"], "reward": {"mean": "x"}}},
        },
        lambda report: {**report, "settings": []},
        lambda report: [report],
        lambda report: DEEP,
    ],
)
def test_a_damaged_frontier_is_named(change, tmp_path):
    options = {"algos": [], "strengths": [], "pool": 16, "best_of": [2], "episodes": 2}
    frontier(MIXTURE, out=tmp_path, **options)
    report = json.loads((tmp_path / "frontier.json").read_text())
    changed = change(report)
    (tmp_path / "frontier.json").write_text(
        changed if isinstance(changed, str) else json.dumps(changed)
    )
    with pytest.raises(CheckpointError, match=r"frontier\.json is damaged: .*move it away"):
        frontier(MIXTURE, out=tmp_path, **options)
