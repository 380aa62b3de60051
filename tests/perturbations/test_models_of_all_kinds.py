"""Models that work in place, in training mode, wrapped, replicated, or called in inference mode."""

from functools import partial, wraps
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from rai_toolbox.constraints import L1Ball, L2Ball, LinfBall
from rai_toolbox.optim import PGD, ProjectedOptimizer
from rai_toolbox.perturbations import (
    AdditivePerturbation,
    AffineWarp,
    ColorShift,
    MaskedPerturbation,
    attack,
    cross_entropy,
    dlr_loss,
    evaluate_robustness,
    gradient_ascent,
    is_fooled,
    margin_loss,
    minimum_norm_attack,
    nearest_rivals,
    random_restart,
    targeted_dlr_loss,
    uniform_like_linf_n_ball_,
    universal_perturbation,
    verify,
)
from rai_toolbox.perturbations.feasible_set import FeasibleSet
from rai_toolbox.perturbations.inputs import device_of

SIZE, CLASSES = (2, 3, 3), 4
STEP = partial(PGD, lr=0.05)


def a_net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(18, 16), nn.Tanh(), nn.Linear(16, CLASSES)).eval()


def problem():
    net, x = a_net(), torch.rand(12, *SIZE, generator=torch.Generator().manual_seed(1))
    return net, x, net(x).argmax(1)


class Pixels(nn.Module):
    """A perturbation that is its parameter, or a function of it that autograd saves."""

    per_datum = True

    def __init__(self, data, change=lambda x: x):
        super().__init__()
        self.x, self.change = nn.Parameter(data.clone()), change

    def forward(self, data):
        return self.change(self.x)


def ascent(perturbation, model, x, y, **settings):
    settings = {"steps": 3, "optimizer": torch.optim.SGD, "lr": 0.1, **settings}
    return gradient_ascent(
        model=model, data=x, target=y, perturbation_model=perturbation, **settings
    )


CALLS = {
    **{
        f"attack, {name}": partial(attack, **{"ball": LinfBall(0.1), "steps": 12, **settings})
        for name, settings in {
            "default": {},
            "stop": {"stop_once_fooled": True, "restarts": 2},
            "rivals": {"rivals": 2, "optimizer": STEP},
            "nearest": {"rivals": nearest_rivals, "ball": L2Ball(0.3)},
            "mask": {"mask": torch.arange(18).view(SIZE) < 9, "ball": L1Ball(1.0)},
            "samples": {"samples": 2, "data_range": None},
            "no steps": {"steps": 0},
            "radii": {"ball": L2Ball(torch.linspace(0.1, 0.3, 12)), "random_start": True},
        }.items()
    },
    "attack, levels": lambda model, x, y: attack(
        model, (x * 255).round() / 255, y, ball=L2Ball(0.3), levels=256, steps=5
    ),
    "attack, rule": partial(
        attack, ball=LinfBall(0.1), criterion=cross_entropy, fooled=is_fooled, steps=12
    ),
    "minimum norm": partial(minimum_norm_attack, ball=L2Ball, steps=4, search_steps=3),
    "minimum norm, levels": lambda model, x, y: minimum_norm_attack(
        model, (x * 255).round() / 255, y, ball=LinfBall, levels=256, steps=4, search_steps=3
    ),
    "minimum norm, rule": partial(
        minimum_norm_attack,
        ball=L2Ball,
        steps=4,
        search_steps=3,
        criterion=cross_entropy,
        fooled=is_fooled,
    ),
    "minimum norm, targeted": partial(
        minimum_norm_attack, ball=LinfBall, steps=4, search_steps=3, targeted=True
    ),
    "universal": lambda model, x, y: universal_perturbation(
        model, [(x, y)], ball=LinfBall(0.1), epochs=3, progress=False
    ),
    "universal, range": lambda model, x, y: universal_perturbation(
        model,
        [(x, y)],
        ball=L2Ball(0.3),
        epochs=2,
        progress=False,
        data_range=(torch.zeros(SIZE), torch.ones(SIZE)),
        optimizer=partial(ProjectedOptimizer, InnerOpt=torch.optim.Adam, lr=0.01),
    ),  # fmt: skip
    "rivals": lambda model, x, y: nearest_rivals(
        model, FeasibleSet.around(x, L2Ball(0.3), (0.0, 1.0), None), y
    ),
    "evaluate": lambda model, x, y: evaluate_robustness(
        model, [(x, y)], balls=[LinfBall(0.05), L2Ball(0.3)], steps=5, progress=False, examples=2
    ).to_json(),
    "verify": lambda model, x, y: verify(model, x, y, x * 0.95, ball=LinfBall(0.1)),
    "verify, rule": lambda model, x, y: verify(
        model,
        x,
        y,
        x * 0.95,
        ball=LinfBall(0.1),
        criterion=cross_entropy,
        correct=lambda output, target: output.argmax(1) == target,
    ),
    "each": partial(ascent, AdditivePerturbation, use_best=True),
    "last": partial(ascent, AdditivePerturbation),
    "instance": lambda model, x, y: ascent(AdditivePerturbation(x), model, x, y, use_best=True),
    "masked": lambda model, x, y: ascent(
        MaskedPerturbation(x, torch.arange(18).view(SIZE) < 9), model, x, y
    ),
    "shared": partial(ascent, partial(AdditivePerturbation, delta_ndim=-1)),
    "pixels": partial(ascent, Pixels),
    "pixels, no steps": partial(ascent, Pixels, steps=0),
    "sigmoid": partial(ascent, partial(Pixels, change=torch.sigmoid), use_best=True),
    "warp": partial(ascent, AffineWarp, use_best=True),
    "color": lambda model, x, y: ascent(ColorShift(x), model, x, y, use_best=True),
    "restarts": lambda model, x, y: random_restart(partial(ascent, use_best=True), 2)(
        AdditivePerturbation(x, uniform_like_linf_n_ball_, epsilon=0.1), model, x, y
    ),
}


