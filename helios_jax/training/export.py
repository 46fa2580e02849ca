"""Export of a trained transformer as a diffusers folder, with the other parts of its pipeline."""

from pathlib import Path

import jax
import jax.numpy as jnp

from helios_jax import lora, pretrained
from helios_jax.locations import copy_tree
from helios_jax.models.transformer import Transformer
from helios_jax.sampling.checkpoint import write_index
from helios_jax.training.flow_config import TransformerTrainConfig
from helios_jax.training.lineage import trained
from helios_jax.training.pipeline_parts import open_components

COPIED = ("vae", "text_encoder", "tokenizer")


def export_pipeline(model: Transformer, config: TransformerTrainConfig, folder: Path) -> None:
    """Writes `folder`/pipeline: the transformer in bfloat16, and with `flow.components` a whole pipeline around it.

    Adapters are merged into it; those that were trained are also written alone into `folder`/lora. Both record the
    settings of training that sampling must repeat (`helios_jax.trained`). All hosts must call; the first writes.
    """
    out = folder / "pipeline"
    if config.lora is not None:
        name = lora.LoRAConfig.name
        lora.save(model, folder / "lora", name, dtype=jnp.bfloat16, metadata=trained(config).metadata())
        model = lora.merge(model)
    pretrained.save_model(model, model.config, out / "transformer", dtype=jnp.bfloat16, more=trained(config).entries())
    checkpoint = open_components(config)
    if jax.process_index():
        return
    if checkpoint is not None:
        for part in COPIED:
            copy_tree(checkpoint.folder / part, out / part)
        pretrained.write_config(checkpoint.scheduler, out / "scheduler", "scheduler_config.json")
        write_index(out, checkpoint.scheduler, checkpoint.variant)
    print(f"exported {out}", flush=True)
