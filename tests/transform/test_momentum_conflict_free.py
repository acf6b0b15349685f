"""M-ConFIG gives what its paper, and the package of its authors, give."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from numpy.testing import assert_allclose, assert_array_equal

import jaxjd
from tests import models

pytestmark = pytest.mark.usefixtures("x64")

M, N, STEPS = 3, 7, 20
PARAMS = {"a": np.zeros((2, 2)), "b": np.zeros(3)}


def gradients(m=M):
    return np.random.default_rng(0).normal(size=(STEPS, m, N)) + 0.3


def tree(rows):
    """Rows [..., N] as a pytree like the parameters."""
    return {"a": rows[..., :4].reshape(*rows.shape[:-1], 2, 2), "b": rows[..., 4:]}


def flat(update):
    return np.concatenate([np.ravel(update["a"]), update["b"]])


class Reference:
    """Algorithm 1 of the paper, line by line."""

    def __init__(self, m, b1=0.9, b2=0.999):
        self.b1, self.b2, self.t = b1, b2, 0
        self.m, self.counts = np.zeros((m, N)), np.zeros(m)
        self.direction, self.v = np.zeros(N), np.zeros(N)

    def step(self, indices, rows):
        for i, row in zip(indices, rows, strict=True):
            self.counts[i] += 1
            self.m[i] = self.b1 * self.m[i] + (1 - self.b1) * row
        if not self.counts.all():
            return np.zeros(N)
        self.t += 1
        averages = self.m / (1 - self.b1**self.counts)[:, None]
        norms = np.linalg.norm(averages, axis=1)
        x = np.linalg.pinv(averages / norms[:, None]) @ np.ones(len(norms))
        x /= np.linalg.norm(x)
        g = (averages @ x).sum() * x
        average = g * (1 - self.b1**self.t)
        pseudo = (average - self.b1 * self.direction) / (1 - self.b1)
        self.direction = average
        self.v = self.b2 * self.v + (1 - self.b2) * pseudo**2
        return g / (np.sqrt(self.v / (1 - self.b2**self.t)) + 1e-8)


def package(m):
    operators = pytest.importorskip("conflictfree.momentum_operator")
    torch = pytest.importorskip("torch")
    theirs = operators.PseudoMomentumOperator(m)

    def step(indices, rows):
        rows = [torch.from_numpy(row) for row in rows]
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)  # It makes vectors of this dtype.
        try:
            return theirs.calculate_gradient(list(indices), rows).numpy()
        finally:
            torch.set_default_dtype(before)

    return step


@pytest.mark.parametrize("m", [3])
@pytest.mark.parametrize("make", [lambda m: Reference(m).step, package])
def test_one_gradient_per_step(make, m):
    """For 20 steps, from all rows or the one row, with a traced index."""
    expected = make(m)
    tx = jaxjd.momentum_conflict_free(num_losses=m)
    state = alone = tx.init(PARAMS)
    step = jax.jit(lambda J, state, i: tx.update(J, state, PARAMS, index=i))
    for t, J in enumerate(gradients(m)):
        i = t % m
        update, state = step(tree(J), state, i)
        assert_allclose(flat(update), expected([i], J[i : i + 1]), atol=1e-9)
        update, alone = step(tree(J[i : i + 1]), alone, i)
        assert_allclose(flat(update), expected_of(state, update), atol=1e-12)
    jax.tree.map(assert_array_equal, state, alone)
    assert (np.abs(flat(update)) > 0.01).any()


def expected_of(state, update):
    """The update is zero until each loss has been seen."""
    return flat(update) if (state.counts > 0).all() else np.zeros(N)


@pytest.mark.parametrize("make", [lambda m: Reference(m).step, package])
def test_all_gradients_at_once(make):
    expected = make(M)
    tx = jaxjd.momentum_conflict_free(num_losses=M)
    state = tx.init(PARAMS)
    step = jax.jit(lambda J, state: tx.update(J, state, PARAMS))
    for J in gradients():
        update, state = step(tree(J), state)
        assert_allclose(flat(update), expected(range(M), J), atol=1e-9)


def test_a_missing_loss_keeps_its_average():
    """And the direction is that of the others."""
    J, mask = gradients()[0], jnp.array([True, False, True])
    tx = jaxjd.momentum_conflict_free(num_losses=M)
    update, state = tx.update(tree(J), tx.init(PARAMS), PARAMS, mask=mask)
    expected = Reference(2).step(range(2), J[np.asarray(mask)])
    assert_allclose(flat(update), expected, atol=1e-9)
    assert not state.moments["b"][1].any()
    assert_array_equal(state.counts, [1, 0, 1])


def test_a_step_costs_one_backward_pass():
    """The Jacobian is lazy: only the row of the index is computed."""
    params, (x, y) = models.parameters(), models.examples(4)
    jac = jaxjd.jac(models.loss, in_axes=(None, 0, 0))(params, x, y)
    tx = optax.chain(jaxjd.momentum_conflict_free(num_losses=4), optax.sgd(0.1))
    state = tx.init(params)
    _, state = tx.update(jac, state, params, index=2)
    rows = jac.dense()
    jax.tree.map(
        lambda moments, rows: assert_allclose(moments[2], 0.1 * rows[2], atol=1e-12),
        state[0].moments,
        rows,
    )


def test_it_trains():
    """Two losses that conflict far away, each seen in every second step."""
    ends = jnp.array([[1.0, 0.0], [-1.0, 0.0]])

    def losses(x):
        return jnp.square(x[None] - ends).sum(1)

    tx = optax.chain(jaxjd.momentum_conflict_free(num_losses=2), optax.sgd(0.02))

    def step(carry, i):
        x, state = carry
        updates, state = tx.update(jaxjd.jac(losses)(x), state, x, index=i)
        return (optax.apply_updates(x, updates), state), None

    start = jnp.array([0.3, 3.0])
    steps = jnp.arange(400) % 2
    (x, _), _ = jax.lax.scan(step, (start, tx.init(start)), steps)
    assert losses(x).max() < 1.7 < losses(start).min()


def test_errors():
    tx = jaxjd.momentum_conflict_free(num_losses=M)
    state, rows = tx.init(PARAMS), tree(gradients()[0])
    two = tree(gradients()[0][:2])
    for J, index, error, message in (
        (two, None, ValueError, "num_losses=3 losses.*Got 2. For the gradient of one"),
        (two, 0, ValueError, "num_losses=3 losses, or of the one with `index`. Got 2"),
        (rows, 3, ValueError, "`index` must be that of one of the 3 losses. Got 3"),
        (rows, -1, ValueError, "`index` must be at least 0. Got -1"),
        (rows, 1.0, TypeError, "`index` must be an integer. Got 1.0"),
    ):
        with pytest.raises(error, match=message):
            tx.update(J, state, PARAMS, index=index)
    with pytest.raises(ValueError, match="the parameters that `init` was given"):
        tx.update(rows["b"], state, PARAMS["b"])
    for name, wrong in (("b1", 1.0), ("b2", -0.1), ("eps", -1.0)):
        with pytest.raises(ValueError, match=f"`{name}` must be in"):
            jaxjd.momentum_conflict_free(num_losses=M, **{name: wrong})
