"""The torch environment: whole trajectories, one's own models and rewards."""

import gymnasium
import numpy as np
import pytest
import torch

import flowgym_gym
from flowgym_gym import (
    BaseModel,
    ControlEnvironment,
    FlowTensor,
    NoiseEnvironment,
    OptimalTransportScheduler,
    Reward,
    VelocityEnvironment,
    base_model_registry,
    reward_registry,
)
from flowgym_gym.envs import environment_of
from flowgym_gym.errors import ActionError, ModelError, OptionError, RewardError, UnknownOptionError
from tests.conftest import RED


class Straight(BaseModel[FlowTensor]):
    """Flow matching onto a single point: v = (target - x) / (1 - t), a closed form."""

    output_type = "velocity"

    def __init__(self, target=2.0, device=None):
        super().__init__(device)
        self.target = target

    @property
    def scheduler(self):
        return OptimalTransportScheduler()

    def sample_p0(self, n, **kwargs):
        return FlowTensor(torch.randn(n, 1, 2, 2)), kwargs

    def forward(self, x, t, **kwargs):
        return (self.target - x) / (1 - t).reshape(-1, 1, 1, 1)


class Mean(Reward[FlowTensor]):
    def forward(self, x, **kwargs):
        return x.aggregate("mean"), torch.ones(len(x))


@pytest.fixture
def _toys(monkeypatch):
    for registry, id, cls in [
        (base_model_registry, "toys/straight", Straight),
        (reward_registry, "toys/mean", Mean),
    ]:
        monkeypatch.setitem(registry._entries, id, None)
        del registry._entries[id]
        registry.register(id, cls)
    yield
    for registry, id in [(base_model_registry, "toys/straight"), (reward_registry, "toys/mean")]:
        registry._entries.pop(id, None)


@pytest.mark.usefixtures("_toys")
@pytest.mark.parametrize("noise_level", [0.0, 1.0])
def test_own_model_and_reward_reach_the_closed_form(noise_level):
    env = flowgym_gym.make(
        "toys/straight", "toys/mean", 7, noise_level=noise_level, base_model_kwargs={"target": 3.0}
    )
    sample = env.sample(5)
    torch.testing.assert_close(
        sample.latents.data, torch.full((5, 1, 2, 2), 3.0), rtol=1e-5, atol=1e-5
    )
    torch.testing.assert_close(sample.rewards, torch.full((5,), 3.0))
    assert (sample.control_costs == 0).all()


@pytest.mark.usefixtures("_toys")
def test_own_model_and_reward_are_at_once_a_gymnasium_environment():
    env = gymnasium.make(
        "flowgym/Denoising-v0",
        base_model="toys/straight",
        reward="toys/mean",
        base_model_kwargs={"target": -1.0},
        discretization_steps=4,
        reward_scale=2.0,
    )
    env.reset(seed=0)
    for _ in range(4):
        _, reward, terminated, _, info = env.step(np.zeros((1, 2, 2), np.float32))
    assert terminated
    assert info["terminal_reward"] == pytest.approx(-1, abs=1e-5)
    assert reward == pytest.approx(-2, abs=1e-5)


def test_make_returns_the_environment_of_the_action_type():
    env = flowgym_gym.make(
        "images/stable_diffusion", "images/red", discretization_steps=5, reward_scale=100
    )
    assert isinstance(env, VelocityEnvironment)
    assert env.action_scale == 1
    noise = flowgym_gym.make(
        "images/stable_diffusion", "images/red", 5, action_type="noise", guidance_scale=2.0
    )
    assert isinstance(noise, NoiseEnvironment)
    assert noise.base_model.guidance_scale == 2
    assert isinstance(
        flowgym_gym.make("images/stable_diffusion", "images/red", 5, action_type="control"),
        ControlEnvironment,
    )


def test_sample_has_the_documented_shapes(torch_env):
    sample = torch_env.sample(3, prompt=["a photo of a cat", "a red heart", "a photo of a cat"])
    assert sample.sample.shape == (3, 3, 64, 64)
    assert sample.latents.shape == (3, 4, 8, 8)
    assert [x.shape for x in sample.trajectory] == [(3, 4, 8, 8)] * 6
    assert sample.control_costs.shape == (5, 3)
    assert sample.rewards.shape == sample.valids.shape == (3,)
    assert sample.kwargs["prompt"][1] == "a red heart"
    assert sample.to("cpu").latents.device.type == "cpu"
    torch.testing.assert_close(sample.rewards, sample.sample.data[:, 0].mean(dim=(1, 2)))


