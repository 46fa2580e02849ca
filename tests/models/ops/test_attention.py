"""The choice of attention's implementation; one that cannot run says why."""

import logging
from types import SimpleNamespace
from typing import Any, get_args

import jax.numpy as jnp
import pytest

from helios_jax.models.ops import attention as module
from helios_jax.models.ops import choices
from helios_jax.models.ops.attention import attention
from helios_jax.models.ops.choices import Attention
from pallas_kernels.core.device import compiling_for

HEADS = jnp.zeros((1, 2, 1, 64), jnp.bfloat16)
WIDE = jnp.zeros((1, 2, 1, 256), jnp.bfloat16)
FULL = jnp.zeros((1, 2, 1, 64), jnp.float32)
TPU: Any = SimpleNamespace(platform="tpu", device_kind="TPU v5")
H100: Any = SimpleNamespace(platform="cuda", device_kind="NVIDIA H100 80GB HBM3")
A100: Any = SimpleNamespace(platform="cuda", device_kind="NVIDIA A100-SXM4-80GB")


@pytest.mark.parametrize(
    ("device", "query", "chosen"),
    [(TPU, HEADS, "pallas"), (TPU, WIDE, "xla"), (H100, HEADS, "cudnn"), (H100, FULL, "xla"), (None, HEADS, "xla")],
)
def test_the_device_and_the_inputs_choose(device, query, chosen, caplog):
    choices.say.cache_clear()
    with compiling_for(device), caplog.at_level(logging.INFO):
        assert module._choose(query, None) == chosen
    assert f"attention by {chosen}" in caplog.text


@pytest.mark.parametrize(
    ("device", "query", "asked", "reason"),
    [
        (None, HEADS, "cudnn", "cuDNN runs on NVIDIA GPUs, and this is cpu"),
        (None, HEADS, "pallas", "this runs on cpu"),
        (H100, FULL, "cudnn", "queries are float32"),
        (H100, WIDE, "cudnn", "not 256"),
        (H100, FULL.astype(jnp.float16), "pallas", "queries are float16"),
        (A100, HEADS, "pallas", "NVIDIA A100"),
        (TPU, WIDE, "pallas", "not 256"),
    ],
)
def test_one_that_cannot_run_says_why(device, query, asked, reason):
    with compiling_for(device), pytest.raises(ValueError, match=f"attention: .*{reason}.*; .*'xla'"):
        attention(query, query, query, implementation=asked)


def test_xla_always_can():
    assert "xla" in get_args(Attention)
    for device in (None, TPU, H100):
        with compiling_for(device):
            attention(FULL, FULL, FULL, implementation="xla")
