"""Pictures per second mean what they say; no test asserts a time."""

import json

import pytest
import torch
from diffusers import UNet2DConditionModel

from benchmarks import throughput
from benchmarks.rows import Case

TINY = Case("tiny", num_envs=2, steps=2)


def test_operations_of_the_network_are_those_of_a_convolution_by_hand():
    """Twice as many pictures and steps are not more operations per picture and step; one layer is
    known.
    """
    flops = throughput.network_flops(TINY)
    assert flops == throughput.network_flops(Case("tiny", num_envs=1, steps=1))
    unet = TINY.pipe.unet
    first = unet.conv_in
    unet_without = UNet2DConditionModel.from_config(unet.config)
    # A 1x1 first layer instead of 3x3: eight ninths of its multiplications and additions less.
    unet_without.conv_in = torch.nn.Conv2d(first.in_channels, first.out_channels, 1)
    by_hand = 2 * 8 * first.in_channels * first.out_channels * unet.config.sample_size**2
    changed = Case("tiny", 2, 2)
    pipe = type("Pipe", (), {"unet": unet_without.eval()})()
    type(changed).pipe, kept = property(lambda self: pipe), type(changed).pipe
    try:
        assert flops - throughput.network_flops(changed) == by_hand
    finally:
        type(changed).pipe = kept


def test_the_peak_is_at_least_what_a_product_reaches():
    assert throughput.matrix_peak("cpu", "float32", repeats=2) > 0


@pytest.mark.second
def test_variants_give_the_pictures_of_the_plain_environment(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(throughput, "RESULTS", tmp_path)
    monkeypatch.setattr(throughput, "MATRIX_SIZES", {"cpu": (64,)})
    names = list(throughput.VARIANTS)[:2]
    rewards = []
    for name in names:
        sample = throughput.prepared(TINY, *throughput.VARIANTS[name])
        torch.manual_seed(0)
        rewards.append(sample())
    torch.testing.assert_close(rewards[0], rewards[1], rtol=1e-4, atol=1e-4)
    arguments = [
        "--checkpoint",
        "tiny",
        "--batch",
        "1",
        "2",
        "--steps",
        "2",
        "--rounds",
        "1",
        "--name",
        "here",
    ]
    monkeypatch.setattr("sys.argv", ["throughput", *arguments, "--variants", *names])
    throughput.main()
    results = json.loads((tmp_path / "throughput-here.json").read_text())
    assert list(results["batches"]) == ["1", "2"]
    rows = results["batches"]["2"]
    assert list(rows) == [throughput.EAGER, *names]
    flops = throughput.network_flops(TINY)
    for values in rows.values():
        steps_per_second = 2 * values["pictures_per_second"]
        assert values["share_of_peak"] == pytest.approx(
            flops * steps_per_second / 1e12 / results["peak_tflops"]
        )
    assert f"| {throughput.EAGER} |" in capsys.readouterr().out
