"""The student's losses: distribution matching, and the discriminator alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from helios_jax.diffusion import distillation as losses
from helios_jax.models.discriminator import DiscriminatorConfig
from helios_jax.training.stages.distill import player_losses, rollout
from helios_jax.training.stages.distill.distill_config import CriticConfig, DistillConfig, GANConfig, ScoreConfig
from helios_jax.training.stages.distill.player_losses import Turn
from tests.closeness import assert_close
from tests.training.test_stage3 import CHUNK, LORA, ONE_STEP, batch_of, config_of, keys, make_players


def test_dmd_pulls_the_chunk_to_where_the_teacher_sees_it():
    """At the teacher's own prediction the gradient is the critic's distance from it, over the chunk's."""
    config = config_of(distill={"gan": None})
    model, batch = make_players(config), batch_of()
    inputs = rollout.make_inputs(batch, keys(), config)
    rng = np.random.default_rng(3)
    made, noise = (jnp.asarray(rng.standard_normal(CHUNK, np.float32)) for _ in range(2))
    sigma = jnp.array([0.3, 0.8])
    ours, _ = jax.jit(lambda m: player_losses.dmd_gradient(m, made, inputs.history, inputs, sigma, noise, config))(
        model
    )

    s = sigma[:, None, None, None, None]
    noisy = (1 - s) * made + s * noise

    def clean(score, text):
        return noisy - s * player_losses._velocity(score, noisy, sigma, inputs.history, text, config)

    def expected(m):
        with_text, without = clean(m.real, inputs.text), clean(m.real, inputs.negative)
        teacher = with_text + 2.0 * (with_text - without)
        distance = jnp.abs(made - teacher).mean((1, 2, 3, 4), keepdims=True)
        return (clean(m.fake, inputs.text) - teacher) / distance

    assert_close(ours, jax.jit(expected)(model), ulps=60)
    assert np.abs(np.asarray(losses.dmd_loss(made, ours))).max() > 0


def test_without_matching_the_discriminator_alone_teaches_the_student():
    """Before the discriminator begins, nothing does."""
    gan = GANConfig(start=1, discriminator=DiscriminatorConfig((0,), dim=64), generator_weight=2.0, r1=None, crop=None)
    config = config_of(distill={"matching_weight": 0.0, "gan": gan, **ONE_STEP})
    model, inputs = make_players(config), rollout.make_inputs(batch_of(), keys(), config)
    common, one = jax.random.key(5), jnp.asarray(1)

    @jax.jit
    def of(model, step):
        return player_losses.generator_loss(model, Turn(inputs, one, keys(), common, step), config)

    loss, metrics = of(model, jnp.asarray(1))
    assert sorted(metrics) == ["gan_generator"]
    assert float(loss) == pytest.approx(2 * float(metrics["gan_generator"][0]), rel=1e-6)
    assert float(of(model, jnp.asarray(0))[0]) == 0
    with pytest.raises(ValueError, match="matching_weight is 0 and gan null"):
        DistillConfig(matching_weight=0.0)


@pytest.mark.parametrize("player", ["critic", pytest.param("generator", marks=pytest.mark.heavy)])
def test_discriminator_s_own_noise(player, monkeypatch):
    """`gan.renoise` is the noise on what the discriminator sees, and on nothing else."""

    def level(sigma):
        return losses.RenoiseConfig(smallest=sigma, largest=sigma + 1e-6)

    def logits(model, noisy, sigma, *_):
        return (jnp.square(noisy).mean((1, 2, 3, 4)) + sigma)[:, None]

    monkeypatch.setattr(player_losses, "_logits", logits)
    loss = {"critic": player_losses.critic_loss, "generator": player_losses.generator_loss}[player]

    def metrics(shared, own):
        gan = GANConfig(start=0, discriminator=DiscriminatorConfig((0,), dim=64), r1=None, crop=None, renoise=own)
        scores = {"score": ScoreConfig(init="teacher", renoise=shared), "critic": CriticConfig(LORA, renoise=shared)}
        config = config_of(distill={"gan": gan, **scores, **ONE_STEP})
        inputs = rollout.make_inputs(batch_of(), keys(), config)
        turn = Turn(inputs, jnp.asarray(1), keys(), jax.random.key(5), jnp.asarray(1))
        _, found = jax.jit(lambda model: loss(model, turn, config))(make_players(config))
        return {name: float(value) for name, (value, _) in found.items()}

    own, shared = metrics(level(0.8), level(0.2)), metrics(level(0.2), None)
    for name, value in own.items():
        assert (value == pytest.approx(shared[name], rel=1e-4)) == name.startswith("gan"), name
