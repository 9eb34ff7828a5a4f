"""The ids that differ from Red's in their reward only: a short episode of each, alone and in a
vector.

What does not depend on the reward is tested on the other ids.
"""

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import data_equivalence

from flowgym_gym import FlowTensor, reward_registry
from flowgym_gym.rewards.loading import load_reward
from tests.conftest import ALL_IDS, PROMPTS, REWARD_IDS, reward_options


def episode(env, seed, prompt):
    record = [env.reset(seed=seed, options={"prompt": prompt})]
    action = np.full(env.action_space.shape, 0.3, np.float32)
    return record + [env.step(action) for _ in range(2)]


@pytest.mark.parametrize("id", REWARD_IDS)
def test_the_terminal_reward_is_that_of_the_picture_and_a_spec_makes_it_again(id, request):
    options = reward_options(id, request)
    env = gymnasium.make(id, discretization_steps=2, prompts=PROMPTS, **options)
    record = episode(env, 3, PROMPTS[1])
    info = record[-1][4]
    inner = env.unwrapped.environment
    sample = inner.base_model.postprocess(FlowTensor(env.unwrapped.rollout.latents))
    reward = load_reward(gymnasium.spec(id).kwargs["reward"], **options.get("reward_kwargs", {}))
    expected = reward(sample, prompt=[PROMPTS[1]])[0].item()
    assert info["terminal_reward"] == pytest.approx(expected, rel=1e-6)
    bonus = inner.reward_scale * expected
    assert record[-1][1] == pytest.approx(bonus - info["control_cost"], rel=1e-6)
    spec = gymnasium.envs.registration.EnvSpec.from_json(env.spec.to_json())
    assert data_equivalence(episode(gymnasium.make(spec), 3, PROMPTS[1]), record, exact=True)


@pytest.mark.parametrize("id", REWARD_IDS)
def test_a_vector_pays_what_single_environments_pay(id, request):
    options = reward_options(id, request)
    envs = gymnasium.make_vec(id, num_envs=2, discretization_steps=1, prompts=PROMPTS, **options)
    envs.reset(seed=5)
    together = envs.step(np.zeros(envs.action_space.shape, np.float32))[1]
    alone = []
    for seed in (5, 6):
        env = gymnasium.make(id, discretization_steps=1, prompts=PROMPTS, **options)
        env.reset(seed=seed)
        alone.append(env.step(np.zeros(env.action_space.shape, np.float32))[1])
    # A pixel that rounds to the next grey level makes another file.
    np.testing.assert_allclose(
        together, alone, rtol=2e-2 if "ompression" in id else 1e-4, atol=1e-3
    )


def test_every_reward_of_images_has_an_id_or_is_made_of_others():
    paid = {gymnasium.spec(id).kwargs.get("reward", "images/red") for id in ALL_IDS}
    made_of_others = {
        "images/weighted_sum",
        "images/clip",
        "images/standardize",
        "images/asynchronous",
    }
    rewards, paid = (
        {id for id in ids if id.startswith("images/")} for ids in (reward_registry.list(), paid)
    )
    assert rewards - made_of_others == paid - made_of_others
