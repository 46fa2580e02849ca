"""The autoencoder against diffusers' AutoencoderKLWan: values, gradients, names and shapes."""

import dataclasses
import json

import jax
import numpy as np
import pytest

pytestmark = pytest.mark.reference
torch = pytest.importorskip("torch")

from diffusers import AutoencoderKLWan as Reference  # noqa: E402
from flax import nnx  # noqa: E402
from hypothesis import HealthCheck, Phase, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from helios_jax.models.vae import AutoencoderKLWan, VAEConfig, denormalize, normalize  # noqa: E402
from helios_jax.pretrained import file_entries, from_arrays  # noqa: E402
from tests.parity.reference import arrays, channels_first, channels_last, error, randomise  # noqa: E402

BAR = 2e-5
CASES = settings(
    max_examples=3,
    deadline=None,
    database=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=[HealthCheck.too_slow],
)


@st.composite
def configs(draw):
    """Small architectures: other widths and depths, other places to halve time, 1 to 3 halvings of space."""
    dim_mult = draw(st.sampled_from([(1, 2, 2, 4), (1, 2, 4, 4), (1, 2, 2), (2, 1)]))
    levels = len(dim_mult) - 1
    halvings = [False] * (levels - min(levels, 2)) + [True] * min(levels, 2)
    z_dim = draw(st.sampled_from([3, 16]))
    return VAEConfig(
        base_dim=draw(st.sampled_from([4, 8])),
        decoder_base_dim=draw(st.sampled_from([None, 6])),
        z_dim=z_dim,
        dim_mult=dim_mult,
        num_res_blocks=draw(st.integers(1, 2)),
        temperal_downsample=tuple(draw(st.permutations(halvings))),
        latents_mean=(0.1,) * z_dim,
        latents_std=(2.0,) * z_dim,
    )


def build(config: VAEConfig, seed: int):
    values = json.loads(json.dumps(dataclasses.asdict(config)))  # as config.json has them: upstream wants lists
    theirs = randomise(Reference(**values), seed)
    # Without this the output is far outside [-1, 1], and the clip would leave nothing to compare.
    theirs.decoder.conv_out.weight.data.mul_(0.1)
    abstract = nnx.eval_shape(lambda: AutoencoderKLWan(config, rngs=nnx.Rngs(0)))
    return theirs, from_arrays(abstract, arrays(theirs))


def sizes(config: VAEConfig, rng: np.random.Generator) -> tuple[int, int]:
    h, w = rng.integers(1, 4, 2) * config.scale_factor_spatial
    return int(h), int(w)


@pytest.mark.parametrize("frames", [1, 5, 17, 33])
@CASES
@given(configs(), st.integers(0, 2**31 - 1))
def test_encode(frames, config, seed):
    theirs, ours = build(config, seed)
    rng = np.random.default_rng(seed)
    if config.scale_factor_temporal < 4:
        frames = min(frames, 5)
    video = rng.uniform(-1, 1, (2, frames, *sizes(config, rng), 3)).astype(np.float32)
    with torch.no_grad():
        reference = theirs.encode(channels_first(video)).latent_dist
    mean, logvar = jax.jit(lambda m, x: m.encode(x))(ours, video)
    assert error(mean, channels_last(reference.mean)) <= BAR
    assert error(logvar, channels_last(reference.logvar)) <= BAR


@pytest.mark.parametrize("frames", [1, 5, 17, 33])
@CASES
@given(configs(), st.integers(0, 2**31 - 1))
def test_decode(frames, config, seed):
    theirs, ours = build(config, seed)
    rng = np.random.default_rng(seed)
    h, w = (s // config.scale_factor_spatial for s in sizes(config, rng))
    t = 1 + (frames - 1) // config.scale_factor_temporal
    latents = rng.standard_normal((2, t, h, w, config.z_dim), np.float32)
    with torch.no_grad():
        reference = channels_last(theirs.decode(channels_first(latents)).sample)
    assert (np.abs(reference) < 1).mean() > 0.5
    video = jax.jit(lambda m, z: m.decode(z))(ours, latents)
    assert video.shape[1] == frames
    assert error(video, reference) <= BAR
