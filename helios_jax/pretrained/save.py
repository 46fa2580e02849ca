"""Writes a model as a diffusers component: config.json and safetensors, tensor by tensor."""

import json
import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils

from helios_jax.locations import location
from helios_jax.models.layers import Layout
from helios_jax.pretrained import files
from helios_jax.pretrained.configs import write_config
from helios_jax.pretrained.layout import dtype_of, file_entries, to_file

# Smaller parameters (bytes) are laid out on the host: compiling a program for their shape takes longer.
SMALL = 2**20


def save_model(
    model: nnx.Module,
    config: Any,
    folder: Path | str,
    *,
    dtype: Any = None,
    max_shard_size: int | str = "5GB",
    more: Mapping[str, Any] | None = None,
) -> None:
    """Writes `model` as a diffusers (or transformers) component: config.json and safetensors.

    The host holds one tensor at a time. Where several hosts share a model, all must call; the first writes.

    Args:
        model: its parameters; adapters (`helios_jax.lora`) are not among them.
        config: its class attributes `CLASS_NAME` and `WEIGHTS_NAME` say what diffusers calls the two.
        folder: made when it is not there; weights of the same name in it are replaced.
        dtype: what is written, but for the class's `FLOAT32` islands; None writes what the model has.
        max_shard_size: bytes, or a string such as "5GB", that no file exceeds unless one tensor alone does.
        more: entries of config.json beside those of `config`; diffusers ignores names that begin with an underscore.
    """
    folder = location(folder)
    values = dict(nnx.to_flat_state(nnx.state(model, nnx.Param)))
    entries = file_entries(model)
    shards = plan_shards(model, config, dtype=dtype, max_shard_size=max_shard_size)
    first = jax.process_index() == 0
    if first:
        write_config(config, folder, more=more)
        _remove_weights(folder, config.WEIGHTS_NAME.removesuffix(".safetensors"))
    for name, tensors in shards.items():

        def value(key: str, tensors: Mapping[str, files.Spec] = tensors) -> np.ndarray:
            entry = entries[key]
            return fetch(values[entry.path].get_value(), entry.layer, entry.layout, tensors[key][0])

        files.write(folder / name, tensors, value, {"format": "pt"})
    if first:
        write_index(folder, config, shards)


def plan_shards(
    model: nnx.Module, config: Any, *, dtype: Any = None, max_shard_size: int | str = "5GB"
) -> dict[str, dict[str, files.Spec]]:
    """The names of `save_model`'s files, each with the dtypes and shapes of its tensors."""
    from huggingface_hub import split_state_dict_into_shards_factory

    variables = dict(nnx.to_flat_state(nnx.state(model, nnx.Param)))
    specs = {
        key: (np.dtype(dtype_of(model, entry.path, dtype) or variables[entry.path].dtype), entry.shape)
        for key, entry in file_entries(model).items()
    }
    split = split_state_dict_into_shards_factory(
        specs,
        get_storage_size=lambda spec: int(np.prod(spec[1])) * spec[0].itemsize,
        filename_pattern=config.WEIGHTS_NAME.removesuffix(".safetensors") + "{suffix}.safetensors",
        max_shard_size=max_shard_size,
    )
    return {name: {key: specs[key] for key in keys} for name, keys in split.filename_to_tensors.items()}


def write_index(folder: Path, config: Any, shards: Mapping[str, Mapping[str, files.Spec]]) -> None:
    """Writes the index that maps tensors to files; a single file needs none."""
    if len(shards) == 1:
        return
    size = sum(int(np.prod(shape)) * np.dtype(dtype).itemsize for s in shards.values() for dtype, shape in s.values())
    weight_map = {key: name for name, tensors in shards.items() for key in tensors}
    text = json.dumps({"metadata": {"total_size": size}, "weight_map": weight_map}, indent=2, sort_keys=True)
    (folder / f"{config.WEIGHTS_NAME}.index.json").write_text(text + "\n")


def _remove_weights(folder: Path, stem: str) -> None:
    """Removes old weights: a leftover index or shard would be loaded with the new weights, or instead of them."""
    pattern = re.compile(rf"{re.escape(stem)}(-\d{{5}}-of-\d{{5}})?\.safetensors(\.index\.json)?")
    for path in folder.iterdir() if folder.is_dir() else ():
        if pattern.fullmatch(path.name):
            path.unlink()


def to_arrays(model: nnx.Module) -> dict[str, np.ndarray]:
    """The parameters of `model` under their file keys, in the file's layout."""
    values = dict(nnx.to_flat_state(nnx.state(model, nnx.Param)))
    return {
        key: fetch(values[entry.path].get_value(), entry.layer, entry.layout, values[entry.path].dtype)
        for key, entry in file_entries(model).items()
    }


def fetch(value: Any, layer: int | None, layout: Layout, dtype: Any) -> np.ndarray:
    """A parameter, or one layer of a stacked one, on the host in the file's layout.

    Large ones are cut, transposed and cast on the device, because numpy is slow at it. All hosts that share the
    parameter must call.
    """
    if isinstance(value, np.ndarray) and layer is not None:
        value, layer = value[layer], None
    if value.nbytes > SMALL:
        value = _laid_out(value, layer or 0, layer is not None, layout, dtype)
        return np.asarray(_whole(value))
    value = np.asarray(_whole(value))
    value = value if layer is None else value[layer]
    return np.asarray(to_file(value.astype(dtype), layout), order="C")


@partial(jax.jit, static_argnums=(2, 3, 4))
def _laid_out(value: jax.Array, layer: int, stacked: bool, layout: Layout, dtype: Any) -> jax.Array:
    value = jax.lax.dynamic_index_in_dim(value, layer, keepdims=False) if stacked else value
    return to_file(value, layout).astype(dtype)


def _whole(value: Any) -> Any:
    if isinstance(value, jax.Array) and not value.is_fully_addressable:
        return multihost_utils.process_allgather(value, tiled=True)
    return value
