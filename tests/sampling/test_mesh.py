"""Meshes sample what one device does. The devices are CPU ones of another process.

No axis divides the 27 noisy tokens of a chunk, and context 4 does not divide the 26 of its history.
"""

import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from helios_jax import HeliosPipeline
from helios_jax.sharding import AXES, MeshConfig, make_mesh
from tests.closeness import BYTES, assert_close, error
from tests.processes import environment

RING = {"context_attention": "ring"}
MESHES: dict[str, dict[str, Any]] = {
    "fsdp, tensor": {"fsdp": 2, "tensor": 2},
    "data, tensor, ring": {"data": 2, "tensor": 2, "context": 2, **RING},
    "ulysses": {"context": 2},
    "data": {"data": 2},
    "fsdp": {"fsdp": 2},
    "tensor": {"tensor": 2},
    "ring": {"context": 2, **RING},
    "fsdp, ring of 4": {"fsdp": 2, "context": 4, **RING},
    "fsdp, ulysses": {"fsdp": 2, "context": 2},
}
QUICK = tuple(MESHES)[:2]
STREAMED, UNSTACKED = QUICK
ARGUMENTS = {"height": 48, "width": 48, "num_inference_steps": 2, "num_latent_frames_per_chunk": 3}
ARGUMENTS |= {"num_frames": 17, "output_type": "latent", "seed": 1, "overlap_chunks": True}


def latents(folder, name: str) -> dict[str, np.ndarray]:
    """Two chunks that overlap, with a folder's weights, as one program and as a stream."""
    sizes = {"data": 1} | MESHES[name]
    config = MeshConfig(**sizes)
    mesh = make_mesh(config, jax.devices()[: config.data * config.fsdp * config.tensor * config.context])
    pipe = HeliosPipeline.from_pretrained(
        folder, mesh=mesh, stacked=name != UNSTACKED, context_attention=config.context_attention
    )
    leaf = jax.tree.leaves(pipe.transformer)[0]
    assert leaf.sharding.mesh.size == len(leaf.sharding.device_set) == mesh.size
    out = {name: pipe("a red plus", **ARGUMENTS).frames}
    if name == STREAMED:
        out[f"{name}, stream"] = np.concatenate(list(pipe.stream("a red plus", **ARGUMENTS)), 1)
    return out


def compare(folder: Path, out: Path, names: tuple[str, ...]) -> None:
    """Asserts that the meshes `names` sample what one device does."""
    settings = {**environment(devices=8), "NPROC": "64"}  # a collective blocks the thread that waits in it
    subprocess.run([sys.executable, __file__, str(folder), str(out), *names], env=settings, check=True)
    one = HeliosPipeline.from_pretrained(folder)("a red plus", **ARGUMENTS).frames
    with np.load(out) as found:
        assert len(found) == len(names) + (STREAMED in names)
        for name, got in found.items():
            held = got.shape[1] // 2  # the second chunk's first frame, encoded from bytes
            assert error(got[:, held], one[:, held]) < BYTES, name
            assert_close(*({name: np.delete(x, held, axis=1)} for x in (got, one)), ulps=60)


def test_meshes_sample_what_one_device_does(folder, tmp_path):
    compare(folder, tmp_path / "out.npz", QUICK)


@pytest.mark.heavy
def test_all_meshes_sample_what_one_device_does(folder, tmp_path):
    compare(folder, tmp_path / "out.npz", tuple(MESHES))


def test_heads_that_context_does_not_divide_are_refused_before_weights_are_read(folder, monkeypatch):
    monkeypatch.setattr("helios_jax.sampling.checkpoint.Checkpoint.load", lambda *_: pytest.fail("weights are read"))
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1] * 4).reshape(1, 1, 2, 2), AXES)
    with pytest.raises(ValueError, match=r"context=2 does not divide the 1 heads .*; give .* context_attention=ring$"):
        HeliosPipeline.from_pretrained(folder, mesh=mesh)


if __name__ == "__main__":
    np.savez(sys.argv[2], **{key: x for name in sys.argv[3:] for key, x in latents(sys.argv[1], name).items()})
