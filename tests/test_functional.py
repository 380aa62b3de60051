"""negate: the sign, what it passes on, and what it refuses."""

import functools
import inspect
from importlib.metadata import version

import pytest
import torch

import rai_toolbox
from rai_toolbox.functional import negate


def test_passes_all_arguments_and_flips_the_sign():
    seen = []

    def fn(*args, **kwargs):
        seen.append((args, kwargs))
        return 3.0

    assert negate(fn)(1, 2, key=[4]) == -3.0
    assert seen == [((1, 2), {"key": [4]})]


def test_keeps_name_docstring_and_signature():
    def loss(x: torch.Tensor, *, scale: float = 2.0) -> torch.Tensor:
        """The doc."""
        return scale * x

    negated = negate(loss)
    assert negated.__name__ == "loss"
    assert negated.__doc__ == "The doc."
    assert negated.__wrapped__ is loss
    assert inspect.signature(negated) == inspect.signature(loss)


def test_result_is_new_and_gradients_flow():
    x = torch.tensor([1.0, -2.0], requires_grad=True)
    out = negate(torch.square)(x)
    assert out.tolist() == [-1.0, -4.0]
    out.sum().backward()
    assert x.grad.tolist() == [-2.0, 4.0]

    y = torch.ones(2)
    assert negate(lambda t: t)(y) is not y
    assert y.tolist() == [1.0, 1.0]


def test_twice_is_the_function_itself():
    x = torch.tensor([0.5, float("inf"), -3.0])
    assert torch.equal(negate(negate(torch.relu))(x), torch.relu(x))


@pytest.mark.parametrize(
    "fn",
    [
        functools.partial(torch.mul, other=2),
        lambda x: 2 * x,
        torch.nn.Linear(1, 1, bias=False),
        type("Callable", (), {"__call__": lambda self, x: 2 * x})(),
    ],
    ids=["partial", "lambda", "module", "object"],
)
def test_callables_without_a_name(fn):
    x = torch.ones(3, 1)
    assert torch.equal(negate(fn)(x), -fn(x))


def test_a_module_is_not_copied():
    module = torch.nn.Dropout(p=1.0)
    negated = negate(module)
    module.eval()
    assert negated(torch.ones(2)).tolist() == [-1.0, -1.0]
    assert "training" not in vars(negated)


@pytest.mark.parametrize("fn", [None, 1, "relu", torch.ones(2)])
def test_refuses_what_cannot_be_called(fn):
    with pytest.raises(TypeError, match=r"`fn` must be callable, got "):
        negate(fn)


def test_exceptions_pass_through():
    def fails():
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        negate(fails)()


def test_the_version_is_that_of_the_installed_package():
    assert rai_toolbox.__version__ == version("rai-constrained")
