"""Losses of stage 3's players: of the generator, and of the critic together with the discriminator."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from helios_jax.diffusion import distillation as losses
from helios_jax.diffusion import noising
from helios_jax.diffusion.memory import History
from helios_jax.diffusion.noising import add_noise, predict_data
from helios_jax.diffusion.schedule import training_shift
from helios_jax.models.transformer import Transformer
from helios_jax.training.gradients import with_gradient
from helios_jax.training.stage import Metrics
from helios_jax.training.stages.distill.distill_config import DistillTrainConfig
from helios_jax.training.stages.distill.players import Players, of_student
from helios_jax.training.stages.distill.rollout import DistillInputs, make_chunk, real_chunk
from helios_jax.training.stages.flow import fold
from helios_jax.training.stages.model_inputs import make_context
from helios_jax.training.trainable import trainable


class Turn(NamedTuple):
    """A player's turn in step `step`: its inputs, the number of `chunks` of the rollout, and its draws.

    `keys` [b] are those of the samples; `common` is the key of draws that all samples share.
    """

    inputs: DistillInputs
    chunks: Array
    keys: Array
    common: Array
    step: Array


def _velocity(
    model: Transformer, noisy: Array, sigma: Array, history: History, text: Array, config: DistillTrainConfig
) -> Array:
    """The velocity of noisy latents that follow `history`, float32."""
    context = make_context(model, history, text, config)
    return model(noisy.astype(config.precision), 1000 * sigma, *context, remat=config.remat).astype(jnp.float32)


def _repeated(x: Any, count: int) -> Any:
    """Each sample `count` times in a row: the copies stay on the sample's device."""
    return jax.tree.map(lambda a: jnp.repeat(a, count, 0), x)


def _interleave(*parts: Array) -> Array:
    """Samples of several batches in one, interleaved: each sample stays on its device."""
    return jnp.stack(parts, 1).reshape(-1, *parts[0].shape[1:])


def generator_loss(model: Players, turn: Turn, config: DistillTrainConfig) -> tuple[Float[Array, ""], Metrics]:
    """Distribution matching of the student's last chunk, and from step `gan.start` a loss against the discriminator."""
    distill, gan = config.distill, config.distill.gan
    inputs, chunks, keys, common, step = turn
    generated, history = make_chunk(model.student, inputs, chunks, fold(keys, 0), common, config, with_gradient=True)
    k_sigma, k_noise, k_gan, k_crop = (fold(keys, i) for i in range(1, 5))
    sigma = losses.draw_sigma(k_sigma, distill.score.renoise, step, training_shift(generated.shape, distill.shift))

    dmd, metrics = jnp.zeros(()), {}
    if distill.matching_weight > 0:
        fixed = jax.lax.stop_gradient(generated)
        gradient, distance = jax.lax.stop_gradient(
            dmd_gradient(model, fixed, history, inputs, sigma, _normal(k_noise, generated), config)
        )
        matching = losses.dmd_loss(generated, gradient).mean()
        dmd = distill.matching_weight * matching
        metrics = {"dmd_loss": (matching, jnp.ones(())), "dmd_distance": (distance, jnp.ones(()))}
    if gan is None or model.discriminator is None:
        return dmd, metrics

    gan_sigma = _gan_sigma(sigma, fold(keys, 5), step, generated, config)

    def adversarial(generated: Array) -> tuple[Array, Array]:
        noisy = add_noise(generated, _normal(k_gan, generated), gan_sigma)
        logits = _logits(model, _gan_crop(noisy, k_crop, config), gan_sigma, history, inputs.text, config)
        against = losses.gan_loss(logits, real=True).mean()
        return gan.generator_weight * against, against

    on = step >= gan.start
    (loss, against), slope = _value_and_grad_if(on, adversarial, generated)
    return dmd + with_gradient(loss, generated, slope), {**metrics, "gan_generator": (against, on.astype(jnp.float32))}


def dmd_gradient(
    model: Players,
    generated: Array,
    history: History,
    inputs: DistillInputs,
    sigma: Array,
    noise: Array,
    config: DistillTrainConfig,
) -> tuple[Float[Array, "b t h w c"], Float[Array, ""]]:
    """(gradient of the distribution matching loss at `generated`, mean distance to the teacher's prediction).

    Both scores predict the chunk from `generated` noised to `sigma`.
    """
    distill = config.distill
    noisy = add_noise(generated, noise, sigma)
    fake, real = model.fake, model.real

    def clean(score: Transformer, text: Array, copies: int) -> Array:
        past, x, s = (_repeated(a, copies) for a in (history, noisy, sigma))
        return predict_data(x, _velocity(score, x, s, past, text, config), s)

    predicted = clean(fake, inputs.text, 1)
    scale = distill.score.guidance_scale
    if scale == 0:
        teacher = clean(real, inputs.text, 1)
    else:
        pair = clean(real, _interleave(inputs.text, inputs.negative), 2).reshape(-1, 2, *generated.shape[1:])
        teacher = pair[:, 0] + scale * (pair[:, 0] - pair[:, 1])
    return losses.dmd_gradient(generated, teacher, predicted), jnp.abs(generated - teacher).mean()