@pytest.mark.parametrize("action_type", ["velocity", "noise", "control"])
def test_log_probabilities_are_those_of_the_noise_that_was_drawn(action_type):
    times = [0.1, 0.25, 0.5, 0.75]
    env = flowgym_gym.make(
        "2d/gaussian_mixture", "2d/gaussian", times, action_type=action_type, action_scale=2.0
    )
    index = torch.arange(4).repeat_interleave(3)
    x, noise, action = torch.randn(3, 12, 2).unbind()
    action.requires_grad_()
    output = env.predict(FlowTensor(x), index)
    following, _ = env.advance(x, output, action.detach(), noise, index)
    log_prob = env.log_prob(x, output, action, following, index)

    # Song et al., ICLR 2021, equation 16; the last transition draws nothing.
    alpha, beta = env.grid.alpha[index], env.grid.beta[index]
    alpha_s, beta_s = env.grid.alpha[index + 1], env.grid.beta[index + 1]
    std = (beta_s / beta * (beta**2 - (alpha / alpha_s * beta_s) ** 2).sqrt()).float()[:, None]
    drawn = index < 3
    expected = (
        torch.distributions.Normal(0.0, std[drawn]).log_prob(std[drawn] * noise[drawn]).sum(dim=1)
    )
    torch.testing.assert_close(log_prob[drawn], expected, rtol=1e-4, atol=1e-4)
    assert (log_prob[~drawn] == 0).all()

    # The derivative by the mean, in standard deviations, is the noise itself.
    log_prob.sum().backward()
    gain = env.transitions.gain[index][:, None] * 2
    torch.testing.assert_close(
        action.grad[drawn], (gain * noise / std)[drawn], rtol=1e-3, atol=1e-3
    )
    assert (action.grad[~drawn] == 0).all()


def test_control_costs_have_gradients_also_where_nothing_is_drawn():
    env = flowgym_gym.make(
        "1d/gaussian_mixture", "1d/gaussian", 4, action_type="control", action_scale=2.0
    )
    action = torch.ones(4, 1, requires_grad=True)
    zeros, index = torch.zeros(4, 1), torch.arange(4)
    _, cost = env.advance(zeros, zeros, action, zeros, index)
    cost.sum().backward()
    torch.testing.assert_close(cost.detach(), torch.tensor([2.0, 2.0, 2.0, 0.0]))
    torch.testing.assert_close(action.grad[:, 0], torch.tensor([4.0, 4.0, 4.0, 0.0]))


def test_torch_rollout_equals_the_gymnasium_episode():
    """One transition, two interfaces: the same states from the same noise."""
    policy = lambda x, t, **kwargs: 0.3 * torch.tanh(x.data)  # noqa: E731
    single = gymnasium.make(RED, discretization_steps=5)
    observation, _ = single.reset(seed=4)
    start = torch.from_numpy(observation["latent"])[None]
    noise_source = torch.Generator()
    noise_source.set_state(single.unwrapped.rollout.streams.generators[0].get_state())

    env = flowgym_gym.make("images/stable_diffusion", "images/red", 5, action_scale=None)
    x, kwargs = env.base_model.preprocess(FlowTensor(start), prompt=["a photo of a cat"])
    with torch.no_grad():
        for i in range(5):
            index = torch.tensor([i])
            action = policy(x, env.times[index])
            noise = torch.randn(x.shape, generator=noise_source)
            following, cost = env.advance(
                x.data, env.predict(x, index, **kwargs), action, noise, index
            )
            observation, *_, info = single.step(action[0].numpy())
            x = FlowTensor(following)
            np.testing.assert_allclose(observation["latent"], following[0].numpy(), atol=1e-5)
            assert info["control_cost"] == pytest.approx(cost.item(), rel=1e-4)


