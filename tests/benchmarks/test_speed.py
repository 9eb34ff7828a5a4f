"""The benchmark runs, and its figures mean what they say; no test asserts a time."""

import json
import time
from contextlib import contextmanager

import pytest
import torch

from benchmarks.__main__ import save, table
from benchmarks.full_size import build
from benchmarks.measure import compare, inside_the_network, machine
from benchmarks.plot import draw
from benchmarks.rows import BARE, ROWS, Case, Row, available

TINY = Case("tiny", num_envs=2, steps=2)


@pytest.mark.parametrize(
    "row",
    [
        pytest.param(row, marks=pytest.mark.second if row.key == "ppo" else (), id=row.key)
        for row in ROWS
        if row.key not in ("diffusiongym", "async", "compiled")
    ],
)
def test_every_row_denoises_the_same_batch(row):
    batches = []
    handle = TINY.pipe.unet.register_forward_hook(
        lambda module, args, output: batches.append(len(args[0]))
    )
    try:
        with row.open(TINY) as episode:
            batches.clear()
            steps = episode()
    finally:
        handle.remove()
    assert steps == sum(batches)
    assert steps == 4 or (row.key == "ppo" and steps % 4 == 0)
    assert set(batches) == {1 if row.key == "sync" else 2}


def test_a_ratio_is_that_of_times_in_one_round(monkeypatch):
    """On a clock that only the episodes move, and on a machine that becomes slower from round to
    round.
    """
    now = [0.0]
    monkeypatch.setattr("benchmarks.measure.time.perf_counter", lambda: now[0])

    def worker(seconds):
        @contextmanager
        def opened(case):
            calls = []

            def episode():
                calls.append(1)
                now[0] += seconds * 10 ** len(calls)
                return 10

            yield episode

        return opened

    rows = [Row(BARE, "bare", worker(1.0)), Row("slow", "slow", worker(4.0))]
    results = compare(rows, TINY, rounds=3)
    assert results[BARE]["ratio"] == 1
    for name in ("ratio", "ratio_low", "ratio_high"):
        assert results["slow"][name] == pytest.approx(4)
    # The first two runs are not counted: the median round is the fourth run.
    assert results[BARE]["steps_per_second"] == pytest.approx(10 / 10_000)
    assert results["slow"]["outside_network"] == 1  # it never called the network


def test_time_inside_the_network_is_that_of_its_calls():
    pipe = TINY.pipe
    with inside_the_network(TINY) as seconds, torch.inference_mode():
        start = time.perf_counter()
        pipe.unet(
            torch.zeros(1, 4, 8, 8), 1, torch.zeros(1, 32, pipe.unet.config.cross_attention_dim)
        )
        whole = time.perf_counter() - start
        once = seconds[0]
        pipe.vae.decode(torch.zeros(1, 4, 8, 8))
        assert 0 < once <= whole
        assert seconds[0] > once
    assert "forward" not in vars(pipe.unet)


@pytest.mark.second
def test_results_are_kept_by_case_and_drawn(tmp_path):
    path = tmp_path / "results" / "here.json"
    rows = [row for row in ROWS if row.key in (BARE, "vector")]
    assert all(available(row) for row in rows)
    for num_envs in (2, 1, 2):
        entry = {
            "checkpoint": "tiny",
            "num_envs": num_envs,
            "steps": 1,
            "rounds": 1,
            "dtype": "float32",
        }
        entry["rows"] = compare(rows, Case("tiny", num_envs, 1), rounds=1)
        save(path, {**entry, "machine": machine("cpu")})
    saved = json.loads(path.read_text())
    assert [entry["num_envs"] for entry in saved["comparisons"]] == [1, 2]
    assert saved["comparisons"][0]["machine"]["versions"]["torch"] == str(torch.__version__)
    assert "| DenoisingVectorEnv |" in table(saved["comparisons"][0])
    draw(saved, "tiny", tmp_path / "scaling.png")
    assert (tmp_path / "scaling.png").stat().st_size > 10_000
    with pytest.raises(SystemExit, match="no comparison on 'other'"):
        draw(saved, "other", tmp_path / "other.png")


def test_the_full_size_architecture_is_that_of_stable_diffusion():
    """On the meta device, which holds no weights: the parameter counts of the published checkpoint."""
    counts = {}

    def counted(pipe, folder):
        counts.update(
            {
                name: sum(p.numel() for p in part.parameters())
                for name, part in pipe.components.items()
                if isinstance(part, torch.nn.Module)
            }
        )

    from unittest.mock import patch

    from diffusers import StableDiffusionPipeline

    with (
        patch.object(StableDiffusionPipeline, "save_pretrained", counted),
        patch.object(StableDiffusionPipeline, "to", lambda self, dtype: self),
        torch.device("meta"),
    ):
        build(None)
    assert counts == {"unet": 859_520_964, "vae": 83_653_863, "text_encoder": 123_060_480}
