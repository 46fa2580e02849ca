"""The distill stage: who moves when, which way, what is kept, and what is refused."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from helios_jax import lora, pretrained
from helios_jax.config import ConfigError
from helios_jax.data.records import Source
from helios_jax.diffusion import exits
from helios_jax.diffusion.distillation import PenaltyConfig, RenoiseConfig
from helios_jax.models.discriminator import Discriminator, DiscriminatorConfig, Head
from helios_jax.models.transformer import Transformer
from helios_jax.sharding import MeshConfig, make_mesh
from helios_jax.training.flow_config import PyramidConfig
from helios_jax.training.optim import EMAConfig, OptimConfig
from helios_jax.training.stages.distill import distill_stage, players
from helios_jax.training.stages.distill.distill_config import (
    CriticConfig,
    DistillConfig,
    DistillFlowConfig,
    DistillTrainConfig,
    GANConfig,
    ScoreConfig,
)
from helios_jax.training.stages.distill.distill_stage import DistillStage
from helios_jax.training.stages.distill.players import Players
from helios_jax.training.state import TrainState, create, update
from helios_jax.training.train_step import gradients, losses
from helios_jax.training.trainable import AdapterConfig, trainable
from tests import tiny
from tests.closeness import assert_close
from tests.diffusion.last_exits import last_exits

SMALL = dataclasses.replace(tiny.TRANSFORMER, num_layers=1)
LORA = AdapterConfig(rank=4, target_modules=("to_q", "to_v", "ffn.net.2", "proj_out"))
PYRAMID = PyramidConfig(stage_range=(0, 0.5, 1))
FAST = OptimConfig(lr=1e-2, weight_decay=0.0)
BATCH = 2
CHUNK = (BATCH, 9, 8, 8, 4)
START, STEPS = 1000, 400  # of the discriminator; of the game without it
ONE_STEP = {"steps": (1, 1), "amplify_first_chunk": False}  # for `distill`: compiles a quarter faster


def config_of(**change) -> DistillTrainConfig:
    """The distill stage on a tiny model, everything in it; `distill` and `flow` may change parts."""
    parts = {
        "steps": (2, 1),
        "score": ScoreConfig(init="teacher", guidance_scale=2.0, renoise=RenoiseConfig("beta")),
        "critic": CriticConfig(lora=LORA, optim=FAST, steps_per_generator=2),
        "gan": GANConfig(start=0, discriminator=DiscriminatorConfig((0,), dim=64), r2=PenaltyConfig(), crop=None),
        **change.pop("distill", {}),
    }
    config = DistillTrainConfig(
        precision="float32",
        lora=LORA,
        trainable=change.pop("trainable", ("adapters", "discriminator")),
        optim=change.pop("optim", FAST),
        flow=DistillFlowConfig(pyramid=PYRAMID, **change.pop("flow", {})),
        distill=DistillConfig(**parts),
        **change,
    )
    config.model.transformer = SMALL
    config.data.batch_size = BATCH
    return config


def transformer(seed: int) -> Transformer:
    return tiny.draw(Transformer.abstract(SMALL, stacked=True), np.random.default_rng(seed))


def make_players(config: DistillTrainConfig) -> Players:
    """The players as the stage makes them, drawn in one program: compiling each draw takes longer."""
    return jax.jit(lambda: _players(config))()


def _players(config: DistillTrainConfig) -> Players:
    key, settings = jax.random.key(0), config.distill
    adapters = lora.LoRAConfig(LORA.rank, LORA.alpha, LORA.target_modules, init="gaussian")
    generator = lora.add(transformer(0), adapters, key, dtype=jnp.float32)
    score = None
    if settings.score.init is None:
        generator = players._add_critic(generator, config)
    else:
        score = players._add_critic(transformer(1), config)
    heads = None
    if settings.gan is not None:
        heads = Discriminator(settings.gan.discriminator, SMALL.dim, SMALL.out_channels, rngs=nnx.Rngs(0))
    return Players(generator, score, heads)


def batch_of(chunks: int = 1, seed: int = 0) -> dict:
    rng = np.random.default_rng(seed)
    shapes = {
        "target": (BATCH, 9 * chunks, *CHUNK[2:]),
        "history": (BATCH, 19, *CHUNK[2:]),
        "anchor": (BATCH, 1, *CHUNK[2:]),
        "text": (BATCH, 5, 16),
        "negative": (BATCH, 5, 16),
    }
    batch = {name: jnp.asarray(rng.standard_normal(shape, np.float32)) for name, shape in shapes.items()}
    return {**batch, "chunk": jnp.array([0, 2], jnp.int32)}


def keys(seed: int = 1):
    return jax.random.split(jax.random.key(seed), BATCH)


def values(model) -> dict[str, np.ndarray]:
    return {".".join(map(str, path)): np.array(v.get_value()) for path, v in nnx.to_flat_state(nnx.state(model))}


def moved(before: dict, after: dict) -> set[str]:
    return {name for name, value in after.items() if (value != before[name]).any()}


def trained(name: str, *parts: str) -> bool:
    adapter = name.endswith((".a", ".b"))
    others = {"generator": "adapters" not in name, "discriminator": True}
    return name.startswith(parts) and (adapter or others.get(name.split(".")[0], False))


@dataclasses.dataclass
class Game:
    """All players on one batch, in a program for all tests: (parameters, step, keys) -> (gradients, metrics).

    The discriminator has its say from step START, and the student goes to the end in every step.
    """

    begin: TrainState
    gradient: Callable
    update: Callable


@pytest.fixture(scope="module")
def game():
    settled = {"lr": 3e-3, "betas": (0.0, 0.9), "weight_decay": 0.0}
    light = PenaltyConfig(weight=1.0)
    config = config_of(
        distill={
            **ONE_STEP,
            "score": ScoreConfig(init="teacher", guidance_scale=0.0),
            "critic": CriticConfig(
                AdapterConfig(rank=16), OptimConfig(**{**settled, "lr": 1e-2}), steps_per_generator=2
            ),
            "gan": GANConfig(
                START,
                DiscriminatorConfig((0,), dim=32),
                generator_weight=10.0,
                critic_weight=1.0,
                r1=light,
                r2=light,
                crop=None,
            ),
        },
        flow={"drop": None, "corruption": None},
        optim=OptimConfig(**settled),
        trainable=("adapters", "generator", "discriminator"),
    )
    ema, optimizer = EMAConfig(0.5, every=2), DistillStage(config).make_optimizer()
    with pytest.MonkeyPatch.context() as patch:
        # What heads are made of, tests/parity compares; convolutions take long to compile.
        patch.setattr(Head, "SHAPES", (((1, 2, 2), (1, 2, 2), (0, 0, 0)),) * 2)
        patch.setattr(exits, "draw_exits", lambda _, *levels: last_exits(*levels))
        begin = create(make_players(config), optimizer, ema, config.trainable)
        # The b of an adapter begins as zero, which would leave its a without a gradient.
        begin = begin.replace(params=jax.tree.map(lambda x: x if x.any() else x + 0.01, begin.params))

        def gradient(params, step, keys):
            state = begin.replace(params=params, step=step)
            (_, metrics), grads = gradients(DistillStage(config), state, batch_of(), keys)
            return grads, metrics

        compiled = jax.jit(gradient).lower(begin.params, begin.step, keys()).compile()
    return Game(begin, compiled, jax.jit(lambda state, grads: update(state, grads, optimizer, ema)))


@pytest.fixture(scope="module")
def turns(game):
    """Of the generator's turn and the next step: gradients and metrics at the same parameters; the states around."""
    states, found = [game.begin.replace(step=jnp.asarray(START))], []
    for number in (START, START + 1):
        found.append(game.gradient(game.begin.params, jnp.asarray(number), keys()))
        grads, _ = game.gradient(states[-1].params, jnp.asarray(number), keys())
        states.append(game.update(states[-1], grads))
    return found, states


