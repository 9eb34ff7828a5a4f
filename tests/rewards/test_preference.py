"""ImageReward and HPSv2 without their packages, on small models of their architectures.

Each score is compared with a forward in plain torch (``published.py``), and with what the released
packages themselves give to the same weights (``published_scores.py`` prints the numbers).
"""

import gymnasium
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch.nn import functional
from transformers import CLIPTokenizer

from flowgym_gym import FlowTensor
from flowgym_gym.errors import CheckpointError
from flowgym_gym.rewards.loading import load_reward
from flowgym_gym.rewards.preference import cover
from tests.rewards import published
from tests.rewards.published_scores import PROMPTS, SCORES, SIZES
from tests.rewards.small_weights import TOKENIZER, save_hpsv2, save_image_reward

IDS = ["images/hpsv2", "images/image_reward"]


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    folder = tmp_path_factory.mktemp("preference")
    return {
        "images/hpsv2": save_hpsv2(folder / "hps"),
        "images/image_reward": save_image_reward(folder / "blip"),
    }


def expected(id, images, prompts):
    """Scores by the model in plain torch, of normalised pixels of the right size."""
    if id == "images/hpsv2":
        tokenizer = CLIPTokenizer.from_pretrained(TOKENIZER)
        tokens = torch.zeros(len(prompts), published.CLIP["length"], dtype=torch.int64)
        for row, prompt in zip(tokens, prompts, strict=True):
            ids = tokenizer(prompt, truncation=True, max_length=len(row)).input_ids
            row[: len(ids)] = torch.tensor(ids)
        return published.fill(published.OpenCLIP(len(tokenizer)))(images, tokens)
    words = {word: i for i, word in enumerate(published.WORDS)}
    tokens = torch.zeros(len(prompts), 35, dtype=torch.int64)
    for row, prompt in zip(tokens, prompts, strict=True):
        ids = [words["[CLS]"], *(words.get(word, 1) for word in prompt.replace(",", " ,").split())][
            :34
        ]
        row[: len(ids) + 1] = torch.tensor([*ids, words["[SEP]"]])
    return published.fill(published.ImageReward())(images, tokens, tokens != 0)


