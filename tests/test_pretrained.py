"""Weights go from files to shards and back: the same values however they are placed, and little host memory."""

import dataclasses
import json
import re
import socket
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from helios_jax.models.layers import Shapes
from helios_jax.models.transformer import Transformer
from helios_jax.models.umt5 import UMT5Config, UMT5Encoder
from helios_jax.models.vae import AutoencoderKLWan
from helios_jax.pretrained import (
    CheckpointError,
    check_weights,
    files,
    load,
    load_model,
    save,
    save_model,
    to_arrays,
)
from helios_jax.sharding import MeshConfig, make_mesh, shardings
from helios_jax.training.optim import make_optimizer
from helios_jax.training.run_config import TrainConfig
from helios_jax.training.state import init_sharded
from tests import tiny
from tests.processes import environment

ROOT = Path(__file__).parents[1]
TEXT = UMT5Config(vocab_size=64, d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=4)
WEIGHTS = "diffusion_pytorch_model.safetensors"


def abstract(kind: str) -> nnx.Module:
    """One of the networks by name; `stacked` is the transformer with stacked blocks."""
    return {
        "listed": lambda: Transformer.abstract(tiny.TRANSFORMER),
        "stacked": lambda: Transformer.abstract(tiny.TRANSFORMER, stacked=True),
        "vae": lambda: AutoencoderKLWan(tiny.VAE, rngs=Shapes()),
        "text": lambda: UMT5Encoder(TEXT, rngs=Shapes()),
    }[kind]()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder for each network, of random values; the transformer's in several files."""
    root = tmp_path_factory.mktemp("weights")
    rng = np.random.default_rng(0)
    for kind, config in (("listed", tiny.TRANSFORMER), ("vae", tiny.VAE), ("text", TEXT)):
        save_model(tiny.draw(abstract(kind), rng), config, root / kind, max_shard_size=30_000)
    (root / "stacked").symlink_to(root / "listed")
    assert len(list((root / "listed").glob("*.safetensors"))) > 2
    return root


def tensors(folder: Path) -> dict[str, np.ndarray]:
    """All tensors of a folder, read by the safetensors library."""
    return {k: v for path in folder.glob("*.safetensors") for k, v in load_file(path).items()}


def assert_same(a, b):
    assert a.keys() == b.keys()
    for key, value in a.items():
        assert value.dtype == b[key].dtype, key
        np.testing.assert_array_equal(value, b[key], err_msg=key)


@pytest.mark.parametrize(
    ("kind", "small"),
    [("listed", 0), ("listed", 2**20), ("stacked", 0), ("stacked", 2**20), ("text", 0), ("vae", 2**20)],
)
def test_values_equal_the_files(folder, tmp_path, monkeypatch, kind, small):
    """Laid out on the host and on the device, which the sizes of parameters decide."""
    monkeypatch.setattr(load, "SMALL", small)
    monkeypatch.setattr(save, "SMALL", small)
    expected = tensors(folder / kind)
    model = load_model(abstract(kind), folder / kind)
    assert_same(to_arrays(model), expected)
    config = {"vae": tiny.VAE, "text": TEXT}.get(kind, tiny.TRANSFORMER)
    save_model(model, config, tmp_path)
    assert_same(tensors(tmp_path), expected)


def test_casts_in_pieces_except_float32_islands(folder, monkeypatch):
    monkeypatch.setattr(files, "PIECE", 96)
    expected = tensors(folder / "listed")
    for kind in ("listed", "stacked"):
        model = load_model(abstract(kind), folder / kind, dtype=jnp.bfloat16)
        for key, value in to_arrays(model).items():
            island = any(part in Transformer.FLOAT32 for part in key.split("."))
            assert value.dtype == (jnp.float32 if island else jnp.bfloat16), key
            np.testing.assert_array_equal(value, expected[key].astype(value.dtype), err_msg=key)


def test_rows_of_a_tensor_are_read_alone(tmp_path):
    values = np.arange(7 * 3 * 5, dtype=np.float16).reshape(7, 3, 5)
    save_file({"a": np.zeros(3, np.int8), "x": values, "scalar": np.array(2, np.float32)}, tmp_path / "f.safetensors")
    found, _ = files.read_header(tmp_path / "f.safetensors")
    np.testing.assert_array_equal(found["x"].read(slice(2, 5)), values[2:5])
    np.testing.assert_array_equal(found["x"].read(dtype=np.float32), values)
    assert found["x"].read(slice(5, None), jnp.bfloat16).shape == (2, 3, 5)
    assert found["scalar"].read() == 2


