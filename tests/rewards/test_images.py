"""Rewards of images that need no weights, against Pillow's own files, numpy, closed forms and
finite differences.
"""

import io

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from flowgym_gym import FlowTensor, reward_registry
from flowgym_gym.errors import OptionError, RewardError
from flowgym_gym.rewards.images import CompressionReward, IncompressionReward
from flowgym_gym.rewards.loading import load_reward

SMOOTH = ["red", "redness", "brightness", "colorfulness", "sharpness", "symmetry"]
WEIGHT_FREE = [*SMOOTH, "compression", "incompression"]


def pictures(n=5, height=12, width=16, seed=0):
    return torch.rand(n, 3, height, width, generator=torch.Generator().manual_seed(seed))


def plain(*colors):
    return torch.tensor(colors, dtype=torch.float32)[:, :, None, None].expand(-1, 3, 8, 8)


def score(name, images, **kwargs):
    return load_reward(f"images/{name}", **kwargs)(FlowTensor(images))[0]


def test_red_is_the_mean_of_the_channel_and_white_is_full_of_it():
    x = pictures()
    np.testing.assert_allclose(
        score("red", x).numpy(), x.numpy()[:, 0].mean(axis=(1, 2)), rtol=1e-6
    )
    assert score("red", plain((1, 1, 1))).item() == 1


def test_redness_is_highest_for_pure_red_and_0_for_every_grey():
    colors = plain((1, 0, 0), (0, 1, 1), (0.3, 0.3, 0.3), (1, 1, 1), (1, 1, 0))
    torch.testing.assert_close(score("redness", colors), torch.tensor([1.0, -1, 0, 0, 0.5]))


def test_brightness_is_pillows_luma():
    x = (255 * pictures()).round() / 255
    grey = [
        np.asarray(Image.fromarray(picture).convert("L"), dtype=float) for picture in as_bytes(x)
    ]
    np.testing.assert_allclose(
        score("brightness", x), np.mean(grey, axis=(1, 2)) / 255, atol=1 / 255
    )
    assert score("brightness", plain((1, 1, 1))).item() == pytest.approx(1)


def test_colorfulness_is_hasler_and_suesstrunks_formula():
    x = pictures()
    red, green, blue = 255 * x.double().numpy().transpose(1, 0, 2, 3).reshape(3, len(x), -1)
    rg, yb = red - green, 0.5 * (red + green) - blue
    spread, shift = np.hypot(rg.std(1), yb.std(1)), np.hypot(rg.mean(1), yb.mean(1))
    np.testing.assert_allclose(score("colorfulness", x), spread + 0.3 * shift, rtol=1e-5)
    assert score("colorfulness", plain((0.5, 0.5, 0.5))).item() == 0
    assert score("colorfulness", plain((1, 0, 0))).item() == pytest.approx(
        0.3 * np.hypot(255, 127.5)
    )


def test_sharpness_of_a_chessboard_is_16_and_of_a_ramp_0():
    chess = (torch.arange(10)[:, None] + torch.arange(10)[None]) % 2
    ramp = torch.linspace(0, 1, 10)[:, None].expand(10, 10)
    x = torch.stack([chess.float(), ramp, torch.full((10, 10), 0.7)])[:, None].expand(-1, 3, -1, -1)
    torch.testing.assert_close(
        score("sharpness", x), torch.tensor([16.0, 0, 0]), atol=1e-5, rtol=1e-5
    )


def test_sharpness_is_the_variance_of_a_convolution():
    x = pictures()
    kernel = torch.tensor([[0.0, 1, 0], [1, -4, 1], [0, 1, 0]])[None, None]
    y = (x * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(1, keepdim=True)
    expected = torch.nn.functional.conv2d(y, kernel).flatten(1).numpy().var(axis=1)
    np.testing.assert_allclose(score("sharpness", x), expected, rtol=1e-5)


def test_symmetry_compares_with_the_mirror_image():
    x = pictures()
    mirrored = np.stack(
        [
            np.asarray(Image.fromarray(p).transpose(Image.Transpose.FLIP_LEFT_RIGHT))
            for p in as_bytes(x)
        ]
    )
    expected = 1 - np.abs(mirrored.astype(float) - as_bytes(x)).mean(axis=(1, 2, 3)) / 255
    np.testing.assert_allclose(score("symmetry", x), expected, atol=1e-2)
    half = torch.cat([torch.zeros(1, 3, 8, 4), torch.ones(1, 3, 8, 4)], dim=3)
    assert score("symmetry", torch.cat([half, torch.ones(1, 3, 8, 8)])).tolist() == [0, 1]


def as_bytes(images, rounded=True):
    levels = 255 * images.permute(0, 2, 3, 1).numpy()
    return (levels.round() if rounded else levels).astype(np.uint8)


def jpeg(picture, **options):
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "JPEG", **options)
    return len(file.getvalue())


