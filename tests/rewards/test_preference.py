"""Rewards that packages of their own compute.

The packages need other versions of transformers than this one, so what is tested here is what they are asked, on
packages of the same interface that the tests write.
"""

import sys
import textwrap

import numpy as np
import pytest
import torch

from flowgym_gym import FlowTensor
from flowgym_gym.errors import CheckpointError, MissingExtraError
from flowgym_gym.models.loading import load_reward

PROMPTS = ["a cat", "a dog", "a cat"]
PACKAGES = {"images/image_reward": ("ImageReward", "image-reward"), "images/hpsv2": ("hpsv2", "hpsv2")}
INTERFACE = {
    "ImageReward": """
        import torch

        class Model:
            def __init__(self, state):
                self.state = state

            def score(self, prompt, image):
                assert image.mode == "RGB"
                return float(self.state["w"]) * image.getpixel((0, 0))[0] + len(prompt)

        def load(name, device="cpu", download_root=None, med_config=None):
            return Model(torch.load(name, map_location=device, weights_only=False))
    """,
    "hpsv2": """
        import torch

        def score(img_path, prompt, cp=None, hps_version="v2.0"):
            w = torch.load(cp, weights_only=False)["w"] if cp else torch.tensor({"v2.1": 3.0}[hps_version])
            assert all(image.mode == "RGB" for image in img_path)
            return [float(w) * image.getpixel((0, 0))[0] + len(prompt) for image in img_path]
    """,
}


@pytest.fixture(params=list(PACKAGES))
def installed(request, tmp_path, monkeypatch):
    """A reward's id with a package of its interface on the path, a checkpoint, and the arguments that name it."""
    module, _ = PACKAGES[request.param]
    package = tmp_path / "packages" / module
    package.mkdir(parents=True)
    (package / ("img_score.py" if module == "hpsv2" else "x.py")).write_text(textwrap.dedent(INTERFACE[module]))
    (package / "__init__.py").write_text("" if module == "hpsv2" else textwrap.dedent(INTERFACE[module]))
    monkeypatch.syspath_prepend(str(package.parent))
    for name in [name for name in sys.modules if name.partition(".")[0] == module]:
        monkeypatch.delitem(sys.modules, name)
    torch.save({"w": torch.tensor(2.0)}, tmp_path / "weights.pt")
    (tmp_path / "med_config.json").write_text("{}")
    kwargs = {"weights": str(tmp_path / "weights.pt")}
    if module == "ImageReward":
        kwargs["med_config"] = str(tmp_path / "med_config.json")
    yield request.param, kwargs, tmp_path
    for name in [name for name in sys.modules if name.partition(".")[0] == module]:
        del sys.modules[name]


def test_the_package_gets_8_bit_pictures_and_each_its_own_prompt(installed):
    id, kwargs, _ = installed
    x = torch.rand(3, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    reward = load_reward(id, **kwargs)
    expected = 2 * np.round(255 * x[:, 0, 0, 0].numpy()) + [5, 5, 5]
    np.testing.assert_allclose(reward(FlowTensor(x), prompt=PROMPTS)[0], expected)
    longer = reward(FlowTensor(x), prompt=["a cat", "an elephant", "a cat"])[0]
    np.testing.assert_allclose(longer, expected + np.array([0, 6, 0]))


class Bomb:
    def __reduce__(self):
        return (exec, ("raise SystemExit('code of a pickle has run')",))


def test_a_checkpoint_that_would_run_code_is_refused_whatever_the_package_asks_for(installed):
    id, kwargs, folder = installed
    torch.save({"w": Bomb()}, folder / "weights.pt")
    with pytest.raises(Exception, match=r"[Ww]eights.only"):
        load_reward(id, **kwargs)(FlowTensor(torch.rand(1, 3, 4, 4)), prompt=["a cat"])


def test_missing_weights_are_named(installed):
    id, _, _ = installed
    with pytest.raises(CheckpointError, match="never looks for them by itself; name a local file, or one on the Hub"):
        load_reward(id)
    with pytest.raises(CheckpointError, match=r"looked for at .*nowhere"):
        load_reward(id, weights="nowhere.pt")


@pytest.mark.parametrize("id", list(PACKAGES))
def test_a_missing_package_says_the_pip_command(id, monkeypatch):
    module, package = PACKAGES[id]
    monkeypatch.setitem(sys.modules, module, None)  # As if it were not there.
    with pytest.raises(
        MissingExtraError, match=rf"{id} needs the package '{package}'.* pip install 'flowgym_gym\[{package}\]'"
    ):
        load_reward(id)


def test_a_package_that_cannot_be_imported_says_why(tmp_path, monkeypatch):
    (tmp_path / "ImageReward").mkdir()
    (tmp_path / "ImageReward" / "__init__.py").write_text("from transformers import gone")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "ImageReward", raising=False)
    with pytest.raises(MissingExtraError, match=r"installed but cannot be imported \(ImportError: .*gone"):
        load_reward("images/image_reward")
