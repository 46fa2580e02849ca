"""The transformer against diffusers' HeliosTransformer3DModel: values, gradients, names and shapes."""

import dataclasses
import os
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytestmark = pytest.mark.reference
torch = pytest.importorskip("torch")

from diffusers import HeliosTransformer3DModel  # noqa: E402
from hypothesis import HealthCheck, Phase, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from helios_jax.models.transformer import (  # noqa: E402
    FrameIndices,
    HistoryLatents,
    Transformer,
    TransformerConfig,
    init_memory_patches,
)
from helios_jax.pretrained import count, file_entries, from_arrays, to_arrays  # noqa: E402
from tests import tiny  # noqa: E402
from tests.parity.reference import arrays, channels_first, channels_last, check, check_loss, error, randomise  # noqa: E402

CASES = settings(
    max_examples=6,
    deadline=None,
    database=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


@st.composite
def cases(draw):
    """A small architecture and inputs for it: every option, odd sizes that need padding, other histories and chunks."""
    heads = draw(st.sampled_from([1, 2, 3]))
    rope = draw(st.sampled_from([(4, 4, 4), (4, 6, 6), (8, 4, 4)]))
    channels = draw(st.sampled_from([4, 16]))
    config = TransformerConfig(
        num_attention_heads=heads,
        attention_head_dim=sum(rope),
        in_channels=channels,
        out_channels=channels,
        text_dim=draw(st.sampled_from([8, 20])),
        freq_dim=draw(st.sampled_from([16, 256])),
        ffn_dim=draw(st.sampled_from([24, 40])),
        num_layers=draw(st.integers(1, 3)),
        cross_attn_norm=draw(st.booleans()),
        eps=draw(st.sampled_from([1e-6, 1e-5])),
        rope_dim=rope,
        rope_theta=draw(st.sampled_from([10000.0, 500.0])),
        guidance_cross_attn=draw(st.booleans()),
        zero_history_timestep=draw(st.booleans()),
        has_multi_term_memory_patch=draw(st.sampled_from([True, True, True, False])),
        is_amplify_history=draw(st.booleans()),
        history_scale_mode=draw(st.sampled_from(["scalar", "per_head"])),
    )
    sizes = {
        "batch": draw(st.sampled_from([1, 2])),
        "frames": draw(st.sampled_from([1, 2, 9])),
        "height": 2 * draw(st.integers(1, 7)),
        "width": 2 * draw(st.integers(1, 7)),
        "short": draw(st.sampled_from([1, 2, 3])),
        "mid": draw(st.sampled_from([0, 1, 2, 3])),
        "long": draw(st.sampled_from([0, 4, 6, 16])),
        "half": draw(st.booleans()),  # noisy latents at half the history's resolution, as in the pyramid
        "offset": draw(st.sampled_from([0, 30])),
        "text": draw(st.sampled_from([1, 7])),
    }
    return config, sizes, draw(st.integers(0, 2**31 - 1))


def build(config: TransformerConfig, seed: int):
    theirs = randomise(HeliosTransformer3DModel(**dataclasses.asdict(config)), seed)
    abstract = Transformer.abstract(config)
    return theirs, from_arrays(abstract, arrays(theirs))


def inputs(config: TransformerConfig, sizes: dict, seed: int) -> dict:
    rng = np.random.default_rng(seed)
    scale = 2 if sizes["half"] else 1
    grid = (sizes["height"] * scale, sizes["width"] * scale)

    def latents(frames, grid):
        return rng.standard_normal((sizes["batch"], frames, *grid, config.in_channels), np.float32)

    out = {
        "latents": latents(sizes["frames"], (sizes["height"], sizes["width"])),
        "timestep": rng.uniform(0, 1000, sizes["batch"]).astype(np.float32),
        "text": rng.standard_normal((sizes["batch"], sizes["text"], config.text_dim), np.float32),
    }
    start = sizes["offset"]
    if config.has_multi_term_memory_patch:
        for part in ("long", "mid", "short"):
            if sizes[part]:
                out[part] = latents(sizes[part], grid)
                out[f"{part}_indices"] = np.arange(start, start := start + sizes[part])[None]
    out["indices"] = np.arange(start, start + sizes["frames"])[None]
    return out


def run_theirs(model, x: dict):
    def frames(name):
        return torch.from_numpy(x[name]).expand(len(x["latents"]), -1) if name in x else None

    dtype = model.patch_embedding.weight.dtype
    history = {
        f"latents_history_{p}": channels_first(x[p]).to(dtype) if p in x else None for p in ("short", "mid", "long")
    }
    return model(
        hidden_states=channels_first(x["latents"]).to(dtype),
        timestep=torch.from_numpy(x["timestep"]),
        encoder_hidden_states=torch.from_numpy(x["text"]).to(dtype),
        indices_hidden_states=frames("indices"),
        **{f"indices_latents_history_{p}": frames(f"{p}_indices") for p in ("short", "mid", "long")},
        **history,
    ).sample


def call(model: Transformer, latents, timestep, text, history, indices):
    return model(latents, timestep, model.text_kv(text), history, indices)


optimized = jax.jit(call)
# As for use where everything is (`make parity`).
FAST = {} if os.environ.get("JAX_DISABLE_MOST_OPTIMIZATIONS") == "0" else {"xla_backend_optimization_level": 0}
compiled_fast = partial(jax.jit, compiler_options=FAST)


def run_ours(model: Transformer, x: dict, dtype=jnp.float32, forward=optimized):
    cast = {k: jnp.asarray(v, dtype) for k, v in x.items() if k in ("latents", "text", "short", "mid", "long")}
    history = indices = None
    if "short" in x:
        history = HistoryLatents(cast["short"], cast.get("mid"), cast.get("long"))
    indices = FrameIndices(x["indices"], *(x.get(f"{p}_indices") for p in ("short", "mid", "long")))
    return forward(model, cast["latents"], jnp.asarray(x["timestep"]), cast["text"], history, indices)


@given(cases())
@CASES
def test_values(case):
    config, sizes, seed = case
    theirs, ours = build(config, seed)
    x = inputs(config, sizes, seed)
    with torch.no_grad():
        expected = channels_last(run_theirs(theirs, x))
    check("transformer, float32", run_ours(ours, x), expected, 1e-5)


@given(cases())
@settings(CASES, max_examples=3)
def test_stacked_blocks_are_the_same_model(case):
    config, sizes, seed = case
    (theirs, ours), fast = build(config, seed), compiled_fast(call)
    stacked = Transformer.abstract(config, stacked=True)
    stacked = from_arrays(stacked, arrays(theirs))
    x = inputs(config, sizes, seed)
    assert error(run_ours(stacked, x, forward=fast), run_ours(ours, x, forward=fast)) <= 1e-5
    for key, value in to_arrays(stacked).items():
        np.testing.assert_array_equal(value, theirs.state_dict()[key].numpy())


@given(cases())
@settings(CASES, max_examples=4)
def test_gradients(case):
    config, sizes, seed = case
    theirs, ours = build(config, seed)
    x = inputs(config, sizes, seed)
    target = np.random.default_rng(seed + 1).standard_normal(x["latents"].shape, np.float32)
    out = run_theirs(theirs, x)
    (out * channels_first(target)).sum().backward()
    grads = compiled_fast(jax.grad(lambda m: (run_ours(m, x, forward=call) * target).sum()))(ours)
    ours_flat, theirs_flat = [], []
    for key, value in to_arrays(grads).items():
        reference = dict(theirs.named_parameters())[key].grad
        expected = np.zeros_like(value) if reference is None else reference.numpy()
        ours_flat.append(value.ravel())
        theirs_flat.append(expected.ravel())
        assert np.linalg.norm(value - expected) <= 1e-4 * np.linalg.norm(expected) + 1e-3, key
    check("transformer, gradients", np.concatenate(ours_flat), np.concatenate(theirs_flat), 1e-4)


@given(cases())
@settings(CASES, max_examples=3)
def test_bfloat16_loses_no_more_than_the_references(case):
    """Distances from float32 with the same weights: how much is lost depends on the architecture that was drawn."""
    config, sizes, seed = case
    config.num_layers = 2
    theirs, _ = build(config, seed)
    islands = ("time_embedder", "scale_shift_table", "norm2")  # diffusers fails on a float32 history_key_scale
    for name, p in theirs.named_parameters():
        if not any(part in islands for part in name.split(".")):
            p.data = p.data.bfloat16()
    x = inputs(config, sizes, seed)
    with torch.no_grad():
        half = channels_last(run_theirs(theirs, x))
        full, _ = build(config, seed)
        full.load_state_dict({name: value.float() for name, value in theirs.state_dict().items()})
        exact = channels_last(run_theirs(full, x))
    abstract = Transformer.abstract(config)
    ours = from_arrays(abstract, arrays(theirs), dtype=jnp.bfloat16)
    assert ours.blocks[0].attn1.to_q.weight.dtype == jnp.bfloat16
    assert ours.blocks[0].scale_shift_table.dtype == jnp.float32
    check_loss("transformer, bfloat16", run_ours(ours, x, jnp.bfloat16), half, exact)


@pytest.mark.parametrize("stacked", [False, True])
def test_the_14b_names_and_shapes(stacked):
    with torch.device("meta"):
        theirs = HeliosTransformer3DModel()
    ours = Transformer.abstract(TransformerConfig(), stacked=stacked)
    expected = {k: tuple(v.shape) for k, v in theirs.state_dict().items()}
    assert {k: e.shape for k, e in file_entries(ours).items()} == expected
    assert count(ours) == sum(p.numel() for p in theirs.parameters()) == 14_312_427_584


def test_memory_patches_start_from_the_patch_embedding():
    config = TransformerConfig(
        num_attention_heads=1, attention_head_dim=12, rope_dim=(4, 4, 4), in_channels=3, num_layers=1
    )
    rng = np.random.default_rng(0)
    model = init_memory_patches(tiny.draw(Transformer.abstract(config), rng))
    video = rng.standard_normal((1, 4, 16, 8, 3), np.float32)
    for scale, patch in ((1, model.patch_short), (2, model.patch_mid), (4, model.patch_long)):
        b, t, h, w, c = video.shape
        blocks = video.reshape(b, t // scale, scale, h // scale, scale, w // scale, scale, c)
        mean = jnp.asarray(blocks.mean((2, 4, 6)))
        assert error(patch(jnp.asarray(video)), model.patch_embedding(mean)) < 1e-5
