"""A program of the sampler is traced under the mesh and for the precision of its weights."""

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from helios_jax.sampling.program import program
from helios_jax.sharding import AXES, make_mesh
from helios_jax.training.config import MeshConfig


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
