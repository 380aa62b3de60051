"""The threshold by a fixed number of steps, and that no word of any set waits for a device."""

import pytest
import torch
from constraints.cases import CASES, sets, trials
from torch.utils._python_dispatch import TorchDispatchMode

from rai_toolbox.constraints.kernels.blocks import BLOCK
from rai_toolbox.constraints.kernels.threshold import lowered


class NothingIsRead(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert not any(word in str(func) for word in ("_local_scalar_dense", "nonzero")), func
        return func(*args, **(kwargs or {}))


ITERATE = {"Intersection", "Birkhoff", "Transport"}  # these read a number at times, and say so


@pytest.mark.parametrize("case", [c for c in CASES if c.kind not in ITERATE], ids=str)
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
    check_as_by_sorting(values, n)


@pytest.mark.parametrize("n", [2, 17, 1000, 300_000])
@pytest.mark.parametrize("values", NASTY.values(), ids=NASTY)
def test_the_loop_that_ends_early_does_not_end_too_early(values, n):
    check_as_by_sorting(values, n)


def check_as_by_sorting(values, n):
    """For totals from tiny to all there is: the sum is right, and each entry as by sorting."""
    totals = torch.tensor([1e-6, 1e-3, 0.1, 1.0, 10.0, 1e3, n / 2, 2.0 * n]).double()[:, None]
    for dtype in (torch.float32, torch.float64):
        rows = values(n).to(dtype).expand(len(totals), n).contiguous()
        y = lowered(rows, totals).double()
        eps, sums = torch.finfo(dtype).eps, 1e-14 * n**0.5
        assert ((y.sum(1, keepdim=True) / totals - 1).abs() <= 2 * eps + sums).all()
        below = rows.double() - rows.double().amax(1, keepdim=True)
        order = below.sort(1, descending=True).values
        steps = (order.cumsum(1) - totals) / torch.arange(1, n + 1)
        last = (order > steps).sum(1, keepdim=True) - 1
        exact = (below - steps.gather(1, last)).clamp(min=0)
        assert ((y - exact).abs() <= (4 * eps + sums) * totals).all()


@pytest.mark.parametrize("shape", [(3, BLOCK), (3, 4 * BLOCK + 1)], ids=str)
@pytest.mark.parametrize("kind", ["Simplex", "L1Ball", "centered"])
def test_long_rows(shape, kind):
    """Rows longer than a block, with settings for each row and each column."""
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


def in_float64(x, radius):
    """The projection by the general way, of the same numbers."""
    return sets.L1Ball(radius).project(x.double())


ROWS = {
    **{name: values for name, values in NASTY.items() if name not in ("large", "huge")},
    "normal": lambda n: torch.randn(n, generator=torch.Generator().manual_seed(0)).double(),
    "cubes": lambda n: torch.randn(n, generator=torch.Generator().manual_seed(0)).double() ** 3,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("n", [1, 2, 17, 400, 100_000])
@pytest.mark.parametrize("values", ROWS.values(), ids=ROWS)
def test_rows_in_float32_are_as_exact_as_in_float64(values, n, dtype):
    radius = torch.tensor([1e-3, 0.1, 1.0, 10.0, 1e3]).double()[:, None]
    x = values(n).expand(len(radius), n).to(dtype).contiguous()
    x[:, ::2] *= -1
    ball = sets.L1Ball(radius)
    y = ball.project(x)
    assert (ball.violation(y) == 0).all()
    wide = in_float64(x, radius)
    # one spacing of each entry, and what the sum may be short of, which the largest ones bear
    info = torch.finfo(dtype)
    allowed = info.eps * wide.abs() + 1e-6 * radius + info.smallest_normal * info.eps
    assert ((y.double() - wide).abs() <= allowed).all()


SHAPES = [(3, 20)] * 50 + [(7, 5, 4), (1, 20), (0, 20), (400, 20), (5, 6), (2, 5000), (2, 70_000)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("radius", [1e-3, 15.0, 1e6], ids=["all", "some", "none"])
def test_grouped_l1_balls_are_one_by_one(radius, dtype):
    generator = torch.Generator().manual_seed(0)
    together = [torch.randn(shape, generator=generator).to(dtype) for shape in SHAPES]
    together.append(torch.randn(20, 30, generator=generator).to(dtype).t())
    together[0][1, 2], together[1][0, 0] = torch.nan, torch.inf
    alone = [sets.L1Ball(radius).project(x) for x in together]
    sets.L1Ball(radius).project_each_(together)
    for ours, theirs in zip(together, alone, strict=True):
        rtol = 4 * torch.finfo(dtype).eps
        torch.testing.assert_close(ours, theirs, rtol=rtol, atol=1e-7 * radius, equal_nan=True)
    assert alone[0][1].isnan().all()
    assert alone[1][0].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("total", [1e-3, 15.0])
def test_grouped_simplices_are_one_by_one(total, dtype):
    """Also rows that are inside, have the right sum but are not, or are not finite."""
    generator = torch.Generator().manual_seed(0)
    shapes = [*SHAPES, (200, 250), (50, 10, 100)]
    together = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    large = together[-2]
    inside = sets.Simplex(total).project(large[:1])[0]
    large[3], large[4] = inside, inside.index_add(0, torch.arange(2), inside.new_tensor([2.0, -2]))
    large[1, 2], large[0, 0], together[0][1, 2] = torch.nan, torch.inf, torch.nan
    alone = [
        torch.cat([sets.Simplex(total).project(row[None]) for row in x]) for x in together if len(x)
    ]
    sets.Simplex(total).project_each_(together)
    for ours, theirs in zip(filter(len, together), alone, strict=True):
        rtol = 4 * torch.finfo(dtype).eps
        torch.testing.assert_close(ours, theirs, rtol=rtol, atol=2e-7 * total, equal_nan=True)
    assert torch.equal(large[3], inside)
    assert (sets.Simplex(total).violation(large)[2:] == 0).all()


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # torch's own first use
def test_forward_mode_goes_through_rows_of_float32():
    x = torch.tensor([[3.0, 1.0, -0.5]])
    ball = sets.L1Ball(2.0)
    value, tangent = torch.func.jvp(ball.project, (x,), (torch.ones(1, 3),))
    torch.testing.assert_close(value, ball.project(x))
    torch.testing.assert_close(tangent, torch.tensor([[0.0, 0.0, 0.0]]))  # to the vertex (2, 0, 0)


def test_rows_in_float32_whatever_the_defaults_are():
    x = torch.randn(3, 400, generator=torch.Generator().manual_seed(0))
    ball = sets.L1Ball(2.0)
    expected = ball.project(x)
    try:
        for dtype in (torch.float64, torch.bfloat16):
            torch.set_default_dtype(dtype)
            assert torch.equal(ball.project(x), expected)
    finally:
        torch.set_default_dtype(torch.float32)
    with torch.device("meta"):
        y = ball.project(x)
    assert torch.equal(y, expected)


def test_a_radius_beyond_float32():
    x = torch.tensor([[3e38, 1e38] * 10, [1.0, 2.0] * 10])
    ball = sets.L1Ball(1e39)
    y = ball.project(x)
    assert (ball.violation(y) == 0).all()
    torch.testing.assert_close(y.double(), in_float64(x, 1e39), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_large_rows_of_few_bits_are_inside(dtype):
    x = torch.randn(200, 300, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert (sets.L1Ball(2.0).violation(sets.L1Ball(2.0).project(x)) == 0).all()


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # torch's own first use
@pytest.mark.slow
def test_forward_mode_goes_through_a_compiled_projection():
    x = torch.randn(3, 20, generator=torch.Generator().manual_seed(0))
    ball = sets.L1Ball(1.5)

    def tangent(x):
        return torch.func.jvp(ball.project, (x,), (x,))[1]

    torch._dynamo.reset()
    with torch.no_grad():
        y = torch.compile(tangent, backend="aot_eager")(x)
    torch._dynamo.reset()
    torch.testing.assert_close(y, tangent(x))
