"""Engines of a run by name, and states of RLlib without pickles; that RLlib trains a run is shown
beside its other tests.
"""

import dataclasses
import json
from importlib.util import find_spec

import gymnasium
import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from flowgym_gym.agents import Runners, train
from flowgym_gym.agents.rllib.plain import packed, unpacked
from flowgym_gym.errors import CheckpointError, FlowGymError, MissingExtraError, OptionError
from tests.agents.conftest import finished, resume, tiny

MIXTURE = "flowgym/GaussianMixture-Gaussian-v0"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"engine": "rlib"}, "engine is 'rlib', expected one of"),
        ({"engine": 3}, "engine is 3"),
        ({"engine": "rllib", "algo": "tqc"}, "algo is 'tqc', but with RLlib there is one of"),
        ({"runners": Runners(2)}, "runners are of RLlib, and this run learns with"),
    ],
)
def test_an_engine_that_cannot_train_is_refused_before_anything_is_written(
    options, message, tmp_path
):
    with pytest.raises(FlowGymError, match=message):
        train(MIXTURE, **{"out": tmp_path / "run", "progress": False, **options})
    assert not (tmp_path / "run").exists()


def test_an_id_that_runners_do_not_know_is_refused(tmp_path, monkeypatch):
    spec = dataclasses.replace(gymnasium.spec(MIXTURE))
    spec.namespace = "own"
    monkeypatch.setitem(gymnasium.registry, "own/GaussianMixture-Gaussian-v0", spec)
    with pytest.raises(OptionError, match="RLlib's runners in other processes would not know"):
        train("own/GaussianMixture-Gaussian-v0", out=tmp_path / "run", engine="rllib")
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(find_spec("ray") is not None, reason="Ray is installed")
def test_without_ray_the_extra_is_named(tmp_path):
    with pytest.raises(MissingExtraError, match=r"flowgym_gym\[rllib\]"):
        train(MIXTURE, out=tmp_path / "run", engine="rllib", progress=False)
    assert not (tmp_path / "run").exists()


def test_a_run_of_stable_baselines3_says_nothing_of_engines_and_goes_on_with_its_own(tmp_path):
    tiny(tmp_path / "named", engine="sb3", timesteps=8)
    finished(tmp_path / "run")
    for name in ("run", "named"):
        assert "engine" not in json.loads((tmp_path / name / "config.json").read_text())
    with pytest.raises(OptionError, match=r"engine is 'rllib', but the run in .* has 'sb3'"):
        resume(tmp_path / "run", engine="rllib")
    assert resume(tmp_path / "run", engine="sb3", timesteps=16).timesteps == 16


def test_an_engine_that_a_damaged_configuration_names_is_an_error_of_the_run(tmp_path):
    config = finished(tmp_path / "run") / "config.json"
    config.write_text(config.read_text().replace('"seed": 0', '"seed": 0, "engine": "rm -rf"'))
    with pytest.raises(CheckpointError, match="engine is 'rm -rf', expected one of"):
        resume(tmp_path / "run")


NUMBERS = st.integers(-(2**70), 2**70) | st.floats(allow_nan=False) | st.booleans()
LEAVES = (
    st.none() | NUMBERS | st.text() | st.binary(max_size=9).map(lambda b: np.frombuffer(b, "u1"))
)
STATES = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.text() | st.integers(), inner, max_size=3)
    ),
    max_leaves=12,
)


@hypothesis.given(STATES)
def test_a_state_comes_back_from_json_and_arrays_as_it_was(state):
    def same(one, other):
        if isinstance(one, np.ndarray):
            return isinstance(other, np.ndarray) and np.array_equal(one, other)
        if isinstance(one, dict):
            return list(one) == list(other) and all(same(one[k], other[k]) for k in one)
        if isinstance(one, list | tuple):
            return len(one) == len(other) and all(map(same, one, other))
        return one == other and type(one) is type(other)

    plain, arrays = packed(state, "a.")
    assert same(state, unpacked(json.loads(json.dumps(plain, allow_nan=False)), arrays))


def test_numbers_that_are_none_and_those_of_numpy_are_kept_and_nothing_else_is():
    plain, arrays = packed({"a": float("nan"), "b": float("-inf"), "c": np.float32(0.5)}, "a.")
    found = unpacked(plain, arrays)
    assert np.isnan(found["a"])
    assert (found["b"], found["c"]) == (-np.inf, 0.5)
    with pytest.raises(TypeError, match="holds a function"):
        packed({"a": [lambda: 0]}, "a.")
