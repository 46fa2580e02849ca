"""Writes adapters to files that diffusers and PEFT can load."""

import json
import re
from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from helios_jax.locations import location
from helios_jax.lora.adapters import LoRA, check_names, module_at, names, targets
from helios_jax.lora.files import METADATA, WEIGHTS
from helios_jax.pretrained import Entry, files
from helios_jax.pretrained.save import fetch


def save(
    model: nnx.Module,
    path: Path | str,
    name: str | None = None,
    *,
    dtype: Any = None,
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """Writes the adapter `name` (the only one, if None) for diffusers' `load_lora_weights`; returns the file's path.

    The file's metadata hold rank and alpha. The present scale is not saved, as in diffusers. Where several hosts share
    a model, all must call.

    Args:
        path: a .safetensors file, or a folder, in which the file is named pytorch_lora_weights.safetensors.
        dtype: the dtype in the file; None is the adapter's.
        metadata: further entries of the file's metadata.

    Raises:
        ValueError: no adapter has this name, or `name` is None and the model does not have exactly one adapter.
    """
    known = names(model)
    if name is None and len(known) != 1:
        raise ValueError(f"which adapter is to be saved? There is {', '.join(known) or 'none'}")
    name = name or known[0]
    check_names([name], known)
    path = location(path)
    path = path if path.suffix == ".safetensors" else path / WEIGHTS[0]

    found: dict[str, tuple[Entry, LoRA]] = {}
    changed: dict[Any, np.ndarray] = {}
    for module, target in targets(model).items():
        adapter = next((a for a in module_at(model, target.path).adapters or () if a.name == name), None)
        if adapter is None:
            continue
        if target.path not in changed:
            changed[target.path] = _changed_layers(adapter)
        if changed[target.path][() if target.layer is None else target.layer]:
            found[module] = (target, adapter)
    tensors: dict[str, files.Spec] = {}
    values: dict[str, Callable[[], np.ndarray]] = {}
    for module, (target, adapter) in found.items():
        for part, variable in (
            ("lora_A.weight", adapter.a),
            ("lora_B.weight", adapter.b),
            ("lora_B.bias", adapter.bias),
        ):
            if variable is None:
                continue
            kind = np.dtype(dtype or variable.dtype)
            key = f"transformer.{module}.{part}"
            values[key] = partial(_value, adapter, part, target, kind)
            tensors[key] = (kind, _shape(adapter, part, target))
    if jax.process_index() == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
    header = {"format": "pt", METADATA: json.dumps(_peft_config(found), indent=2, sort_keys=True), **(metadata or {})}
    files.write(path, tensors, lambda key: values[key](), header)
    return path


def _changed_layers(adapter: LoRA) -> np.ndarray:
    """True for each stacked layer whose values in an adapter are not all zeros; a scalar if layers are not stacked."""
    layers = adapter.scaling.ndim
    parts = [x[...] for x in (adapter.a, adapter.b, adapter.bias) if x is not None]
    used = [np.asarray(jnp.any(part != 0, axis=tuple(range(layers, part.ndim)))) for part in parts]
    return np.any(used, axis=0) if layers else np.ones((), bool)


def _scaling(adapter: LoRA, layer: int | None) -> float:
    return float(np.asarray(adapter.scaling[...])[() if layer is None else layer])


def _shape(adapter: LoRA, part: str, target: Entry) -> tuple[int, ...]:
    rank, (out, *inner) = adapter.a.shape[-1], target.shape
    return {
        "lora_A.weight": (rank, *inner),
        "lora_B.weight": (out, rank, *[1] * (len(inner) - 1)),
        "lora_B.bias": (out,),
    }[part]


def _value(adapter: LoRA, part: str, target: Entry, dtype: np.dtype) -> np.ndarray:
    """A part of an adapter in the file's layout."""
    if part == "lora_A.weight":
        return fetch(adapter.a[...], target.layer, target.layout, dtype)
    if part == "lora_B.weight":
        return fetch(adapter.b[...], target.layer, "linear", dtype).reshape(_shape(adapter, part, target))
    assert adapter.bias is not None
    bias = fetch(adapter.bias[...], target.layer, "same", np.dtype(np.float32))
    return (bias / _scaling(adapter, target.layer)).astype(dtype)  # PEFT scales it like the rest


def _peft_config(found: dict[str, tuple[Entry, LoRA]]) -> dict[str, Any]:
    """The settings that PEFT needs, under diffusers' keys."""
    ranks = {module: adapter.a.shape[-1] for module, (_, adapter) in found.items()}
    alphas = {m: _scaling(adapter, target.layer) * ranks[m] for m, (target, adapter) in found.items()}
    rank, alpha = (Counter(x.values()).most_common(1)[0][0] for x in (ranks, alphas))
    config = {
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {f"^{re.escape(m)}": r for m, r in ranks.items() if r != rank},
        "alpha_pattern": {f"^{re.escape(m)}": a for m, a in alphas.items() if a != alpha},
        "target_modules": sorted(found),
        "lora_bias": any(adapter.bias is not None for _, adapter in found.values()),
    }
    return {f"transformer.{key}": value for key, value in config.items()}
