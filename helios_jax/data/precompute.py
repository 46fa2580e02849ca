"""Turns videos and captions into what the flow stages train on: VAE latents, chunk by chunk, and text embeddings.

    python -m helios_jax.data.precompute --videos data/toy --vae runs/toy-vae/vae --text helios_jax/assets/toy \\
        --out data/toy-latents

`--videos` is a dataset of `helios_jax.data.toy_build`; `--text` holds text_encoder/ and tokenizer/ of a diffusers
folder. Each chunk is encoded on its own, as the sampler decodes it; latents are the posterior's mean, normalized, in
float16. The embedding of the empty caption lies beside the records: training uses it for classifier-free guidance.
"""

import argparse
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from helios_jax import pretrained
from helios_jax.data import records
from helios_jax.models import text as umt5
from helios_jax.models.text import UMT5Config, UMT5Encoder
from helios_jax.models.tokenizer import Tokenizer
from helios_jax.models.vae import AutoencoderKLWan, VAEConfig, normalize
from helios_jax.pretrained import CheckpointError

EMPTY_TEXT = "empty_text.npy"


class Encoders:
    """The frozen networks: pixels to normalized latents, captions to embeddings."""

    def __init__(self, vae: Path, text: Path, max_length: int | None):
        self.config = pretrained.read_config(vae, VAEConfig)
        text_config = pretrained.read_config(text / "text_encoder", UMT5Config)
        self.tokenizer = Tokenizer.from_pretrained(text / "tokenizer")
        self.max_length = max_length or min(512, self.tokenizer.max_length)
        self.width = text_config.d_model
        abstract = nnx.eval_shape(lambda: AutoencoderKLWan(self.config, rngs=nnx.Rngs(0)))
        self._vae = pretrained.load_model(abstract, vae, dtype=jnp.float32)
        abstract = nnx.eval_shape(lambda: UMT5Encoder(text_config, rngs=nnx.Rngs(0)))
        self._text = pretrained.load_model(abstract, text / "text_encoder", dtype=jnp.float32)
        self._encode = jax.jit(lambda vae, x: normalize(vae.encode(x / 127.5 - 1.0)[0], self.config))
        self._embed = jax.jit(umt5.encode)

    def latents(self, video: np.ndarray, frames: int) -> np.ndarray:
        """uint8 [chunks * frames, h, w, 3] -> float16 [chunks, t, h', w', c]."""
        chunks = video.reshape(-1, frames, *video.shape[1:]).astype(np.float32)
        return np.asarray(self._encode(self._vae, chunks)).astype(np.float16)

    def text(self, captions: list[str]) -> np.ndarray:
        """float16 [b, max_length, d], zero past each caption's end."""
        ids, mask = self.tokenizer(captions, self.max_length)
        return np.asarray(self._embed(self._text, jnp.asarray(ids), jnp.asarray(mask))).astype(np.float16)


def examples(encoders: Encoders, source: records.Source, frames: int) -> Iterator[records.Example]:
    """One example per video, with a line of progress now and then."""
    begin = last = time.monotonic()
    for i, example in enumerate(source):
        yield {
            "latents": encoders.latents(example["video"], frames),
            "text": encoders.text([example["caption"]])[0],
            "caption": example["caption"],
            "id": example["id"],
        }
        if (now := time.monotonic()) - last > 10:
            last = now
            rate = (i + 1) / (now - begin)
            print(f"{source}: {i + 1} of {len(source)} videos, {rate:.1f} a second", flush=True)


def build(videos: Path, vae: Path, text: Path, out: Path, max_length: int | None = None) -> None:
    """Writes the dataset `out`; raises ValueError or FileNotFoundError, in one line, for anything that cannot be."""
    sources = {split: records.open_source(videos, split) for split in ("train", "test")}
    if out.exists():
        raise FileExistsError(f"{out} already exists: a dataset is never overwritten; delete it or name another")
    encoders = Encoders(vae, text, max_length)
    frames = 8 * encoders.config.scale_factor_temporal + 1  # 9 latent frames
    t, h, w, _ = sources["train"][0]["video"].shape
    if t % frames:
        raise ValueError(f"{videos}: videos have {t} frames, which is no multiple of a chunk's {frames}")
    space = encoders.config.scale_factor_spatial
    shape = (t // frames, 9, h // space, w // space, encoders.config.z_dim)
    features = {
        "latents": records.tensor(shape, np.float16),
        "text": records.tensor((encoders.max_length, encoders.width), np.float16),
        "caption": records.text(),
        "id": records.text(),
    }
    empty = encoders.text([""])[0]
    records.write(out, features, {k: examples(encoders, s, frames) for k, s in sources.items()})
    np.save(out / EMPTY_TEXT, empty)


def main(argv: list[str] | None = None) -> int:
    """Parses the command line and builds; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m helios_jax.data.precompute", description="Encode videos and captions for the flow stages."
    )
    parser.add_argument("--videos", type=Path, required=True, help="a dataset of pixels and captions")
    parser.add_argument("--vae", type=Path, required=True, help="folder with the VAE's config.json and weights")
    parser.add_argument("--text", type=Path, required=True, help="folder with text_encoder/ and tokenizer/")
    parser.add_argument("--out", type=Path, required=True, help="folder to make; it must not exist")
    parser.add_argument("--max-length", type=int, help="tokens of a caption (default: the tokenizer's own limit)")
    args = parser.parse_args(argv)
    try:
        build(args.videos, args.vae, args.text, args.out, args.max_length)
    except (CheckpointError, FileNotFoundError, FileExistsError, ValueError) as error:
        print(f"precompute: {error}", file=sys.stderr)
        return 2
    print(f"{args.out}: done")
    return 0


if __name__ == "__main__":
    sys.exit(main())
