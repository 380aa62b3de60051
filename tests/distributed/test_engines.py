"""Every optimizer under every engine goes the way of one process."""

from functools import partial

import pytest
import torch
from engines import FEW_STEPS, STEPS, Bag, both, columns, ddp, fsdp, train, trained, whole
from ranks import on_ranks, outcomes
from tiers import slow_but
from torch_versions import shards_on_cpu

from rai_toolbox import constraints as sets
from rai_toolbox import optim

pytestmark = shards_on_cpu

SHAPES = [(6, 4), (5, 3), (4, 3, 2, 2), (5,), (2, 3)]  # uneven shards, and less rows than ranks


def chain(params, **settings):
    return optim.ChainedParamTransformingOptimizer(
        partial(optim.TopQGradientOptimizer, q=0.5),
        partial(optim.L2ProjectedOptim, epsilon=0.9),
        partial(optim.ClampedParameterOptimizer, clamp_min=-0.4, clamp_max=0.4),
        params=params,
        InnerOpt=torch.optim.Adam,
        **settings,
    )


def scion(params, **settings):
    """Matrices and kernels in spectral balls, whose oracle needs all of them."""
    balls = {1: sets.L2Ball(0.9), 2: sets.SpectralBall(0.9), 4: sets.SpectralBall(0.9, flatten=1)}
    groups = [{"params": [p], "constraint": balls[p.ndim]} for p in params]
    return optim.Scion(groups, **{**settings, "param_ndim": None})


ELEMENTWISE = {
    "ClampedParameter": partial(optim.ClampedParameterOptimizer, clamp_min=-0.3, clamp_max=0.2),
    "ClampedGradient": partial(optim.ClampedGradientOptimizer, clamp_min=-0.3, clamp_max=0.2),
    "Signed": optim.SignedGradientOptim,
    "LinfProjected": partial(optim.LinfProjectedOptim, epsilon=0.3),
    "LinfFrankWolfe": partial(optim.LinfFrankWolfe, epsilon=0.3),
    "Projected on a box": partial(optim.ProjectedOptimizer, constraint=sets.Box(-0.3, 0.2)),
}
OPTIMIZERS = {
    **ELEMENTWISE,
    "L1Normed": optim.L1NormedGradientOptim,
    "L2Normed": optim.L2NormedGradientOptim,
    "L2Projected": partial(optim.L2ProjectedOptim, epsilon=0.9),
    "TopQ": partial(optim.TopQGradientOptimizer, q=0.5),
    "L1qNormed": partial(optim.L1qNormedGradientOptim, q=0.5),
    "Chained": chain,
    "L1FrankWolfe": partial(optim.L1FrankWolfe, epsilon=0.9),
    "L2FrankWolfe": partial(optim.L2FrankWolfe, epsilon=0.9),
    "L1qFrankWolfe": partial(optim.L1qFrankWolfe, q=0.5, epsilon=0.9),
    "Projected": partial(
        optim.ProjectedOptimizer, InnerOpt=torch.optim.Adam, constraint=sets.L1Ball(0.9)
    ),
    "FrankWolfe": partial(optim.FrankWolfe, constraint=sets.L1Ball(0.9)),
    "FrankWolfe, short": partial(
        optim.FrankWolfe, constraint=sets.L2Ball(0.9), smoothness=2.0, param_ndim=None
    ),
    "ExponentiatedGradient": partial(optim.ExponentiatedGradient, param_ndim=None),
    "Scion": scion,
    "Scion, exact": partial(scion, polar="svd", nesterov=True),
    "Scion, unconstrained": partial(scion, unconstrained=True, polar="svd", weight_decay=0.1),
}


def maker(name, param_ndim):
    make, settings = OPTIMIZERS[name], {"lr": 0.05}
    if "FrankWolfe" in name:
        settings = {}
    if param_ndim is None or name in ("Projected", "FrankWolfe"):  # it has a bias
        settings["param_ndim"] = None
    return partial(make, **{**settings, **make.keywords} if isinstance(make, partial) else settings)


