"""Stage 3, first part: the student learns the ends of the teacher's ODE trajectories (paper section 3.5).

A batch holds lists over the levels, coarsest first: `noisy` [b, t, h_i, w_i, c], where one of the student's steps
begins, `target` of the same shape, the teacher's result from there, `timestep` and `sigma` [b]; and `history`,
`anchor`, `chunk` and `text` of the chunk. `python -m helios_jax.precompute ode` makes them from a Mid checkpoint. The
loss is upstream's _ode_regression_loss; a sample is one chunk where upstream takes three of a video.
"""

# pyright: reportIncompatibleVariableOverride=false
# A run never replaces a part of its config, so narrower types are safe.

from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Key

from helios_jax.config import ConfigError, require, to_dict
from helios_jax.data.loader import ode_transform
from helios_jax.diffusion.distillation import ode_loss
from helios_jax.diffusion.memory import History
from helios_jax.diffusion.pyramid import level_shapes
from helios_jax.models.transformer import Transformer
from helios_jax.training.flow_config import PackedPyramidConfig, StudentConfig, StudentFlowConfig, StudentTrainConfig
from helios_jax.training.lineage import check_init
from helios_jax.training.stage import Batches, Metrics, host_batches
from helios_jax.training.stages.flow import check_size, text_field
from helios_jax.training.stages.model_inputs import make_context, velocities
from helios_jax.training.stages.transformer_stage import TransformerStage
from helios_jax.training.start import transformer_config
from helios_jax.training.training_data import TEXT, Axis, Field, check_record, made_with, one_of_each, open_records
from helios_jax.training.validation import check_validation

MAKE = "python -m helios_jax.precompute ode --help"


@dataclass
class ODEFlowConfig(StudentFlowConfig):
    """Settings under `flow`: the history, its captions and times are the trajectories'."""

    pyramid: PackedPyramidConfig = field(default_factory=PackedPyramidConfig)


@dataclass
class ODEConfig(StudentConfig):
    """Stage 3, first part: `ode_weight` is the factor of the loss."""

    ode_weight: float = 80.0

    def __post_init__(self):
        super().__post_init__()
        require(self.ode_weight > 0, f"ode_weight must be above 0, got {self.ode_weight}")


@dataclass
class ODETrainConfig(StudentTrainConfig):
    """A run of stage 3, first part."""

    stage: str = "ode"
    flow: ODEFlowConfig = field(default_factory=ODEFlowConfig)
    distill: ODEConfig = field(default_factory=ODEConfig)


class ODEStage(TransformerStage[ODETrainConfig]):
    """Regression of the student on the ends of the teacher's trajectories."""

    Config = ODETrainConfig

    def batches(self, mesh: Mesh) -> Batches:
        """Random chunks of the teacher's videos, with one step of each level; this host's rows of each batch.

        Raises ConfigError for data or components that are not there or do not fit.
        """
        config = self.config
        check_validation(config)
        check_init(config)
        source = open_records(config.data, MAKE)
        _check_settings(config)
        for example in one_of_each(source):
            _check(example, config)

        def transform(example, rng):
            example = ode_transform(example, rng)
            names = ("noisy", "target", "timestep", "sigma", "history", "anchor", "text")
            arrays = jax.tree.map(lambda x: np.asarray(x, np.float32), {name: example[name] for name in names})
            return {**arrays, "chunk": example["chunk"], "id": example["id"]}

        return host_batches(source, transform, config.data, mesh)

    def loss(
        self, model: Transformer, batch: dict[str, Any], keys: Key[Array, " b"]
    ) -> tuple[Float[Array, ""], Metrics]:
        """`ode_weight` times the mean over levels of half the squared error of the trajectory's end."""
        config, distill = self.config, self.config.distill
        history = History(batch["history"], batch["anchor"], jnp.asarray(True), batch["chunk"])
        context = make_context(model, history, batch["text"], config)
        packed = config.flow.pyramid.levels == "packed"
        predicted = velocities(model, batch["noisy"], batch["timestep"], context, config, packed=packed)
        errors = [
            ode_loss(*args) for args in zip(batch["noisy"], predicted, batch["target"], batch["sigma"], strict=True)
        ]
        metrics = {f"loss_level_{i}": (error.sum(), jnp.asarray(error.size)) for i, error in enumerate(errors)}
        return distill.ode_weight * jnp.stack(errors).mean(), metrics


