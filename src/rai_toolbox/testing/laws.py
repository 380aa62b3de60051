"""The table of laws."""

from __future__ import annotations

from rai_toolbox.testing import batch_laws, points_laws
from rai_toolbox.testing.law import Law

LAWS: dict[str, Law] = {
    law.__name__: law
    for law in (
        points_laws.feasible,
        points_laws.identity_inside,
        points_laws.idempotent,
        points_laws.optimal,
        points_laws.accurate,
        points_laws.non_expansive,
        points_laws.violation,
        points_laws.lmo,
        points_laws.samples,
        batch_laws.batched,
        batch_laws.strides,
        batch_laws.non_finite,
        batch_laws.empty,
        batch_laws.gradient,
        batch_laws.compiled,
    )
}
"""Each law by its name; it takes a `Trial`, and raises AssertionError where a set breaks it."""
