"""Merges adapters into a model's weights, and removes them again."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jaxtyping import Array, Float

from helios_jax.lora.adapters import LoRA, Model, adapted, check_names, copy, names, set_adapters
from helios_jax.lora.attach import attach
from helios_jax.lora.files import LoRAFile
from helios_jax.pretrained import CheckpointError


def merge(model: Model, name: str | None = None, *, donate: bool = False) -> Model:
    """`model` with the adapter `name`, or all, added to its weights at their present scales, and taken off.

    Changes are added in float32 and rounded once to the weights' dtype. `donate` uses the memory of the old weights for
    the new ones: two copies of a large model may not fit, but the argument cannot be used any more.

    Raises:
        ValueError: no adapter has this name.
        CheckpointError: an adapter has a bias for a layer that has none.
    """
    if name is not None:
        check_names([name], names(model))
    model = copy(model)
    for path, module in list(adapted(model)):
        chosen = tuple(a for a in module.adapters if name is None or a.name == name)
        if not chosen:
            continue
        bias = None if module.bias is None else module.bias[...]
        if bias is None and any(a.bias is not None for a in chosen):
            raise CheckpointError(
                f"the adapter of {'.'.join(map(str, path))} has a bias, the layer has none to add it to"
            )
        weight = module.weight[...]
        placed = None
        if isinstance(weight.sharding, NamedSharding):
            placed = (weight.sharding, None if bias is None else bias.sharding)
        add = jax.jit(_merged, static_argnums=3, donate_argnums=(0, 1) if donate else (), out_shardings=placed)
        weight, bias = add(weight, bias, chosen, weight.ndim > len(module.weight.axes))
        module.weight = module.weight.replace(weight)
        if module.bias is not None:
            module.bias = module.bias.replace(bias)
        set_adapters(module, [a for a in module.adapters if name is not None and a.name != name])
    return model


def unmerge(
    model: Model,
    adapters: Mapping[str, LoRAFile | str | Path],
    scales: Mapping[str, float] | None = None,
    *,
    donate: bool = False,
) -> Model:
    """The inverse of attaching `adapters` at `scales` and merging them.

    Up to rounding: each of the two steps rounds a weight once, so it comes back within one unit in the last place of
    the larger of itself and its merged value (relative 2^-23 in float32, 2^-8 in bfloat16).
    """
    if attached := names(model):
        raise ValueError(f"adapter {', '.join(attached)} is attached: merge it or remove it first")
    scales = scales or {}
    check_names(scales, adapters)
    return merge(attach(model, adapters, {name: -scales.get(name, 1.0) for name in adapters}), donate=donate)


def _merged(weight: jax.Array, bias: Any, adapters: tuple[LoRA, ...], stacked: bool) -> tuple[jax.Array, Any]:
    """Weight and bias with the changes of `adapters`; a stack's layers in turn, to need little memory."""

    def layer(parts: Any) -> tuple[jax.Array, Any]:
        weight, bias, adapters = parts
        changed = weight.astype(jnp.float32) + sum(_change(a, weight.shape) for a in adapters)
        if bias is not None:
            biases = [a.weight[...] * a.bias[...].astype(jnp.float32) for a in adapters if a.bias is not None]
            bias = (bias.astype(jnp.float32) + sum(biases)).astype(bias.dtype)
        return changed.astype(weight.dtype), bias

    return jax.lax.map(layer, (weight, bias, adapters)) if stacked else layer((weight, bias, adapters))


def _change(adapter: LoRA, shape: tuple[int, ...]) -> Float[Array, "..."]:
    """An adapter's change of a weight of `shape`, in float32."""
    a, b = (x[...].astype(jnp.float32) for x in (adapter.a, adapter.b))
    product = jnp.matmul(a.reshape(-1, a.shape[-1]), b, precision=jax.lax.Precision.HIGHEST)
    return adapter.scaling[...] * adapter.weight[...] * product.reshape(shape)
