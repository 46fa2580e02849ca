"""Seeds: 64 bits, all of which count."""

import jax
import numpy as np
import pytest

from helios_jax.runtime import seeds


@pytest.mark.parametrize("seed", [0, 5, 2**31, 2**32 - 1, np.int64(7)])
def test_small_seeds_have_jaxs_keys(seed):
    assert jax.random.key_data(seeds.key(seed)).tolist() == jax.random.key_data(jax.random.key(int(seed))).tolist()


def test_all_bits_count():
    draws = {float(jax.random.normal(seeds.key(seed))) for seed in (5, 5 + 2**32, 5 + 2**33, 2**63, 2**64 - 1)}
    assert len(draws) == 5


@pytest.mark.parametrize("seed", [-1, 2**64, 1.5, "3", True, None])
def test_what_is_no_seed_is_refused(seed):
    with pytest.raises(ValueError, match=r"^seed must be (a whole number|from 0 to 2\^64 - 1), got "):
        seeds.key(seed)
