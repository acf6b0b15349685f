"""Every public function has an example in its docstring, and the examples are right."""

import doctest
import importlib
import inspect
import re

import jax
import jax.numpy as jnp
import optax
import pytest

import jaxjd

NUMBER = re.compile(r"-?\d+\.\d*(?:e[-+]?\d+)?")
ROOMS = {
    "jaxjd.weighting": jaxjd.weighting,
    "jaxjd.scalarization": jaxjd.scalarization,
    "jaxjd.solvers": jaxjd.solvers,
}
DOCUMENTED = {
    "jaxjd": jaxjd,
    **ROOMS,
    **{
        f"{module.__name__}.{name}": value
        for module in (jaxjd, *ROOMS.values())
        for name, value in vars(module).items()
        if callable(value) and not name.startswith("_")
    },
}
FUNCTIONS = {x: value for x, value in DOCUMENTED.items() if inspect.isfunction(value)}
# An aggregator's example is that of its weighting: it runs once.
EXAMPLES = {
    inspect.getdoc(value).partition("**Example:**")[2] or inspect.getdoc(value): name
    for name, value in DOCUMENTED.items()
    if ">>>" in (value.__doc__ or "")
}
OPTIONAL = {
    "jaxjd.nnx.value_and_jac": ["flax"],
    "jaxjd.nnx.explain": ["flax"],
    "interop.to_jax": ["torch"],
    "interop.to_torch": ["torch"],
    "interop.to_linen": ["torch", "flax"],
    "interop.to_nnx": ["torch", "flax"],
}


class ToTheDigitsShown(doctest.OutputChecker):
    """Numbers are shown with four digits behind the point: more are not compared."""

    def check_output(self, want: str, got: str, optionflags: int) -> bool:
        shown, found = NUMBER.findall(want), NUMBER.findall(got)
        return (
            "".join(NUMBER.sub("0", want).split())
            == "".join(NUMBER.sub("0", got).split())
            and len(shown) == len(found)
            and all(map(agree, shown, found))
        )


def agree(shown: str, found: str) -> bool:
    return abs(float(shown) - float(found)) <= 1e-4


def run(name: str, docstring: str) -> None:
    names = {"jax": jax, "jnp": jnp, "optax": optax, "jaxjd": jaxjd}
    parsed = doctest.DocTestParser().get_doctest(docstring, names, name, None, 0)
    assert parsed.examples
    report: list[str] = []
    runner = doctest.DocTestRunner(checker=ToTheDigitsShown())
    runner.run(parsed, out=report.append)
    assert not runner.failures, "".join(report)


def test_every_public_function_has_an_example():
    assert not [
        x for x, function in FUNCTIONS.items() if ">>> " not in function.__doc__
    ]


@pytest.mark.parametrize("name", EXAMPLES.values())
def test_example(name):
    run(name, inspect.getdoc(DOCUMENTED[name]))


@pytest.mark.parametrize("name", OPTIONAL)
def test_example_with_other_packages(name):
    for package in OPTIONAL[name]:
        pytest.importorskip(package)
    module, _, attribute = name.rpartition(".")
    run(name, inspect.getdoc(getattr(importlib.import_module(module), attribute)))


def test_the_checker_sees_a_wrong_digit():
    check = ToTheDigitsShown().check_output
    assert check("Array([0.6667, 1. ])", "Array([0.66666667, 1.])", 0)
    assert not check("Array([0.6667, 1. ])", "Array([0.6669, 1.])", 0)
    assert not check("Array([1.])", "Array([1., 1.])", 0)
    assert not check("True", "False", 0)
