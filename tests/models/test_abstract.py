"""An abstract model is what tracing would make: the same tree, so that programs and checkpoints take either."""

import jax
import numpy as np
import pytest
from flax import nnx

from helios_jax.models.layers import Shapes
from helios_jax.models.ops.choices import DEVICE, Implementations
from helios_jax.models.transformer import Transformer
from helios_jax.models.umt5 import UMT5Config, UMT5Encoder
from tests import tiny

TEXT = UMT5Config(vocab_size=7, d_model=8, d_kv=4, d_ff=12, num_layers=1, num_heads=2)


@pytest.mark.parametrize(
    ("abstract", "expected"),
    [
        (lambda: UMT5Encoder(TEXT, rngs=Shapes()), lambda rngs: UMT5Encoder(TEXT, rngs=rngs)),
        (lambda: Transformer.abstract(tiny.TRANSFORMER), lambda rngs: Transformer(tiny.TRANSFORMER, rngs=rngs)),
        (
            lambda: Transformer.abstract(tiny.TRANSFORMER, stacked=True),
            lambda rngs: Transformer(tiny.TRANSFORMER, stacked=True, rngs=rngs),
        ),
    ],
    ids=["text", "listed", "stacked"],
)
def test_shapes_make_what_tracing_makes(abstract, expected):
    ours, theirs = abstract(), nnx.eval_shape(lambda: expected(nnx.Rngs(0)))
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for x, y in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert (x.shape, x.dtype) == (y.shape, y.dtype)


def test_a_loaded_model_has_the_implementations_of_its_shapes():
    asked = Implementations("xla", "pallas")
    abstract = Transformer.abstract(tiny.TRANSFORMER, stacked=True, implementations=asked)
    assert tiny.draw(abstract, np.random.default_rng(0)).implementations == asked
    assert Transformer.abstract(tiny.TRANSFORMER).implementations == DEVICE
