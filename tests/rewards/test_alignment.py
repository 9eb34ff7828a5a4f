"""The offline, prompt-dependent reward: the embedded CLIP on samples, against transformers' own
forward.
"""

import json

import pytest
import torch
from transformers import CLIPModel, CLIPTokenizer

import flowgym_gym
from flowgym_gym import FlowTensor
from flowgym_gym.models.stable_diffusion import EMBEDDED
from flowgym_gym.rewards.alignment import EMBEDDED_CLIP, competitors, concepts, find_concept
from flowgym_gym.rewards.loading import load_reward

NAMES = ["cat", "red heart", "banana", "penguin", "car", "sunflower", "rocket", "pizza"]


@pytest.fixture(scope="module")
def samples():
    env = flowgym_gym.make("images/stable_diffusion", "images/red", discretization_steps=10)
    torch.manual_seed(0)
    return env.sample(len(NAMES), prompt=[f"a photo of a {name}" for name in NAMES]).sample


@pytest.fixture(scope="module")
def reward():
    return load_reward("images/alignment")


def test_the_right_prompt_is_likely_and_a_wrong_one_is_not(reward, samples):
    right = reward(samples, prompt=[f"a photo of a {name}" for name in NAMES])[0]
    wrong = reward(samples, prompt=[f"a photo of a {name}" for name in NAMES[1:] + NAMES[:1]])[0]
    assert (right > 0.5).sum() >= 7
    assert wrong.max() < 0.1


def test_it_is_the_softmax_of_transformers_own_logits(reward, samples):
    texts = competitors("a photo of a banana on a blue background")
    assert len(texts) == len(concepts()) == 256
    model = CLIPModel.from_pretrained(EMBEDDED_CLIP).float().eval()
    tokens = CLIPTokenizer.from_pretrained(EMBEDDED_CLIP)(
        list(texts), padding=True, return_tensors="pt"
    )
    with torch.no_grad():
        logits = model(**tokens, pixel_values=2 * samples.data - 1).logits_per_image
    expected = logits.softmax(dim=1)[:, 0]
    scores = reward(samples, prompt=[texts[0]] * len(samples))[0]
    torch.testing.assert_close(scores, expected, atol=1e-5, rtol=1e-3)


def test_a_prompt_competes_with_itself_about_everything_else():
    texts = competitors("A photo of a Cat on a blue background")
    assert texts[0] == "a photo of a cat on a blue background"
    assert "a photo of a dog on a blue background" in texts
    assert len(set(texts)) == 256
    assert find_concept("a photo of a green apple").group() == "green apple"
    assert find_concept("a race car").group() == "race car"
    assert find_concept("a caterpillar") is None
    assert len(competitors("something else")) == 257


def test_it_knows_what_the_embedded_checkpoint_draws():
    assert (
        list(concepts())
        == (EMBEDDED / "tiny" / "concepts.txt").read_text(encoding="utf-8").splitlines()
    )


def test_gradients_reach_the_pixels(reward, samples):
    x = samples.data[:2].clone().requires_grad_(True)
    score = reward(FlowTensor(x), prompt=["a photo of a dog", "a photo of a cat"])[0]
    (gradient,) = torch.autograd.grad(score.log().sum(), x)
    with torch.no_grad():
        better = reward(
            FlowTensor((x + 0.01 * gradient.sign()).clamp(0, 1)),
            prompt=["a photo of a dog", "a photo of a cat"],
        )[0]
    assert (better > score).all()


def test_the_card_says_what_was_measured_and_the_model_is_small():
    quality = json.loads((EMBEDDED_CLIP / "quality.json").read_text(encoding="utf-8"))
    card = (EMBEDDED_CLIP / "README.md").read_text(encoding="utf-8")
    for name in ("top1", "top1_disturbed", "probability", "background"):
        assert f"{quality['renderings'][name]:.2%}" in card
    assert sum(path.stat().st_size for path in EMBEDDED_CLIP.iterdir()) < 8e6
