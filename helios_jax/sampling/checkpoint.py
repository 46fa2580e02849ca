"""A diffusers folder, checked from configs and file headers before anything is read or built."""

from dataclasses import dataclass
from pathlib import Path

import jax.numpy as jnp
from flax import nnx

from helios_jax import pretrained
from helios_jax.diffusion.schedule import SchedulerConfig
from helios_jax.models.text import UMT5Config, UMT5Encoder
from helios_jax.models.tokenizer import Tokenizer
from helios_jax.models.transformer import Transformer, TransformerConfig
from helios_jax.models.vae import AutoencoderKLWan, VAEConfig
from helios_jax.pretrained import CheckpointError


@dataclass(frozen=True)
class Checkpoint:
    """What a folder holds: the configs of its parts, and the tokenizer."""

    folder: Path
    transformer: TransformerConfig
    vae: VAEConfig
    text_encoder: UMT5Config
    scheduler: SchedulerConfig
    tokenizer: Tokenizer

    @classmethod
    def open(cls, name: str | Path) -> "Checkpoint":
        """The checkpoint in a diffusers folder or a hub repository; reads configs, the tokenizer and file headers.

        Raises:
            CheckpointError: something is missing, broken or does not fit; one line says what and what to do.
        """
        folder = pretrained.resolve(name)
        kind = pretrained.read_json(folder / "model_index.json").get("_class_name")
        if kind != "HeliosPipeline":
            raise CheckpointError(
                f"{folder}/model_index.json names {kind}: only a HeliosPipeline (Base) can be sampled"
            )
        checkpoint = cls(
            folder=folder,
            transformer=pretrained.read_config(folder / "transformer", TransformerConfig),
            vae=pretrained.read_config(folder / "vae", VAEConfig),
            text_encoder=pretrained.read_config(folder / "text_encoder", UMT5Config),
            scheduler=pretrained.read_config(folder / "scheduler", SchedulerConfig, "scheduler_config.json"),
            tokenizer=Tokenizer.from_pretrained(folder / "tokenizer"),
        )
        checkpoint._check_parts()
        for part, model in (
            ("transformer", Transformer.abstract(checkpoint.transformer)),
            ("vae", checkpoint.abstract_vae()),
            ("text_encoder", checkpoint.abstract_text_encoder()),
        ):
            pretrained.check_weights(model, folder / part)
        return checkpoint

    def _check_parts(self) -> None:
        if self.scheduler.stages != 1:
            raise CheckpointError(f"{self.folder}/scheduler: stages is {self.scheduler.stages}; a Base model has 1")
        if self.scheduler.scheduler_type == "dmd":
            raise CheckpointError(f"{self.folder}/scheduler: scheduler_type is dmd; a Base model has euler or unipc")
        for ours, theirs in (
            (("transformer in_channels", self.transformer.in_channels), ("vae z_dim", self.vae.z_dim)),
            (("transformer text_dim", self.transformer.text_dim), ("text_encoder d_model", self.text_encoder.d_model)),
        ):
            if ours[1] != theirs[1]:
                raise CheckpointError(f"{self.folder}: {ours[0]} {ours[1]} is not {theirs[0]} {theirs[1]}")

    def abstract_vae(self) -> AutoencoderKLWan:
        return nnx.eval_shape(lambda: AutoencoderKLWan(self.vae, rngs=nnx.Rngs(0)))

    def abstract_text_encoder(self) -> UMT5Encoder:
        return nnx.eval_shape(lambda: UMT5Encoder(self.text_encoder, rngs=nnx.Rngs(0)))

    def load(
        self, dtype: jnp.dtype, vae_dtype: jnp.dtype, stacked: bool
    ) -> tuple[Transformer, AutoencoderKLWan, UMT5Encoder]:
        """The networks with their weights."""
        abstract = Transformer.abstract(self.transformer, stacked=stacked)
        return (
            pretrained.load_model(abstract, self.folder / "transformer", dtype=dtype),
            pretrained.load_model(self.abstract_vae(), self.folder / "vae", dtype=vae_dtype),
            pretrained.load_model(self.abstract_text_encoder(), self.folder / "text_encoder", dtype=dtype),
        )
