"""Floating point operations of a traced function's products and convolutions: two for each multiply and add."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

# Primitives that compute the index of a branch from known numbers.
SCALARS: dict[str, Callable[..., Any]] = {
    "convert_element_type": lambda x, new_dtype, **_: np.asarray(x).astype(new_dtype),
    "select_n": lambda which, *cases: cases[int(which)],
    "rem": np.fmod,
    "add": np.add,
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "ge": np.greater_equal,
    "and": np.bitwise_and,
}


def traced(function: Callable[..., Any], *arguments: Any) -> int:
    """`count` of `function` for `arguments`, arrays or shapes."""
    return count(jax.make_jaxpr(function)(*arguments).jaxpr)


def count(jaxpr: Jaxpr, known: Sequence[Any] = ()) -> int:
    """Operations of one run; the body of a `while` counts once.

    `known` are the values of the first inputs. Where they decide a branch, such as one of every fifth step, the branch
    that is taken counts, elsewhere the one with the most operations.
    """
    return _count(jaxpr, [*known, *[None] * (len(jaxpr.invars) - len(known))])[0]


def _count(jaxpr: Jaxpr, known: Sequence[Any]) -> tuple[int, list[Any]]:
    """(operations, the outputs' values), with None for values that are not known."""
    values: dict[Any, Any] = dict(zip(jaxpr.invars, known, strict=True))

    def value(variable: Any) -> Any:
        return variable.val if isinstance(variable, Literal) else values.get(variable)

    total = 0
    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        inputs, outputs = [value(x) for x in equation.invars], []
        if name == "dot_general":
            (contracted, _), _ = params["dimension_numbers"]
            depth = math.prod(_shape(equation.invars[0])[i] for i in contracted)
            total += 2 * math.prod(_shape(equation.outvars[0])) * depth
        elif name == "conv_general_dilated":
            weight = _shape(equation.invars[1])
            channels = weight[params["dimension_numbers"].rhs_spec[0]]
            total += 2 * math.prod(_shape(equation.outvars[0])) * math.prod(weight) // channels
        elif name == "cond":
            index, *operands = inputs
            branches = params["branches"]
            possible = branches if index is None else [branches[int(index)]]
            most, found = max((_count(branch.jaxpr, operands) for branch in possible), key=lambda counted: counted[0])
            total += most
            outputs = found if index is not None else []
        elif name in SCALARS and _shape(equation.outvars[0]) == () and not any(x is None for x in inputs):
            outputs = [SCALARS[name](*inputs, **params)]
        else:
            bodies = _bodies(params)
            if name in ("scan", "while") or [len(body.invars) for body in bodies] != [len(inputs)]:
                total += sum(map(count, bodies)) * (params["length"] if name == "scan" else 1)
            else:
                once, outputs = _count(bodies[0], inputs)
                total += once
        values.update(zip(equation.outvars, outputs))
    return total, [value(x) for x in jaxpr.outvars]


def _shape(variable: Any) -> tuple[int, ...]:
    return variable.aval.shape


def _bodies(params: dict[str, Any]) -> list[Jaxpr]:
    found = [x for value in params.values() for x in (value if isinstance(value, tuple | list) else (value,))]
    return [x.jaxpr if isinstance(x, ClosedJaxpr) else x for x in found if isinstance(x, ClosedJaxpr | Jaxpr)]
