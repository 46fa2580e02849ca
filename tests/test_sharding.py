"""Rules and meshes, and that eight devices compute what one does. They are CPU ones of another process."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from helios_jax import sharding
from helios_jax.sharding import MeshConfig, check_batch, make_mesh, shardings, spec
from helios_jax.training import loop, optim, run_checkpoints, state
from helios_jax.training.run_config import TrainConfig
from helios_jax.training.train_step import make_step
from tests.closeness import assert_close
from tests.processes import environment
from tests.training import dummy


class FakeMesh:
    def __init__(self, **shape):
        self.shape = {"data": 1, "fsdp": 1, "tensor": 1, "context": 1, **shape}


@pytest.mark.parametrize(
    ("axes", "shape", "expected"),
    [
        (("embed", "mlp"), (16, 64), ("fsdp", "tensor")),
        (("heads", "embed"), (64, 16), ("tensor", "fsdp")),
        (("embed", "mlp"), (40, 16, 64), (None, "fsdp", "tensor")),  # stacked over 40 layers
        (("embed", "mlp"), (6, 64), (None, "tensor")),  # 6 is not divisible by 4
        (("embed",), (16,), (None,)),
        (("mlp",), (64,), ("tensor",)),
        (("embed", "embed"), (16, 16), ("fsdp", None)),  # an axis splits one dimension only
        (("rank", "heads"), (8, 64), ("fsdp", "tensor")),  # an adapter's second matrix
        (("embed", "rank"), (16, 8), ("fsdp", None)),
        ((None, None, "channels", "embed_out"), (3, 3, 8, 8), (None,) * 4),
    ],
)
def test_spec(axes, shape, expected):
    assert spec(axes, shape, FakeMesh(fsdp=4, tensor=2)) == PartitionSpec(*expected)


def test_mesh_that_does_not_fit_says_so():
    assert make_mesh(MeshConfig()).shape["data"] == jax.device_count()
    with pytest.raises(ValueError, match=r"tensor=3.* does not fit"):
        make_mesh(MeshConfig(data=None, tensor=3), jax.devices()[:1])
    with pytest.raises(ValueError, match=r"does not divide .* try 12"):
        check_batch(10, FakeMesh(data=2, fsdp=3))


class Device:
    platform, device_kind = "gpu", "a GPU"

    def __init__(self, host, slice_index=0, number=0):
        self.process_index, self.slice_index, self.id = host, slice_index, number


@pytest.mark.parametrize(
    ("slices", "own", "sizes", "groups"),
    [
        (None, 2, {}, [0] * 4 + [1] * 4),  # as the devices say
        (2, 2, {"fsdp": 2}, [0] * 4 + [1] * 4),
        (4, 2, {}, [0, 0, 1, 1, 2, 2, 3, 3]),  # hosts
        (None, 1, {"data": 2, "fsdp": 4}, None),
        (None, 2, {"data": 1, "fsdp": 8}, None),  # of GPUs, which reach one another
        (1, 2, {"data": 1, "fsdp": 8}, None),  # of GPUs, which reach one another
        (2, 2, {"data": 1, "fsdp": None}, "mesh: data=1 must be a multiple of the 2 slices that split it"),
        (8, 2, {}, "mesh.slices=8, but the devices are 2 slices of 4 hosts: give one of these, or null"),
    ],
)
def test_slices_split_data_outermost(monkeypatch, slices, own, sizes, groups):
    monkeypatch.setattr(sharding, "Mesh", lambda devices, *_, **__: devices)
    devices = [Device(i % 4, i % own, i) for i in range(8)]
    config = MeshConfig(slices=slices, **sizes)
    if isinstance(groups, str):
        with pytest.raises(ValueError, match=re.escape(groups)):
            make_mesh(config, devices)
        return
    laid: Any = make_mesh(config, devices)
    assert {id(device) for device in laid.flat} == {id(device) for device in devices}
    if groups:
        assert [getattr(device, "process_index" if slices == 4 else "slice_index") for device in laid.flat] == groups


def test_slices_of_a_tpu_are_not_one(monkeypatch):
    monkeypatch.setattr(Device, "platform", "tpu")
    with pytest.raises(ValueError, match=r"mesh\.slices=1, but the devices are 2 slices"):
        make_mesh(MeshConfig(slices=1), [Device(i, i) for i in range(2)])


# Optimizers whose state is not like AdamW's.
OTHERS = {"muon": {"name": "muon"}, "prodigy": {"name": "prodigy", "lr": 1.0}}


def train_steps(mesh_config, folder=None, restore_from=None, steps=3, **settings):
    """Losses, gradient norms and the state after a few steps of the dummy stage, and the shardings used."""
    config = TrainConfig(stage="tests.training.dummy.Dummy", steps=steps, mesh=mesh_config, precision="float32")
    config.data.batch_size, config.optim = 16, optim.OptimConfig(**{"lr": 1e-2, **settings})
    mesh, stage = make_mesh(config.mesh), dummy.Dummy(config)
    optimizer = optim.make_optimizer(config.optim, config.steps)
    with jax.set_mesh(mesh):
        made = state.init_sharded(stage.init, jax.random.key(0), optimizer, config.optim.ema, mesh)
        batches, seed_key, metrics = stage.batches(mesh), jax.random.key(config.seed), []
        if restore_from:
            made, position, _ = run_checkpoints.Checkpoints(restore_from, 1).restore(state.abstract_like(made))
            batches.set_state(position)
        split = list(made.model.up.weight[...].sharding.spec)
        moments = [list(x.sharding.spec) for x in jax.tree.leaves(made.opt_state) if x.shape == (16, 64)]
        step = make_step(stage, optimizer, made, mesh)
        for _ in range(int(made.step), steps):
            made, m = step(made, loop.put_batch(loop.split_ids(next(batches))[0], 16, mesh), seed_key)
            metrics.append([float(m["loss"]), float(m["grad_norm"])])
        if folder:
            checkpoints = run_checkpoints.Checkpoints(folder, 1)
            checkpoints.save(made, batches.get_state(), config)
            checkpoints.close()
    weight = np.asarray(made.model.up.weight[...]).tolist()
    sizes = [float(np.abs(np.asarray(x)).sum()) for x in jax.tree.leaves(made.opt_state)]
    return {"metrics": metrics, "weight": weight, "split": split, "moments": moments, "sizes": sizes}


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """(`train_steps` on one device with AdamW and the other optimizers, the folder of their checkpoints)."""
    folder = tmp_path_factory.mktemp("one")
    found = {name: train_steps(MeshConfig(), folder / name, steps=2, **OTHERS[name]) for name in OTHERS}
    return {"adamw": train_steps(MeshConfig(), folder / "adamw", steps=3), **found}, folder


@pytest.fixture(scope="module")
def eight(one):
    """`train_steps` in a process with eight devices, through the file it writes."""
    out = one[1] / "out.json"
    subprocess.run([sys.executable, __file__, str(out), str(one[1])], env=environment(devices=8), check=True)
    return json.loads(out.read_text())


@pytest.mark.parametrize("name", OTHERS)
def test_the_state_of_an_optimizer_is_split_saved_and_restored(one, eight, name):
    for found in (eight[name], eight[f"{name} restored"]):
        assert found["moments"] == [["fsdp", "tensor"]] * {"muon": 1, "prodigy": 4}[name]
        for part in ("weight", "sizes"):
            assert_close(np.array(found[part]), np.array(one[0][name][part]), ulps=200)
    assert_close(np.array(eight[name]["metrics"]), np.array(one[0][name]["metrics"]))


def test_eight_devices_compute_what_one_does_and_checkpoints_cross_meshes(one, eight):
    one, longer = one[0]["adamw"], train_steps(MeshConfig(), steps=5)
    assert eight["plain"]["split"] == ["fsdp", "tensor"]
    assert eight["plain"]["moments"] == [eight["plain"]["split"]] * 2
    assert_close(*(np.array(found["metrics"]) for found in (eight["plain"], one)))
    assert_close(*(np.array(found["weight"]) for found in (eight["plain"], one)))
    # Steps 4 and 5 on another mesh, from the checkpoint that one device wrote.
    assert eight["restored"]["split"] == ["fsdp", "tensor"]  # a mesh axis of one device
    assert_close(np.array(eight["restored"]["metrics"]), np.array(longer["metrics"][3:]))


def test_shardings_has_the_structure_of_the_state():
    config = TrainConfig(stage="tests.training.dummy.Dummy")
    optimizer = optim.make_optimizer(config.optim, 1)
    abstract = jax.eval_shape(lambda k: state.create(dummy.Dummy(config).init(k), optimizer, None), jax.random.key(0))
    placed = shardings(abstract, make_mesh(MeshConfig()))
    assert jax.tree.structure(placed) == jax.tree.structure(abstract)


if __name__ == "__main__":
    saved = Path(sys.argv[2])
    results = {
        "plain": train_steps(MeshConfig(data=None, fsdp=2, tensor=2)),
        "restored": train_steps(MeshConfig(data=None, fsdp=8), restore_from=saved / "adamw", steps=5),
    }
    for name, settings in OTHERS.items():
        results[name] = train_steps(MeshConfig(data=None, fsdp=2, tensor=2), steps=2, **settings)
        of_one = {"restore_from": saved / name, "steps": 2, **settings}
        results[f"{name} restored"] = train_steps(MeshConfig(data=None, fsdp=8), **of_one)
    Path(sys.argv[1]).write_text(json.dumps(results))