def bag(name):
    module = Bag(SHAPES)
    if name == "ExponentiatedGradient":
        with torch.no_grad():
            for p in module.parameters():
                p.abs_()
    return module


def all_trained(engine, names, steps):
    found = {}
    for name in names:
        for k in (-1, None):
            module = engine(bag(name))
            trained(module, maker(name, k), last=steps)
            found[name, k] = [whole(p) for p in module.parameters()]
    return found


ENGINES = {
    "fsdp": (2, fsdp),
    "ddp": (2, ddp),
    "columns": (2, columns),
    "fsdp on 4": (4, fsdp),
    "ddp on 4": (4, ddp),
    "columns on 4": (4, columns),
    "fsdp x rows": (4, partial(both, 0)),
}


@pytest.mark.parametrize(
    ("engine", "steps"),
    [(engine, FEW_STEPS) for engine in ("fsdp", "ddp", "columns")]
    + [pytest.param(engine, STEPS, marks=pytest.mark.slow) for engine in ENGINES],
)
def test_every_optimizer_goes_the_way_of_one_process(engine, steps):
    k, under = ENGINES[engine]
    (expected,) = on_ranks(1, all_trained, alone, list(OPTIMIZERS), steps)
    for found in on_ranks(k, all_trained, under, list(OPTIMIZERS), steps, timeout=250):
        wrong = {}
        for case, values in found.items():
            same = torch.equal if case[0] in ELEMENTWISE else partial(torch.allclose, atol=1e-6)
            if not all(map(same, values, expected[case])):
                pairs = zip(values, expected[case], strict=True)
                wrong[case] = [(a - b).abs().max().item() for a, b in pairs]
        assert not wrong


def alone(module):
    return module


# --- replicas that draw random numbers ----------------------------------------------------------


def drawn(engine, seed, generator_seed):
    torch.manual_seed(seed[torch.distributed.get_rank()])
    settings = {}
    if generator_seed is not None:
        settings["generator"] = torch.Generator().manual_seed(generator_seed)
    module = engine(Bag(SHAPES))
    make = partial(optim.TopQGradientOptimizer, q=0.5, dq=0.5, lr=0.05, param_ndim=None, **settings)
    trained(module, make)
    return [whole(p) for p in module.parameters()]


@pytest.mark.parametrize("engine", slow_but([ddp, fsdp, columns], ddp))
@pytest.mark.parametrize(
    ("seeds", "generator_seed"), [((1, 2), 7), ((3, 3), None)], ids=["own", "default"]
)
def test_ranks_with_generators_of_one_seed_stay_the_same(engine, seeds, generator_seed):
    first, second = on_ranks(2, drawn, engine, seeds, generator_seed)
    assert all(map(torch.equal, first, second))
    (expected,) = on_ranks(1, drawn, alone, seeds, generator_seed)
    for values in (first, second):
        assert all(map(partial(torch.allclose, atol=1e-6), values, expected))


def test_a_default_generator_of_another_seed_tells_replicas_apart():
    # So the docs ask for a generator of one seed, and the test above can tell.
    first, second = on_ranks(2, drawn, ddp, (1, 2), None)
    assert not all(map(torch.equal, first, second))


# --- a rank that fails --------------------------------------------------------------------------


def failing(how, steps):
    module = fsdp(Bag(SHAPES))
    make = partial(optim.L1NormedGradientOptim, lr=0.05, param_ndim=None)
    opt = trained(module, make, 0, steps)
    if torch.distributed.get_rank() == 1:
        how()
    train(module, opt, steps, steps + 2)


def die():
    import os

    os._exit(7)


def fail():
    raise ArithmeticError("on purpose")


@pytest.mark.parametrize("how", slow_but([die, fail]))
def test_a_rank_that_fails_ends_the_others_with_an_error(how):
    first, second = outcomes(2, failing, how, 2, timeout=40.0)
    assert first.error is not None and first.exit_code == 1  # on its own: nobody killed it
    assert "on purpose" in second.error if how is fail else second.exit_code == 7
