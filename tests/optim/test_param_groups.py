"""Parameter groups of a module: who is claimed by what, and what is refused."""

from collections import OrderedDict

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations
from torch.optim import SGD, AdamW

from rai_toolbox.constraints import Box, L2Ball, MaxNorm, NonNegative, Simplex, UnitNorm
from rai_toolbox.optim import ClampedParameterOptimizer
from rai_toolbox.optim.param_groups import constrain
from rai_toolbox.optim.projected import ProjectedOptimizer

UNIT, POSITIVE = UnitNorm(), NonNegative()


def named(**modules):
    return nn.Sequential(OrderedDict(modules))


def model():
    return named(
        encoder=nn.Linear(3, 4),
        middle=named(norm=nn.LayerNorm(4), decoder=nn.Linear(4, 3)),
        head=nn.Linear(3, 1),
    )


def shown(groups):
    """Each group as its constraint and the names of its parameters."""
    return [(group["constraint"], [name for name, _ in group["params"]]) for group in groups]


def names(module, pattern, **kwargs):
    """What one pattern claims."""
    return shown(constrain(module, {pattern: UNIT}, **kwargs))[0][1]


# --- what is claimed ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pattern", "claimed"),
    [
        ("encoder.weight", ["encoder.weight"]),
        ("head.*", ["head.weight", "head.bias"]),
        ("*.decoder.weight", ["middle.decoder.weight"]),
        ("middle.*", [f"middle.{m}.{p}" for m in ("norm", "decoder") for p in ("weight", "bias")]),
        ("[eh]*.weight", ["encoder.weight", "head.weight"]),
        ("?ead.weight", ["head.weight"]),
        (nn.LayerNorm, ["middle.norm.weight", "middle.norm.bias"]),
        (
            nn.Linear,
            [f"{m}.{p}" for m in ("encoder", "middle.decoder", "head") for p in ("weight", "bias")],
        ),
    ],
    ids=str,
)
def test_a_pattern_claims_these(pattern, claimed):
    module = model()
    groups = constrain(module, {pattern: UNIT})
    others = [name for name, _ in module.named_parameters() if name not in claimed]
    assert shown(groups) == [(UNIT, claimed), (None, others)]
    params = dict(module.named_parameters())
    assert all(params[name] is tensor for group in groups for name, tensor in group["params"])


def test_names_are_case_sensitive_and_whole():
    module = named(Head=nn.Linear(1, 1), head=nn.Linear(1, 1), ahead=nn.Linear(1, 1))
    assert names(module, "head.*") == ["head.weight", "head.bias"]


def test_groups_are_in_the_order_of_the_mapping_and_the_rest_comes_last():
    constraints = {"head.*": POSITIVE, nn.LayerNorm: None, "*.decoder.weight": MaxNorm(1.0)}
    assert shown(constrain(model(), constraints)) == [
        (POSITIVE, ["head.weight", "head.bias"]),
        (None, ["middle.norm.weight", "middle.norm.bias"]),
        (MaxNorm(1.0), ["middle.decoder.weight"]),
        (None, ["encoder.weight", "encoder.bias", "middle.decoder.bias"]),
    ]


def test_there_is_no_last_group_when_all_is_claimed_and_only_it_when_nothing_is():
    module = nn.Linear(2, 1)
    assert shown(constrain(module, {"*": UNIT})) == [(UNIT, ["weight", "bias"])]
    assert shown(constrain(module, {})) == [(None, ["weight", "bias"])]


def test_group_settings_come_along_and_are_not_modified():
    given = {"constraint": Simplex(), "param_ndim": None, "lr": 0.5}
    constraints = {"head.weight": given, "encoder.*": UNIT}
    first, second, rest = constrain(model(), constraints)
    first.pop("params")
    assert first == given and first is not given
    assert constraints == {"head.weight": given, "encoder.*": UNIT} and "params" not in given
    assert second.keys() == rest.keys() == {"params", "constraint"}


class Own(nn.Linear):
    pass


def test_a_type_claims_its_subclasses_and_what_its_modules_hold_themselves():
    module = named(a=Own(1, 1), b=nn.Linear(1, 1), c=nn.Sequential(nn.Conv1d(1, 1, 1)))
    assert names(module, nn.Linear) == ["a.weight", "a.bias", "b.weight", "b.bias"]
    assert names(module, Own) == ["a.weight", "a.bias"]
    with pytest.raises(ValueError, match="Sequential, which matches none of Own, Linear, Conv1d"):
        constrain(module, {nn.Sequential: UNIT})  # it holds modules, and no parameter itself


