"""Tokens and operations of training steps, and what a run reports of them."""

import dataclasses

import jax
import numpy as np
import pytest
import yaml
from jax.sharding import AbstractMesh, AxisType

from helios_jax import pretrained
from helios_jax.planner import program as planned
from helios_jax.runtime import chips, flops
from helios_jax.sharding import AXES, MeshConfig, make_mesh
from helios_jax.training import work
from helios_jax.training.run_config import TrainConfig
from helios_jax.training.stage_table import load_config, make_stage
from tests.training import dummy, recipe
from tests.training.test_loop import BASE, lines, run


def config_of(stage, root, *more):
    command = recipe.arguments(stage, root, root / "run", *more)
    config = load_config(command[0], command[1:])
    return dataclasses.replace(config, model=dataclasses.replace(config.model, transformer=recipe.SIZES))


def traced(config):
    stage, state = make_stage(config), planned.abstract_state(config)
    return work.program(stage, state, planned.batch(config))


def test_tokens_of_the_released_sizes():
    """A chunk has 9 frames of 24 x 40 patches, its history 2400 tokens at every level."""
    full, half, quarter = (2400 + 9 * 24 * 40 // 4**level for level in range(3))

    def tokens(name, *overrides):
        return work.sequences(planned.open_config(f"configs/{name}.yaml", overrides), *planned.LATENTS)

    assert tokens("stage1_init") == [[full]]
    assert tokens("stage2_init") == [[quarter, half, half, full]]
    assert tokens("stage2_init", "flow.pyramid.levels=separate") == [[quarter], [half], [half], [full]]
    assert tokens("stage3_ode") == [[quarter], [half], [full]]


def test_operations_do_not_depend_on_remat_or_mesh(tmp_path):
    config = config_of("stage1_init", tmp_path)
    assert config.remat is not None
    count = flops.count(traced(dataclasses.replace(config, remat=None)))
    mesh = AbstractMesh((1, 1, 1, 2), AXES, axis_types=(AxisType.Auto,) * 4)
    with jax.sharding.use_abstract_mesh(mesh):
        assert flops.count(traced(config)) == count


def test_operations_of_stage_3_follow_its_turns(tmp_path):
    """The critic learns in every step, the generator in every second; a plan is for a step of both."""
    pretrained.write_config(recipe.SIZES, tmp_path / "teacher" / "transformer")
    program = traced(config_of("stage3_post", tmp_path))
    both, critic, *others = (flops.count(program, [np.int32(step)]) for step in range(4))
    assert others == [both, critic]
    assert both == flops.count(program) > 1.5 * critic


def test_a_batch_of_one_shape_is_looked_at_once(monkeypatch):
    """The sizes may have to be read from the files of the weights."""
    stage, asked = dummy.Dummy(TrainConfig()), []
    monkeypatch.setattr(stage, "tokens", lambda batch: asked.append(batch) or 7)
    meter = work.Meter(stage, {}, make_mesh(MeshConfig(), jax.devices()[:1]))
    for step, samples in enumerate((4, 4, 2, 4)):
        meter.add({"x": np.zeros((samples, 3))}, step)
    assert meter.take(2.0) == {"tokens_per_second": 7 * 14 / 2}
    assert meter.take(2.0) == {}
    assert len(asked) == 2


# The dummy's two products, forward and for their weights' gradients, and the second's for its input.
OPERATIONS = 5 * 2 * 16 * 64


def test_a_run_reports_mfu_where_the_peak_is_known(tmp_path, capsys, monkeypatch):
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(BASE))
    monkeypatch.setattr(chips, "peak", lambda device: 1e7)
    assert run(tmp_path / "c.yaml", f"run={tmp_path / 'known'}") == 0
    first, *rest = lines(tmp_path / "known")
    assert "mfu" not in first  # its time is that of compiling
    for line in rest:
        assert line["mfu"] == pytest.approx(line["steps_per_second"] * 4 * OPERATIONS / 1e7)
        assert "tokens_per_second" not in line  # the dummy has none
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    assert f"steps/s  MFU {100 * rest[-1]['mfu']:.0f}%  loss" in told[-1]
    assert max(map(len, told)) <= 80
    monkeypatch.undo()
    assert run(tmp_path / "c.yaml", f"run={tmp_path / 'unknown'}") == 0
    assert all("mfu" not in line for line in lines(tmp_path / "unknown"))
