"""Is the fallback taken where no rule applies, for that parameter only, and exact?"""

import jax
import jax.numpy as jnp
import pytest

from jaxjd import engine
from jaxjd.engine.structured import _rules, explain, plan
from tests.engine.structured.conftest import normal, traced

m = 3
PARAMS = {"u": normal(4, 5), "w": normal(5, 5)}
X = normal(m, 6, 4)


def fun(p, x):
    return jnp.sum(jnp.tanh(jnp.sin(x @ p["u"]) @ p["w"]) ** 2)


def explained(fun, params, x):
    function, inputs, places, _, _ = engine.trace(
        lambda *args: (fun(*args), None), (params, x), (None, 0), identity=fun
    )
    return explain(plan(function, places[: len(params)]), inputs, list(params))


@pytest.fixture
def rules():
    """The table of rules, for a test to change. What JAX keeps was made with them."""
    jax.clear_caches()
    yield _rules.RULES
    jax.clear_caches()


def test_rule_is_what_makes_the_result(agrees, monkeypatch, rules):
    """A rule that is wrong must show, or the other tests show nothing."""

    def poisoned(eqn, parameter):
        found = dot(eqn, parameter)
        return found and found.__class__(
            found.sizes, found.layout, found.left, lambda y: 2 * found.right(y)
        )

    dot = rules["dot_general"]
    monkeypatch.setitem(rules, "dot_general", poisoned)
    with pytest.raises(AssertionError, match="gramian"):
        agrees(fun, PARAMS, X)


def test_without_rules_all_is_exact(agrees, monkeypatch):
    for name in list(_rules.RULES):
        monkeypatch.setitem(_rules.RULES, name, lambda eqn, parameter: None)
    agrees(fun, PARAMS, X, direct=["u", "w"])
    assert "no rule for it in dot_general" in str(explained(fun, PARAMS, X))


def test_only_the_uncovered_parameter_falls_back(agrees):
    def partly(p, x):
        return fun(p, x) + jnp.sum(
            jax.lax.reduce_window(
                p["w"] * x[0, 0], -jnp.inf, jax.lax.max, (2, 2), (1, 1), "VALID"
            )
        )

    agrees(partly, PARAMS, X, direct=["w"])


def test_fallback_never_forms_rows_of_what_rules_cover():
    """Only the parameter without a rule has rows in memory."""

    def half(p, x):
        return jnp.sum(jnp.sort(p["b"] * x)) + jnp.sum(x @ p["w"])

    params = {"b": normal(4), "w": normal(4, 9)}
    jacobian, _, _ = traced(half, params, X[:, 0])
    assert list(jacobian.passes.direct) == [jacobian.argnums[0]]
    assert all(x.size < m * params["w"].size for x in jax.tree.leaves(jacobian.passes))


def test_explanation():
    def model(p, x):
        h = jax.nn.relu(x @ p["dense"] + p["bias"])
        return jnp.sum(jax.lax.cumsum(p["odd"] * h)) + jnp.sum(
            jnp.maximum(h, p["limit"])
        )

    params = {"bias": normal(5), "dense": normal(4, 5), "limit": normal(5)}
    params |= {"odd": normal(5), "unused": normal(2)}
    found = explained(model, params, X[:, 0])
    rules = {of.name: (of.rule, of.contraction) for of in found.entries}
    assert rules["dense"][0] == "dot_general"
    assert rules["bias"] == ("add", "rows")
    assert rules["odd"] == ("mul", "rows")
    assert rules["limit"] == ("dense", "rows")
    assert rules["unused"] == ("unused", "none")
    lines = str(found).splitlines()
    assert lines[0].split() == [
        "parameter",
        "shape",
        "rule",
        "contraction",
        "MFLOP",
        "MB",
        "why",
    ]
    assert "no rule for it in max" in lines[3]
    assert "4x5" in lines[2]
