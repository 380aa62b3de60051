"""The optimizer that follows the largest entries of the gradient only."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Generator, Tensor, default_generator
from torch.optim import SGD, Optimizer

from rai_toolbox.checks import check_fraction
from rai_toolbox.optim.engine import ParamTransformingOptimizer
from rai_toolbox.optim.settings import REQUIRED
from rai_toolbox.optim.transforms import top_q_
from rai_toolbox.optim.wrapper import Group, Params


class TopQGradientOptimizer(ParamTransformingOptimizer):
    """Keep the largest-magnitude entries of each gradient's sub-tensors before the inner step.

    Of the n entries of a sub-tensor the ``round((1 - q) * n)`` largest magnitudes stay, exactly
    so many also if there are ties; the rest become 0.

    Parameters
    ----------
    q : float
        Fraction of entries set to 0, in [0, 1]. To be given here or in every parameter group.
    dq : float
        If > 0, `q` is drawn anew for each parameter at each step, uniformly from
        [max(0, q - dq), min(1, q + dq)]. In [0, 1].
    generator : torch.Generator
        Where these draws come from. The state of a generator other than torch's default one is
        saved in `state_dict()` and restored.
    params, InnerOpt, param_ndim, grad_scale, grad_bias, defaults, **inner_opt_kwargs
        See `ParamTransformingOptimizer`.

    Raises
    ------
    ValueError
        If `q` or `dq` is outside [0, 1].
    TypeError
        If `q` is missing.

    Examples
    --------
    >>> import torch
    >>> from rai_toolbox.optim import TopQGradientOptimizer
    >>> x = torch.ones(2, 2, requires_grad=True)
    >>> optim = TopQGradientOptimizer([x], q=0.5, param_ndim=None, lr=1.0)
    >>> x.backward(gradient=torch.tensor([[0.5, 1.0], [-2.5, 0.3]]))
    >>> optim.step()
    >>> x.grad
    tensor([[ 0.0000,  1.0000],
            [-2.5000,  0.0000]])
    """

    def __init__(
        self,
        params: Params = None,
        InnerOpt: type[Optimizer] | partial[Any] | Optimizer = SGD,
        *,
        q: float | type[REQUIRED] = REQUIRED,
        dq: float = 0.0,
        param_ndim: int | None = -1,
        grad_scale: float = 1.0,
        grad_bias: float = 0.0,
        defaults: Mapping[str, Any] | None = None,
        generator: Generator = default_generator,
        **inner_opt_kwargs: Any,
    ) -> None:
        if not isinstance(generator, Generator):
            raise TypeError(f"`generator` must be a torch.Generator, got {generator!r}")
        # None stands for torch's own, of which a copy of this object must not get a copy.
        self._own_generator = None if generator is default_generator else generator
        super().__init__(
            params,
            InnerOpt,
            param_ndim=param_ndim,
            grad_scale=grad_scale,
            grad_bias=grad_bias,
            defaults={"q": q, "dq": dq, **(defaults or {})},
            **inner_opt_kwargs,
        )

    @property
    def generator(self) -> Generator:
        """Where the draws of `q` come from."""
        return self._own_generator or default_generator

    def _check_group(self, group: Group) -> None:
        super()._check_group(group)
        check_fraction("q", group["q"])
        check_fraction("dq", group["dq"])

    def _transform_gradients_(
        self, params: list[Tensor], grads: list[Tensor], optim_group: Group
    ) -> None:
        for grad in grads:
            q = self._draw_q(optim_group["q"], optim_group["dq"])
            top_q_(grad, q, optim_group["param_ndim"])

    def _draw_q(self, q: float, dq: float) -> float:
        if dq == 0:
            return q
        low, high = max(0.0, q - dq), min(1.0, q + dq)
        # The number of entries to keep must be known on the host.
        draw = torch.rand((), generator=self.generator, device=self.generator.device).item()
        return low + (high - low) * draw

    def _extra_state(self) -> dict[str, Tensor]:
        generator = self._own_generator
        return {} if generator is None else {"generator_state": generator.get_state()}

    def _check_extra_state(self, extra: Mapping[str, Tensor]) -> None:
        if self._own_generator is not None and "generator_state" in extra:
            state = extra["generator_state"]
            try:
                Generator(self._own_generator.device).set_state(state.cpu())
            except (AttributeError, TypeError, RuntimeError) as error:
                raise ValueError(
                    f"`generator_state` in `state_dict` must be that of a generator on "
                    f"{self._own_generator.device}: {error}"
                ) from None

    def _load_extra_state(self, extra: Mapping[str, Tensor]) -> None:
        if self._own_generator is not None and "generator_state" in extra:
            self._own_generator.set_state(extra["generator_state"].cpu())
