"""What the tests of the engine share: every wrapper by name, and a recording one."""

from functools import partial

import torch
from torch.optim import SGD

from rai_toolbox import optim
from rai_toolbox.constraints import Box, L2Ball
from rai_toolbox.optim import ParamTransformingOptimizer


def chain(params=None, InnerOpt=SGD, **kwargs):
    return optim.ChainedParamTransformingOptimizer(
        partial(optim.TopQGradientOptimizer, q=0.5),
        partial(optim.ClampedGradientOptimizer, clamp_max=0.7),
        partial(optim.ClampedParameterOptimizer, clamp_min=-0.6, clamp_max=0.6),
        params=params,
        InnerOpt=InnerOpt,
        **kwargs,
    )


# With settings under which each changes gradients or parameters of the order of 1.
WITH_INNER = {
    "Param": optim.ParamTransformingOptimizer,
    "ClampedParameter": partial(optim.ClampedParameterOptimizer, clamp_min=-0.6, clamp_max=0.6),
    "ClampedGradient": partial(optim.ClampedGradientOptimizer, clamp_min=-0.6, clamp_max=0.6),
    "Signed": optim.SignedGradientOptim,
    "L1Normed": optim.L1NormedGradientOptim,
    "L2Normed": optim.L2NormedGradientOptim,
    "L2Projected": partial(optim.L2ProjectedOptim, epsilon=0.9),
    "LinfProjected": partial(optim.LinfProjectedOptim, epsilon=0.6),
    "TopQ": partial(optim.TopQGradientOptimizer, q=0.5),
    "L1qNormed": partial(optim.L1qNormedGradientOptim, q=0.5),
    "Chained": chain,
    "Projected": partial(optim.ProjectedOptimizer, constraint=L2Ball(0.9)),
    "ProjectedBox": partial(optim.ProjectedOptimizer, constraint=Box(-0.6, 0.6)),
}
FRANK_WOLFE = {
    "L1FrankWolfe": partial(optim.L1FrankWolfe, epsilon=0.9),
    "L2FrankWolfe": partial(optim.L2FrankWolfe, epsilon=0.9),
    "LinfFrankWolfe": partial(optim.LinfFrankWolfe, epsilon=0.9),
    "L1qFrankWolfe": partial(optim.L1qFrankWolfe, q=0.5, epsilon=0.9),
}
WRAPPERS = WITH_INNER | FRANK_WOLFE

# Around any inner optimizer, these change nothing: the trajectory is the inner's, bit for bit.
unbounded = partial(optim.ClampedParameterOptimizer, clamp_min=-torch.inf, clamp_max=torch.inf)


def recording(log):
    """A class of wrappers that write down each call of a transform, and the grad mode in it."""

    class Recording(ParamTransformingOptimizer):
        def _pre_step_transform_(self, param, optim_group):
            log.append(("transform", param.grad.flatten().tolist(), torch.is_grad_enabled()))

        def _post_step_transform_(self, param, optim_group):
            log.append(("project", param.flatten().tolist(), torch.is_grad_enabled()))

    return Recording


def tensors(*shapes, seed=0, dtype=torch.float32):
    """Leaf tensors with gradients, the same ones for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    made = [torch.randn(s, generator=generator, dtype=dtype).requires_grad_() for s in shapes]
    for tensor in made:
        tensor.grad = torch.randn(tensor.shape, generator=generator, dtype=dtype)
    return made


def new_gradients(params, step):
    """Give each tensor the gradient of a numbered step."""
    generator = torch.Generator().manual_seed(1000 + step)
    for param in params:
        param.grad = torch.randn(param.shape, generator=generator, dtype=param.dtype)
