"""Sub-environments split over several devices: equal to the environments of their parts bit for bit."""

import copy
import pickle
import re
import threading

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.envs.registration import EnvSpec
from gymnasium.utils.env_checker import data_equivalence
from gymnasium.vector import AutoresetMode

from flowgym_gym import FlowTensor
from flowgym_gym.envs import check_vector_env
from flowgym_gym.envs.checker import difference
from flowgym_gym.envs.devices import check_distinct
from flowgym_gym.errors import (
    ClosedEnvironmentError,
    FlowGymError,
    ModelError,
    OptionError,
    RewardError,
)
from flowgym_gym.rewards.images import RedReward
from tests.conftest import PROMPTS, RED
from tests.envs.test_refused_calls import refused
from tests.models.tiny import folder

MIXTURE = "flowgym/GaussianMixture-Gaussian-v0"
TWO = ["cpu", "cpu"]
MODES = list(AutoresetMode)


def make(id=RED, n=3, device=TWO, **options):
    pipeline = {"prompts": PROMPTS, "checkpoint": folder("like_the_embedded_one")}
    options = {"discretization_steps": 3, **(pipeline if id != MIXTURE else {}), **options}
    return gymnasium.make_vec(id, num_envs=n, device=device, **options)


def actions(n, count, id=RED):
    shape = (4, 8, 8) if id == RED else (1,)
    return np.random.default_rng(0).uniform(-1.2, 1.2, (count, n, *shape)).astype(np.float32)


def play(envs, seeds, given, resets=(2,)):
    """Everything that comes of actions, with a partial reset on the way, so that episodes are at
    different times.
    """
    record = [envs.reset(seed=list(seeds))]
    for i, action in enumerate(given):
        if i in resets:
            mask = np.arange(envs.num_envs) == envs.num_envs - 1
            record.append(envs.reset(options={"reset_mask": mask}))
        record.append(envs.step(action))
        ended = record[-1][2]
        if envs.metadata["autoreset_mode"] is AutoresetMode.DISABLED and ended.any():
            record.append(envs.reset(options={"reset_mask": ended.copy()}))
    return record


@pytest.mark.parametrize("mode", MODES)
def test_a_split_environment_equals_its_parts_bit_for_bit(mode):
    given = actions(4, 8)
    whole = make(n=4, autoreset_mode=mode)
    assert [list(part.where) for part in whole.unwrapped.rollout.split.parts] == [[0, 1], [2, 3]]
    parts = [make(n=2, device="cpu", autoreset_mode=mode) for _ in range(2)]
    whole.reset(seed=5)
    for k, part in enumerate(parts):
        part.reset(seed=5 + 2 * k)
    for action in given:
        together = whole.step(action)
        apart = [part.step(action[2 * k : 2 * k + 2]) for k, part in enumerate(parts)]
        for name in together[0]:
            both = np.concatenate([one[0][name] for one in apart])
            np.testing.assert_array_equal(together[0][name], both)
        for i in (1, 2):
            np.testing.assert_array_equal(together[i], np.concatenate([one[i] for one in apart]))
        for name, values in together[4].items():
            if name not in ("final_obs", "final_info"):
                both = np.concatenate([one[4][name] for one in apart])
                np.testing.assert_array_equal(values, both)
        if together[2].any() and mode is AutoresetMode.DISABLED:
            for env in (whole, *parts):
                env.reset()


@pytest.mark.parametrize("mode", MODES)
def test_a_split_environment_equals_one_device_in_structure_and_to_rounding(mode):
    """A batch of three and batches of two and one are rounded differently by a convolution."""
    given = actions(3, 8)
    split, one = make(autoreset_mode=mode), make(device="cpu", autoreset_mode=mode)
    mine, theirs = (play(env, (1, 7, 4), given) for env in (split, one))
    assert difference(mine, theirs, tolerance=1e-4) is None


@pytest.mark.parametrize("mode", MODES)
def test_where_rows_are_computed_alone_a_split_equals_one_device_bit_for_bit(mode):
    given = actions(5, 9, MIXTURE)
    split = make(MIXTURE, 5, ["cpu"] * 3, autoreset_mode=mode)
    one = make(MIXTURE, 5, "cpu", autoreset_mode=mode)
    assert [len(part.where) for part in split.unwrapped.rollout.split.parts] == [2, 2, 1]
    mine, theirs = (play(env, range(5), given) for env in (split, one))
    assert data_equivalence(mine, theirs, exact=True)
    assert data_equivalence(split.unwrapped.get_state(), one.unwrapped.get_state(), exact=True)


def test_the_checker_of_vector_environments_accepts_a_split():
    check_vector_env(make(MIXTURE), lambda: gymnasium.make(MIXTURE, discretization_steps=3))


