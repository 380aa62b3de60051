"""What all sets have in common: their four methods, and how these act on a batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import FrozenInstanceError, dataclass, fields
from functools import partial, wraps
from math import isfinite, prod
from typing import Any, ClassVar, TypeVar, cast

import torch
from torch import Generator, Tensor

from rai_toolbox.autograd import readable, with_value
from rai_toolbox.checks import as_plain, check_count, wrong
from rai_toolbox.constraints.along import as_dims, dims_in, on_rows
from rai_toolbox.constraints.kernels.blocks import BLOCK, Workspace, in_groups, row_blocks, widened
from rai_toolbox.constraints.sharding import ON_SHARDS, PLAIN, is_sharded

_SETS: dict[str, dict[str, type[Constraint]]] = {}  # by class name, then by full name
_Self = TypeVar("_Self", bound="Constraint")
_Change = Callable[[str, Tensor], Tensor]
_Method = TypeVar("_Method", bound=Callable[..., Any])


def _of_any_batch(method: _Method) -> _Method:
    """A method for any batch: a sharded one, or one whose points do not lie along its last dims."""

    @wraps(method)
    def of_any(constraint: Constraint, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if type(x) not in PLAIN and is_sharded(x):
            # (a batch of that shape without its memory)
            constraint._check_batch(torch.empty((), dtype=x.dtype, device=x.device).expand(x.shape))
            return ON_SHARDS[method.__name__](of_any, constraint, x, *args, **kwargs)
        if constraint._dims is not None:
            return on_rows(method, constraint, x, *args, **kwargs)
        return method(constraint, x, *args, **kwargs)

    return cast(_Method, of_any)


class _Immutable:
    """What a frozen dataclass leaves to its base: to refuse attributes that are not its fields.

    In a plain subclass of a user's they are allowed, as in that of any frozen dataclass.
    """

    def __setattr__(self, name: str, value: object) -> None:
        if type(self).__module__.startswith("rai_toolbox."):
            raise FrozenInstanceError(f"cannot assign to field {name!r}")
        super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        if type(self).__module__.startswith("rai_toolbox."):
            raise FrozenInstanceError(f"cannot delete field {name!r}")
        super().__delattr__(name)


@dataclass(frozen=True, eq=False, repr=False)
class Constraint(_Immutable):
    """A set of allowed values for each sub-tensor of a batch; instances are immutable.

    The batch `x` has the shape `(N, ...)`: N sub-tensors, each of which is in the set or not.
    `rai_toolbox.to_batch` views any tensor as a batch. A setting is a number, or a tensor that
    broadcasts against `(N, ...)`; a setting of the sub-tensor as a whole, such as a radius, then
    has the shape `(N, 1, ...)`. Tensor settings are kept, not copied: do not write to them.

    Points are judged after rounding to the dtype of x: bounds of elements count as rounded to that
    dtype, radii count as given. Points inside the set do not change, bit for bit. A set that is an
    equation, such as a sum, holds all points that solve it to within the rounding of their
    entries.

    Nothing non-finite is hidden. In an elementwise set a NaN stays NaN, and an infinity is a very
    large number; in any other set a NaN or an infinity makes its whole sub-tensor NaN.

    A field `dim`, an int or a tuple of ints, selects the dims of the batch along which a sub-tensor
    lies, such as 0 for the columns of a matrix; by default all dims but the first.

    A set of your own is a frozen dataclass with the methods `_excess`, the distance of each
    sub-tensor from the set, and `_nearest`, the nearest point; both get float64.
    `rai_toolbox.testing.check_constraint` checks it.
    """

    convex: ClassVar[bool] = True
    """Whether the set is convex, so that projections are unique and never expand distances."""

    bounded: ClassVar[bool] = False
    """Whether the set is bounded, so that `lmo` and `sample_` exist."""

    elementwise: ClassVar[bool] = False
    """Whether the set bounds each entry on its own."""

    flat: ClassVar[bool] = False
    """Whether the set is an affine subspace, so that the projection is an affine map."""

    _of_matrices: ClassVar[bool] = False  # a point is a matrix, in the last two dims of the batch
    _dims: ClassVar[tuple[int, ...] | None] = None  # that a point lies along; all but the first
    _joins_rows: ClassVar[bool] = False  # projects rows of several batches as those of one
    _for_each: ClassVar[tuple[str, ...]] = ()  # settings with one value per sub-tensor
    _is_equation: ClassVar[bool] = False  # no interior, where the projection has derivative 1
    _unaligned: ClassVar[tuple[str, ...]] = ()  # settings of another shape than the batch has
    _tensors: ClassVar[tuple[str, ...]] = ()  # of each instance: settings that hold tensors

    def __init_subclass__(cls) -> None:
        if not cls.__name__.startswith("_"):
            _SETS.setdefault(cls.__name__, {})[f"{cls.__module__}.{cls.__qualname__}"] = cls
        for name in ("_joins_rows", "project_each_", "_scaling"):
            first = next(kind for kind in cls.__mro__ if {"project_", name} & vars(kind).keys())
            if name not in vars(first):  # what a class above that does in its place
                setattr(cls, name, vars(Constraint)[name])
        for name in ON_SHARDS:
            if name in cls.__dict__:
                setattr(cls, name, _of_any_batch(cls.__dict__[name]))

    def __repr__(self) -> str:  # (to have each class's own written takes long at import)
        shown = [f"{f.name}={getattr(self, f.name)!r}" for f in fields(self) if f.repr]
        return f"{type(self).__qualname__}({', '.join(shown)})"

    def __post_init__(self) -> None:
        settings = {field.name: as_plain(getattr(self, field.name)) for field in fields(self)}
        tensors = (k for k, v in settings.items() if k not in self._unaligned and _holds_tensors(v))
        self.__dict__.update(settings, _tensors=tuple(tensors))
        self.__dict__["_dims"] = as_dims(settings.get("dim"))
        if settings.get("flatten") is not None:
            check_count("flatten", settings["flatten"], 1)
        self._check_settings()

    def _derive(self, **facts: bool) -> None:
        """Set `bounded` or `convex` from the settings, unless a subclass says it."""
        for name, fact in facts.items():
            if next(cls for cls in type(self).__mro__ if name in vars(cls)) is Constraint:
                self.__dict__[name] = fact

    def coupled_dims(self, ndim: int) -> tuple[int, ...]:
        """The dims of a batch of `ndim` dims along which the set may couple the elements."""
        return tuple(range(1, ndim)) if self._dims is None else dims_in(self._dims, ndim)

    # The methods

    @_of_any_batch
    def project_(self, x: Tensor) -> Tensor:
        """Project each sub-tensor onto the set, in place: the nearest point, in Euclidean norm.

        Parameters
        ----------
        x : Tensor, shape (N, ...)
            Of a real floating-point dtype, in any strides.

        Returns
        -------
        Tensor
            `x`, which is in the set, also after rounding.
        """
        self._check_batch(x)
        for block, points, constraint in self._blocks(x):
            nearest = constraint._projected(points)
            if nearest is not points:  # (torch refuses to copy between other strides of the same)
                block.copy_(nearest.view(block.shape))
        return x

    def project(self, x: Tensor) -> Tensor:
        """`project_`, out of place; autograd differentiates it.

        Parameters
        ----------
        x : Tensor, shape (N, ...)
            Of a real floating-point dtype, in any strides.

        Returns
        -------
        Tensor, shape (N, ...)
        """
        return self.project_(x.clone())

    @_of_any_batch
    @torch.no_grad()
    def violation(self, x: Tensor) -> Tensor:
        """How far each sub-tensor is outside the set, in the unit of `x`; 0 inside.

        Parameters
        ----------
        x : Tensor, shape (N, ...)
            Of a real floating-point dtype, in any strides.

        Returns
        -------
        Tensor, shape (N,)
            In float64; NaN for a sub-tensor that holds a NaN, otherwise at most infinity.
        """
        self._check_batch(x)
        found = [constraint._violations(points) for _, points, constraint in self._blocks(x)]
        if not found:
            return torch.zeros(x.shape[:1], dtype=torch.float64, device=x.device)
        return torch.cat(found)

    @_of_any_batch
    @torch.no_grad()
    def lmo(self, gradient: Tensor) -> Tensor:
        """Minimize a linear function over the set: ``argmin_s <gradient, s>``.

        Parameters
        ----------
        gradient : Tensor, shape (N, ...)
            Of a real floating-point dtype, in any strides.

        Returns
        -------
        Tensor, shape (N, ...)
            A new tensor with one minimizer per sub-tensor, also where there are many.

        Raises
        ------
        ValueError
            If the set is not bounded, or has no closed form.
        """
        self._check_bounded("lmo")
        self._check_batch(gradient)
        answer = gradient.clone()
        for block, points, constraint in self._blocks(answer):
            wide, finite = constraint._finite(points)
            least = torch.where(finite, constraint._minimizer(wide, answer.dtype), torch.nan)
            block.copy_(least.reshape(block.shape))
        return answer

    @_of_any_batch
    @torch.no_grad()
    def sample_(self, x: Tensor, generator: Generator | None = None) -> Tensor:
        """Fill each sub-tensor with a random point of the set, in place.

        Parameters
        ----------
        x : Tensor, shape (N, ...)
            Of a real floating-point dtype, in any strides. Its values are not read.
        generator : torch.Generator, optional
            On any device. By default torch's own of the device of x.

        Returns
        -------
        Tensor
            `x`.

        Raises
        ------
        ValueError
            If the set is not bounded.
        """
        self._check_bounded("sample_")
        self._check_batch(x)
        for block, points, constraint in self._blocks(x):
            like = torch.empty_like(points, memory_format=torch.contiguous_format)
            block.copy_(constraint._sampled(like, generator).to(x.dtype).view(block.shape))
        return x

    def project_each_(self, batches: list[Tensor]) -> None:
        """`project_` for several batches, in as few calls as the set needs."""
        if self._tensors or self._dims is not None or not self._joins_rows:
            for x in batches:
                self.project_(x)
            return
        for x in batches:
            self._check_batch(x)
        act_each_ = partial(self._project_rows_each_, workspace=Workspace())
        in_groups(batches, self.project_, act_each_=act_each_)

    # Plain data

    def to_plain(self) -> dict[str, Any]:
        """The set as plain data: a dict of the name of its class and its settings.

        ``torch.load(weights_only=True)`` reads it; `from_plain` makes a set of it again.
        """
        settings = {f.name: _to_plain(getattr(self, f.name)) for f in fields(self) if f.init}
        return {"set": type(self).__name__, **settings}

    @staticmethod
    def from_plain(plain: Mapping[str, Any]) -> Constraint:
        """The set that `to_plain` gave as plain data.

        Raises
        ------
        ValueError
            If there is no set of that name, or its settings are not right.
        """
        settings = {name: _from_plain(value) for name, value in plain.items() if name != "set"}
        name = plain.get("set")
        if name not in _SETS:
            raise ValueError(f"`set` must be one of {sorted(_SETS)}, got {name!r}")
        if len(_SETS[name]) > 1:
            raise ValueError(f"`set` must name one class, got {name!r} for {sorted(_SETS[name])}")
        (kind,) = _SETS[name].values()
        try:
            return kind._from_settings(settings)
        except TypeError as error:
            raise ValueError(f"the settings of {name} must fit it, got {settings}") from error

    @classmethod
    def _from_settings(cls, settings: dict[str, Any]) -> Constraint:
        return cls(**settings)

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and all(
            _equal(getattr(self, f.name), getattr(other, f.name)) for f in fields(self)
        )

    def __hash__(self) -> int:
        return hash(type(self))

    def to(self, *args: Any, **kwargs: Any) -> Constraint:
        """The same set with its tensor settings converted, as by `torch.Tensor.to`."""

        def converted(value: Any) -> Any:
            if isinstance(value, tuple):
                return tuple(map(converted, value))
            return value.to(*args, **kwargs) if isinstance(value, (Tensor, Constraint)) else value

        return self._replaced({f.name: converted(getattr(self, f.name)) for f in fields(self)})

    # What a set defines

    def _check_settings(self) -> None:
        """Raise if a setting is wrong; once, when the set is made."""

    def _check_shape(self, shape: torch.Size) -> None:
        """Raise if a batch of this shape can have no point of the set."""

    def _excess(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """How far each point of `x` is outside; exactly 0 inside, to the precision of `dtype`.

        A point is a row of a (N, n) tensor, or a matrix of a (N, ..., m, k) one. `x` is in float64
        and finite; tensor settings are in float64 too, reshaped to broadcast against it.
        """
        raise NotImplementedError(f"{type(self).__name__} does not define `_excess`")

    def _nearest(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """The nearest point to each point of `x` that stays in the set when rounded to `dtype`."""
        raise NotImplementedError(f"{type(self).__name__} has no projection")

    def _minimizer(self, gradient: Tensor, dtype: torch.dtype) -> Tensor:
        """A minimizer of a linear function that stays in the set when rounded to `dtype`."""
        raise ValueError(f"`lmo` has no closed form for {type(self).__name__}")

    def _sampled(self, like: Tensor, generator: Generator | None) -> Tensor:
        """Random points of the set in the shape, dtype and device of `like`, or in float64."""
        raise ValueError(f"`sample_` is not defined for {type(self).__name__}")

    def _scaling(self, length: Tensor, x: Tensor) -> Any:
        """The factor of each row of `x`, if that is what the projection does, by its norm.

        `length` has the shape (N,) and may be overwritten. The factor is exactly 1 for norms that
        are inside; None if all are. By default NotImplemented.
        """
        return NotImplemented

    def _project_rows_each_(self, batches: list[Tensor], workspace: Workspace) -> None:
        """`project_` for plain batches on the CPU, with rows of one length and dtype."""
        for x in batches:
            self.project_(x)

    # From a batch to points in float64, and back

    def _projected(self, points: Tensor) -> Tensor:
        wide, finite = self._finite(points)
        inside = self._excess(wide.detach(), points.dtype) <= 0
        inside = inside[..., None, None] if self._of_matrices else inside[..., None]
        nearest = self._nearest(wide, points.dtype).to(points.dtype)
        result = torch.where(inside, points, nearest)
        if self._is_equation:
            result = with_value(result.detach(), nearest)
        return torch.where(finite, result, torch.nan)

    def _violations(self, points: Tensor) -> Tensor:
        wide, _ = self._finite(points)
        excess = self._excess(wide, points.dtype)
        if not self.elementwise:
            largest = self._largest(points).reshape(excess.shape)
            excess = torch.where(largest.isfinite(), excess, largest)
        return (excess.flatten(1).amax(1) if excess.ndim > 1 else excess) + 0.0  # -0.0 is 0.0

    def _finite(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """`points` in float64, with zeros for points that are not finite; which are finite.

        An elementwise set gets all entries as they are.
        """
        wide = widened(points)
        if self.elementwise:
            return wide, torch.ones((), dtype=torch.bool, device=wide.device)
        finite = self._largest(wide.detach()).isfinite()
        return torch.where(finite, wide, 0.0), finite

    def _largest(self, points: Tensor) -> Tensor:
        """The largest magnitude of each point; infinite or NaN where a point is not finite."""
        return points.abs().amax((-2, -1) if self._of_matrices else -1, keepdim=True)

    def _blocks(self: _Self, x: Tensor) -> Iterator[tuple[Tensor, Tensor, _Self]]:
        """Blocks of rows of the batch, the points in each, and the set as it applies to these."""
        if x.numel() == 0:
            return
        if x.ndim == 0:
            x = x.unsqueeze(0)
        for rows in row_blocks(x) if x.numel() > BLOCK else [slice(0, len(x))]:
            block = x if rows.stop - rows.start >= len(x) else x[rows]
            points = self._points(readable(block))
            settings = partial(self._aligned, x, rows)
            yield block, points, self._map(settings) if self._tensors else self

    def _points(self, batch: Tensor) -> Tensor:
        """The points of a batch, as rows or as matrices."""
        if not self._of_matrices:
            return batch.reshape(len(batch), -1)
        rows = self.__dict__.get("flatten")
        return batch.flatten(1 + rows).flatten(1, rows) if rows else batch

    def _aligned(self, x: Tensor, rows: slice, name: str, setting: Tensor) -> Tensor:
        """A setting in float64, to broadcast against the points of some rows of x."""
        setting = setting.reshape((1,) * (x.ndim - setting.ndim) + setting.shape)
        setting = widened(setting[rows] if len(setting) > 1 else setting)
        if self._of_matrices:
            return self._points(setting)
        if prod(setting.shape[1:]) == 1:
            return setting.reshape(-1, 1)
        return setting.expand(-1, *x.shape[1:]).flatten(1)

    # Other settings

    def _map(self: _Self, change: _Change) -> _Self:
        """The set with ``change(name, setting)`` in place of each tensor setting; unchecked."""
        return self._replaced({k: _mapped(getattr(self, k), k, change) for k in self._tensors})

    def _of_rows(self: _Self, change: _Change) -> _Self:
        """The set of rows that a set of what lies along some dims is; unchecked."""
        return self._map(change)._replaced({"_dims": None})

    def _at_rows(self: _Self, x: Tensor, at: Tensor | slice) -> _Self:
        """The set as some sub-tensors of the batch x see it; unchecked."""
        return self._map(lambda _, s: s[at] if s.ndim == x.ndim and len(s) > 1 else s)

    def _replaced(self: _Self, settings: dict[str, Any]) -> _Self:
        """The set with some settings replaced; unchecked."""
        other = object.__new__(type(self))
        other.__dict__.update({**self.__dict__, **settings})
        return other

    def _whole_dims(self, shape: torch.Size) -> Iterable[int]:
        """The dims of a batch of this shape that no two ranks may share."""
        return () if self.elementwise else self.coupled_dims(len(shape))

    # Checks

    def _check_bounded(self, method: str) -> None:
        if not self.bounded:
            raise ValueError(f"`{method}` needs a bounded set, got {self!r}")

    def _check_batch(self, x: Tensor) -> None:
        name = type(self).__name__
        if not x.is_floating_point():
            raise TypeError(f"{name} takes real floating-point tensors, got {x.dtype}")
        rows = self.__dict__.get("flatten", 0)  # of a matrix: how many dims
        least = 2 + max(1, rows or 0) if self._of_matrices else 2
        if x.ndim < least and not self.elementwise:
            shape = "(N, ..., m, k)" if self._of_matrices else "(N, ...)"
            hint = "=2 for a matrix" if self._of_matrices else "=None for a tensor as a whole"
            raise ValueError(
                f"{name} takes a batch of shape {shape}, got {tuple(x.shape)}; "
                f"pass param_ndim{hint} to the optimizer, or to rai_toolbox.to_batch"
            )
        if x.ndim > 3 and rows is None:
            raise ValueError(
                f"{name} takes sub-tensors of 2 dims, got a batch of shape {tuple(x.shape)}; "
                "flatten=1 makes one matrix of a sub-tensor, its first dim by all others (for a "
                "convolution, with param_ndim=None); param_ndim=2 makes the last two dims a matrix"
            )
        if self._tensors:
            self._check_tensors(x)
        if self._dims is None:  # (else that of its rows is checked)
            self._check_shape(x.shape)

    def _check_tensors(self, x: Tensor) -> None:
        for name in self._tensors:
            setting = getattr(self, name)
            if isinstance(setting, Tensor):
                self._check_fit(name, setting, x)
                check_device(name, setting, x)
            elif isinstance(setting, Constraint):
                setting._check_batch(x)

    def _check_fit(self, name: str, setting: Tensor, x: Tensor) -> None:
        """Raise if a tensor setting has no shape for the batch x."""
        is_for_each = name in self._for_each
        if setting.ndim == 0 or (setting.shape == x.shape and not is_for_each):
            return
        shape, batch = tuple(setting.shape), tuple(x.shape)
        fits = len(shape) <= len(batch) and all(
            size in (1, of_x) for size, of_x in zip(shape[::-1], batch[::-1], strict=False)
        )
        if not fits:
            raise wrong(name, f"broadcast against the batch of shape {batch}", f"shape {shape}")
        coupled = self._whole_dims(x.shape) if is_for_each else ()
        of_each = tuple(1 if dim in coupled else size for dim, size in enumerate(batch))
        if any(shape[dim - x.ndim] != 1 for dim in coupled if dim >= x.ndim - len(shape)):
            rule = f"have one value per sub-tensor, shape {of_each} for the batch of shape {batch}"
            raise wrong(name, rule, f"shape {shape}")


def are_finite(*settings: float | Tensor | None) -> bool:
    """Whether settings are finite everywhere; None, an open side, is not."""
    return all(
        bool(s.isfinite().all()) if isinstance(s, Tensor) else s is not None and isfinite(s)
        for s in settings
    )


def in_float64(**settings: float | Tensor) -> list[Tensor]:
    """Settings as float64 tensors; raise unless these broadcast against each other.

    Numbers are on the CPU, whatever the default device is.
    """
    number = partial(torch.tensor, dtype=torch.float64, device="cpu")
    tensors = [widened(s) if isinstance(s, Tensor) else number(s) for s in settings.values()]
    try:
        torch.broadcast_tensors(*tensors)  # (`broadcast_shapes` imports sympy)
    except RuntimeError:
        *names, last = settings
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in tensors)
        name, rule = f"{'`, `'.join(names)}` and `{last}", "broadcast against each other"
        raise wrong(name, rule, f"shapes {shapes}") from None
    return tensors


def check_device(name: str, setting: Tensor, x: Tensor) -> None:
    """Raise if a tensor setting is on another device than x."""
    if setting.device != x.device:
        rule = f"be on the device of the batch, {x.device}"
        raise wrong(name, rule, f"{setting.device}; see `to`")


def _holds_tensors(value: Any) -> bool:
    if isinstance(value, tuple):
        return any(map(_holds_tensors, value))
    return isinstance(value, Tensor) or (isinstance(value, Constraint) and bool(value._tensors))


def _mapped(value: Any, name: str, change: _Change) -> Any:
    if isinstance(value, tuple):
        return tuple(_mapped(member, name, change) for member in value)
    if isinstance(value, Constraint):
        return value._map(change)
    return change(name, value) if isinstance(value, Tensor) else value


def _to_plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_to_plain(member) for member in value]
    return value.to_plain() if isinstance(value, Constraint) else value


def _from_plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return Constraint.from_plain(value)
    if isinstance(value, (list, tuple)):
        return tuple(_from_plain(v) for v in value)
    return value


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        tensors = isinstance(a, Tensor) and isinstance(b, Tensor)
        return tensors and a.device == b.device and torch.equal(a, b)
    return bool(a == b)
