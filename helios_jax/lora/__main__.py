"""Merges LoRA files into a transformer and writes the result, for example to release a trained model.

    python -m helios_jax.lora MODEL OUT --lora a.safetensors --lora owner/repository=0.8

MODEL is a diffusers folder or a hub repository of a pipeline, or of a transformer alone. OUT, a new folder, gets the
transformer's config.json, with the settings that model and LoRAs were trained with, and its weights. Exit codes, with
one line that says why: 2 for input that cannot be used, 1 if the files cannot be written.
"""

import sys
from pathlib import Path

import jax.numpy as jnp

from helios_jax import lora, pretrained
from helios_jax.config import ConfigError
from helios_jax.locations import path_argument
from helios_jax.models.transformer import Transformer, TransformerConfig
from helios_jax.path_checks import check_folder
from helios_jax.runtime.command import Parser
from helios_jax.trained import read_trained, with_loras


def main(argv: list[str]) -> int:
    """Runs the command line; returns the exit code."""
    parser = Parser(prog="python -m helios_jax.lora", description="Merge LoRA files into a model.")
    parser.add_argument("model", help="a diffusers folder or a hub name")
    parser.add_argument("out", type=path_argument, help="the folder to write the transformer to")
    parser.add_argument(
        "--lora", action="append", required=True, metavar="FILE[=SCALE]", help="file or hub name; may be repeated"
    )
    parser.add_argument("--transformer", default="transformer", help="the subfolder of the transformer in MODEL")
    parser.add_argument(
        "--dtype", default="bfloat16", choices=["bfloat16", "float32"], help="dtype of the written weights"
    )
    try:
        args = parser.parse_args(argv)
        _check_new(args.out)
        files, scales, metadata = {}, {}, {}
        for i, text in enumerate(args.lora):
            name, scales[f"{i}"] = lora.file_and_scale(text)
            files[f"{i}"] = lora.read(name)
            metadata[name] = files[f"{i}"].metadata
        folder = pretrained.resolve(args.model, (".", args.transformer))
        folder = folder / args.transformer if (folder / args.transformer).is_dir() else folder
        config = pretrained.read_config(folder, TransformerConfig)
        abstract = Transformer.abstract(config, stacked=True)  # stacked: one program for all layers
        lora.check(abstract, files)
        trained = with_loras(read_trained(folder), metadata, kind=None)
        model = pretrained.load_model(abstract, folder, dtype=args.dtype)
        model = lora.merge(lora.attach(model, files, scales), donate=True)
        pretrained.save_model(model, config, args.out, dtype=jnp.dtype(args.dtype), more=trained.entries())
    except (ValueError, OSError) as error:
        print(f"helios_jax.lora: {error}", file=sys.stderr)
        return 1 if isinstance(error, OSError) else 2
    print(f"wrote {args.out}; sample.py takes it by --transformer {args.out}")
    return 0


def _check_new(folder: Path) -> None:
    """Raises ValueError for a folder that has files, which could be the model's own, or that cannot be written."""
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise ConfigError(f"out: {folder} is there already: name a new folder")
    check_folder(folder)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
