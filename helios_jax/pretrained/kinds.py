"""Kinds of weights that cannot be used, told by their names and dtypes before anything is read."""

import re
from collections.abc import Iterable, Mapping

import jax.numpy as jnp
import numpy as np

from helios_jax.pretrained.errors import CheckpointError
from helios_jax.pretrained.folder import SINGLE

SCALED = re.compile(r"(.*\.)?(scale_weight|weight_scale|scale_input|input_scale|scaled_fp8)")
# Names in Wan's own checkpoints and in ComfyUI's, none of which a diffusers folder has.
ORIGINAL = re.compile(r"model\.diffusion_model\..*|blocks\.\d+\.(self_attn|cross_attn)\..*|first_stage_model\..*")


def check_dtypes(dtypes: Mapping[str, np.dtype], source: str) -> None:
    """Raises `CheckpointError` unless all of `dtypes`, by tensor, are floating and not quantised.

    `source` names the file, or the folder.
    """
    for key, dtype in dtypes.items():
        if SCALED.fullmatch(key) or dtype.name.startswith("float8"):
            raise CheckpointError(
                f"{source} holds fp8 weights ({key} is {dtype}), which need scales that are not applied here:"
                " take the release in bfloat16 or float16"
            )
        if not jnp.issubdtype(dtype, jnp.floating):
            raise CheckpointError(
                f"{source}: {key} is {dtype}, not a floating-point tensor: quantised weights cannot be used;"
                " take the release in bfloat16 or float16"
            )


def check_names(names: Iterable[str], source: str) -> None:
    """Raises `CheckpointError` for tensors under the `names` of another kind of checkpoint than diffusers'."""
    if original := next((key for key in names if ORIGINAL.fullmatch(key)), None):
        raise CheckpointError(f"{source} holds {original}, a name of Wan's or ComfyUI's own files: {SINGLE}")
