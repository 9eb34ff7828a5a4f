"""What an environment needs to know of a model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Any, ClassVar, Generic, Literal

import torch
from torch import Tensor, nn

from flowgym_gym.checks import check_choice
from flowgym_gym.dynamics import OUTPUTS, Schedule
from flowgym_gym.errors import ModelError, OptionError, reason, shown
from flowgym_gym.schedulers import Scheduler
from flowgym_gym.types import D, FlowTensor, append_dims

OutputType = Literal["epsilon", "velocity", "endpoint", "score", "v_prediction"]


class BaseModel(ABC, nn.Module, Generic[D]):
    """A pre-trained model, its schedule, and the way from noise to a finished sample.

    A subclass sets ``output_type`` and defines ``scheduler``, ``sample_p0`` and ``forward``; models
    with a latent space or a prompt also define ``preprocess`` and ``postprocess``.

    Args:
        device: Where the model lies.

    Attributes:
        output_type: What ``forward`` predicts: ``"epsilon"`` (the noise), ``"velocity"``,
            ``"endpoint"`` (the sample), ``"score"``, or diffusers' ``"v_prediction"``.
        prompts: The prompts that episodes draw from; None for a model without prompts. Where there
            is more than one, observations hold the prompt's embedding. ``reset(options={"prompt":
            ...})`` is for models with prompts, and for those whose ``sample_p0`` names an argument
            ``prompt``.
        moved: Whether it was brought to another device or number format since it was made; such a
            model is not what others mean who ask for one with the same arguments.
        incidental: Names of constructor arguments that change nothing about an episode but
            rounding, speed or the prompts of later ones: a state of an environment belongs to
            others that differ in these.
    """

    output_type: OutputType
    prompts: list[str] | None = None
    moved: bool = False
    _place: Tensor
    incidental: ClassVar[tuple[str, ...]] = ("device", "prompts")

    def __init__(self, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.device = torch.device("cpu" if device is None else device)

    @property
    def device(self) -> torch.device:
        """Where the model lies; follows ``to``, ``cuda`` and the like, of the model or of a module
        that holds it.
        """
        here = self._place.device
        return self._device if here == self._placed else here

    @device.setter
    def device(self, device: torch.device | str) -> None:
        try:
            self._device = torch.device(device)
            place = torch.empty(0, device=device)
        except (RuntimeError, AssertionError, TypeError) as error:
            raise OptionError(
                f"device of {type(self).__name__} is {shown(device)}, which cannot be used here "
                f"({reason(error)})"
            ) from error
        # An empty buffer goes wherever the module goes. What was asked for is kept: "cuda" is not
        # "cuda:0" to torch.
        self.register_buffer("_place", place, persistent=False)
        self._placed = self._place.device

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> BaseModel[D]:
        if not self.moved and _changes(fn, [*self.parameters(), *self.buffers()]):
            self._leave()
            self.moved = True
        super()._apply(fn, recurse)
        return self

    def _leave(self) -> None:
        """Take leave of whatever is shared with other models; called before the first move."""

    @property
    @abstractmethod
    def scheduler(self) -> Scheduler[D]:
        """The schedule that the model was trained on."""

    @abstractmethod
    def sample_p0(
        self, n: int, *, generator: torch.Generator | None = None, **kwargs: Any
    ) -> tuple[D, dict[str, Any]]:
        """Draw initial noise.

        Where this method and ``preprocess`` name the argument ``generator``, as those of this
        package's models do, environments hand them the episode's own generator, and no other thread
        notices. Where one of them does not, environments seed the global generators of torch, numpy
        and Python around both calls and restore them afterwards, and ``generator`` stays None: a
        thread that draws from these meanwhile gets other numbers.

        Args:
            n: Number of samples.
            generator: Where random numbers come from, on the CPU; None for torch's global
                generator. May be left out.
            **kwargs: What the user asked for, such as ``prompt``.

        Returns:
            The noise, shape ``(n, *)``, and the keyword arguments of the episode: lists and tensors
            with one entry per sample, such as ``{"prompt": [...]}``.
        """

    @abstractmethod
    def forward(self, x: D, t: Tensor, **kwargs: Any) -> D:
        """Predict what ``output_type`` says.

        Args:
            x: States, shape ``(n, *)``, float32.
            t: Times in [0, 1], shape ``(n,)``.
            **kwargs: What ``preprocess`` returned.

        Returns:
            The prediction, same shape as ``x``.
        """

    def preprocess(
        self, x: D, *, generator: torch.Generator | None = None, **kwargs: Any
    ) -> tuple[D, dict[str, Any]]:
        """Prepare an episode once before its first step, such as encoding the prompt.

        Args:
            x: Initial noise, shape ``(n, *)``.
            generator: As for ``sample_p0``, whose draws come first; this one draws nothing.
            **kwargs: What ``sample_p0`` returned.

        Returns:
            The initial states and the keyword arguments that ``forward`` takes, one entry per
            sample.
        """
        return x, kwargs

    def postprocess(self, x: D) -> D:
        """Turn final states into finished samples, such as decoding a latent.

        Args:
            x: Final states, shape ``(n, *)``.

        Returns:
            Samples, batch first; images are ``(n, 3, H, W)`` in [0, 1].
        """
        return x

    def picture(self, x: D) -> Tensor:
        """Show finished samples, for ``render``.

        Args:
            x: Samples, as ``postprocess`` returns them.

        Returns:
            Pictures in [0, 1], shape ``(n, 3, H, W)``.

        Raises:
            ModelError: If the samples are no images and the model does not say how to draw them.
        """
        if x.data.ndim != 4 or x.data.shape[1] not in (1, 3):
            raise ModelError(
                f"{type(self).__name__} makes samples of shape {tuple(x.data.shape[1:])}, which "
                "are no images; define picture to render them"
            )
        return x.data.clamp(0, 1).expand(-1, 3, -1, -1)

    def check_prompt(self, prompt: str) -> None:
        """Raise an OptionError unless the model takes the prompt; by default it takes any text."""

    def embed_prompts(self, prompts: list[str]) -> Tensor:
        """One vector per prompt for the observation, shape ``(n, features)``, float32.

        Only called where ``prompts`` holds more than one.
        """
        raise OptionError(
            f"{type(self).__name__} has {len(self.prompts or [])} prompts but does not define "
            "embed_prompts; define it, or give a single prompt"
        )

    def train_loss(
        self, x1: D, xt: D | None = None, t: Tensor | None = None, **kwargs: Any
    ) -> Tensor:
        """Mean squared error of the prediction, per sample.

        Args:
            x1: Clean samples, shape ``(n, *)``.
            xt: Their noisy states at ``t``; drawn if left out.
            t: Times, shape ``(n,)``; uniform if left out.
            **kwargs: Passed to ``forward``.

        Returns:
            Losses, shape ``(n,)``.
        """
        if t is None:
            t = torch.rand(len(x1), dtype=torch.float32, device=x1.device)
        if t.shape != (len(x1),):
            raise ValueError(f"t has shape {tuple(t.shape)}, expected ({len(x1)},)")
        coefficients = [
            getattr(self.scheduler, name)(t) for name in ("alpha", "beta", "alpha_dot", "beta_dot")
        ]
        schedule = Schedule(*(append_dims(c, x1.data.ndim) for c in coefficients))
        if xt is None:
            x0 = x1.randn_like()
            xt = schedule.alpha * x1 + schedule.beta * x0
        check_choice("output_type", self.output_type, OUTPUTS)
        # x_1 = p x + q o, solved for the output o; where q is infinite (alpha is 0), eps = r x + s
        # o is.
        (p, q), (r, s) = OUTPUTS[self.output_type](schedule)
        noise = (xt - schedule.alpha * x1) / schedule.beta
        finite = torch.isfinite(q)
        target = ((x1 - p * xt) / q).combine(
            (noise - r * xt) / s, lambda a, b: torch.where(finite, a, b)
        )
        prediction = self.forward(xt, t, **kwargs)
        if not isinstance(prediction, FlowTensor) or prediction.shape != xt.shape:
            got = (
                tuple(prediction.shape)
                if isinstance(prediction, FlowTensor)
                else type(prediction).__name__
            )
            raise ModelError(
                f"{type(self).__name__}.forward returned {got}, expected a FlowTensor of "
                f"{tuple(xt.shape)}"
            )
        return ((prediction - target) ** 2).aggregate("mean")


def _changes(fn: Callable[[Tensor], Tensor], tensors: Iterable[Tensor]) -> bool:
    """Whether a function such as that of ``to`` gives any tensor another device or number
    format.
    """
    kinds = {(tensor.dtype, tensor.device) for tensor in tensors}
    probes = [torch.empty(0, dtype=dtype, device=device) for dtype, device in kinds]
    return any(fn(probe) is not probe for probe in probes)
