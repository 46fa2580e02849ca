"""The filter of trained parameters, from the names in a run's config."""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from helios_jax.config import ConfigError, require
from helios_jax.lora import FrozenLoRAWeight, LoRAWeight
from helios_jax.pretrained import dtype_of

ALL, ADAPTERS = "all", "adapters"

# An nnx filter: (path, variable) -> whether it is trained.
Filter = Callable[[tuple[Any, ...], Any], bool]


@dataclass
class AdapterConfig:
    """Low-rank adapters to be trained, A gaussian and B zero at first; `trainable` must name "adapters".

    `target_modules` are diffusers' names, or ends of names, of the layers that get one: by default every linear layer,
    as upstream. `alpha` null is the rank.
    """

    rank: int = 128
    alpha: float | None = None
    target_modules: tuple[str, ...] = (
        "to_q",
        "to_k",
        "to_v",
        "to_out.0",
        "ffn.net.0.proj",
        "ffn.net.2",
        "linear_1",
        "linear_2",
        "time_proj",
        "proj_out",
    )

    def __post_init__(self):
        require(self.rank > 0, f"rank must be at least 1, got {self.rank}")
        require(bool(self.target_modules), "target_modules must name a layer, as in [to_q, to_v]")
        alpha = self.alpha
        require(
            alpha is None or (math.isfinite(alpha) and alpha > 0),
            f"alpha must be a positive number, or null for the rank, got {alpha}",
        )


def trainable(names: Sequence[str]) -> Filter:
    """The filter for `names`: "all", "adapters" (`helios_jax.lora`), or regular expressions of parameters and modules.

    A name is the dotted path, without numbers of layers, of a parameter or of a module that holds it: `patch_short`,
    `blocks\\.attn1`, `patch_(short|mid|long)\\.weight`.
    """
    patterns = [re.compile(rf"(?:{name})(\..*)?") for name in names if name not in (ALL, ADAPTERS)]

    def is_trained(path: tuple[Any, ...], variable: Any) -> bool:
        if isinstance(variable, FrozenLoRAWeight):
            return False
        if isinstance(variable, LoRAWeight):
            return ALL in names or ADAPTERS in names
        if not isinstance(variable, nnx.Param):
            return False
        return ALL in names or any(pattern.fullmatch(dotted(path)) for pattern in patterns)

    return is_trained


def dotted(path: tuple[Any, ...]) -> str:
    """A parameter's name without the numbers of layers."""
    return ".".join(str(part) for part in path if not isinstance(part, int))


def check(model: nnx.Module, names: Sequence[str]) -> None:
    """Raises ConfigError, in one line, for one of `names` that trains nothing in the (abstract) `model`."""
    for name in names:
        found, _ = nnx.state(model, trainable([name]), ...)
        if jax.tree.leaves(found):
            continue
        if name == ADAPTERS:
            raise ConfigError("trainable: adapters, but the run makes none; give lora.rank, or name parameters")
        modules = sorted({dotted(path[:1]) for path, _ in nnx.to_flat_state(nnx.state(model, nnx.Param))})
        raise ConfigError(f"trainable: no parameter is named {name!r}; names begin with {', '.join(modules)}")


def settle_dtypes(model: nnx.Module, names: Sequence[str], frozen_dtype: Any) -> nnx.Module:
    """Casts trained parameters to float32 and frozen ones to `frozen_dtype`, but for those always kept in float32."""
    graph, trained, frozen, rest = nnx.split(model, trainable(names), nnx.Param, ...)
    trained = jax.tree.map(lambda x: x.astype(jnp.float32), trained)
    flat = [
        (path, variable.replace(variable.get_value().astype(dtype_of(model, path, frozen_dtype))))
        for path, variable in nnx.to_flat_state(frozen)
    ]
    return nnx.merge(graph, trained, nnx.from_flat_state(flat), rest)
