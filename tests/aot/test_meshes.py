"""Training steps of a small model over all axes of a mesh: two slices of TPUs, and GPUs, with their kernels."""

from typing import Any

import pytest

from helios_jax.planner import machines, program
from helios_jax.runtime import aot
from helios_jax.sharding import make_mesh
from tests.aot import programs

# Two of 8 heads are a device's over tensor and context.
SMALL = "model.transformer={num_layers: 1, num_attention_heads: 8, ffn_dim: 1024}"


def compiled(monkeypatch, mesh: str, devices: Any, context: str) -> tuple[Any, Any]:
    """(the mesh, the training step)."""
    monkeypatch.setattr(program, "LATENTS", (16, 16))
    flags = [SMALL, "init=null", "flow.components=null", "data.batch_size=8", "optim.accumulate=1"]
    flags += [
        "remat=block",
        "flow.corruption=null",
        "flow.drop=null",
        f"mesh={mesh}",
        f"mesh.context_attention={context}",
    ]
    config = program.open_config("configs/stage1_init.yaml", flags)
    laid = make_mesh(config.mesh, devices)
    return laid, program.compiled(config, program.abstract_state(config), laid)


@pytest.mark.parametrize(
    # Attention to the text by kernels: forward, again in the backward pass, backward; and adaLN's gradient, twice. The
    # same of all tokens; or around a ring, whose last turn stands for itself.
    ("context", "kernels", "exchange"),
    [("ulysses", 5 + 3, "all-to-all"), ("ring", 5 + 2 * 3, "collective-permute")],
)
def test_two_slices_of_tpus(monkeypatch, report, context, kernels, exchange):
    devices = aot.tpu_topology("v5p:2x2x2", slices=2).devices
    mesh, step = compiled(monkeypatch, "{data: null, fsdp: 2, tensor: 2, context: 2}", devices, context)
    assert dict(mesh.shape) == {"data": 2, "fsdp": 2, "tensor": 2, "context": 2}
    assert [{device.slice_index for device in half.flat} for half in mesh.devices] == [{0}, {1}]
    assert programs.custom_calls(step)["tpu_custom_call"] == kernels
    assert programs.collectives(step)[exchange] > 0
    report(f"training step over two slices, {context}", devices[0], step)


def test_gpus_around_a_ring(monkeypatch, report):
    """A turn is one kernel forward and two backward; attention to the text is cuDNN's, on each device's heads."""
    devices = aot.gpu_topology(machines.target(), devices=8).devices
    _, step = compiled(monkeypatch, "{data: 2, fsdp: 1, tensor: 2, context: 2}", devices, "ring")
    calls = programs.custom_calls(step)
    expected = {"__cudnn$fmhaSoftmax": 2, "__cudnn$fmhaSoftmaxBackward": 1, "mosaic_gpu_v2": 2 * (2 + 2)}
    assert {name: calls[name] for name in calls if "fmha" in name or "mosaic" in name} == expected
    assert programs.collectives(step)["collective-permute"] > 0
    report("training step over 8 GPUs, ring", devices[0], step)
