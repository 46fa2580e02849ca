"""Stages by name. It imports no jax, so that the help of train.py, which lists them, comes at once."""

from typing import NamedTuple


class Entry(NamedTuple):
    """A stage: the path of its class, and what it trains."""

    path: str
    about: str


STAGES = {
    "vae": Entry("helios_jax.training.stages.vae.VAEStage", "the autoencoder, on clips of pixels"),
    "flow": Entry(
        "helios_jax.training.stages.flow.FlowStage",
        "stages 1 and 2: a text-to-video model learns to continue a video, then to denoise in levels",
    ),
    "ode": Entry(
        "helios_jax.training.stages.ode.ODEStage",
        "stage 3, first part: a student learns the ends of the teacher's trajectories",
    ),
    "distill": Entry(
        "helios_jax.training.stages.distill.distill_stage.DistillStage",
        "stage 3, second part: distribution matching, with a GAN if configured",
    ),
}
