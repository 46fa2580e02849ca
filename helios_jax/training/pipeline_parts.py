"""Parts of a pipeline around a transformer in training: VAE, text encoder, tokenizer, and its scheduler."""

import dataclasses

from helios_jax import pretrained
from helios_jax.config import ConfigError
from helios_jax.diffusion.schedule import DMDSchedulerConfig, SchedulerConfig
from helios_jax.models.tokenizer import Tokenizer
from helios_jax.models.umt5 import UMT5Config
from helios_jax.models.vae import VAEConfig
from helios_jax.pretrained import CheckpointError
from helios_jax.sampling.checkpoint import PARTS, Checkpoint, read_trained_size
from helios_jax.sampling.plan import Variant
from helios_jax.training.flow_config import StudentTrainConfig, TransformerTrainConfig
from helios_jax.training.lineage import trained
from helios_jax.training.start import transformer_config


def open_components(config: TransformerTrainConfig) -> Checkpoint | None:
    """Opens the folder `flow.components`, with the scheduler that the trained transformer needs; None for no folder.

    Raises ConfigError, in one line, for components that are not there or do not fit the transformer.
    """
    components = config.flow.components
    if components is None:
        return None
    try:
        folder = pretrained.resolve(components, PARTS)
        if missing := [part for part in (*PARTS, "model_index.json") if not (folder / part).exists()]:
            raise CheckpointError(f"{components} has no {', '.join(missing)}")
        index = pretrained.read_json(folder / "model_index.json")
        # A distilled model's scheduler fits no other model.
        theirs = None
        if not isinstance(config, StudentTrainConfig) and not index.get("is_distilled", False):
            theirs = pretrained.read_config(folder / "scheduler", SchedulerConfig, "scheduler_config.json")
        checkpoint = Checkpoint(
            folder=folder,
            transformer_folder=folder / "transformer",
            variant=variant(config, read_trained_size(index, folder)),
            transformer=transformer_config(config),
            vae=pretrained.read_config(folder / "vae", VAEConfig),
            text_encoder=pretrained.read_config(folder / "text_encoder", UMT5Config),
            scheduler=scheduler(config, theirs),
            tokenizer=Tokenizer.from_pretrained(folder / "tokenizer"),
        )
        checkpoint.check_widths()
    except CheckpointError as error:
        raise ConfigError(f"flow.components: {error}") from None
    return checkpoint


def variant(config: TransformerTrainConfig, trained_size: tuple[int, int]) -> Variant:
    """The kind of model that a run makes: Base, Mid with a pyramid, or Distilled."""
    made = Variant(trained_size=trained_size, trained=trained(config))
    if isinstance(config, StudentTrainConfig):
        return dataclasses.replace(made, pyramid=True, is_distilled=True)
    if config.pyramid is not None:
        return dataclasses.replace(made, pyramid=True, is_cfg_zero_star=True)
    return made


def scheduler(
    config: TransformerTrainConfig, theirs: SchedulerConfig | None = None
) -> SchedulerConfig | DMDSchedulerConfig:
    """The scheduler of the trained model's pipeline.

    Levels and times are the run's. The rest, such as the solver, is `theirs`, of its components, if it has as many
    levels.
    """
    if isinstance(config, StudentTrainConfig):
        return student_scheduler(config)
    pyramid = config.pyramid
    if pyramid is None:
        ours = SchedulerConfig(stages=1, stage_range=(0.0, 1.0), use_dynamic_shifting=True)
    else:
        ours = pyramid.scheduler()
    if theirs is None or theirs.stages != ours.stages:
        return ours
    if pyramid is None:
        return theirs
    trained = {"stage_range": ours.stage_range, "gamma": ours.gamma}
    if pyramid.timestep_shift != 1:
        trained |= {"shift": ours.shift, "use_dynamic_shifting": False}
    return dataclasses.replace(theirs, **trained)


def student_scheduler(config: StudentTrainConfig) -> DMDSchedulerConfig:
    """The scheduler of a student, which can denoise only at the times that it was trained at."""
    distill, pyramid = config.distill, config.pyramid
    return DMDSchedulerConfig(
        stages=len(distill.steps),
        stage_range=pyramid.stage_range,
        gamma=pyramid.gamma,
        shift=pyramid.timestep_shift,
        use_dynamic_shifting=distill.shift is not None,
        time_shift_type=distill.shift or "linear",
    )
