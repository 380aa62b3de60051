"""Spectral projected gradient: the minimum of a model over a set that has a projection."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from rai_toolbox.optim.lbfgs.memory import Memory, dot

_MOST_STEPS = 20
_PAST = 10  # values that a step may not exceed
_ARMIJO = 1e-4
_TOLERANCE = 0.1


def model_minimum(
    x: Tensor, gradient: Tensor, memory: Memory, project_: Callable[[Tensor], Tensor]
) -> Tensor:
    """The minimum over a set of the model ``g (z - x) + (z - x) B (z - x) / 2``, about.

    The spectral projected gradient method (Birgin, Martinez & Raydan, 2000): a projected gradient
    step of the length of Barzilai & Borwein, and along it the full step, where it exceeds no recent
    values, or else that to the minimum. It ends after 20 steps, or where the projected gradient
    is a tenth of that at x: more exact minima save hardly any evaluations of the loss.
    """
    z, slope, step = x, gradient, 1 / memory.theta
    value, values, best, lowest = 0.0, [0.0], x, 0.0
    first = None
    for _ in range(_MOST_STEPS):
        end = project_(z - step * slope)
        move = end - z
        descent, length = dot(slope, move), dot(move, move)
        size = length**0.5 / step
        first = size if first is None else first
        if not descent < 0 or size <= _TOLERANCE * first:
            break
        bend = memory.hessian(move)
        curvature = dot(move, bend)
        full = value + descent + curvature / 2
        if not curvature > 0:
            break
        if full <= max(values[-_PAST:]) + _ARMIJO * descent:
            z, slope, value = end, slope + bend, full
        else:
            t = -descent / curvature
            z, slope = z + t * move, slope + t * bend
            value += t * descent / 2
        values.append(value)
        if value < lowest:
            best, lowest = z, value
        step = length / curvature
    return project_(best.clone())
