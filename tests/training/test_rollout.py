"""Numbers of chunks that the student makes in a row, and the shift of their times."""

import jax
import jax.numpy as jnp
import pytest

from helios_jax.config import ConfigError
from helios_jax.training.pipeline_parts import student_scheduler
from helios_jax.training.stage_table import load_config
from helios_jax.training.stages.distill.distill_config import RolloutConfig


def test_rollouts_grow_with_the_steps():
    config = RolloutConfig(smallest=1, largest=4, cold_start=10, warm_start=5)
    steps = jnp.arange(210)
    drawn = jax.vmap(config.draw)(jax.random.split(jax.random.key(0), 210), steps).tolist()
    assert drawn[:5] == [1] * 5
    assert drawn[5:10] == [2] * 5
    assert set(drawn[10:]) == {1, 2, 3, 4}


@pytest.mark.parametrize(
    ("values", "rule"),
    [
        ({"smallest": 0}, "smallest must be at least 1 and at most largest"),
        ({"smallest": 3, "largest": 2}, "smallest must be at least 1 and at most largest"),
        ({"warm_start": 3}, "warm_start 3 must come before cold_start 0"),
    ],
)
def test_rollouts_that_cannot_be_are_one_line(values, rule):
    with pytest.raises(ValueError, match=rule):
        RolloutConfig(**values)


def test_a_student_s_shift_is_one_of_two():
    own = ["flow.pyramid.timestep_shift=2.0", "distill.shift=null"]
    config = load_config("configs/stage3_ode.yaml", own)
    assert student_scheduler(config).shift == 2.0
    with pytest.raises(ConfigError, match=r"distill\.shift linear replaces flow.pyramid.timestep_shift 2\.0"):
        load_config("configs/stage3_ode.yaml", own[:1])
