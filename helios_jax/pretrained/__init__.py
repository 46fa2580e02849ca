"""Weights between diffusers folders (config.json + safetensors) and parameter trees.

`load_model` and `save_model` move tensors one by one: the host never holds a whole model. Every key in a file is used
exactly once and every parameter is filled exactly once, or `CheckpointError` names them.
"""

from helios_jax.pretrained.configs import checked_fields, make_config, read_config, read_json, write_config
from helios_jax.pretrained.errors import CheckpointError
from helios_jax.pretrained.folder import local, resolve, subfolders
from helios_jax.pretrained.layout import Entry, count, dtype_of, file_entries
from helios_jax.pretrained.load import check_weights, from_arrays, load_model
from helios_jax.pretrained.save import save_model, to_arrays

__all__ = [
    "CheckpointError",
    "Entry",
    "check_weights",
    "checked_fields",
    "count",
    "dtype_of",
    "file_entries",
    "from_arrays",
    "load_model",
    "local",
    "make_config",
    "read_config",
    "read_json",
    "resolve",
    "save_model",
    "subfolders",
    "to_arrays",
    "write_config",
]
