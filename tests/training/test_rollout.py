"""Numbers of chunks that the student makes in a row."""

import jax
import jax.numpy as jnp
import pytest

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
