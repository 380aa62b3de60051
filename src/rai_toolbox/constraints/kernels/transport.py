"""Plans of transport: matrices >= 0 of given row and column sums; of float64 batches (N, m, k)."""

from __future__ import annotations

import torch
from torch import Tensor

from rai_toolbox.autograd import with_value
from rai_toolbox.constraints.kernels.blocks import needs_grad

_MOST_STEPS = 100
_FAR = 1e3  # times the mean sum: Newton's method takes many steps from there
_ALTERNATIONS = 3
_AS_FAR = 1e12  # times the total: farther away, plans are lost in the rounding of y
_LEAST_RIDGE = 1e-11  # equations of sums depend on each other
_FARTHEST = 1e12  # entries much smaller than rounding
_MOST_HALVINGS = 30
_EXACT = 1e-14  # relative error of the sums at which Newton's method ends; the rest is repaired
_NEAR = 1e-6  # the same where there is to be a better start


def nearest_plan(y: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """The nearest plan to each y, of row sums (N, m) and column sums (N, k) of the same total.

    It is ``max(y - a - b^T, 0)`` for the a and b that minimize the convex dual
    ``|max(y - a - b^T, 0)|^2 / 2 + rows.a + columns.b``, which has a derivative: by a semismooth
    Newton method with line search (Li, Sun & Toh, 2020). Autograd can differentiate it.
    """
    y = y / _excess_distance(y.detach(), rows.detach())
    x, a, b = _solved(y.detach(), rows.detach(), columns.detach())
    with torch.no_grad():
        plan = repaired(x, rows, columns)
    if not needs_grad(y, rows, columns):
        return plan
    # The plan is an affine function of y while the same entries are positive.
    support = (x > 0).to(y.dtype)
    rest = (y - a.unsqueeze(-1) - b.unsqueeze(-2)) * support
    tiny = torch.full_like(rows[:, :1], _LEAST_RIDGE)
    da, db = _newton(support, rest.sum(-1) - rows, rest.sum(-2) - columns, tiny)
    return with_value(plan, rest - support * (da.unsqueeze(-1) + db.unsqueeze(-2)))


def _excess_distance(y: Tensor, rows: Tensor) -> Tensor:
    """What to divide y by: from so far away, the nearest plan is that of a smaller multiple.

    Only plans whose costs differ by less than 1e-12 of the entries are then averaged.
    """
    half = y.amax((-2, -1), keepdim=True) / 2 - y.amin((-2, -1), keepdim=True) / 2
    total = rows.sum(-1, keepdim=True).unsqueeze(-1)
    return (half / total / (_AS_FAR / 2)).nan_to_num(1.0, 1.0).clamp(min=1.0)


def repaired(x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """A plan next to x >= 0, whose sums are nearly right (Altschuler, Weed & Rigollet, 2017)."""
    x = x * _at_most_1(rows, x.sum(-1)).unsqueeze(-1)
    x = x * _at_most_1(columns, x.sum(-2)).unsqueeze(-2)
    of_rows, of_columns = ((rows - x.sum(-1)).clamp(min=0), (columns - x.sum(-2)).clamp(min=0))
    total = of_rows.sum(-1, keepdim=True)
    share = of_rows / torch.where(total > 0, total, 1.0)
    return x + share.unsqueeze(-1) * of_columns.unsqueeze(-2)


def _at_most_1(goal: Tensor, found: Tensor) -> Tensor:
    return (goal / torch.where(found > 0, found, 1.0)).clamp(max=1.0)


def scaled_plan(logits: Tensor, rows: Tensor, columns: Tensor, steps: int) -> Tensor:
    """The plan ``exp(logits + a + b^T)`` after `steps` of Sinkhorn's algorithm, repaired."""
    of_rows, of_columns = rows.log().unsqueeze(-1), columns.log().unsqueeze(-2)
    for _ in range(steps):
        logits = logits - _log_sum(logits, -1) + of_rows
        logits = logits - _log_sum(logits, -2) + of_columns
    return repaired(logits.exp(), rows, columns)


def _log_sum(logits: Tensor, dim: int) -> Tensor:
    """The logarithm of sums; 0 where all terms are 0, so that they stay 0."""
    found = logits.logsumexp(dim, keepdim=True)
    return torch.where(found == -torch.inf, 0.0, found)


# The dual of the projection


def _solved(y: Tensor, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``max(y - a - b^T, 0)``, a and b.

    If y is far away, y / c comes first, with a large c, and then y / (c / 10) from there, until y.
    """
    m, k = y.shape[-2:]
    total = rows.sum(-1, keepdim=True)
    spread = (y.amax((-2, -1)) - y.amin((-2, -1))).unsqueeze(-1)
    c = (spread * max(m, k) / total / _FAR).nan_to_num(1.0, 1.0).clamp(1.0, _FARTHEST)
    near = y / c.unsqueeze(-1)
    # The first guess is as if entries might be negative.
    b = (near.sum(-2) - columns - (near.sum((-2, -1)).unsqueeze(-1) - total) / k) / m
    while True:
        within = torch.where(c == 1, _EXACT * total, _NEAR * total)
        x, a, b = _minimized(near, b, rows, columns, within)
        if bool((c == 1).all()):
            return x, a, b
        less = (c / 10).clamp(min=1.0)
        c, b = less, b * (c / less)
        near = y / c.unsqueeze(-1)


def _minimized(
    y: Tensor, b: Tensor, rows: Tensor, columns: Tensor, within: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """``max(y - a - b^T, 0)``, a and b, by Newton's method from some b, until sums are `within`."""
    # (So that each row and column has a support.)
    for _ in range(_ALTERNATIONS):
        a = _thresholds(y - b.unsqueeze(-2), rows)
        b = _thresholds((y - a.unsqueeze(-1)).mT, columns)
    x = _plan(y, a, b)
    total = rows.sum(-1, keepdim=True)
    left = torch.arange(len(y), device=y.device)
    for _ in range(_MOST_STEPS):
        of_a, of_b = x[left].sum(-1) - rows[left], x[left].sum(-2) - columns[left]
        error = torch.maximum(of_a.abs().amax(-1), of_b.abs().amax(-1)).unsqueeze(-1)
        moving = (error > within[left]).squeeze(-1)
        if not bool(moving.any()):
            break
        left, of_a, of_b, error = left[moving], of_a[moving], of_b[moving], error[moving]
        ridge = (error / total[left] / 100).clamp(_LEAST_RIDGE, 1e-4)
        now = x[left], a[left], b[left]
        direction = _newton((now[0] > 0).to(y.dtype), of_a, of_b, ridge)
        slope = -(of_a * direction[0]).sum(-1) - (of_b * direction[1]).sum(-1)
        x[left], a[left], b[left], moved = _searched(
            y[left], rows[left], columns[left], now, direction, slope
        )
        left = left[moved]  # others are as near as rounding allows
        if len(left) == 0:
            break
    return x, a, b


def _thresholds(y: Tensor, sums: Tensor) -> Tensor:
    """About the thresholds that bring the sums of rows down to `sums`, and none above it."""
    t = y.amax(-1) - sums
    for _ in range(_ALTERNATIONS):
        over = (y - t.unsqueeze(-1)).clamp_(min=0)
        number = over.sign().sum(-1).clamp_(min=1)
        t = t + (over.sum(-1) - sums) / number
    return t


def _plan(y: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return (y - a.unsqueeze(-1) - b.unsqueeze(-2)).clamp_(min=0)


def _newton(support: Tensor, of_a: Tensor, of_b: Tensor, ridge: Tensor) -> tuple[Tensor, Tensor]:
    """Changes of a and b that lower the sums over the support by `of_a` and `of_b`."""
    diagonal_a, diagonal_b = (support.sum(d).clamp(min=1) + ridge for d in (-1, -2))
    scaled = support / diagonal_a.unsqueeze(-1)
    system = torch.diag_embed(diagonal_b) - support.mT @ scaled
    goal = of_b.unsqueeze(-1) - scaled.mT @ of_a.unsqueeze(-1)
    factor, _ = torch.linalg.cholesky_ex(system)
    db = torch.cholesky_solve(goal, factor)
    da = (of_a.unsqueeze(-1) - support @ db) / diagonal_a.unsqueeze(-1)
    return da.squeeze(-1), db.squeeze(-1)


def _searched(
    y: Tensor,
    rows: Tensor,
    columns: Tensor,
    now: tuple[Tensor, Tensor, Tensor],
    direction: tuple[Tensor, Tensor],
    slope: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The plan, a and b after a step of a length that lowers the dual; and whether one does."""
    x, a, b = now

    def dual(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        square = x.square().sum((-2, -1)) / 2
        return square + (rows * a).sum(-1) + (columns * b).sum(-1)

    value = dual(x, a, b)
    rounding = 1e-14 * (x.square().sum((-2, -1)) + (rows * a).abs().sum(-1))
    length = torch.ones_like(slope)
    for _ in range(_MOST_HALVINGS):
        step = length.unsqueeze(-1)
        a_new, b_new = a + step * direction[0], b + step * direction[1]
        x_new = _plan(y, a_new, b_new)
        lower = dual(x_new, a_new, b_new) <= value + 1e-4 * length * slope + rounding
        if bool(lower.all()):
            break
        length = torch.where(lower, length, length / 2)
    return x_new, a_new, b_new, lower


# The oracle


def cheapest_plan(cost: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """A plan of least cost, by shortest augmenting paths (Ford & Fulkerson, 1962), all at once.

    Flow goes along the cheapest path from a row whose sum is not reached to such a column; prices
    of rows and columns keep the remaining costs >= 0, and 0 where there is flow.
    """
    m, k = cost.shape[-2:]
    flow = torch.zeros_like(cost)
    supply, demand = rows.clone(), columns.clone()
    u = cost.amin(-1)
    v = (cost - u.unsqueeze(-1)).amin(-2)
    least = 1e-15 * rows.sum(-1, keepdim=True)
    for _ in range(20 * (m + k)):
        open_rows, open_columns = supply > least, demand > least
        if not bool((open_rows.any(-1) & open_columns.any(-1)).any()):
            break
        reduced = (cost - u.unsqueeze(-1) - v.unsqueeze(-2)).clamp_(min=0)
        paths = _shortest(reduced, flow > 0, open_rows)
        _augment_(flow, supply, demand, open_columns, paths)
        nearest = torch.where(open_columns, paths[1], torch.inf).amin(-1, keepdim=True)
        nearest = torch.where(nearest.isfinite(), nearest, 0.0)
        u += nearest - torch.minimum(paths[0], nearest)
        v -= nearest - torch.minimum(paths[1], nearest)
    return repaired(flow, rows, columns)


_Paths = tuple[Tensor, Tensor, Tensor, Tensor]


def _shortest(reduced: Tensor, flows: Tensor, open_rows: Tensor) -> _Paths:
    """Distances of rows and columns from the open rows, and the node before each on the path.

    From a row to a column at its cost, back where there is flow at none (Bellman & Ford).
    """
    back = torch.where(flows, 0.0, torch.inf)
    of_rows = torch.where(open_rows, 0.0, torch.inf)
    before_row = torch.full_like(of_rows, -1, dtype=torch.long)
    of_columns = torch.full_like(reduced[:, 0], torch.inf)
    before_column = torch.zeros_like(of_columns, dtype=torch.long)
    while True:
        found, row = (of_rows.unsqueeze(-1) + reduced).min(-2)
        before_column = torch.where(found < of_columns, row, before_column)
        of_columns = torch.minimum(found, of_columns)
        found, column = (of_columns.unsqueeze(-2) + back).min(-1)
        nearer = found < of_rows
        if not bool(nearer.any()):
            return of_rows, of_columns, before_row, before_column
        of_rows = torch.where(nearer, found, of_rows)
        before_row = torch.where(nearer, column, before_row)


def _augment_(
    flow: Tensor, supply: Tensor, demand: Tensor, open_columns: Tensor, paths: _Paths
) -> None:
    """Send as much as fits along the shortest path to an open column."""
    _, of_columns, before_row, before_column = paths
    size = flow.shape[-1]
    flat, every = flow.view(len(flow), -1), torch.arange(len(flow), device=flow.device)
    distance, end = torch.where(open_columns, of_columns, torch.inf).min(-1)
    amount = torch.where(distance.isfinite(), demand[every, end], 0.0)
    column, row = end, before_column[every, end]
    edges: list[tuple[Tensor, tuple[Tensor, Tensor] | None]] = []
    while True:
        edges.append((row * size + column, None))
        previous = before_row[every, row]
        goes_on = previous >= 0
        if not bool(goes_on.any()):
            break
        at = row * size + previous.clamp(min=0)
        amount = torch.where(goes_on, torch.minimum(amount, flat[every, at]), amount)
        edges[-1] = (edges[-1][0], (at, goes_on))
        column = torch.where(goes_on, previous, column)
        row = torch.where(goes_on, before_column[every, column], row)
    amount = torch.minimum(amount, supply[every, row]).clamp(min=0)
    under_way = torch.ones_like(amount, dtype=torch.bool)
    for to_column, back in edges:
        sent = torch.where(under_way, amount, 0.0)
        flat[every, to_column] += sent
        if back is None:
            break
        at, goes_on = back
        flat[every, at] -= torch.where(goes_on, amount, 0.0)
        under_way = under_way & goes_on
    supply[every, row] -= amount
    demand[every, end] -= amount