def test_bits_per_pixel_are_those_of_a_jpeg_of_quality_85():
    x = pictures()
    expected = [
        8 * jpeg(p, quality=85, optimize=True) / (12 * 16) for p in as_bytes(x, rounded=False)
    ]
    assert score("incompression", x).tolist() == pytest.approx(expected, rel=1e-6)
    assert score("compression", x).tolist() == pytest.approx([-size for size in expected], rel=1e-6)


def test_kilobytes_are_those_of_ddpo():
    x = pictures()
    expected = [jpeg(p, quality=95) / 1000 for p in as_bytes(x)]
    assert score("incompression", x, units="kilobytes").tolist() == pytest.approx(
        expected, rel=1e-6
    )
    assert score("compression", x, units="kilobytes").tolist() == pytest.approx(
        [-size for size in expected], rel=1e-6
    )
    assert jpeg(as_bytes(x)[0], quality=95) != jpeg(as_bytes(x)[0], quality=20)
    low = score("incompression", x, units="kilobytes", quality=20)
    assert low.tolist() == pytest.approx(
        [jpeg(p, quality=20) / 1000 for p in as_bytes(x)], rel=1e-6
    )


def test_many_jpegs_at_once_are_those_of_one_by_one():
    x = pictures(n=40)
    one_by_one = torch.cat([IncompressionReward()(FlowTensor(image[None]))[0] for image in x])
    torch.testing.assert_close(IncompressionReward()(FlowTensor(x))[0], one_by_one, rtol=0, atol=0)


def test_units_of_a_size_are_checked():
    with pytest.raises(OptionError, match="units is 'bytes', expected one of"):
        CompressionReward(units="bytes")
    with pytest.raises(OptionError, match="quality is 200, expected a whole number from 1 to 95"):
        CompressionReward(quality=200)


@pytest.mark.parametrize("name", SMOOTH)
def test_gradients_are_those_of_finite_differences(name):
    x = 0.1 + 0.8 * pictures(n=2, height=5, width=6).double()
    reward = load_reward(f"images/{name}")
    assert reward.differentiable
    x.requires_grad_(True)
    assert torch.autograd.gradcheck(lambda images: reward(FlowTensor(images))[0], (x,))


@pytest.mark.parametrize("name", SMOOTH)
def test_gradients_are_finite_where_a_picture_is_plain(name):
    x = plain((0.5, 0.5, 0.5)).clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(load_reward(f"images/{name}")(FlowTensor(x))[0].sum(), x)
    assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("name", WEIGHT_FREE)
@given(seed=st.integers(0, 10**6), contrast=st.sampled_from([0, 0.1, 1, 100]), plain=st.booleans())
def test_rewards_stay_in_their_range(name, seed, contrast, plain):
    x = pictures(n=3, height=1 if plain else 8, width=1 if plain else 8, seed=seed).expand(
        -1, -1, 8, 8
    )
    x = (0.5 + contrast * (x - 0.5)).clamp(0, 1)
    reward = load_reward(f"images/{name}")
    values, valids = reward(FlowTensor(x))
    low, high = reward.value_range
    assert ((values >= low - 1e-5) & (values <= high + 1e-5)).all()
    assert valids.all()
    assert reward.units


@pytest.mark.parametrize("name", WEIGHT_FREE)
def test_a_batch_is_scored_as_its_images(name):
    x = pictures(n=4)
    each = torch.cat([score(name, image[None]) for image in x])
    torch.testing.assert_close(score(name, x), each)


@pytest.mark.parametrize("name", WEIGHT_FREE)
def test_images_outside_0_to_1_are_named(name):
    x = pictures()
    x[3, 1, 2, 2] = 1.5
    with pytest.raises(
        RewardError, match=r"got image 3 with pixels from .* to 1\.5, expected \[0, 1\]"
    ) as caught:
        score(name, x)
    assert caught.value.sample == 3
    x[3, 1, 2, 2] = float("nan")
    with pytest.raises(RewardError, match="got image 3"):
        score(name, x)
    with pytest.raises(
        RewardError, match=r"samples of shape \(1, 8, 8\), expected float images \(3, H, W\)"
    ):
        score(name, torch.zeros(2, 1, 8, 8))


def test_every_weight_free_reward_is_registered():
    assert {f"images/{name}" for name in WEIGHT_FREE} <= set(reward_registry.list())