def test_policy_receives_states_times_and_conditions(torch_env):
    seen = []

    def policy(x, t, **kwargs):
        seen.append((x.shape, t.tolist(), sorted(kwargs)))
        return x.zeros_like()

    torch_env.sample(2, policy)
    assert len(seen) == 5
    assert seen[0][0] == (2, 4, 8, 8)
    assert [t[0] for _, t, _ in seen] == pytest.approx(
        [1 - k / 1000 for k in (801, 601, 401, 201, 1)]
    )
    assert seen[0][2] == ["encoder_hidden_states", "prompt"]


def test_train_loss_of_a_perfect_model_is_zero():
    model = Straight(target=2.0)
    x1 = FlowTensor(torch.full((6, 1, 2, 2), 2.0))
    loss = model.train_loss(x1, t=torch.linspace(0.1, 0.9, 6))
    torch.testing.assert_close(loss, torch.zeros(6), rtol=0, atol=1e-9)


def test_train_loss_is_the_error_of_the_noise(model):
    x1, x0, t = (
        FlowTensor(torch.randn(4, 4, 8, 8)),
        torch.randn(4, 4, 8, 8),
        torch.tensor([0.1, 0.4, 0.7, 0.9]),
    )
    a, b = (getattr(model.scheduler, f)(t).reshape(-1, 1, 1, 1) for f in ("alpha", "beta"))
    xt = FlowTensor(a * x1.data + b * x0)
    _, kwargs = model.preprocess(x1, prompt=["a photo of a cat"] * 4)
    with torch.no_grad():
        expected = ((model(xt, t, **kwargs).data - x0) ** 2).mean(dim=(1, 2, 3))
        torch.testing.assert_close(
            model.train_loss(x1, xt, t, **kwargs), expected, rtol=1e-3, atol=1e-4
        )


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (torch.zeros(3), "expected \\(rewards, valids\\)"),
        ((torch.zeros(2), torch.ones(3)), "rewards of shape \\(2,\\)"),
        ((torch.zeros(3), torch.ones(3, 1)), "valids of shape \\(3, 1\\)"),
        ((torch.tensor([0.0, torch.nan, 0.0]), torch.ones(3)), "nan for sample 1"),
        (([0, 0, 0], torch.ones(3)), "rewards of list"),
    ],
)
def test_a_wrong_reward_is_named(result, message):
    class Wrong(Reward[FlowTensor]):
        def forward(self, x, **kwargs):
            return result

    with pytest.raises(RewardError, match=message):
        VelocityEnvironment(Straight(), Wrong(), 2).sample(3)


def test_a_reward_that_raises_and_a_model_of_the_wrong_shape_are_named():
    class Raises(Reward[FlowTensor]):
        def forward(self, x, **kwargs):
            raise ZeroDivisionError("by zero")

    class Flat(Straight):
        def forward(self, x, t, **kwargs):
            return FlowTensor(x.data.flatten(1))

    with pytest.raises(RewardError, match="Raises raised ZeroDivisionError: by zero"):
        VelocityEnvironment(Straight(), Raises(), 2).sample(3)
    with pytest.raises(
        ModelError, match=r"shape \(3, 4\), expected that of the states, \(3, 1, 2, 2\)"
    ):
        VelocityEnvironment(Flat(), Mean(), 2).sample(3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"sample_p0": lambda self, n, **kwargs: FlowTensor(torch.zeros(n, 1, 2, 2))},
            "sample_p0 returned FlowTensor",
        ),
        (
            {"sample_p0": lambda self, n, **kwargs: (torch.zeros(n, 1), {})},
            "sample_p0 returned Tensor, expected a Flow",
        ),
        (
            {"sample_p0": lambda self, n, **kwargs: (FlowTensor(torch.zeros(1, 4)), {})},
            "1 states, .* of 3 states",
        ),
        (
            {"forward": lambda self, x, t, **kwargs: None},
            "forward returned NoneType, expected a FlowTensor",
        ),
        ({"forward": lambda self, x, t, **kwargs: x * torch.nan}, "Toy returned NaN or infinity"),
        ({"output_type": "velocities"}, "output_type of Toy is 'velocities', expected one of"),
        ({"output_type": None}, "output_type of Toy is None"),
    ],
)
def test_a_model_that_returns_something_else_is_named(change, message):
    toy = type("Toy", (Straight,), change)()
    with pytest.raises((ModelError, OptionError), match=message):
        VelocityEnvironment(toy, Mean(), 2).sample(3)


