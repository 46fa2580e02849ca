"""Operations of traced functions: loops, branches that are known, and those that are not."""

import jax
import jax.numpy as jnp
import numpy as np

from helios_jax.runtime.flops import count, traced

PRODUCT = 2 * 4**3


def test_scans_count_each_turn_and_branches_once():
    x = jnp.zeros((4, 4))

    def body(y, _):
        return jax.lax.cond(y[0, 0] > 0, lambda: y @ y, lambda: y @ y), None

    assert traced(lambda x: jax.lax.scan(body, x, None, 5)[0], x) == 5 * PRODUCT


def test_a_branch_that_the_step_decides_counts_as_it_is_taken():
    """Every third step takes three products, from step 5 on one more; their gradient takes two for each."""

    def inner(x, step):
        return jax.lax.cond(step >= 5, lambda x: x @ x @ x @ x @ x, lambda x: x @ x @ x @ x, x)

    def loss(step, x):
        return jax.lax.cond(step % 3 == 0, inner, lambda x, _: x, x, step).sum()

    program = jax.make_jaxpr(jax.grad(loss, 1))(jnp.zeros((), jnp.int32), jnp.zeros((4, 4))).jaxpr
    products = [count(program, [np.int32(step)]) / PRODUCT for step in range(7)]
    assert products == [9, 0, 0, 9, 0, 0, 12]
    assert count(program) / PRODUCT == 12
