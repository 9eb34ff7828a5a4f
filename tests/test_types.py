"""FlowTensor's arithmetic is torch's."""

import pytest
import torch

from flowgym_gym import FlowTensor

X = torch.arange(6.0).reshape(2, 3)


def test_arithmetic_is_that_of_the_tensor():
    x, y = FlowTensor(X), FlowTensor(X + 1)
    for mine, theirs in [
        (x + y, X + (X + 1)),
        (2 - x, 2 - X),
        (x - 2, X - 2),
        (3 * x, 3 * X),
        (x / y, X / (X + 1)),
        (-x, -X),
        (x**2, X**2),
        (x * torch.tensor([[2.0], [3.0]]), X * torch.tensor([[2.0], [3.0]])),
        (1 + x, 1 + X),
    ]:
        assert isinstance(mine, FlowTensor)
        assert torch.equal(mine.data, theirs)


def test_batch_access():
    x = FlowTensor(X)
    assert len(x) == 2
    assert x[0].shape == (1, 3)
    assert x[-1].data.tolist() == [[3, 4, 5]]
    assert x[[1, 0]].data.tolist() == X.flip(0).tolist()
    assert torch.equal(FlowTensor.collate([x[0], x[1]]).data, X)
    assert x.aggregate("sum").tolist() == [3, 12]
    assert x.aggregate().tolist() == [1, 4]


def test_gradient_is_that_of_the_closed_form():
    x = FlowTensor(X.clone()).requires_grad()
    gradient = x.gradient((x**2).aggregate("sum"))
    assert torch.equal(gradient.data, 2 * X)


def test_bad_input_is_named():
    with pytest.raises(TypeError, match="got list"):
        FlowTensor([1, 2])
    with pytest.raises(ValueError, match="batch"):
        FlowTensor(torch.tensor(1.0))
    with pytest.raises(ValueError, match="'max'"):
        FlowTensor(X).aggregate("max")
    with pytest.raises(ValueError, match="at least one"):
        FlowTensor.collate([])
    with pytest.raises(TypeError):
        FlowTensor(X) + "a"
