"""Offload: arrays that no program needs now are kept in the memory of their device's host."""

from typing import Any, TypeVar

import jax
from jax.sharding import SingleDeviceSharding

Tree = TypeVar("Tree")
HOST = "pinned_host"  # page-locked: devices copy from it at the full speed of their link


def default_device() -> Any:
    """The device that a caller set with `jax.default_device`, or None."""
    return jax.config.jax_default_device  # pyright: ignore[reportAttributeAccessIssue]  # jax makes it at run time


def default_shardings(model: Tree, device: Any = None) -> Tree:
    """A sharding for each array of an abstract `model`: all of it on one device, by default jax's own."""
    device = device or default_device() or jax.local_devices()[0]
    return jax.tree.map(lambda _: SingleDeviceSharding(device), model)


def in_host_memory(shardings: Tree) -> Tree:
    """Shardings in the memory of the devices' hosts."""
    return jax.tree.map(lambda sharding: sharding.with_memory_kind(HOST), shardings)


def on_device(model: Tree) -> Tree:
    """`model` in device memory: itself, or a copy if it waits in the host's memory.

    The copy's memory is free again when the caller drops it and the programs that use it are done.
    """

    def place(x: Any) -> Any:
        if not isinstance(x, jax.Array) or x.sharding.memory_kind != HOST:
            return x
        default = next(iter(x.sharding.device_set)).default_memory().kind
        return jax.device_put(x, x.sharding.with_memory_kind(default))

    return jax.tree.map(place, model)


def to_host(tree: Tree) -> Tree:
    """Inside a program: moves `tree` to the host's memory, except scalars."""
    return _moved(tree, jax.memory.Space.Host)


def stacked_to_host(tree: Tree) -> Tree:
    """Inside a program: moves the arrays of `tree` that are stacked over layers to the host's memory, layer by layer.

    Their device memory is free afterwards. XLA could end a copy of the whole array, and free it, much later.
    """
    leaves, structure = jax.tree.flatten(tree)
    stacks: dict[int, list[int]] = {}
    for i, x in enumerate(leaves):
        if x.ndim == 3:
            stacks.setdefault(len(x), []).append(i)
    for places in stacks.values():
        moved = jax.lax.map(lambda rows: _moved(rows, jax.memory.Space.Host), [leaves[i] for i in places])
        for i, x in zip(places, moved):
            leaves[i] = x
    return jax.tree.unflatten(structure, leaves)


def to_device(tree: Tree) -> Tree:
    """Inside a program: moves `tree` to the device's memory, except scalars."""
    return _moved(tree, jax.memory.Space.Device)


def _moved(tree: Tree, space: Any) -> Tree:
    return jax.tree.map(lambda x: jax.device_put(x, space) if x.ndim else x, tree)


def waiting(tree: Tree, shardings: Tree) -> Tree:
    """`shardings` of a tree that a program takes or returns in the host's memory; scalars stay on the device."""
    return jax.tree.map(lambda x, placed: in_host_memory(placed) if x.ndim else placed, tree, shardings)


def has_host_memory(device: Any) -> bool:
    """True where programs of the device can keep arrays in page-locked memory of its host."""
    return any(memory.kind == HOST for memory in device.addressable_memories())
