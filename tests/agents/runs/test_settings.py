import json
import math
import os
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import gymnasium
import numpy as np
import pytest
import torch

from flowgym_gym.agents import load_preset
from flowgym_gym.agents.runs import settings
from flowgym_gym.agents.runs.preparation import TrainRequest, prepare
from flowgym_gym.agents.runs.presets import ALGORITHMS, full_id
from flowgym_gym.agents.runs.settings import check, describe, options, override, parse_assignments
from flowgym_gym.errors import OptionError, UnknownIdError, UnknownOptionError
from tests.conftest import ALL_IDS, FLOWGYM_IDS, RED


@pytest.mark.parametrize("algo", ALGORITHMS)
@pytest.mark.parametrize("env_id", ALL_IDS)
def test_every_environment_has_a_valid_preset(env_id, algo):
    preset = load_preset(env_id, algo)
    check(preset, algo)
    same = {f"{section}.{name}": value for section in ("env", "wrappers", "algo", "policy")
            for name, value in preset[section].items()}  # fmt: skip
    assert override(preset, same, env_id, algo) == preset


def test_ids_are_known_with_and_without_their_namespace():
    assert full_id("StableDiffusion-Red-v0") == full_id(RED) == RED
    with pytest.raises(UnknownIdError, match=r"did you mean 'flowgym/StableDiffusion-Red-v0'"):
        full_id("StableDifusion-Red-v0")
    with pytest.raises(UnknownIdError, match="CartPole"):
        full_id("CartPole-v1")


def test_overrides_reach_every_section_by_dotted_and_by_bare_name():
    changes = {
        "env.noise_level": 0.5,
        "learning_rate": 1e-4,
        "wrappers.coarse_action": 2,
        "blocks": 2,
        "timesteps": 7,
    }
    changed = override(load_preset(RED), changes, RED, "ppo")
    assert changed["env"]["noise_level"] == 0.5
    assert changed["algo"]["learning_rate"] == 1e-4
    assert changed["wrappers"]["coarse_action"] == 2
    assert changed["policy"]["blocks"] == 2
    assert changed["timesteps"] == 7
    assert load_preset(RED)["wrappers"]["coarse_action"] == 1


def test_options_of_the_base_model_are_settings():
    changed = override(
        load_preset(RED), {"guidance_scale": 2.0, "prompts": "a red heart"}, RED, "ppo"
    )
    assert changed["env"]["guidance_scale"] == 2.0


def test_a_bare_name_is_the_environments_own_where_it_has_one():
    changed = override(load_preset(RED), {"reward_scale": 3.0, "device": "cpu"}, RED, "ppo")
    assert changed["env"]["reward_scale"] == 3.0
    assert changed["env"]["device"] == "cpu"
    assert changed["wrappers"] == load_preset(RED)["wrappers"]
    assert changed["algo"] == load_preset(RED)["algo"]


def test_ambiguous_bare_names_are_refused(monkeypatch):
    monkeypatch.setattr(
        settings, "options", lambda *_: {"": set(), "env": set(), "algo": {"x"}, "policy": {"x"}}
    )
    with pytest.raises(
        UnknownOptionError, match=r"'x' could be algo\.x or policy\.x; give the whole name"
    ):
        override(load_preset(RED), {"x": 1.0}, RED, "ppo")


@pytest.mark.parametrize(
    ("key", "suggestion"),
    [
        ("env.noise_levl", "env.noise_level"),
        ("algo.lerning_rate", "algo.learning_rate"),
        ("lerning_rate", "algo.learning_rate"),
        ("wrapers.coarse_action", "wrappers.coarse_action"),
        ("polcy.width", "policy.width"),
    ],
)
def test_typos_get_a_suggestion(key, suggestion):
    with pytest.raises(
        UnknownOptionError, match=f"no setting '{key}'; did you mean '{suggestion}'"
    ):
        override(load_preset(RED), {key: 1}, RED, "ppo")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("timesteps", 0),
        ("num_envs", 0),
        ("num_envs", 2.5),
        ("algo.n_steps", "many"),
        ("algo.learning_rate", -1.0),
        ("algo.gamma", "x"),
        ("algo.batch_size", True),
        ("final_learning_rate", -1.0),
        ("algo.gamma", 1.1),
        ("algo.gae_lambda", -0.1),
        ("algo.clip_range", 0),
        ("policy.log_std_init", math.nan),
        ("algo.learning_rate", math.inf),
        ("final_learning_rate", math.inf),
        ("algo.target_kl", "x"),
        ("algo.target_kl", 0),
        ("policy.blocks", -1),
        ("algo.ent_coef", -1.0),
        ("final_learning_rate", "x"),
    ],
)
def test_values_out_of_range_are_refused(key, value):
    with pytest.raises(OptionError, match=f"{key} is {value!r}"):
        override(load_preset(RED), {key: value}, RED, "ppo")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("algo.target_update_interval", 0),
        ("algo.learning_starts", -1),
        ("policy.n_critics", 0),
        ("policy.n_quantiles", 0),
        ("algo.top_quantiles_to_drop_per_net", 25),
        ("algo.top_quantiles_to_drop_per_net", -1),
    ],
)
def test_values_out_of_range_are_refused_for_off_policy_algorithms_too(key, value):
    with pytest.raises(OptionError, match=f"{key} is {value!r}"):
        override(load_preset(RED, "tqc"), {key: value}, RED, "tqc")


