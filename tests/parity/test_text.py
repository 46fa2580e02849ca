"""The text encoder against transformers' UMT5EncoderModel: values, names and shapes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytestmark = pytest.mark.reference
torch = pytest.importorskip("torch")

import transformers  # noqa: E402
from hypothesis import HealthCheck, Phase, example, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from helios_jax.models.layers import Shapes  # noqa: E402
from helios_jax.models.umt5 import UMT5Config, UMT5Encoder, encode, relative_buckets  # noqa: E402
from helios_jax.pretrained import CheckpointError, count, file_entries, from_arrays  # noqa: E402
from tests.parity.reference import arrays, check, error, randomise  # noqa: E402

ALIAS, KEY = next(iter(UMT5Encoder.TIED.items()))
CASES = settings(
    max_examples=6,
    deadline=None,
    database=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=[HealthCheck.too_slow],
)


@st.composite
def configs(draw):
    return UMT5Config(
        vocab_size=40,
        d_model=draw(st.sampled_from([12, 32])),
        d_kv=draw(st.sampled_from([5, 8])),
        d_ff=draw(st.sampled_from([24, 7])),
        num_layers=draw(st.integers(1, 3)),
        num_heads=draw(st.sampled_from([1, 3])),
        relative_attention_num_buckets=draw(st.sampled_from([32, 8])),
        relative_attention_max_distance=draw(st.sampled_from([128, 20])),
        layer_norm_epsilon=draw(st.sampled_from([1e-6, 1e-3])),
    )


def upstream(config: UMT5Config) -> transformers.UMT5EncoderModel:
    return transformers.UMT5EncoderModel(transformers.UMT5Config(**dataclasses.asdict(config)))


def abstract(config: UMT5Config) -> UMT5Encoder:
    return UMT5Encoder(config, rngs=Shapes())


def build(config: UMT5Config, seed: int):
    theirs = randomise(upstream(config), seed)
    with torch.no_grad():
        theirs.shared.weight.mul_(config.d_model**0.5)
        for block in theirs.encoder.block:  # biases that move the attention, queries that do not saturate it
            block.layer[0].SelfAttention.relative_attention_bias.weight.mul_(2.0)
            block.layer[0].SelfAttention.q.weight.mul_(config.d_kv**-0.5)
    return theirs, from_arrays(abstract(config), arrays(theirs))


def prompts(config: UMT5Config, length: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    ends = np.array([length, *rng.integers(1, length + 1, 2)])
    mask = np.arange(length) < ends[:, None]
    return np.where(mask, rng.integers(2, config.vocab_size, mask.shape), 0).astype(np.int32), mask


def pipeline_embeddings(theirs, ids: np.ndarray, mask: np.ndarray) -> torch.Tensor:
    """What diffusers' HeliosPipeline makes of the encoder's output."""
    from diffusers import HeliosPipeline

    class Tokens:
        input_ids, attention_mask = torch.from_numpy(ids).long(), torch.from_numpy(mask).long()

    pipeline = HeliosPipeline.__new__(HeliosPipeline)
    pipeline.tokenizer, pipeline.text_encoder = lambda *args, **kwargs: Tokens, theirs
    texts = [""] * len(ids)
    device, dtype = torch.device("cpu"), torch.float32
    return pipeline._get_t5_prompt_embeds(texts, max_sequence_length=ids.shape[1], device=device, dtype=dtype)[0]


@CASES
@given(config=configs(), length=st.sampled_from([9, 40, 1]), seed=st.integers(0, 2**31 - 1))
@example(config=UMT5Config(40, 16, 4, 24, 1, 2), length=300, seed=0)
def test_encoder(config, length, seed):
    theirs, ours = build(config, seed)
    ids, mask = prompts(config, length, seed)
    with torch.no_grad():
        expected = theirs(torch.from_numpy(ids).long(), torch.from_numpy(mask).long()).last_hidden_state
        zeroed = pipeline_embeddings(theirs, ids, mask)
    got = jax.jit(UMT5Encoder.__call__)(ours, ids, mask)
    check("UMT5 encoder", got, expected, 1e-5)
    embeddings = jax.jit(encode)(ours, ids, mask.astype(np.int32))
    check("text embeddings of the pipeline", embeddings, zeroed, 1e-5)
    assert not np.asarray(embeddings)[~mask].any()


@pytest.mark.parametrize(("buckets", "distance"), [(32, 128), (64, 128), (8, 20), (32, 100), (16, 512)])
def test_relative_buckets(buckets, distance):
    config = UMT5Config(relative_attention_num_buckets=buckets, relative_attention_max_distance=distance)
    small = dataclasses.replace(config, d_model=4, d_kv=2, num_heads=1, d_ff=4, num_layers=1, vocab_size=4)
    attention = upstream(small).encoder.block[0].layer[0].SelfAttention
    positions = torch.arange(700)
    expected = attention._relative_position_bucket(positions[None] - positions[:, None])
    np.testing.assert_array_equal(relative_buckets(700, config), expected.numpy())


def test_bfloat16_loses_no_more_than_the_references():
    config = UMT5Config(40, 64, 16, 96, 3, 4)
    theirs, ours = build(config, 1)
    ids, mask = prompts(config, 40, 1)
    tokens = torch.from_numpy(ids).long(), torch.from_numpy(mask).long()
    with torch.no_grad():
        full = theirs(*tokens).last_hidden_state[mask]
        half = theirs.bfloat16()(*tokens).last_hidden_state[mask]
    ours = from_arrays(abstract(config), arrays(theirs), dtype=jnp.bfloat16)
    got = encode(ours, jnp.asarray(ids), jnp.asarray(mask))
    assert got.dtype == jnp.bfloat16
    assert error(got[mask], full) <= 1.2 * error(half.float(), full) <= 0.1


def test_the_xxl_names_and_shapes():
    with torch.device("meta"):
        theirs = upstream(UMT5Config())
    ours = abstract(UMT5Config())
    expected = {k: tuple(v.shape) for k, v in theirs.state_dict().items() if k != ALIAS}
    assert {k: e.shape for k, e in file_entries(ours).items()} == expected
    assert count(ours) == sum(p.numel() for p in theirs.parameters()) == 5_680_910_336


@pytest.mark.parametrize("names", [{ALIAS}, {KEY}, {ALIAS, KEY}, set()])
def test_the_embedding_under_either_name(names):
    config = UMT5Config(40, 8, 4, 8, 1, 2)
    values = arrays(randomise(upstream(config), 0))
    embedding = values[KEY]
    values = {k: v for k, v in values.items() if k not in (ALIAS, KEY)} | dict.fromkeys(names, embedding)
    if not names:
        with pytest.raises(CheckpointError, match=KEY):
            from_arrays(abstract(config), values)
    else:
        np.testing.assert_array_equal(from_arrays(abstract(config), values).shared.weight[...], embedding)


@pytest.mark.parametrize(("field", "value"), [("feed_forward_proj", "relu"), ("relative_attention_num_buckets", 6)])
def test_config_errors_name_the_field(field, value):
    with pytest.raises(ValueError, match=rf"^{field} is .*: .+$"):
        UMT5Config(**{field: value})
