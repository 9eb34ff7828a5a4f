import math
import subprocess
import sys

import gymnasium
import pytest

pytest.importorskip("ray.rllib", reason="RLlib is in the extra rllib; run .ci/run rllib")
pytestmark = pytest.mark.second

from ray.rllib.algorithms.dqn.dqn import calculate_rr_weights
from ray.rllib.algorithms.ppo import PPOConfig
from ray.rllib.algorithms.sac import SACConfig

from flowgym_gym.agents.rllib import config
from flowgym_gym.agents.runs.presets import load_preset
from flowgym_gym.errors import OptionError, UnknownIdError, UnknownOptionError
from tests.agents.rllib.conftest import MIXTURE, quick
from tests.conftest import RED


def test_what_it_gives_is_a_plain_configuration():
    made = config("StableDiffusion-Red-v0", discretization_steps=4)
    assert type(made) is PPOConfig
    assert type(config(RED, "sac")) is SACConfig
    made.training(lr=1e-4).env_runners(num_env_runners=3).environment(
        env_config={"prompt": "a dog"}
    )
    assert (made.lr, made.num_env_runners, made.env_config["prompt"]) == (1e-4, 3, "a dog")
    assert made.env_config["discretization_steps"] == 4
    assert made.env == f"flowgym_gym:{RED}"
    made.validate()


def test_the_preset_of_ppo_under_rllibs_names():
    settings, made = load_preset(RED, "ppo"), config(RED, runners=4)
    assert made.total_train_batch_size == settings["algo"]["n_steps"] * settings["num_envs"]
    assert made.get_rollout_fragment_length(1) == settings["algo"]["n_steps"]
    assert made.num_envs_per_env_runner * 4 == settings["num_envs"]
    assert made.lr == [[0, 0.002], [44_800, 0.0002]]
    assert (made.minibatch_size, made.num_epochs, made.gamma, made.lambda_) == (160, 5, 1.0, 0.9)
    assert (made.clip_param, made.grad_clip, made.vf_loss_coeff) == (0.3, 0.5, 0.00005)
    assert made.vf_clip_param == math.inf
    assert not made.use_kl_loss
    model = made.rl_module_spec.model_config
    assert model.items() >= settings["policy"].items()


@pytest.mark.parametrize("runners", [0, 1, 4])
def test_sac_makes_as_many_updates_as_its_preset_with_any_number_of_runners(runners):
    settings, made = load_preset(MIXTURE, "sac"), config(MIXTURE, "sac", runners=runners)
    assert calculate_rr_weights(made) == [1, settings["algo"]["gradient_steps"]]
    assert made.num_envs_per_env_runner * max(1, runners) == settings["num_envs"]
    assert made.get_rollout_fragment_length() == 1
    assert (made.initial_alpha, made.alpha_lr) == (0.25, 0.0)
    learnt = config(RED, "sac")
    assert (learnt.initial_alpha, learnt.alpha_lr) == (0.1, [[0, 0.001], [16_000, 0.0001]])
    assert learnt.replay_buffer_config["capacity"] == 16_000


def test_a_slow_step_is_waited_for():
    made = config(RED)
    assert made.sample_timeout_s == made.evaluation_sample_timeout_s == 24 * 3600


@pytest.mark.parametrize("mode", ["SameStep", gymnasium.vector.AutoresetMode.DISABLED])
def test_other_autoreset_modes_are_refused_by_name(mode, build):
    with pytest.raises(OptionError, match=r"autoreset_mode is '(SameStep|Disabled)'.*'NextStep'"):
        config(MIXTURE, autoreset_mode=mode)
    later = quick(config(MIXTURE, autoreset_mode="NextStep"))
    later.environment(env_config={"autoreset_mode": getattr(mode, "value", mode)})
    with pytest.raises(OptionError, match=r"autoreset_mode is '(SameStep|Disabled)'.*'NextStep'"):
        build(later)


def test_what_does_not_exist_is_refused_by_name():
    with pytest.raises(UnknownIdError, match="no environment is registered as 'Green-v0'"):
        config("Green-v0")
    with pytest.raises(OptionError, match="algo is 'tqc'"):
        config(RED, "tqc")
    with pytest.raises(OptionError, match="preset is 'slow'"):
        config(RED, preset="slow")
    with pytest.raises(UnknownOptionError, match="'promt'; did you mean 'prompts'"):
        config(RED, promt="a dog")
    with pytest.raises(OptionError, match="runners is -1"):
        config(RED, runners=-1)


def test_an_accelerator_of_a_runner_is_where_its_model_runs():
    assert config(RED, gpus_per_runner=0.5).env_config["device"] == "cuda"
    assert config(RED, gpus_per_runner=1, device="cuda:0").env_config["device"] == "cuda:0"
    assert "device" not in config(RED).env_config


def test_agents_and_their_room_load_no_ray():
    code = "import sys, flowgym_gym.agents.rllib; assert 'ray' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
