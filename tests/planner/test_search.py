"""Meshes of a machine, settings that fit it, and refusals."""

import dataclasses
import math
from typing import get_args

import pytest

from helios_jax import pretrained
from helios_jax.config import ConfigError
from helios_jax.models.transformer import TransformerConfig
from helios_jax.models.transformer.remat import Remat
from helios_jax.planner import program, search
from helios_jax.planner.machines import machine
from helios_jax.planner.program import with_settings
from helios_jax.training.start import transformer_config


def sizes(name: str) -> set[tuple[int, ...]]:
    return {tuple(mesh.values()) for mesh in search.meshes(machine(name))}


def test_meshes_have_a_place_for_every_device():
    for name in ("v5p-128", "v6e-256", "2*v5p-8", "H100x16"):
        assert all(math.prod(mesh) == machine(name).count for mesh in sizes(name))
    assert (4, 1, 1, 1) in sizes("v5p-8")
    assert (2, 16, 2, 1) in sizes("v6e-64")  # parts of the sides of 8x8


def test_gpus_split_a_product_within_a_host_only():
    assert max(mesh[2] for mesh in sizes("H100x16")) == 8
    assert (2, 1, 8, 1) in sizes("H100x16")


def test_slices_split_samples_only():
    assert all(mesh[0] % 2 == 0 for mesh in sizes("2*v5p-128"))
    assert (2, 64, 1, 1) in sizes("2*v5p-128")


def test_those_that_fit_come_first_by_time(stage1):
    pod = machine("v5p-128")
    found = search.search(stage1, pod)
    fits = [one.fits(pod) for one in found]
    assert fits[0]
    assert not fits[-1]
    assert fits == sorted(fits, reverse=True)
    seconds = [one.cost.seconds for one in found if one.fits(pod)]
    assert seconds == sorted(seconds)
    assert {one.config.remat for one in found} == {*get_args(Remat), None}
    for one in found:
        ways = one.mesh["data"] * one.mesh["fsdp"]
        assert math.prod(one.mesh.values()) == 64
        assert one.config.data.batch_size % (ways * one.config.optim.accumulate) == 0


def refused(stage1, name: str, **settings) -> str:
    mesh = dataclasses.replace(stage1.config.mesh, **settings.pop("mesh", {}))
    work = dataclasses.replace(stage1, config=with_settings(stage1.config, mesh=mesh, **settings))
    with pytest.raises(ConfigError) as error:
        search.given(work, machine(name))
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_mesh_without_a_place_is_refused_with_the_nearest(stage1):
    told = refused(stage1, "H100x8")
    assert "mesh data=null, fsdp=16, tensor=1, context=1 does not fit 8 devices" in told
    assert told.endswith("H100x8 takes, for example, mesh.data=1 mesh.fsdp=8")
    assert "does not fit 64 devices" in refused(stage1, "v5p-128", mesh={"fsdp": 24})
    odd = refused(stage1, "2*v5p-128", mesh={"data": 1, "fsdp": None})
    assert "data=1 must be a multiple of the 2 slices" in odd
    assert odd.endswith("2*v5p-128 takes, for example, mesh.data=2 mesh.fsdp=64")


@pytest.mark.parametrize(
    "mesh", [{"fsdp": 8}, {"data": 2, "fsdp": 8, "tensor": 4}, {"data": 16, "fsdp": 1, "context": 4}]
)
def test_meshes_may_split_sides_and_hosts_as_in_training(stage1, mesh):
    """Sides of 4x4x4 chips, and hosts of 2x2."""
    parts = {"batch_size": 256, "accumulate": 2}
    work = dataclasses.replace(
        stage1, config=with_settings(stage1.config, mesh=dataclasses.replace(stage1.config.mesh, **mesh), **parts)
    )
    found = search.given(work, machine("v5p-128")).mesh
    assert {name: found[name] for name in mesh} == mesh
    assert math.prod(found.values()) == 64


def test_a_batch_that_does_not_divide_is_refused_with_the_nearest(stage1):
    assert "the nearest that does is optim.accumulate=1" in refused(stage1, "v6e-256")
    odd = refused(stage1, "v5p-128", batch_size=200, accumulate=2)
    assert "data.batch_size 200 in 2 parts does not divide over data x fsdp = 64" in odd
    assert "the nearest that does is data.batch_size=256" in odd


