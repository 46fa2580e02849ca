"""Optimizers by name: optax's own steps, the parameters that decay, options that are refused, and clipping."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from optax import contrib

from helios_jax.training.optim import OPTIMIZERS, OptimConfig, make_optimizer, on_turns
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


def test_turns_are_those_of_optax(params, grads):
    """Two of five steps move the parameters, and the state of the others is what it was."""
    inner = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(optax.linear_schedule(RATE, 0.0, 5)))
    found = []
    for optimizer in (on_turns(inner, 3), optax.conditionally_mask(inner, lambda step: step % 3 == 0)):
        state, steps = optimizer.init(params), []
        for i in range(5):
            moves, state = jax.jit(optimizer.update)(optax.tree.scale(i + 1.0, grads), state, params)
            assert bool(optax.global_norm(moves) > 0) == (i % 3 == 0)
            steps.append((moves, state))
        found.append(steps)
    assert_close(*found)
