"""Files that stand in for adapters which no run has written yet: their shapes, without values."""

import json
import math
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

from helios_jax.locations import location
from helios_jax.lora.adapters import targets
from helios_jax.lora.files import matches
from helios_jax.models.transformer import Transformer, TransformerConfig
from helios_jax.training.trainable import AdapterConfig


def existing(text: str, sizes: TransformerConfig, adapters: AdapterConfig | None) -> str:
    """`text`, a LoRA's file or folder; where it is not there yet, a stand-in of the rank and layers of a run's own."""
    if adapters is None or location(text).exists():
        return text
    return _stand_in(sizes, adapters.rank, tuple(adapters.target_modules))


@cache
def _stand_in(sizes: TransformerConfig, rank: int, modules: tuple[str, ...]) -> str:
    """A safetensors file with a header and a sparse body, which takes up no disk space."""
    header: dict[str, Any] = {}
    end = 0
    for module, target in targets(Transformer.abstract(sizes, stacked=True)).items():
        if not matches(module, modules):
            continue
        out, *inner = target.shape
        for part, shape in {"A": (rank, *inner), "B": (out, rank, *[1] * (len(inner) - 1))}.items():
            begin, end = end, end + 2 * math.prod(shape)
            header[f"{module}.lora_{part}.weight"] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    path = Path(tempfile.mkstemp(".safetensors", dir=_folder().name)[1])
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return str(path)


@cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    """A folder that lasts as long as the process."""
    return tempfile.TemporaryDirectory()