def same(one, other):
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, tuple):
        return all(map(same, one, other))
    return one == other


def run(call, model, x, y):
    torch.manual_seed(2)
    return call(model, x, y)


# --- memory -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CALLS)
def test_a_model_may_work_in_place(name):
    net, x, _ = problem()

    def in_place(data):
        return net(data.sub_(0.5).mul_(2.0))

    def out_of_place(data):
        return net((data - 0.5) * 2.0)

    y = out_of_place(x).argmax(1)
    before = x.clone(), y.clone()
    found = run(CALLS[name], in_place, x, y)
    assert same((x, y), before)
    assert same(found, run(CALLS[name], out_of_place, x, y))


# --- outputs ------------------------------------------------------------------------------------

OUTPUTS = {
    "attribute": lambda logits: SimpleNamespace(logits=logits, loss=None),
    "item": lambda logits: {"logits": logits, "hidden": None},
}


@pytest.mark.parametrize("kind", OUTPUTS)
@pytest.mark.parametrize("name", CALLS)
def test_outputs_may_hold_logits(name, kind):
    net, x, y = problem()
    found = run(CALLS[name], lambda data: OUTPUTS[kind](net(data)), x, y)
    assert same(found, run(CALLS[name], lambda data: net(data), x, y))


@pytest.mark.parametrize("kind", OUTPUTS)
@pytest.mark.parametrize("samples", [1, 2])
@pytest.mark.parametrize("criterion", [cross_entropy, margin_loss, dlr_loss, targeted_dlr_loss])
def test_losses_and_rules_find_the_logits(kind, samples, criterion):
    net, x, y = problem()
    options = {"criterion": criterion, "samples": samples, "stop_once": is_fooled}
    call = partial(ascent, AdditivePerturbation, use_best=True, x=x, y=y, **options)
    assert same(call(model=lambda data: OUTPUTS[kind](net(data))), call(model=net))


def test_other_outputs_are_refused():
    net, x, y = problem()
    rule = "`model` must give logits of shape .*, or an object or dict with `logits`, got dict"
    for name in ("attack, default", "minimum norm", "universal", "evaluate", "verify"):
        with pytest.raises(ValueError, match=rule):
            run(CALLS[name], lambda data: {"out": net(data)}, x, y)
    with pytest.raises(TypeError, match="`model` must give tensors where there are `samples`"):
        ascent(
            AdditivePerturbation, lambda data: {"out": net(data)}, x, y, samples=2,
            criterion=lambda output, target: output["out"].sum(1), stop_once=is_fooled,
        )  # fmt: skip


# --- inference mode -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", CALLS)
def test_calls_in_inference_mode(name):
    net, x, y = problem()
    expected = run(CALLS[name], net, x, y)
    with torch.inference_mode():
        assert same(run(CALLS[name], net, x * 1, y * 1), expected)


def test_all_settings_made_in_inference_mode():
    net, x, y = problem()
    with torch.inference_mode():
        bounds, mask = (torch.zeros(SIZE), torch.ones(SIZE)), torch.ones(SIZE, dtype=torch.bool)
        model = MaskedPerturbation(x * 1, mask)
        optimizer = ProjectedOptimizer(model.parameters(), lr=0.1, constraint=L2Ball(0.3))
        gradient_ascent(
            model=net, data=x, target=y, perturbation_model=model, optimizer=optimizer, steps=2
        )
        for ball in (LinfBall, L2Ball, L1Ball):
            attack(
                net, x, y, ball=ball(torch.full((12,), 0.1)), data_range=bounds, mask=mask, steps=4
            )
            minimum_norm_attack(net, x, y, ball=ball, steps=2, data_range=bounds, mask=mask)


# --- wrapped ------------------------------------------------------------------------------------


class Holder:
    def __init__(self, net):
        self.parts = {"nets": [net]}

    def __call__(self, data):
        return self.parts["nets"][0](data)

    def predict(self, data):
        return self(data)


