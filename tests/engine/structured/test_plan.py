"""Is what several parameters read recorded, transposed and multiplied only once?"""

import jax
import jax.numpy as jnp

from jaxjd import engine
from jaxjd.engine.structured import plan, structured
from tests.engine.structured.conftest import normal, quickly, relative, traced

GATES = {"z": normal(4, 4), "r": normal(4, 4), "wide": normal(4, 6)}


def cell(p, x):
    def step(h, x):
        z = jax.nn.sigmoid(h @ p["z"] + x)
        return z * h + jnp.tanh(h @ p["r"]) + (h @ p["wide"]).sum(), None

    return jnp.sum(jax.lax.scan(step, x[0], x)[0])


def test_gates_share_their_operand():
    jacobian, _, _ = traced(cell, GATES, normal(3, 5, 4))
    assert [x.shape for x in jacobian.passes.recorded] == [(5, 3, 4)]
    assert [len(x) for x in jacobian.plan.groups_of(jacobian.argnums)] == [3]


def test_gates_of_different_choices_are_apart():
    fun, x = cell, normal(3, 5, 4)
    function, inputs, places, _, _ = engine.trace(
        lambda *args: (fun(*args), None), (GATES, x), (None, 0), identity=fun
    )
    choices = ("rows", "pairs", "rows")
    found = plan(function, places[:3], choices)
    assert [
        [group.choice for group in each] for each in found.groups_of(places[:3])
    ] == [
        ["rows", "rows"],
        ["pairs"],
    ]
    assert found == plan(function, places[:3], choices)
    assert found != plan(function, places[:3])

    def gramians(inputs):
        return [
            structured(plan(function, places[:3], choices), inputs)[0].gramian()
            for choices in (choices, None)
        ]

    mixed, joint = quickly(gramians, inputs)
    assert relative(mixed, joint) < 1e-12


def test_some_of_the_gates():
    def products(x):
        jacobian, _, _ = traced(cell, GATES, x)
        some = jacobian.restrict([2, 0])
        weights = normal(3)
        return (
            (some.gramian(), some.vjp(weights)),
            [row for n, row in enumerate(jacobian.rows()) if n != 1],
            weights,
        )

    (gramian, combined), rows, weights = quickly(products, normal(3, 5, 4))
    flat = [row.reshape(3, -1) for row in rows]
    assert relative(gramian, sum(row @ row.T for row in flat)) < 1e-12
    for actual, row in zip(combined, reversed(rows), strict=True):
        assert relative(actual, jnp.tensordot(weights, row, 1)) < 1e-12