def test_assignments_are_parsed_as_plain_values():
    texts = [
        "a=1",
        "b=1e-4",
        "c=null",
        "d=true",
        "e=a red car",
        "f=[1, 2]",
        "g=x=y",
        'h="5"',
        "i=: {",
    ]
    expected = {
        "a": 1, "b": 1e-4, "c": None, "d": True, "e": "a red car", "f": [1, 2], "g": "x=y", "h": "5", "i": ": {"
    }  # fmt: skip
    assert parse_assignments(texts) == expected


@pytest.mark.parametrize(
    "prompt", ["no", "a cat: red", "a #1 dog", "12:30", "1990-01-01", "- a list", "*star", "on"]
)
def test_a_prompt_is_text_even_where_yaml_reads_something_else(prompt):
    assert parse_assignments([f"prompts={prompt}"]) == {"prompts": prompt}
    if prompt.replace("-", "").isalnum():
        assert parse_assignments([f"prompts=[{prompt}, a dog]"]) == {"prompts": [prompt, "a dog"]}


def test_numbers_and_words_of_python_are_values():
    texts = [
        "a=.5",
        "b=1E-4",
        "c=True",
        "d=None",
        "e=[.5, False]",
        "f={x: 1, y: a dog}",
        "g=5.",
        "h=+3",
    ]
    expected = {
        "a": 0.5, "b": 1e-4, "c": True, "d": None, "e": [0.5, False], "f": {"x": 1, "y": "a dog"}, "g": 5.0, "h": 3.0
    }  # fmt: skip
    assert parse_assignments(texts) == expected


def test_an_assignment_without_a_name_or_value_is_refused():
    for bad in ("novalue", "=3"):
        with pytest.raises(OptionError, match="expected name=value"):
            parse_assignments([bad])


def test_unknown_algorithm_is_refused():
    with pytest.raises(OptionError, match="algo is 'pp0'"):
        load_preset(RED, "pp0")


def test_a_family_of_environments_shares_a_preset():
    own = [
        load_preset(id, "sac") for id in FLOWGYM_IDS if "GaussianMixture" in id and "2D" not in id
    ]
    assert len(own) == 2
    assert own[0]["wrappers"] == {}
    assert own[0] == own[1]
    assert load_preset("GaussianMixture-Gaussian2D-v0", "sac") != own[0]


def test_an_environment_without_a_preset_gets_the_default():
    gymnasium.register("flowgym/NoPreset-v0", entry_point="flowgym_gym.envs.denoising:DenoisingEnv")
    try:
        assert load_preset("NoPreset-v0") == load_preset("Denoising-v0")
        assert load_preset("NoPreset-v0") != load_preset(RED)
    finally:
        del gymnasium.registry["flowgym/NoPreset-v0"]


def test_tqc_takes_the_presets_of_sac_and_settings_of_its_own():
    for id in (RED, "Denoising-v0", "GaussianMixture-Gaussian-v0"):
        assert load_preset(id, "tqc") == load_preset(id, "sac")
    changed = override(
        load_preset(RED, "tqc"), {"n_quantiles": 5, "top_quantiles_to_drop_per_net": 1}, RED, "tqc"
    )
    assert changed["policy"]["n_quantiles"] == 5
    assert changed["algo"]["top_quantiles_to_drop_per_net"] == 1
    assert options(RED, "tqc")["policy"] == options(RED, "sac")["policy"] | {"n_quantiles"}


def test_settings_of_evaluations_are_shown_where_there_are_any():
    preset = load_preset(RED)
    assert "evaluat" not in describe({**preset, "evaluate_every": None})
    assert "evaluation_episodes: 64" in describe({**preset, "evaluate_every": 100})


