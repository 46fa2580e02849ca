"""Estimates of a training step's memory and time from its sizes alone: they take seconds and need no compiler.

The arguments of a step and the operations of its products are exact. Temporaries, memory traffic and collectives are
sums of a few terms whose factors were read from compiled programs; tests check that they are within a sixth of those.
The search ranks meshes by the estimates, and `--quick` prints them.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh

from helios_jax.models.transformer import TransformerConfig
from helios_jax.models.transformer.remat import Remat
from helios_jax.planner import program
from helios_jax.planner.cost import Cost
from helios_jax.planner.machines import Machine
from helios_jax.sharding import AXES
from helios_jax.training.flow_config import TransformerTrainConfig
from helios_jax.training.start import transformer_config
from helios_jax.training.state import placed
from helios_jax.training.work import sequences


@dataclass(frozen=True)
class Factors:
    """Factors of the programs of one compiler; arrays are [tokens, dim] in bfloat16.

    A block's backward pass holds `working` arrays at once, and the weights of `layers` blocks. A block's input is kept
    `inputs` times, because the loops over the blocks copy part of it. Each pass over a block reads and writes `traffic`
    arrays. `hidden` is the share of collectives that overlaps with other work.
    """

    working: float
    inputs: float
    layers: float
    traffic: float
    hidden: float


TPU = Factors(working=46, inputs=1.83, layers=2.5, traffic=75, hidden=0)
GPU = Factors(working=32, inputs=1, layers=2.5, traffic=109, hidden=0.9)


@dataclass(frozen=True)
class Policy:
    """A rematerialization policy: `arrays` [tokens, dim] that each block keeps besides its input, and the shares of the
    forward pass's `products`, `attention` and memory `traffic` that the backward pass repeats."""

    arrays: float
    products: float
    attention: float
    traffic: float = 1


# Attention is a kernel, whose result JAX's policies for dots do not keep.
POLICIES: dict[Remat | None, Policy] = {
    "block": Policy(0, products=1, attention=1),
    "offload": Policy(0, products=1, attention=1),
    "attention": Policy(1.9, products=1, attention=0),
    "some_products": Policy(6.0, products=0.4, attention=0),
    "products": Policy(10.7, products=0, attention=0),
    "dots_with_no_batch_dims_saveable": Policy(17.2, products=0, attention=1),
    "dots_saveable": Policy(25, products=0, attention=1),
    None: Policy(38, products=0, attention=0, traffic=0),
}
# Factors of the traffic where `tensor` splits the products: of the split part, and of a part that stays whole. There is
# more traffic because the norms' kernels do not run there.
SPLIT_TRAFFIC, WHOLE_TRAFFIC = 2.7, 0.15
TEXT = 16  # bytes for each feature of a text token in each block: keys, values, their norms and gradients
GATHERED = 2.3  # times that the weights of all blocks are gathered for each part of a batch
LANES = 128  # a TPU does not gather narrower shards of weights but sums them, which takes twice the bytes
REDUCED = 3  # arrays [tokens, dim] that a block all-reduces over `tensor` in each pass


@dataclass(frozen=True)
class Work:
    """A config before any mesh: its state, and the operations that a sample needs."""

    config: TransformerTrainConfig
    state: Any
    model_flops: int  # forward and backward, of one sample
    forward_flops: int

    @staticmethod
    def of(config: TransformerTrainConfig) -> "Work":
        return Work(config, program.abstract_state(config), *program.model_flops(config))

    @cached_property
    def sizes(self) -> TransformerConfig:
        return transformer_config(self.config)

    @cached_property
    def sequences(self) -> list[list[int]]:
        return sequences(self.config, *program.LATENTS)

    @property
    def tokens(self) -> int:
        """Tokens of one sample, over all levels."""
        return sum(map(sum, self.sequences))

    @cached_property
    def attention_flops(self) -> int:
        """Operations of self-attention in one forward pass of one sample."""
        return sum(4 * n * n for levels in self.sequences for n in levels) * self.sizes.dim * self.sizes.num_layers


@dataclass(frozen=True)
class Memory:
    """Bytes on each device by kind. `temporaries` are activations, gradients and everything else of the step itself."""

    parameters: float
    frozen: float
    optimizer: float
    average: float
    batch: float
    temporaries: float

    @property
    def peak(self) -> float:
        return self.parameters + self.frozen + self.optimizer + self.average + self.batch + self.temporaries


def arguments(work: Work, config: TransformerTrainConfig, mesh: Any) -> dict[str, int]:
    """Bytes of the step's arguments on each device by kind, exactly; `mesh` may be abstract."""
    # Devices to compile for may not have all memory kinds; a mesh without devices accepts every kind.
    mesh = mesh.abstract_mesh if isinstance(mesh, Mesh) else mesh
    state, each = placed(work.state, mesh, config.optim.offload), program.bytes_on_each
    return {
        "parameters": each(state.params),
        "frozen": each(state.frozen),
        "optimizer": each(state.opt_state),
        "average": each(state.ema),
        "batch": each(program.batch(config, mesh)),
    }


