"""The initial transformer of a run: random, or from a checkpoint of Helios or Wan 2.1; and its new adapters."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from helios_jax import lora, pretrained
from helios_jax.config import ConfigError
from helios_jax.models.ops import context_attention
from helios_jax.models.ops.choices import Implementations
from helios_jax.models.transformer import MEMORY_PATCHES, Transformer, TransformerConfig, init_memory_patches
from helios_jax.models.transformer.embeddings import Patches, coarser
from helios_jax.pretrained import CheckpointError
from helios_jax.runtime import seeds
from helios_jax.training.flow_config import TransformerTrainConfig
from helios_jax.training.trainable import AdapterConfig

WAN = "WanTransformer3DModel"


def transformer_config(config: TransformerTrainConfig, name: str = "init") -> TransformerConfig:
    """The transformer's sizes: `model.transformer`, or those of the weights that `init` names.

    Raises ConfigError when there are none, or when the weights that `init` names cannot be trained. Messages call
    `config.init` by `name`.
    """
    if config.model.transformer is not None:
        return config.model.transformer
    if config.init is None:
        raise ConfigError("model.transformer: give its sizes, or name weights to start from with init")
    try:
        folder = init_folder(config)
        return _wan_config(folder) if is_wan(folder) else pretrained.read_config(folder, TransformerConfig)
    except CheckpointError as error:
        raise ConfigError(f"{name}: {error}") from None


def init_transformer(config: TransformerTrainConfig, key: jax.Array) -> Transformer:
    """Random parameters, the memory patches made from the patch embedding, with adapters where `config.lora` asks.

    Raises ConfigError when the current mesh does not fit its attention.
    """
    sizes, context = transformer_config(config), config.mesh.context_attention
    check_attention(config, jax.sharding.get_abstract_mesh())
    by = Implementations(context=context)
    model = Transformer(sizes, stacked=True, unroll=config.unroll, implementations=by, rngs=nnx.Rngs(key))
    if sizes.has_multi_term_memory_patch:
        model = init_memory_patches(model)
    return model if config.lora is None else _add_adapters(model, config.lora, config.seed)


def check_attention(config: TransformerTrainConfig, mesh: Any) -> None:
    """Raises ConfigError when `mesh`, which may be abstract, cannot divide the transformer's attention heads."""
    try:
        context_attention.check(config.mesh.context_attention, transformer_config(config).num_attention_heads, mesh)
    except ValueError as error:
        raise ConfigError(str(error)) from None


def load_transformer(config: TransformerTrainConfig, model: Transformer, shardings: Any = None) -> Transformer:
    """The abstract `model` of `init_transformer` with the weights that `config.init` names, in the model's dtypes.

    Wan's checkpoints (text to video, diffusers layout) have no memory patches: they are made from the patch embedding.
    New adapters begin as in `init_transformer`. Raises CheckpointError when the files do not fit.
    """
    folder, base = init_folder(config), lora.remove(model)
    sizes = "its config.json" if config.model.transformer is None else "model.transformer of this run's config"
    if is_wan(folder):
        loaded = _load_wan(base, folder, shardings, sizes)
    else:
        loaded = pretrained.load_model(base, folder, dtype="model", shardings=shardings, sizes=sizes)
    if config.lora is None:
        return loaded
    adapters, seed = config.lora, config.seed
    add = jax.jit(lambda model: _add_adapters(model, adapters, seed), out_shardings=shardings, donate_argnums=0)
    return add(loaded)


def init_folder(config: TransformerTrainConfig) -> Path:
    """The folder of the transformer that `config.init` names; a hub's files are downloaded."""
    part = config.init_subfolder
    folder = pretrained.resolve(config.init or "", (".", part))
    return folder / part if (folder / part).is_dir() else folder


def is_wan(folder: Path) -> bool:
    """Tells if the transformer in `folder` is Wan's."""
    return pretrained.read_json(folder / "config.json").get("_class_name") == WAN


def _wan_config(folder: Path) -> TransformerConfig:
    """Helios' config for the transformer of Wan 2.1: the same sizes, and rotary dimensions split as Wan splits them."""
    values = pretrained.read_json(folder / "config.json")
    if values.get("image_dim") is not None or values.get("added_kv_proj_dim") is not None:
        raise CheckpointError(f"{folder} is Wan's image-to-video model; Helios starts from the text-to-video one")
    path = folder / "config.json"
    given = pretrained.checked_fields(values, TransformerConfig, path)
    head = given.get("attention_head_dim") or TransformerConfig.attention_head_dim
    side = 2 * (head // 6)
    return pretrained.make_config({**given, "rope_dim": (head - 2 * side, side, side)}, TransformerConfig, path)


def _load_wan(model: Transformer, folder: Path, shardings: Any, sizes: str) -> Transformer:
    """Loads all weights but the memory patches, which are computed in their shards from the patch embedding."""
    new = {name: getattr(model, name) for name in MEMORY_PATCHES if hasattr(model, name)}
    bare = lora.adapters.copy(model)
    for name in new:
        delattr(bare, name)
    loaded = pretrained.load_model(bare, folder, dtype="model", shardings=shardings, sizes=sizes)

    def make(source: Patches) -> dict[str, Patches]:
        made = {name: lora.adapters.copy(patches) for name, patches in new.items()}
        for name, patches in made.items():
            for part, value in zip(("weight", "bias"), coarser(source, MEMORY_PATCHES[name])):
                old = getattr(patches, part)
                setattr(patches, part, old.replace(value.astype(old.dtype)))
        return made

    placed = None if shardings is None else {name: getattr(shardings, name) for name in new}
    for name, patches in jax.jit(make, out_shardings=placed)(loaded.patch_embedding).items():
        setattr(loaded, name, patches)
    return loaded


def _add_adapters(model: Transformer, config: AdapterConfig, seed: int) -> Transformer:
    adapter = lora.LoRAConfig(config.rank, config.alpha, config.target_modules, init="gaussian")
    try:
        return lora.add(model, adapter, jax.random.fold_in(seeds.key(seed), 1), dtype=jnp.float32)
    except ValueError as error:
        raise ConfigError(f"lora: {error}") from None
