"""Consoles, shells and matplotlib's settings that a training must not depend on."""

import io
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from PIL import Image

import flowgym_gym
from flowgym_gym import cli, console
from flowgym_gym.agents.frontier.report import _described
from flowgym_gym.agents.runs import progress
from flowgym_gym.agents.runs.bars import Bar
from flowgym_gym.agents.runs.episodes import Episodes
from flowgym_gym.agents.runs.pictures import picture_grid
from flowgym_gym.cli import _texts, main
from tests.agents.conftest import assignments, tiny
from tests.conftest import RED

PACKAGE = Path(flowgym_gym.__file__).parent
EMOJI = "a red heart ❤\U0001f525"
# It draws as a run does, and tells what a notebook would find afterwards.
DRAWING = """
import os, sys
from flowgym_gym.agents.runs import drawing
figure = drawing.Figure()
figure.subplots().plot([1, 2])
figure.savefig(sys.argv[1])
import matplotlib
print(os.environ["MPLBACKEND"], dict.get(matplotlib.rcParams, "backend"))
"""


@pytest.mark.second
@pytest.mark.parametrize(
    ("backend", "known"),
    [
        ("module://matplotlib_inline.backend_inline", False),
        ("nonsense", False),
        ("TkAgg", True),
        ("svg", True),
    ],
)
def test_pictures_are_drawn_whatever_backend_the_shell_names(backend, known, tmp_path):
    environment = {**os.environ, "MPLBACKEND": backend}
    environment.pop("DISPLAY", None)
    done = subprocess.run(
        [sys.executable, "-c", DRAWING, str(tmp_path / "x.png")],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    with Image.open(tmp_path / "x.png") as picture:
        assert picture.format == "PNG"
    # What the user draws in the same process goes where matplotlib alone would have sent it.
    assert done.stdout.split()[0] == backend
    if known:
        assert done.stdout.split()[1] == backend


def test_matplotlib_is_imported_in_one_place():
    found = [
        path.name
        for path in PACKAGE.rglob("*.py")
        if re.search(
            r"^(?!if)\s{0,3}(from|import) matplotlib", path.read_text(encoding="utf-8"), re.M
        )
    ]
    assert found == []


@pytest.mark.second
def test_a_damaged_matplotlibrc_is_an_error_that_names_it(tmp_path):
    (tmp_path / "matplotlibrc").write_bytes(b"\xff\xfe")
    done = subprocess.run(
        [sys.executable, "-c", "import flowgym_gym.agents.runs.drawing"],
        env={**os.environ, "MATPLOTLIBRC": str(tmp_path), "MPLCONFIGDIR": str(tmp_path)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert "MissingExtraError: matplotlib cannot be imported: UnicodeDecodeError" in done.stderr


def grid(path, prompts):
    values = np.array([0.25, 0.5])
    pictures = [np.zeros((8, 8, 3), np.uint8)] * 2
    picture_grid(path, [("two", Episodes(values, values, values, values > 0, pictures, prompts))])
    return path.read_bytes()


def test_the_users_styles_change_no_picture_of_a_run_and_stay_as_they_are(tmp_path):
    plain = grid(tmp_path / "plain.png", ["a cat", "a dog"])
    changes = {
        "text.usetex": True, "figure.facecolor": "black", "savefig.dpi": 7, "font.size": 30,
    }  # fmt: skip
    with matplotlib.rc_context(changes):
        assert grid(tmp_path / "other.png", ["a cat", "a dog"]) == plain
        assert {name: matplotlib.rcParams[name] for name in changes} == changes


def test_any_prompt_can_be_written_above_a_picture(tmp_path):
    prompts = [
        EMOJI,
        "$x_1$ costs $5 and 50 %",
        "half an emoji \ud83d",
        r"\frac{1}{",
        "_^{}$$",
        "\0\x1b[31m",
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for prompt in prompts:
            grid(tmp_path / "grid.png", [prompt, "a cat"])
    assert _described({"prompts": "$\\frac$"}) == "\nprompts=\\$\\frac\\$"


class Closed(io.StringIO):
    """A stream whose reader has gone."""

    def write(self, text):
        raise BrokenPipeError(32, "Broken pipe")

    def isatty(self):
        return True


def cp1252():
    return io.TextIOWrapper(io.BytesIO(), encoding="cp1252", newline="\n")


def closed():
    stream = io.StringIO()
    stream.close()
    return stream


@pytest.mark.parametrize("make", [cp1252, Closed, closed, io.StringIO, lambda: None])
def test_saying_something_never_fails(make, monkeypatch):
    monkeypatch.setattr(sys, "stderr", make())
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    console.say(EMOJI)
    progress.Progress(10, 0, True).update(
        3, dict.fromkeys(["terminal_reward", "control_cost", "return"], 1.0)
    )
    bar = Bar(3)
    bar.update(1, {"reward": EMOJI})
    bar.close()
    assert sys.stdout.getvalue() == ""


@pytest.mark.parametrize("encoding", ["cp1252", "ascii"])
def test_a_prompt_that_the_console_cannot_write_is_trained_on_and_evaluated(
    encoding, tmp_path, monkeypatch
):
    out = io.TextIOWrapper(io.BytesIO(), encoding=encoding, newline="\n")
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(io.BytesIO(), encoding=encoding))
    monkeypatch.setattr(cli, "EPISODES", 4)
    run = tmp_path / "run"
    prompts = f'--set=env.prompts=["{EMOJI}", "a dog"]'
    command = ["train", RED, "--timesteps", "8", "--num-envs", "2", "--out", str(run), prompts]
    assert main([*command, *assignments()]) == 0
    assert main(["evaluate", str(run), "--episodes", "4"]) == 0
    assert main(["evaluate", str(tmp_path / EMOJI)]) == 2
    out.flush()
    printed = out.buffer.getvalue().decode(encoding)
    assert out.encoding == encoding
    assert r"a red heart \u2764\U0001f525 (" in printed


@pytest.mark.parametrize("make", [Closed, closed, lambda: None])
def test_a_training_does_not_need_anybody_who_reads(make, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdout", make())
    monkeypatch.setattr(sys, "stderr", make())
    command = [
        "train",
        RED,
        "--timesteps",
        "8",
        "--num-envs",
        "2",
        "--out",
        str(tmp_path / "run"),
        "--no-evaluate",
    ]
    assert main([*command, *assignments()]) in (0, 141)
    assert (tmp_path / "run" / "checkpoints" / "000000008").is_dir()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a full device")
def test_output_that_cannot_be_written_is_told_by_the_exit_code():
    command = [sys.executable, "-m", "flowgym_gym", "list"]
    with open("/dev/full", "w", encoding="utf-8") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stderr) == (141, "")


def test_a_tensorboard_that_cannot_write_is_no_reason_to_stop(tmp_path, monkeypatch, capsys):
    pytest.importorskip("tensorboard")
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    assert tiny(tmp_path, timesteps=8).timesteps == 8
    said = capsys.readouterr().err
    assert (
        "metrics go to metrics.csv alone: TensorBoard cannot be used (ModuleNotFoundError" in said
    )


def test_a_run_in_a_folder_whose_name_is_no_text_trains(tmp_path):
    run = tmp_path / os.fsdecode(b"run-\xff")
    try:
        run.mkdir()
    except OSError:
        pytest.skip("this file system takes no such name")
    assert tiny(run, timesteps=8).timesteps == 8


@pytest.mark.second
def test_a_library_that_cannot_be_imported_is_named(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "flowgym_gym", "evaluate", str(tmp_path)],
        env={**os.environ, "TQDM_MININTERVAL": "often"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert re.match(
        r"error: .* cannot be imported: ValueError: .*'often' \(in .*tqdm.*\)\n$", done.stderr
    )


def test_a_prompt_typed_under_a_locale_without_letters_is_that_prompt():
    typed = f"prompts={EMOJI}".encode().decode("ascii", "surrogateescape")
    assert _texts([typed, "prompts=a cat"]) == [f"prompts={EMOJI}", "prompts=a cat"]