def test_the_module_itself_can_be_of_the_type():
    assert names(nn.Linear(2, 1), nn.Linear) == ["weight", "bias"]


def test_a_parametrized_weight_is_found_where_torch_keeps_it():
    module = named(a=parametrizations.weight_norm(nn.Linear(2, 1)))
    with pytest.raises(ValueError, match=r"got none of 'a\.parametrizations\.weight\.original0', "):
        constrain(module, {nn.Linear: POSITIVE})
    assert names(module, nn.Module)[1:] == [
        "a.parametrizations.weight.original0",
        "a.parametrizations.weight.original1",
    ]
    by_name = constrain(module, {nn.Linear: POSITIVE, "a.parametrizations.*": None})
    assert shown(by_name)[0] == (POSITIVE, ["a.bias"])
    assert names(module, "a.parametrizations.weight.original1") == [
        "a.parametrizations.weight.original1"
    ]


def test_frozen_parameters_are_claimed_too():
    module = model()
    module.head.weight.requires_grad_(False)
    module.encoder.requires_grad_(False)
    groups = constrain(module, {"head.*": POSITIVE})
    assert shown(groups)[0] == (POSITIVE, ["head.weight", "head.bias"])
    assert sum(len(group["params"]) for group in groups) == len(list(module.parameters()))
    with torch.no_grad():
        module.head.weight.fill_(-1.0)
        module.head.bias.fill_(-1.0)
    optimizer = ProjectedOptimizer(groups, lr=0.1)
    optimizer.step()
    assert (module.head.bias == 0).all()
    assert (module.head.weight == -1).all()
    module.head.weight.requires_grad_()
    optimizer.step()
    assert (module.head.weight == 0).all()


# --- shared parameters ----------------------------------------------------------------------------


def tied():
    module = named(a=nn.Linear(3, 3), b=nn.Linear(3, 3, bias=False), c=nn.Linear(3, 3))
    module.b.weight = module.a.weight
    return module


@pytest.mark.parametrize("pattern", ["a.weight", "b.weight", "b.*"])
def test_any_name_of_a_shared_parameter_claims_it_once(pattern):
    (_, claimed), (_, rest) = shown(constrain(tied(), {pattern: UNIT}))
    assert claimed == ["a.weight"]  # by which `named_parameters` calls it
    assert rest == ["a.bias", "c.weight", "c.bias"]


def test_a_pattern_may_match_several_names_of_one():
    assert names(tied(), "*.weight") == ["a.weight", "c.weight"]
    assert names(tied(), nn.Linear) == ["a.weight", "a.bias", "c.weight", "c.bias"]


def test_two_patterns_by_two_names_of_one_are_refused():
    message = r"several for 'a.weight' = 'b.weight' \(by 'a.\*' and 'b.\*'\)$"
    with pytest.raises(ValueError, match=message):
        constrain(tied(), {"a.*": UNIT, "b.*": UNIT})


def test_a_module_that_is_there_twice():
    shared = nn.Linear(2, 2)
    module = named(a=shared, b=shared)
    assert names(module, "b.*") == ["a.weight", "a.bias"]
    assert names(module, nn.Linear) == ["a.weight", "a.bias"]


# --- biases and norms -----------------------------------------------------------------------------

BIASES = [
    (nn.Linear(2, 2), {"bias"}),
    (nn.Bilinear(2, 2, 2), {"bias"}),
    (nn.Conv2d(1, 1, 1), {"bias"}),
    (nn.ConvTranspose1d(1, 1, 1), {"bias"}),
    (nn.LSTM(2, 2), {"bias_ih_l0", "bias_hh_l0"}),
    (
        nn.GRU(2, 2, bidirectional=True),
        {"bias_ih_l0", "bias_hh_l0", "bias_ih_l0_reverse", "bias_hh_l0_reverse"},
    ),
    (nn.RNNCell(2, 2), {"bias_ih", "bias_hh"}),
    (
        nn.MultiheadAttention(2, 1, add_bias_kv=True),
        {"in_proj_bias", "bias_k", "bias_v", "out_proj.bias"},
    ),
    (nn.Embedding(2, 2), set()),
    (nn.PReLU(), set()),
]


@pytest.mark.parametrize(("module", "biases"), BIASES, ids=[type(m).__name__ for m, _ in BIASES])
def test_biases_of_torch_modules_are_left_out(module, biases):
    kept = {name for name, _ in module.named_parameters()} - biases
    assert set(names(module, "*", skip_bias_and_norm=True)) == kept
    assert set(names(module, "*")) == kept | biases


