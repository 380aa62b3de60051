"""What all sets have in common: their four words, and how these meet a batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from math import prod
from typing import Any, ClassVar, TypeVar

import torch
from torch import Generator, Tensor

from rai_toolbox.autograd import readable, with_value
from rai_toolbox.checks import as_plain
from rai_toolbox.constraints.kernels.blocks import row_blocks, widened
from rai_toolbox.constraints.sharding import WORDS, by_shards

_SETS: dict[str, dict[str, type[Constraint]]] = {}  # by name, and by where they are from
_Self = TypeVar("_Self", bound="Constraint")


@dataclass(frozen=True, eq=False)
class Constraint:
    """A set that each sub-tensor of a batch is to be kept in: an immutable value.

    The batch `x` has the shape `(N, ...)`: N sub-tensors, each of which is in the set or not.
    `rai_toolbox.to_batch` shows any tensor as a batch. A setting is a number, or a tensor that
    broadcasts against `(N, ...)`; a setting of the sub-tensor as a whole, such as a radius, then
    has the shape `(N, 1, ...)`. Tensor settings are kept, not copied: do not write to them.

    Where x is, and what a projection gives, is told after rounding to the dtype of x: bounds of
    elements count as rounded to it, and radii count as they are given. What is inside stays as it
    is, bit for bit. A set that is an equation, such as a sum, holds all points that solve it to
    within the rounding of their entries.

    Nothing non-finite is hidden. In a set that bounds each entry for itself a NaN stays NaN, and
    an infinity is a very large number; in any other set a NaN or an infinity makes its whole
    sub-tensor NaN.

    A set of your own is a frozen dataclass with `_excess` and `_nearest`, both of which see
    float64; `rai_toolbox.testing.check_constraint` checks it.
    """

    convex: ClassVar[bool] = True
    """Whether the set is convex, so that projections are unique and never expand."""

    elementwise: ClassVar[bool] = False
    """Whether the set bounds each entry for itself."""

    flat: ClassVar[bool] = False
    """Whether the set is an affine subspace, so that the projection is an affine map."""

    _of_matrices: ClassVar[bool] = False  # the last two dims of a batch, else all but the first
    _for_each: ClassVar[tuple[str, ...]] = ()  # settings of sub-tensors, not of their elements
    _is_equation: ClassVar[bool] = False  # it has no interior, where P has the derivative 1

    def __init_subclass__(cls) -> None:
        if not cls.__name__.startswith("_"):
            _SETS.setdefault(cls.__name__, {})[f"{cls.__module__}.{cls.__qualname__}"] = cls
        for word in WORDS:  # so that no set needs to know of shards
            if word in cls.__dict__:
                setattr(cls, word, by_shards(cls.__dict__[word]))

    def __post_init__(self) -> None:
        for field in fields(self):
            object.__setattr__(self, field.name, as_plain(getattr(self, field.name)))
        self._check_settings()

    @property
    def bounded(self) -> bool:
        """Whether the set is bounded, so that `lmo` and `sample_` exist."""
        return False

    def coupled_dims(self, ndim: int) -> tuple[int, ...]:
        """The dims of a batch of `ndim` dims along which the set may couple the elements."""
        return tuple(range(1, ndim))

    # The words

    @by_shards
    def project_(self, x: Tensor) -> Tensor:
        """Project each sub-tensor onto the set, in place: the nearest point, in Euclidean norm.

        Parameters
        ----------
        x : Tensor, shape (N, ...)
            Of a real floating-point dtype, in any strides.

        Returns
        -------
        Tensor
            `x`, which is in the set after rounding, too.
        """
        self._check_batch(x)
        for part, seen in self._parts(x):
            part.copy_(seen._projected(seen._units(part)).view(part.shape))
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

    @by_shards
    @torch.no_grad()
    def violation(self, x: Tensor) -> Tensor:
        """By how much each sub-tensor is outside the set, in the unit of `x`; 0 inside.

        Parameters
        ----------
        x : Tensor, shape (N, ...)
            Of a real floating-point dtype, in any strides.

        Returns
        -------
        Tensor, shape (N,)
            In float64; NaN for a sub-tensor that holds one, at most infinity else.
        """
        self._check_batch(x)
        found = [seen._violations(seen._units(part)) for part, seen in self._parts(x)]
        if not found:
            return torch.zeros(x.shape[:1], dtype=torch.float64, device=x.device)
        return torch.cat(found)

    @by_shards
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
            One minimizer for each sub-tensor, also where there are many, in a new tensor.

        Raises
        ------
        ValueError
            If the set is not bounded, or has no oracle.
        """
        self._check_bounded("lmo")
        self._check_batch(gradient)
        answer = torch.empty_like(gradient)
        for (part, seen), (out, _) in zip(self._parts(gradient), self._parts(answer), strict=True):
            units = seen._units(part)
            wide, finite = seen._finite(units)
            least = seen._minimizer(wide, units.dtype).to(units.dtype)
            out.copy_(torch.where(seen._column(finite), least, torch.nan).view(part.shape))
        return answer

    @by_shards
    @torch.no_grad()
    def sample_(self, x: Tensor, generator: Generator | None = None) -> Tensor:
        """Fill each sub-tensor with a random point of the set, in place.

        Parameters
        ----------
        x : Tensor, shape (N, ...)
            Of a real floating-point dtype, in any strides. Its values are not read.
        generator : torch.Generator, optional
            Of any device. By default torch's own of the device of x.

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
        for part, seen in self._parts(x):
            like = torch.empty_like(seen._units(part), memory_format=torch.contiguous_format)
            part.copy_(seen._sampled(like, generator).to(x.dtype).view(part.shape))
        return x

    def project_each_(self, batches: list[Tensor]) -> None:
        """`project_` for several batches, with as few calls as the set can do with."""
        for x in batches:
            self.project_(x)

    # Plain data

    def to_plain(self) -> dict[str, Any]:
        """The set as plain data: a dict of the name of its class and its settings.

        ``torch.load(weights_only=True)`` reads it; `from_plain` makes a set of it again.
        """
        plain: dict[str, Any] = {"set": type(self).__name__}
        for field in fields(self):
            if not field.init:
                continue
            value = getattr(self, field.name)
            if isinstance(value, Constraint):
                value = value.to_plain()
            elif isinstance(value, tuple):
                value = [v.to_plain() if isinstance(v, Constraint) else v for v in value]
            plain[field.name] = value
        return plain

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
        return type(self) is type(other) and _equal(self.to_plain(), other.to_plain())

    def __hash__(self) -> int:
        return hash(type(self))

    def to(self, *args: Any, **kwargs: Any) -> Constraint:
        """The same set with its tensor settings converted, as by `torch.Tensor.to`."""
        settings = {field.name: getattr(self, field.name) for field in fields(self)}
        return self._replaced(
            {
                name: setting.to(*args, **kwargs)
                for name, setting in settings.items()
                if isinstance(setting, (Tensor, Constraint))
            }
        )

    # What a set says of itself

    def _check_settings(self) -> None:
        """Raise if a setting is wrong; once, when the set is made."""

    def _check_shape(self, shape: torch.Size) -> None:
        """Raise if a batch of this shape can have no point of the set."""

    def _excess(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """By how much each unit of `x` is outside; 0, not less, inside as far as `dtype` tells.

        A unit is a row of a (N, n) tensor, or a matrix of a (N, ..., m, k) one. `x` is in float64
        and finite, and so are tensor settings, reshaped to broadcast against it.
        """
        raise NotImplementedError(f"{type(self).__name__} does not say what is outside it")

    def _nearest(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """The nearest point to each unit of `x` that stays in the set when rounded to `dtype`."""
        raise NotImplementedError(f"{type(self).__name__} has no projection")

    def _minimizer(self, gradient: Tensor, dtype: torch.dtype) -> Tensor:
        """A minimizer of a linear function that stays in the set when rounded to `dtype`."""
        raise ValueError(f"`lmo` has no closed form for {type(self).__name__}")

    def _sampled(self, like: Tensor, generator: Generator | None) -> Tensor:
        """Random points of the set in the shape, dtype and device of `like`, or in float64."""
        raise ValueError(f"`sample_` is not defined for {type(self).__name__}")

    # How the words meet a batch

    def _projected(self, units: Tensor) -> Tensor:
        wide, finite = self._finite(units)
        inside = self._excess(wide.detach(), units.dtype) <= 0
        nearest = self._nearest(wide, units.dtype).to(units.dtype)
        result = torch.where(self._column(inside), units, nearest)
        if self._is_equation:
            result = with_value(result.detach(), nearest)
        return torch.where(self._column(finite), result, torch.nan)

    def _violations(self, units: Tensor) -> Tensor:
        wide, finite = self._finite(units)
        hidden = units.flatten(-self._dims).abs().amax(-1)  # an infinity, or NaN
        excess = torch.where(finite, self._excess(wide, units.dtype), hidden)
        return (excess.flatten(1).amax(1) if excess.ndim > 1 else excess) + 0.0  # -0.0 is 0.0

    def _finite(self, units: Tensor) -> tuple[Tensor, Tensor]:
        """The units in float64, with zeros in place of any that are not finite; which are."""
        wide = widened(units)
        if self.elementwise:  # each entry for itself, those that are not finite too
            return wide, torch.ones(len(units), dtype=torch.bool, device=units.device)
        finite = wide.detach().isfinite().flatten(-self._dims).all(-1)
        return torch.where(self._column(finite), wide, 0.0), finite

    @property
    def _dims(self) -> int:
        return 2 if self._of_matrices else 1

    def _column(self, of_units: Tensor) -> Tensor:
        """A value per unit, to broadcast against the units."""
        return of_units[(..., *(None,) * self._dims)]

    def _units(self, part: Tensor) -> Tensor:
        part = readable(part)
        return part if self._of_matrices else part.reshape(len(part), -1)

    def _parts(self: _Self, x: Tensor) -> Iterator[tuple[Tensor, _Self]]:
        """Pieces of the batch, and the set as each of them sees it."""
        if x.numel() == 0:
            return
        if x.ndim == 0:
            x = x.unsqueeze(0)
        whole = self._map(lambda _, setting: self._reshaped(setting, x))
        for rows in row_blocks(x):
            yield (
                (x, whole)
                if rows.stop - rows.start >= len(x)
                else (x[rows], whole._map(lambda _, s, at=rows: s[at] if len(s) > 1 else s))
            )

    def _reshaped(self, setting: Tensor, x: Tensor) -> Tensor:
        """A setting in float64, to broadcast against the units of x."""
        setting = widened(setting.reshape((1,) * (x.ndim - setting.ndim) + setting.shape))
        if self._of_matrices:
            return setting
        if prod(setting.shape[1:]) == 1:
            return setting.reshape(-1, 1)
        return setting.expand(len(setting), *x.shape[1:]).reshape(len(setting), -1)

    def _map(self: _Self, change: Callable[..., Tensor]) -> _Self:
        """The set with ``change(name, setting)`` in place of each tensor setting; unchecked."""
        changed: dict[str, Any] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Tensor):
                changed[field.name] = change(field.name, value)
            elif isinstance(value, Constraint):
                changed[field.name] = value._map(change)
        return self._replaced(changed)

    def _at_rows(self: _Self, x: Tensor, at: Tensor | slice) -> _Self:
        """The set as some sub-tensors of the batch x see it; unchecked."""
        each = len(x) > 1  # else a setting for each sub-tensor is one for all
        return self._map(
            lambda _, s: s[at] if each and s.ndim == x.ndim and len(s) == len(x) else s
        )

    def _replaced(self: _Self, settings: dict[str, Any]) -> _Self:
        """The set with some settings replaced; unchecked."""
        if not settings:
            return self
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__)
        other.__dict__.update(settings)
        return other

    # Checks

    def _check_bounded(self, word: str) -> None:
        if not self.bounded:
            raise ValueError(f"`{word}` needs a bounded set, got {self!r}")

    def _check_batch(self, x: Tensor) -> None:
        name = type(self).__name__
        if not x.is_floating_point():
            raise TypeError(f"{name} takes real floating-point tensors, got {x.dtype}")
        least = 3 if self._of_matrices else 2
        if x.ndim < least and not self.elementwise:
            shape = "(N, ..., m, k)" if self._of_matrices else "(N, ...)"
            hint = "=2 for a matrix" if self._of_matrices else ""
            raise ValueError(
                f"{name} takes a batch of shape {shape}, got {tuple(x.shape)}; "
                f"rai_toolbox.to_batch makes one (with optimizers: `param_ndim`{hint})"
            )
        self._map(lambda setting_name, setting: self._checked(setting_name, setting, x))
        self._check_shape(x.shape)

    def _checked(self, name: str, setting: Tensor, x: Tensor) -> Tensor:
        shape, batch = tuple(setting.shape), tuple(x.shape)
        fits = len(shape) <= len(batch) and all(
            size in (1, of_x) for size, of_x in zip(shape[::-1], batch[::-1], strict=False)
        )
        if not fits:
            raise ValueError(
                f"`{name}` must broadcast against the batch of shape {batch}, got shape {shape}"
            )
        if name in self._for_each:
            start = max(0, len(shape) - len(batch) + 1)
            if prod(shape[start:]) != 1:
                raise ValueError(
                    f"`{name}` must have one value per sub-tensor, shape "
                    f"{(batch[0], *(1,) * (len(batch) - 1))} for the batch of shape {batch}, "
                    f"got shape {shape}"
                )
        if setting.device != x.device:
            raise ValueError(
                f"`{name}` must be on the device of the batch, {x.device}, got {setting.device}; "
                "see `to`"
            )
        return setting


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
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_equal(a[name], b[name]) for name in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(_equal, a, b))
    return bool(a == b)
