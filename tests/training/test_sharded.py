"""Eight devices step as one does in every stage, and checkpoints go from one mesh to another.

The devices are CPU ones of another process. A step of gradient descent at rate 1 shows the gradient.
"""

import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import optax
import pytest

from helios_jax.sharding import make_mesh, put_batch
from helios_jax.training import loop
from helios_jax.training.run_checkpoints import Checkpoints
from helios_jax.training.stage import Stage
from helios_jax.training.stage_table import load_config, make_stage
from helios_jax.training.state import abstract_like, init_sharded
from helios_jax.training.train_step import make_step
from tests.closeness import assert_close
from tests.processes import environment
from tests.training import recipe

STAGES = ("stage1_init", "stage2_init", "stage3_ode", "stage3_gan")
ONE = ("mesh.data=1", "mesh.fsdp=1", "mesh.tensor=1")
EIGHT = ("mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2")
FAST = "jax_disable_most_optimizations"
OTHER = ("mesh.data=1", "mesh.fsdp=8", "mesh.tensor=1")


def prepared(stage: str, root: Path, mesh: tuple[str, ...]):
    """(stage, mesh), but for the largest program with batches in two parts."""
    flags = ["data.batch_size=8", f"optim.accumulate={1 if stage == 'stage3_gan' else 2}", *mesh]
    if stage == "stage3_gan":
        # Group norms of two values would be their signs, and a penalty the difference of what is nearly equal: neither
        # has a gradient to 2e-4 in float32, on one device or on eight.
        flags += ["distill.gan.discriminator.dim=128", "distill.gan.r1={weight: 0.1, sigma: 1.0}"]
    argv = recipe.arguments(stage, root, root / "none", *flags)
    config = load_config(argv[0], argv[1:])
    return make_stage(config), make_mesh(config.mesh, jax.devices()[: 1 if mesh == ONE else None])


def begin(stage: Stage, mesh):
    key, sgd, config = jax.random.key(0), optax.sgd(1.0), stage.config
    state = init_sharded(stage.init, key, sgd, config.optim.ema, mesh, stage.load, config.trainable, config.precision)
    return state, sgd


def step(name: str, root: Path, mesh: tuple[str, ...], folder: Path | None = None) -> dict[str, np.ndarray]:
    """Metrics, the first state, the second and the change, by name; with `folder` a checkpoint of the second."""
    stage, laid = prepared(name, root, mesh)
    with jax.set_mesh(laid):
        state, optimizer = begin(stage, laid)
        before = recipe.host(state.params)
        batches = stage.batches(laid)
        batch, _ = loop.split_ids(next(batches))
        run = make_step(stage, optimizer, state, laid)
        fast = jax.config.read(FAST)
        if name == "stage3_gan":  # slow convolutions would take longer than their compilation
            jax.config.update(FAST, False)
        state, metrics = run(
            state, put_batch(batch, stage.config.data.batch_size, laid), jax.random.key(stage.config.seed)
        )
        jax.config.update(FAST, fast)
        if folder is not None:
            checkpoints = Checkpoints(folder, 1)
            checkpoints.save(state, batches.get_state(), stage.config)
            checkpoints.close()
    out = {f"metric/{name}": np.divide(*x) if isinstance(x, tuple) else np.asarray(x) for name, x in metrics.items()}
    for (path, a), b in zip(jax.tree.leaves_with_path(before), jax.tree.leaves(state.params), strict=True):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        out |= {f"begin/{name}": a, f"change/{name}": np.asarray(b) - a, f"end/{name}": np.asarray(b)}
    return out


def restored(name: str, root: Path, mesh: tuple[str, ...], folder: Path) -> dict[str, np.ndarray]:
    """The parameters of a checkpoint on another mesh."""
    stage, laid = prepared(name, root, mesh)
    with jax.set_mesh(laid):
        state, _, _ = Checkpoints(folder, 1).restore(abstract_like(begin(stage, laid)[0]))
        assert int(state.step) == 1
        split = {len(x.sharding.device_set) for x in jax.tree.leaves(state.params)}
        assert split == {laid.size}
    leaves = jax.tree.leaves_with_path(state.params)
    return {f"restored/{jax.tree_util.keystr(path, simple=True, separator='/')}": np.asarray(x) for path, x in leaves}


@pytest.mark.heavy
@pytest.mark.parametrize("stage", STAGES)
def test_eight_devices_step_as_one_does(stage, tmp_path):
    recipe.build(tmp_path)
    # A collective blocks the thread that waits in it: with a thread a device, devices that take two independent ones in
    # another order wait for one another for ever.
    settings = {**environment(devices=8), "NPROC": "64"}
    subprocess.run([sys.executable, __file__, str(tmp_path), stage], env=settings, check=True)
    one, eight = (dict(np.load(tmp_path / f"{stage}-{name}.npz")) for name in ("one", "eight"))
    for name, x in one.items():
        if name.startswith("begin/"):
            np.testing.assert_array_equal(eight[name], x, err_msg=name)
        elif name.startswith("metric/"):
            assert_close({name: eight[name]}, {name: x}, ulps=200)
        elif name.startswith("change/"):  # has the roundings of the parameter, which is far larger, or of penalties
            assert_close({name: eight[name]}, {name: x}, ulps=1500)
    parts = ("generator", "score", "discriminator") if stage == "stage3_gan" else ("",)
    for part in parts:
        assert max(np.abs(x).max() for name, x in one.items() if name.startswith(f"change/{part}")) > 1e-4, part
    read = {name.removeprefix("restored/"): x for name, x in eight.items() if name.startswith("restored/")}
    assert read.keys() == {name.removeprefix("begin/") for name in one if name.startswith("begin/")}
    for name, x in read.items():
        np.testing.assert_array_equal(x, eight[f"end/{name}"], err_msg=name)


if __name__ == "__main__":
    root = Path(sys.argv[1])
    for stage in sys.argv[2:]:
        folder = root / f"{stage}-checkpoints"
        np.savez(root / f"{stage}-one.npz", **step(stage, root, ONE))
        made = step(stage, root, EIGHT, folder)
        np.savez(root / f"{stage}-eight.npz", **made, **restored(stage, root, OTHER, folder))
