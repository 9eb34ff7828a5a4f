"""Where a model lies after it was moved; the device without memory stands for an accelerator."""

import pytest
import torch
from torch import nn

from flowgym_gym import BaseModel, FlowTensor, OptimalTransportScheduler
from flowgym_gym.models import from_pipeline, from_pretrained
from flowgym_gym.models.gaussian_mixture import GaussianMixtureBaseModel
from tests.models import tiny

MOVES = {
    "to": lambda module: module.to("meta"),
    "to, by a dtype as well": lambda module: module.to("meta", torch.float16),
    "to_empty": lambda module: module.to_empty(device="meta"),
    "within another module": lambda module: nn.ModuleDict({"inner": nn.Sequential(module)}).to(
        "meta"
    ),
}


class Plain(BaseModel):
    """A model of a user, without parameters, that sets its device itself."""

    output_type = "velocity"
    scheduler = OptimalTransportScheduler()

    def __init__(self, device=None):
        super().__init__(device)
        self.device = torch.device("cpu") if device is None else device

    def sample_p0(self, n, **kwargs):
        return FlowTensor(torch.zeros(n, 1, device=self.device)), kwargs

    def forward(self, x, t, **kwargs):
        return x


@pytest.mark.parametrize("move", MOVES)
@pytest.mark.parametrize(
    "make", [Plain, GaussianMixtureBaseModel, lambda: from_pipeline(tiny.build("stable_diffusion"))]
)
def test_the_device_of_a_model_follows_it(move, make):
    model = make()
    assert model.device == torch.device("cpu")
    MOVES[move](model)
    assert model.device == torch.device("meta")
    assert {tensor.device.type for tensor in [*model.parameters(), *model.buffers()]} == {"meta"}


@pytest.mark.parametrize("name", tiny.BUILDERS)
def test_all_parts_of_a_pipeline_go_with_the_model(name):
    model = from_pipeline(tiny.build(name), **tiny.OPTIONS.get(name, {}))
    names = sorted(model.state_dict())
    model.to("meta")
    parts = [part for part in model.pipe.components.values() if isinstance(part, nn.Module)]
    assert {tensor.device.type for part in parts for tensor in part.parameters()} == {"meta"}
    assert sorted(model.state_dict()) == names


def test_a_device_that_is_asked_for_is_kept_as_it_was_written():
    model = Plain("meta")
    assert model.device == "meta" or model.device == torch.device("meta")
    model.device = "cpu"
    assert model.device == torch.device("cpu")
    assert not model.state_dict()
    assert not list(model.parameters())


@pytest.mark.parametrize(
    "change", [lambda m: m.half(), lambda m: m.to(torch.bfloat16), lambda m: m.float()]
)
def test_a_mixture_stays_exact_in_every_number_format(change):
    model, expected = GaussianMixtureBaseModel(), GaussianMixtureBaseModel()
    change(nn.Sequential(model))
    x, t = FlowTensor(torch.randn(4, 1)), torch.rand(4)
    assert torch.equal(model(x, t).data, expected(x, t).data)
    assert {tensor.dtype for tensor in (model.means, model.stds, model.weights)} == {torch.float64}


def prediction(model):
    x, kwargs = model.preprocess(
        FlowTensor(torch.ones(1, *model.state_shape)), prompt=["a red heart"]
    )
    return torch.cat(
        [
            model(x, torch.tensor([0.5]), **kwargs).data.flatten(),
            model.postprocess(x).data.flatten(),
        ]
    )


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"memory": "attention_slicing"}])
def test_a_move_leaves_models_of_the_same_checkpoint_alone(options):
    expected = prediction(from_pretrained("tiny", **options))
    moved, other = (
        from_pretrained("tiny", prompts=prompt, **options) for prompt in ("a red heart", "a cat")
    )
    assert moved.pipe is other.pipe
    assert moved.to("cpu").float().pipe is other.pipe
    moved.to(torch.bfloat16).to(torch.float32)
    assert not torch.equal(prediction(moved), expected)
    again = from_pretrained("tiny", prompts="a red heart", **options)
    assert all(torch.equal(prediction(model), expected) for model in (other, again))
    assert moved.denoiser is moved.pipe.unet
    assert moved.vae is moved.pipe.vae


@torch.no_grad()
def test_a_pipeline_predicts_in_the_number_format_that_it_was_moved_to():
    model = from_pipeline(tiny.build("stable_diffusion_xl"))
    _, before = model.preprocess(*model.sample_p0(1)[:1], prompt=["a cat"])
    model.to(torch.bfloat16)
    x, kwargs = model.preprocess(FlowTensor(torch.zeros(1, *model.state_shape)), prompt=["a cat"])
    assert model.denoiser_dtype == kwargs["encoder_hidden_states"].dtype == torch.bfloat16
    assert before["encoder_hidden_states"].dtype == torch.float32
    assert model(x, torch.tensor([0.5]), **kwargs).data.dtype == torch.float32
    assert (
        from_pipeline(tiny.build("stable_diffusion_xl")).to(torch.float16).vae.dtype
        == torch.float32
    )


def test_a_compiled_network_stays_compiled_when_it_is_moved():
    model = from_pretrained("tiny", compile=True)
    network = model.denoiser
    assert model.to(torch.bfloat16).denoiser is not network
    assert model.denoiser._compiled_call_impl is not None
