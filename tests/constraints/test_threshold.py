"""The threshold by a fixed number of steps, and that no word of any set waits for a device."""

import pytest
import torch
from constraints.cases import CASES, sets, trials
from torch.utils._python_dispatch import TorchDispatchMode

from rai_toolbox.constraints.blocks import COLUMNS
from rai_toolbox.constraints.threshold import each, precision, threshold


class NothingIsRead(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert not any(word in str(func) for word in ("_local_scalar_dense", "nonzero")), func
        return func(*args, **(kwargs or {}))


# This one reads a number every few cycles, and says so.
@pytest.mark.parametrize("case", [c for c in CASES if c.kind != "Intersection"], ids=str)
def test_no_value_is_read(case, as_on_a_device):
    trial = trials(case, torch.float32)[-1]
    x, c = trial.normal(1, 2.0), trial.constraint
    c.violation(x)  # whether a set is empty is found out with its first batch of a shape
    words = [c.project, c.violation, c.lmo, lambda x: c.sample_(x.clone())]
    with NothingIsRead():
        y, *_ = [word(x) for word in (words if c.bounded else words[:2])]
    assert (c.violation(y) == 0).all()


def geometric(n, ratio):
    return ratio ** torch.arange(n, dtype=torch.float64)


NASTY = {
    "equal": lambda n: torch.ones(n, dtype=torch.float64),
    "linear": lambda n: torch.linspace(0, 1, n, dtype=torch.float64),
    "one above": lambda n: torch.cat([torch.ones(1), torch.zeros(n - 1)]).double(),
    "halving": lambda n: geometric(n, 0.5),
    "slowly falling": lambda n: geometric(n, 1 - 1 / n),
    "harmonic": lambda n: 1 / torch.arange(1, n + 1, dtype=torch.float64),
    "squares": lambda n: 1 / torch.arange(1, n + 1, dtype=torch.float64) ** 2,
    # each Newton step halves both the number above and the excess: the slowest there is
    "doubling": lambda n: -torch.floor(torch.log2(torch.arange(1, n + 1).double())).exp2() / n,
    "large": lambda n: 1e6 + torch.linspace(0, 1e-3, n, dtype=torch.float64),
    "huge": lambda n: torch.cat([torch.full((2,), 1e20), torch.ones(n - 2)]).double(),
}


@pytest.mark.parametrize("n", [2, 17, 1000, 100_000])
@pytest.mark.parametrize("values", NASTY.values(), ids=NASTY)
def test_the_fixed_number_of_steps_is_enough(values, n, as_on_a_device):
    check_sums(values, n)


@pytest.mark.parametrize("n", [2, 17, 1000, 300_000])
@pytest.mark.parametrize("values", NASTY.values(), ids=NASTY)
def test_the_loop_that_ends_early_does_not_end_too_early(values, n):
    check_sums(values, n)


def check_sums(values, n):
    """The sum above the threshold is right, for totals from tiny to all there is."""
    v = values(n) if n > 1 else values(2)
    totals = torch.tensor([1e-6, 1e-3, 0.1, 1.0, 10.0, 1e3, n / 2, 2.0 * n]).double()[:, None]
    rows = v.expand(len(totals), n).contiguous()
    for dtype in (torch.float32, torch.float64):
        below, t = threshold(each(lambda v: v, rows), totals, dtype)
        sums = sum((v() - t).clamp(min=0).sum(1, keepdim=True) for v in below)
        allowed = precision(dtype) + 1e-14 * n**0.5
        assert ((sums / totals - 1).abs() <= allowed).all(), sums / totals - 1


@pytest.mark.parametrize("shape", [(3, COLUMNS), (3, COLUMNS + 1), (2, 3 * COLUMNS - 1)], ids=str)
@pytest.mark.parametrize("kind", ["Simplex", "L1Ball", "centered"])
def test_long_rows_by_pieces(shape, kind):
    """Rows longer than a block of columns, with settings for each row and each column."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator)
    radius = torch.rand(shape[0], 1, generator=generator) + 0.5
    center = torch.rand(shape[1], generator=generator) / shape[1]
    made = {
        "Simplex": lambda r, c: sets.Simplex(r),
        "L1Ball": lambda r, c: sets.L1Ball(r),
        "centered": lambda r, c: sets.L1Ball(r, center=c),
    }[kind]
    y = made(radius, center).project(x)
    assert (made(radius, center).violation(y) == 0).all()
    exact = made(radius.double(), center.double()).project(x.double())
    assert (y.double() - exact).abs().max() <= 1e-6 * radius.max()
    one_by_one = [
        made(r[None], center).project(row[None]) for r, row in zip(radius, x, strict=True)
    ]
    assert torch.equal(y, torch.cat(one_by_one))
