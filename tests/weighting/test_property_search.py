"""Search for Jacobians on which the claimed properties do not hold.

The random Jacobians of `test_properties` have no zero rows, and no two rows that are
parallel, opposed or orthogonal. Most of the small integer ones drawn here do.
"""

import numpy as np
import pytest

from tests.weighting.registry import AGGREGATORS
from tests.weighting.test_properties import (
    BATCH,
    M,
    N,
    distance_of_hull,
    later,
    lengths,
    outside_of_span,
    those_that,
)

hypothesis = pytest.importorskip("hypothesis")
st = hypothesis.strategies

pytestmark = pytest.mark.usefixtures("x64")


@st.composite
def jacobians(draw):
    """[m, n] of integers from -3 to 3, rows scaled by powers of ten, 1e-6 to 1e6."""
    m, n = draw(st.integers(1, M)), draw(st.integers(1, N))
    largest, spread = draw(st.integers(1, 3)), draw(st.integers(0, 6))

    def integers(bound, *shape):
        # For Hypothesis bytes are one choice. A list would be a choice per integer.
        size = int(np.prod(shape))
        data = draw(st.binary(min_size=size, max_size=size))
        one = np.frombuffer(data, np.uint8).reshape(shape)
        return one % (2 * bound + 1) - float(bound)

    rows = integers(largest, m, n)
    if draw(st.booleans()):
        others = integers(largest, m).astype(int) % m
        rows = integers(1, m, 1) * rows[others]
    return rows * 10 ** integers(spread, m, 1)


# Each example of Hypothesis is a whole batch of Jacobians.
@hypothesis.settings(
    max_examples=8,
    derandomize=True,
    deadline=None,
    database=None,
    phases=[hypothesis.Phase.generate],  # No shrinking: the worst one is printed.
    suppress_health_check=list(hypothesis.HealthCheck),
)
@hypothesis.given(drawn=st.lists(jacobians(), min_size=BATCH, max_size=BATCH))
@pytest.mark.parametrize(
    "name",
    those_that(lambda row: not (row.conflicts and row.not_linear and row.not_weighted)),
)
def test_claims(name, drawn):
    J, mask = np.zeros((BATCH, M, N)), np.zeros((BATCH, M), bool)
    for b, rows in enumerate(drawn):
        m, n = rows.shape
        J[b, :m, :n], mask[b, :m] = rows, True
    checked = np.ones(BATCH, bool)
    row = AGGREGATORS[name]
    if row.bargaining:
        checked = np.array([well_posed(rows) for rows in drawn])
    update = later(name, J, mask)
    assert np.isfinite(update).all()
    size = np.linalg.norm(J, axis=(1, 2))
    size = np.where(size > 0, size, 1)

    def holds(error, bound):
        worst = np.where(checked, error, 0).argmax()
        assert not checked[worst] or error[worst] <= bound, drawn[worst]

    if not row.conflicts:
        # The same bounds as in `test_properties`.
        progress = np.einsum("bmn,bn->bm", J, update)
        holds(-progress.min(axis=1) / size**2, 1e-12)
        # This includes short gradients, if the update is more than rounding.
        length = np.linalg.norm(update, axis=1)
        cosines = progress / lengths(J) / np.where(length > 0, length, 1)[:, None]
        holds(np.where(length > 1e-9 * size, -cosines.min(axis=1), 0), 1e-6)
    if not row.not_weighted:
        holds(outside_of_span(J, update), 1e-12)
    if not row.not_linear:
        c, d = np.random.default_rng(0).uniform(0.1, 3, size=(2, BATCH, M, 1))
        apart = later(name, c * J, mask) + later(name, d * J, mask)
        error = np.linalg.norm(later(name, (c + d) * J, mask) - apart, axis=1)
        # ConFIG inverts cosines, whose condition number is up to 1e6 here; GradVac's
        # `eps` of 1e-8 is not scaled.
        bound = {"conflict_free": 1e-10, "gradvac": 1e-7}.get(name, 1e-12)
        holds(error / size, bound)


def well_posed(rows):
    """Whether a solution exists that rounding does not hide."""
    others = rows[np.any(rows != 0, axis=1)]
    units = others / lengths(others)[:, None]
    return len(others) > 0 and distance_of_hull(units) > 0.01