def test_states_go_from_one_device_to_several_and_back():
    given = actions(4, 6)
    split, one = make(n=4), make(n=4, device="cpu")
    play(split, range(4), given[:2], resets=(1,))
    state = split.get_state()
    one.reset(seed=9)
    one.set_state(state)
    assert data_equivalence(one.get_state(), state, exact=True)
    mine, theirs = ([env.step(action) for action in given[2:]] for env in (split, one))
    assert difference(mine, theirs, tolerance=1e-4) is None
    split.set_state(state), one.set_state(split.get_state())
    split.set_state(one.get_state(), seed=3)
    branched = split.step(given[0])
    split.set_state(state, seed=3)
    assert data_equivalence(split.step(given[0]), branched, exact=True)


def test_the_devices_work_at_the_same_time_in_threads_of_their_own():
    envs, threads = make(n=4, discretization_steps=1), set()
    model = envs.unwrapped.environment.base_model
    both = threading.Barrier(2, timeout=30)

    def meet(*_):
        threads.add(threading.current_thread())
        both.wait()

    handles = [part.register_forward_pre_hook(meet) for part in (model.unet, model.vae.decoder)]
    for action in actions(4, 2):
        envs.reset(seed=0)
        envs.step(action)
    for handle in handles:
        handle.remove()
    assert len(threads) == 2
    assert all(thread.name.startswith("flowgym-device-") for thread in threads)
    envs.close()
    assert not threads & set(threading.enumerate())
    with pytest.raises(ClosedEnvironmentError):
        envs.step(actions(4, 1)[0])


def test_each_device_has_a_copy_of_the_model_and_one_call_a_step():
    envs = make(n=4, device=["cpu", "cpu:0"])  # two names, so two models
    models = [part.model for part in envs.unwrapped.rollout.split.parts]
    assert models[0] is envs.unwrapped.environment.base_model
    assert models[0].unet is not models[1].unet
    batches, handles = [[], []], []
    for model, sizes in zip(models, batches, strict=True):
        hook = lambda module, args, output, sizes=sizes: sizes.append(len(args[0]))  # noqa: E731
        handles.append(model.unet.register_forward_hook(hook))
    mine = play(envs, range(4), actions(4, 3), resets=())
    for handle in handles:
        handle.remove()
    assert batches == [[2] * 3, [2] * 3]
    assert data_equivalence(mine, play(make(n=4), range(4), actions(4, 3), resets=()), exact=True)


def test_a_users_autocast_holds_on_every_device():
    split, parts = make(n=4), [make(n=2, device="cpu") for _ in range(2)]
    split.reset(seed=0), parts[0].reset(seed=0), parts[1].reset(seed=2)
    (action,) = actions(4, 1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        whole = split.step(action)[0]["latent"]
        apart = [env.step(action[2 * k : 2 * k + 2])[0]["latent"] for k, env in enumerate(parts)]
    np.testing.assert_array_equal(whole, np.concatenate(apart))


def failing(x, t, result):
    if len(x) == 1:
        raise OSError("no memory here")
    return result


def misshapen(x, t, result):
    return result if len(x) == 2 else FlowTensor(result.data[:, :1])


def undecoded(x, result):
    return result if len(x) == 1 else FlowTensor(result.data[:1])


@pytest.mark.parametrize(
    ("method", "spoil", "error", "words"),
    [
        ("forward", failing, OSError, "in the part on cpu, sub-environment 2"),
        (
            "forward",
            misshapen,
            ModelError,
            r"\(1, 1, 8, 8\).*in the part on cpu, sub-environment 2\)",
        ),
        ("postprocess", undecoded, ModelError, r"returned .*on cpu, sub-environments 0, 1\)"),
    ],
)
def test_a_part_that_fails_names_itself_and_changes_nothing(method, spoil, error, words):
    envs = make(discretization_steps=1, autoreset_mode="SameStep")
    kind = type(envs.unwrapped.environment.base_model)
    original = getattr(kind, method)

    def call(env):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                kind,
                method,
                lambda model, *args, **kwargs: spoil(*args, original(model, *args, **kwargs)),
            )
            env.step(np.zeros((3, 4, 8, 8), np.float32))

    envs.reset(seed=3)
    raised = refused(envs, call, error)
    said = [str(raised.value), *getattr(raised.value, "__notes__", [])]
    assert re.search(words, "\n".join(said))


def test_a_reward_sees_all_finished_samples_at_once_and_errors_name_the_row(monkeypatch):
    envs, seen, forward = make(discretization_steps=1), [], RedReward.forward

    def spoilt(self, x, **kwargs):
        seen.append((len(x), kwargs["prompt"]))
        rewards, valids = forward(self, x, **kwargs)
        rewards[2] = torch.nan
        return rewards, valids

    _, infos = envs.reset(seed=0)
    monkeypatch.setattr(RedReward, "forward", spoilt)
    with pytest.raises(RewardError, match=r"in sub-environment 2; reset to go on \(over in sub"):
        envs.step(np.zeros((3, 4, 8, 8), np.float32))
    assert seen == [(3, infos["prompt"].tolist())]
    monkeypatch.setattr(RedReward, "forward", forward)
    envs.reset()
    assert envs.step(np.zeros((3, 4, 8, 8), np.float32))[2].all()


