"""Machines by the names under which they are rented: their chips, and the rates of the links between them.

v5e-64, v6e-256     the number counts chips
v5p-128             the number counts TensorCores, of which a v5p has two: 64 chips
2*v5p-128           two such slices, joined by the data-center network
H100x8, one H100, 16xH200
"""

import difflib
import itertools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from importlib import resources
from typing import Any

import numpy as np

from helios_jax.config import ConfigError
from helios_jax.runtime import aot
from helios_jax.runtime.chips import CHIPS, Chip
from helios_jax.sharding import MeshConfig, lay_out

# Chips of a slice -> its grid.
_SQUARE = {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}
_CUBE = {4: "2x2x1", 8: "2x2x2", 16: "2x2x4", 32: "2x4x4", 64: "4x4x4", 128: "4x4x8", 256: "4x8x8", 512: "8x8x8"}
_CUBE |= {1024: "8x8x16", 2048: "8x16x16", 4096: "16x16x16"}
GRIDS = {"v5e": _SQUARE, "v6e": _SQUARE, "v5p": _CUBE}
EXAMPLES = "v5e-256, v5p-128 (64 chips), v6e-256, 2*v5p-128, H100, H100x8, H200x16"

MOST = 2**16  # chips: far more than are rented as one machine, and few enough to try all meshes

_TPU_NAME = re.compile(r"(?:(\d{1,6})[*x])?(v\d[a-z]*|v5litepod)(?:-(\d{1,6})|:(\d{1,6}(?:x\d{1,6})*))")
_GPU_NAME = re.compile(r"(?:(?:one|(\d{1,6})x?)?[ -]*)([hab]\d00)(?:[ -]*x?(\d{1,6}))?")


@dataclass(frozen=True, eq=False)
class Place:
    """A device of a machine that is not here: its platform, number, host, slice, and coordinates on a grid of links."""

    platform: str
    id: int
    process_index: Any
    slice_index: int = 0
    coords: tuple[int, ...] = (0, 0, 0)
    core_on_chip: int = 0
    device_kind: str = ""


