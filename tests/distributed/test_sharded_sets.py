"""Every set under every engine: the trajectory of one process, and feasible as a whole."""

from functools import partial

import pytest
import torch
from engines import FEW_STEPS, STEPS, Bag, both, columns, ddp, fsdp, rows, trained, whole
from ranks import on_ranks
from tiers import slow_but
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch_versions import shards_on_cpu, views_columns

from rai_toolbox import constraints as sets
from rai_toolbox import to_batch
from rai_toolbox.constraints import Constraint
from rai_toolbox.optim import ProjectedOptimizer

pytestmark = shards_on_cpu


def each(n, *rest):
    """A setting of one value for each of n sub-tensors."""
    return torch.linspace(0.1, 0.5, n).reshape(n, *rest)


SETS = {
    "Box": sets.Box(-0.1, 0.2),
    "NonNegative": sets.NonNegative(),
    "LinfBall": sets.LinfBall(0.2, center=0.1),
    "L2Ball": sets.L2Ball(0.3),
    "L2Ball around": sets.L2Ball(0.3, center=0.1),
    "L1Ball": sets.L1Ball(0.3),
    "BoundedBall": sets.BoundedBall(sets.L2Ball(0.3), -0.1, 0.2),
    "Simplex": sets.Simplex(),
    "BoxSection": sets.BoxSection(1.0, 0.5, -0.2, 0.6),
    "MaxNorm": sets.MaxNorm(0.3, p=1),
    "MaxNorm of columns": sets.MaxNorm(0.3, dim=0),
    "MinMaxNorm": sets.MinMaxNorm(0.2, 0.3),
    "UnitNorm": sets.UnitNorm(),
    "Hyperplane": sets.Hyperplane(1.0, 0.3),
    "HalfSpace": sets.HalfSpace(1.0, 0.1),
    "Monotone": sets.Monotone(),
    "TopK": sets.TopK(2),
    "SparseSimplex": sets.SparseSimplex(2),
}
# (shape, param_ndim, set): uneven shards, tensors of settings, stacks of matrices, vectors
CASES = {
    **{name: ((5, 3), -1, of) for name, of in SETS.items()},
    **{f"{name}, whole": ((6, 4), None, SETS[name]) for name in ("L2Ball", "L1Ball", "TopK")},
    **{f"{name}, of a vector": ((5,), 1, SETS[name]) for name in ("Box", "Simplex")},
    **{f"{name}, of kernels": ((4, 3, 2, 2), -1, SETS[name]) for name in ("L1Ball", "UnitNorm")},
    "Box of rows": ((6, 4), -1, sets.Box(-each(6, 1), each(4))),
    "Box of elements": ((5, 3), -1, sets.Box(None, torch.linspace(-1, 1, 15).reshape(5, 3))),
    "L2Ball of rows": ((5, 3), -1, sets.L2Ball(each(5, 1), center=each(5, 1) / 3)),
    "BoundedBall of rows": ((5, 3), -1, sets.BoundedBall(sets.L1Ball(each(5, 1)), -0.2, 0.3)),
    "Affine": ((5, 3), -1, sets.Affine(torch.tensor([[1.0, 2.0, -1.0]]), each(5, 1))),
    "Intersection": ((5, 3), -1, sets.Intersection(sets.Box(-0.1, each(5, 1)), sets.L2Ball(0.4))),
    "Masked": ((5, 3), -1, sets.Masked(sets.L1Ball(0.3), torch.tensor([True, False, True]))),
    "Masked, each": ((3, 3), -1, sets.Masked(sets.L1Ball(0.3), torch.eye(3) < 1)),
    "Masked box": (
        (5, 3),
        -1,
        sets.Masked(sets.Box(-0.1, 0.1), torch.arange(15).view(5, 3) % 2 > 0),
    ),
    "SpectralBall": ((5, 3), None, sets.SpectralBall(0.3)),
    "SpectralBall of kernels": ((4, 3, 2, 2), 2, sets.SpectralBall(each(12, 1, 1))),
    "NuclearBall": ((6, 4), None, sets.NuclearBall(0.3)),
    "PSD": ((3, 3), None, sets.PSD()),
    "Stiefel": ((6, 4), 2, sets.Stiefel()),
    "Rank": ((6, 4), 2, sets.Rank(2)),
    "Birkhoff": ((3, 3), None, sets.Birkhoff()),
    "Birkhoff, each": ((5, 2, 2), 2, sets.Birkhoff(each(5, 1, 1) + 0.1)),
    "Transport": ((5, 2, 3), 2, sets.Transport(torch.full((5, 2, 1), 0.3), torch.full((3,), 0.2))),
}
SHAPES = [shape for shape, _, _ in CASES.values()]
ENGINES = {
    "fsdp": (2, fsdp),
    "ddp": (2, ddp),
    "columns": (2, columns),
    "rows": (2, rows),
    "fsdp on 4": (4, fsdp),
    "ddp on 4": (4, ddp),
    "columns on 4": (4, columns),
    "fsdp x rows": (4, partial(both, 0)),
    "fsdp x columns": (4, partial(both, 1)),
}


