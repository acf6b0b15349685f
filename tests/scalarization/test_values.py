"""The scalarizers are those of their papers, and go where these say they go.

TorchJD is the source of most values: see `interop.scalarizers`. It lacks GradNorm.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from numpy.testing import assert_allclose, assert_array_equal

import jaxjd
from jaxjd import scalarization

pytestmark = pytest.mark.usefixtures("x64")

LOSSES = np.array([0.5, 2.0, 1.0])
U = np.array([0.2, 0.5, 0.3])
Z = np.array([0.1, -0.2, 0.0])


def value(scalarizer, losses=LOSSES, **extra_args):
    return scalarizer.update(jnp.asarray(losses), scalarizer.init(), **extra_args)[0]


def test_first_steps():
    """Each formula by hand."""
    f = LOSSES - Z
    along = U @ f / np.linalg.norm(U)
    across = np.sqrt(f @ f - along**2)
    cosine = U @ LOSSES / np.linalg.norm(U) / np.linalg.norm(LOSSES)
    shifted = f + 1e-8
    c = 1 / (1 / 3 / shifted).sum()
    after = {"losses_after": LOSSES}
    s = scalarization
    for made, expected, extra_args in (
        (s.geometric_mean(), 1.0, {}),
        (s.uw(num_losses=3), LOSSES.sum() / 2, {}),
        (s.imtl_l(num_losses=3), LOSSES.sum(), {}),
        (s.dwa(num_losses=3, epoch_steps=1), LOSSES.sum(), {}),
        (s.famo(num_losses=3, reference=Z), c * np.log(shifted).mean(), after),
        (s.stch(0.5, U, reference=Z), np.log(np.exp(U * f / 0.5).sum()) / 2, {}),
        (s.cosmos(0.7, U), U @ LOSSES - 0.7 * cosine, {}),
        (s.pbi(2.0, U, reference=Z), along + 2 * across, {}),
        (s.gradnorm(num_losses=3), LOSSES.sum(), {"squared_norms": LOSSES}),
    ):
        assert_allclose(value(made, **extra_args), expected, rtol=1e-12)


def descend(scalarizer, losses, steps, **extra_args):
    """The state after many steps with the same losses."""

    def step(state, _):
        return scalarizer.update(losses, state, **extra_args)[1], None

    return jax.jit(lambda: jax.lax.scan(step, scalarizer.init(), length=steps)[0])()


@pytest.mark.parametrize(("name", "sign"), [("uw", 1), ("imtl_l", -1)])
def test_where_the_scales_go(name, sign):
    """All scaled losses are equal: the scale is the logarithm of the loss."""
    make = getattr(scalarization, name)
    made = make(num_losses=3, optimizer=optax.sgd(0.1))
    state = descend(made, jnp.asarray(LOSSES), 2000)
    assert_allclose(state.scales, sign * np.log(LOSSES), atol=1e-9)


def test_stch_approaches_the_largest_loss():
    """Also where the quotients would overflow."""
    losses = 1e3 * LOSSES
    largest = (U * losses).max()
    for smoothing in (1.0, 1e-2, 1e-307):
        made = value(scalarization.stch(smoothing, U), losses)
        assert largest <= made <= largest + smoothing * np.log(3) + 1e-15


def test_pbi_on_its_line():
    """There the distance has no gradient. It is smoothed away, and not NaN."""
    pbi = scalarization.pbi(5.0, U)
    made, gradient = jax.value_and_grad(pbi)(jnp.asarray(3 * U))
    assert_allclose(made, 3 * np.linalg.norm(U), rtol=1e-12)
    # The direction of rounding has a hundredth of the penalty.
    assert_allclose(gradient, U / np.linalg.norm(U), atol=5 / 100)
    for alone in (0.0, 2.0):
        gradient = jax.grad(scalarization.pbi())(jnp.array([alone]))
        assert_array_equal(gradient, [1.0])


def test_dwa_of_losses_that_are_missing():
    """A mean is that of the batches in which the loss was present."""
    dwa = scalarization.dwa(num_losses=2, epoch_steps=2, temperature=1.0)
    state = dwa.init()
    both, first = jnp.array([True, True]), jnp.array([True, False])
    for losses, mask in (
        ([4.0, 3.0], both),
        ([2.0, np.nan], first),
        ([1.0, 1.5], both),
        ([2.0, np.nan], first),
    ):
        _, state = dwa.update(jnp.asarray(losses), state, mask=mask)
    assert_allclose(dwa.update(jnp.ones(2), state)[0], 2, rtol=1e-12)
    # The second loss was not seen in the last epoch: its rate stays.
    for losses in ([6.0, np.nan], [3.0, np.nan]):
        _, state = dwa.update(jnp.asarray(losses), state, mask=first)
    weights = np.exp([4.5 / 1.5, 1.5 / 3])
    expected = 2 * weights / weights.sum()
    gradient = jax.grad(lambda x: dwa.update(x, state)[0])(jnp.ones(2))
    assert_allclose(gradient, expected, rtol=1e-12)


def test_famo_evens_out_the_rates():
    """The loss that falls slowest gets more weight."""
    famo = scalarization.famo(num_losses=3)
    after = jnp.asarray(LOSSES * np.array([0.9, 0.5, 0.99]))
    state = descend(famo, jnp.asarray(LOSSES), 20, losses_after=after)
    logits = np.asarray(state.learned.scales)
    assert logits[2] > logits[0] > logits[1]


class GradNorm:
    """Equation 2 and Algorithm 1 of the paper with Adam, line by line."""

    def __init__(self, m, alpha, rate=0.025):
        self.w, self.alpha, self.rate = np.ones(m), alpha, rate
        self.first, self.t = None, 0
        self.mean, self.square = np.zeros(m), np.zeros(m)

    def step(self, losses, norms):
        if self.first is None:
            self.first = losses
        given = self.w
        inverse_rate = losses / self.first
        target = (self.w * norms).mean() * (
            inverse_rate / inverse_rate.mean()
        ) ** self.alpha
        gradient = np.sign(self.w * norms - target) * norms
        self.t += 1
        self.mean = 0.9 * self.mean + 0.1 * gradient
        self.square = 0.999 * self.square + 0.001 * gradient**2
        mean = self.mean / (1 - 0.9**self.t)
        square = self.square / (1 - 0.999**self.t)
        w = self.w - self.rate * mean / (np.sqrt(square) + 1e-8)
        self.w = w * len(w) / w.sum()
        return given


@pytest.mark.parametrize("alpha", [0.0, 1.5])
def test_gradnorm_over_twenty_steps(alpha):
    rng = np.random.default_rng(0)
    reference = GradNorm(3, alpha)
    tx = jaxjd.gradnorm(num_losses=3, alpha=alpha)
    state = tx.init(np.zeros(5))
    step = jax.jit(
        lambda J, state, losses: tx.update(J, state, np.zeros(5), losses=losses)
    )
    for _ in range(20):
        J, losses = rng.normal(size=(3, 5)), rng.uniform(0.1, 2, size=3)
        J *= np.array([[1.0], [10.0], [0.1]])
        weights = reference.step(losses, np.linalg.norm(J, axis=1))
        update, state = step(J, state, losses)
        assert_allclose(update, weights @ J, rtol=1e-9)
    assert np.ptp(weights) > 0.3


def test_gradnorm_makes_the_norms_equal():
    """With alpha = 0. A weight never becomes negative, nor the sum another."""
    norms2 = jnp.array([1.0, 16.0, 4.0])
    gradnorm = scalarization.gradnorm(num_losses=3, alpha=0, optimizer=optax.sgd(1e-4))
    state = descend(gradnorm, jnp.asarray(LOSSES), 20_000, squared_norms=norms2)
    sizes = state.learned.scales * np.sqrt(norms2)
    assert_allclose(sizes, sizes.mean(), rtol=1e-3)
    assert_allclose(state.learned.scales.sum(), 3, rtol=1e-12)
    wild = scalarization.gradnorm(num_losses=3, optimizer=optax.sgd(1.0))
    state = descend(wild, jnp.asarray(LOSSES), 5, squared_norms=norms2)
    assert state.learned.scales.min() >= 0
    assert_allclose(state.learned.scales.sum(), 3, rtol=1e-12)


def test_gradnorm_with_given_initial_losses():
    """A loss that is behind gets more weight."""
    make = scalarization.gradnorm
    gradnorm = make(num_losses=2, initial_losses=[1.0, 4.0])
    _, state = gradnorm.update(jnp.ones(2), gradnorm.init(), squared_norms=jnp.ones(2))
    assert state.learned.scales[0] > 1 > state.learned.scales[1]
    assert_array_equal(state.first, [1, 4])
