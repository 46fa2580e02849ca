"""Operations, memory and time that are known without a compiler."""

import dataclasses

import jax
import pytest

from helios_jax.benchmarks.throughput_flops import text_kv, transformer_pass
from helios_jax.models.transformer import TransformerConfig
from helios_jax.planner import analytic, program, search
from helios_jax.planner.machines import machine
from helios_jax.planner.program import with_settings

GB = 1e9
SIZES = TransformerConfig()
# Of rank 128, beside eight products of a block's width and the two of its feed-forward.
ADAPTERS = 2 * 128 * 11040 * (16 * SIZES.dim + 2 * (SIZES.dim + SIZES.ffn_dim)) * SIZES.num_layers


def test_the_forward_pass_is_that_of_the_formula(stage1):
    """Beside it there are adapters of rank 128, and the last block keeps its history in training."""
    formula = transformer_pass(SIZES, 8640, 2400, 512) + text_kv(SIZES, 512)
    last = 2400 * (4 * SIZES.dim**2 + 4 * 11040 * SIZES.dim + 4 * SIZES.dim * SIZES.ffn_dim)
    assert stage1.forward_flops == pytest.approx(formula + last + ADAPTERS, rel=0.01)


def test_going_back_needs_inputs_gradients_and_those_of_what_is_trained(stage1):
    """Each product of the forward pass once more, those of attention and of adapters twice."""
    back = stage1.model_flops - stage1.forward_flops
    assert back == pytest.approx(stage1.forward_flops + stage1.attention_flops + ADAPTERS, rel=0.01)


@pytest.mark.parametrize(
    ("name", "overrides", "peak", "seconds"),
    # As compiled by jax 0.10.2 and libtpu 0.0.42.1 for v5p-128: python -m helios_jax.plan CONFIG --topology v5p-128 ...
    [
        ("stage1_init", ("mesh.fsdp=16", "optim.accumulate=2", "remat=block"), 31.4, 19.9),
        ("stage1_init", ("mesh.fsdp=16",), 66.2, 15.8),
        ("stage2_init", ("mesh.fsdp=16",), 81.5, 16.2),
    ],
)
def test_estimates_are_close_to_what_was_compiled(work, stage1, name, overrides, peak, seconds):
    config = program.open_config(f"configs/{name}.yaml", overrides)
    known = stage1 if name == "stage1_init" else work(name)
    found = search.given(dataclasses.replace(known, config=config), machine("v5p-128"))
    assert found.memory.peak == pytest.approx(peak * GB, rel=1 / 6)
    assert found.cost.seconds == pytest.approx(seconds, rel=1 / 6)


def test_more_parts_need_less_memory_and_more_collectives(stage1):
    pod, found = machine("v5p-128"), []
    for parts in (1, 2, 4):
        work = dataclasses.replace(stage1, config=with_settings(stage1.config, accumulate=parts))
        found.append(search.given(work, pod))
    assert found[0].memory.peak > found[1].memory.peak > found[2].memory.peak
    gathered = [one.cost.received["all-gather"] for one in found]
    assert gathered[1] == pytest.approx(2 * gathered[0])
    assert len({one.cost.flops["products"] for one in found}) == 1


def test_policies_trade_memory_for_operations(stage1):
    pod = machine("v5p-128")
    by = {}
    for remat in analytic.POLICIES:
        config = with_settings(stage1.config, accumulate=4, remat=remat)
        by[remat] = search.given(dataclasses.replace(stage1, config=config), pod)
    flops = {remat: sum(one.cost.flops.values()) for remat, one in by.items()}
    assert by["offload"].memory.peak < by["block"].memory.peak < by[None].memory.peak
    assert flops["block"] == flops["offload"] > flops["dots_with_no_batch_dims_saveable"] > flops[None]
    kept = ("block", "attention", "some_products", "products")
    assert sorted(kept, key=lambda one: by[one].memory.peak) == sorted(kept, key=lambda one: -flops[one]) == list(kept)
    assert flops[None] == pytest.approx(4 * (stage1.model_flops + stage1.attention_flops / 2), rel=1e-6)


def test_mfu_counts_what_the_model_needs_and_nothing_twice(stage1):
    pod = machine("v5p-128")
    least = stage1.model_flops * 256 / (64 * pod.chip.flops)
    assert analytic.mfu(stage1, pod, least) == pytest.approx(1)
    assert analytic.tokens_a_second(stage1, 2.0) == 256 * 11040 / 2


def test_adapters_to_come_count_and_what_waits_in_the_host_s_memory_does_not():
    """Stage 3 on one GPU, with adapters that no run has written yet."""
    found = []
    for more in ((), ("distill.score.adapters=[]",)):
        small = ("model.transformer.num_layers=1", "distill.gan.discriminator.blocks=[0]", *more)
        config = program.open_config("configs/one_gpu/stage3.yaml", small)
        work = analytic.Work(config, program.abstract_state(config), 0, 0)
        mesh = analytic.abstract_mesh({"data": 1, "fsdp": 1, "tensor": 1, "context": 1})
        found.append(analytic.arguments(work, config, mesh))
    student = sum(x.size for x in jax.tree.leaves(work.state.ema))
    assert found[0]["optimizer"] < 100  # counters
    assert found[0]["average"] == 0
    assert found[0]["frozen"] - found[1]["frozen"] == pytest.approx(2 * 2 * student, rel=1e-3)
