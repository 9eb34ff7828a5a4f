"""``FlowTensor``: a batch of states, the type that models, rewards and environments exchange."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

D = TypeVar("D", bound="FlowTensor")


class FlowTensor:
    """A batch of ``n`` states held in one tensor, shape ``(n, *)``, with arithmetic per element.

    Operations take another ``FlowTensor``, a tensor that broadcasts, or a number.

    Args:
        data: The states, shape ``(n, *)``.

    Raises:
        TypeError: If ``data`` is not a tensor.
        ValueError: If ``data`` has no batch dimension.

    >>> x = FlowTensor(torch.ones(2, 3))
    >>> (2 * x - 1).aggregate("sum")
    tensor([3., 3.])
    """

    __slots__ = ("data",)

    def __init__(self, data: Tensor) -> None:
        if not isinstance(data, Tensor):
            raise TypeError(f"FlowTensor holds a torch.Tensor, got {type(data).__name__}")
        if data.ndim < 1:
            raise ValueError(
                "FlowTensor holds a batch, shape (n, *); got a tensor with no dimension"
            )
        self.data = data

    def __repr__(self) -> str:
        return (
            f"FlowTensor(shape={tuple(self.data.shape)}, dtype={self.data.dtype}, "
            f"device={self.data.device})"
        )

    def __len__(self) -> int:
        return self.data.shape[0]

    def __getitem__(self: D, index: int | slice | Tensor | Sequence[int]) -> D:
        """States selected along the batch; a single index keeps the batch dimension."""
        if isinstance(index, int):
            return type(self)(self.data[index].unsqueeze(0))
        return type(self)(self.data[index])

    @property
    def device(self) -> torch.device:
        """Where the states lie."""
        return self.data.device

    @property
    def dtype(self) -> torch.dtype:
        """The states' number format."""
        return self.data.dtype

    @property
    def shape(self) -> torch.Size:
        """Shape of the whole batch, ``(n, *)``."""
        return self.data.shape

    @classmethod
    def collate(cls: type[D], items: Sequence[D]) -> D:
        """Join batches along their first dimension.

        Raises:
            ValueError: If ``items`` is empty.
        """
        if not items:
            raise ValueError("collate needs at least one FlowTensor, got none")
        return cls(torch.cat([item.data for item in items]))

    def apply(self: D, op: Callable[[Tensor], Tensor]) -> D:
        """Apply a function to the tensor."""
        return type(self)(op(self.data))

    def combine(self: D, other: D, op: Callable[[Tensor, Tensor], Tensor]) -> D:
        """Apply a function of two tensors."""
        return type(self)(op(self.data, other.data))

    def aggregate(self, reduction: str = "mean") -> Tensor:
        """Reduce each state to a number.

        Args:
            reduction: ``"mean"`` or ``"sum"``.

        Returns:
            Shape ``(n,)``.
        """
        flat = self.data.reshape(len(self), -1)
        if reduction == "mean":
            return flat.mean(dim=1)
        if reduction == "sum":
            return flat.sum(dim=1)
        raise ValueError(f"reduction is 'mean' or 'sum', got {reduction!r}")

    def to(self: D, *args: object, **kwargs: object) -> D:
        """Move or convert, as :meth:`torch.Tensor.to`."""
        return self.apply(lambda x: x.to(*args, **kwargs))  # type: ignore[call-overload]

    def randn_like(self: D) -> D:
        """Standard normal noise of the same shape, from torch's global generator."""
        return self.apply(torch.randn_like)

    def ones_like(self: D) -> D:
        """Ones of the same shape."""
        return self.apply(torch.ones_like)

    def zeros_like(self: D) -> D:
        """Zeros of the same shape."""
        return self.apply(torch.zeros_like)

    def clone(self: D) -> D:
        """A copy that shares no memory."""
        return self.apply(torch.clone)

    def detach(self: D) -> D:
        """The same states, cut from the computation graph."""
        return self.apply(torch.detach)

    def requires_grad(self: D, mode: bool = True) -> D:
        """Record operations for gradients, in place."""
        return self.apply(lambda x: x.requires_grad_(mode))

    def gradient(
        self: D, outputs: Tensor, create_graph: bool = False, retain_graph: bool = False
    ) -> D:
        """Gradient of the sum of ``outputs`` with respect to the states."""
        (gradient,) = torch.autograd.grad(
            outputs.sum(), self.data, create_graph=create_graph, retain_graph=retain_graph
        )
        return type(self)(gradient)

    def _operate(self: D, other: D | Tensor | float, op: Callable[[Tensor, Tensor], Tensor]) -> D:
        if isinstance(other, FlowTensor):
            return self.combine(other, op)
        if isinstance(other, Tensor | int | float):
            return type(self)(op(self.data, other))  # type: ignore[arg-type]
        return NotImplemented

    def __add__(self: D, other: D | Tensor | float) -> D:
        return self._operate(other, torch.add)

    __radd__ = __add__

    def __sub__(self: D, other: D | Tensor | float) -> D:
        return self._operate(other, torch.sub)

    def __rsub__(self: D, other: D | Tensor | float) -> D:
        return self._operate(other, torch.rsub)

    def __mul__(self: D, other: D | Tensor | float) -> D:
        return self._operate(other, torch.mul)

    __rmul__ = __mul__

    def __truediv__(self: D, other: D | Tensor | float) -> D:
        return self._operate(other, torch.div)

    def __pow__(self: D, power: float) -> D:
        return self.apply(lambda x: x**power)

    def __neg__(self: D) -> D:
        return self.apply(torch.neg)


def oddity(tensor: Tensor) -> str | None:
    """What keeps a tensor from being an array of real numbers, in words; None where nothing
    does.
    """
    if tensor.device.type == "meta":
        return "a tensor on the device 'meta', which holds no numbers"
    if tensor.is_quantized:
        return "a quantised tensor"
    if tensor.is_nested or tensor.layout is not torch.strided:
        return f"a tensor of layout {tensor.layout}"
    if tensor.is_complex():
        return f"complex numbers (dtype {str(tensor.dtype).removeprefix('torch.')})"
    return None


def real_tensor(values: object, device: torch.device | str = "cpu") -> Tensor:
    """Numbers as a float64 tensor.

    Raises:
        TypeError: If they are complex, or no numbers.
        ValueError: If they are ragged.
    """
    tensor = torch.as_tensor(values, device="cpu")
    if tensor.is_complex():
        raise TypeError("they are complex")
    # From the values, as a list of numbers would have lost digits as float32.
    return torch.as_tensor(values, dtype=torch.float64, device=device)


def append_dims(values: Tensor, ndim: int) -> Tensor:
    """Append dimensions of size 1 to a tensor of shape ``(n,)`` until it has ``ndim``, so that it
    broadcasts.
    """
    return values.reshape(values.shape + (1,) * (ndim - values.ndim))