def abstract_mesh(sizes: dict[str, int]) -> AbstractMesh:
    """A mesh of the given sizes without devices."""
    return AbstractMesh(tuple(sizes.values()), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def samples(config: TransformerTrainConfig, mesh: dict[str, int]) -> int:
    """Samples of each device in one part of a batch."""
    return config.data.batch_size // config.optim.accumulate // (mesh["data"] * mesh["fsdp"])


def memory(
    work: Work, config: TransformerTrainConfig, machine: Machine, mesh: dict[str, int], given: dict[str, int]
) -> Memory:
    """The memory of a step on each device, of which `given` are its arguments."""
    b, d, layers, split = samples(config, mesh), work.sizes.dim, work.sizes.num_layers, mesh["tensor"]
    # With separate sequences, the activations of all are kept, but the backward passes run one after the other.
    once, array = (2 * b * d * count for count in (max(map(sum, work.sequences)), work.tokens))
    factors = TPU if machine.is_tpu else GPU
    inputs = 0 if config.remat == "offload" else factors.inputs
    # The residual stream is whole on each device of `tensor`; activations between two products are split.
    kept = min(inputs, 1) + (max(inputs - 1, 0) + POLICIES[config.remat].arrays) / split
    activations = array * layers * kept + once * factors.working / split
    text = b * program.TEXT * d * layers * TEXT / split
    weights = factors.layers * 2 * sum(x.size for x in jax.tree.leaves(work.state.frozen)) / layers / split
    copies = 2.4 if config.optim.accumulate > 1 else 1.4  # of the gradients, and of adapters in bfloat16
    return Memory(**given, temporaries=activations + text + weights + copies * given["parameters"])


def cost(work: Work, config: TransformerTrainConfig, machine: Machine, mesh: dict[str, int]) -> Cost:
    """The time of a step. By default libtpu's programs wait for collectives; a GPU's do other work meanwhile."""
    b, parts, split = samples(config, mesh), config.optim.accumulate, mesh["tensor"]
    d, layers, chip, total = work.sizes.dim, work.sizes.num_layers, machine.chip, Cost()
    again = POLICIES[config.remat]
    share = b * parts / split
    # The backward kernel of attention recomputes the scores: 5 products, where the forward kernel has 2.
    attention = share * work.attention_flops * (1 + again.attention + 2.5)
    products = work.model_flops - 3 * work.attention_flops
    products += again.products * (work.forward_flops - work.attention_flops)
    products *= share
    total.flops.update(products=int(products), attention=int(attention))
    factors = TPU if machine.is_tpu else GPU
    moved = 2 * b * parts * work.tokens * d * layers * factors.traffic * (2 + again.traffic)
    moved *= 1 if split == 1 else WHOLE_TRAFFIC + SPLIT_TRAFFIC / split
    state = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves((work.state.params, work.state.opt_state)))
    moved += 3 * state / (mesh["fsdp"] * split)
    total.bytes["main memory"] = int(moved)
    for name, work_done, limit, reached in (
        ("products", products, chip.flops, chip.efficiency[0]),
        ("attention", attention, chip.flops, chip.efficiency[1]),
        ("memory", moved, chip.bandwidth, chip.efficiency[2]),
    ):
        total.bound[name] = work_done / limit
        total.expected[name] = work_done / limit / reached
    for kind, axis, received in _received(work, config, machine, mesh):
        if received:
            total.received[kind] += received
            total.overlapped[kind] += factors.hidden * received
            seconds = (1 - factors.hidden) * received / machine.axis_rate(mesh, axis)
            for part in (total.bound, total.expected):
                part["collectives"] += seconds
    return total


def _received(
    work: Work, config: TransformerTrainConfig, machine: Machine, mesh: dict[str, int]
) -> list[tuple[str, str, float]]:
    """(kind, mesh axis, bytes that each device receives in a step) of the collectives."""
    b, parts, split = samples(config, mesh), config.optim.accumulate, mesh["tensor"]
    weights = sum(x.size * 2 for x in jax.tree.leaves((work.state.params, work.state.frozen))) / split
    gradients = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(work.state.params)) / split
    array = 2 * b * work.tokens * work.sizes.dim
    narrow = machine.is_tpu and work.sizes.dim // mesh["fsdp"] < LANES

    def others(axis: str) -> float:
        return (mesh[axis] - 1) / mesh[axis]

    passes = 3 + POLICIES[config.remat].products
    return [
        ("all-gather", "fsdp", parts * GATHERED * weights * others("fsdp") * (1 + narrow)),
        ("all-reduce", "fsdp", parts * gradients * others("fsdp")),
        ("all-reduce", "data", 2 * gradients / mesh["fsdp"] * others("data")),
        ("all-reduce", "tensor", parts * passes * REDUCED * work.sizes.num_layers * array * 2 * others("tensor")),
    ]


def tokens_a_second(work: Work, seconds: float) -> float:
    return work.tokens * work.config.data.batch_size / seconds


def mfu(work: Work, machine: Machine, seconds: float) -> float:
    """The share of the machine's peak that the operations a step needs would take up."""
    return work.model_flops * work.config.data.batch_size / (seconds * machine.count * machine.chip.flops)
