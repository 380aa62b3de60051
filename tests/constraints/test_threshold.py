"""The threshold by a fixed number of steps, and that no word of any set waits for a device."""

import pytest
import torch
from constraints.cases import CASES, sets, trials
from torch.utils._python_dispatch import TorchDispatchMode

from rai_toolbox import inductor_pass
from rai_toolbox.constraints import shrinking
from rai_toolbox.constraints.kernels.blocks import COLUMNS
from rai_toolbox.constraints.kernels.threshold import each, precision, threshold


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
    alone = [sets.L1Ball(r[None]).project(row[None]) for r, row in zip(radius, x, strict=True)]
    assert torch.equal(y, torch.cat(alone))


SHAPES = [(3, 20)] * 50 + [(7, 5, 4), (1, 20), (0, 20), (400, 20), (5, 6), (2, 5000), (2, 70_000)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("radius", [1e-3, 15.0, 1e6], ids=["all", "some", "none"])
def test_grouped_l1_balls_are_one_by_one(radius, dtype, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    made = [torch.randn(shape, generator=generator).to(dtype) for shape in SHAPES]
    made.append(torch.randn(20, 30, generator=generator).to(dtype).t())
    made[0][1, 2], made[1][0, 0] = torch.nan, torch.inf
    alone = [sets.L1Ball(radius).project(x) for x in made]
    for in_cache in (shrinking.IN_CACHE, 50):
        monkeypatch.setattr(shrinking, "IN_CACHE", in_cache)
        together = [x.clone() for x in made]
        sets.L1Ball(radius).project_each_(together)
        for ours, theirs in zip(together, alone, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)
    assert alone[0][1].isnan().all()
    assert alone[1][0].isnan().all()


@pytest.mark.parametrize("values", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_graph_of_its_own_leaves_rows_that_need_more_steps(values, dtype):
    """Rows come out projected, or as they were and said to be so."""
    x = torch.stack([values(300) * s for s in (1e-3, 1.0, 1e3)]).to(dtype)
    radius = torch.tensor(0.5, dtype=torch.float64)
    y = x.clone()
    wrong = shrinking._fixed(y, radius)
    done = (y != x).any(1) | (x.double().abs().sum(1) <= 0.5)
    assert torch.equal(wrong.view(-1), ~done)
    assert (sets.L1Ball(0.5).violation(y)[done] == 0).all()
    wide = in_float64(x, 0.5)[done]
    eps = torch.finfo(dtype).eps
    assert ((y[done].double() - wide).abs() <= eps * wide.abs() + 1e-6).all()


def test_some_rows_need_more_steps_than_the_search_has():
    x = torch.stack([NASTY["doubling"](2**16), torch.ones(2**16).double()]).float()
    ball = sets.L1Ball(1e-3)
    y = x.clone()
    assert shrinking._fixed(y, torch.tensor(1e-3, dtype=torch.float64)).any()
    assert (ball.violation(ball.project(y)) == 0).all()


@pytest.mark.parametrize("radius", [1e-3, torch.tensor([[2e-3], [1e-3], [3e-3]])], ids=type)
def test_rows_that_a_graph_leaves_are_done_too(radius, monkeypatch):
    x = torch.randn(3, 2**16, generator=torch.Generator().manual_seed(0))
    x[1], x[2, 3] = 1.0, torch.nan
    radius = torch.as_tensor(radius, dtype=torch.float64)
    left = []

    def by_graph(*args):
        left.append(shrinking._fixed(*args))
        return left[0]

    monkeypatch.setattr(shrinking, "_by_graph", by_graph)
    y = x.clone()
    shrinking.project_l1_rows_(y, radius)
    assert left[0].view(-1).tolist() == [False, True, False]
    ball = sets.L1Ball(radius if radius.numel() > 1 else float(radius))
    torch.testing.assert_close(y, ball.project(x), rtol=1e-6, atol=1e-9, equal_nan=True)


def test_a_compiled_projection_is_one_operator_and_right():
    x = torch.randn(4, 30, generator=torch.Generator().manual_seed(0))
    ball = sets.L1Ball(1.5)
    seen = []

    def backend(module, inputs):
        seen.append([str(node.target) for node in module.graph.nodes])
        return module.forward

    torch._dynamo.reset()
    with torch.no_grad():
        y = torch.compile(ball.project, backend=backend, fullgraph=True)(x)
    torch._dynamo.reset()
    assert sum("project_l1_rows_" in name for name in seen[0]) == 1
    assert torch.equal(y, ball.project(x))


@pytest.mark.parametrize("works", [True, False])
def test_large_rows_have_a_graph_of_their_own_or_one_warning(works, monkeypatch):
    def graph(x, epsilon):
        if not works:
            raise RuntimeError("no compiler here")
        return shrinking._fixed(x, epsilon)

    monkeypatch.setattr(shrinking, "_graphs", {torch.Size([400, 400]): graph})
    x = torch.randn(400, 400, generator=torch.Generator().manual_seed(0))
    y, again = x.clone(), x.clone()
    radius = torch.tensor(10.0, dtype=torch.float64)
    if works:
        shrinking.project_l1_rows_(y, radius)
    else:
        with pytest.warns(UserWarning, match="stay eager: RuntimeError: no compiler here"):
            shrinking.project_l1_rows_(y, radius)
    shrinking.project_l1_rows_(again, radius)
    assert torch.equal(y, again)
    torch.testing.assert_close(y, sets.L1Ball(10.0).project(x))


def test_rows_of_many_shapes_are_all_compiled(monkeypatch):
    monkeypatch.setattr(shrinking, "_graphs", {})
    monkeypatch.setattr(inductor_pass, "inductor", lambda module, inputs: module.forward)
    torch._dynamo.reset()
    for k in range(12):  # more than torch compiles one function for
        x = torch.randn(200 + k, 200, generator=torch.Generator().manual_seed(k))
        expected = sets.L1Ball(3.0).project(x)
        shrinking.project_l1_rows_(x, torch.tensor(3.0, dtype=torch.float64))
        torch.testing.assert_close(x, expected)
    assert len(shrinking._graphs) == 12
    assert shrinking._fixed not in shrinking._graphs.values()


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
    number = torch.full((3, 1), 400.0)
    assert torch.equal(shrinking._number(x, x.new_full((3, 1), -9.0), None), number)
    try:
        for dtype in (torch.float64, torch.bfloat16):
            torch.set_default_dtype(dtype)
            assert torch.equal(ball.project(x), expected)
            assert torch.equal(shrinking._number(x, x.new_full((3, 1), -9.0), None), number)
    finally:
        torch.set_default_dtype(torch.float32)
    with torch.device("meta"):
        y = ball.project(x)
    assert torch.equal(y, expected)


@pytest.mark.parametrize("project", [lambda b, x: b.project(x), None], ids=["eager", "graph"])
def test_a_radius_beyond_float32(project):
    x = torch.tensor([[3e38, 1e38] * 10, [1.0, 2.0] * 10])
    ball = sets.L1Ball(1e39)
    if project is None:
        y = x.clone()
        shrinking._fixed(y, torch.tensor(1e39, dtype=torch.float64))
        y = ball.project(y)  # what needs more steps is left to these
    else:
        y = project(ball, x)
    assert (ball.violation(y) == 0).all()
    torch.testing.assert_close(y.double(), in_float64(x, 1e39), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_large_rows_of_few_bits_are_inside_in_compiled_steps(dtype):
    x = torch.randn(200, 300, generator=torch.Generator().manual_seed(0)).to(dtype)
    y = x.clone()
    shrinking.project_l1_rows_(y, torch.tensor(2.0, dtype=torch.float64))
    assert (sets.L1Ball(2.0).violation(y) == 0).all()


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


def test_what_is_exported_has_no_operator_of_ours():
    class Projection(torch.nn.Module):
        def forward(self, x):
            return sets.L1Ball(1.5).project(x)

    program = torch.export.export(Projection(), (torch.randn(3, 20),))
    assert not [node for node in program.graph.nodes if "rai_toolbox" in str(node.target)]
