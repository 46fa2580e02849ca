"""A program of the sampler is traced under the mesh that its weights lie on."""

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
