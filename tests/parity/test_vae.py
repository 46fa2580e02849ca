"""The autoencoder against diffusers' AutoencoderKLWan: values, gradients, names and shapes."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytestmark = pytest.mark.reference
torch = pytest.importorskip("torch")

from diffusers import AutoencoderKLWan as Reference  # noqa: E402
from hypothesis import HealthCheck, Phase, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from helios_jax.models.layers import Shapes  # noqa: E402
from helios_jax.models.vae import AutoencoderKLWan, VAEConfig  # noqa: E402
from helios_jax.pretrained import count, file_entries, from_arrays, to_arrays  # noqa: E402
from tests.parity.reference import arrays, channels_first, channels_last, check, error, randomise  # noqa: E402

BAR = 2e-5
# Compiling is what these tests would spend their time on.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
FRAMES = pytest.mark.parametrize("frames", [1, 5, 17, 33])
CASES = settings(
    max_examples=2,  # compiling takes the time
    deadline=None,
    database=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=[HealthCheck.too_slow],
)
FULL = ((1, 2, 2, 4), (False, True, True))  # Wan's: 8x8 in space, 4x in time


@st.composite
def configs(draw):
    """Small architectures: other widths and depths, other levels to halve time at, 2 or 3 halvings of space."""
    levels = draw(st.sampled_from([FULL, ((1, 2, 4), (True, True)), ((2, 1, 2, 2), (True, False, True))]))
    z_dim = draw(st.sampled_from([3, 16]))
    return VAEConfig(
        base_dim=draw(st.sampled_from([4, 6])),
        decoder_base_dim=draw(st.sampled_from([None, 8])),
        z_dim=z_dim,
        dim_mult=levels[0],
        temperal_downsample=levels[1],
        num_res_blocks=draw(st.integers(1, 2)),
        latents_mean=(0.1,) * z_dim,
        latents_std=(2.0,) * z_dim,
    )


def build(config: VAEConfig, seed: int):
    values = json.loads(json.dumps(dataclasses.asdict(config)))  # as in a config.json: upstream needs its lists
    theirs = randomise(Reference(**values), seed)
    # Smaller outputs: few of them past the decoder's clip, where there is nothing to compare.
    theirs.decoder.conv_out.weight.data.mul_(0.5)
    abstract = AutoencoderKLWan(config, rngs=Shapes())
    return theirs, from_arrays(abstract, arrays(theirs))


def batch(frames: int) -> int:
    return 2 if frames < 17 else 1


def video_for(config: VAEConfig, frames: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    h, w = (int(n) * config.scale_factor_spatial for n in rng.integers(1, 3, 2))
    return rng.uniform(-1, 1, (batch(frames), frames, h, w, 3)).astype(np.float32)


@FRAMES
@CASES
@given(config=configs(), seed=st.integers(0, 2**31 - 1))
def test_encode(frames, config, seed):
    theirs, ours = build(config, seed)
    theirs.quant_conv.bias.data[-1] = 25  # past the limit of the log-variance
    ours.quant_conv.bias[...] = ours.quant_conv.bias[...].at[-1].set(25)
    video = video_for(config, frames, seed)
    with torch.no_grad():
        expected = theirs.encode(channels_first(video)).latent_dist
    mean, logvar = jit(AutoencoderKLWan.encode)(ours, video)
    check(f"VAE encode, mean, {frames} frames", mean, channels_last(expected.mean), BAR)
    check(f"VAE encode, log-variance, {frames} frames", logvar, channels_last(expected.logvar), BAR)


@FRAMES
@CASES
@given(config=configs(), seed=st.integers(0, 2**31 - 1))
def test_decode(frames, config, seed):
    theirs, ours = build(config, seed)
    rng = np.random.default_rng(seed)
    shape = (batch(frames), 1 + (frames - 1) // 4, *rng.integers(1, 4, 2), config.z_dim)
    latents = rng.standard_normal(shape, np.float32)
    with torch.no_grad():
        expected = channels_last(theirs.decode(channels_first(latents)).sample)
    assert (np.abs(expected) < 1).mean() > 0.7
    video = jit(AutoencoderKLWan.decode)(ours, latents)
    assert video.shape[1] == frames
    check(f"VAE decode, {frames} frames", video, expected, BAR)


def test_gradients():
    config = VAEConfig(base_dim=4, dim_mult=FULL[0], num_res_blocks=1)
    theirs, ours = build(config, 7)
    video = jnp.asarray(video_for(config, 9, 7))
    weights = np.random.default_rng(8).standard_normal(video.shape, np.float32)
    posterior = theirs.encode(channels_first(video)).latent_dist
    out = theirs.decode(posterior.mean + posterior.logvar.exp()).sample
    (out * channels_first(weights)).sum().backward()

    @jit
    @jax.grad
    def gradients(model):
        mean, logvar = model.encode(video)
        return (model.decode(mean + jnp.exp(logvar)) * weights).sum()

    expected = {k: p.grad.numpy() for k, p in theirs.named_parameters()}
    for key, value in to_arrays(gradients(ours)).items():
        assert error(value, expected[key]) <= 1e-3, key


def test_bfloat16_loses_no_more_than_the_references():
    config = VAEConfig(base_dim=8, dim_mult=FULL[0], num_res_blocks=1)
    theirs, ours = build(config, 3)
    video = video_for(config, 9, 3)

    def run(dtype):
        mean, _ = jit(AutoencoderKLWan.encode)(ours, jnp.asarray(video, dtype))
        out = jit(AutoencoderKLWan.decode)(ours, jnp.asarray(full[0], dtype))
        assert mean.dtype == out.dtype == dtype
        return mean, out

    with torch.no_grad():
        full = [channels_last(theirs.encode(channels_first(video)).latent_dist.mean)]
        full.append(channels_last(theirs.decode(channels_first(full[0])).sample))
        theirs.bfloat16()
        half = [channels_last(theirs.encode(channels_first(video).bfloat16()).latent_dist.mean)]
        half.append(channels_last(theirs.decode(channels_first(full[0]).bfloat16()).sample))
    for mine, upstream, exact in zip(run(jnp.bfloat16), half, full):
        assert error(mine, exact) <= 1.2 * error(upstream, exact) <= 0.1


def test_the_real_names_and_shapes():
    with torch.device("meta"):
        theirs = Reference()
    ours = AutoencoderKLWan(VAEConfig(), rngs=Shapes())
    expected = {k: tuple(v.shape) for k, v in theirs.state_dict().items()}
    assert {k: e.shape for k, e in file_entries(ours).items()} == expected
    assert count(ours) == sum(p.numel() for p in theirs.parameters()) == 126_892_531


def test_the_defaults_are_the_references():
    config = Reference(base_dim=4).config
    ours = json.loads(json.dumps(dataclasses.asdict(VAEConfig(base_dim=4))))
    assert ours == {k: v for k, v in config.items() if not k.startswith("_")}
