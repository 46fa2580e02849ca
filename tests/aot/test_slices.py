"""Training steps of a small model for two TPU slices, over all axes, with the kernels that a device's share allows."""

import pytest

from helios_jax.benchmarks import aot_training
from helios_jax.runtime import aot
from helios_jax.sharding import make_mesh
from helios_jax.training.flow_config import FlowTrainConfig
from helios_jax.training.stage_table import load_config
from tests.aot import programs

# Two of 8 heads are a device's over tensor and context.
SMALL = "model.transformer={num_layers: 1, num_attention_heads: 8, ffn_dim: 1024}"


@pytest.mark.parametrize(
    # Each attention by kernels: forward, again in the backward pass, backward; and twice the gradient of adaLN.
    ("context", "kernels", "exchange"),
    [("ulysses", 8, "all-to-all"), ("ring", 5, "collective-permute")],
)
def test_two_slices(monkeypatch, report, context, kernels, exchange):
    monkeypatch.setattr(aot_training, "LATENTS", (16, 16))
    flags = [SMALL, "init=null", "flow.components=null", "data.batch_size=8", "optim.accumulate=1"]
    flags += ["flow.corruption=null", "flow.drop=null"]
    flags += ["mesh={data: null, fsdp: 2, tensor: 2, context: 2}", f"mesh.context_attention={context}"]
    config = load_config("configs/stage1_init.yaml", flags)
    assert isinstance(config, FlowTrainConfig)
    devices = aot.tpu_topology("v5p:2x2x2", slices=2).devices
    mesh = make_mesh(config.mesh, devices)
    assert dict(mesh.shape) == {"data": 2, "fsdp": 2, "tensor": 2, "context": 2}
    assert [{device.slice_index for device in half.flat} for half in mesh.devices] == [{0}, {1}]
    program = aot_training.compiled(config, mesh)
    assert programs.custom_calls(program)["tpu_custom_call"] == kernels
    assert programs.collectives(program)[exchange] > 0
    report(f"training step over two slices, {context}", devices[0], program)
