"""Phases of the GPU report that measure the model: each is a process, and adds its rows to a file as they are known.

    python -m helios_jax.benchmarks.gpu_phases blocks --size 14b --rows rows.jsonl

Weights are random, of the sizes of `throughput_model`. `gpu_report` runs them one after the other.
"""

import dataclasses
import itertools
import math
import re
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from helios_jax.benchmarks import throughput, throughput_flops
from helios_jax.benchmarks.throughput_model import SIZES, Size, fill, make
from helios_jax.benchmarks.throughput_reference import Reference
from helios_jax.benchmarks.throughput_report import facts, peak_gib
from helios_jax.diffusion.memory import MemoryConfig
from helios_jax.diffusion.pyramid import level_shapes
from helios_jax.messages import one_line
from helios_jax.models.layers import Shapes
from helios_jax.models.ops.choices import DEVICE, Attention, Implementations, Norms
from helios_jax.models.transformer import Transformer
from helios_jax.models.transformer.block import Block
from helios_jax.models.transformer.packing import Packing
from helios_jax.models.vae import AutoencoderKLWan
from helios_jax.runtime.aot import memory
from helios_jax.runtime.command import Tool
from helios_jax.runtime.compilation import compiler_options, compute_dtype, enable_cache
from helios_jax.sampling.frames import decode
from pallas_kernels.tools.tunable import add_line

Say = Callable[..., None]
CHUNKS = 8
REFERENCE_CHUNKS = 3
KERNELS = 40  # kernels that a profile lists
CALLS = 20  # blocks that are queued at a time
ROUNDS = 5  # in which blocks are timed in turn
TEXT = 512  # tokens


def machine(size: Size, say: Say) -> None:
    """Device and versions; the measured rates of products and of copies."""
    say(what="device", **facts(), platform=jax.default_backend(), memory_gib=_memory_gib())
    cpu = jax.default_backend() == "cpu"
    for dtype in (jnp.bfloat16, jnp.float32):
        with jax.default_matmul_precision("highest" if dtype == jnp.float32 else None):
            edge = 1024 if cpu else 8192 if dtype == jnp.bfloat16 else 4096
            rate = throughput_flops.matmul_rate(edge, dtype, throughput.best)
        say(what=f"product of {edge} x {edge} matrices, {jnp.dtype(dtype).name}", tflop_per_s=rate / 1e12)
    x = jnp.zeros(2**24 if cpu else 2**30, jnp.uint8)
    copy = jax.jit(lambda x: x + jnp.uint8(1))
    say(what=f"copy of {x.size >> 20} MiB", gb_per_s=2 * x.size / throughput.best(lambda: copy(x)) / 1e9)


def _memory_gib() -> float | None:
    limit = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
    return None if limit is None else limit / 2**30


