"""The parts of the embedded model that are not trained: a text encoder and a scheduler.

    python -m helios_jax.toy.components --out helios_jax/assets/toy

The text encoder is a small UMT5 with random weights, frozen. The world's captions have one word for each attribute, and
random features of different words are as good as orthogonal: all that the transformer's cross-attention needs.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
from flax import nnx

from helios_jax import pretrained
from helios_jax.diffusion.schedule import SchedulerConfig
from helios_jax.models.tokenizer import Tokenizer
from helios_jax.models.umt5 import UMT5Config, UMT5Encoder
from helios_jax.runtime.command import Tool
from helios_jax.sampling.checkpoint import write_index
from helios_jax.sampling.plan import Variant

SCHEDULER = SchedulerConfig(stages=1, stage_range=(0.0, 1.0), use_dynamic_shifting=True)


def build(out: Path, seed: int = 0, size: int = 64, places: float = 1.0) -> None:
    """Writes text_encoder/ and scheduler/ beside the tokenizer in `out`; its videos are `size` pixels high and wide.

    `places` is a factor of the encoder's biases of relative position. At 30 the features of a word tell its neighbours
    about as clearly as the word itself. Captions of two shapes need this, to tell which colour belongs to which shape.
    """
    vocab = Tokenizer.from_pretrained(out / "tokenizer").vocab_size
    config = UMT5Config(vocab_size=vocab, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4)
    encoder = UMT5Encoder(config, rngs=nnx.Rngs(seed))
    biases = nnx.filter_state(nnx.state(encoder), lambda path, _: "relative_attention_bias" in map(str, path))
    nnx.update(encoder, jax.tree.map(lambda x: x * places, biases))
    pretrained.save_model(encoder, config, out / "text_encoder", dtype=jnp.bfloat16)
    pretrained.write_config(SCHEDULER, out / "scheduler", "scheduler_config.json")
    write_index(out, SCHEDULER, Variant(trained_size=(size, size)))


def main() -> None:
    """Parses the command line and builds."""
    parser = Tool(description="Write the text encoder and the scheduler of the embedded model.")
    parser.add_argument("--out", type=Path, required=True, help="the embedded model's folder, with its tokenizer/")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--size", type=int, default=64, help="height and width of the videos in pixels")
    parser.add_argument("--places", type=float, default=1.0, help="factor of the text encoder's position biases [1]")
    args = parser.parse_args()
    build(args.out, args.seed, args.size, args.places)
    print(f"wrote {args.out}/text_encoder and {args.out}/scheduler")


if __name__ == "__main__":
    main()
