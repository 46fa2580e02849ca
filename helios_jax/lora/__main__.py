"""Merges LoRA files into a transformer and writes it, as a release is made from what training saved.

    python -m helios_jax.lora MODEL OUT --lora a.safetensors --lora owner/repository=0.8

MODEL is a diffusers folder or a hub repository of a pipeline, or of a transformer alone. OUT gets the transformer's
config.json and weights. Exit code 2 for input that cannot be used, with one line that says why.
"""

import argparse
import sys
from pathlib import Path

import jax.numpy as jnp

from helios_jax import lora, pretrained
from helios_jax.models.transformer import Transformer, TransformerConfig


def main(argv: list[str]) -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m helios_jax.lora", description="Merge LoRA files into a model.")
    parser.add_argument("model", help="a diffusers folder or a hub name")
    parser.add_argument("out", type=Path, help="the folder to write the transformer to")
    parser.add_argument(
        "--lora", action="append", required=True, metavar="FILE[=SCALE]", help="may be given repeatedly"
    )
    parser.add_argument("--transformer", default="transformer", help="the subfolder of the transformer in MODEL")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"], help="of what is written")
    args = parser.parse_args(argv)
    try:
        files, scales = {}, {}
        for i, text in enumerate(args.lora):
            name, _, scale = text.partition("=")
            files[f"{i}"], scales[f"{i}"] = lora.read(name), _number(text, scale or "1")
        folder = pretrained.resolve(args.model, (".", args.transformer))
        folder = folder / args.transformer if (folder / args.transformer).is_dir() else folder
        config = pretrained.read_config(folder, TransformerConfig)
        abstract = Transformer.abstract(config, stacked=True)  # one program for all layers
        lora.check(abstract, files)
        model = pretrained.load_model(abstract, folder, dtype=args.dtype)
        model = lora.merge(lora.attach(model, files, scales), donate=True)
        pretrained.save_model(model, config, args.out, dtype=jnp.dtype(args.dtype))
    except ValueError as error:
        print(f"helios_jax.lora: {error}", file=sys.stderr)
        return 2
    print(f"wrote {args.out}")
    return 0


def _number(text: str, scale: str) -> float:
    try:
        return float(scale)
    except ValueError:
        raise ValueError(f"--lora {text}: the scale after = is not a number") from None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
