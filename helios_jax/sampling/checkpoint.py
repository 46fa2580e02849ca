"""A diffusers folder, checked from configs and file headers before anything is read or built."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from flax import nnx
from jax.sharding import Mesh

from helios_jax import pretrained, sharding
from helios_jax.diffusion.schedule import DMDSchedulerConfig, SchedulerConfig
from helios_jax.models.layers import Shapes
from helios_jax.models.ops.choices import DEVICE, Implementations
from helios_jax.models.tokenizer import Tokenizer
from helios_jax.models.transformer import Transformer, TransformerConfig
from helios_jax.models.umt5 import UMT5Config, UMT5Encoder
from helios_jax.models.vae import AutoencoderKLWan, VAEConfig
from helios_jax.pretrained import CheckpointError
from helios_jax.runtime import offload
from helios_jax.sampling.fingerprint import file_hash, weights_hash
from helios_jax.sampling.plan import Variant
from helios_jax.trained import METADATA, NAMES, Levels, read_trained, with_loras

PIPELINES = ("HeliosPipeline", "HeliosPyramidPipeline")
# Our own entry of model_index.json, written unless the size is 384 x 640; diffusers ignores names with an underscore.
TRAINED_SIZE = "_trained_size"
PARTS = ("vae", "text_encoder", "tokenizer", "scheduler")
Network = TypeVar("Network", bound=nnx.Module)


def read_trained_size(index: Mapping[str, Any], folder: Path) -> tuple[int, int]:
    """Height and width in pixels of a model's training, from the model_index.json of its `folder`.

    Raises CheckpointError for an entry that is no size.
    """
    size = index.get(TRAINED_SIZE, list(Variant.trained_size))
    if not isinstance(size, list) or len(size) != 2 or not all(type(side) is int and side > 0 for side in size):
        raise CheckpointError(
            f"{folder}/model_index.json: {TRAINED_SIZE} is {size!r}, not [height, width] in pixels: correct it, or"
            " leave it out"
        )
    return size[0], size[1]


def _read_scheduler(folder: Path) -> SchedulerConfig:
    """Reads the scheduler's config. A HeliosDMDScheduler's file names no solver, so its class gives the defaults."""
    name = "scheduler_config.json"
    is_dmd = pretrained.read_json(folder / name).get("_class_name") == DMDSchedulerConfig.CLASS_NAME
    return pretrained.read_config(folder, DMDSchedulerConfig if is_dmd else SchedulerConfig, name)


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint: its folder and kind, the configs of its parts, and the tokenizer, but no weights."""

    folder: Path
    transformer_folder: Path
    variant: Variant
    transformer: TransformerConfig
    vae: VAEConfig
    text_encoder: UMT5Config
    scheduler: SchedulerConfig
    tokenizer: Tokenizer

    @classmethod
    def open(cls, name: str | Path, *, transformer: str = "transformer", revision: str | None = None) -> "Checkpoint":
        """The checkpoint in a diffusers folder or a hub repository; reads configs, the tokenizer and file headers.

        Args:
            name: the folder, or the name of a hub repository, of which only the files that are needed are downloaded.
            transformer: the subfolder with the transformer; the released repositories also hold the transformers of
                earlier stages of training, such as transformer_init and transformer_ode. Or a folder elsewhere, such as
                one that helios_jax.lora has written.
            revision: branch, tag or commit of the repository.

        Raises:
            CheckpointError: something is missing, broken or does not fit; one line says what and what to do.
        """
        folder = pretrained.resolve(name, (transformer, *PARTS), revision)
        index = pretrained.read_json(folder / "model_index.json")
        kind = index.get("_class_name")
        if kind not in PIPELINES:
            raise CheckpointError(f"{folder}/model_index.json names {kind}, not one of {', '.join(PIPELINES)}")
        weights = _transformer_folder(folder, transformer)
        if weights is None:
            some = [part for part in pretrained.subfolders(name, revision) if part.startswith("transformer")]
            raise CheckpointError(f"{name} has no {transformer}/config.json; it has {', '.join(some) or 'none such'}")
        checkpoint = cls(
            folder=folder,
            transformer_folder=weights,
            variant=Variant(
                pyramid=kind == "HeliosPyramidPipeline",
                is_cfg_zero_star=bool(index.get("is_cfg_zero_star", False)),
                is_distilled=bool(index.get("is_distilled", False)),
                trained_size=read_trained_size(index, folder),
                trained=read_trained(weights),
            ),
            transformer=pretrained.read_config(weights, TransformerConfig),
            vae=pretrained.read_config(folder / "vae", VAEConfig),
            text_encoder=pretrained.read_config(folder / "text_encoder", UMT5Config),
            scheduler=_read_scheduler(folder / "scheduler"),
            tokenizer=Tokenizer.from_pretrained(folder / "tokenizer"),
        )
        checkpoint._check_parts()
        checkpoint.variant.trained.warn_of_left_out(weights)
        for part, model in (
            (weights, Transformer.abstract(checkpoint.transformer)),
            (folder / "vae", checkpoint.abstract_vae()),
            (folder / "text_encoder", checkpoint.abstract_text_encoder()),
        ):
            pretrained.check_weights(model, part)
        return checkpoint

    def _check_parts(self) -> None:
        stages, kind = self.scheduler.stages, self.scheduler.scheduler_type
        if (stages > 1) != self.variant.pyramid:
            raise CheckpointError(
                f"{self.folder}/scheduler: stages is {stages}, but model_index.json says {self.variant.name},"
                f" which has {'more than one' if self.variant.pyramid else '1'}"
            )
        if (kind == "dmd") != self.variant.is_distilled:
            raise CheckpointError(
                f"{self.folder}/scheduler: the solver is {kind}, but model_index.json says {self.variant.name},"
                f" which needs {'dmd' if self.variant.is_distilled else 'euler or unipc'}"
            )
        trained_as, file = self.variant.trained.kind, f"{self.transformer_folder}/config.json"
        if trained_as not in (None, self.variant.kind):
            raise CheckpointError(
                f"{file}: the transformer was trained as {NAMES[trained_as]}, but {self.folder}/model_index.json says"
                f" {self.variant.name}: give it to a {NAMES[trained_as]} model, such as that of its own run"
            )
        self._check_levels(file)
        self.check_widths()

    def _check_levels(self, source: str) -> None:
        """Raises CheckpointError for levels and steps, which `source` records, that are not the scheduler's."""
        trained, scheduler = self.variant.trained, self.scheduler
        levels = Levels(scheduler.stage_range[: scheduler.stages + 1], scheduler.gamma)
        if trained.levels not in (None, levels):
            raise CheckpointError(
                f"{source}: trained with {trained.levels}, but {self.folder}/scheduler has {levels}: give it to a model"
                " of its levels, such as that of its own run"
            )
        if trained.steps is not None and len(trained.steps) != scheduler.stages:
            raise CheckpointError(
                f"{source}: trained for {list(trained.steps)} steps, but {self.folder}/scheduler has"
                f" {scheduler.stages} stages: give it to a model of as many, such as that of its own run"
            )

    def check_widths(self) -> None:
        """Raises CheckpointError for a VAE or text encoder of other widths than the transformer takes."""
        for ours, theirs in (
            (("transformer in_channels", self.transformer.in_channels), ("vae z_dim", self.vae.z_dim)),
            (("transformer text_dim", self.transformer.text_dim), ("text_encoder d_model", self.text_encoder.d_model)),
        ):
            if ours[1] != theirs[1]:
                raise CheckpointError(f"{self.folder}: {ours[0]} {ours[1]} is not {theirs[0]} {theirs[1]}")

    def with_loras(self, metadata: Mapping[str, Mapping[str, str]]) -> "Checkpoint":
        """The checkpoint with the training settings that LoRA files record; `metadata` has each file's, by its name.

        Raises CheckpointError for LoRAs that disagree, or that were trained for another kind of checkpoint.
        """
        trained = with_loras(self.variant.trained, metadata, kind=self.variant.kind)
        made = replace(self, variant=replace(self.variant, trained=trained))
        made._check_levels(" and ".join(name for name, one in metadata.items() if METADATA in one))
        return made

    def hash(self) -> str:
        """A hash that tells this checkpoint's weights, configs and tokenizer from others'; see `fingerprint`."""
        index = self.folder / "model_index.json"
        parts = weights_hash([self.transformer_folder, *(self.folder / part for part in PARTS)])
        return hashlib.sha256(f"{parts} {file_hash(index)}".encode()).hexdigest()

    def abstract_vae(self) -> AutoencoderKLWan:
        return AutoencoderKLWan(self.vae, rngs=Shapes())

    def abstract_text_encoder(self) -> UMT5Encoder:
        return UMT5Encoder(self.text_encoder, rngs=Shapes())

    def load_transformer(
        self, dtype: Any, *, stacked: bool, mesh: Mesh | None = None, implementations: Implementations = DEVICE
    ) -> Transformer:
        """The transformer with its weights in `dtype`, sharded over `mesh`, if given, by `helios_jax.sharding`."""
        model = Transformer.abstract(self.transformer, stacked=stacked, implementations=implementations)
        return self._load(model, self.transformer_folder, dtype, mesh)

    def load_vae(self, dtype: Any, *, mesh: Mesh | None = None) -> AutoencoderKLWan:
        return self._load(self.abstract_vae(), self.folder / "vae", dtype, mesh)

    def load_text_encoder(self, dtype: Any, *, mesh: Mesh | None = None, offloaded: bool = False) -> UMT5Encoder:
        """The text encoder; if `offloaded`, in host memory, to be copied to the device while a prompt is encoded."""
        return self._load(self.abstract_text_encoder(), self.folder / "text_encoder", dtype, mesh, offloaded)

    def _load(self, model: Network, folder: Path, dtype: Any, mesh: Mesh | None, offloaded: bool = False) -> Network:
        placed = None if mesh is None else sharding.shardings(model, mesh)
        if offloaded:
            placed = offload.in_host_memory(offload.default_shardings(model) if placed is None else placed)
        return pretrained.load_model(model, folder, dtype=dtype, shardings=placed)

    def load(
        self,
        dtype: Any,
        vae_dtype: Any,
        stacked: bool,
        mesh: Mesh | None = None,
        offload_text_encoder: bool = False,
        implementations: Implementations = DEVICE,
    ) -> tuple[Transformer, AutoencoderKLWan, UMT5Encoder]:
        """The transformer, the VAE and the text encoder with their weights."""
        return (
            self.load_transformer(dtype, stacked=stacked, mesh=mesh, implementations=implementations),
            self.load_vae(vae_dtype, mesh=mesh),
            self.load_text_encoder(dtype, mesh=mesh, offloaded=offload_text_encoder),
        )


def _transformer_folder(folder: Path, name: str) -> Path | None:
    """The folder of a transformer: the checkpoint's subfolder `name`, else the folder of that name; None if neither."""
    for found in (folder / name, pretrained.local(name)):
        if (found / "config.json").is_file():
            return found
    return None


def write_index(folder: Path, scheduler: SchedulerConfig, variant: Variant) -> None:
    """Writes model_index.json: the kind of the pipeline, and which upstream class reads each part."""
    index: dict[str, object] = {"_class_name": PIPELINES[variant.pyramid]}
    if variant.pyramid:
        index |= {"is_cfg_zero_star": variant.is_cfg_zero_star, "is_distilled": variant.is_distilled}
    if variant.trained_size != Variant.trained_size:
        index[TRAINED_SIZE] = list(variant.trained_size)
    index |= {
        "scheduler": ["diffusers", scheduler.CLASS_NAME],
        "text_encoder": ["transformers", UMT5Config.CLASS_NAME],
        "tokenizer": ["transformers", "T5TokenizerFast"],
        "transformer": ["diffusers", TransformerConfig.CLASS_NAME],
        "vae": ["diffusers", VAEConfig.CLASS_NAME],
    }
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