def blocks(size: Size, say: Say) -> None:
    """A block of the transformer at each level of the pyramid, by each pair of attention and norms.

    Blocks are queued one after the other, as in a pass: a block's time is a pass's divided by the number of blocks.
    """
    config, dtype = size.transformer, compute_dtype()
    block = fill(Transformer.abstract(dataclasses.replace(config, num_layers=1)), dtype, 0).blocks[0]
    pt, ph, pw = config.patch_size
    h, w = size.height // 8 // ph, size.width // 8 // pw

    history = MemoryConfig().num_tokens(size.height // 8, size.width // 8, config.patch_size)
    heads, head_dim = config.num_attention_heads, config.attention_head_dim
    draw = partial(_normal, dtype=dtype)
    text = (draw(1, TEXT, heads, head_dim), draw(1, TEXT, heads, head_dim))
    levels = []
    for shape in reversed(level_shapes((9 // pt, h, w), 3)):
        noisy = math.prod(shape)
        packing = Packing(history, (noisy,)).padded()
        tokens = packing.num_tokens + packing.padding
        angles = _normal(1, tokens, head_dim // 2, dtype=jnp.float32)
        time_rows = _normal(1, 2, 6, config.dim, dtype=jnp.float32)
        levels.append((noisy, tokens, packing, (time_rows, (jnp.cos(angles), jnp.sin(angles)), text)))
    expected: dict[int, np.ndarray] = {}  # by noisy tokens: the output of the first pair that ran
    # First each pair is timed once: a kernel that hangs ends the phase, and the rows before it are written already.
    steps = {}
    for pair, (noisy, tokens, packing, rest) in itertools.product(_pairs(), levels):
        # A model's last block returns no history. A block that does is the difference of models of two blocks and one.
        one, two = (
            throughput_flops.transformer_pass(dataclasses.replace(config, num_layers=n), noisy, history, TEXT)
            for n in (1, 2)
        )
        x, row = draw(1, tokens, config.dim), {"attention": pair[0], "norms": pair[1], "noisy": noisy, "tokens": tokens}
        try:
            step = _compiled_block(block, x, rest, packing, Implementations(*pair))
            out = np.asarray(step(block, jnp.copy(x), *rest), np.float32)
        except Exception as error:  # a pair that cannot run gets a row with the reason
            say(**row, why=one_line(f"{type(error).__name__}: {error}"))
            continue
        first = expected.setdefault(noisy, out)
        row["from_first_pair"] = float(np.linalg.norm(out - first) / np.linalg.norm(first))
        row["temporaries_gib"] = memory(step).temporaries / 2**30
        run = partial(_seconds_of_block, step, block, x, rest)
        steps[pair, noisy] = run, row, (two - one) / 1e12
        _say_block(say, row, run(), (two - one) / 1e12, config.num_layers)
    # Then the pairs are timed in turn, since a warm GPU is slower: these rows replace the earlier ones.
    for _, noisy_rows in itertools.groupby(sorted(steps, key=lambda key: -key[1]), key=lambda key: key[1]):
        keys = list(noisy_rows)
        taken = [[steps[key][0]() for key in keys] for _ in range(ROUNDS)]
        for key, seconds in zip(keys, np.median(taken, axis=0)):
            _, row, tflop = steps[key]
            _say_block(say, row | {"in_turn": True}, float(seconds), tflop, config.num_layers)


def _say_block(say: Say, row: dict[str, Any], seconds: float, tflop: float, layers: int) -> None:
    say(**row, seconds=seconds, pass_s=layers * seconds, tflop_per_s=tflop / seconds)


def _pairs() -> Iterator[tuple[Attention, Norms]]:
    names: dict[str, tuple[Attention, ...]] = {"cpu": ("xla",), "gpu": ("cudnn", "pallas"), "tpu": ("xla", "pallas")}
    kinds: tuple[Norms, ...] = ("xla",) if jax.default_backend() == "cpu" else ("xla", "pallas")
    for attention in names[jax.default_backend()]:
        for norms in kinds:
            yield attention, norms


def _compiled_block(
    block: Block, x: jax.Array, rest: tuple[Any, ...], packing: Packing, implementations: Implementations
) -> Any:
    def run(block: Block, x: jax.Array, time: Any, table: Any, text: Any) -> jax.Array:
        return block(x, time, table, text, packing, implementations=implementations)

    jitted = jax.jit(run, donate_argnums=1, compiler_options=compiler_options() or None)
    return jitted.lower(block, x, *rest).compile()


def _seconds_of_block(step: Any, block: Block, x: jax.Array, rest: tuple[Any, ...]) -> float:
    """Seconds of a block, averaged over CALLS that are queued one after the other."""
    y = jnp.copy(x).block_until_ready()
    begin = time.perf_counter()
    for _ in range(CALLS):
        y = step(block, y, *rest)
    y.block_until_ready()
    return (time.perf_counter() - begin) / CALLS


def vae(size: Size, say: Say) -> None:
    """Decoding of a chunk in bfloat16 and float32, and how far the frames are apart."""
    half = fill(AutoencoderKLWan(size.vae, rngs=Shapes()), jnp.bfloat16, 1)
    latents = _normal(1, 9, size.height // 8, size.width // 8, size.vae.z_dim, dtype=jnp.float32)
    frames = {}
    for dtype in (jnp.bfloat16, jnp.float32):
        model = jax.tree.map(lambda x, dtype=dtype: x.astype(dtype), half)
        name, begin = jnp.dtype(dtype).name, time.perf_counter()
        frames[name] = np.asarray(decode(model, latents, dtype="float32"))
        first = time.perf_counter() - begin
        seconds = throughput.best(lambda model=model: decode(model, latents, dtype="float32"))
        row = {"what": f"decode {frames[name].shape[1]} frames, {name}", "seconds": seconds, "first_call_s": first}
        if len(frames) == 2:
            error = np.mean(np.square(frames["bfloat16"] - frames["float32"], dtype=np.float64))
            row["psnr_of_bfloat16_db"] = float(-10 * np.log10(max(error, 1e-20)))
        say(**row, peak_gib=peak_gib())


def end_to_end(size: Size, say: Say, implementations: Implementations) -> None:
    """Whole videos of `CHUNKS` chunks: seconds a chunk and frames a second; the passes that they are made of."""
    pipe = make(size, compute_dtype(), stacked=jax.default_backend() == "tpu", implementations=implementations)
    ours = throughput.Ours(pipe, size, CHUNKS)
    for steps in throughput.STEPS:
        name = "+".join(map(str, steps))
        first = ours.arrivals(steps, 1)[-1]
        say(what=f"first call, {name}", seconds=first, peak_gib=peak_gib())
        times = ours.arrivals(steps, CHUNKS)
        say(what=f"{CHUNKS} chunks, {name}", **_pace(times, ours.frames), peak_gib=peak_gib())
    for key, call in ours.parts().items():
        throughput.seconds(call())
        say(what=key, seconds=min(throughput.seconds(call()) for _ in range(3)))


def profile(size: Size, say: Say, implementations: Implementations) -> None:
    """The kernels in which three chunks of 1+1+1 steps spend their time: seconds and calls, the longest first.

    A profiler's trace of a video of three chunks.
    """
    pipe = make(size, compute_dtype(), stacked=jax.default_backend() == "tpu", implementations=implementations)
    ours = throughput.Ours(pipe, size, CHUNKS)
    ours.arrivals(throughput.STEPS[0], 1)
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            times = ours.arrivals(throughput.STEPS[0], 3)
        (path,) = Path(folder).rglob("*.xplane.pb")
        total: defaultdict[str, float] = defaultdict(float)
        calls: Counter[str] = Counter()
        for name, seconds in device_events(path):
            total[name] += seconds
            calls[name] += 1
    if not total:
        say(what="all kernels", why="the profiler's trace names no kernels of this kind of device")
        return
    say(what="all kernels", seconds=sum(total.values()), calls=sum(calls.values()), wall_s=times[-1], chunks=3)
    for name in sorted(total, key=lambda name: -total[name])[:KERNELS]:
        say(what=name, seconds=total[name], calls=calls[name])


def device_events(path: Path) -> Iterator[tuple[str, float]]:
    """Name and seconds of each kernel and copy in a profiler's trace; the numbers that XLA appends are left out."""
    for plane in jax.profiler.ProfileData.from_file(str(path)).planes:
        if not plane.name.startswith("/device:"):
            continue
        for line in plane.lines:
            if not line.name.startswith("Stream"):  # the other lines repeat the kernels, by module and by operation
                continue
            for event in line.events:
                yield re.sub(r"[_.]\d+", "", event.name), event.duration_ns / 1e9


def _pace(times: list[float], frames: int) -> dict[str, Any]:
    """Speeds from the times at which chunks arrived: `seconds_a_chunk` is the median between two.

    The first chunk is later by the text encoder's time. The last one is earlier, as no next chunk is in work beside it.
    """
    a_chunk = float(np.median(np.diff(times)))
    return {
        "seconds": times[-1],
        "seconds_to_first_chunk": times[0],
        "seconds_a_chunk": a_chunk,
        "frames_per_s": frames / a_chunk,
        "frames_per_s_in_all": frames * len(times) / times[-1],
    }


def reference(size: Size, say: Say, implementations: Implementations, *, compiled: bool = False) -> None:
    """diffusers' pipeline with the same weights, and the error of ours; `compiled`: only times with torch.compile."""
    pipe = make(size, compute_dtype(), stacked=False, implementations=implementations)
    theirs = Reference(pipe, size)
    say(what="versions", **theirs.versions)
    if compiled:
        theirs.compile()
    for steps in throughput.STEPS:
        name = "+".join(map(str, steps))
        say(what=f"first call, {name}", seconds=theirs.run(steps, 1))
        one, all_chunks = theirs.run(steps, 1), theirs.run(steps, REFERENCE_CHUNKS)
        a_chunk = (all_chunks - one) / (REFERENCE_CHUNKS - 1)
        say(
            what=f"{REFERENCE_CHUNKS} chunks, {name}",
            seconds=all_chunks,
            seconds_a_chunk=a_chunk,
            frames_per_s=33 / a_chunk,
            frames_per_s_in_all=33 * REFERENCE_CHUNKS / all_chunks,
            torch_peak_gib=None if (peak := theirs.peak_bytes()) is None else peak / 2**30,
        )
        if not compiled and steps == throughput.STEPS[0]:
            for key, seconds in theirs.parts(steps).items():
                say(what=key, seconds=seconds)
    if not compiled:
        for key, value in throughput.Ours(pipe, size, 1).agreement(theirs).items():
            say(what=f"norm(ours - diffusers) / norm(diffusers), {key}", error=value)


def _normal(*sizes: int, dtype: Any) -> jax.Array:
    return jax.random.normal(jax.random.key(len(sizes)), sizes, dtype)


PHASES = ("machine", "blocks", "end_to_end", "profile", "reference", "vae", "reference_compiled")
CHOSEN = ("end_to_end", "profile", "reference")  # phases that use the attention and norms that were the fastest


def _words(names: tuple[str, ...]) -> str:
    return f"{', '.join(names[:-1])} and {names[-1]}"


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    parser = Tool(prog="python -m helios_jax.benchmarks.gpu_phases", description="Measure one phase.")
    parser.add_argument("phase", choices=PHASES)
    parser.add_argument("--size", choices=SIZES, required=True)
    parser.add_argument("--rows", type=Path, required=True, help="rows are added to this file, as JSON lines")
    parser.add_argument("--attention", choices=("xla", "cudnn", "pallas"), help=f"of {_words(CHOSEN)}")
    parser.add_argument("--norms", choices=("xla", "pallas"), help=f"of {_words(CHOSEN)}")
    args = parser.parse_args(argv)
    implementations = Implementations(args.attention, args.norms)
    if implementations != DEVICE and args.phase not in CHOSEN:
        parser.error(f"--attention and --norms are of {_words(CHOSEN)}: leave them out of {args.phase}")
    enable_cache()
    begin, size = time.monotonic(), SIZES[args.size]

    def say(**row: Any) -> None:
        add_line(args.rows, {"phase": args.phase, **row, "at_s": round(time.monotonic() - begin, 2)})
        shown = (f"{key} {value:.4g}" if isinstance(value, float) else f"{value}" for key, value in row.items())
        print(f"{args.phase}: {', '.join(shown)}", flush=True)

    if args.phase == "end_to_end":
        end_to_end(size, say, implementations)
    elif args.phase == "profile":
        profile(size, say, implementations)
    elif args.phase.startswith("reference"):
        try:
            reference(size, say, implementations, compiled=args.phase == "reference_compiled")
        except ModuleNotFoundError as error:
            say(what="no comparison", why=str(error))
    else:
        {"machine": machine, "blocks": blocks, "vae": vae}[args.phase](size, say)
    return 0


if __name__ == "__main__":
    sys.exit(main())
