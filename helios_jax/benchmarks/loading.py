"""Measures loading: the peak of host memory and the speed, through the very code of `pretrained.load_model`.

    python -m helios_jax.benchmarks.loading                   # 14B in bfloat16, 28.6 GB of zeros that take no disk
    python -m helios_jax.benchmarks.loading --folder FOLDER   # the transformer of a real checkpoint

Each tensor is dropped when it has reached its device, so that a machine smaller than the model can measure. On a CPU
the device's memory is the host's, and its share is in the peak.
"""

import resource
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from helios_jax.models.transformer import Transformer, TransformerConfig
from helios_jax.pretrained import files, load, read_config, save, write_config
from helios_jax.runtime.command import Tool


@dataclass(frozen=True)
class Measured:
    """Bytes and seconds of one pass over a folder; `peak` is the process's peak memory above its baseline.

    `cpu_seconds` are summed over all threads: the cost of loading where other work shares the cores.
    """

    peak: int
    largest: int
    total: int
    tensors: int
    seconds: float
    cpu_seconds: float


def write_sparse(folder: Path, config: TransformerConfig) -> None:
    """Writes a transformer of zeros, in bfloat16 and `save_model`'s layout, as sparse files that take no space."""
    write_config(config, folder)
    shards = save.plan_shards(Transformer.abstract(config), config, dtype=jnp.bfloat16, max_shard_size="5GB")
    for name, tensors in shards.items():
        with (folder / name).open("wb") as file:
            size = files.write_header(file, tensors, {"format": "pt"})
            file.truncate(file.tell() + size)
    save.write_index(folder, config, shards)


def measure(folder: Path, model: nnx.Module, dtype: Any = None) -> Measured:
    """Reads every tensor of `folder` to its place in `model`'s sharding, and drops it there."""
    stored = files.read_headers(folder)
    sizes = [tensor.dtype.itemsize * int(np.prod(tensor.shape)) for tensor in stored.values()]
    jax.block_until_ready(jnp.zeros(1))  # the device's own memory belongs to the baseline
    baseline, begin, cpu = memory("VmRSS"), time.perf_counter(), time.process_time()
    for _, _, array in load.stream(model, stored, dtype=dtype, source=str(folder)):
        array.delete()
    seconds, cpu_seconds = time.perf_counter() - begin, time.process_time() - cpu
    return Measured(memory("VmHWM") - baseline, max(sizes), sum(sizes), len(sizes), seconds, cpu_seconds)


def memory(what: str) -> int:
    """Resident bytes of this process, now (VmRSS) or at most (VmHWM); other systems than Linux tell the latter only."""
    if sys.platform == "linux":
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(what))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def main(argv: list[str]) -> None:
    """Run the command line."""
    parser = Tool(description="Measure the loading of a transformer.")
    parser.add_argument("--folder", type=Path, help="a transformer's folder; by default the 14B's, made of zeros")
    parser.add_argument("--layers", type=int, default=40, help="blocks of the model that is made")
    parser.add_argument("--stacked", action="store_true", help="load into stacked blocks")
    parser.add_argument("--dtype", default="bfloat16", help="what the model runs in")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        if args.folder is None:
            write_sparse(folder, TransformerConfig(num_layers=args.layers))
        config = read_config(folder, TransformerConfig)
        measured = measure(folder, Transformer.abstract(config, stacked=args.stacked), jnp.dtype(args.dtype))
    print(f"tensors: {measured.tensors}, {measured.total / 1e9:.2f} GB")
    print(f"largest tensor: {measured.largest / 1e9:.3f} GB")
    print(f"peak host memory over the baseline: {measured.peak / 1e9:.3f} GB")
    print(f"seconds: {measured.seconds:.2f}")
    print(f"CPU seconds: {measured.cpu_seconds:.2f}")
    gigabytes = measured.total / 1e9
    print(f"GB/s: {gigabytes / measured.seconds:.2f}, and {gigabytes / measured.cpu_seconds:.2f} a core")


if __name__ == "__main__":
    main(sys.argv[1:])
