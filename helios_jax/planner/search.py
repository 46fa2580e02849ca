"""Settings of a run that fit a machine: mesh, accumulation and rematerialization policy, ranked by predicted time."""

import dataclasses
import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass

from jax.sharding import Mesh

from helios_jax.config import ConfigError
from helios_jax.planner import analytic, program
from helios_jax.planner.analytic import Work
from helios_jax.planner.cost import Cost
from helios_jax.planner.machines import Machine
from helios_jax.planner.program import with_settings
from helios_jax.sharding import AXES, MeshConfig, check_batch, make_mesh
from helios_jax.training.flow_config import FlowTrainConfig
from helios_jax.training.start import check_attention, transformer_config

# Share of a chip's memory up to which an estimate counts as fitting: estimates are that far off.
ROOM = 0.9
# Keys of a config that a search changes, beside those of the mesh.
ACCUMULATE, REMAT = "optim.accumulate", "remat"


@dataclass(frozen=True)
class Candidate:
    """A config with its mesh, and its estimated memory and cost."""

    config: FlowTrainConfig
    mesh: dict[str, int]
    memory: analytic.Memory
    cost: Cost

    def fits(self, machine: Machine, share: float = ROOM) -> bool:
        return self.memory.peak <= share * machine.chip.memory

    @property
    def overrides(self) -> str:
        """Arguments for train.py."""
        sizes = [f"mesh.{name}={size}" for name, size in self.mesh.items() if size > 1 or name in ("data", "fsdp")]
        remat = self.config.remat or "null"
        return " ".join([*sizes, f"optim.accumulate={self.config.optim.accumulate}", f"remat={remat}"])


def candidate(work: Work, config: FlowTrainConfig, machine: Machine, mesh: dict[str, int]) -> Candidate:
    return Candidate(
        config, mesh, analytic.memory(work, config, machine, mesh), analytic.cost(work, config, machine, mesh)
    )