@pytest.mark.parametrize(
    ("value", "plain"),
    [
        (Path("a") / "b.txt", os.path.join("a", "b.txt")),
        (np.int64(3), 3),
        (np.float32(0.5), 0.5),
        (np.bool_(True), True),
        (np.str_("cpu"), "cpu"),
        ((1, np.int64(2)), [1, 2]),
        ([Path("a")], ["a"]),
        ({"a": (np.float64(0.25), None)}, {"a": [0.25, None]}),
    ],
)
def test_overrides_take_paths_and_numpys_numbers_as_plain_values(value, plain):
    env = override(load_preset(RED), {"env.base_model_kwargs": value}, RED, "ppo")["env"]
    assert env["base_model_kwargs"] == plain
    assert type(env["base_model_kwargs"]) is type(plain)
    assert json.loads(json.dumps(env)) == env


@pytest.mark.parametrize("name", ["env.checkpoint", "num_envs"])
def test_a_checkpoint_or_a_number_of_numpy_or_pathlib_is_the_same_setting(name):
    value, plain = (Path("models"), "models") if name == "env.checkpoint" else (np.int64(8), 8)
    given, same = (override(load_preset(RED), {name: v}, RED, "ppo") for v in (value, plain))
    assert json.dumps(dict(given)) == json.dumps(dict(same))


circular: list = []
circular.append(circular)


@pytest.mark.parametrize(
    "value",
    [object(), {1, 2}, b"x", torch.device("cpu"), torch.zeros(2), np.zeros(2), np.complex64(1), {1: 2}, circular,
     np.datetime64("2020"), lambda: 0, Fraction(1), Decimal(1), [object()], type],
)  # fmt: skip
def test_what_a_run_cannot_keep_is_refused_by_name(value):
    with pytest.raises(OptionError, match=r"^env.prompts is or holds .*no plain value"):
        override(load_preset(RED), {"env.prompts": value}, RED, "ppo")


@pytest.mark.parametrize(
    ("changes", "first", "second"),
    [
        ({"env.prompts": "a", "prompts": "b"}, "env.prompts is 'a'", "prompts is 'b'"),
        (
            {"learning_rate": 0.1, "algo.learning_rate": 0.2},
            "learning_rate is 0.1",
            "algo.learning_rate is 0.2",
        ),
        (
            {"env.reward_scale": 1.0, "wrappers.reward_scale": 2.0},
            "env.reward_scale is 1.0",
            "wrappers.reward_scale",
        ),
        (
            {"env.discretization_steps": 5, "wrappers.time_grid": 6},
            "env.discretization_steps is 5",
            "time_grid is 6",
        ),
    ],
)
def test_two_values_of_one_setting_are_a_contradiction(changes, first, second):
    with pytest.raises(OptionError) as raised:
        override(load_preset(RED), changes, RED, "ppo")
    assert first in str(raised.value)
    assert second in str(raised.value)


def test_what_is_said_twice_alike_is_said_once():
    changes = {
        "env.prompts": ("a", "b"),
        "prompts": ["a", "b"],
        "env.reward_scale": 2.0,
        "wrappers.reward_scale": None,
    }
    assert override(load_preset(RED), changes, RED, "ppo")["env"]["prompts"] == ["a", "b"]
    assert parse_assignments(["a=1", "a=1"]) == {"a": 1}


def test_one_name_assigned_twice_is_a_contradiction():
    with pytest.raises(OptionError, match=r"'prompts' twice, as 'a' and as 'b'"):
        parse_assignments(["prompts=a", " prompts = b"])


@pytest.mark.parametrize("name", ["timesteps", "num_envs"])
def test_an_argument_and_an_override_of_another_value_are_a_contradiction(name, tmp_path):
    with pytest.raises(OptionError, match=rf"{name} is 8, but the changes .* have 16"):
        prepare(TrainRequest(RED, out=tmp_path / "run", **{name: 8}, overrides={name: 16}))
    twice, once = (
        prepare(TrainRequest(RED, out=tmp_path / "run", **{name: 8}, overrides=o))
        for o in ({name: 8}, {})
    )
    assert twice == once


@pytest.mark.parametrize("overrides", [5, [], "a=1", {5: 1}])
def test_overrides_are_a_dictionary_by_name(overrides):
    with pytest.raises(OptionError, match="overrides is"):
        override(load_preset(RED), overrides, RED, "ppo")


@pytest.mark.parametrize(
    "text", ["[" * 100_000, "9" * 5000, "{" * 5000, "[&a [*a]]", "{[1]: 2}", "1e999", "\0", "NaN"]
)
def test_any_text_can_be_assigned(text):
    assert "x" in parse_assignments([f"x={text}"])