class OfNetworks(nn.Module):
    """Its modules are behind other methods than `forward`, which global hooks do not see."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def logits(self, data):
        return self.net[1:](nn.functional.dropout(self.net[0](data), training=self.training))


def decorated(net):
    @wraps(net.forward)
    @torch.autocast("cpu", enabled=False)
    def call(data):
        return net(data)

    return call


WRAPPED = {
    "closure": lambda net: lambda data: net(data),
    "closure of a closure": lambda net: (lambda inner: lambda data: inner(data))(net.forward),
    "default": lambda net: lambda data, model=net: model(data),
    "bound method": lambda net: net.forward,
    "bound method of another name": lambda net: OfNetworks(net).logits,
    "partial": lambda net: partial(lambda model, data: model(data), net),
    "partial, keyword": lambda net: partial(lambda data, model: model(data), model=net),
    "attribute": Holder,
    "method of what holds it": lambda net: Holder(net).predict,
    "closure of what holds it": lambda net: (lambda holder: lambda data: holder(data))(Holder(net)),
    "decorated": decorated,
    "plain container": lambda net: (lambda nets: lambda data: nets[0][0](data))([(net,)]),
}


def trained():
    """A network in training mode, but for one part."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Flatten(), nn.Linear(18, 16), nn.BatchNorm1d(16), nn.Dropout(), nn.Linear(16, CLASSES)
    )
    net[0].eval()
    return net


def check_in_eval_mode(call, wrap):
    net = trained()
    x = problem()[1]
    net.eval()
    y = net(x).argmax(1)
    expected = run(call, net, x, y)
    net = trained()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    assert same(run(call, wrap(net), x, y), expected)
    assert [part.training for part in net] == [False, True, True, True, True] and net.training
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in net.parameters())


@pytest.mark.parametrize("kind", WRAPPED)
def test_a_wrapped_model_is_in_eval_mode(kind):
    check_in_eval_mode(CALLS["attack, default"], WRAPPED[kind])


@pytest.mark.parametrize(
    "name", ["minimum norm", "universal", "evaluate", "verify", "each", "restarts"]
)
def test_each_call_puts_a_wrapped_model_in_eval_mode(name):
    check_in_eval_mode(CALLS[name], WRAPPED["closure"])


OF_THIS_FILE = trained()


def test_a_model_that_is_a_global():
    def named(data):
        return OF_THIS_FILE(data)

    def check(wrap):
        check_in_eval_mode(CALLS["attack, default"], lambda net: wrap)

    before = OF_THIS_FILE.state_dict()["2.running_mean"].clone()
    for call in (named, lambda data: named(data)):
        check(call)
    assert torch.equal(OF_THIS_FILE[2].running_mean, before) and OF_THIS_FILE.training


@pytest.mark.parametrize(
    "name", ["attack, default", "minimum norm", "universal", "evaluate", "verify", "each"]
)
def test_a_hidden_model_is_met_with_a_warning(name):
    def wrap(net):
        hidden = type("Hidden", (), {"net": net})  # classes are not searched
        return lambda data: hidden.net(nn.Flatten()(data))

    with pytest.warns(UserWarning, match="`model` hides a Sequential in training mode"):
        check_in_eval_mode(CALLS[name], wrap)


def test_modules_without_a_mode_do_not_warn():
    weight = torch.randn(18, CLASSES)
    _, x, _ = problem()
    attack(lambda data: nn.Flatten()(data) @ weight, x, torch.zeros(12).long(), ball=L2Ball(0.1))


def test_an_error_restores_the_modes():
    net, x = trained(), torch.rand(4, *SIZE)
    with pytest.raises(ValueError, match="must give logits"):
        attack(lambda data: net(data).sum(1), x, torch.zeros(4).long(), ball=LinfBall(0.1))
    assert [part.training for part in net] == [False, True, True, True, True]


def test_perturbations_and_criteria_keep_their_modes():
    net, x, y = problem()

    class Own(AdditivePerturbation):
        def forward(self, data):
            assert self.training
            return super().forward(data)

    for model in (net, lambda data: net(data), lambda data: data.flatten(1)[:, :CLASSES]):
        ascent(Own, model, x, y, criterion=nn.CrossEntropyLoss(torch.ones(4), reduction="none"))


def test_the_device_of_a_wrapped_model():
    net = a_net().to("meta")
    assert device_of(lambda data: net(data)) == torch.device("meta")
    assert device_of(lambda data: data) is None


# --- replicas -----------------------------------------------------------------------------------


@pytest.fixture
def one_rank():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("wrap", [lambda net: net, WRAPPED["closure"], nn.Sequential])
def test_replicas_do_not_communicate(one_rank, monkeypatch, wrap):
    net = trained()
    replica = DistributedDataParallel(net)
    _, x, _ = problem()
    y = net.eval()(x).argmax(1)
    expected = run(CALLS["minimum norm"], net, x, y)
    net.train()
    own, calls = DistributedDataParallel.forward, []
    monkeypatch.setattr(
        DistributedDataParallel, "forward", lambda *args: calls.append(1) or own(*args)
    )
    for name in ("attack, default", "universal", "verify", "each"):
        run(CALLS[name], wrap(replica), x, y)
    assert same(run(CALLS["minimum norm"], wrap(replica), x, y), expected)
    assert not calls
    replica(x)
    assert calls  # as before
