"""Stage 3, second part: a student of few steps whose videos are distributed as the teacher's (paper section 3.5).

The student (generator) makes a chunk after real history; the teacher (real score) and the critic (fake score) say where
it should move; the critic follows what the student makes; a discriminator on the critic's features tells it from real
latents. Batches are those of `stages.flow`, with `negative` [b, m, d], the text that guidance leads away from, and
`target` as many chunks as a rollout may have. `helios_jax.training.distill` is the config.
"""

import dataclasses
import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx, struct
from jaxtyping import Array, Float, Key

from helios_jax import lora
from helios_jax.config import ConfigError
from helios_jax.data.records import open_source
from helios_jax.diffusion import distillation as losses
from helios_jax.diffusion import exits, noising
from helios_jax.diffusion.corruption import corrupt_history, drop_history
from helios_jax.diffusion.denoise import ChunkNoise, Conditioning, denoise_to_exits
from helios_jax.diffusion.levels import make_levels
from helios_jax.diffusion.memory import History, push, window
from helios_jax.diffusion.noising import add_noise, predict_data
from helios_jax.diffusion.schedule import dynamic_shift
from helios_jax.models.discriminator import Head
from helios_jax.models.transformer import Transformer
from helios_jax.precompute.encode import EMPTY_TEXT, NEGATIVE_TEXT
from helios_jax.pretrained import CheckpointError
from helios_jax.training import optim, pipeline
from helios_jax.training.config import TrainConfig
from helios_jax.training.distill import DistillConfig
from helios_jax.training.players import Players, init, load, of_student, score_config
from helios_jax.training.stages import flow
from helios_jax.training.stages.flow import Metrics, fold
from helios_jax.training.start import transformer_config
from helios_jax.training.trainable import ALL, Filter

__all__ = ["batches", "export", "init", "load", "loss", "make_optimizer", "validate"]

COMMON = 2**31 - 1  # apart from every step: the loop folds those into the same seed


def batches(config: TrainConfig) -> Any:
    """`stages.flow`'s, with the negative text, and as many chunks as a rollout may have.

    Raises ConfigError for data or components that are not there or do not fit.
    """
    distill = _distill(config)
    _check(config)
    name = {"negative": NEGATIVE_TEXT, "empty": EMPTY_TEXT}[distill.negative_text]
    return flow.chunks(config, distill.rollout.largest, name)


def _check(config: TrainConfig) -> None:
    """Raises ConfigError for players that do not fit one another."""
    distill, own = _distill(config), transformer_config(config)
    if distill.score.init is None:
        if config.lora is None:
            raise ConfigError(
                "distill.score.init: name the teacher's weights; without, the generator's serve, and it needs lora"
            )
        scores = own
        try:
            files = {file: lora.read(file) for file in distill.score.adapters}
            lora.check(Transformer.abstract(own, stacked=True), files)
        except CheckpointError as error:
            raise ConfigError(f"distill.score.adapters: {error}") from None
    else:
        scores = transformer_config(score_config(config))
        for name in ("patch_size", "in_channels", "out_channels", "text_dim"):
            if getattr(own, name) != (theirs := getattr(scores, name)):
                raise ConfigError(f"distill.score.init: its {name} is {theirs}, the generator's {getattr(own, name)}")
    if (average := config.optim.ema) is not None and average.every != distill.critic.steps_per_generator:
        raise ConfigError(
            f"optim.ema.every is {average.every}: set it to distill.critic.steps_per_generator, "
            f"{distill.critic.steps_per_generator}, so that the average moves when the generator does"
        )
    if distill.gan is None:
        return
    if not {ALL, "discriminator"} & set(config.trainable):
        raise ConfigError(
            f"trainable: {list(config.trainable)} leaves the discriminator as it began; name it too, or set "
            "distill.gan to null"
        )
    blocks, count = distill.gan.discriminator.blocks, scores.num_layers
    if max(blocks, default=0) >= count:
        raise ConfigError(f"distill.gan.discriminator.blocks: {blocks}, but the scores have blocks 0 to {count - 1}")
    try:
        examples = open_source(config.data.folder, "train").of_each_bucket()
    except (FileNotFoundError, ValueError) as error:
        raise ConfigError(f"data.folder: {error}") from None
    crop = distill.gan.crop or 1
    for latents in (example["latents"].shape[1:-1] for example in examples):
        seen = (latents[0], *(int(n * crop) for n in latents[1:]))
        for axis, (name, size, patch) in enumerate(zip(("frames", "high", "wide"), seen, scores.patch_size)):
            least = Head.smallest(axis) * (patch if blocks else 1)
            if size < least or size % patch:
                raise ConfigError(
                    f"distill.gan: the discriminator would see latents {size} {name}, it needs {least} or more in "
                    f"patches of {patch}; set distill.gan.crop to null, or use larger videos"
                )