def groups(params):
    return [
        {"params": [(name, p)], "param_ndim": k, "constraint": of}
        for (name, (_, k, of)), p in zip(CASES.items(), params, strict=True)
    ]


def by_adam(params):
    return ProjectedOptimizer(groups(params), torch.optim.Adam, lr=0.05)


def run(engine, steps):
    module = engine(Bag(SHAPES))
    opt = trained(module, by_adam, last=steps)
    values = [whole(p) for p in module.parameters()]
    return values, [float(v) for v in opt.violation()]


@pytest.mark.parametrize(
    ("engine", "steps"),
    [("fsdp", FEW_STEPS), ("ddp", FEW_STEPS)]
    + [pytest.param("columns", FEW_STEPS, marks=views_columns)]
    + [pytest.param(engine, STEPS, marks=pytest.mark.slow) for engine in ENGINES],
)
def test_every_set_goes_the_way_of_one_process(engine, steps):
    module = Bag(SHAPES)
    trained(module, by_adam, last=steps)
    k, under = ENGINES[engine]
    for values, violations in on_ranks(k, run, under, steps, timeout=250):
        wrong = {}
        expected = [p.detach() for p in module.parameters()]
        for case, got, one, outside in zip(CASES, values, expected, violations, strict=True):
            _, k, of = CASES[case]
            same = torch.equal if of.elementwise else partial(torch.allclose, rtol=0, atol=1e-6)
            if not same(got, one) or of.violation(to_batch(got, k)).any() or outside != 0.0:
                wrong[case] = (got - one).abs().max().item(), outside
        assert not wrong


# --- what the ranks send meanwhile --------------------------------------------------------------


def sent_by_a_step(case, placements):
    mesh = init_device_mesh("cpu", (2,))
    shape, k, constraint = CASES[case]
    p = nn.Parameter(distribute_tensor(torch.ones(shape), mesh, placements, src_data_rank=None))
    p.grad = p.detach().clone()
    group = {"params": [p], "param_ndim": k, "constraint": constraint}
    opt = ProjectedOptimizer([group], torch.optim.Adam, lr=0.1)
    with CommDebugMode() as talk:
        opt.step()
    return talk.get_total_counts()


def whole_on_each_row(case):
    shape, k, of = CASES[case]
    return k == -1 and not case.endswith("of columns") and case not in ("Affine", "Masked, each")


