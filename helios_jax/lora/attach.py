"""Attaches adapters to a model: from files, or new ones for training."""

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from helios_jax.lora.adapters import (
    LoRA,
    LoRAWeight,
    Model,
    check_names,
    copy,
    like,
    module_at,
    names,
    set_adapters,
    targets,
)
from helios_jax.lora.files import Change, LoRAFile, check_scale, matches, read
from helios_jax.pretrained import CheckpointError, Entry
from helios_jax.pretrained.layout import from_file, some


@dataclass(frozen=True)
class LoRAConfig:
    """A new adapter, in PEFT's names. `alpha` None is the rank, which makes the scaling 1.

    `target_modules`: "all-linear" for every linear layer, a regular expression for whole names, or a list of names and
    ends of names, as in ("to_q", "ffn.net.2", "patch_embedding"); the names are diffusers'. `init` is the distribution
    of A: "kaiming" (PEFT's default) or "gaussian" with deviation 1 / rank (as Helios was trained). B starts at zero.
    """

    rank: int = 128
    alpha: float | None = None
    target_modules: str | Sequence[str] = "all-linear"
    exclude_modules: str | Sequence[str] = ()
    init: Literal["kaiming", "gaussian"] = "kaiming"
    name: str = "default"

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"rank is {self.rank}: it must be at least 1")
        if self.alpha is not None and not (math.isfinite(self.alpha) and self.alpha > 0):
            raise ValueError(f"alpha is {self.alpha}: it must be a positive number, or null for the rank")
        if self.init not in ("kaiming", "gaussian"):
            raise ValueError(f"init is {self.init!r}, not 'kaiming' or 'gaussian'")


def attach(
    model: Model,
    adapters: Mapping[str, LoRAFile | str | Path],
    scales: Mapping[str, float] | None = None,
    *,
    dtype: Any = None,
    empty: bool = False,
) -> Model:
    """`model` with the adapters of files beside its weights, under the names of the mapping; their effects add.

    Args:
        model: it may have adapters of other names already.
        adapters: files, or what `read` takes.
        scales: the strength of each adapter, 1 unless given.
        dtype: the adapters' dtype; None is that of each layer's weight.
        empty: fills adapters with zeros, for a model of which only shapes matter; the call can then be traced.

    Raises:
        CheckpointError: a file does not fit the model; one line names the modules.
        ValueError: a name is taken already, a scale's name is none of the adapters', or a scale is not finite.
    """
    scales = scales or {}
    check_names(scales, adapters)
    for name, scale in scales.items():
        check_scale(scale, f"adapter {name}")
    loaded = {name: file if isinstance(file, LoRAFile) else read(file) for name, file in adapters.items()}
    check(model, loaded)
    model, layers = copy(model), targets(model)
    for name, file in loaded.items():
        groups: dict[Any, list[tuple[Entry, Change]]] = {}
        if not empty:
            _warn_of_the_rest(file, layers)
        for module, change in _taken(file, layers).items():
            groups.setdefault(layers[module].path, []).append((layers[module], change))
        for path, group in groups.items():
            module = module_at(model, path)
            adapter = _from_files(name, module, group, scales.get(name, 1.0), dtype, empty)
            set_adapters(module, [*(module.adapters or ()), adapter])
    return model


def check(model: nnx.Module, adapters: Mapping[str, LoRAFile]) -> None:
    """Raises the errors of `attach`, also for an abstract `model`, before weights are loaded."""
    if taken := [name for name in names(model) if name in adapters]:
        raise ValueError(f"adapter {', '.join(taken)} is attached already: choose another name, or remove it first")
    layers = targets(model)
    for file in adapters.values():
        changes = _taken(file, layers)
        if unknown := changes.keys() - layers.keys():
            raise CheckpointError(f"{file.source} has LoRA weights for {some(unknown)}: no layers of this model")
        wrong = []
        for name, change in changes.items():
            out, *inner = layers[name].shape
            expected = {"down": [change.rank, *inner], "up": [out, change.rank, *[1] * (len(inner) - 1)]}
            expected |= {"diff": [out, *inner], "bias": [out], "diff_b": [out]}
            for part, shape in expected.items():
                tensor = getattr(change, part)
                if tensor is not None and list(tensor.shape) != shape:
                    wrong.append(f"{name} ({part} is {list(tensor.shape)}, not {shape})")
        if wrong:
            raise CheckpointError(f"{file.source} does not fit this model: {some(wrong)}")


def _taken(file: LoRAFile, layers: Mapping[str, Entry]) -> dict[str, Change]:
    """The changes of `file`, without the differences of norms and modulation that only Wan files have."""
    relevant = {n: c for n, c in file.changes.items() if n in layers or c.rank or c.bias is not None}
    return {n: c for n, c in relevant.items() if any(x is not None for x in (c.down, c.bias, c.diff, c.diff_b))}


def _warn_of_the_rest(file: LoRAFile, layers: Mapping[str, Entry]) -> None:
    """Warns of changes that are ignored. Zeros, which most files have there, give no warning."""
    taken = _taken(file, layers)
    left = {n: (c.diff_m,) if n in taken else (c.diff, c.diff_b, c.diff_m) for n, c in file.changes.items()}
    nonzero = [n for n, parts in left.items() if any(x is not None and x.read().any() for x in parts)]
    if nonzero:
        warnings.warn(f"{file.source}: ignored what it changes in {some(nonzero)}, as diffusers does", stacklevel=3)


