"""The lazy `Jacobian`, a linear operator from parameters to losses."""

import copy
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

import jax
import numpy as np
import optax
from jax.tree_util import GetAttrKey
from jaxtyping import Array, Float

from jaxjd import engine
from jaxjd._misuse import ExplainsItself, Guards, guards
from jaxjd._typing import PyTree
from jaxjd.jacobian._features import split_at
from jaxjd.jacobian._layout import Losses, Parameters


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Jacobian(metaclass=ExplainsItself):
    """The Jacobian $J$ of m losses with respect to n parameters, a linear operator.

    Made by [`jaxjd.value_and_jac`][] and [`jaxjd.jac`][]. No product is formed until it
    is asked for. All of $J$ is in memory only if made with `method="dense"`, which
    `method="auto"` takes where $J$ is small beside the activations. It is a pytree: it
    may leave a `jit`, be donated, be carried by `jax.lax.scan`. Whatever its methods
    recompute under one `jit`, XLA computes once.

    It is not a gradient: of optax's transformations only an aggregator such as
    `jaxjd.upgrad()` takes it, so the aggregator comes first in a chain. Anything else
    raises.

    It can be copied by `copy.deepcopy`, but not pickled: it holds the traced function,
    which only this process knows. Save the parameters, or `jac.dense()`.

    **Example:**

    >>> jac = jaxjd.jac(lambda x: jnp.stack([x @ x, x.sum()]))(jnp.array([1.0, 2.0]))
    >>> jac.gramian()
    Array([[20.,  6.],
           [ 6.,  2.]], dtype=float32)
    >>> jac.vjp(jnp.array([0.5, 0.5]))
    Array([1.5, 2.5], dtype=float32)
    >>> jac.dense()
    Array([[2., 4.],
           [1., 1.]], dtype=float32)
    """

    _operator: engine.Operator
    _losses: Losses
    _parameters: Parameters
    _named: engine.Named | None = None
    _guards: Guards = dataclasses.field(default_factory=guards)

    @property
    def num_losses(self) -> int:
        """m, the number of losses, that is of rows."""
        return self._losses.num_losses

    def gramian(self) -> Float[Array, "m m"]:
        """$G = J J^\\top$, float32 or wider, symmetric to the bit."""
        gramian = self._operator.gramian()
        if self._losses.ordered_as_in_engine:
            return gramian  # Transposed, it would take another m² numbers of memory.
        return self._losses.from_engine(self._losses.from_engine(gramian).T)

    def squared_norms(self) -> Float[Array, " m"]:
        r"""$\|J_i\|^2$: the squared gradient norms of the losses, $G$'s diagonal.

        It is computed by itself, for less than $G$ costs: for a dense layer and one
        loss per example, $\|a\|^2 \|\delta\|^2$ from the activations $a$ and their
        cotangents $\delta$ (Goodfellow, 2015, arXiv:1510.01799, section 4).

        **Returns:** m numbers, float32 or wider.
        """
        return self._losses.from_engine(self._operator.squared_norms())

    def cross_gramian(self, other: "Jacobian") -> Float[Array, "m k"]:
        """$J_1 J_2^\\top$: inner products with the rows of another Jacobian.

        **Arguments:**

        - `other`: k losses, of any function, with respect to the same parameters.

        **Raises:** `TypeError` if `other` is not a Jacobian; `ValueError` if the
        parameters differ in structure or shape.
        """
        if not isinstance(other, Jacobian):
            raise TypeError(
                f"`other` must be a jaxjd.Jacobian. Got {type(other).__name__}."
            )
        if other._parameters != self._parameters:
            raise ValueError(
                "`other` must be taken with respect to the same parameters, "
                f"{self._parameters.kept_shapes()}. "
                f"Got {other._parameters.kept_shapes()}."
            )
        products = engine.products(self._operator, other._operator)
        return other._losses.from_engine(self._losses.from_engine(products).T).T

    def vjp(self, weights: PyTree[Float[Array, "..."]]) -> PyTree[Float[Array, "..."]]:
        """$J^\\top w$: the combination of the rows with these weights.

        **Arguments:**

        - `weights`: m numbers, as a vector or shaped like the losses.

        **Returns:** a pytree like the parameters, in their dtypes.

        **Raises:** `ValueError` if `weights` is shaped differently; `TypeError` if they
        are not real numbers.
        """
        flat = self._losses.flatten("weights", weights)
        return self._pulled_back(flat, self._operator.vjp)

    def _backward(self) -> Callable[[Float[Array, " m"]], PyTree]:
        """`vjp` where nothing else of $J$ is needed: one backward pass."""
        vjp = self._operator.backward()
        return lambda weights: self._pulled_back(weights, vjp)

    def _pulled_back(
        self,
        weights: Float[Array, " m"],
        vjp: Callable[[Float[Array, " m"]], list[Array]],
    ) -> PyTree:
        return self._parameters.unflatten(vjp(self._losses.to_engine(weights)))

    def _anew(self) -> "Jacobian":
        """The same, computed from the arguments of the function where it is used."""
        return dataclasses.replace(self, _operator=self._operator.anew())

    def jvp(self, tangent: PyTree[Float[Array, "..."]]) -> PyTree[Float[Array, "..."]]:
        """$J d$: how the losses change along a direction in parameter space.

        **Arguments:**

        - `tangent`: a pytree like the parameters.

        **Returns:** m numbers, shaped like the losses.

        **Raises:** `ValueError` if `tangent` is not like the parameters; `TypeError` if
        it does not hold real numbers.
        """
        change = self._operator.jvp(self._parameters.flatten("tangent", tangent))
        return self._losses.unflatten(self._losses.from_engine(change))

    def dense(self) -> PyTree[Float[Array, "m ..."]]:
        """All of $J$: a pytree like the parameters, each leaf [m, *shape]."""
        rows = [self._losses.from_engine(leaf) for leaf in self._operator.rows()]
        return self._parameters.unflatten(rows)

    def restrict(self, wrt: PyTree[bool]) -> "Jacobian":
        """The Jacobian with respect to some of the parameters only.

        **Arguments:**

        - `wrt`: a pytree of bools, like the parameters or a prefix of them.

        **Returns:** a Jacobian in whose trees the other parameters are an
        `optax.MaskedNode`, optax's placeholder for what it must not touch.

        **Raises:** `ValueError` if `wrt` is not such a tree, or keeps nothing;
        `TypeError` if it holds anything but bools.
        """
        flags = self._parameters.broadcast("wrt", wrt)
        for flag in flags:
            if not isinstance(flag, bool | np.bool_ | optax.MaskedNode):
                raise TypeError(
                    "`wrt` must hold bools, True for the parameters to keep, which are "
                    f"known when it is traced. Got {flag!r}."
                )
        chosen = [n for n, i in enumerate(self._parameters.kept) if flags[i]]
        if not chosen:
            raise ValueError(
                "`wrt` must keep at least one of the parameters. All of it is False."
            )
        kept = tuple(self._parameters.kept[n] for n in chosen)
        return dataclasses.replace(
            self,
            _operator=self._operator.restrict(chosen),
            _parameters=dataclasses.replace(self._parameters, kept=kept),
            _named=None if self._named is None else self._named.restrict(chosen),
        )

    def features(self, names: str | Sequence[str]) -> "Jacobian":
        """The Jacobian with respect to values inside the function, not its parameters.

        Its Gramian gives the weights of MGDA-UB, for far less than $J J^\\top$ costs
        (Sener & Koltun, 2018, arXiv:1810.04650, section 3.3); `jaxjd.aggregate(
        weighting, features=names)` does that. Several values count as independent of
        one another: the Jacobian is that of the function from them to the losses.

        **Arguments:**

        - `names`: what `jax.ad_checkpoint.checkpoint_name(value, name)` names them in
          the function, or several names. A name may be given to several values.

        **Returns:** a Jacobian whose parameters are the list of these values, in the
        order in which the function computes them.

        **Raises:** `TypeError` if `names` are not strings, or name values that are not
        floating-point arrays; `ValueError` if the function does not name them outside
        of loops, branches and `jax.checkpoint`, if it is written for one example (then
        no two losses share a value), or if there are several functions.
        """
        return self._split(names)[0]

    def _split(
        self, names: str | Sequence[str]
    ) -> tuple["Jacobian", Callable[[Float[Array, " m"]], PyTree]]:
        """The Jacobian with respect to features, and `vjp` by a pass through them."""
        if len(self._losses.sources) > 1:
            raise ValueError(
                "`features` need the Jacobian of one function. Got that of "
                f"{len(self._losses.sources)}, by `jaxjd.concatenate`."
            )
        split = split_at(self._named, names)
        shapes = tuple(leaf.shape[1:] for leaf in split.jacobian.leaves)
        structure = jax.tree.structure([0] * len(shapes))
        parameters = Parameters(structure, shapes, tuple(range(len(shapes))))
        of_features = Jacobian(split.jacobian, self._losses, parameters)
        return of_features, lambda weights: self._parameters.unflatten(
            split.vjp(weights)
        )

    def __repr__(self) -> str:
        return (
            f"Jacobian(num_losses={self.num_losses}, "
            f"losses={self._losses.as_shapes()}, "
            f"parameters={self._parameters.kept_shapes()}, "
            f"method={self._operator.method!r})"
        )

    def __matmul__(self, other: object) -> NoReturn:
        raise TypeError(
            "A Jacobian has no operator `@`, since parameters are a pytree. Use "
            "`jac.jvp(tangent)` for J d and `jac.vjp(weights)` for the transpose."
        )

    __rmatmul__ = __matmul__
    __array_ufunc__ = None  # NumPy leaves its operators to these two.

    def __contains__(self, key: object) -> bool:
        # flax.training.train_state.TrainState looks for "_overwrite_with_gradient" in
        # the gradients that it is given. A Jacobian has no keys.
        del key
        return False

    if TYPE_CHECKING:
        # What optax calls updates is an array or an iterable of such. A Jacobian takes
        # the place of updates, and type checkers must believe it.
        def __iter__(self) -> Iterator[Any]: ...

    def __copy__(self) -> "Jacobian":
        return dataclasses.replace(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Jacobian":
        # The function and the layout never change, so that they may be shared.
        operator, named = jax.tree.map(
            lambda leaf: copy.deepcopy(leaf, memo), (self._operator, self._named)
        )
        return dataclasses.replace(self, _operator=operator, _named=named)

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "A Jacobian cannot be pickled: it holds the traced function, which only "
            "this process knows. Save the parameters and take it again, or save the "
            "arrays of `jac.dense()`."
        )


def _flatten_with_keys(jacobian: Jacobian) -> tuple[Any, Any]:
    names = ("_guards", "_operator", "_named")
    children, static = _flatten(jacobian)
    keys = map(GetAttrKey, names)
    return tuple(zip(keys, children, strict=True)), static


def _flatten(jacobian: Jacobian) -> tuple[Any, Any]:
    children = jacobian._guards, jacobian._operator, jacobian._named
    return children, (jacobian._losses, jacobian._parameters)


def _unflatten(static: Any, children: Any) -> Jacobian:
    (found, operator, named), (losses, parameters) = children, static
    # JAX also unflattens with placeholders in the places of children.
    if isinstance(found, Guards):
        found = found.renewed()
    return Jacobian(operator, losses, parameters, named, found)


jax.tree_util.register_pytree_with_keys(
    Jacobian, _flatten_with_keys, _unflatten, _flatten
)