@dataclass(frozen=True)
class Machine:
    """Rented devices: `slices` of a grid of TPU chips each, or hosts of GPUs (`grid` is (hosts, devices of a host))."""

    name: str
    kind: str
    grid: tuple[int, ...]
    slices: int = 1

    @property
    def chip(self) -> Chip:
        return CHIPS[self.kind]

    @property
    def is_tpu(self) -> bool:
        return self.chip.sides > 0

    @property
    def count(self) -> int:
        """Chips in all."""
        return self.slices * math.prod(self.grid)

    @property
    def hosts(self) -> int:
        return max(1, self.count // self.chip.host)

    def __str__(self) -> str:
        grid = f", {'x'.join(map(str, self.grid))}" if self.is_tpu and self.count > 1 else ""
        slices = f"{self.slices} slices of " if self.slices > 1 else ""
        each = self.count // self.slices
        return f"{self.name}: {slices}{each} {self.chip.name} ({self.chip.memory / 1e9:.0f} GB each{grid})"

    @cached_property
    def devices(self) -> list[Any]:
        """The devices to compile for. Raises ConfigError, in one line, where the compiler for them is not installed."""
        try:
            if not self.is_tpu:
                return list(aot.gpu_topology(target(self.kind), *self.grid).devices)
            grid = f"{self.kind}:{'x'.join(map(str, self.grid))}"
            return list(aot.tpu_topology(grid, self.slices, alone=self.count == 1).devices)
        except ModuleNotFoundError as error:
            raise ConfigError(f"{error}; or give --quick, which compiles nothing") from None

    @cached_property
    def places(self) -> list["Place"]:
        """Stand-ins for the devices, in any order, which tell a mesh what it needs to know; no compiler makes them."""
        if not self.is_tpu:
            return [Place("gpu", i, process_index=i // self.grid[1]) for i in range(self.count)]
        grid = [(*point, 0)[:3] for point in itertools.product(*map(range, self.grid))]
        slices = [(part, x, y, z) for part in range(self.slices) for x, y, z in grid]
        # A host has two by two chips.
        return [Place("tpu", i, (part, x // 2, y // 2, z), part, (x, y, z)) for i, (part, x, y, z) in enumerate(slices)]

    def link_rate(self, group: tuple[int, ...], order: Sequence[Any]) -> float:
        """Bytes a second that each device of `group` receives; `group` has indices into `order`, a mesh's devices."""
        devices = [order[i] for i in group]
        if self.is_tpu:
            if self.slices > 1 and len({one.slice_index for one in devices}) > 1:
                return self.chip.network
            of_group, of_all = (zip(*(one.coords for one in some)) for some in (devices, order))
            links = sum(self._links(sorted(set(few)), len(set(all_))) for few, all_ in zip(of_group, of_all))
            return self.chip.link * links
        hosts = len({one.process_index for one in devices})
        return self._switch_rate(hosts, len(devices) // hosts)

    def axis_rate(self, mesh: Mapping[str, int], axis: str) -> float:
        """`link_rate` for one axis of a mesh that has only sizes."""
        sizes = tuple(mesh.values())
        first = tuple(slice(None) if name == axis else 0 for name in mesh)
        group = np.arange(self.count).reshape(sizes)[first]
        return self.link_rate(tuple(group.tolist()), _laid_out(self, *sizes))

    def _links(self, places: list[int], side: int) -> float:
        """Links of a device to others of its group, which has `places` along a side of the grid.

        Two on a side closed to a ring, one on an open side or within a part of a side. Groups whose devices lie
        between each other's share the links.
        """
        if len(places) == 1:
            return 0
        apart = places[1] - places[0]
        ring = side >= self.chip.wraps and (len(places) == side or apart > 1)
        return (2 if ring else 1) / apart

    def _switch_rate(self, hosts: int, each: int) -> float:
        """The rate of a host's switch or, for a group on several hosts, of the network cards of its devices on each."""
        return self.chip.link if hosts == 1 else min(self.chip.link, self.chip.network * each)


@cache
def _laid_out(machine: Machine, data: int, fsdp: int, tensor: int, context: int) -> list[Place]:
    """The machine's devices in the order of a mesh of these sizes."""
    return list(lay_out(MeshConfig(data, fsdp, tensor, context), machine.places).flat)


def machine(name: str) -> Machine:
    """The machine called `name`. Raises ConfigError, in one line, for one that is not known or not rented."""
    found = _named(name)
    if not 1 <= found.count <= MOST:
        raise ConfigError(f"--topology {name}: has {found.count} chips; give a machine of 1 to {MOST}")
    return found


def _named(name: str) -> Machine:
    text = name.strip().lower()
    if tpu := _TPU_NAME.fullmatch(text):
        slices, kind, number, grid = tpu.groups()
        kind = {"v5litepod": "v5e"}.get(kind, kind)
        if kind in GRIDS:
            return Machine(name, kind, _grid(name, kind, number, grid), 1 if slices is None else int(slices))
    if gpu := _GPU_NAME.fullmatch(text):
        before, kind, after = gpu.groups()
        count = int(before or 1) * int(after or 1)
        if kind.upper() in CHIPS:
            host = CHIPS[kind.upper()].host
            if count < 1 or (count > host and count % host):
                raise ConfigError(f"--topology {name}: GPUs come in hosts of {host}; give up to {host}, or a multiple")
            return Machine(name, kind.upper(), (-(-count // host), min(count, host)))
    near = difflib.get_close_matches(
        text, [f"{kind}-{n * CHIPS[kind].cores}" for kind in GRIDS for n in GRIDS[kind]], 1
    )
    hint = f"; did you mean {near[0]}?" if near else ""
    raise ConfigError(f"--topology {name}: no machine of that name is known; give one such as {EXAMPLES}{hint}")


def _grid(name: str, kind: str, number: str | None, grid: str | None) -> tuple[int, ...]:
    grids, cores = GRIDS[kind], CHIPS[kind].cores
    if grid is not None:
        sides = tuple(int(side) for side in grid.split("x") if side)
        if len(sides) != CHIPS[kind].sides or min(sides) < 1:
            raise ConfigError(f"--topology {name}: a grid of {kind} has {CHIPS[kind].sides} sides, as in {grids[16]}")
        return sides
    chips, rest = divmod(int(number or 0), cores)
    if rest or chips not in grids:
        known = ", ".join(f"{kind}-{chips * cores}" for chips in grids)
        raise ConfigError(f"--topology {name}: {kind} is rented as {known}" + (" (cores)" if cores > 1 else ""))
    return tuple(int(side) for side in grids[chips].split("x"))


def target(kind: str = "H100") -> str:
    """XLA's GpuTargetConfig, in text, of an H100 or H200, for compiling without one."""
    text = resources.files("helios_jax.planner").joinpath("h100_target.txt").read_text()
    if kind == "H200":  # the same chip with other memory
        text = re.sub(r"memory_bandwidth: \d+", "memory_bandwidth: 4800000000000", text)
        text = re.sub(r"device_memory_size: \d+", "device_memory_size: 150754820096", text)
        text = text.replace("NVIDIA H100 80GB HBM3", "NVIDIA H200")
    return text
