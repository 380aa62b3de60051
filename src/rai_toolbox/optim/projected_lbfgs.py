"""L-BFGS inside a set, for losses of full batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor

from rai_toolbox import checks
from rai_toolbox.constraints.base import Constraint
from rai_toolbox.optim.diagnosis import Constrained
from rai_toolbox.optim.lbfgs.flat import FlatProblem, check_alike, trainable
from rai_toolbox.optim.lbfgs.memory import Memory
from rai_toolbox.optim.lbfgs.minimize import REASONS, Minimizer
from rai_toolbox.optim.own_step import OwnStepOptimizer, check_lr_value, evaluated
from rai_toolbox.optim.settings import REQUIRED, check_constraint
from rai_toolbox.optim.wrapper import Group, Params

_OF_ALL = ("lr", "max_iter", "max_eval", "history_size", "tolerance_grad", "tolerance_change")


class ProjectedLBFGS(Constrained, OwnStepOptimizer):
    r"""Minimize a deterministic loss over a convex set by L-BFGS: few evaluations, exact results.

    .. math::
        z \approx \arg\min_{z \in C} \; \langle g, z - p \rangle + \tfrac{1}{2} (z - p)^T B (z - p),
        \quad p \leftarrow p + t (z - p)

    B is the limited-memory BFGS matrix of the last steps, and t is found by a line search that
    stays in the set. All parameters of all groups are one vector, and C is the product of the sets
    of the groups. Where each of these bounds elements alone, or is None, this is L-BFGS-B: z is
    the minimum over the elements that are free at the generalized Cauchy point (Byrd, Lu, Nocedal &
    Zhu, 1995; Morales & Nocedal, 2011). In any other set z is found by the spectral projected
    gradient method: a projected quasi-Newton method (Schmidt, van den Berg, Friedlander & Murphy,
    2009; Birgin, Martinez & Raydan, 2000), which projects up to 20 times per iteration.

    Use it as torch's LBFGS: `step` needs a closure, which it calls many times. All points at which
    the closure is evaluated are in the set, also after rounding; a start outside is projected.
    Apart from rounding, the loss never increases.

    Parameters
    ----------
    params : iterable
        Tensors, named tensors, or dicts that define parameter groups. Those that are trained must
        all be of float32, or of float64, on one device.
    constraint : Constraint or None
        The convex set of each sub-tensor; None leaves parameters unconstrained. Required, here or
        in every parameter group.
    param_ndim : int or None
        Number of trailing dims that make a sub-tensor, see `rai_toolbox.to_batch`.
    lr : float
        The first step length t that a line search tries, > 0; 1 is best for nearly all problems.
        With 0 nothing moves.
    max_iter, max_eval : int
        The most iterations, and evaluations of the closure, per step. By default `max_eval` is
        ``1.25 * max_iter``.
    history_size : int
        B is computed from this number of past steps and the changes of the gradient in them. They
        take ``2 * history_size`` times the memory of the parameters.
    tolerance_grad : float
        A step ends where no entry of ``p - P(p - g)`` exceeds it.
    tolerance_change : float
        A step ends if an iteration lowers the loss f by at most ``tolerance_change * |f|``.

    Raises
    ------
    TypeError, ValueError
        If a setting breaks its rule, the set is not convex or does not fit a parameter, dtypes
        or devices of parameters differ, or groups differ in a setting other than the set and
        `param_ndim`.

    Notes
    -----
    `status` says why the last step has ended, and `evaluations` counts those of all steps:

    - ``"gradient"``, ``"change"``: a tolerance holds;
    - ``"max_iter"``, ``"max_eval"``: the next step goes on from there;
    - ``"no decrease"``: no lower point was found along a descent direction. Rounding or noise in
      the loss allow no better point, or the gradients are wrong;
    - ``"not finite"``: the loss or the gradient at the start contains a NaN or an infinity. If only
      a trial point has one, shorter steps are tried;
    - ``"closure raised"``: the error was passed on to the caller.

    In every case the parameters are then at the lowest point found, and their gradients are those
    of that point. Losses that differ by less than their rounding are compared by gradients.
    `step` returns the loss at its start, as torch's LBFGS does.

    Where the loss changes from one step to the next, as with mini-batches, the pairs are still
    right, because both ends of each are of the same step; but use another optimizer.

    Examples
    --------
    >>> import torch
    >>> from rai_toolbox.constraints import NonNegative
    >>> from rai_toolbox.optim import ProjectedLBFGS
    >>> x = torch.tensor([1.0, 1.0], dtype=torch.float64, requires_grad=True)
    >>> optim = ProjectedLBFGS([x], constraint=NonNegative())
    >>> def closure():
    ...     optim.zero_grad()
    ...     loss = (x[0] - 2) ** 2 + (x[0] + 3 * x[1]) ** 2
    ...     loss.backward()
    ...     return loss
    >>> _ = optim.step(closure)
    >>> x
    tensor([1., 0.], dtype=torch.float64, requires_grad=True)
    >>> optim.status
    'gradient'
    """

    _checks = {
        "lr": check_lr_value,
        "max_iter": lambda name, value: checks.check_count(name, value, 1),
        "max_eval": lambda name, value: _check_max_eval(name, value),
        "history_size": lambda name, value: checks.check_count(name, value, 1),
        "tolerance_grad": checks.check_non_negative,
        "tolerance_change": checks.check_non_negative,
        "constraint": lambda _, value: _check_convex(value),
    }

    def __init__(
        self,
        params: Params,
        *,
        constraint: Constraint | None | type[REQUIRED] = REQUIRED,
        param_ndim: int | None = -1,
        lr: float | Tensor = 1.0,
        max_iter: int = 20,
        max_eval: int | None = None,
        history_size: int = 10,
        tolerance_grad: float = 1e-9,
        tolerance_change: float = 1e-12,
    ) -> None:
        super().__init__(params, locals())

    def _check_groups(self, groups: Sequence[Group]) -> None:
        super()._check_groups(groups)
        for name in _OF_ALL:
            found = [group[name] for group in groups]
            if any(value != found[0] for value in found):
                raise ValueError(f"`{name}` must be the same in all groups, got {found}")
        check_alike(groups)

    @property
    def status(self) -> str | None:
        """Why the last step has ended; None before the first one."""
        reason = self.state.get(self._first(), {}).get("reason")
        return None if reason is None else REASONS[reason]

    @property
    def evaluations(self) -> int:
        """How often the closure has been called, in all steps."""
        return int(self.state.get(self._first(), {}).get("func_evals", 0))

    def _first(self) -> Tensor:
        """The parameter with the state, which is that of the vector of all parameters."""
        params: Iterator[Tensor] = (p for group in self.param_groups for p in group["params"])
        return next(params)

    def _step(self, closure: Callable[[], Any] | None) -> Any:
        self._check_groups(self.param_groups)  # a group may have been edited
        settings = self.param_groups[0]
        if closure is None:
            if settings["lr"] == 0:
                return None  # the step by which a distributed checkpoint creates empty state
            raise ValueError("`closure` must be given, got None")
        if settings["lr"] == 0 or not any(map(trainable, self.param_groups)):
            return evaluated(closure)
        problem = FlatProblem(self.param_groups, closure)
        state = self.state[self._first()]
        memory = Memory.from_plain(state["memory"]) if "memory" in state else None
        if memory is None or not memory.fits(settings["history_size"], problem.point()):
            memory = Memory(settings["history_size"], problem.point())
        minimizer = Minimizer(problem, memory, settings)
        state["reason"] = REASONS.index(minimizer.run())  # (torch loads no strings)
        iterations = state.get("n_iter", 0) + minimizer.iterations
        for group in self.param_groups:
            for param in group["params"]:  # distributed checkpoints want a state of each
                self.state[param]["n_iter"] = iterations
        state["func_evals"] = state.get("func_evals", 0) + problem.evaluations
        state["memory"] = memory.to_plain()
        if problem.error is not None:
            raise problem.error
        return problem.first_loss


def _check_max_eval(name: str, value: object) -> None:
    if value is not None:
        checks.check_count(name, value, 1)


def _check_convex(constraint: Any) -> None:
    if constraint is REQUIRED:
        rule = "be given, to ProjectedLBFGS or in every parameter group (None leaves it "
        raise checks.wrong("constraint", rule + "unconstrained)", "none", TypeError)
    check_constraint(constraint)
    if constraint is not None and not constraint.convex:
        raise ValueError(f"`constraint` must be convex, got {constraint!r}")