def test_a_name_that_only_sounds_like_a_bias_is_none():
    module = nn.Module()
    for name in ("biased", "unbias", "relative_position_bias_table"):
        module.register_parameter(name, nn.Parameter(torch.ones(2, 2)))
    assert names(module, "*", skip_bias_and_norm=True) == [
        "biased",
        "unbias",
        "relative_position_bias_table",
    ]


NORMS = [
    nn.BatchNorm1d(2),
    nn.BatchNorm2d(2),
    nn.BatchNorm3d(2),
    nn.SyncBatchNorm(2),
    nn.InstanceNorm1d(2, affine=True),
    nn.InstanceNorm2d(2, affine=True),
    nn.InstanceNorm3d(2, affine=True),
    nn.LayerNorm(2),
    nn.GroupNorm(1, 2),
    nn.RMSNorm(2),
    type("OwnNorm", (nn.LayerNorm,), {})(2),
]


@pytest.mark.parametrize("norm", NORMS, ids=lambda norm: type(norm).__name__)
def test_normalization_layers_are_left_out(norm):
    module = named(lin=nn.Linear(2, 2), norm=norm)
    own = [f"norm.{name}" for name, _ in norm.named_parameters()]
    assert own
    assert shown(constrain(module, {"*": UNIT}, skip_bias_and_norm=True)) == [
        (UNIT, ["lin.weight"]),
        (None, ["lin.bias", *own]),
    ]


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
def test_norms_that_do_not_know_their_size_yet_are_left_out():
    module = named(lin=nn.Linear(2, 2, bias=False), norm=nn.LazyBatchNorm1d())
    assert names(module, "*", skip_bias_and_norm=True) == ["lin.weight"]


def test_what_is_left_out_is_not_claimed_twice():
    constraints = {"*.weight": UNIT, nn.LayerNorm: POSITIVE, "head.bias": POSITIVE}
    with pytest.raises(ValueError, match="several for 'middle.norm.weight'"):
        constrain(model(), constraints)
    module = named(a=nn.Linear(2, 2), b=nn.Linear(2, 2))
    groups = constrain(module, {"a.*": UNIT, "b.weight": POSITIVE}, skip_bias_and_norm=True)
    assert shown(groups) == [
        (UNIT, ["a.weight"]),
        (POSITIVE, ["b.weight"]),
        (None, ["a.bias", "b.bias"]),
    ]


@pytest.mark.parametrize("pattern", ["*.bias", nn.LayerNorm, "middle.norm.*"], ids=str)
def test_a_pattern_only_for_what_is_left_out_is_refused(pattern):
    message = "only what `skip_bias_and_norm` leaves out: '.*middle.norm.bias'"
    with pytest.raises(ValueError, match=message):
        constrain(model(), {"*.weight": UNIT, pattern: UNIT}, skip_bias_and_norm=True)


# --- bad input ------------------------------------------------------------------------------------


def test_a_pattern_that_matches_nothing_lists_what_there_is():
    with pytest.raises(ValueError) as error:
        constrain(tied(), {"a.*": UNIT, "heed.*": POSITIVE})
    assert str(error.value) == (
        "`constraints` must match a parameter with each pattern, got 'heed.*', which matches none "
        "of 'a.weight', 'b.weight', 'a.bias', 'c.weight', 'c.bias'"
    )


def test_the_name_of_a_module_suggests_its_parameters():
    with pytest.raises(ValueError, match=r"'c.bias' \(did you mean 'a\.\*'\?\)$"):
        constrain(tied(), {"a": UNIT})


def test_a_long_list_is_cut():
    module = nn.Sequential(*(nn.Linear(1, 1) for _ in range(50)))
    with pytest.raises(ValueError, match="'9.bias', and 80 more$"):
        constrain(module, {"head": UNIT})
    with pytest.raises(ValueError, match="which matches none of Linear$"):
        constrain(module, {nn.Conv2d: UNIT})
    with pytest.raises(ValueError, match=r"'19.weight' \(by .*\), and 30 more$"):
        constrain(module, {"*.weight": UNIT, "*t": UNIT})


def test_all_patterns_that_claim_one_parameter_are_told():
    message = (
        r"several for 'head.weight' \(by 'head.\*' and Linear and '\*.weight'\), "
        r"'head.bias' \(by 'head.\*' and Linear\)$"
    )
    module = named(head=nn.Linear(1, 1), other=nn.Conv1d(1, 1, 1))
    with pytest.raises(ValueError, match=message):
        constrain(module, {"head.*": UNIT, nn.Linear: POSITIVE, "*.weight": None})


