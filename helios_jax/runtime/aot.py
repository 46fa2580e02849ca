"""Ahead-of-time compilation for devices that this machine does not have.

`tpu_topology` and `gpu_topology` give devices to compile for: put them into a `Mesh` or a sharding, give the function
`jax.ShapeDtypeStruct`s with such shardings, and `compiled` does the rest. Nothing can run this way, but
the memory analysis and the compiled program are the device's own.
"""

import importlib.util
import os
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from helios_jax.runtime.compilation import compiler_options
from pallas_kernels.core.device import compiling_for


def tpu_topology(name: str, slices: int = 1, alone: bool = False) -> topologies.TopologyDescription:
    """The chips of a TPU slice such as "v5e:2x2", "v5p:4x4x4" or "v6e:2x4" (`.devices`), or of several such slices.

    `alone`: one chip that has a host for itself, as in "v6e:1x1". Needs libtpu, but no TPU.
    """
    _needs("libtpu", "TPUs")
    # libtpu would ask a metadata server what machine this is, and lock itself for one process.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    # Without these libtpu complains about this machine on stderr. The topology does not depend on them.
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_WORKER_ID", "0")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5p-8")
    host = {"chips_per_host_bounds": (1, 1, 1)} if alone else {}
    several = {"num_slices": slices} if slices > 1 else {}
    return topologies.get_topology_desc(platform="tpu", topology_name=name, **several, **host)


def gpu_topology(target: str, hosts: int = 1, devices: int = 1) -> topologies.TopologyDescription:
    """The GPUs (`.devices`) of `hosts` hosts with `devices` each; `target` is XLA's GpuTargetConfig of one, in text.

    Needs jax's CUDA plugin, and cuDNN for its attention and convolutions, but no GPU.
    """
    _needs("jax_plugins.xla_cuda13", "NVIDIA GPUs")
    return topologies.get_topology_desc(
        platform="cuda", topology_name="", topology=f"1x{hosts}x{devices}", target_config=target
    )


def _needs(module: str, device: str) -> None:
    parent = module.partition(".")[0]
    if importlib.util.find_spec(parent) is None or importlib.util.find_spec(module) is None:
        raise ModuleNotFoundError(
            f"compiling for {device} needs {module}: use the environment of `make aot`, or pip install helios_jax[aot]"
        )


def on_device(tree: Any, device: Any) -> Any:
    """Shapes and dtypes of `tree`'s arrays, as arguments that lie on `device`."""
    sharding = SingleDeviceSharding(device)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)


def compiled(function: Callable[..., Any], *arguments: Any, platform: str, donate: tuple[int, ...] = ()) -> Any:
    """`function` compiled for the devices that the shardings of `arguments` name, with the options of `platform`.

    `arguments` are pytrees of `jax.ShapeDtypeStruct` with shardings; those numbered in `donate` may be overwritten.
    Returns a `jax.stages.Compiled`. Passes on the compiler's errors, such as RESOURCE_EXHAUSTED.
    """
    sharding = jax.tree.leaves(arguments)[0].sharding
    # A new function: jax's cache of an earlier trace may hold another device's kernels.
    jitted = jax.jit(lambda *args: function(*args), donate_argnums=donate, compiler_options=compiler_options(platform))
    mesh = getattr(sharding, "mesh", None)
    with nullcontext() if mesh is None else jax.set_mesh(mesh), compiling_for(next(iter(sharding.device_set))):
        return jitted.lower(*arguments).compile()


@dataclass(frozen=True)
class Memory:
    """Bytes of a compiled program on each device; `host` bytes are in the host's memory instead."""

    arguments: int
    outputs: int
    aliased: int  # outputs that take the place of arguments
    temporaries: int
    host: int

    @property
    def peak(self) -> int:
        """The most that is needed at once, if all arguments live through the program."""
        return self.arguments + self.outputs - self.aliased + self.temporaries


def memory(program: Any) -> Memory:
    """The compiler's memory plan for `program`, a `jax.stages.Compiled`."""
    stats = program.memory_analysis()
    return Memory(
        arguments=stats.argument_size_in_bytes,
        outputs=stats.output_size_in_bytes,
        aliased=stats.alias_size_in_bytes,
        temporaries=stats.temp_size_in_bytes,
        host=stats.host_argument_size_in_bytes + stats.host_temp_size_in_bytes,
    )