def _from_files(
    name: str, module: Any, group: list[tuple[Entry, Change]], weight: float, dtype: Any, empty: bool
) -> LoRA:
    """The adapter of one layer, or of all layers of a stack, some of which may have none."""
    base = module.weight
    dtype = np.dtype(base.dtype if dtype is None else dtype)
    stack = base.shape[: base.ndim - len(base.axes)]
    *inner, out = base.shape[len(stack) :]
    rank = max(change.rank or (out if change.diff is not None else 1) for _, change in group)
    has_bias = any(change.bias is not None or change.diff_b is not None for _, change in group)
    shapes, scaling = ((*stack, *inner, rank), (*stack, rank, out), (*stack, out)), np.ones(stack, np.float32)
    if empty:
        a, b, bias = (jnp.zeros(shape, dtype) for shape in shapes)
        return _adapter(name, module, a, b, bias if has_bias else None, scaling, weight)
    a, b, bias = (np.zeros(shape, kind) for shape, kind in zip(shapes, (dtype, dtype, np.float32)))
    for target, change in group:
        layer = () if target.layer is None else (target.layer,)
        down, up, r = change.down, change.up, change.rank
        if down is not None and up is not None:
            a[(*layer, ..., slice(r))] = from_file(down.read(dtype=dtype), target.layout, (*inner, r))
            b[(*layer, slice(r))] = up.read(dtype=dtype).reshape(out, r).T
            scaling[layer] = change.scaling
        elif change.diff is not None:  # the whole difference as A, and the identity as B
            a[(*layer, ..., slice(out))] = from_file(change.diff.read(dtype=dtype), target.layout, (*inner, out))
            b[(*layer, slice(out))] = np.eye(out, dtype=dtype)
        if change.bias is not None:
            bias[layer] += change.scaling * change.bias.read(dtype=np.float32)
        if change.diff_b is not None:
            bias[layer] += change.diff_b.read(dtype=np.float32)
    return _adapter(name, module, a, b, bias.astype(dtype) if has_bias else None, scaling, weight)


def _adapter(name: str, module: Any, a: Any, b: Any, bias: Any, scaling: np.ndarray, weight: float) -> LoRA:
    """An adapter whose arrays are placed and split as the layer's weight is, and whole along the rank.

    The axes that they name split the rank too, in training, where each device keeps its part of the optimiser's state.
    """
    *inner, out = module.weight.axes
    base, last = module.weight[...], len(module.weight.shape) - 1
    first = last - len(inner)
    return LoRA(
        name,
        LoRAWeight(like(base, a, (*range(first, last), None)), axes=(*inner, "rank")),
        LoRAWeight(like(base, b, (None, last)), axes=("rank", out)),
        None if bias is None else LoRAWeight(like(base, bias, (last,)), axes=(out,)),
        like(base, scaling, ()),
        like(base, np.full(scaling.shape, weight, np.float32), ()),
    )


def add(model: Model, config: LoRAConfig, key: jax.Array, *, dtype: Any = jnp.float32) -> Model:
    """`model` with a new adapter for training: A random, B zero, so that outputs do not change yet. Can be traced.

    The values are the same for stacked and listed blocks. Raises ValueError if the name is taken or `target_modules`
    match no layer.
    """
    if config.name in names(model):
        raise ValueError(f"adapter {config.name} is attached already: choose another name, or remove it first")
    model, layers = copy(model), targets(model)
    chosen = {n: layer for n, layer in layers.items() if _chosen(n, layer, config)}
    if not chosen:
        raise ValueError(f"target_modules {config.target_modules!r} fit no layer; there is {some(layers)}")
    groups: dict[Any, dict[int | None, jax.Array]] = {}
    for name, own in zip(sorted(chosen), jax.random.split(key, len(chosen))):
        groups.setdefault(chosen[name].path, {})[chosen[name].layer] = own
    for path, keys in groups.items():
        module = module_at(model, path)
        set_adapters(module, [*(module.adapters or ()), _new(module, config, keys, dtype)])
    return model


def _chosen(name: str, layer: Entry, config: LoRAConfig) -> bool:
    wanted = config.target_modules
    chosen = layer.layout == "linear" if wanted == "all-linear" else matches(name, wanted)
    return chosen and not matches(name, config.exclude_modules)


def _new(module: Any, config: LoRAConfig, keys: Mapping[int | None, jax.Array], dtype: Any) -> LoRA:
    """The adapter of one layer, or of all layers of a stack; layers without a key get zeros that stay zero."""
    base, rank = module.weight, config.rank
    stack = base.shape[: base.ndim - len(base.axes)]
    *inner, out = base.shape[len(stack) :]

    def draw(key: jax.Array) -> jax.Array:
        if config.init == "gaussian":
            return jax.random.normal(key, (*inner, rank), dtype) / rank
        bound = math.prod(inner) ** -0.5  # kaiming_uniform with a = sqrt(5)
        return jax.random.uniform(key, (*inner, rank), dtype, -bound, bound)

    a = jax.vmap(draw)(jnp.stack(list(keys.values())))
    layers: Any = list(keys)
    a = jnp.zeros((*stack, *inner, rank), dtype).at[jnp.asarray(layers)].set(a) if stack else a[0]
    scaling = np.ones(stack, np.float32)
    scaling[layers if stack else ()] = (config.alpha or rank) / rank
    return _adapter(config.name, module, a, jnp.zeros((*stack, rank, out), dtype), None, scaling, 1.0)