def given(work: Work, machine: Machine) -> Candidate:
    """The config as it is. Raises ConfigError, in one line, when its mesh does not fit the machine, batch or heads."""
    config = work.config
    mesh = check_mesh(config.mesh, machine)
    ways, parts = mesh["data"] * mesh["fsdp"], config.optim.accumulate
    if (config.data.batch_size // parts) % ways:
        raise _does_not_divide(config.data.batch_size, parts, ways, f"data x fsdp = {ways} devices")
    for model in program.transformers(config):
        check_attention(model, analytic.abstract_mesh(mesh))
    return candidate(work, config, machine, mesh)


def _does_not_divide(batch: int, parts: int, ways: int, where: str) -> ConfigError:
    """The error for a batch whose `parts` do not divide over `ways`, with the setting that is nearest to fitting."""
    fitting = [n for n in divisors(batch) if (batch // n) % ways == 0]
    near = min(fitting, key=lambda n: abs(math.log(n / parts)), default=None)
    size = parts * ways * max(1, round(batch / (parts * ways)))
    remedy = f"optim.accumulate={near}" if near else f"data.batch_size={size}"
    in_parts = f" in {parts} parts" if parts > 1 else ""
    return ConfigError(
        f"data.batch_size {batch}{in_parts} does not divide over {where}; the nearest that does is {remedy}"
    )


def check_mesh(config: MeshConfig, machine: Machine) -> dict[str, int]:
    """Sizes of the mesh's axes on the machine. Raises ConfigError, in one line, if it cannot be laid out there."""
    asked = {name: getattr(config, name) for name in AXES}
    fixed = math.prod(size for size in asked.values() if size is not None)
    sizes = {name: machine.count // fixed if size is None else size for name, size in asked.items()}
    shown = " ".join(f"mesh.{name}={'null' if size is None else size}" for name, size in asked.items() if size != 1)
    if math.prod(sizes.values()) != machine.count or not is_laid(sizes, machine):
        near = min(meshes(machine), key=lambda mesh: _distance(mesh, sizes), default=None)
        remedy = f"; the nearest that has is {_written(near)}" if near else ""
        grid = f" of {'x'.join(map(str, machine.grid))}" if machine.is_tpu else ""
        raise ConfigError(f"mesh: {shown} has no place on the {machine.count} chips{grid} of {machine.name}{remedy}")
    return sizes


def _distance(mesh: dict[str, int], wanted: dict[str, int]) -> float:
    return sum(abs(math.log(mesh[name] / max(wanted[name], 1))) for name in AXES)


def _written(mesh: dict[str, int]) -> str:
    return " ".join(f"mesh.{name}={size}" for name, size in mesh.items() if size > 1 or name in ("data", "fsdp"))


def is_laid(mesh: dict[str, int], machine: Machine) -> bool:
    """True when each axis is a product of sides of the grid, each side used once, and no sample spans two hosts."""
    within = mesh["tensor"] * mesh["context"]
    if machine.chip.host % within or mesh["data"] % machine.slices:
        return False
    if not machine.is_tpu:
        return True
    # A host's chips are a square of two by two: only sides of two lie within it.
    local = [side for side in machine.grid[:2] if side == 2]
    if within > 1 and (within > 2 ** len(local)):
        return False
    sizes = [mesh["data"] // machine.slices, *(mesh[name] for name in AXES[1:])]
    return _packs([size for size in sizes if size > 1], [side for side in machine.grid if side > 1])


def _packs(sizes: list[int], sides: list[int]) -> bool:
    """True when `sides` can be split into groups whose products are `sizes`."""
    if not sizes:
        return not sides
    first, *rest = sizes
    for bits in range(2 ** len(sides)):
        chosen = [side for i, side in enumerate(sides) if bits >> i & 1]
        if math.prod(chosen) == first and chosen:
            left = [side for i, side in enumerate(sides) if not bits >> i & 1]
            if _packs(rest, left):
                return True
    return False


def meshes(machine: Machine) -> Iterator[dict[str, int]]:
    """All meshes that can be laid out on the machine, without context parallelism."""
    for data in divisors(machine.count):
        for fsdp in divisors(machine.count // data):
            mesh = {"data": data, "fsdp": fsdp, "tensor": machine.count // (data * fsdp), "context": 1}
            if is_laid(mesh, machine):
                yield mesh


def divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def search(work: Work, machine: Machine, kept: Collection[str] = ()) -> list[Candidate]:
    """All candidates: those that fit by expected time, then the others by memory.

    Those of the settings ACCUMULATE and REMAT that are `kept` stay as the config has them. Raises ConfigError, in one
    line, when the batch divides over no mesh of the machine.
    """
    found = []
    batch, accumulate = work.config.data.batch_size, work.config.optim.accumulate
    heads = [transformer_config(model).num_attention_heads for model in program.transformers(work.config)]
    places = [mesh for mesh in meshes(machine) if all(count % mesh["tensor"] == 0 for count in heads)]
    for mesh in places:
        ways = mesh["data"] * mesh["fsdp"]
        for parts in divisors(batch // ways) if batch % ways == 0 else []:
            if ACCUMULATE in kept and parts != accumulate:
                continue
            for remat in [work.config.remat] if REMAT in kept else analytic.POLICIES:
                config = with_settings(work.config, accumulate=parts, remat=remat, mesh=_config(work.config, mesh))
                found.append(candidate(work, config, machine, mesh))
    if not found:
        ways = min(mesh["data"] * mesh["fsdp"] for mesh in places)
        where = f"the {machine.count} chips of {machine.name}"
        raise _does_not_divide(batch, accumulate if ACCUMULATE in kept else 1, ways, where)
    fitting = [one for one in found if one.fits(machine)]
    others = [one for one in found if not one.fits(machine)]
    return sorted(fitting, key=lambda one: one.cost.seconds) + sorted(others, key=lambda one: one.memory.peak)


def _config(config: FlowTrainConfig, mesh: dict[str, int]) -> MeshConfig:
    return dataclasses.replace(config.mesh, **mesh)


def real_mesh(one: Candidate, machine: Machine) -> Mesh:
    """The mesh over the machine's devices. Raises ConfigError as train.py would."""
    try:
        mesh = make_mesh(dataclasses.replace(one.config.mesh, **one.mesh), machine.devices)
        check_batch(one.config.data.batch_size // one.config.optim.accumulate, mesh)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    return mesh
