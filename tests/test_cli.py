import errno
import inspect
import re
import shlex
import signal
import subprocess
import sys

import pytest
from PIL import Image

import flowgym_gym
from flowgym_gym import cli
from flowgym_gym.agents import evaluate, load_policy
from flowgym_gym.agents.frontier import measure
from flowgym_gym.agents.runs import evaluation, pictures, results, training
from flowgym_gym.agents.runs.config import read_config
from flowgym_gym.agents.runs.metrics import Metrics, read_metrics
from flowgym_gym.agents.runs.records import tensorboard_installed
from flowgym_gym.cli import main, parser
from tests.agents.conftest import assignments
from tests.conftest import ALL_IDS, RED

SHORT = RED.removeprefix("flowgym/")


@pytest.fixture(autouse=True)
def _tiny_pictures(monkeypatch):
    monkeypatch.setattr(results, "PICTURES", 2)


def test_list_names_everything_that_is_registered(capsys):
    assert main(["list"]) == 0
    printed = capsys.readouterr().out
    for name in (
        *ALL_IDS,
        *flowgym_gym.base_model_registry.list(),
        *flowgym_gym.reward_registry.list(),
    ):
        assert re.search(rf"^  {re.escape(name)}( {{2,}}\S.*)?$", printed, flags=re.MULTILINE)