def make_optimizer(config: TrainConfig) -> optax.GradientTransformation:
    """One for the generator, which moves every `critic.steps_per_generator`-th step, and one for critic and
    discriminator."""
    critic = _distill(config).critic
    every = critic.steps_per_generator
    generator = optim.make_optimizer(config.optim, math.ceil(config.steps / every))

    def player(params: Any) -> Any:
        return nnx.map_state(lambda path, x: "generator" if of_student(path, x) else "critic", params)

    return optax.partition(
        {
            "generator": optax.conditionally_mask(generator, lambda step, **_: jnp.asarray(step) % every == 0),
            "critic": optim.make_optimizer(critic.optim, config.steps),
        },
        player,
    )


@struct.dataclass
class Scene:
    """History and text that a chunk is made and scored with.

    The scores see `history`; the `student`'s has lost some saturation, too. Text and negative text are embeddings
    [b, m, d]; `real` [b, t, h, w, c] are the data's own chunks.
    """

    history: History
    student: History
    text: Any
    negative: Any
    real: Any


def loss(
    model: Players, batch: dict[str, Any], keys: Key[Array, " b"], config: TrainConfig
) -> tuple[Float[Array, ""], Metrics]:
    """The generator's loss, on its turns, plus the critic's; neither has a gradient for the other's parameters."""
    distill, step = _distill(config), batch["step"]
    scene = _scene(batch, fold(keys, 0), config)
    # One draw for all samples, of all parts of a batch: it takes as many passes as its longest rollout.
    common = jax.random.fold_in(jax.random.fold_in(jax.random.key(config.seed), COMMON), step)
    chunks = distill.rollout.draw(jax.random.fold_in(common, 0), step)

    critic = _learning(model, lambda path, x: not of_student(path, x))
    critic_loss, metrics = _critic_loss(
        critic, scene, chunks, fold(keys, 2), jax.random.fold_in(common, 1), step, config
    )
    turn = step % distill.critic.steps_per_generator == 0
    generator = partial(_generator_loss, config=config)
    operands = _learning(model, of_student), scene, chunks, fold(keys, 3), jax.random.fold_in(common, 2), step
    nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(generator, *operands))
    generator_loss, more = jax.lax.cond(turn, generator, lambda *_: nothing, *operands)
    return critic_loss + generator_loss, {**metrics, **more}


def _distill(config: TrainConfig) -> DistillConfig:
    assert config.distill is not None
    return config.distill


def _learning(model: Players, which: Filter) -> Players:
    """`model` with gradients for the parameters `which` alone."""
    graph, own, others = nnx.split(model, which, ...)
    return nnx.merge(graph, own, jax.lax.stop_gradient(others))


