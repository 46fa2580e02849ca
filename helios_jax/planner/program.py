"""The training step of a config, traced on shapes: its batch, state and operations, and the program for a machine.

The step is the one that train.py runs. The compiler settles a program's memory before it generates instructions, which
takes most of the time. So instructions are generated with little effort unless all effort is asked for. This is a few
times faster, and the peak of memory comes out 1 to 5% lower, because all effort prefetches more.
"""

import dataclasses
import math
import os
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh

from helios_jax import pretrained
from helios_jax.config import ConfigError
from helios_jax.diffusion.pyramid import level_shapes
from helios_jax.locations import is_remote
from helios_jax.models.transformer import TransformerConfig
from helios_jax.planner.stand_ins import existing
from helios_jax.runtime import flops
from helios_jax.runtime.offload import HOST
from helios_jax.sharding import batch_sharding
from helios_jax.training import work
from helios_jax.training.flow_config import TransformerTrainConfig
from helios_jax.training.stage_table import load_config, make_stage
from helios_jax.training.stages.distill.distill_config import DistillTrainConfig
from helios_jax.training.stages.distill.players import score_config
from helios_jax.training.stages.ode import ODETrainConfig
from helios_jax.training.start import transformer_config
from helios_jax.training.state import TrainState, create, placed
from helios_jax.training.train_step import make_step
from helios_jax.training.trainable import check, settle_dtypes
from pallas_kernels.core import device

LITTLE = {"xla_optimization_level": "EFFORT_O1"}
LATENTS = (48, 80)  # of 384 x 640 pixels
TEXT = 512  # tokens of a caption


def open_config(path: str, overrides: Sequence[str]) -> TransformerTrainConfig:
    """The config at `path`, with the sizes of the released 14B model unless it gives others itself.

    It gives them as model.transformer, or as an `init` that is a folder here. Scores whose weights are not here have
    the student's sizes. Raises ConfigError for one that cannot be read, and for a stage without a transformer.
    """
    config = load_config(path, overrides)
    if not isinstance(config, TransformerTrainConfig):
        raise ConfigError(f"{path}: the stage {config.stage} has no transformer; give a config that trains one")
    sizes = transformer_config(config) if config.model.transformer or _is_here(config) else TransformerConfig()
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, transformer=sizes))
    if isinstance(config, DistillTrainConfig):
        adapters = tuple(existing(text, sizes, config.lora) for text in config.distill.score.adapters)
        score = dataclasses.replace(config.distill.score, adapters=adapters)
        if score.init is not None and not _is_here(score_config(config)):
            score = dataclasses.replace(score, init=_folder_of(sizes).name)
        return dataclasses.replace(config, distill=dataclasses.replace(config.distill, score=score))
    return config


def _is_here(config: TransformerTrainConfig) -> bool:
    """True where `init` names a folder with a model's config.json: nothing is downloaded for a plan."""
    if config.init is None or is_remote(config.init):
        return False
    folder = pretrained.local(config.init)
    return any(os.path.isfile(part / "config.json") for part in (folder, folder / config.init_subfolder))


@cache
def _folder_of(sizes: TransformerConfig) -> tempfile.TemporaryDirectory[str]:
    """A folder that has the config.json of a model and no weights, as long as the process lives: for the scores."""
    folder = tempfile.TemporaryDirectory()
    pretrained.write_config(sizes, Path(folder.name))
    return folder


def batch(config: TransformerTrainConfig, mesh: Mesh | AbstractMesh | None = None) -> dict[str, Any]:
    """The shapes of a batch of the stages flow, ode and distill, with shardings where there is a mesh."""
    past, sizes, (h, w) = config.flow.memory, transformer_config(config), LATENTS
    t, c = past.frames_per_chunk, sizes.in_channels
    sharding = None if mesh is None else batch_sharding(mesh)

    def shape(*sizes: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((config.data.batch_size, *sizes), dtype, sharding=sharding)

    text = shape(TEXT, sizes.text_dim)
    seen = {"history": shape(past.frames, h, w, c), "anchor": shape(1, h, w, c), "chunk": shape(dtype=jnp.int32)}
    if isinstance(config, ODETrainConfig):
        levels = [shape(*sizes) for sizes in level_shapes((t, h, w, c), config.pyramid.num_levels)]
        times = [shape() for _ in levels]
        return {**seen, "text": text, "noisy": levels, "target": levels, "timestep": times, "sigma": times}
    chunks = 1
    more = {}
    if isinstance(config, DistillTrainConfig):
        chunks, more = config.distill.rollout.largest, {"negative": text}
    return {**seen, "text": text, "target": shape(chunks * t, h, w, c), **more}


def transformers(config: TransformerTrainConfig) -> list[TransformerTrainConfig]:
    """The config of each transformer of the step: the trained one, and in stage 3 the scores' where it is another."""
    if isinstance(config, DistillTrainConfig) and config.distill.score.init is not None:
        return [config, score_config(config)]
    return [config]


def abstract_state(config: TransformerTrainConfig) -> TrainState:
    """The train state as shapes, without a mesh. Raises ConfigError for names that train nothing."""
    stage = make_stage(config)

    def make(key: jax.Array) -> Any:
        return settle_dtypes(stage.init(key), config.trainable, jnp.dtype(config.precision))

    model = jax.eval_shape(make, jax.eval_shape(jax.random.key, 0))
    check(model, config.trainable)
    return jax.eval_shape(
        lambda model: create(model, stage.make_optimizer(), config.optim.ema, config.trainable), model
    )


def compiled(config: TransformerTrainConfig, state: TrainState, mesh: Mesh, *, all_effort: bool = False) -> Any:
    """The training step of `config` (`jax.stages.Compiled`) for the devices of `mesh`.

    Passes on the compiler's RESOURCE_EXHAUSTED for a step that does not fit.
    """
    stage = make_stage(config)
    first = mesh.devices.flat[0]
    options: dict[str, Any] = {} if all_effort or first.platform != "tpu" else dict(LITTLE)
    with jax.set_mesh(mesh), device.compiling_for(first):
        given = placed(state, mesh, config.optim.offload)
        step: Any = make_step(stage, stage.make_optimizer(), given, mesh)
        key = jax.eval_shape(jax.random.key, config.seed)
        return step.lower(given, batch(config, mesh), key).compile(options)


def model_flops(config: TransformerTrainConfig) -> tuple[int, int]:
    """Operations of the products that one sample needs, without rematerialization: (forward and backward, forward).

    Of a conditional the branch with the most operations counts, such as a step in which stage 3's generator learns. A
    loop of random length, such as the one over the chunks of a rollout, counts once.
    """
    one = with_settings(config, batch_size=1, accumulate=1)
    stage, state = make_stage(one), abstract_state(one)
    both, forward = (flops.count(work.program(stage, state, batch(one), backward=back)) for back in (True, False))
    return both, forward


def with_settings(
    config: TransformerTrainConfig, *, batch_size: int | None = None, accumulate: int | None = None, **settings: Any
) -> TransformerTrainConfig:
    """`config` with other settings: of the batch and its parts where they are given, and of top-level fields."""
    return dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, batch_size=batch_size or config.data.batch_size),
        optim=dataclasses.replace(config.optim, accumulate=accumulate or config.optim.accumulate),
        **settings,
    )


def bytes_on_each(tree: Any) -> int:
    """Bytes of a tree of shapes with shardings in one device's own memory."""
    own = (x for x in jax.tree.leaves(tree) if x.sharding.memory_kind != HOST)
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in own)
