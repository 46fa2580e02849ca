"""Low-rank adapters beside a model's weights: their variables, places, names and scales.

A model is never changed: each function returns a new one, which shares the unchanged parts. Adapters are variables of
their own kind, so statements about `nnx.Param` (counts, files of the base model) exclude them.
"""

from collections.abc import Collection, Iterable, Iterator
from dataclasses import replace
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.core import Tracer
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array

from helios_jax.lora.files import check_scale
from helios_jax.models.layers import LINEAR, Product
from helios_jax.pretrained import Entry, file_entries
from helios_jax.pretrained.load import place

Model = TypeVar("Model", bound=nnx.Module)
Path = tuple[Any, ...]


class LoRAWeight(nnx.Variable):
    """A trained matrix or bias of an adapter."""


class FrozenLoRAWeight(LoRAWeight):
    """An adapter weight that stays constant while others are trained (`freeze`)."""


class LoRAScale(nnx.Variable):
    """A factor of an adapter, which is not trained."""


class LoRA(nnx.Module):
    """`weight * (scaling * (x a) b + bias)`: `scaling` is alpha / rank, `weight` the strength of the adapter.

    `a` has the layout of the layer's weight, [*kernel, in, rank], and `b` is [rank, out]. All parts of a stacked
    layer's adapter have its leading layer dimension.
    """

    def __init__(self, name: str, a: LoRAWeight, b: LoRAWeight, bias: LoRAWeight | None, scaling: Any, weight: Any):
        self.name = name
        self.a, self.b, self.bias = a, b, bias
        self.scaling, self.weight = LoRAScale(scaling, axes=()), LoRAScale(weight, axes=())

    def __call__(self, x: Array, first: Product = jnp.matmul, second: Product = jnp.matmul) -> Array:
        """Computes what is added to the layer's output for `x`; `first` is the product with `a`, `second` with `b`."""
        a, b = self.a[...].astype(x.dtype), self.b[...].astype(x.dtype)
        scale = self.scaling[...] * self.weight[...]
        low = checkpoint_name(first(x, a.reshape(-1, a.shape[-1])), LINEAR).astype(jnp.float32) * scale
        y = second(low.astype(x.dtype), b)
        if self.bias is not None:
            bias = (self.weight[...] * self.bias[...].astype(jnp.float32)).astype(x.dtype)
            y = y + (bias if y.shape[-1] == bias.size else bias.reshape(y.shape[-2:]))  # or split into heads
        return y


def targets(model: nnx.Module) -> dict[str, Entry]:
    """Maps diffusers' module names to the layers of `model` that can have adapters.

    An entry describes the layer's weight in a file; its path is that of the layer's module.
    """
    found = {}
    for key, entry in file_entries(model).items():
        if entry.path[-1] == "weight" and hasattr(module_at(model, entry.path[:-1]), "adapters"):
            found[key.removesuffix(".weight")] = replace(entry, path=entry.path[:-1])
    return found


def module_at(model: nnx.Module, path: Path) -> Any:
    """The part of `model` at `path`."""
    module: Any = model
    for name in path:
        module = module[name] if isinstance(name, int) else getattr(module, name)
    return module


def adapted(model: nnx.Module) -> Iterator[tuple[Path, Any]]:
    """The layers of `model` that have adapters."""
    for path in dict.fromkeys(target.path for target in targets(model).values()):
        if (module := module_at(model, path)).adapters is not None:
            yield path, module


def names(model: nnx.Module) -> list[str]:
    """The names of the adapters of `model`, in the order of attaching."""
    return list(dict.fromkeys(adapter.name for _, module in adapted(model) for adapter in module.adapters))


def check_names(asked: Iterable[str], known: Collection[str]) -> None:
    """Raises ValueError for a name that is not `known`."""
    if unknown := [name for name in asked if name not in known]:
        raise ValueError(f"no adapter {', '.join(unknown)}; there is {', '.join(known) or 'none'}")


def copy(model: Model) -> Model:
    """A new model of the same arrays, whose parts can be replaced."""
    return nnx.merge(*nnx.split(model))


def set_adapters(module: Any, adapters: Iterable[LoRA]) -> None:
    """Puts `adapters` on a layer; None if there are none."""
    adapters = list(adapters)
    # Static as in a new layer, so that two models without adapters have the same tree.
    module.adapters = nnx.data(nnx.List(adapters)) if adapters else nnx.static(None)


def set_scale(model: Model, name: str, scale: float) -> Model:
    """`model` with the adapter `name` at strength `scale` (1: as trained), without recompilation.

    Results that were computed before, such as the keys and values of a text, keep the old scale. Raises ValueError for
    an unknown name, and for a scale that is not finite.
    """
    check_scale(scale, f"adapter {name}")
    check_names([name], names(model))
    model = copy(model)
    for _, module in adapted(model):
        for adapter in module.adapters:
            if adapter.name == name:
                old = adapter.weight[...]
                adapter.weight = LoRAScale(like(module.weight[...], np.full(old.shape, scale, np.float32), ()), axes=())
    return model


def remove(model: Model, name: str | None = None) -> Model:
    """`model` without the adapter `name`, or without all adapters. Raises ValueError for an unknown name."""
    if name is not None:
        check_names([name], names(model))
    model = copy(model)
    for _, module in list(adapted(model)):
        set_adapters(module, [a for a in module.adapters if name is not None and a.name != name])
    return model


def freeze(model: Model, name: str) -> Model:
    """`model` with the adapter `name` excluded from training. Raises ValueError for an unknown name."""
    return set_kind(model, name, FrozenLoRAWeight)


def set_kind(model: Model, name: str, kind: type[LoRAWeight]) -> Model:
    """`model` with the variables of the adapter `name` in another class. Raises ValueError for an unknown name."""
    check_names([name], names(model))
    model = copy(model)
    for _, module in adapted(model):
        for adapter in module.adapters:
            if adapter.name == name:
                for part in ("a", "b", "bias"):
                    if (old := getattr(adapter, part)) is not None:
                        setattr(adapter, part, kind(old[...], axes=old.axes))
    return model


def like(weight: Any, values: Any, axes: tuple[int | None, ...]) -> jax.Array:
    """`values` on the devices of a layer's `weight`; their last dimensions are split as its dimensions `axes` are.

    The dimensions before are a stack's layers and are not split. If the weight is traced, the placement is traced too.
    """
    sharding = None if isinstance(weight, Tracer) else weight.sharding
    if isinstance(sharding, NamedSharding):
        spec = (*sharding.spec, *[None] * (weight.ndim - len(sharding.spec)))
        split = [None if axis is None else spec[axis] for axis in axes]
        sharding = NamedSharding(sharding.mesh, PartitionSpec(*[None] * (values.ndim - len(axes)), *split))
        return place(values, sharding) if isinstance(values, np.ndarray) else jax.device_put(values, sharding)
    return jnp.asarray(values)
