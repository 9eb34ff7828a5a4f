"""A run that is killed again and again, for the test that nothing of it is lost.

``python -m tests.agents.runs.killing ALGO FOLDER SEED`` imports everything once and forks a process for
each attempt. An attempt is killed at its n-th call of a function, Python's or C's, so that a seed
means the same moments everywhere; in every second attempt only calls made while a file of the run
is written count.
"""

import importlib
import os
import random
import signal
import sys
import traceback
from pathlib import Path

import pytest
import torch

from flowgym_gym.agents import train
from flowgym_gym.agents.runs.checkpoints import checkpoints, save_best, save_checkpoint
from flowgym_gym.agents.runs.files import write_json
from flowgym_gym.agents.runs.metrics import Metrics
from flowgym_gym.agents.runs.records import tensorboard_installed
from flowgym_gym.models.loading import load_base_model
from tests.agents.conftest import TINY, draw_little, untimed
from tests.conftest import PROMPTS, RED

KILLS = 10
TIMESTEPS = 32
# Two intervals of training lie between checkpoints, so some rows are written after the last one.
OVERRIDES = {
    "env.prompts": PROMPTS,
    "checkpoint_every": 16,
    "evaluate_every": 8,
    "evaluation_episodes": 2,
}
WRITERS = {
    function.__code__
    for function in (
        save_checkpoint,
        save_best,
        write_json,
        Metrics.start,
        Metrics.append,
        Metrics.sync,
    )
}


class Profile:
    """Counts calls, all and those made while writing, and kills the process at one of them."""

    def __init__(self, at=None, writing=False):
        self.counts = [0, 0]
        self.at, self.writing = at, writing
        self.depth = 0

    def __call__(self, frame, event, argument):
        if frame.f_code in WRITERS and event in ("call", "return"):
            self.depth += 1 if event == "call" else -1
        if event not in ("call", "c_call"):
            return
        self.counts[0] += 1
        self.counts[1] += self.depth > 0
        if self.counts[self.writing] == self.at and (self.depth or not self.writing):
            what = argument.__name__ if event == "c_call" else frame.f_code.co_name
            os.write(
                2,
                f"killed in {Path(frame.f_code.co_filename).name}:{frame.f_lineno}, {what}\n".encode(),
            )
            os.kill(os.getpid(), signal.SIGKILL)


def attempt(algo, out, profile):
    """Train or resume in a process of its own, as the files in ``out`` say; whether it came to the
    end.
    """
    pid = os.fork()
    if pid == 0:
        try:
            given = (
                {}
                if (out / "config.json").exists()
                else {"overrides": {**TINY[algo], **OVERRIDES}, "num_envs": 2}
            )
            sys.setprofile(profile)
            train(
                RED, algo, out=out, timesteps=TIMESTEPS, resume=not given, progress=False, **given
            )
            sys.setprofile(None)
            (out.parent / f"{out.name}.calls").write_text(" ".join(map(str, profile.counts)))
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert status in (0, -signal.SIGKILL), f"ended with {status}"
    return status == 0


def main(algo, folder, seed):
    torch.set_num_threads(1)
    draw_little(pytest.MonkeyPatch())
    if tensorboard_installed():
        importlib.import_module("torch.utils.tensorboard")
    load_base_model("images/stable_diffusion", prompts=PROMPTS)

    whole = folder / "whole"
    assert attempt(algo, whole, Profile())
    totals = [int(count) for count in (folder / "whole.calls").read_text().split()]
    expected = untimed(whole)
    draw, kills, part = random.Random(seed), 0, 0
    while kills < KILLS:
        out = folder / f"part-{part}"
        kind = kills % 2
        at = draw.randrange(1, totals[kind] // 2)
        moment = f"call {at} of {totals[kind]}{' while writing' if kind else ''}"
        print(f"attempt on {out.name}, {moment}", file=sys.stderr, flush=True)
        if attempt(algo, out, Profile(at, bool(kind))):
            part += 1
            continue
        kills += 1
        done = int(checkpoints(out)[0].name) if checkpoints(out) else 0
        kept = [row for row in expected if row["timesteps"] <= done]
        assert untimed(out)[: len(kept)] == kept, "a row before the last checkpoint is lost"
    if (folder / f"part-{part}").exists():
        assert attempt(algo, folder / f"part-{part}", Profile())
    print(kills)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
