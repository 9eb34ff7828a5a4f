"""``**kwargs`` that a class hands on stand for what the class above it takes."""

import pytest

from flowgym_gym import BaseModel
from flowgym_gym.errors import OptionError, UnknownOptionError
from flowgym_gym.models.flux import FluxBaseModel
from flowgym_gym.models.pipeline import LatentBaseModel
from flowgym_gym.parameters import parameters_of
from flowgym_gym.registry import Registry


class Shape:
    def __init__(self, size=1, colour="red"):
        self.size, self.colour = size, colour


class Circle(Shape):
    def __init__(self, radius=2, **kwargs):
        super().__init__(**kwargs)
        self.radius = radius


class Dot(Circle):
    def __init__(self, *, colour="black", **options):
        super().__init__(0, colour=colour, **options)


class Silent(Circle):
    """Without a constructor of its own."""


class Box(Shape):
    def __init__(self, **kwargs):
        self.edge = kwargs.pop("edge", 1)
        super().__init__(**kwargs)


class Bag(Shape):
    def __init__(self, size=1, **contents):
        super().__init__(size)
        self.contents = contents


class Sack(Bag):
    def __init__(self, tied=True, **kwargs):
        super().__init__(**kwargs)


class Stuck:
    def __init__(self, **kwargs):
        super().__init__(**kwargs)


class Needy:
    def __init__(self, owner, /, *rest, name, **kwargs): ...


class Pet(Needy):
    def __init__(self, legs=4, **kwargs):
        super().__init__("somebody", **kwargs)


class Still(BaseModel):
    def __init__(self, speed=0.0, **kwargs):
        super().__init__(**kwargs)


MADE_UP = type("MadeUp", (Shape,), {})
exec("def __init__(self, **kwargs): super(type(self), self).__init__(**kwargs)", vars_ := {})
MADE_UP.__init__ = vars_["__init__"]


def options(cls):
    registry = Registry("thing")
    registry.register("a/thing", cls)
    return registry.get("a/thing").options()


@pytest.mark.parametrize(
    ("cls", "names"),
    [
        (Shape, {"size", "colour"}),
        (Circle, {"radius", "size", "colour"}),
        (Silent, {"radius", "size", "colour"}),
        (Dot, {"colour", "size"}),
        (Still, {"speed", "device"}),
    ],
)
def test_options_of_a_class_are_its_own_and_those_of_the_class_that_its_kwargs_reach(cls, names):
    assert options(cls) == names


@pytest.mark.parametrize("cls", [Box, Bag, Sack, Stuck, MADE_UP, Needy, Pet])
def test_a_class_whose_kwargs_end_nowhere_takes_any_name(cls):
    assert options(cls) is None


def test_what_a_class_says_itself_comes_before_what_is_above_it():
    defaults = {p.name: p.default for p in parameters_of(Dot)}
    assert defaults == {"colour": "black", "size": 1}


def test_a_misspelt_option_that_would_be_handed_on_gets_the_nearest_name_and_the_whole_list():
    registry = Registry("thing")
    registry.register("a/circle", Circle)
    with pytest.raises(
        UnknownOptionError, match=r"no option 'color'; did you mean 'colour'.*'radius', 'size'"
    ):
        registry.get("a/circle").instantiate(color="blue")
    made = registry.get("a/circle").instantiate(colour="blue", radius=3)
    assert (made.colour, made.size, made.radius) == ("blue", 1, 3)


def test_an_argument_that_is_missing_further_up_is_named():
    registry = Registry("thing")
    registry.register("a/pet", Pet)
    with pytest.raises(OptionError, match="'a/pet' needs the argument 'name'"):
        registry.get("a/pet").instantiate()


def test_flux_takes_what_all_latent_models_take_and_its_own():
    ours, theirs = (
        {p.name: p.default for p in parameters_of(cls)} for cls in (FluxBaseModel, LatentBaseModel)
    )
    assert ours == {**theirs, "guidance_scale": None, "true_cfg_scale": 1.0}
    assert len(theirs) == 15