def test_a_reward_with_a_memory_learns_the_same_on_several_devices():
    options = {"reward": "images/standardize", "discretization_steps": 1}
    options["reward_kwargs"] = {"reward": "images/red", "min_count": 2}
    records = []
    for device in ("cpu", TWO):
        envs = make("flowgym/Denoising-v0", 4, device, prompts=PROMPTS, **options)
        records.append(play(envs, range(4), actions(4, 6)))
    assert difference(*records, tolerance=1e-2) is None


@pytest.mark.parametrize("way", [copy.deepcopy, lambda envs: pickle.loads(pickle.dumps(envs))])
def test_copies_and_pickles_go_on_bit_for_bit_with_threads_of_their_own(way):
    envs = make(n=4)
    play(envs, range(4), actions(4, 2), resets=())
    twin = way(envs)
    assert [p.where for p in twin.unwrapped.rollout.split.parts] == [range(2), range(2, 4)]
    assert twin.unwrapped.rollout.split.parts[0].model is twin.unwrapped.environment.base_model
    after = [[env.step(action) for action in actions(4, 5)] for env in (envs, twin)]
    assert data_equivalence(*after, exact=True)
    envs.close()
    twin.step(actions(4, 1)[0])


@pytest.mark.parametrize("device", [TWO, ("cpu", torch.device("cpu"))], ids=str)
def test_the_specification_makes_the_same_environment_and_is_json(device):
    envs = make(n=4, device=device)
    again = gymnasium.make_vec(EnvSpec.from_json(envs.spec.to_json()))
    assert len(again.unwrapped.rollout.split.parts) == 2
    given = actions(4, 4)
    assert data_equivalence(play(envs, range(4), given), play(again, range(4), given), exact=True)
    assert data_equivalence(
        play(gymnasium.make_vec(envs.spec), range(4), given),
        play(gymnasium.make_vec(envs.spec), range(4), given),
        exact=True,
    )


def test_pictures_are_those_of_one_device_and_cost_no_second_call():
    split, one = (make(device=device, render_mode="rgb_array") for device in (TWO, "cpu"))
    calls = []
    for envs in (split, one):
        play(envs, range(3), actions(3, 2), resets=())
    unet = split.unwrapped.environment.base_model.unet
    handle = unet.register_forward_hook(lambda *_: calls.append(1))
    pictures = split.render()
    split.step(actions(3, 1)[0])
    handle.remove()
    assert len(calls) == 2  # of the two parts, once
    for mine, theirs in zip(pictures, one.render(), strict=True):
        assert np.abs(mine.astype(int) - theirs).max() <= 1


def test_a_time_grid_holds_on_every_device():
    split, one = make(MIXTURE, 4), make(MIXTURE, 4, "cpu")
    for envs in (split, one):
        envs.reset(seed=0)
        envs.unwrapped.set_time_grid(2)
    given = actions(4, 4, MIXTURE)
    mine, theirs = (play(envs, range(4), given) for envs in (split, one))
    assert data_equivalence(mine, theirs, exact=True)


def test_a_list_of_one_is_that_device():
    envs = make(device=["cpu"])
    assert envs.unwrapped.rollout.split is None
    given = actions(3, 4)
    assert data_equivalence(
        play(envs, range(3), given), play(make(device="cpu"), range(3), given), exact=True
    )


@pytest.mark.parametrize(
    ("device", "words"),
    [
        ([], r"device is \[\], expected at least one device"),
        (["cpu"] * 4, "4 devices, but num_envs is 3; give no more devices than"),
        (["cpu", "nowhere"], "device is 'nowhere', which cannot be used here"),
        (["cpu", "meta"], "device is 'meta', whose tensors hold no numbers"),
        (["cpu", None, 5.5], r"device is 5\.5, which cannot be used here"),
        (["cpu", ["cpu"]], r"device is \['cpu'\], expected one device"),
    ],
    ids=str,
)
def test_lists_that_cannot_be_used_are_refused_by_name(device, words):
    with pytest.raises(OptionError, match=words):
        make(device=device)


def test_an_accelerator_is_named_once():
    cuda = [torch.device("cuda:0"), torch.device("cuda:1"), torch.device("cuda:0")]
    with pytest.raises(OptionError, match="names 'cuda:0' twice"):
        check_distinct(cuda)
    check_distinct([*cuda[:2], *[torch.device("cpu")] * 2])


@pytest.mark.parametrize(
    "options",
    [{"device": TWO}, {"device": ["cpu"]}, {"base_model_kwargs": {"device": TWO}}],
    ids=str,
)
def test_a_single_environment_refuses_a_list_and_names_make_vec(options):
    with pytest.raises(FlowGymError, match=r"expected one device; .*make_vec\(id, num_envs"):
        gymnasium.make(MIXTURE, **options)