def test_list_says_what_each_reward_needs(capsys):
    main(["list"])
    printed = capsys.readouterr().out
    for name in flowgym_gym.reward_registry.list():
        needs = flowgym_gym.reward_registry.get(name).needs
        assert re.search(rf"^  {re.escape(name)} *{re.escape(needs)}$", printed, flags=re.MULTILINE)


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["list"]])
def test_help_and_list_import_no_torch(arguments):
    code = (
        "import sys; from flowgym_gym.cli import main\n"
        f"try: main({arguments!r})\nexcept SystemExit as end: assert not end.code\n"
        "print('heavy:', [m for m in ('torch', 'diffusers', 'stable_baselines3', 'matplotlib') if "
        "m in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert "heavy: []" in result.stdout


def test_the_module_and_the_script_are_the_same_command():
    result = subprocess.run(
        [sys.executable, "-m", "flowgym_gym", "--version"], capture_output=True, text=True
    )
    assert result.stdout == f"flowgym-gym {flowgym_gym.__version__}\n"
    assert result.returncode == 0


def test_sample_writes_a_grid_and_the_mean_reward(tmp_path, capsys):
    out = tmp_path / "grid.png"
    assert (
        main(["sample", SHORT, "--n", "3", "--out", str(out), "--set", "discretization_steps=2"])
        == 0
    )
    printed = capsys.readouterr().out
    assert printed.startswith("mean reward 0.")
    with Image.open(out) as picture:
        assert picture.width > 100


def next_line(lines):
    return next(line for line in lines if line.startswith("next: "))


def test_a_picture_that_cannot_be_written_is_said(tmp_path, capsys, monkeypatch):
    (tmp_path / "folder.png").mkdir()
    assert main(["sample", SHORT, "--out", str(tmp_path / "folder.png")]) == 2
    assert "which is a folder" in capsys.readouterr().err

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(pictures, "picture_grid", full)
    assert (
        main(
            [
                "sample",
                SHORT,
                "--n",
                "1",
                "--set",
                "discretization_steps=1",
                "--out",
                str(tmp_path / "x.png"),
            ]
        )
        == 2
    )
    assert capsys.readouterr().err.endswith(
        "x.png, which cannot be written: No space left on device\n"
    )


def test_train_evaluates_and_says_what_is_next(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(cli, "EPISODES", 3)
    out = tmp_path / "run"
    command = ["train", SHORT, "--timesteps", "8", "--num-envs", "2", "--out", str(out)]
    assert main([*command, *assignments()]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{RED}, ppo, seed 0"
    assert "  wrappers: coarse_action=1" in lines
    table = next(i for i, line in enumerate(lines) if line.split()[:2] == ["agent", "base"])
    assert [line.split("  ")[0] for line in lines[table + 1 : table + 4]] == [
        "terminal reward", "control cost", "return"
    ]  # fmt: skip
    following = [
        line.removeprefix("next:").strip() for line in lines[lines.index(next_line(lines)) :]
    ]
    assert following[0] == f"flowgym-gym evaluate {out} --seed 1000"
    assert (
        following[1] == f"flowgym-gym train {SHORT} --algo ppo --out {out} --resume --timesteps 16"
    )
    assert following[2] == f"flowgym-gym export {out} --out {out / 'policy'}"
    assert following[3:] == ([f"tensorboard --logdir {out}"] if tensorboard_installed() else [])
    assert (out / "evaluation.json").is_file()

    # What it says runs as it stands.
    for command in following[1:3]:
        assert (
            main([*shlex.split(command)[1:], *(["--no-evaluate"] if " train " in command else [])])
            == 0
        )
    printed = capsys.readouterr().out
    assert "trained for 16 timesteps" in printed
    assert next_line(printed.splitlines()) == f"next: flowgym-gym evaluate {out}"
    assert load_policy(out / "policy").description["timesteps"] == 16
    assert main(["evaluate", str(out), "--episodes", "2", "--seed", "5"]) == 0
    assert "means of 2 episodes" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sample", "Stable-v0", "--out", "x.png"], "no environment"),
        (["sample", SHORT, "--out", "x.jpg"], "ends in .png"),
        (["sample", SHORT, "--out", "nowhere/x.png"], "no folder"),
        (["sample", SHORT, "--n", "0", "--out", "x.png"], "--n is 0"),
        (["sample", SHORT, "--out", "x.png", "--set", "num_envs=3"], "has no option 'num_envs'"),
        (["sample", SHORT, "--out", "x.png", "--set", "prompts"], "name=value"),
        (["train", SHORT, "--algo", "td3", "--out", "run"], "algo is 'td3'"),
        (["export", "nowhere", "--out", "policy"], "holds no run"),
        (["train", SHORT, "--timesteps", "0", "--out", "run"], "timesteps is 0"),
        (
            ["train", SHORT, "--out", "run", "--set", "env.noise_levl=1"],
            "did you mean 'env.noise_level'",
        ),
        (["train", SHORT, "--out", "run", "--resume"], "holds no run"),
        (["evaluate", "nowhere"], "holds no run"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert message in captured.err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_run_says_how_to_go_on(number, code, capsys, tmp_path, monkeypatch):
    def append(self, row, append=Metrics.append):
        append(self, row)
        signal.raise_signal(number)

    monkeypatch.setattr(Metrics, "append", append)
    handler = signal.getsignal(number)
    out = tmp_path / "run"
    assert (
        main(
            [
                "train",
                SHORT,
                "--timesteps",
                "100",
                "--num-envs",
                "2",
                "--out",
                str(out),
                *assignments(),
            ]
        )
        == code
    )
    captured = capsys.readouterr()
    assert "interrupted at 8 of 104 timesteps" in captured.err
    assert captured.out.endswith(
        f"to go on: flowgym-gym train {SHORT} --algo ppo --out {out} --resume\n"
    )
    assert signal.getsignal(number) is handler


@pytest.mark.second
def test_a_missing_extra_is_named_with_its_cure(tmp_path):
    code = (
        "import sys; sys.modules['stable_baselines3'] = None\n"
        "from flowgym_gym.cli import main\n"
        f"sys.exit(main(['train', {SHORT!r}, '--out', {str(tmp_path / 'run')!r}]))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 2
    assert 'pip install "flowgym_gym[agents]"' in result.stderr
    assert "Traceback" not in result.stderr


def test_tqc_without_its_library_is_named_with_its_cure(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "sb3_contrib", None)
    assert main(["train", SHORT, "--algo", "tqc", "--out", str(tmp_path / "run")]) == 2
    assert capsys.readouterr().err.startswith(
        "error: algo 'tqc' needs sb3-contrib, which is not installed; run: pip install sb3-c"
    )
    assert not (tmp_path / "run").exists()


def test_a_setting_is_changed_by_its_bare_name(tmp_path):
    command = [
        "train",
        SHORT,
        "--timesteps",
        "8",
        "--num-envs",
        "2",
        "--out",
        str(tmp_path / "run"),
        "--no-evaluate",
    ]
    other = [assignment for assignment in assignments() if "evaluate_every" not in assignment]
    assert (
        main(
            [
                *command,
                *other,
                "--set",
                "learning_rate=1e-4",
                "--set",
                "evaluate_every=8",
                "--set",
                "evaluation_episodes=2",
            ]
        )
        == 0
    )
    found = read_config(tmp_path / "run")["settings"]
    assert found["algo"]["learning_rate"] == 1e-4
    assert found["evaluate_every"] == 8
    assert [row["learning_rate"] for row in read_metrics(tmp_path / "run" / "metrics.csv")] == [
        1e-4
    ]


def test_evaluate_plays_256_episodes_unless_told_otherwise():
    assert parser().parse_args(["evaluate", "run"]).episodes == 256
    assert inspect.signature(evaluate).parameters["episodes"].default == 256


def test_a_reader_that_stops_early_is_no_error():
    command = f"{sys.executable} -m flowgym_gym list | head -n 1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert done.returncode in (0, 141)
    assert done.stderr == ""


COMMANDS = {
    "sample": ["sample", SHORT, "--out", "x.png", "--n", "1", "--set", "discretization_steps=1"],
    "train": [
        "train",
        SHORT,
        "--out",
        "run",
        "--timesteps",
        "8",
        "--num-envs",
        "2",
        "--no-evaluate",
    ],
    "evaluate": ["evaluate", "nowhere"],
    "export": ["export", "nowhere", "--out", "policy"],
    "frontier": [
        "frontier",
        SHORT,
        "--out",
        "frontier",
        "--pool",
        "8",
        "--best-of",
        "2",
        "--episodes",
        "2",
    ],
}
PATHS = ("", "\0", "x" * 5000, "file.txt", "file.txt/x")
NUMBERS = ("-1", "0", "1.5", "x", "", "nan", "inf", "1e400", "9" * 5000, "True", "²")
SETTINGS = (
    "", "=", "=5", "prompts", "nonsense=5", "env.nonsense=5", "env.=5", ".=5", "a.b.c=5", "env.device=[nowhere]",
    "env.dtype=float31", "env.sampler={}", "env.action_scale=1e25", "env.reward_scale=1e300", "env.noise_level=nan",
    "env.discretization_steps=0", "env.base_model=images/flx", "env.reward=images/clip", "env.reward=1d/binary",
    'env.reward_kwargs={"id": "images/redness"}', 'env.base_model_kwargs={"id": "images/dit"}', "env.memory=5",
    "env.reward_kwargs=5", "env.checkpoint=5", "env.negative_prompt=5", "env.control_cost_weight=-1",
    "env.spacing=sometimes", "env.base_model=" + "x" * 10**6, "env.action_type=[velocity]", "x" * 10**6 + "=1",
)  # fmt: skip
NONSENSE = [
    *((name, ["--out", path]) for name in ("sample", "train", "export") for path in PATHS),
    *(("frontier", ["--out", path]) for path in PATHS[1:]),
    *((name, [path]) for name in ("evaluate", "export") for path in PATHS),
    *(("sample", [flag, value]) for flag in ("--n", "--seed") for value in NUMBERS if (flag, value) != ("--seed", "0")),
    *(("train", [flag, value]) for flag in ("--timesteps", "--num-envs", "--seed") for value in NUMBERS
      if (flag, value) != ("--seed", "0")),
    *(("evaluate", [flag, value]) for flag in ("--episodes", "--seed") for value in NUMBERS),
    *(("frontier", [flag, value]) for value in NUMBERS
      for flag in ("--pool", "--episodes", "--batch-size", "--best-of", "--reward-scales", "--timesteps")
      if (flag, value) != ("--reward-scales", "1.5")),
    *((name, ["--set", value]) for name in ("sample", "train", "frontier") for value in SETTINGS
      ),
    *(("train", ["--set", value]) for value in ("timesteps=16", "num_envs=16", "algo.learning_rate=x", "num_envs=[2]",
                                                "algo.policy=x", "policy.width=0", "wrappers.coarse_action=no",
                                                "wrappers.time_grid=x", "timesteps=null", "kl_budget=-1")),
    *(("train", ["--algo", value]) for value in ("a2c", "", "PPO", "x" * 10**6)),
    *(("frontier", ["--algos", value]) for value in ("a2c", "")),
    *(("frontier", ["--gradients", value]) for value in ("all", "")),
    *(("evaluate", ["--which", value]) for value in ("worst", "")),
]  # fmt: skip


@pytest.mark.parametrize(("name", "extra"), NONSENSE, ids=lambda value: str(value)[:40])
def test_every_nonsense_is_a_line_with_exit_code_2(name, extra, capsys, tmp_path, monkeypatch):
    """Whatever the option and its value; before it may come argparse's usage, or notes on a
    training.
    """

    def work(*args, **kwargs):
        raise AssertionError("the work has begun")

    for module, beginning in (
        (training, "check_space"),
        (measure, "_measure_base_model"),
        (evaluation, "play"),
    ):
        monkeypatch.setattr(module, beginning, work)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file.txt").write_text("hello")
    try:
        code = main(
            [*COMMANDS[name], *extra]
            if extra[0].startswith("-")
            else [name, *extra, *COMMANDS[name][2:]]
        )
    except SystemExit as end:
        code = end.code
    assert code == 2
    lines = [
        line
        for line in capsys.readouterr().err.splitlines()
        if "error: " in line or "Traceback" in line
    ]
    assert len(lines) == 1
    assert 20 < len(lines[0]) < 4000 or "9" * 100 in lines[0]
    assert [path.name for path in tmp_path.iterdir()] == ["file.txt"]