def _scene(batch: dict[str, Any], keys: Key[Array, " b"], config: TrainConfig) -> Scene:
    settings = config.flow
    left = batch["history"], batch["anchor"]
    if settings.drop is not None:
        left = drop_history(fold(keys, 0), *left, settings.drop, settings.memory)

    def past(corruption: Any) -> History:
        seen = left
        if corruption is not None:
            seen = corrupt_history(fold(keys, 1), *seen, corruption, settings.memory)
        history, anchor = seen
        # Where there is no anchor yet, the first chunk of a rollout brings it.
        return History(history, anchor, anchor.any((1, 2, 3, 4), keepdims=True), batch["chunk"])

    corruption = settings.corruption
    student = scores = past(corruption)
    if corruption is not None and corruption.saturation is not None:
        scores = past(dataclasses.replace(corruption, saturation=None))
    return Scene(scores, student, batch["text"], batch["negative"], batch["target"])


def _make(
    generator: Transformer,
    scene: Scene,
    chunks: Array,
    keys: Key[Array, " b"],
    common: Key[Array, ""],
    config: TrainConfig,
    *,
    with_gradient: bool,
) -> tuple[Float[Array, "b t h w c"], History]:
    """The last of `chunks` in a row that the student makes, and the history that its scores see."""
    distill, memory, dtype = _distill(config), config.flow.memory, jnp.dtype(config.precision)
    scheduler = pipeline.student_scheduler(config)
    shape = scene.real.shape[1:]
    shape = (memory.frames_per_chunk, *shape[1:])
    patch = generator.config.patch_size
    tokens = math.prod(n // p for n, p in zip(shape, patch))
    levels, first_levels = (
        make_levels(scheduler, [times * n for n in distill.steps], tokens, pyramid=True, counted="own", whole=False)
        for times in (1, 1 + distill.amplify_first_chunk)
    )
    conditioning = Conditioning(generator.text_kv(scene.text.astype(dtype)))

    def chunk(number: Any, history: History, with_gradient: bool) -> Array:
        own, shared = fold(keys, number), jax.random.fold_in(common, number)

        def normal(i: int, shape: tuple[int, ...]) -> Array:
            return jax.vmap(lambda key: jax.random.normal(key, shape))(fold(own, i))

        count, (t, h, w, c) = len(levels), shape
        blocks = [normal(i, (t, h >> (count - 1 - i), w >> (count - 1 - i), c)) for i in range(1, count)]
        noise = ChunkNoise(normal(0, shape), tuple(blocks))
        first = exits.is_first_chunk(history)
        stops = exits.draw_exits(shared, levels, first_levels, first)
        return denoise_to_exits(
            generator,
            history,
            noise,
            conditioning,
            exits.end_at(stops, levels, first_levels, first),
            memory,
            stops,
            with_gradient=with_gradient,
            dtype=dtype,
            remat=config.remat,
        )

    student, scores = scene.student, scene.history
    if distill.rollout.largest > 1:

        def before(number: Array, past: tuple[History, History]) -> tuple[History, History]:
            made = chunk(number, past[0], False)
            return _pushed(past[0], made, config), _pushed(past[1], made, config)

        student, scores = jax.lax.fori_loop(0, chunks - 1, before, (student, scores))
    return chunk(chunks - 1, student, with_gradient), scores


def _pushed(history: History, latents: Array, config: TrainConfig) -> History:
    after = push(history, latents, config.flow.memory)
    return History(after.latents, after.anchor, jnp.ones_like(history.anchored), after.chunk)


def _real(scene: Scene, chunks: Array, config: TrainConfig) -> tuple[Array, History]:
    """The data's own chunk in the place of the one that is scored, and the past that it has."""
    t = config.flow.memory.frames_per_chunk

    def at(number: Any) -> Array:
        return jax.lax.dynamic_slice_in_dim(scene.real, number * t, t, 1)

    past = scene.history
    if _distill(config).rollout.largest > 1:
        past = jax.lax.fori_loop(0, chunks - 1, lambda i, past: _pushed(past, at(i), config), past)
    return at(chunks - 1), past


@struct.dataclass
class Seen:
    """Inputs of the scores beside noisy latents."""

    parts: Any
    indices: Any
    text: Any


def _seen(model: Transformer, history: History, text: Array, config: TrainConfig) -> Seen:
    dtype = jnp.dtype(config.precision)
    parts, indices = window(config.flow.memory, history)
    return Seen(jax.tree.map(lambda x: x.astype(dtype), parts), indices, model.text_kv(text.astype(dtype)))


def _velocity(model: Transformer, noisy: Array, sigma: Array, seen: Seen, config: TrainConfig) -> Array:
    noisy = noisy.astype(config.precision)
    out = model(noisy, 1000 * sigma, seen.text, seen.parts, seen.indices, remat=config.remat)
    return out.astype(jnp.float32)


def _repeated(x: Any, count: int) -> Any:
    """Each sample `count` times in a row: the copies stay on the sample's device."""
    return jax.tree.map(lambda a: jnp.repeat(a, count, 0), x)


def _together(*parts: Array) -> Array:
    """Samples of several batches, those of one number in a row."""
    return jnp.stack(parts, 1).reshape(-1, *parts[0].shape[1:])


def _shift(made: Array, config: TrainConfig) -> float:
    shift = _distill(config).shift
    mu = dynamic_shift(math.prod(made.shape[1:4]) // 4)  # at upstream's patch of 1 x 2 x 2
    return 1.0 if shift is None else mu if shift == "linear" else min(math.exp(mu), 7.0)


def _generator_loss(
    model: Players, scene: Scene, chunks: Array, keys: Array, common: Array, step: Array, config: TrainConfig
) -> tuple[Float[Array, ""], Metrics]:
    distill, gan = _distill(config), _distill(config).gan
    made, history = _make(model.student, scene, chunks, fold(keys, 0), common, config, with_gradient=True)
    k_sigma, k_noise, k_gan, k_crop = (fold(keys, i) for i in range(1, 5))
    sigma = losses.draw_sigma(k_sigma, distill.score.renoise, step, _shift(made, config))

    fixed = jax.lax.stop_gradient(made)
    gradient, distance = jax.lax.stop_gradient(
        dmd_gradient(model, fixed, history, scene, sigma, _normal(k_noise, made), config)
    )
    dmd = losses.dmd_loss(made, gradient).mean()
    metrics = {"dmd_loss": (dmd, jnp.ones(())), "dmd_distance": (distance, jnp.ones(()))}
    if gan is None or model.discriminator is None:
        return dmd, metrics

    def adversarial(made: Array) -> Array:
        noisy = add_noise(made, _normal(k_gan, made), sigma)
        logits = _logits(model, _window(noisy, k_crop, config), sigma, history, scene.text, config)
        return losses.gan_loss(logits, real=True).mean()

    on = step >= gan.start
    against = jax.lax.cond(on, adversarial, lambda _: jnp.zeros(()), made)
    return dmd + gan.generator_weight * against, {**metrics, "gan_generator": (against, on.astype(jnp.float32))}


def dmd_gradient(
    model: Players, made: Array, history: History, scene: Scene, sigma: Array, noise: Array, config: TrainConfig
) -> tuple[Float[Array, "b t h w c"], Float[Array, ""]]:
    """Direction from which the two scores push `made`, from what they see of it at `sigma`; and how far, on average,
    the teacher would move it."""
    distill = _distill(config)
    noisy = add_noise(made, noise, sigma)
    fake, real = model.fake, model.real

    def clean(score: Transformer, text: Array, copies: int) -> Array:
        past, x, s = (_repeated(a, copies) for a in (history, noisy, sigma))
        return predict_data(x, _velocity(score, x, s, _seen(score, past, text, config), config), s)

    predicted = clean(fake, scene.text, 1)
    scale = distill.score.guidance_scale
    if scale == 0:
        teacher = clean(real, scene.text, 1)
    else:
        pair = clean(real, _together(scene.text, scene.negative), 2).reshape(-1, 2, *made.shape[1:])
        teacher = pair[:, 0] + scale * (pair[:, 0] - pair[:, 1])
    return losses.dmd_gradient(made, teacher, predicted), jnp.abs(made - teacher).mean()


def _critic_loss(
    model: Players, scene: Scene, chunks: Array, keys: Array, common: Array, step: Array, config: TrainConfig
) -> tuple[Float[Array, ""], Metrics]:
    distill, gan = _distill(config), _distill(config).gan
    made, history = _make(model.student, scene, chunks, fold(keys, 0), common, config, with_gradient=False)
    made, history = jax.lax.stop_gradient((made, history))
    k_sigma, k_noise, k_crop, k_crop_real, k_r1, k_r2 = (fold(keys, i) for i in range(1, 7))
    sigma = losses.draw_sigma(k_sigma, distill.critic.renoise, step, _shift(made, config))
    noise = _normal(k_noise, made)
    noisy = add_noise(made, noise, sigma)
    velocity = _velocity(model.fake, noisy, sigma, _seen(model.fake, history, scene.text, config), config)
    denoising = jnp.square(velocity - noising.velocity(made, noise)).mean()
    metrics: Metrics = {"critic_loss": (denoising, jnp.ones(()))}
    if gan is None or model.discriminator is None:
        return denoising, metrics

    def adversarial(_: None) -> tuple[Array, Array]:
        own, past = _real(scene, chunks, config)
        real = add_noise(own, noise, sigma)
        judged = [(_window(noisy, k_crop, config), history), (_window(real, k_crop_real, config), past)]
        # A penalty compares one window with and without the noise. (Upstream draws another window for each.)
        for term, key, (latents, after) in ((gan.r1, k_r1, judged[1]), (gan.r2, k_r2, judged[0])):
            if term is not None:
                judged.append((latents + term.sigma * _normal(key, latents), after))
        count = len(judged)
        latents, after = jax.tree.map(_together, *judged)
        logits = _logits(model, latents, _repeated(sigma, count), after, _repeated(scene.text, count), config)
        logits = logits.reshape(-1, count, logits.shape[-1])
        fake_logits, real_logits, *moved = (logits[:, i] for i in range(count))
        against = (losses.gan_loss(fake_logits, real=False) + losses.gan_loss(real_logits, real=True)).mean()
        penalties = jnp.zeros(())
        for term, still in ((gan.r1, real_logits), (gan.r2, fake_logits)):
            if term is not None:
                penalties = penalties + losses.penalty(still, moved.pop(0), term).mean()
        return against, penalties

    on = step >= gan.start
    against, penalties = jax.lax.cond(on, adversarial, lambda _: (jnp.zeros(()), jnp.zeros(())), None)
    weight = on.astype(jnp.float32)
    metrics |= {"gan_critic": (against, weight), "gan_penalty": (penalties, weight)}
    return denoising + gan.critic_weight * against + penalties, metrics


def _logits(model: Players, noisy: Array, sigma: Array, history: History, text: Array, config: TrainConfig) -> Array:
    """The discriminator's logits for noisy latents that follow `history`."""
    fake, discriminator = model.fake, model.discriminator
    assert discriminator is not None
    seen = _seen(fake, history, text, config)
    velocity, hidden = fake.features(
        noisy.astype(config.precision),
        1000 * sigma,
        seen.text,
        seen.parts,
        seen.indices,
        blocks=discriminator.config.blocks,
        remat=config.remat,
    )
    return discriminator(velocity, hidden)


def _window(latents: Array, keys: Array, config: TrainConfig) -> Array:
    gan = _distill(config).gan
    assert gan is not None
    if gan.crop is None:
        return latents
    height, width = (int(n * gan.crop) for n in latents.shape[2:4])
    return losses.crop(latents, keys, (height, width))


def _normal(keys: Array, like: Array) -> Array:
    return jax.vmap(lambda key: jax.random.normal(key, like.shape[1:]))(keys)


def export(model: Players, config: TrainConfig, folder: Any) -> None:
    """The student, as `training.pipeline.export` writes it; critic and discriminator are in the checkpoints."""
    pipeline.export(model.student, config, folder)


def validate(model: Players, config: TrainConfig, folder: Any) -> Any:
    """Videos of the student (`training.pipeline.validate`)."""
    return pipeline.validate(model.student, config, folder)
