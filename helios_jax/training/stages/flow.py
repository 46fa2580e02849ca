"""Stage 1: autoregressive adaptation by flow matching, with history that drops out and drifts (paper section 3.3).

A batch holds `target` [b, t, h, w, c], `history` [b, frames, h, w, c], `anchor` [b, 1, h, w, c] (normalized latents),
`text` [b, m, d] and `chunk` [b], as `helios_jax.data.precompute` and `chunk_transform` make them.
"""

import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from helios_jax import pretrained
from helios_jax.config import ConfigError
from helios_jax.data.loader import chunk_transform, loader
from helios_jax.data.precompute import EMPTY_TEXT
from helios_jax.data.records import open_source
from helios_jax.diffusion.corruption import corrupt_history, drop_history
from helios_jax.diffusion.memory import History, window
from helios_jax.models.transformer import Transformer, TransformerConfig, init_memory_patches
from helios_jax.pretrained import CheckpointError
from helios_jax.training.config import TrainConfig

COMPONENTS = ("vae", "text_encoder", "tokenizer", "scheduler")


def init(config: TrainConfig, key: jax.Array) -> Transformer:
    """Random parameters of `config.model.transformer`, its memory patches made from the patch embedding."""
    return init_memory_patches(Transformer(_transformer(config), stacked=True, rngs=nnx.Rngs(key)))


def load(config: TrainConfig, model: Transformer, shardings: Any = None) -> Transformer:
    """The abstract `model` with the weights in `config.init`/transformer, or in `config.init` itself."""
    return pretrained.load_model(model, _init_folder(config), dtype=jnp.float32, shardings=shardings)


def _init_folder(config: TrainConfig) -> Path:
    folder = pretrained.resolve(config.init or "", (".", "transformer"))
    return folder / "transformer" if (folder / "transformer").is_dir() else folder


def batches(config: TrainConfig) -> Any:
    """Random chunks with what came before them, this host's part of each batch."""
    memory = config.flow.memory
    if config.flow.components is not None:
        missing = [c for c in (*COMPONENTS, "model_index.json") if not (Path(config.flow.components) / c).exists()]
        if missing:
            raise ConfigError(f"flow.components: {config.flow.components} has no {', '.join(missing)}")
    try:
        make = "python -m helios_jax.data.precompute --help"
        source = open_source(config.data.folder, "train", make=make)
        empty = np.load(Path(config.data.folder) / EMPTY_TEXT)
    except (FileNotFoundError, ValueError) as error:
        raise ConfigError(f"data.folder: {error}") from None
    pick = chunk_transform((memory.long, memory.mid, memory.recent), memory.frames_per_chunk)

    def transform(example, rng):
        example = pick(example, rng)
        text = empty if rng.random() < config.flow.text_drop else example["text"]
        arrays = {name: example[name].astype(np.float32) for name in ("target", "history", "anchor")}
        return {**arrays, "text": text.astype(np.float32), "chunk": example["chunk"]}

    return loader(
        source,
        seed=config.data.seed,
        batch_size=config.data.batch_size,
        transform=transform,
        num_hosts=jax.process_count(),
        host=jax.process_index(),
    )


def loss(
    model: Transformer, batch: dict[str, jax.Array], key: jax.Array, config: TrainConfig
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Mean squared error of the velocity, noise minus data; metrics split it by early and late times."""
    flow = config.flow
    k_drop, k_corrupt, k_time, k_noise = jax.random.split(key, 4)
    target, history, anchor = batch["target"], batch["history"], batch["anchor"]
    if flow.drop is not None:
        history, anchor = drop_history(k_drop, history, anchor, flow.drop, flow.memory)
    if flow.corruption is not None:
        history, anchor = corrupt_history(k_corrupt, history, anchor, flow.corruption)
    parts, indices = window(flow.memory, History(history, anchor, jnp.asarray(True), batch["chunk"]))

    sigma = draw_sigma(k_time, target.shape[0], flow.logit_mean, flow.logit_std)
    s = sigma[:, None, None, None, None]
    noise = jax.random.normal(k_noise, target.shape)
    noisy = (1 - s) * target + s * noise

    dtype = jnp.dtype(config.precision)
    velocity = model(
        noisy.astype(dtype),
        sigma * 1000,
        model.text_kv(batch["text"].astype(dtype)),
        jax.tree.map(lambda x: x.astype(dtype), parts),
        indices,
        remat=config.remat,
    )
    error = jnp.square(velocity.astype(jnp.float32) - (noise - target)).mean((1, 2, 3, 4))
    noisy_half = sigma > 0.5
    metrics = {
        "loss_noisy": (error * noisy_half).sum() / jnp.maximum(noisy_half.sum(), 1),
        "loss_clean": (error * ~noisy_half).sum() / jnp.maximum((~noisy_half).sum(), 1),
    }
    return error.mean(), metrics


def draw_sigma(key: jax.Array, batch: int, mean: float, std: float) -> Float[Array, " b"]:
    """Logit-normal times on the 1000 levels of the training schedule, from 0.999 down (upstream's stage 1)."""
    u = jax.nn.sigmoid(mean + std * jax.random.normal(key, (batch,)))
    return 0.999 * (1 - jnp.floor(u * 1000) / 1000)


def export(model: Transformer, config: TrainConfig, folder: Path) -> None:
    """Writes `folder`/pipeline: the transformer, and a whole pipeline around it when `flow.components` is given."""
    if jax.process_index():
        return
    out = folder / "pipeline"
    pretrained.save_model(model, _transformer(config), out / "transformer", dtype=jnp.bfloat16)
    if config.flow.components is not None:
        for part in COMPONENTS:
            shutil.copytree(Path(config.flow.components) / part, out / part, dirs_exist_ok=True)
        shutil.copy(Path(config.flow.components) / "model_index.json", out / "model_index.json")
    print(f"exported {out}", flush=True)


def _transformer(config: TrainConfig) -> TransformerConfig:
    if config.model.transformer is not None:
        return config.model.transformer
    if config.init is None:
        raise ConfigError("model.transformer: give its sizes, or name weights to start from with init")
    try:
        return pretrained.read_config(_init_folder(config), TransformerConfig)
    except CheckpointError as error:
        raise ConfigError(f"init: {error}") from None
