"""A text encoder in the host's memory gives the same embeddings, and is on the device only while it does."""

import gc

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from helios_jax import HeliosPipeline
from helios_jax.runtime import offload
from helios_jax.sharding import MeshConfig, make_mesh


def memories(pipe: HeliosPipeline, name: str) -> set[str]:
    return {x.sharding.memory_kind for x in jax.tree.leaves(getattr(pipe, name))}


@pytest.mark.parametrize("over_mesh", [False, True])
def test_it_is_on_the_device_for_as_long_as_a_prompt_takes(folder, over_mesh):
    mesh = make_mesh(MeshConfig(), jax.devices()[:1]) if over_mesh else None
    stays = HeliosPipeline.from_pretrained(folder, mesh=mesh)
    waits = HeliosPipeline.from_pretrained(folder, mesh=mesh, offload_text_encoder=True)
    assert memories(stays, "text_encoder") == {jax.devices()[0].default_memory().kind}  # the default on a CPU
    assert memories(waits, "text_encoder") == {"pinned_host"}
    assert memories(waits, "transformer") == memories(stays, "transformer") == memories(stays, "text_encoder")
    expected = np.asarray(stays.encode_prompt(["a red plus", "a square"]))
    del stays

    table = waits.text_encoder.shared.weight
    np.testing.assert_array_equal(waits.encode_prompt(["a red plus", "a square"]), expected)
    gc.collect()
    same = [x for x in jax.live_arrays() if x.shape == table.shape and x.sharding.memory_kind != "pinned_host"]
    assert not same, "a copy of the encoder stays on the device"
    assert memories(waits, "text_encoder") == {"pinned_host"}


def test_stacks_move_layer_by_layer_and_come_back():
    tree = {"stack": jnp.arange(24.0).reshape(4, 3, 2), "other": jnp.arange(6.0).reshape(3, 2), "count": jnp.asarray(7)}
    found = {}

    @jax.jit
    def program(tree):
        there = offload.stacked_to_host(tree)
        found.update({name: jax.typeof(x).memory_space for name, x in there.items()})
        return offload.to_device(jax.tree.map(lambda x: x, there))

    back = program(tree)
    assert found == {
        name: jax.memory.Space[x] for name, x in (("stack", "Host"), ("other", "Device"), ("count", "Device"))
    }
    for name, x in tree.items():
        np.testing.assert_array_equal(back[name], x)
