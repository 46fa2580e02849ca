"""The autoencoder on its own: what it refuses, that it is causal, and that its two forms of convolution agree."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from helios_jax.models import vae as module
from helios_jax.models.layers import Shapes
from helios_jax.models.vae import AutoencoderKLWan, CausalConv, ChannelNorm, VAEConfig, denormalize, normalize
from helios_jax.pretrained import file_entries, from_arrays
from tests.closeness import assert_close

TINY = VAEConfig(base_dim=4, dim_mult=(1, 1, 2, 2), num_res_blocks=1)


@pytest.fixture(scope="module")
def vae():
    # Filled by numpy: jax would compile a draw for every shape.
    rng = np.random.default_rng(0)
    abstract = AutoencoderKLWan(TINY, rngs=Shapes())
    shapes = {key: entry.shape for key, entry in file_entries(abstract).items()}
    return from_arrays(
        abstract,
        {k: rng.standard_normal(s, np.float32) / max(1, np.prod(s[1:])) ** 0.5 for k, s in shapes.items()},
    )


@pytest.fixture(scope="module")
def video():
    return np.random.default_rng(0).uniform(-1, 1, (1, 9, 16, 8, 3)).astype(np.float32)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("is_residual", True),
        ("patch_size", 2),
        ("dropout", 0.1),
        ("attn_scales", (0.5,)),
        ("temperal_downsample", (True, True)),
        ("scale_factor_temporal", 8),
        ("scale_factor_spatial", 16),
        ("latents_mean", (0.0,)),
        ("latents_std", (0.0,) * 16),
    ],
)
def test_config_errors_name_the_field(field, value):
    with pytest.raises(ValueError, match=rf"^{field} is .*: .+$") as info:
        VAEConfig(**{field: value})
    assert "\n" not in str(info.value)


def test_config_is_hashable_and_knows_its_factors():
    assert hash(TINY) == hash(VAEConfig(base_dim=4, dim_mult=(1, 1, 2, 2), num_res_blocks=1))
    assert (TINY.scale_factor_temporal, TINY.scale_factor_spatial) == (4, 8)


@pytest.mark.parametrize("shape", [(1, 8, 16, 16, 3), (1, 0, 16, 16, 3), (1, 5, 20, 16, 3), (1, 5, 16, 4, 3)])
def test_sizes_it_does_not_take(vae, shape):
    with pytest.raises(ValueError, match="the autoencoder takes"):
        vae.encode(jnp.zeros(shape))


def test_no_frame_sees_a_later_one(vae, video):
    encode, decode = jax.jit(AutoencoderKLWan.encode), jax.jit(AutoencoderKLWan.decode)
    mean, _ = encode(vae, video)
    other, _ = encode(vae, np.concatenate([video[:, :5], -video[:, 5:]], 1))
    np.testing.assert_array_equal(mean[:, :2], other[:, :2])
    assert not np.allclose(mean[:, 2], other[:, 2])
    decoded, other = decode(vae, mean), decode(vae, mean.at[:, 2].add(1.0))
    assert decoded.shape == video.shape
    np.testing.assert_array_equal(decoded[:, :5], other[:, :5])
    assert not np.allclose(decoded[:, 5:], other[:, 5:])


def test_normalize():
    mean, std = np.array(TINY.latents_mean), np.array(TINY.latents_std)
    unit = np.random.default_rng(0).standard_normal((2, 3, 4, 5, 16))
    latents = jnp.asarray(unit * std + mean, jnp.float32)
    normal = normalize(latents, TINY)
    np.testing.assert_allclose(normal, unit, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(denormalize(normal, TINY), latents, rtol=1e-5, atol=1e-5)
    assert normalize(latents.astype(jnp.bfloat16), TINY).dtype == jnp.bfloat16


@pytest.mark.parametrize(("kernel", "stride"), [((3, 3, 3), 1), ((3, 1, 1), 1), ((3, 1, 1), 2), ((1, 1, 1), 1)])
def test_both_forms_of_convolution_agree(kernel, stride):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 7, 6, 5, 3), np.float32)
    w = rng.standard_normal((*kernel, 3, 4), np.float32)

    def run(conv):
        return jax.value_and_grad(lambda x, w: (conv(x, w, stride) ** 2).sum(), (0, 1))(x, w)

    assert_close(run(module._conv3d), run(module._conv3d_as_2d))


@pytest.mark.parametrize(
    ("platform", "layout"), [("cuda", "[b, 0, 1, 2, f]"), ("tpu", "[b, 0, 1, 2, f]"), ("cpu", "[b, 0, 1, f]")]
)
def test_the_platform_compiled_for_picks_the_form(platform, layout):
    conv = CausalConv(2, 3, rngs=nnx.Rngs(0))
    traced = jax.jit(lambda x: conv(x)).trace(jnp.zeros((1, 5, 4, 4, 2)))
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    assert text.count("stablehlo.convolution") == text.count(f"dim_numbers = {layout}") == 1


def test_gradient_of_the_norm_at_zero_is_finite():
    norm = ChannelNorm(4, rngs=nnx.Rngs(0))
    assert jnp.isfinite(jax.grad(lambda x: norm(x).sum())(jnp.zeros((1, 4)))).all()


def test_only_decode_clips(vae):
    latents = 30 * jax.random.normal(jax.random.key(0), (1, 3, 2, 1, 16))
    raw = jax.jit(AutoencoderKLWan.decode_unclipped)(vae, latents)
    assert jnp.abs(raw).max() > 1
    np.testing.assert_array_equal(jax.jit(AutoencoderKLWan.decode)(vae, latents), jnp.clip(raw, -1, 1))