@pytest.mark.slow
def test_neither_player_has_a_gradient_for_the_other(turns):
    on, off = (dict(nnx.to_flat_state(grads)) for grads, _ in turns[0])
    for path in off:
        with_turn, without = (np.asarray(x[path].get_value()) for x in (on, off))
        if path[0] == "generator":
            assert not without.any(), path
            assert with_turn.any(), path
        else:
            assert_close({path: with_turn}, {path: without})
            assert without.any(), path


@pytest.mark.slow
def test_the_generator_moves_on_its_turns_and_the_others_always(turns):
    found, states = turns
    models = [values(state.model) for state in states]
    for i, parts in enumerate((("generator", "score", "discriminator"), ("score", "discriminator"))):
        assert moved(*models[i : i + 2]) == {name for name in models[0] if trained(name, *parts)}
        for name in ("dmd_loss", "gan_generator"):
            total, count = found[i][1][name]
            assert count == 1 - i
            assert bool(total != 0) == (i == 0)


@pytest.mark.slow
def test_the_average_is_the_student_s_and_moves_with_it(turns):
    _, states = turns
    assert {path[0] for path, _ in nnx.to_flat_state(states[0].ema)} == {"generator"}
    best, last = ([values(x) for x in models] for models in zip(*((s.best, s.model) for s in states), strict=True))
    student = {name for name in best[0] if trained(name, "generator")}
    assert moved(best[0], best[1]) & student == student
    assert not moved(best[1], best[2]) & student
    for average, model in zip(best[1:], last[1:], strict=True):
        assert moved(average, model) == student  # the others are those of the last step