def test_policies_return_what_broadcasts_to_the_states():
    env = VelocityEnvironment(Straight(), Mean(), 2)
    torch.manual_seed(0)
    expected = env.sample(3, lambda x, t: torch.full_like(x.data, 0.5)).latents.data
    for action in (0.5, np.full((1, 2, 2), 0.5), FlowTensor(torch.full((3, 1, 2, 2), 0.5))):
        torch.manual_seed(0)
        assert torch.equal(env.sample(3, lambda x, t, a=action: a).latents.data, expected)
    with pytest.raises(
        ActionError,
        match=r"policy returned shape \(5,\), expected a tensor of shape \(3, 1, 2, 2\)",
    ):
        env.sample(3, lambda x, t: torch.zeros(5))
    with pytest.raises(ActionError, match="policy returned str"):
        env.sample(3, lambda x, t: "left")
    with pytest.raises(ModelError, match="or the policy returned NaN"):
        env.sample(3, lambda x, t: float("nan"))


def test_bad_calls_are_named(torch_env):
    with pytest.raises(OptionError, match="n is 0"):
        torch_env.sample(0)
    with pytest.raises(OptionError, match="same domain"):
        flowgym_gym.make("images/stable_diffusion", "1d/binary", 5)
    with pytest.raises(UnknownOptionError, match="did you mean 'guidance_scale'"):
        flowgym_gym.make("images/stable_diffusion", "images/red", 5, guidence_scale=2.0)


@pytest.mark.usefixtures("_toys")
def test_instances_are_shared_only_between_equal_plain_arguments():
    def target_of(value):
        return flowgym_gym.make(
            "toys/straight", "toys/mean", 2, base_model_kwargs={"target": value}
        ).base_model

    assert target_of(1.0) is target_of(1.0)
    assert target_of(1.0) is not target_of(2.0)
    big = torch.zeros(5000)
    changed = big.clone()
    changed[2500] = 1
    assert target_of(changed).target[2500] == 1
    assert target_of(big).target[2500] == 0


def test_gradients_flow_through_a_transition_after_a_gymnasium_episode(torch_env):
    """Prompts that a Gymnasium episode has encoded stay usable for gradient-based methods."""
    gymnasium.make(RED, discretization_steps=2).reset(seed=0, options={"prompt": "a green apple"})
    x, kwargs = torch_env.start(1, prompt="a green apple")
    action = torch.zeros(1, 4, 8, 8, requires_grad=True)
    index = torch.tensor([0])
    following, _ = torch_env.advance(
        x.data, torch_env.predict(x, index, **kwargs), action, torch.zeros(1, 4, 8, 8), index
    )
    output = torch_env.predict(FlowTensor(following), index + 1, **kwargs)
    (gradient,) = torch.autograd.grad(output.sum(), action)
    assert gradient.abs().max() > 0


@pytest.mark.parametrize("wrap", [lambda env: env, gymnasium.wrappers.RecordEpisodeStatistics])
def test_the_torch_environment_of_a_gymnasium_one_is_that_which_it_steps_with(wrap):
    env = wrap(gymnasium.make("flowgym/GaussianMixture-Gaussian-v0", discretization_steps=3))
    environment = environment_of(env)
    assert environment is environment_of(environment) is env.unwrapped.environment
    assert environment.discretization_steps == 3
    environment.reward_scale = 7.0
    env.reset(seed=0)
    for _ in range(3):
        _, reward, _, _, info = env.step(env.action_space.sample() * 0)
    assert reward == pytest.approx(7.0 * info["terminal_reward"])


def test_the_torch_environment_of_a_vector_environment_is_that_of_all_its_episodes():
    envs = gymnasium.make_vec("flowgym/GaussianMixture-Gaussian-v0", num_envs=3)
    wrapped = gymnasium.wrappers.vector.RecordEpisodeStatistics(envs)
    assert environment_of(wrapped) is envs.environment
    assert environment_of(wrapped).state_shape == (1,)


def test_foreign_environments_have_no_torch_environment():
    single = [lambda: gymnasium.make("flowgym/GaussianMixture-Gaussian-v0")]
    for env in (gymnasium.make("CartPole-v1"), gymnasium.vector.SyncVectorEnv(single), None, 3):
        with pytest.raises(
            OptionError, match="expected a flowgym environment or its own vector environment"
        ):
            environment_of(env)
