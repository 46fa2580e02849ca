"""LoRA adapters: read from diffusers, PEFT and Wan files, attached, merged, trained and saved.

```python
model = lora.attach(model, {"style": "style.safetensors", "fast": "owner/repository"}, {"style": 0.8})
model = lora.set_scale(model, "style", 0.5)  # no recompilation
model = lora.merge(model)  # the same model without adapters, its weights changed

model = lora.add(model, LoRAConfig(rank=128), key)  # trained as nnx.state(model, LoRAWeight)
lora.save(model, "folder")  # diffusers' pipe.load_lora_weights("folder") reads it
```
Every function returns a new model and leaves its argument unchanged.
"""

from helios_jax.lora import adapters
from helios_jax.lora.adapters import FrozenLoRAWeight, LoRA, LoRAScale, LoRAWeight, freeze, names, remove, set_scale
from helios_jax.lora.attach import LoRAConfig, add, attach, check
from helios_jax.lora.files import LoRAFile, file_and_scale, from_arrays, read
from helios_jax.lora.merge import merge, unmerge
from helios_jax.lora.save import save

__all__ = [
    "FrozenLoRAWeight",
    "LoRA",
    "LoRAConfig",
    "LoRAFile",
    "LoRAScale",
    "LoRAWeight",
    "adapters",
    "add",
    "attach",
    "check",
    "file_and_scale",
    "freeze",
    "from_arrays",
    "merge",
    "names",
    "read",
    "remove",
    "save",
    "set_scale",
    "unmerge",
]