@pytest.mark.parametrize("dim", slow_but([0, 1]))
def test_nothing_is_sent_where_each_rank_has_all_that_a_set_couples(dim):
    if dim == 1:
        quiet = {
            "Box",
            "MaxNorm of columns",
            "Box of elements",
            "Masked box",
            "SpectralBall of kernels",
        }
    else:
        quiet = {case for case in CASES if whole_on_each_row(case)}
        quiet |= {"Box, of a vector", "SpectralBall of kernels"}
    for sent in on_ranks(2, sent_by_all, dim):
        assert {case for case, n in sent.items() if n == 0} >= quiet
        assert sum(n > 0 for n in sent.values()) >= 5  # so that the measure can tell


def sent_by_all(dim):
    return {
        case: sent_by_a_step(case, [Shard(min(dim, len(shape) - 1))])
        for case, (shape, _, _) in CASES.items()
    }


# --- words other than project_ ------------------------------------------------------------------


def words(placements, mesh_shape):
    mesh = init_device_mesh("cpu", mesh_shape)
    found = {}
    for case, (shape, k, of) in CASES.items():
        if len(shape) != 2 or k not in (-1, None):
            continue
        x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
        held = distribute_tensor(x, mesh, placements, src_data_rank=None)
        batch, seen = to_batch(x, k), to_batch(held, k)
        equal = [torch.equal(of.violation(seen), of.violation(batch))]
        equal.append(torch.equal(whole(of.project(seen)), of.project(batch)))
        if of.bounded and type(of)._minimizer is not Constraint._minimizer:
            equal.append(torch.equal(whole(of.lmo(seen)), of.lmo(batch)))
        if of.bounded:
            one, other = (torch.Generator().manual_seed(2) for _ in range(2))
            equal.append(
                torch.equal(whole(of.sample_(seen, one)), of.sample_(batch.clone(), other))
            )
        found[case] = equal
    return found


@pytest.mark.parametrize(
    ("k", "mesh", "placements"),
    slow_but(
        [
            (2, (2,), [Shard(1)]),
            (2, (2,), [Shard(0)]),
            (2, (2,), [Replicate()]),
            (4, (2, 2), [Shard(0), Shard(1)]),
        ]
    ),
)
def test_every_word_says_what_it_says_of_the_whole(k, mesh, placements):
    for found in on_ranks(k, words, placements, mesh):
        assert len(found) >= 20
        assert {case: equal for case, equal in found.items() if not all(equal)} == {}


def nan_in_one_shard():
    mesh = init_device_mesh("cpu", (2,))
    x = torch.zeros(4, 4)
    x[1, 3] = torch.nan
    held = distribute_tensor(x, mesh, [Shard(1)], src_data_rank=None)
    return sets.Box(-1.0, 1.0).violation(held).isnan().tolist()


def test_a_nan_of_one_rank_is_told_to_all():
    assert on_ranks(2, nan_in_one_shard) == [[False, True, False, False]] * 2


def refused():
    mesh = init_device_mesh("cpu", (2,))
    weight = torch.ones(5, 3, 2, 2)
    p = nn.Parameter(distribute_tensor(weight, mesh, [Shard(0)], src_data_rank=None))
    with pytest.raises(ValueError, match=r"Shard\(dim=0\).*param_ndim=-1.*'conv.weight'"):
        ProjectedOptimizer([("conv.weight", p)], constraint=sets.SpectralBall(1.0), param_ndim=2)
    none = nn.Parameter(distribute_tensor(weight[:0], mesh, [Shard(0)], src_data_rank=None))
    with pytest.raises(ValueError, match=r"is no batch of shape .*'none'"):  # and does not hang
        ProjectedOptimizer([("none", none)], constraint=sets.L2Ball(1.0), param_ndim=0)


def test_what_cannot_be_seen_as_a_batch_is_refused_by_name():
    on_ranks(2, refused)


def test_columns_of_a_single_column():
    # As a shard of columns can be: its strides let a row be a view, which could not be copied.
    x = torch.full((24, 1), 2.0)
    with torch.no_grad():
        sets.MaxNorm(0.5, dim=0).project_(x)
    assert x.norm() <= 0.5