def test_loaded_values_are_copies(folder):
    """On a CPU an array may share memory with what it was made of, when that is aligned."""
    arrays = to_arrays(load_model(abstract("text"), folder / "text"))
    memory = np.empty(arrays["shared.weight"].nbytes + 64, np.uint8)
    first = -memory.ctypes.data % 64
    aligned = memory[first : first + len(memory) - 64].view(np.float32).reshape(arrays["shared.weight"].shape)
    aligned[:] = arrays["shared.weight"]
    model = load.from_arrays(abstract("text"), {**arrays, "shared.weight": aligned})
    aligned[:] = 7
    np.testing.assert_array_equal(model.shared.weight[...], arrays["shared.weight"])


@pytest.mark.parametrize(("size", "at_a_time"), [(2**20, load.READERS), (load.IN_FLIGHT // 2, 2), (2**40, 1)])
def test_reads_are_limited_and_ordered(size, at_a_time):
    running, most, lock = 0, 0, threading.Lock()

    def job(i):
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        time.sleep(0.05)
        with lock:
            running -= 1
        return i

    assert list(load._in_order((size, partial(job, i)) for i in range(12))) == list(range(12))
    assert most <= at_a_time
    assert (most > 1) == (at_a_time > 1)


def test_fewer_files_replace_more_files(folder, tmp_path):
    """Shards and an index that stayed would be loaded in place of the new weights."""
    model = load_model(abstract("listed"), folder / "listed")
    save_model(model, tiny.TRANSFORMER, tmp_path, max_shard_size="20KB")
    shards = [load_file(path).values() for path in tmp_path.glob("*.safetensors")]
    assert len(shards) > 3
    assert all(len(shard) == 1 or sum(x.nbytes for x in shard) <= 20_000 for shard in shards)
    model.proj_out.bias[...] = model.proj_out.bias[...] + 1
    save_model(model, tiny.TRANSFORMER, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", WEIGHTS]
    assert_same(to_arrays(load_model(abstract("listed"), tmp_path)), to_arrays(model))


def test_a_dtype_that_numpy_lacks_is_named(tmp_path):
    header = json.dumps({"x": {"dtype": "F8_E8M0", "shape": [4], "data_offsets": [0, 4]}}).encode()
    (tmp_path / WEIGHTS).write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    with pytest.raises(CheckpointError, match="F8_E8M0"):
        check_weights(abstract("vae"), tmp_path)


def test_a_tensor_in_two_files_is_named(folder, tmp_path):
    for name in ("a", "b"):
        save_file({"proj_out.bias": np.zeros(16, np.float32)}, tmp_path / f"{name}.safetensors")
    index = {"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}
    (tmp_path / f"{WEIGHTS}.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"repeats proj_out\.bias"):
        load_model(abstract("listed"), tmp_path)


def test_training_starts_from_weights_in_their_shards(folder):
    mesh = make_mesh(MeshConfig())
    seen = []

    def read(model, placed):
        seen.append(placed)
        return load_model(model, folder / "stacked", dtype=jnp.float32, shardings=placed)

    config = TrainConfig(stage="flow")
    state = init_sharded(
        lambda key: abstract_to_zeros(), jax.random.key(0), make_optimizer(config.optim, 1), None, mesh, read
    )
    assert_same(to_arrays(state.model), tensors(folder / "listed"))
    assert jax.tree.structure(seen[0]) == jax.tree.structure(state.model)


def abstract_to_zeros() -> nnx.Module:
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), abstract("stacked"))


def test_two_hosts_load_and_save_the_same_as_one(folder, tmp_path):
    """Every shard is its part of the whole, a host reads the rows of its own, and the two write one folder."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    hosts = [
        subprocess.Popen(
            [sys.executable, __file__, str(folder), str(tmp_path), str(i), str(port)],
            env=environment(devices=4),
        )
        for i in range(2)
    ]
    assert [host.wait(timeout=300) for host in hosts] == [0, 0]
    for kind in ("listed", "stacked"):
        assert_same(tensors(tmp_path / kind), tensors(folder / kind))
    for i in range(2):
        report = json.loads((tmp_path / f"{i}.json").read_text())
        for kind in ("listed", "stacked"):
            assert report[kind]["split"] == [*[None] * (kind == "stacked"), "tensor", "fsdp"]
            shares = report[kind]["shares"]
            # The file's rows are another dimension than fsdp splits in half of the matrices.
            assert shares.keys() >= {"blocks.0.ffn.net.0.proj.weight", "blocks.0.ffn.net.2.weight"}
            assert set(shares.values()) == {0.5}


def as_a_host(folder: Path, out: Path, number: int, port: int) -> None:
    """One of the two processes of the test above."""
    jax.distributed.initialize(f"127.0.0.1:{port}", 2, number)
    # Devices of the two hosts in turn, so that the rows of one do not lie together.
    devices = [jax.devices()[i] for i in (0, 4, 1, 5, 2, 6, 3, 7)]
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, tensor=4), devices)
    report, read = {}, files.Tensor.read
    for kind in ("listed", "stacked", "text"):
        model = abstract(kind)
        whole = dict(nnx.to_flat_state(nnx.state(load_model(model, folder / kind))))
        for small in (0, 2**20):
            shares = {}

            def counted(self, *args, shares=shares, **options):
                values = read(self, *args, **options)
                if len(self.shape) == 2 and self.shape[0] % 8 == 0:  # of the devices
                    shares[self.name] = shares.get(self.name, 0) + values.size / np.prod(self.shape)
                return values

            load.SMALL, files.Tensor.read = small, counted
            loaded = load_model(model, folder / kind, shardings=shardings(model, mesh))
            files.Tensor.read = read
            for path, variable in nnx.to_flat_state(nnx.state(loaded)):
                array = variable[...]
                assert array.shape == whole[path].shape
                for shard in array.addressable_shards:
                    np.testing.assert_array_equal(shard.data, np.asarray(whole[path][...])[shard.index], err_msg=path)
            if small == 0 and kind != "text":
                ffn = (loaded.blocks if kind == "stacked" else loaded.blocks[1]).ffn
                report[kind] = {"split": list(ffn.down.weight[...].sharding.spec), "shares": shares}
        if kind != "text":
            save.SMALL = 0 if kind == "stacked" else 2**20
            save_model(loaded, tiny.TRANSFORMER, out / kind, max_shard_size="30KB")
    (out / f"{number}.json").write_text(json.dumps(report))


def test_the_host_never_holds_the_model():
    """2.6 GB of the 14B's tensors through the code of `load_model`, in a process whose peak is its own."""
    command = [sys.executable, "-m", "helios_jax.benchmarks.loading", "--layers", "3"]
    out = subprocess.run(command, env=environment(), check=True, capture_output=True, text=True).stdout
    total, largest, peak = (
        float(re.search(pattern, out)[1])
        for pattern in (r", ([\d.]+) GB", r"largest tensor: ([\d.]+)", r"baseline: ([\d.]+)")
    )
    assert total > 2.5
    assert peak < 1 + largest < total / 2, out


SAVING = """
import sys
import jax.numpy as jnp
from flax import nnx
from helios_jax.benchmarks.loading import memory
from helios_jax.models.layers import Linear
from helios_jax.pretrained import save_model
from tests import tiny

class Model(nnx.Module):
    def __init__(self):
        weight = jnp.ones((2048, 2048))  # all share it: 16 MB stand for 512
        rngs = nnx.Rngs(0)
        self.layers = nnx.List([Linear(2048, 2048, init=lambda *_: weight, rngs=rngs) for _ in range(32)])

model = Model()
before = memory("VmRSS")
save_model(model, tiny.TRANSFORMER, sys.argv[1], dtype=jnp.bfloat16)
print(memory("VmHWM") - before)
"""


def test_saving_holds_one_tensor(tmp_path):
    command = [sys.executable, "-c", SAVING, str(tmp_path)]
    out = subprocess.run(command, env=environment(), check=True, capture_output=True, text=True).stdout
    assert (tmp_path / WEIGHTS).stat().st_size > 260e6
    assert int(out) < 100e6


@pytest.mark.reference
@pytest.mark.parametrize("stacked", [False, True])
def test_bfloat16_files_equal_diffusers(folder, tmp_path, stacked):
    """The same keys and values, each in the dtype that diffusers keeps it in: float32 for the islands."""
    torch = pytest.importorskip("torch")
    from diffusers import HeliosTransformer3DModel
    from safetensors.torch import load_file as load_torch

    # What their from_pretrained(torch_dtype=...) does, which needs the accelerate package.
    theirs = HeliosTransformer3DModel(**dataclasses.asdict(tiny.TRANSFORMER))
    theirs.load_state_dict({k: torch.from_numpy(v) for k, v in tensors(folder / "listed").items()})
    for name, parameter in theirs.named_parameters():
        if not set(theirs._keep_in_fp32_modules) & set(name.split(".")):
            parameter.data = parameter.data.bfloat16()
    theirs.save_pretrained(tmp_path / "theirs")
    model = load_model(abstract("stacked" if stacked else "listed"), folder / "listed", dtype=jnp.bfloat16)
    save_model(model, tiny.TRANSFORMER, tmp_path / "ours")
    expected, got = (load_torch(tmp_path / name / WEIGHTS) for name in ("theirs", "ours"))
    assert got.keys() == expected.keys()
    for key, value in got.items():
        assert value.dtype == expected[key].dtype, key
        assert torch.equal(value, expected[key]), key
    theirs.load_state_dict(got)


if __name__ == "__main__":
    as_a_host(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
