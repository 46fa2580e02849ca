"""A program of the sampler: traced under the mesh and for the precision of its weights, flattened and compiled once."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from helios_jax.runtime.program import program
from helios_jax.sharding import AXES, MeshConfig, make_mesh


def test_weights_bring_their_mesh():
    seen = []

    @program(static_argnames="name")
    def run(tree, name):
        seen.append(jax.sharding.get_abstract_mesh().axis_names)
        return tree["b"] + 1

    b = jnp.zeros(2)
    mesh = make_mesh(MeshConfig(data=1, fsdp=1, tensor=1), jax.devices()[:1])
    run({"a": 1.0, "b": b}, name="alone")
    run({"a": 1.0, "b": jax.device_put(b, NamedSharding(mesh, PartitionSpec()))}, name="on a mesh")
    assert seen == [(), AXES]


def test_float32_is_multiplied_as_float32():
    """A bfloat16 model has float32 arrays, too; a float32 model has no other."""
    seen = []

    @program()
    def run(tree):
        seen.append(jax.config.jax_default_matmul_precision)
        return tree

    number, half, ids = jnp.zeros(2), jnp.zeros(2, jnp.bfloat16), jnp.zeros(2, jnp.int32)
    run({"weight": number, "ids": ids, "key": jax.random.key(0)})
    run({"weight": half, "norm": number, "ids": ids})
    assert seen == ["highest", None]


@jax.tree_util.register_pytree_node_class
class Counted:
    flattened = 0

    def __init__(self, weight):
        self.weight = weight

    def tree_flatten(self):
        Counted.flattened += 1
        return (self.weight,), None

    @classmethod
    def tree_unflatten(cls, _, children):
        return cls(*children)


def test_a_bound_model_is_flattened_once_and_compiled_once_for_all_of_its_kind():
    traced = []

    @program(static_argnames="power", donate_argnames="x")
    def run(model, x, power):
        traced.append(power)
        return model.weight * x**power

    for weight in (2.0, 3.0):
        Counted.flattened = 0
        bound = run.bind(Counted(jnp.full(2, weight)))
        for _ in range(3):
            x = jnp.full(2, 5.0)
            np.testing.assert_array_equal(bound(x, power=2), weight * 25)
            assert x.is_deleted()
        assert Counted.flattened == 1
        np.testing.assert_array_equal(run(Counted(jnp.full(2, weight)), jnp.full(2, 5.0), power=2), weight * 25)
    assert traced == [2]