@pytest.mark.parametrize("module", [nn.ReLU(), nn.Sequential(), nn.BatchNorm1d(2, affine=False)])
@pytest.mark.parametrize("constraints", [{}, {"*": UNIT}])
def test_a_module_without_parameters_is_refused(module, constraints):
    with pytest.raises(ValueError, match="`module` must have parameters, got "):
        constrain(module, constraints)


@pytest.mark.parametrize(
    ("constraints", "message"),
    [
        ([("*", UNIT)], "`constraints` must be a dict from patterns to constraints, got "),
        (UNIT, "`constraints` must be a dict from patterns to constraints, got UnitNorm"),
        ({1: UNIT}, "as keys, got 1$"),
        ({nn.Parameter: UNIT}, "as keys, got <class 'torch.nn.parameter.Parameter'>"),
        ({nn.Linear(1, 1): UNIT}, "as keys, got Linear"),
        ({"*": 1.0}, "`constraint` must be a set .* or None, got 1.0 for '\\*'"),
        ({"*": UnitNorm}, "`constraint` must be a set .* or None, got <class .* for '\\*'"),
        ({nn.Linear: {"constraint": "unit"}}, "or None, got 'unit' for Linear"),
    ],
)
def test_wrong_types_are_refused(constraints, message):
    with pytest.raises(TypeError, match=message):
        constrain(model(), constraints)


@pytest.mark.parametrize("module", [None, nn.Linear, [torch.ones(1)], {"a": nn.Linear(1, 1)}])
def test_what_is_no_module_is_refused(module):
    with pytest.raises(TypeError, match="`module` must be a torch.nn.Module, got "):
        constrain(module, {"*": UNIT})


@pytest.mark.parametrize("settings", [{}, {"lr": 1.0}, {"constraint": UNIT, "params": []}])
def test_settings_without_a_constraint_or_with_parameters_are_refused(settings):
    message = r"must have `constraint`, and no `params`, .* got \[.*\] for 'head.\*'"
    with pytest.raises(ValueError, match=message):
        constrain(model(), {"head.*": settings})


# --- optimizers take the groups -------------------------------------------------------------------


def trained(opt, module, steps=3):
    torch.manual_seed(0)
    data = torch.randn(16, 3)
    for _ in range(steps):
        opt.zero_grad()
        (module(data) - 1.0).square().mean().backward()
        opt.step()


def test_a_projected_optimizer_keeps_each_claim():
    torch.manual_seed(1)
    module = model()
    constraints = {
        "*.decoder.weight": UnitNorm(dim=0),
        "head.*": NonNegative(),
        "encoder.weight": {"constraint": L2Ball(0.1), "lr": 2.0, "param_ndim": None},
    }
    opt = ProjectedOptimizer(constrain(module, constraints), AdamW, lr=0.5, weight_decay=0.0)
    assert [group["lr"] for group in opt.param_groups] == [0.5, 0.5, 2.0, 0.5]
    assert opt.param_groups[0]["param_names"] == ["middle.decoder.weight"]
    start = [p.detach().clone() for _, p in module.named_parameters()]
    trained(opt, module)
    assert all(bool((p != s).any()) for p, s in zip(module.parameters(), start, strict=True))
    lengths = module.middle.decoder.weight.norm(dim=0)
    torch.testing.assert_close(lengths, torch.ones_like(lengths))
    assert (module.head.weight >= 0).all() and (module.head.bias >= 0).all()
    assert module.encoder.weight.norm() <= 0.1
    assert module.encoder.weight.norm() > 0.05


def test_weights_clipped_as_in_a_critic_leave_biases_and_norms_alone():
    torch.manual_seed(1)
    module, free = model(), model()
    free.load_state_dict(module.state_dict())
    groups = constrain(module, {"*": Box(-0.01, 0.01)}, skip_bias_and_norm=True)
    opt = ProjectedOptimizer(groups, lr=0.5)
    opt.make_feasible_()
    for (name, param), start in zip(module.named_parameters(), free.parameters(), strict=True):
        if name.endswith("weight") and "norm" not in name:
            assert param.abs().max() <= 0.01
        else:
            assert torch.equal(param, start)


@pytest.mark.parametrize("make", [SGD, ClampedParameterOptimizer], ids=lambda c: c.__name__)
def test_any_optimizer_that_takes_more_settings_takes_them(make):
    module = model()
    kwargs = {} if make is SGD else {"clamp_max": 1.0}
    opt = make(constrain(module, {"head.*": POSITIVE}), lr=0.1, **kwargs)
    assert [group["constraint"] for group in opt.param_groups] == [POSITIVE, None]
    trained(opt, module)
