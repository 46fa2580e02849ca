"""Compiles the 14B training steps for a TPU pod that is not here, and prints what they need of each chip.

    python -m helios_jax.benchmarks.aot_training                                # all but stage3_gan for v5p:4x4x4
    python -m helios_jax.benchmarks.aot_training configs/stage3_gan.yaml --topology v5p:4x4x4 mesh.tensor=2

The step is the one that train.py runs, on shapes in place of arrays: nothing of the model is made. Needs libtpu (the
environment of `make aot`) and no TPU. Exits with 1 when a step does not fit the memory of a chip.

A program's memory is settled before its instructions are made, which takes most of the time. They are made with little
effort here, in a fraction of it; the peak comes out 1 to 5% lower than with all effort, which fetches more ahead.
"""

import argparse
import contextlib
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from helios_jax import pretrained
from helios_jax.models.transformer import TransformerConfig
from helios_jax.runtime import aot
from helios_jax.sharding import batch_sharding, make_mesh
from helios_jax.training import loop
from helios_jax.training.flow_config import FlowTrainConfig
from helios_jax.training.stage_table import load_config, make_stage
from helios_jax.training.stages.distill.distill_config import DistillTrainConfig
from helios_jax.training.stages.ode import ODETrainConfig
from helios_jax.training.state import abstract
from pallas_kernels.core import device

# Without stage3_gan.yaml, which takes one core six minutes; the others take it one to three.
CONFIGS = tuple(f"configs/{name}.yaml" for name in ("stage1_init", "stage2_init", "stage3_ode", "stage3_post"))
OPTIONS = {"xla_optimization_level": "EFFORT_O1"}
TOPOLOGY = "v5p:4x4x4"
# Bytes of a chip's memory that programs may use.
MEMORY = {"v5p": 95e9, "v5e": 16e9, "v6e": 31e9}
LATENTS = (48, 80)  # of 384 x 640 pixels
TEXT = 512  # tokens of a caption


def compiled(config: FlowTrainConfig, mesh: Mesh) -> Any:
    """The training step of `config` (`jax.stages.Compiled`) for the devices of `mesh`."""
    stage = make_stage(config)
    optimizer = stage.make_optimizer()
    with jax.set_mesh(mesh), device.compiling_for(mesh.devices.flat[0]):
        state = abstract(
            stage.init,
            jax.eval_shape(jax.random.key, 0),
            optimizer,
            config.optim.ema,
            mesh,
            config.trainable,
            config.precision,
        )
        step: Any = loop.make_step(stage, optimizer, state, mesh)
        return step.lower(state, batch(config, mesh), jax.eval_shape(jax.random.key, config.seed)).compile(OPTIONS)


def batch(config: FlowTrainConfig, mesh: Mesh) -> dict[str, Any]:
    """The shapes of a batch of the stages flow, ode and distill."""
    memory, sizes, (h, w) = config.flow.memory, TransformerConfig(), LATENTS
    t, c = memory.frames_per_chunk, sizes.in_channels
    sharding = batch_sharding(mesh)

    def shape(*sizes: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((config.data.batch_size, *sizes), dtype, sharding=sharding)

    text = shape(TEXT, sizes.text_dim)
    past = {"history": shape(memory.frames, h, w, c), "anchor": shape(1, h, w, c), "chunk": shape(dtype=jnp.int32)}
    if isinstance(config, ODETrainConfig):
        downs = range(len(config.distill.steps))[::-1]
        levels = [shape(t, h >> down, w >> down, c) for down in downs]
        times = [shape() for _ in downs]
        return {**past, "text": text, "noisy": levels, "target": levels, "timestep": times, "sigma": times}
    chunks = 1
    more = {}
    if isinstance(config, DistillTrainConfig):
        chunks, more = config.distill.rollout.largest, {"negative": text}
    return {**past, "text": text, "target": shape(chunks * t, h, w, c), **more}


@contextlib.contextmanager
def released_sizes() -> Iterator[Path]:
    """A folder to start from that has the 14B model's config.json and no weights."""
    with tempfile.TemporaryDirectory() as folder:
        pretrained.write_config(TransformerConfig(), Path(folder) / "transformer")
        yield Path(folder)


def main(argv: Sequence[str] | None = None) -> int:
    """Parses the command line, compiles and prints; returns the exit code."""
    parser = argparse.ArgumentParser(description="Compile the 14B training steps for a TPU pod that is not here.")
    parser.add_argument("configs", nargs="*", help=f"YAML files and key=value overrides (default: {' '.join(CONFIGS)})")
    parser.add_argument("--topology", default=TOPOLOGY, help="of the pod")
    args = parser.parse_args(argv)
    overrides = [name for name in args.configs if "=" in name]
    paths = [name for name in args.configs if "=" not in name] or CONFIGS
    room = MEMORY[args.topology.partition(":")[0]]
    devices = aot.tpu_topology(args.topology).devices
    fits = True
    print(f"{args.topology}: {len(devices)} chips of {room / 1e9:.0f} GB", flush=True)
    print(f"{'step':26} {'arguments':>10} {'temporaries':>12} {'peak':>9} {'compiled in':>12}  mesh", flush=True)
    with released_sizes() as folder:
        for path in paths:
            start = [f"init={folder}"]
            if isinstance(load_config(path), DistillTrainConfig):
                start.append(f"distill.score.init={folder}")
            config = load_config(path, [*overrides, *start, "init_subfolder=transformer"])
            if not isinstance(config, FlowTrainConfig):
                raise SystemExit(f"{path}: the stage {config.stage} has no transformer; give a config that trains one")
            mesh, begin = make_mesh(config.mesh, devices), time.monotonic()
            shape = " x ".join(f"{name} {size}" for name, size in mesh.shape.items() if size > 1)
            name = Path(path).stem
            try:
                needed = aot.memory(compiled(config, mesh))
            except jax.errors.JaxRuntimeError as error:
                if "RESOURCE_EXHAUSTED" not in str(error):
                    raise
                fits = False
                print(f"{name:26} does not fit: {str(error).splitlines()[0]}", flush=True)
                continue
            fits = fits and needed.peak <= room
            figures = f"{needed.arguments / 1e9:7.2f} GB {needed.temporaries / 1e9:9.2f} GB {needed.peak / 1e9:6.2f} GB"
            print(f"{name:26} {figures} {time.monotonic() - begin:10.0f} s  {shape}", flush=True)
    return 0 if fits else 1


if __name__ == "__main__":
    sys.exit(main())
