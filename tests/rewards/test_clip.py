"""Rewards of CLIP models, against transformers' own forward on small models that the tests build
and save.
"""

import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPModel, CLIPTokenizer
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

import flowgym_gym
from flowgym_gym import FlowTensor
from flowgym_gym.errors import CheckpointError, OptionError, RewardError
from flowgym_gym.rewards.clip import CLIP, AestheticReward, CLIPScoreReward, PickScoreReward
from flowgym_gym.rewards.loading import load_reward
from tests.rewards.small_weights import PREPROCESSOR, SIZE, save_clip, save_heads, save_processor

TEXTS = [
    "a photo of a cat",
    "a red heart",
    "a photo of a dog on a blue background, and a cat in a hat with a very big fish",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    save_clip(folder / "clip")
    save_heads(folder / "heads")
    return folder


def pictures(n=3, height=SIZE, width=SIZE):
    smooth = torch.rand(n, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    images = torch.nn.functional.interpolate(smooth, size=(height, width), mode="bilinear")
    return (255 * images).round() / 255


def inputs_of(folder, images, texts):
    """Tokens and pixels as transformers prepares them from Pillow's pictures."""
    rgb = (255 * images).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    processor = CLIPImageProcessorPil.from_pretrained(folder)
    pixels = processor(
        [Image.fromarray(picture) for picture in rgb], return_tensors="pt"
    ).pixel_values
    tokens = CLIPTokenizer.from_pretrained(folder)(
        texts, padding="max_length", truncation=True, max_length=16, return_tensors="pt"
    )
    return {**tokens, "pixel_values": pixels}


@torch.no_grad()
def logits(folder, images, texts):
    model = CLIPModel.from_pretrained(folder).eval()
    return model(
        **inputs_of(folder, images, texts)
    ).logits_per_image.diagonal(), model.logit_scale.exp()


def test_clip_score_is_the_cosine_of_transformers_own_forward(folder):
    clip = folder / "clip"
    x = pictures()
    expected, scale = logits(clip, x, TEXTS)
    scores, valids = CLIPScoreReward(str(clip))(FlowTensor(x), prompt=TEXTS)
    assert expected.std() > 0.5
    torch.testing.assert_close(scores, expected / scale, atol=2e-6, rtol=1e-5)
    assert valids.all()
    for units, formula in {
        "percent": 100 * scores.clamp(min=0),
        "hessel": 2.5 * scores.clamp(min=0),
    }.items():
        other = CLIPScoreReward(str(clip), units=units, batch_size=2)
        torch.testing.assert_close(other(FlowTensor(x), prompt=TEXTS)[0], formula)


@pytest.mark.parametrize(("height", "width"), [(48, 48), (40, 72), (72, 40), (20, 24)])
def test_pictures_of_other_sizes_are_resized_and_cropped_as_transformers_does(
    folder, height, width
):
    clip = folder / "clip"
    x = pictures(height=height, width=width)
    reward = CLIPScoreReward(str(clip))
    ours = reward.clip.prepare(x)
    theirs = inputs_of(clip, x, TEXTS)["pixel_values"]
    assert ours.shape == theirs.shape
    # Pillow rounds to one of 256 grey levels after each direction, of which the spread is 0.26.
    assert (ours - theirs).abs().max() < 2 / 255 / 0.26
    expected, scale = logits(clip, x, TEXTS)
    torch.testing.assert_close(
        reward(FlowTensor(x), prompt=TEXTS)[0], expected / scale, atol=2e-2, rtol=0
    )


def test_pickscore_is_the_logit_of_the_model_with_the_other_repositorys_processor(folder, tmp_path):
    model, processor = tmp_path / "model", tmp_path / "processor"
    save_clip(model)
    save_processor(processor)
    for name in ("tokenizer.json", "tokenizer_config.json", "preprocessor_config.json"):
        (model / name).unlink()
    x = pictures()
    expected, scale = logits(folder / "clip", x, TEXTS)
    reward = PickScoreReward(str(model), str(processor), batch_size=2)
    torch.testing.assert_close(
        reward(FlowTensor(x), prompt=TEXTS)[0], expected, atol=1e-4, rtol=1e-5
    )
    assert reward.value_range == pytest.approx((-scale.item(), scale.item()))
    with pytest.raises(CheckpointError, match="could not be loaded"):
        PickScoreReward(str(model))


@pytest.mark.parametrize("predictor", ["mlp", "linear"])
def test_aesthetic_is_the_published_head_on_the_unit_embedding(folder, tmp_path, predictor):
    heads = dict(zip(["mlp", "linear"], save_heads(tmp_path), strict=True))
    x, clip = pictures(), folder / "clip"
    with torch.no_grad():
        features = CLIPModel.from_pretrained(clip).eval()(**inputs_of(clip, x, TEXTS)).image_embeds
        expected = heads[predictor](features / features.norm(dim=1, keepdim=True))[:, 0]
    reward = AestheticReward(str(clip), str(tmp_path / f"{predictor}.pth"), predictor, batch_size=2)
    torch.testing.assert_close(reward(FlowTensor(x))[0], expected, atol=1e-5, rtol=1e-5)
    if predictor == "mlp":
        safe = AestheticReward(str(clip), str(tmp_path / "mlp.safetensors"))
        torch.testing.assert_close(safe(FlowTensor(x))[0], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("head", "predictor"), [("linear", "mlp"), ("mlp", "linear")])
def test_the_two_aesthetic_heads_are_never_mixed_up(folder, head, predictor):
    with pytest.raises(
        CheckpointError, match=f"is the '{head}' predictor, but predictor is '{predictor}'"
    ):
        AestheticReward(str(folder / "clip"), str(folder / "heads" / f"{head}.pth"), predictor)
    with pytest.raises(OptionError, match="predictor is 'v1', expected one of"):
        AestheticReward(str(folder / "clip"), str(folder / "heads" / "mlp.pth"), "v1")


def test_a_head_for_another_clip_is_named(folder, tmp_path):
    torch.save(torch.nn.Linear(768, 1).state_dict(), tmp_path / "head.pth")
    with pytest.raises(CheckpointError, match=r"does not fit CLIP's 12 features: .*768"):
        AestheticReward(str(folder / "clip"), str(tmp_path / "head.pth"), "linear")


class Bomb:
    def __reduce__(self):
        return (exec, ("raise SystemExit('code of a pickle has run')",))


@pytest.mark.parametrize("content", [Bomb(), {"weight": Bomb()}])
def test_a_head_that_would_run_code_is_refused(folder, tmp_path, content):
    (tmp_path / "plain.pth").write_bytes(pickle.dumps(content))
    torch.save(content, tmp_path / "zipped.pth")
    for name in ("plain.pth", "zipped.pth"):
        with pytest.raises(CheckpointError, match="cannot be read as weights"):
            AestheticReward(str(folder / "clip"), str(tmp_path / name))


def test_a_clip_without_safetensors_is_refused(folder, tmp_path):
    save_clip(tmp_path)
    torch.save(load_file(tmp_path / "model.safetensors"), tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(
        CheckpointError, match=r"no safetensors weights, only \['pytorch_model.bin'\]"
    ):
        CLIPScoreReward(str(tmp_path))


# What may be wrong with the weights of a CLIP, and what is said of it.
PARTIAL_CLIPS = {
    "the texts' tower alone": (
        lambda name: name if "vision" not in name else None,
        r"missing: 39 weights \(vision_model",
    ),
    "other names": (
        lambda name: f"x.{name}",
        r"missing: 78 weights .*; left over: 78 weights \(x\.",
    ),
    "a layer more": (lambda name: name.replace("layers.1", "layers.2"), r"missing: 32 weights"),
    "no scale": (
        lambda name: None if name == "logit_scale" else name,
        r"missing: 1 weight \(logit_scale\)",
    ),
}


@pytest.mark.parametrize(("rename", "message"), PARTIAL_CLIPS.values(), ids=PARTIAL_CLIPS)
def test_a_clip_that_is_not_all_there_is_named(rename, message, folder, tmp_path):
    save_clip(tmp_path / "clip")
    save_heads(tmp_path / "heads")
    tensors = load_file(tmp_path / "clip" / "model.safetensors")
    kept = {rename(name): value for name, value in tensors.items() if rename(name)}
    save_file(kept, tmp_path / "clip" / "model.safetensors", {"format": "pt"})
    for opening in (
        lambda: CLIPScoreReward(str(tmp_path / "clip")),
        lambda: PickScoreReward(str(tmp_path / "clip")),
        lambda: AestheticReward(str(tmp_path / "clip"), str(tmp_path / "heads" / "mlp.pth")),
        lambda: CLIP(str(tmp_path / "clip"), local=True),
    ):
        with pytest.raises(CheckpointError, match=f"does not fill a CLIPModel; {message}"):
            opening()


def test_a_clip_with_more_layers_than_its_configuration_is_named(tmp_path):
    save_clip(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    more = {name.replace("layers.1", "layers.2"): value.clone() for name, value in tensors.items()}
    save_file(tensors | more, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        CheckpointError, match=r"holds more than the CLIPModel .*left over: 32 weights"
    ):
        CLIPScoreReward(str(tmp_path))


def test_a_clip_without_a_tokenizer_is_refused(tmp_path):
    save_clip(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError):
        CLIPScoreReward(str(tmp_path))


@pytest.mark.parametrize(
    ("reward", "argument", "example"),
    [
        ("images/clip_score", "weights", "openai/clip-vit-large-patch14"),
        ("images/pickscore", "weights", "yuvalkirstain/PickScore_v1"),
        ("images/aesthetic", "head", "trl-lib/ddpo-aesthetic-predictor:aesthetic-model.pth"),
    ],
)
def test_missing_weights_say_where_they_are_looked_for_and_how_to_name_them(
    reward, argument, example
):
    with pytest.raises(CheckpointError, match=r"never looks for them by itself; .*" + example):
        load_reward(reward)
    with pytest.raises(
        CheckpointError,
        match=rf"{argument} '\./nowhere' was not found, looked for .*nowhere.*{example}",
    ):
        load_reward(reward, **{argument: "./nowhere"})
    with pytest.raises(CheckpointError, match=f"{argument} is 3"):
        load_reward(reward, **{argument: 3})


def test_a_hub_id_is_asked_for_on_the_hub_and_its_absence_is_an_error():
    # Tests run with HF_HUB_OFFLINE=1, so nothing can be had from there.
    with pytest.raises(
        CheckpointError, match="'openai/clip-vit-large-patch14' could not be loaded"
    ):
        load_reward("images/clip_score", weights="openai/clip-vit-large-patch14")


def test_scores_need_a_prompt_for_each_picture(folder):
    reward = CLIPScoreReward(str(folder / "clip"))
    with pytest.raises(RewardError, match="CLIPScoreReward needs the prompt of each sample"):
        reward(FlowTensor(pictures()))
    with pytest.raises(RewardError, match="expected a list of 3 strings"):
        reward(FlowTensor(pictures()), prompt=["a cat"])
    with pytest.raises(RewardError, match="empty prompt for image 1"):
        reward(FlowTensor(pictures()), prompt=["a cat", " ", "a dog"])
    with pytest.raises(RewardError, match=r"expected \[0, 1\]"):
        reward(FlowTensor(2 * pictures()), prompt="a cat")


def test_a_model_without_prompts_gets_an_error_with_a_cure(folder):
    from tests.rewards.toys import GreyModel

    reward = CLIPScoreReward(str(folder / "clip"))
    env = flowgym_gym.VelocityEnvironment(GreyModel(), reward, discretization_steps=2)
    with pytest.raises(RewardError, match="the base model gives none; use a model with prompts"):
        env.sample(2)


@pytest.mark.parametrize("name", ["clip_score", "pickscore", "aesthetic"])
def test_gradients_reach_the_pixels(folder, name):
    kwargs = {"weights": str(folder / "clip")}
    if name == "aesthetic":
        kwargs = {"clip": str(folder / "clip"), "head": str(folder / "heads" / "mlp.pth")}
    reward = load_reward(f"images/{name}", **kwargs)
    assert reward.differentiable
    with torch.inference_mode():  # What is kept from here must not spoil gradients.
        reward(FlowTensor(pictures(n=1)), prompt=TEXTS[:1])
    x = (0.1 + 0.8 * pictures(n=1, height=40, width=40)).requires_grad_(True)
    score = reward(FlowTensor(x), prompt=TEXTS[:1])[0]
    (gradient,) = torch.autograd.grad(score.sum(), x)
    step = 5e-4 * gradient / gradient.norm()
    with torch.no_grad():
        ends = [reward(FlowTensor(x + sign * step), prompt=TEXTS[:1])[0].item() for sign in (1, -1)]
    assert ends[0] - ends[1] == pytest.approx(2 * 5e-4 * gradient.norm().item(), rel=0.03)
    assert gradient.abs().max() > 0


def test_the_preparation_is_checked():
    from flowgym_gym.rewards.clip import Preparation

    with pytest.raises(
        CheckpointError, match=r"preprocessor_config\.json is not that of a CLIP model"
    ):
        Preparation({**PREPROCESSOR, "resample": 7})
    x = pictures()
    whole = Preparation({**PREPROCESSOR, "do_center_crop": False})(x)
    mean, std = np.array(PREPROCESSOR["image_mean"]), np.array(PREPROCESSOR["image_std"])
    expected = (x.numpy() - mean[:, None, None]) / std[:, None, None]
    np.testing.assert_allclose(whole.numpy(), expected, rtol=1e-4, atol=1e-5)
