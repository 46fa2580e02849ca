"""Work of a training step, counted from shapes: tokens of the transformer's sequences, and operations of the model.

The planner predicts tokens per second and MFU from these counts, and the loop reports both by the same definitions.
"""

import contextlib
import dataclasses
import logging
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.extend.core import Jaxpr
from jax.sharding import AbstractMesh, Mesh

from helios_jax.diffusion.pyramid import level_shapes
from helios_jax.runtime import chips, flops
from helios_jax.training.flow_config import TransformerTrainConfig
from helios_jax.training.stage import Stage
from helios_jax.training.start import transformer_config
from helios_jax.training.state import TrainState
from helios_jax.training.train_step import gradients, losses
from pallas_kernels.core import device

_CPU = SimpleNamespace(platform="cpu", device_kind="cpu")  # its attention is matrix products, which can be counted


def sequences(config: TransformerTrainConfig, height: int, width: int) -> list[list[int]]:
    """Noisy and history tokens of the transformer's sequences for one sample of latents of this size.

    Each forward pass has a list, with the length of each packed level. Stage 3 has one sequence for each of the
    student's levels; the sequences of the student's earlier steps and of the scores are not counted.
    """
    sizes = transformer_config(config)
    frames, (pt, ph, pw) = config.flow.memory.frames_per_chunk, sizes.patch_size
    history = config.flow.memory.num_tokens(height, width, sizes.patch_size)

    pyramid = config.pyramid
    shapes = level_shapes((frames, height, width), 1 if pyramid is None else pyramid.num_levels)
    tokens = [history + (t // pt) * (h // ph) * (w // pw) for t, h, w in shapes]
    return [tokens] if pyramid is None else [[tokens[level] for level in levels] for levels in pyramid.passes()]


def tokens(config: TransformerTrainConfig, batch: dict[str, Any]) -> int:
    """The sum of `sequences` for one sample of `batch`."""
    return sum(map(sum, sequences(config, *batch["anchor"].shape[2:4])))


def program(stage: Stage[Any, Any], state: TrainState, batch: Any, *, backward: bool = True) -> Jaxpr:
    """The loss of one sample of `batch` or, with `backward`, its gradient, traced; the step is its first input.

    The trace is without rematerialization, and frozen parameters have no gradient. `state` and `batch` may be shapes.
    """
    config = stage.config
    if isinstance(config, TransformerTrainConfig):
        stage = type(stage)(dataclasses.replace(config, remat=None))

    def forward(step: Any, params: Any, frozen: Any, batch: Any, keys: Any) -> Any:
        return losses(stage, nnx.merge(state.graph, params, frozen), {**batch, "step": step}, keys)[0]

    def both(step: Any, params: Any, frozen: Any, batch: Any, keys: Any) -> Any:
        return gradients(stage, dataclasses.replace(state, step=step, params=params, frozen=frozen), batch, keys)[1]

    inputs = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (state.step, state.params, state.frozen))
    one = jax.tree.map(lambda x: jax.ShapeDtypeStruct((1, *x.shape[1:]), x.dtype), batch)
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 1))
    with device.compiling_for(_CPU), _quiet(), jax.sharding.use_abstract_mesh(AbstractMesh((), ())):
        return jax.make_jaxpr(both if backward else forward)(*inputs, one, keys).jaxpr


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hides the log lines on the implementations that the models choose: the real step chooses others."""
    log = logging.getLogger("helios_jax.models")
    level = log.level
    log.setLevel(logging.WARNING)
    try:
        yield
    finally:
        log.setLevel(level)


class Meter:
    """Counts tokens, and the model's operations where the peak of the devices is known, over the steps of a report."""

    def __init__(self, stage: Stage[Any, Any], state: TrainState, mesh: Mesh):
        self._stage = stage
        self._state = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state)
        peaks = [chips.peak(one) for one in mesh.devices.flat]
        self._peak = None if None in peaks else sum(filter(None, peaks))
        # (tokens, program) of one sample, by the shapes of its batch: cached, as both read files of the weights' sizes.
        self._known: dict[Any, tuple[int, Jaxpr | None]] = {}
        self._tokens = self._flops = 0

    def add(self, batch: Any, step: int) -> None:
        """Counts the step of this number, from 0, with the global `batch`."""
        shapes = tuple(x.shape for x in jax.tree.leaves(batch))
        if shapes not in self._known:
            traced = None if self._peak is None else program(self._stage, self._state, batch)
            self._known[shapes] = self._stage.tokens(batch) or 0, traced
        samples, (count, traced) = shapes[0][0], self._known[shapes]
        self._tokens += samples * count
        self._flops += 0 if traced is None else samples * flops.count(traced, [np.int32(step)])

    def take(self, seconds: float) -> dict[str, float]:
        """The figures of the steps since the last call, which took `seconds`."""
        tokens, operations = self._tokens, self._flops
        self._tokens = self._flops = 0
        figures = {"tokens_per_second": tokens / seconds} if tokens else {}
        return figures if self._peak is None else {**figures, "mfu": operations / (seconds * self._peak)}
