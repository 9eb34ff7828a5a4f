"""Registries: ids, options, and the errors for a wrong one."""

from abc import ABC, abstractmethod

import gymnasium
import pytest

from flowgym_gym import BaseModel, Reward, base_model_registry, catalogue, reward_registry
from flowgym_gym.errors import OptionError, UnknownIdError, UnknownOptionError, did_you_mean
from flowgym_gym.registry import Registry


class Thing:
    def __init__(self, size=1, colour="red"):
        self.size, self.colour = size, colour


def test_register_as_a_decorator_or_directly():
    registry = Registry("thing")
    assert registry.register("a/thing", size=3)(Thing) is Thing
    registry.register("a/lazy", "tests.test_registry:Thing", colour="blue")
    assert registry.get("a/thing").instantiate(colour="green").__dict__ == {
        "size": 3,
        "colour": "green",
    }
    assert registry.get("a/lazy").instantiate().colour == "blue"
    assert registry.list() == ["a/lazy", "a/thing"]
    assert "a/thing" in registry


def test_unknown_id_suggests_the_nearest():
    with pytest.raises(UnknownIdError, match="did you mean 'images/stable_diffusion'"):
        base_model_registry.get("images/stable_difusion")
    with pytest.raises(KeyError, match=r"registered: .*images/red"):
        reward_registry.get("images/blue")


def test_unknown_option_suggests_the_nearest():
    registry = Registry("thing")
    registry.register("a/thing", Thing)
    with pytest.raises(UnknownOptionError, match="has no option 'color'; did you mean 'colour'"):
        registry.get("a/thing").instantiate(color="red")


@pytest.mark.parametrize("id", ["thing", "/thing", "a/", "", 3])
def test_ids_have_a_domain(id):
    with pytest.raises(OptionError, match="domain/name"):
        Registry("thing").register(id, Thing)


def test_another_class_under_the_same_id_warns():
    registry = Registry("thing")
    registry.register("a/thing", Thing)
    registry.register("a/thing", Thing)
    with pytest.warns(UserWarning, match="registered again"):
        registry.register("a/thing", Registry)


class Needy:
    def __init__(self, size, colour="red"):
        self.size = size


class Positional:
    def __init__(self, size, /):
        self.size = size


class Abstract(ABC):
    @abstractmethod
    def forward(self): ...


def thing_factory():
    return Thing()


@pytest.mark.parametrize(
    ("entry_point", "message"),
    [
        (Needy, r"'a/thing' needs the argument 'size'.*needs a size.*thing_kwargs={'size': \.\.\.}"),
        (Positional, "needs the argument 'size'"),
        (Abstract, "is a Abstract, which does not define forward"),
        ("tests.test_registry:Thimg", "there is no 'Thimg' in it; did you mean 'Thing'"),
        ("tests.test_registry:Thing.Inner", "there is no 'Inner' in it"),
        ("tests.test_registri:Thing", "'a/thing' is registered as 'tests.test_registri:Thing', but there is no such"),
        ("no_such_package.part:Thing", "there is no such module"),
        ("tests.test_registry:thing_factory", "thing_factory.*expected a class.*make a subclass"),
        ("tests.test_registry:__doc__", "expected a class"),
        ("tests.test_registry:pytest", "expected a class"),
    ],
)  # fmt: skip
def test_what_cannot_be_made_is_named(entry_point, message):
    registry = Registry("thing")
    registry.register("a/thing", entry_point, needs="a size")
    with pytest.raises(OptionError, match=message):
        registry.get("a/thing").instantiate()


@pytest.mark.parametrize(
    "entry_point",
    [
        thing_factory,
        Thing(),
        3,
        "tests.test_registry",
        "tests.test_registry:",
        ":Thing",
        "a b:Thing",
        "a:b:c",
        "a\0:B",
    ],
)
def test_only_classes_are_registered(entry_point):
    registry = Registry("thing")
    with pytest.raises(
        OptionError, match=r"thing 'a/thing' is .*, expected a class or 'module:Class'"
    ):
        registry.register("a/thing", entry_point)
    assert registry.list() == []


def test_functions_are_refused_as_decorated_too():
    with pytest.raises(OptionError, match="make a subclass whose __init__ does the same"):
        Registry("thing").register("a/thing")(thing_factory)


def test_defaults_that_the_class_does_not_take_are_named():
    registry = Registry("thing")
    registry.register("a/thing", Thing, sice=3)
    with pytest.raises(UnknownOptionError, match="has no option 'sice'; did you mean 'size'"):
        registry.get("a/thing").instantiate()


