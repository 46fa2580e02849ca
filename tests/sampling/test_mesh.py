"""Weights that are split over devices sample what one device does. The devices are CPU ones of another process."""

import subprocess
import sys

import numpy as np

from helios_jax import HeliosPipeline
from helios_jax.sharding import MeshConfig, make_mesh
from tests import tiny
from tests.closeness import assert_close
from tests.processes import environment


def latents(folder, mesh=None):
    """Two chunks with a folder's weights, as one program and as a stream."""
    pipe = HeliosPipeline.from_pretrained(folder, mesh=mesh, stacked=mesh is not None)
    arguments = {"height": 32, "width": 48, "num_inference_steps": 2, "num_latent_frames_per_chunk": 3}
    arguments |= {"num_frames": 18, "output_type": "latent", "seed": 1}
    if mesh is not None:
        devices = pipe.transformer.blocks.ffn.up.weight[...].sharding.device_set
        assert len(devices) == 4
    return pipe("a red plus", **arguments).frames, np.concatenate(list(pipe.stream("a red plus", **arguments)), 1)


def test_a_mesh_of_four_samples_what_one_device_does(tmp_path):
    tiny.folder(tmp_path / "pipeline")
    command = [sys.executable, __file__, str(tmp_path / "pipeline"), str(tmp_path / "out.npz")]
    subprocess.run(command, env=environment(devices=4), check=True)
    one, _ = latents(tmp_path / "pipeline")
    with np.load(tmp_path / "out.npz") as four:
        assert_close(dict(four), {"stream": one, "whole": one}, ulps=60)


if __name__ == "__main__":
    whole, stream = latents(sys.argv[1], make_mesh(MeshConfig(data=1, fsdp=2, tensor=2)))
    np.savez(sys.argv[2], whole=whole, stream=stream)