def _check_settings(config: ODETrainConfig) -> None:
    """Raises ConfigError, in one line, for pairs that were made for another student than the run's."""
    made, distill, pyramid = made_with(config.data), config.distill, config.pyramid
    if "settings" not in made:
        return
    theirs = made["settings"]
    wanted: list[tuple[str, Any, Any]] = [
        ("distill.steps", list(distill.steps), theirs["student_steps"]),
        ("distill.amplify_first_chunk", distill.amplify_first_chunk, theirs["amplify_first_chunk"]),
        ("distill.shift", distill.shift, theirs["time_shift_type"]),
    ]
    if "memory" in made:
        memory = to_dict(config.flow.memory)
        wanted += [(f"flow.memory.{name}", memory[name], value) for name, value in made["memory"].items()]
    if "levels" in made:
        levels = {"stage_range": list(pyramid.stage_range), "gamma": pyramid.gamma}
        wanted += [(f"flow.pyramid.{name}", levels[name], value) for name, value in made["levels"].items()]
    for name, ours, value in wanted:
        if not _same(ours, value):
            raise ConfigError(
                f"data.folder: {config.data.folder} holds pairs for {name} {value}, this run has {ours}; "
                f"set {name}, or make pairs for it with `{MAKE}`"
            )


def _same(ours: Any, theirs: Any) -> bool:
    """Equality, but for the last digits of numbers in a list."""
    if isinstance(ours, list) and isinstance(theirs, list):
        return len(ours) == len(theirs) and np.allclose(ours, theirs)
    return ours == theirs


def _check(example: dict[str, Any], config: ODETrainConfig) -> None:
    """Raises ConfigError for pairs of other levels, chunks, sizes or channels than the run asks for."""
    levels = sum(key.startswith("latents_") for key in example)
    memory, folder = config.flow.memory, config.data.folder
    if levels != len(config.distill.steps):
        made = "holds no ODE pairs" if not levels else f"has pairs of {levels} levels"
        raise ConfigError(
            f"data.folder: {folder} {made}, distill.steps {list(config.distill.steps)} asks for "
            f"{len(config.distill.steps)}; make it with `{MAKE}`"
        )
    model = transformer_config(config)
    channels = Axis("channels", model.in_channels, "in_channels of the transformer")
    history = Field((Axis("frames", memory.frames, "flow.memory"), Axis("rows"), Axis("columns"), channels))
    check_record(example, {"history": history}, config.data, MAKE)
    size = example["history"].shape[1:3]
    check_size(size, config)

    def at(rows: int, columns: int) -> tuple[Axis, Axis]:
        return Axis("rows", rows, "as the history has"), Axis("columns", columns, "as the history has")

    anchor = Field((Axis("frames", 1), *at(*size), channels))
    fields = {"anchor": anchor, "chunk": Field(kind=np.integer), "text": text_field(model), "id": TEXT}
    per_chunk = Axis("frames a chunk", memory.frames_per_chunk, "flow.memory.frames_per_chunk")
    for i, (_, rows, columns) in enumerate(level_shapes((memory.frames_per_chunk, *size), levels)):
        sizes = per_chunk, *at(rows, columns), channels
        fields[f"latents_{i}"] = Field((Axis("steps", 2, or_more=True), *sizes))
        steps = Axis("steps", len(example[f"latents_{i}"]) - 1, f"one fewer than latents_{i} has")
        fields |= {f"timesteps_{i}": Field((steps,)), f"sigmas_{i}": Field((steps,))}
    check_record(example, fields, config.data, MAKE)