@pytest.mark.slow
def test_one_batch_is_learnt(game):
    """The student goes where the teacher changes less and less, and the critic learns what it makes there."""
    state, distance, error = game.begin, [], []
    for i in range(STEPS):
        grads, metrics = game.gradient(state.params, state.step, keys(i))
        state = game.update(state, grads)
        error.append(float(metrics["critic_loss"][0]))
        if i % 2 == 0:
            distance.append(float(metrics["dmd_distance"][0]))
    for falls, tenth in ((distance, STEPS // 20), (error, STEPS // 10)):
        assert np.mean(falls[-tenth:]) < 0.7 * np.mean(falls[:tenth]), falls[::tenth]


@pytest.mark.slow
def test_the_discriminator_tells_one_batch_from_the_student_s_which_then_passes(game):
    """First the discriminator alone learns, then the student alone, before a judge that stays as it is."""
    params = game.begin.params

    def learn(which, metric: str, step: int, count: int, optimizer) -> list[float]:
        nonlocal params
        own, seen = nnx.filter_state(params, which), []
        state, move = optimizer.init(own), jax.jit(optimizer.update)
        for _ in range(count):
            grads, metrics = game.gradient(params, jnp.asarray(step), keys())
            changes, state = move(nnx.filter_state(grads, which), state)
            own = optax.apply_updates(own, changes)
            params = nnx.merge_state(params, own)
            seen.append(float(metrics[metric][0]))
        return seen

    told = learn(lambda path, _: path[0] == "discriminator", "gan_critic", START + 1, 16, optax.adam(2e-2, 0.5))
    assert told[-1] < 0.8 * told[0], told
    passes = learn(players.of_student, "gan_generator", START, 8, optax.adam(2e-3, 0.5))
    assert passes[-1] < 0.95 * passes[0], passes


def test_critic_and_discriminator_are_clipped_together_and_apart_from_the_generator():
    """The second moments after a step are the squares of the clipped gradients: their sum is the squared norm."""
    optim = OptimConfig(betas=(0.0, 0.75), clip_norm=3.0)
    settings = {"critic": CriticConfig(lora=LORA, optim=dataclasses.replace(optim, clip_norm=2.0))}
    config = config_of(optim=optim, distill=settings)
    optimizer = DistillStage(config).make_optimizer()
    shapes = nnx.state(jax.eval_shape(lambda: make_players(config)), trainable(config.trainable))

    def filled(path, x):
        return x.replace(np.full(x.shape, 1e3 if path[0] == "discriminator" else 10.0, np.float32))

    grads = nnx.map_state(filled, shapes)
    _, state = jax.jit(lambda g: optimizer.update(g, optimizer.init(g), g))(grads)
    moments = {}
    for _, tree in optax.tree.get_all_with_path(state, "nu"):
        for path, x in jax.tree.leaves_with_path(tree):
            moments[path[0].key] = moments.get(path[0].key, 0.0) + 4 * float(x.sum())
    share = {name: float(optax.global_norm(grads[name])) ** 2 for name in ("score", "discriminator")}
    assert moments["generator"] == pytest.approx(3.0**2, rel=1e-3)
    for name, part in share.items():
        assert moments[name] == pytest.approx(2.0**2 * part / sum(share.values()), rel=1e-3)


def test_one_set_of_weights_serves_generator_and_both_scores(tmp_path):
    """The teacher's, with the student's way from it as frozen adapters: the same game as with two sets."""
    between = lora.add(transformer(1), lora.LoRAConfig(3, None, ("to_k", "ffn.net.0.proj")), jax.random.key(3))
    for adapter in (between.blocks.attn1.to_k.adapters[0], between.blocks.ffn.up.adapters[0]):
        adapter.b[...] += 0.3
    lora.save(between, tmp_path)
    score = ScoreConfig(None, adapters=(str(tmp_path),), guidance_scale=2.0)
    config = config_of(distill={"score": score, "gan": None, **ONE_STEP})
    key, new = jax.random.key(0), lora.LoRAConfig(LORA.rank, LORA.alpha, LORA.target_modules, init="gaussian")
    teacher = transformer(1)
    one = Players(players._add_critic(players._attach(lora.add(teacher, new, key), config), config), None, None)
    two = Players(lora.add(lora.merge(between), new, key), players._add_critic(teacher, config), None)
    assert sorted(lora.names(one.student)) == ["before_0", "default"]
    assert lora.names(one.fake) == [players.CRITIC]
    assert lora.names(one.real) == []
    trained_of_one, trained_of_two = (nnx.state(model, trainable(("adapters",))) for model in (one, two))
    assert len(jax.tree.leaves(trained_of_one)) == len(jax.tree.leaves(trained_of_two))
    assert not [v for _, v in nnx.to_flat_state(trained_of_one) if isinstance(v, lora.FrozenLoRAWeight)]

    stage, state = DistillStage(config), create(one, optax.sgd(1.0), None, ("adapters",))
    (value, parts), grads = jax.jit(lambda state: gradients(stage, state, batch_of(), keys()))(state)
    expected, same = jax.jit(lambda model: losses(stage, model, {**batch_of(), "step": state.step}, keys()))(two)
    learning = {name for name, x in values(grads).items() if name.endswith(".b") and x.any()}
    assert learning == {name for name in values(state.params) if name.endswith(".b")}  # those of both players
    assert float(value) == pytest.approx(float(expected), rel=1e-5)
    for name, (total, _) in parts.items():
        assert float(total) == pytest.approx(float(same[name][0]), rel=1e-4), name


TEACHERS = "a weight of the teacher, which stays as it is; name"


@pytest.mark.parametrize(
    ("own", "trainable", "rule"),
    [
        (True, ["all"], rf"would train score\.\S+, {TEACHERS} generator, adapters and"),
        (True, ["score.proj_out", "adapters"], rf"would train score\.proj_out\.\w+, {TEACHERS} generator"),
        (False, ["all"], rf"would train generator\.\S+, {TEACHERS} adapters and"),
        (False, ["adapters", r"generator\.patch_short"], rf"would train generator\.patch_short\.\w+, {TEACHERS}"),
        (True, ["generator", "discriminator"], r"leaves the critic as it began; name adapters, too"),
        (True, ["generator", "adapters", "discriminator"], None),
        (False, ["adapters", "discriminator"], None),
    ],
)
def test_the_teacher_is_never_trained_and_the_critic_always(tmp_path, own, trainable, rule):
    pretrained.write_config(SMALL, tmp_path / "transformer")
    config = config_of(distill={"score": ScoreConfig(init=str(tmp_path) if own else None)})
    config = dataclasses.replace(config, lora=None if own else LORA, trainable=tuple(trainable))
    stage = distill_stage.DistillStage(config)
    if rule is None:
        jax.eval_shape(stage.init, jax.random.key(0))
        return
    with pytest.raises(ConfigError, match=rule) as error:
        jax.eval_shape(stage.init, jax.random.key(0))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "parts", "rule"),
    [
        ({"lora": None, "trainable": ("all",)}, {}, r"distill\.score\.init: name the teacher's weights; without"),
        ({"optim": OptimConfig(ema=EMAConfig())}, {}, r"optim\.ema\.every is 1: set it to .*steps_per_generator, 2"),
        ({}, {"gan": GANConfig()}, r"distill\.gan\.discriminator\.blocks: .* but the scores have blocks 0 to 0"),
        (
            {},
            {"gan": GANConfig(discriminator=DiscriminatorConfig((0,)), crop=0.5)},
            r"would see latents 4 high, it needs 8 or more .* set distill\.gan\.crop to null",
        ),
        ({}, {"score": ScoreConfig(adapters=("nowhere.safetensors",))}, r"distill\.score\.adapters: .*nowhere"),
    ],
    ids=["no lora", "average", "blocks", "crop", "adapters"],
)
def test_players_that_do_not_fit_are_refused_in_one_line(monkeypatch, change, parts, rule):
    source = Source([{"latents": np.zeros((3, *CHUNK[1:]))}], (), "data", [])
    monkeypatch.setattr(distill_stage.flow, "open_latents", lambda *_: source)
    config = config_of(distill={"score": ScoreConfig(), "gan": None, **parts})
    config = dataclasses.replace(config, **change)
    with pytest.raises(ConfigError, match=rule) as error:
        distill_stage.DistillStage(config).batches(make_mesh(MeshConfig()))
    assert "\n" not in str(error.value)