def critic_loss(model: Players, turn: Turn, config: DistillTrainConfig) -> tuple[Float[Array, ""], Metrics]:
    """Flow matching of the critic on the student's last chunk, and from step `gan.start` the discriminator's loss."""
    distill, gan = config.distill, config.distill.gan
    inputs, chunks, keys, common, step = turn
    generated, history = make_chunk(model.student, inputs, chunks, fold(keys, 0), common, config, with_gradient=False)
    generated, history = jax.lax.stop_gradient((generated, history))
    k_sigma, k_noise, k_crop, k_crop_real, k_r1, k_r2 = (fold(keys, i) for i in range(1, 7))
    sigma = losses.draw_sigma(k_sigma, distill.critic.renoise, step, training_shift(generated.shape, distill.shift))
    noise = _normal(k_noise, generated)
    noisy = add_noise(generated, noise, sigma)

    def denoising(noisy: Array) -> Array:
        velocity = _velocity(model.fake, noisy, sigma, history, inputs.text, config)
        return jnp.square(velocity - noising.velocity(generated, noise)).mean()

    if gan is None or model.discriminator is None:
        loss = denoising(noisy)
        return loss, {"critic_loss": (loss, jnp.ones(()))}
    graph, learning, rest = nnx.split(model, _critic_filter(config), ...)
    gan_sigma = _gan_sigma(sigma, fold(keys, 7), step, generated, config)
    own, past = real_chunk(inputs, chunks, config)

    def adversarial(learning: Any) -> tuple[Array, tuple[Array, Array]]:
        model = nnx.merge(graph, learning, rest)
        fake, real = (add_noise(x, noise, gan_sigma) for x in (generated, own))
        judged = [(_gan_crop(fake, k_crop, config), history), (_gan_crop(real, k_crop_real, config), past)]
        # A penalty compares one window with and without the noise. (Upstream draws another window for each.)
        for term, key, (latents, after) in ((gan.r1, k_r1, judged[1]), (gan.r2, k_r2, judged[0])):
            if term is not None:
                judged.append((latents + term.sigma * _normal(key, latents), after))
        count = len(judged)
        latents, after = jax.tree.map(_interleave, *judged)
        logits = _logits(model, latents, _repeated(gan_sigma, count), after, _repeated(inputs.text, count), config)
        logits = logits.reshape(-1, count, logits.shape[-1])
        fake_logits, real_logits, *moved = (logits[:, i] for i in range(count))
        against = (losses.gan_loss(fake_logits, real=False) + losses.gan_loss(real_logits, real=True)).mean()
        penalties = jnp.zeros(())
        for term, still in ((gan.r1, real_logits), (gan.r2, fake_logits)):
            if term is not None:
                penalties = penalties + losses.penalty(still, moved.pop(0), term).mean()
        return gan.critic_weight * against + penalties, (against, penalties)

    on = step >= gan.start
    (loss, (against, penalties)), slope = _value_and_grad_if(on, adversarial, learning)
    # The barrier makes the two losses run one after the other, so that only one needs memory at a time.
    noisy, slope = jax.lax.optimization_barrier((noisy, slope))
    error, weight = denoising(noisy), on.astype(jnp.float32)
    metrics: Metrics = {
        "critic_loss": (error, jnp.ones(())),
        "gan_critic": (against, weight),
        "gan_penalty": (penalties, weight),
    }
    return error + with_gradient(loss, learning, slope), metrics


def _gan_sigma(sigma: Array, keys: Array, step: Array, generated: Array, config: DistillTrainConfig) -> Array:
    """The noise levels at which the discriminator sees chunks: its own, or `sigma`, those of the score."""
    gan = config.distill.gan
    assert gan is not None
    if gan.renoise is None:
        return sigma
    return losses.draw_sigma(keys, gan.renoise, step, training_shift(generated.shape, config.distill.shift))


def _critic_filter(config: DistillTrainConfig) -> Any:
    """The filter of trained parameters of the critic and the discriminator."""
    is_trained = trainable(config.trainable)
    return lambda path, variable: is_trained(path, variable) and not of_student(path, variable)


def _value_and_grad_if(on: Array, loss: Callable[[Any], tuple[Array, Any]], x: Any) -> tuple[tuple[Array, Any], Any]:
    """Returns `loss(x)`, a pair (number, aux), and its gradient at `x`; all are zeros unless `on`.

    They are computed here and are constants to the outer backward pass, which keeps no activations of `loss`.
    """
    gradient, x = jax.value_and_grad(loss, has_aux=True), jax.lax.stop_gradient(x)
    nothing = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), jax.eval_shape(gradient, x))
    return jax.lax.stop_gradient(jax.lax.cond(on, gradient, lambda _: nothing, x))


def _logits(
    model: Players, noisy: Array, sigma: Array, history: History, text: Array, config: DistillTrainConfig
) -> Array:
    """The discriminator's logits for noisy latents that follow `history`."""
    fake, discriminator = model.fake, model.discriminator
    assert discriminator is not None
    velocity, hidden = fake.features(
        noisy.astype(config.precision),
        1000 * sigma,
        *make_context(fake, history, text, config),
        blocks=discriminator.config.blocks,
        remat=config.remat,
    )
    return discriminator(velocity, hidden)


def _gan_crop(latents: Array, keys: Array, config: DistillTrainConfig) -> Array:
    gan = config.distill.gan
    assert gan is not None
    if gan.crop is None:
        return latents
    height, width = (int(n * gan.crop) for n in latents.shape[2:4])
    return losses.crop(latents, keys, (height, width))


def _normal(keys: Array, like: Array) -> Array:
    return jax.vmap(lambda key: jax.random.normal(key, like.shape[1:]))(keys)
