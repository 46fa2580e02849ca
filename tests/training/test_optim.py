"""Optimizers by name: optax's own steps, the parameters that decay, options that are refused, and clipping."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from optax import contrib

from helios_jax.training.optim import OPTIMIZERS, OptimConfig, make_optimizer
from tests.closeness import assert_close
from tests.training import dummy

RATE, DECAY = 0.5, 0.1


@pytest.fixture(scope="module")
def params() -> nnx.State:
    """Parameters with biases that are not zero."""
    state = nnx.state(dummy.Net(rngs=nnx.Rngs(0)))
    return jax.tree.map(lambda x: x if x.any() else x + 1, state)


@pytest.fixture(scope="module")
def grads(params) -> nnx.State:
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: jnp.asarray(rng.standard_normal(x.shape, np.float32)), params)


def changes(optimizer: optax.GradientTransformation, params, grads):
    return jax.jit(lambda p, g: optimizer.update(g, optimizer.init(p), p)[0])(params, grads)


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        (
            "adamw",
            {"betas": (0.5, 0.9), "eps": 1e-2, "weight_decay": DECAY},
            optax.adamw(RATE, 0.5, 0.9, 1e-2, weight_decay=DECAY),
        ),
        ("adamw", {}, optax.adamw(RATE)),
        ("adam", {"betas": (0.5, 0.9), "eps": 1e-2}, optax.adam(RATE, 0.5, 0.9, 1e-2)),
        ("lion", {"betas": (0.5, 0.9), "weight_decay": DECAY}, optax.lion(RATE, 0.5, 0.9, weight_decay=DECAY)),
        (
            "prodigy",
            {"betas": (0.5, 0.9), "eps": 1e-2, "weight_decay": DECAY},
            contrib.prodigy(RATE, (0.5, 0.9), eps=1e-2, weight_decay=DECAY, safeguard_warmup=True),
        ),
    ],
)
def test_a_name_is_optax_s_optimizer(params, grads, name, options, expected):
    ours = make_optimizer(OptimConfig(name=name, lr=RATE, clip_norm=None, **options), 1)
    assert_close(changes(ours, params, grads), changes(expected, params, grads))


def test_muon_turns_matrices_layer_by_layer_and_leaves_biases_to_adam(params, grads):
    """All singular values of a matrix's step are near one another; its mean square is near AdamW's, 0.2 of the rate."""
    optimizer = make_optimizer(OptimConfig(name="muon", lr=RATE, clip_norm=None, weight_decay=0.0), 1)
    got = changes(optimizer, params, grads)
    values = np.linalg.svd(got.up.weight[...], compute_uv=False)
    assert values.min() / values.max() > 0.5
    assert np.sqrt(np.square(got.up.weight[...]).mean()) == pytest.approx(0.2 * RATE, rel=0.3)
    adam = changes(optax.nadamw(RATE, weight_decay=0.0), params, grads)
    assert_close({"bias": got.up.bias[...]}, {"bias": adam.up.bias[...]})

    def stacked(tree):
        weight = tree.up.weight
        return {"x": weight.replace(jnp.stack([weight[...], 2 * weight[...] + 1]))}

    both = changes(optimizer, stacked(params), stacked(grads))["x"][...]
    assert_close({"first layer": both[0]}, {"first layer": got.up.weight[...]}, ulps=100)


@pytest.mark.parametrize("name", [name for name, own in OPTIMIZERS.items() if "decayed" in own.takes])
@pytest.mark.parametrize("decayed", ["all", "matrices"])
def test_decay_shrinks_all_parameters_or_matrices_alone(params, name, decayed):
    config = OptimConfig(name=name, lr=RATE, weight_decay=DECAY, decayed=decayed)
    got = changes(make_optimizer(config, 1), params, jax.tree.map(jnp.zeros_like, params))
    bias = RATE * DECAY if decayed == "all" else 0.0
    assert_close({"weight": got.up.weight[...]}, {"weight": -RATE * DECAY * params.up.weight[...]})
    assert_close({"bias": got.up.bias[...]}, {"bias": -bias * params.up.bias[...]})
