"""Loss and gradients of every stage over each axis of the mesh, alone and together, are those of one device.

The devices are CPU ones of another process. No axis divides the numbers of tokens: 13 of history, 36 and 9 noisy ones.
"""

import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import pytest

from helios_jax.models.transformer import TransformerConfig
from helios_jax.sharding import make_mesh, put_batch, shardings
from helios_jax.training.loop import split_ids
from helios_jax.training.stage_table import load_config, make_stage
from helios_jax.training.state import create
from helios_jax.training.train_step import gradients as step_gradients
from tests.processes import environment
from tests.training import recipe

SIZES = TransformerConfig(
    num_attention_heads=4,  # over tensor and context
    attention_head_dim=8,
    in_channels=4,
    out_channels=4,
    text_dim=16,
    freq_dim=32,
    ffn_dim=48,
    num_layers=2,
    rope_dim=(4, 2, 2),
    is_amplify_history=True,
)
SIDE = 4  # of the latents
RING = {"context_attention": "ring"}
MESHES: dict[str, dict[str, Any]] = {
    "one": {},
    "data": {"data": 2},
    "fsdp": {"fsdp": 2},
    "tensor": {"tensor": 2},
    "ulysses": {"context": 2},
    "ring": {"context": 2, **RING},
    "fsdp, tensor, ulysses": {"fsdp": 2, "tensor": 2, "context": 2},
    "data, tensor, ring": {"data": 2, "tensor": 2, "context": 2, **RING},
    "fsdp, ulysses of 4": {"fsdp": 2, "context": 4},
    "fsdp, ring of 4": {"fsdp": 2, "context": 4, **RING},
    "ring of 8": {"context": 8, **RING},  # the last device has no tokens at all
}
STAGES = ("stage1_init", "stage2_init", "stage3_ode", "stage3_post")
# Each takes 8 to 30 seconds, so that all are heavy but these, which have every axis.
QUICK = {
    "stage1_init": ("one", "fsdp, tensor, ulysses"),
    "stage2_init": ("one", "data, tensor, ring"),
}


def gradients(name: str, root: Path, sizes: dict[str, Any]) -> dict[str, np.ndarray]:
    """The loss and the gradient of each parameter, by name."""
    trained = "generator,adapters" if name == "stage3_post" else "all"
    flags = ["lora=null", f"trainable=[{trained}]", "mesh.data=1", *(f"mesh.{k}={value}" for k, value in sizes.items())]
    if name.startswith(("stage1", "stage2")):
        flags += ["flow.corruption=null", "flow.drop=null"]  # half of the program
    argv = recipe.arguments(name, root, root / "none", *flags)
    config = load_config(argv[0], argv[1:])
    stage: Any = make_stage(config)
    count = int(np.prod([size for key, size in sizes.items() if key not in RING], dtype=int))
    mesh = make_mesh(config.mesh, jax.devices()[:count])
    with jax.set_mesh(mesh):
        abstract = jax.eval_shape(stage.init, jax.random.key(0))
        model = stage.load(abstract, shardings(abstract, mesh))
        batch = put_batch(split_ids(next(stage.batches(mesh)))[0], config.data.batch_size, mesh)
        keys = jax.random.split(jax.random.key(1), config.data.batch_size)

        state = create(model, optax.sgd(1.0), None, config.trainable)
        (loss, _), grads = jax.jit(partial(step_gradients, stage))(state, batch, keys)
    named = (
        (jax.tree_util.keystr(path, simple=True, separator="/"), x) for path, x in jax.tree.leaves_with_path(grads)
    )
    return {"loss": loss} | {name: np.asarray(x) for name, x in named}


def check(stage: str, root: Path, meshes: tuple[str, ...]) -> None:
    """All of `meshes` give the loss and the gradients of the first one, which has one device."""
    one, *others = (dict(np.load(root / f"{stage}, {mesh}.npz")) for mesh in meshes)
    loss = one.pop("loss")
    assert np.isfinite(loss)
    size = np.sqrt(sum(np.linalg.norm(x) ** 2 for x in one.values()))
    assert size > 0
    for mesh, got in zip(meshes[1:], others, strict=True):
        assert abs(got.pop("loss") - loss) <= 1e-5 * abs(loss), f"{stage}, {mesh}: the loss"
        apart = {name: np.linalg.norm(got[name].astype(float) - x) for name, x in one.items()}
        assert np.sqrt(sum(x**2 for x in apart.values())) <= 1e-5 * size, f"{stage}, {mesh}: the gradient"
        for name, x in one.items():  # those that are small have the roundings of larger ones
            assert apart[name] <= 5e-5 * max(np.linalg.norm(x), 1e-3 * size), f"{stage}, {mesh}: {name}"


def compute(root: Path, cases: dict[str, tuple[str, ...]]) -> None:
    """Writes `gradients` of these stages on these meshes into `root`, from a process with eight devices."""
    recipe.build(root, SIZES, SIDE)
    # A collective blocks the thread that waits in it: with a thread a device, devices that take two independent ones in
    # another order wait for one another for ever.
    settings = {**environment(devices=8), "NPROC": "64"}
    names = [f"{stage}, {mesh}" for stage, meshes in cases.items() for mesh in meshes]
    subprocess.run([sys.executable, __file__, str(root), *names], env=settings, check=True)


@pytest.mark.slow
def test_axes_compute_what_one_device_does(tmp_path):
    compute(tmp_path, QUICK)
    for stage, meshes in QUICK.items():
        check(stage, tmp_path, meshes)


@pytest.mark.heavy
@pytest.mark.parametrize("stage", STAGES)
def test_all_axes_compute_what_one_device_does(stage, tmp_path):
    compute(tmp_path, {stage: tuple(MESHES)})
    check(stage, tmp_path, tuple(MESHES))


if __name__ == "__main__":
    for case in sys.argv[2:]:
        stage, _, mesh = case.partition(", ")
        np.savez(Path(sys.argv[1]) / f"{case}.npz", **gradients(stage, Path(sys.argv[1]), MESHES[mesh]))