@pytest.mark.parametrize("id", IDS)
def test_scores_are_those_of_the_architecture_in_plain_torch(weights, id):
    reward = load_reward(id, **weights[id], batch_size=2)
    images = published.pictures()
    with torch.no_grad():
        scores = expected(id, published.normalized(images), PROMPTS)
    assert scores.std() > 0.05
    torch.testing.assert_close(
        reward(FlowTensor(images), prompt=PROMPTS)[0], scores, rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("kind", SIZES)
@pytest.mark.parametrize("id", IDS)
def test_scores_are_those_of_the_released_package(weights, id, kind):
    height, width = SIZES[kind]
    images = published.pictures(height=height, width=width)
    scores, _ = load_reward(id, **weights[id])(FlowTensor(images), prompt=PROMPTS)
    # Pillow rounds the pictures that ImageReward resizes to 8 bits.
    tolerance = 0.025 if id == "images/image_reward" and kind != "fitting" else 1e-5
    torch.testing.assert_close(scores, torch.tensor(SCORES[id][kind]), rtol=1e-4, atol=tolerance)


@pytest.mark.parametrize(("height", "width"), [(64, 64), (40, 64), (51, 35), (20, 24)])
def test_image_reward_crops_the_middle_as_pillow_resizes_it(height, width):
    images = published.pictures(1, height, width)
    picture = Image.fromarray((255 * images[0]).round().to(torch.uint8).permute(1, 2, 0).numpy())
    short = min(height, width)
    picture = picture.resize((int(32 * width / short), int(32 * height / short)), Image.BICUBIC)
    # torchvision's CenterCrop.
    left, top = (round((side - 32) / 2) for side in picture.size)
    pixels = np.asarray(picture.crop((left, top, left + 32, top + 32)))
    np.testing.assert_allclose(255 * cover(images, 32)[0].permute(1, 2, 0), pixels, atol=1.2)


def test_hpsv2_puts_black_beside_pictures_that_are_not_square(weights):
    reward = load_reward("images/hpsv2", **weights["images/hpsv2"])
    wide = published.pictures(height=40, width=64)
    scores, _ = reward(FlowTensor(wide), prompt=PROMPTS)
    small = functional.interpolate(wide, size=(20, 32), mode="bicubic", antialias=True)
    black = functional.pad(small, (0, 0, 6, 6))
    with torch.no_grad():
        torch.testing.assert_close(
            scores, expected("images/hpsv2", published.normalized(black), PROMPTS)
        )


@pytest.mark.parametrize("id", IDS)
def test_gradients_reach_the_pixels(weights, id):
    reward = load_reward(id, **weights[id])
    images = published.pictures().requires_grad_()
    reward(FlowTensor(images), prompt=PROMPTS)[0].sum().backward()
    mine, images.grad = images.grad.clone(), None
    expected(id, published.normalized(images), PROMPTS).sum().backward()
    assert images.grad.abs().max() > 1e-4
    torch.testing.assert_close(mine, images.grad, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("id", IDS)
def test_the_same_weights_as_safetensors_score_the_same(weights, id, tmp_path):
    tensors = torch.load(weights[id]["weights"], weights_only=True)
    save_file(tensors.get("state_dict", tensors), tmp_path / "w.safetensors")
    x = FlowTensor(published.pictures())
    scores = [
        load_reward(id, **{**weights[id], **changes})(x, prompt=PROMPTS)[0]
        for changes in ({}, {"weights": str(tmp_path / "w.safetensors")})
    ]
    torch.testing.assert_close(*scores, rtol=0, atol=0)


@pytest.mark.parametrize("id", IDS)
def test_an_episode_is_paid_the_score(weights, id):
    env = gymnasium.make(
        "flowgym/Denoising-v0",
        reward=id,
        reward_kwargs=weights[id],
        discretization_steps=2,
        render_mode="rgb_array",
    )
    env.reset(seed=0)
    for _ in range(2):
        *_, info = env.step(0 * env.action_space.sample())
    picture = torch.from_numpy(env.render()).permute(2, 0, 1)[None] / 255
    scores, _ = load_reward(id, **weights[id])(FlowTensor(picture), prompt=["a photo of a cat"])
    assert info["terminal_reward"] == pytest.approx(scores.item(), abs=0.02)


class Bomb:
    def __reduce__(self):
        return (exec, ("raise SystemExit('code of a pickle has run')",))


@pytest.mark.parametrize("id", IDS)
def test_a_checkpoint_that_would_run_code_is_refused(weights, id, tmp_path):
    torch.save({"state_dict": {"w": Bomb()}}, tmp_path / "weights.pt")
    with pytest.raises(CheckpointError, match="cannot be read as weights"):
        load_reward(id, **{**weights[id], "weights": str(tmp_path / "weights.pt")})


@pytest.mark.parametrize("id", IDS)
def test_the_checkpoint_of_another_model_is_named(weights, id, tmp_path):
    other = weights[IDS[1 - IDS.index(id)]]["weights"]
    with pytest.raises(
        CheckpointError, match=r"is not ImageReward: it has no embeddings|missing: 78 weights"
    ):
        load_reward(id, **{**weights[id], "weights": other})
    tensors = torch.load(weights[id]["weights"], weights_only=True)
    tensors = tensors.get("state_dict", tensors)
    name = (
        "visual.ln_pre.bias"
        if id == "images/hpsv2"
        else "blip.text_encoder.embeddings.LayerNorm.bias"
    )
    torch.save({**tensors, name: torch.zeros(3)}, tmp_path / "shape.pt")
    with pytest.raises(
        CheckpointError, match=r"does not fit a .* has shape \(3,\), expected \((16|64),\)"
    ):
        load_reward(id, **{**weights[id], "weights": str(tmp_path / "shape.pt")})
    del tensors[name]
    torch.save(tensors, tmp_path / "missing.pt")
    with pytest.raises(CheckpointError, match=r"missing: 1 weight \("):
        load_reward(id, **{**weights[id], "weights": str(tmp_path / "missing.pt")})


def test_a_deeper_hpsv2_than_its_configuration_is_named(weights, tmp_path):
    tensors = torch.load(weights["images/hpsv2"]["weights"], weights_only=True)["state_dict"]
    more = {name.replace("resblocks.1", "resblocks.2"): value for name, value in tensors.items()}
    torch.save(tensors | more, tmp_path / "deeper.pt")
    with pytest.raises(
        CheckpointError, match=r"holds more than the CLIPModel .*left over: 32 weights"
    ):
        load_reward(
            "images/hpsv2", **{**weights["images/hpsv2"], "weights": str(tmp_path / "deeper.pt")}
        )


@pytest.mark.parametrize("id", IDS)
def test_what_is_not_named_is_not_looked_for(weights, id, tmp_path):
    other = next(name for name in weights[id] if name != "weights")
    with pytest.raises(
        CheckpointError,
        match="never looks for them by itself; name a local file, or one on the Hub",
    ):
        load_reward(id)
    with pytest.raises(CheckpointError, match=r"looked for in .*nowhere"):
        load_reward(id, weights="nowhere.pt")
    with pytest.raises(CheckpointError, match=f"needs {other} and never looks for"):
        load_reward(id, weights=weights[id]["weights"])
    with pytest.raises(CheckpointError, match=r"has no (config\.json|tokenizer)"):
        load_reward(id, **{**weights[id], other: str(tmp_path)})


def test_words_are_split_as_uncased_bert_does(weights):
    """The tokens that :func:`expected` writes out by hand."""
    tokenizer = load_reward("images/image_reward", **weights["images/image_reward"]).tokenizer
    assert tokenizer.tokenize("A photo of cats, a unicorn") == [
        "a",
        "photo",
        "of",
        "cat",
        "##s",
        ",",
        "a",
        "[UNK]",
    ]