@pytest.mark.parametrize(
    ("text", "error"),
    [("import no_such_package", ModuleNotFoundError), ("raise ValueError('mine')", ValueError)],
)
def test_errors_of_the_registered_module_itself_come_as_they_are(
    text, error, tmp_path, monkeypatch
):
    (tmp_path / "own_thing.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    registry = Registry("thing")
    registry.register("a/thing", "own_thing:Thing")
    with pytest.raises(error, match=r"no_such_package|mine"):
        registry.get("a/thing").instantiate()


NAMES = {
    "algorithms": ("ppo", "sac", "tqc"),
    "rewards": reward_registry.list(),
    "models": base_model_registry.list(),
    "options": (
        "noise_level",
        "action_scale",
        "discretization_steps",
        "guidance_scale",
        "prompts",
        "colour",
    ),
    "modes": ("NextStep", "SameStep", "Disabled"),
    "environments": ("flowgym/StableDiffusion-Red-v0", "flowgym/StableDiffusion-Redness-v0"),
}


@pytest.mark.parametrize(
    ("word", "names", "hint"),
    [
        ("PPO", "algorithms", "ppo"),
        ("ppoo", "algorithms", "ppo"),
        ("sca", "algorithms", "sac"),
        ("images/rde", "rewards", "images/red"),
        ("images/clipscore", "rewards", "images/clip_score"),
        ("red", "rewards", "images/red"),
        ("images/brigthness", "rewards", "images/brightness"),
        ("images/stable_difusion", "models", "images/stable_diffusion"),
        ("stable-diffusion", "models", "images/stable_diffusion"),
        ("noise_levl", "options", "noise_level"),
        ("noiselevel", "options", "noise_level"),
        ("prompt", "options", "prompts"),
        ("guidance", "options", "guidance_scale"),
        ("discretisation", "options", "discretization_steps"),
        ("color", "options", "colour"),
        ("DISABLED", "modes", "Disabled"),
        ("NEXT_STEP", "modes", "NextStep"),
        ("StableDifusion-Red-v0", "environments", "flowgym/StableDiffusion-Red-v0"),
        ("StableDiffusion-Red-v1", "environments", "flowgym/StableDiffusion-Red-v0"),
    ],
)
def test_typing_errors_get_a_hint(word, names, hint):
    assert did_you_mean(word, NAMES[names]) == f"; did you mean {hint!r}?"


@pytest.mark.parametrize(
    ("word", "names"),
    [
        *(
            (name, "algorithms")
            for name in ("a2c", "td3", "ddpg", "dqn", "trpo", "grpo", "", "ppo-sac", None, 3)
        ),
        ("images/blue", "rewards"),
        ("audio/hum", "rewards"),
        ("images/sdxl", "models"),
        ("learning_rate", "options"),
        ("reward_scale", "options"),
        ("StableDiffusion-Blue-v0", "environments"),
        ("CartPole-v1", "environments"),
        ("x" * 10**6, "rewards"),
    ],
)
def test_names_that_mean_something_else_get_no_hint(word, names):
    assert did_you_mean(word, NAMES[names]) == ""


def test_every_line_of_the_catalogue_is_registered():
    assert set(catalogue.BASE_MODELS) <= set(base_model_registry.list())
    assert set(catalogue.REWARDS) <= set(reward_registry.list())
    for registry, kind in ((base_model_registry, BaseModel), (reward_registry, Reward)):
        for id in registry.list():
            assert issubclass(registry.get(id).cls, kind), id
    assert reward_registry.get("1d/clip").cls is reward_registry.get("images/clip").cls
    for id, kwargs in catalogue.ENVIRONMENTS.items():
        assert gymnasium.spec(id).kwargs == kwargs


def test_registering_the_catalogue_again_keeps_what_a_user_put_in_its_place(monkeypatch):
    monkeypatch.setattr(reward_registry, "_entries", dict(reward_registry._entries))
    with pytest.warns(UserWarning, match="registered again"):
        reward_registry.register("images/red", Thing)
    catalogue.register_all()
    assert reward_registry.get("images/red").cls is Thing


def test_a_long_name_is_not_repeated():
    with pytest.raises(UnknownIdError) as raised:
        reward_registry.get("images/" + "x" * 10**6)
    assert len(str(raised.value)) < 2000