def test_heads_that_the_mesh_does_not_divide_are_refused_as_in_training(stage1):
    flags = ["model.transformer={num_attention_heads: 12, attention_head_dim: 128, ffn_dim: 64, num_layers: 1}"]
    flags += ["mesh.data=1", "mesh.fsdp=1", "mesh.context=8", "optim.accumulate=1"]
    config = program.open_config("configs/stage1_init.yaml", flags)
    trained = dataclasses.replace(stage1, config=config, state=program.abstract_state(config))  # not traced
    told = r"^mesh: context=8 does not divide the 12 heads of a device \(12 over tensor=1\), which ulysses exchanges; "
    with pytest.raises(ConfigError, match=told):
        search.given(trained, machine("H100x8"))
    mesh = dataclasses.replace(config.mesh, context_attention="ring")
    ring = dataclasses.replace(trained, config=with_settings(config, mesh=mesh))
    assert search.given(ring, machine("H100x8")).mesh["context"] == 8


def test_stage_3_holds_two_models(stage1):
    """The student's weights and the scores', both frozen."""
    config = program.open_config("configs/stage3_post.yaml", ["mesh.fsdp=16"])
    third = dataclasses.replace(stage1, config=config, state=program.abstract_state(config))  # not traced
    found, first = (search.given(one, machine("v5p-128")) for one in (third, stage1))
    assert found.memory.frozen == pytest.approx(2 * first.memory.frozen, rel=0.01)
    assert found.memory.average > 0


def test_sizes_of_weights_that_are_here_are_used(tmp_path):
    """The student and the scores each have their own sizes, and those of the 14B model where neither is here."""
    small, smaller = (
        TransformerConfig(num_attention_heads=1, attention_head_dim=128, ffn_dim=64, num_layers=n) for n in (2, 1)
    )
    pretrained.write_config(small, tmp_path / "student" / "transformer")
    pretrained.write_config(smaller, tmp_path / "teacher" / "transformer")
    flags = ["distill.score.adapters=[]", f"init={tmp_path}/student", f"distill.score.init={tmp_path}/teacher"]

    def sizes(*flags: str) -> list[TransformerConfig]:
        config = program.open_config("configs/stage3_post.yaml", flags)
        return [transformer_config(model) for model in program.transformers(config)]

    assert sizes(*flags) == [small, smaller]
    assert sizes(*flags[:2], "distill.score.init=nowhere", "distill.score.init_subfolder=other") == [small, small]
    assert sizes("init=nowhere", flags[2]) == [TransformerConfig(), smaller]
    assert sizes("init=owner/name", "distill.score.init=owner/name") == [TransformerConfig()] * 2


def test_a_batch_is_not_given_a_mesh_that_the_heads_refuse(stage1):
    """Of 8 chips, 4 heads can take 4, so that a batch is at least of 2."""
    flags = ["model.transformer={num_attention_heads: 4, attention_head_dim: 128, ffn_dim: 64, num_layers: 1}"]
    config = program.open_config("configs/stage1_init.yaml", [*flags, "data.batch_size=7", "optim.accumulate=1"])
    odd = dataclasses.replace(stage1, config=config, state=program.abstract_state(config))  # not traced
    with pytest.raises(ConfigError, match=r"the nearest that does is data\.batch_size=8$"):
        search.search(odd, machine("H100x8"))


@pytest.mark.heavy
def test_stage_3_needs_one_pass_more_than_the_students_own(work, stage1):
    assert work("stage3_post", "mesh.fsdp=16").model_flops > 2 * stage1.model_flops


def test_a_batch_smaller_than_the_machine_needs_several_chips_for_a_sample(stage1):
    assert all(one.mesh["tensor"] >= 4 for one in search.search(stage1, machine("4*v6e-256")))
    with pytest.raises(ConfigError, match=r"does not divide over the 4096 chips .* data.batch_size=512") as error:
        search.search(stage1, machine("v5p:16x16x16"))  # whose 40 heads 8 chips can share
    assert "\n" not in str(error.value)
