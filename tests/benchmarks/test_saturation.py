"""The estimate of docs/scale.md is arithmetic over counted operations."""

import argparse
from pathlib import Path

import pytest
import torch

from benchmarks import saturation
from benchmarks.saturation import MODELS, Model, estimate, operations, policy_operations

ASSUMED = argparse.Namespace(
    accelerator=300.0, learner=5.0, overhead=4000.0, network=1.25, epochs=5, width=24
)


def test_an_estimate_by_hand():
    """A network of one matrix product: 2 * 10 * 20 * 30 operations, twice for guidance."""
    product = Model("product", (4, 64, 64), 2, lambda: torch.zeros(10, 20) @ torch.zeros(20, 30))
    row = estimate(product, ASSUMED)
    assert row["step"] == 2 * 12_000
    assert row["rate"] == pytest.approx(300e12 / 24_000)
    assert row["observation"] == 64 * 1024
    update = 5 * 3 * policy_operations((4, 64, 64), 24)
    assert row["updates"] == pytest.approx(1 / (1 / 4000 + update / 5e12))
    assert row["half"] * row["rate"] == pytest.approx(row["updates"])
    assert row["full_cable"] == pytest.approx(4 * row["full_cable_fine"])


def test_operations_of_a_policy_grow_with_the_latent():
    small, large = (policy_operations((4, side, side), 24) for side in (8, 64))
    convolutions = 2 * 2 * 64 * 9 * (4 * 24 + 2 * 24 * 24)
    assert convolutions < small < 1.1 * convolutions
    assert large == pytest.approx(64 * small, rel=0.1)


@pytest.mark.second
def test_stable_diffusion_has_the_published_operations():
    with torch.device("meta"):
        assert operations(MODELS[0].call) / 1e12 == pytest.approx(0.80, abs=0.02)


@pytest.mark.second
def test_the_page_has_what_the_command_prints(capsys):
    saturation.main([])
    page = (Path(__file__).parents[2] / "docs" / "scale.md").read_text(encoding="utf-8")
    assert capsys.readouterr().out.strip() in page
