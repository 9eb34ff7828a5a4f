"""Registries: ids, options, and the errors for a wrong one."""

import pytest

from flowgym_gym import base_model_registry, reward_registry
from flowgym_gym.errors import OptionError, UnknownIdError, UnknownOptionError
from flowgym_gym.registry import Registry


class Thing:
    def __init__(self, size=1, colour="red"):
        self.size, self.colour = size, colour


def test_register_as_a_decorator_or_directly():
    registry = Registry("thing")
    assert registry.register("a/thing", size=3)(Thing) is Thing
    registry.register("a/lazy", "tests.test_registry:Thing", colour="blue")
    assert registry.get("a/thing").instantiate(colour="green").__dict__ == {"size": 3, "colour": "green"}
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
