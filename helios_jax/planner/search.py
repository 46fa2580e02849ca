"""Settings of a run that fit a machine: mesh, accumulation and rematerialization policy, ranked by predicted time."""

import dataclasses
import itertools
import math
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass

from jax.sharding import Mesh

from helios_jax.config import ConfigError
from helios_jax.planner import analytic, program
from helios_jax.planner.analytic import Work
from helios_jax.planner.cost import Cost
from helios_jax.planner.machines import Machine
from helios_jax.planner.program import with_settings
from helios_jax.sharding import AXES, MeshConfig, check_batch, lay_out, make_mesh
from helios_jax.training.flow_config import TransformerTrainConfig
from helios_jax.training.start import check_attention, transformer_config

# Share of a chip's memory up to which an estimate counts as fitting: estimates are that far off.
ROOM = 0.9
# Keys of a config that a search changes, beside those of the mesh.
ACCUMULATE, REMAT = "optim.accumulate", "remat"


@dataclass(frozen=True)
class Candidate:
    """A config with its mesh, and its estimated memory and cost."""

    config: TransformerTrainConfig
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


def candidates(
    work: Work, configs: Iterable[TransformerTrainConfig], machine: Machine, mesh: dict[str, int]
) -> Iterator[Candidate]:
    """Candidates of one mesh, whose configs differ in accumulation and remat policy only."""
    arguments = analytic.arguments(work, work.config, analytic.abstract_mesh(mesh))
    for config in configs:
        memory = analytic.memory(work, config, machine, mesh, arguments)
        yield Candidate(config, mesh, memory, analytic.cost(work, config, machine, mesh))


def given(work: Work, machine: Machine) -> Candidate:
    """The config as it is. Raises ConfigError, in one line, when its mesh does not fit the machine, batch or heads."""
    config = work.config
    mesh = check_mesh(config.mesh, machine)
    ways, parts = mesh["data"] * mesh["fsdp"], config.optim.accumulate
    if (config.data.batch_size // parts) % ways:
        raise _does_not_divide(config.data.batch_size, parts, ways, f"data x fsdp = {ways} devices")
    for model in program.transformers(config):
        check_attention(model, analytic.abstract_mesh(mesh))
    return next(candidates(work, [config], machine, mesh))


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
    try:
        return dict(zip(AXES, lay_out(config, machine.places).shape))
    except ValueError as error:
        near = min(meshes(machine), key=lambda mesh: (_distance(mesh, config), mesh["tensor"]))
        raise ConfigError(f"{error}; {machine.name} takes, for example, {_written(near)}") from None


def _distance(mesh: dict[str, int], asked: MeshConfig) -> float:
    sizes = {name: getattr(asked, name) for name in AXES}
    return sum(abs(math.log(mesh[name] / size)) for name, size in sizes.items() if size is not None)


def _written(mesh: dict[str, int]) -> str:
    return " ".join(f"mesh.{name}={size}" for name, size in mesh.items() if size > 1 or name in ("data", "fsdp"))


def meshes(machine: Machine) -> Iterator[dict[str, int]]:
    """Meshes of the machine without context parallelism, on GPUs those that split a product within a host only."""
    for data in range(machine.slices, machine.count + 1, machine.slices):
        for fsdp in divisors(machine.count // data) if machine.count % data == 0 else []:
            tensor = machine.count // (data * fsdp)
            if machine.is_tpu or machine.chip.host % tensor == 0:
                yield {"data": data, "fsdp": fsdp, "tensor": tensor, "context": 1}


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
    policies = [work.config.remat] if REMAT in kept else analytic.POLICIES
    for mesh in places:
        ways, laid = mesh["data"] * mesh["fsdp"], dataclasses.replace(work.config.mesh, **mesh)
        parts = divisors(batch // ways) if batch % ways == 0 else []
        if ACCUMULATE in kept:
            parts = [accumulate] if accumulate in parts else []
        if parts:
            configs = (
                with_settings(work.config, accumulate=part, remat=remat, mesh=laid)
                for part, remat in itertools.product(parts, policies)
            )
            found += candidates(work, configs, machine, mesh)
    if not found:
        ways = min(mesh["data"] * mesh["fsdp"] for mesh in places)
        where = f"the {machine.count} chips of {machine.name}"
        raise _does_not_divide(batch, accumulate if ACCUMULATE in kept else 1, ways, where)
    fitting = [one for one in found if one.fits(machine)]
    others = [one for one in found if not one.fits(machine)]
    return sorted(fitting, key=lambda one: one.cost.seconds) + sorted(others, key=lambda one: one.memory.peak)


def real_mesh(one: Candidate, machine: Machine) -> Mesh:
    """The mesh over the machine's devices. Raises ConfigError as train.py would."""
    try:
        mesh = make_mesh(dataclasses.replace(one.config.mesh, **one.mesh), machine.devices)
        check_batch(one.config.data.batch_size // one.config.optim.accumulate, mesh)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    return mesh
