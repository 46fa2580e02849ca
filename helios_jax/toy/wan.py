"""The embedded model as the start of training: a text-to-video transformer in Wan 2.1's layout, without memory.

    python -m helios_jax.toy.wan --model helios_jax/assets/toy --out runs/toy-chain/wan

It has no memory patches, and its config.json is one that diffusers' WanTransformer3DModel reads.
"""

import dataclasses
import json
from pathlib import Path

import jax.numpy as jnp

from helios_jax import pretrained
from helios_jax.models.transformer import MEMORY_PATCHES, Transformer
from helios_jax.runtime.command import Tool
from helios_jax.sampling.checkpoint import Checkpoint
from helios_jax.training.start import WAN

KEYS = (
    "patch_size",
    "num_attention_heads",
    "attention_head_dim",
    "in_channels",
    "out_channels",
    "text_dim",
    "freq_dim",
    "ffn_dim",
    "num_layers",
    "cross_attn_norm",
    "qk_norm",
    "eps",
    "added_kv_proj_dim",
)


def build(model: Path, out: Path) -> None:
    """Writes `out`/transformer from the transformer of the Helios pipeline in `model`."""
    checkpoint = Checkpoint.open(model)
    arrays = pretrained.to_arrays(checkpoint.load_transformer(jnp.float32, stacked=False))
    sizes = dataclasses.replace(checkpoint.transformer, has_multi_term_memory_patch=False)
    kept = {key: values for key, values in arrays.items() if key.split(".")[0] not in MEMORY_PATCHES}
    bare = pretrained.from_arrays(Transformer.abstract(sizes), kept)
    pretrained.save_model(bare, sizes, out / "transformer", dtype=jnp.bfloat16)
    config = out / "transformer" / "config.json"
    values = json.loads(config.read_text())
    config.write_text(json.dumps({"_class_name": WAN, **{key: values[key] for key in KEYS}}, indent=2) + "\n")


def main() -> None:
    """Parses the command line and builds."""
    parser = Tool(description="Write a Helios transformer as Wan's, without its memory patches.")
    parser.add_argument("--model", type=Path, required=True, help="a pipeline's folder")
    parser.add_argument("--out", type=Path, required=True, help="folder to make")
    args = parser.parse_args()
    build(args.model, args.out)
    print(f"wrote {args.out}/transformer")


if __name__ == "__main__":
    main()
