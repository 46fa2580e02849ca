"""Laws of a training step and of what a run writes: remat, accumulation, clipping, average, precision, TensorBoard."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import yaml
from flax import nnx
from tensorboardX.proto.event_pb2 import Event

import train
from helios_jax.models.transformer import Transformer
from helios_jax.sharding import make_mesh
from helios_jax.training import optim
from helios_jax.training.flow_config import FlowTrainConfig
from helios_jax.training.optim import EMAConfig, OptimConfig
from helios_jax.training.stage_table import load_config
from helios_jax.training.stages.flow import FlowStage
from helios_jax.training.state import create, update
from helios_jax.training.train_step import make_step
from tests import tiny
from tests.closeness import assert_close
from tests.training import dummy, recipe


@pytest.fixture(scope="module")
def config() -> FlowTrainConfig:
    argv = recipe.arguments("stage1_init", recipe.ROOT, recipe.ROOT / "none", "remat=null", "lora=null")
    got = load_config(argv[0], [*argv[1:], "trainable=[all]"])
    got.model.transformer = recipe.SIZES
    return got


def draw(config: FlowTrainConfig) -> Transformer:
    return tiny.draw(Transformer.abstract(config.model.transformer, stacked=True), np.random.default_rng(0))


def batch_of(count: int = 4) -> dict[str, jax.Array]:
    rng, side = np.random.default_rng(1), recipe.SIDE
    shapes = {"target": (9, side, side, 4), "history": (19, side, side, 4), "anchor": (1, side, side, 4)}
    shapes["text"] = recipe.TEXT
    arrays = {name: jnp.asarray(rng.standard_normal((count, *s), np.float32)) for name, s in shapes.items()}
    return {**arrays, "chunk": jnp.arange(count, dtype=jnp.int32)}


def gradients(config: FlowTrainConfig):
    """The loss and all gradients of a step."""
    keys, batch = jax.random.split(jax.random.key(3), 4), {**batch_of(), "step": jnp.zeros((), jnp.int32)}
    got = jax.jit(jax.value_and_grad(lambda model: FlowStage(config).loss(model, batch, keys)[0]))(draw(config))
    return jax.tree.leaves(got)


@pytest.fixture(scope="module")
def plain(config):
    return gradients(config)


def test_remat_changes_no_gradient(config, plain):
    """Of one policy: tests/models/transformer/test_packing.py has all."""
    assert_close(gradients(dataclasses.replace(config, remat="block")), plain)


def steps(config: FlowTrainConfig, count: int, optimizer: optax.GradientTransformation):
    """The state after `count` steps on one batch, and the metrics of each."""
    mesh, state = make_mesh(config.mesh), create(draw(config), optimizer, config.optim.ema)
    step, seen = make_step(FlowStage(config), optimizer, state, mesh), []
    for _ in range(count):
        state, metrics = step(state, batch_of(), jax.random.key(2))
        seen.append(jax.device_get(metrics))
    return state, seen


def test_accumulated_gradients_are_those_of_the_whole_batch(config):
    """One step of gradient descent at rate 1 moves the parameters by the gradient."""
    found = []
    for parts in (1, 4):
        changed = dataclasses.replace(config, optim=dataclasses.replace(config.optim, accumulate=parts))
        found.append(steps(changed, 1, optax.sgd(1.0)))
    (whole, (one,)), (parts, (four,)) = found
    assert_close(parts.params, whole.params)
    for name in one:
        a, b = (np.divide(*x[name]) if isinstance(x[name], tuple) else x[name] for x in (one, four))
        assert_close({name: b}, {name: a}, ulps=60)


@pytest.mark.heavy
def test_bfloat16_trains_as_float32_does(config):
    losses = {}
    for precision in ("float32", "bfloat16"):
        changed = dataclasses.replace(config, precision=precision, optim=OptimConfig(lr=3e-3, weight_decay=0.0))
        state, seen = steps(changed, 8, optim.make_optimizer(changed.optim, 8))
        assert {x.dtype for x in jax.tree.leaves(state.params)} == {jnp.dtype("float32")}
        losses[precision] = [float(x["loss"]) for x in seen]
    np.testing.assert_allclose(losses["bfloat16"], losses["float32"], rtol=3e-2)
    assert losses["bfloat16"] != losses["float32"]


def net() -> dummy.Net:
    return dummy.Net(rngs=nnx.Rngs(0))


def test_clipping_is_by_the_norm_of_all_gradients_together():
    """A gradient above the norm moves as one of that norm in its direction, one below it as it is."""

    def moved(config: OptimConfig, factor: float) -> np.ndarray:
        optimizer = optim.make_optimizer(config, 10)
        state = create(net(), optimizer, None)
        unit = jax.tree.map(jnp.ones_like, state.params)
        unit = jax.tree.map(lambda x: x / optax.global_norm(unit), unit)
        after = update(state, jax.tree.map(lambda x: factor * x, unit), optimizer, None)
        return np.concatenate([np.ravel(x) for x in jax.tree.leaves(after.opt_state) if np.ndim(x)])

    clipped = OptimConfig(clip_norm=2.0, weight_decay=0.0)
    free = OptimConfig(clip_norm=None, weight_decay=0.0)
    assert_close(moved(clipped, 50.0), moved(free, 2.0), ulps=200)  # a norm of thousands of equal numbers
    assert_close(moved(clipped, 1.5), moved(free, 1.5))
    assert np.abs(moved(free, 50.0) - moved(free, 2.0)).max() > 1e-2


def test_average_starts_when_told_and_moves_every_so_often():
    ema, optimizer = EMAConfig(decay=0.75, start=2, every=3, ramp=False), optax.sgd(0.1)
    state = create(net(), optimizer, ema)
    grads, expected = jax.tree.map(jnp.ones_like, state.params), np.array(state.params.up.weight[...])
    for step in range(9):
        state = update(state, grads, optimizer, ema)
        now = np.array(state.params.up.weight[...])
        if step < 2:
            expected = now
        elif step % 3 == 0:
            expected = 0.75 * expected + 0.25 * now
        assert_close({step: state.ema.up.weight[...]}, {step: expected})
    assert np.abs(expected - now).max() > 1e-2
    assert state.ema.up.weight.dtype == jnp.float32


@pytest.mark.parametrize(("start", "every"), [(0, 1), (7, 1), (10, 5), (7, 5)])
def test_average_ramps_up_as_upstream_s(start, every):
    """Upstream counts the moves, one per step before `start`, and keeps (1 + s) / (10 + s) from the second after it."""
    ema, moves, expected = EMAConfig(0.8, start, every), 0, []
    for step in range(250):
        moved = step < start or step % every == 0
        moves += moved
        s = moves - start - 1
        expected.append((min((1 + s) / (10 + s), 0.8) if s > 0 else 0.0) if moved else 1.0)
    assert {0.0, 2 / 11, 3 / 12, 0.8} <= set(expected)
    assert_close(optim.kept(ema, jnp.arange(250)), np.float32(expected))


def events(folder) -> list[Event]:
    """TensorBoard's records: length, a checksum of it, the event, a checksum of that."""
    (path,) = folder.glob("events*")
    data, at, found = path.read_bytes(), 0, []
    while at < len(data):
        size = int.from_bytes(data[at : at + 8], "little")
        found.append(Event.FromString(data[at + 12 : at + 12 + size]))
        at += 16 + size
    return found


def test_tensorboard_has_every_report_and_validation_s_pictures(tmp_path):
    path, run = tmp_path / "c.yaml", tmp_path / "run"
    settings = {
        "stage": "tests.training.dummy.Dummy",
        "steps": 6,
        "log_every": 2,
        "run": str(run),
        "precision": "float32",
    }
    settings |= {"validation": {"every": 3, "prompts": ["x"]}, "checkpoint": {"every": 6}}
    path.write_text(yaml.safe_dump(settings))
    assert train.main([str(path)]) == 0
    scalars, pictures = {}, set()
    for event in events(run / "tensorboard"):
        for value in event.summary.value:
            if value.HasField("image"):
                pictures.add((value.tag, event.step, value.image.height))
            else:
                scalars.setdefault(value.tag, {})[event.step] = value.simple_value
    # A report comes with the first step, where the log asks for it, and where a validation interrupts.
    assert sorted(scalars["loss"]) == [1, 2, 3, 4, 6]
    assert scalars.keys() >= {"loss", "grad_norm", "lr", "noise", "loss_positive"}
    assert pictures == {("validation/weight", 3, 4), ("validation/weight", 6, 4)}
    assert sorted(x.name for x in (run / "validation").iterdir()) == ["step_000003", "step_000006"]
