"""Measures the sampler, part by part and end to end, beside diffusers' pipeline with the same random weights.

    python -m helios_jax.benchmarks.throughput               # 14B on a GPU or TPU, a small model on a CPU
    python -m helios_jax.benchmarks.throughput --size tiny   # is the benchmark itself in order?

Prints a table and writes JSON and Markdown (docs/results/benchmarks/README.md explains them). It needs no weights and
downloads nothing. Both sides run in one process, in turn; without torch and diffusers only ours is measured, and the
report says so. Rounds end when `--budget` seconds are spent. The compilation cache is off: first calls compile.
"""

import os
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from helios_jax.benchmarks import throughput_flops as flops
from helios_jax.benchmarks.throughput_model import PROMPT, SIZES, Size, make
from helios_jax.benchmarks.throughput_reference import Reference
from helios_jax.benchmarks.throughput_report import Comparison, facts, peak_gib, table, write
from helios_jax.diffusion import solvers
from helios_jax.diffusion.memory import window
from helios_jax.diffusion.pyramid import level_shapes
from helios_jax.models.ops.choices import DEVICE, Implementations
from helios_jax.models.transformer.block import check_implementations
from helios_jax.models.vae import denormalize
from helios_jax.runtime.command import Tool
from helios_jax.runtime.flops import traced
from helios_jax.sampling import sampler
from helios_jax.sampling.options import SamplingOptions
from helios_jax.sampling.pipeline import HeliosPipeline, decode

STEPS = ([1, 1, 1], [2, 2, 2])


class Ours:
    """Our side of the comparison: the calls that are timed, and their operations."""

    def __init__(self, pipe: HeliosPipeline, size: Size, chunks: int):
        self.pipe, self.size, self.chunks = pipe, size, chunks
        options = SamplingOptions(height=size.height, width=size.width, pyramid_num_inference_steps_list=[1, 1, 1])
        self.plan = pipe.plan(options)
        self.call = pipe.prepare(PROMPT, None, self.plan)
        self.frames = self.plan.frames.first
        self.text = pipe.encode_prompt([PROMPT])
        self.conditioning = self.call.conditioning(self.call.texts.kv(self.call.prompts.mixture(0)))
        self.sizes = level_shapes(self.plan.latent_shape, len(self.plan.levels))
        self.latents = [self._normal(i, shape) for i, shape in enumerate(self.sizes)]

    @staticmethod
    def _normal(seed: int, shape: tuple[int, ...]) -> jax.Array:
        return jax.random.normal(jax.random.key(seed), (1, *shape))

    def arrivals(self, steps: list[int], chunks: int) -> list[float]:
        """Seconds from the beginning of a call until each chunk's frames are on the host: text, denoising, VAE."""
        begin, times = time.perf_counter(), []
        for chunk in self.pipe.stream(
            PROMPT,
            height=self.size.height,
            width=self.size.width,
            num_frames=self.frames * chunks,
            pyramid_num_inference_steps_list=steps,
        ):
            assert chunk.shape[1] == self.frames
            times.append(time.perf_counter() - begin)
        return times

    def run(self, steps: list[int]) -> float:
        """Seconds of a whole call."""
        return self.arrivals(steps, self.chunks)[-1]

    def parts(self) -> dict[str, Callable[[], Callable[[], Any]]]:
        """By part, a function that sets up a call and returns it."""

        passes = {f"pass {h}": (lambda i=i: self._step(i)) for i, (_, h, _, _) in enumerate(self.sizes)}
        return {
            "text": lambda: lambda: self.pipe.encode_prompt([PROMPT]),
            **passes,
            "decode": lambda: lambda: decode(self.pipe.vae, self.latents[-1], dtype="uint8"),
        }

    def _step(self, i: int) -> Callable[[], Any]:
        """The first step of a level, set up."""
        level = self.plan.levels[i]
        # A step donates its state, so it gets a copy.
        state = jax.tree.map(jnp.copy, solvers.start(self.latents[i], level.steps))
        step, row = sampler.step_program.bind(self.pipe.transformer), sampler.split(level)[0]
        # By keyword, as the sampler calls it: jit would compile another program otherwise, for minutes.
        rest = {"history": self.call.history, "conditioning": self.conditioning, "memory": self.plan.memory}
        return lambda: step(state, row, **rest)

    def work(self) -> dict[str, float]:
        """TFLOP by part, and of the text's keys and values."""
        size, positions = self.size, self.text.shape[1]
        pt, ph, pw = size.transformer.patch_size
        _, h, w, _ = self.sizes[-1]
        history = self.plan.memory.num_tokens(h, w, (pt, ph, pw))
        found = {
            f"pass {h}": flops.transformer_pass(size.transformer, (t // pt) * (h // ph) * (w // pw), history, positions)
            for t, h, w, _ in self.sizes
        }
        found["text"] = flops.text_encoder(size.text_encoder, positions)
        found["text kv"] = flops.text_kv(size.transformer, positions)
        found["decode"] = traced(type(self.pipe.vae).decode, self.pipe.vae, self.latents[-1])
        return {name: value / 1e12 for name, value in found.items()}

    def agreement(self, reference: Reference) -> dict[str, float]:
        """norm(ours - reference) / norm(reference) of one full-size pass and of one decoding.

        Ours are the sampler's own programs: others would be compiled for this alone, minutes on a GPU.
        """
        parts, indices = window(self.plan.memory, self.call.history)
        latents, steps = self.latents[-1], self.plan.levels[-1].steps
        after = self._step(len(self.sizes) - 1)()
        velocity = (latents - after.predictions[0]) / steps.sigma[0]  # of the prediction, latents - sigma velocity
        if self.pipe.vae.post_quant_conv.weight.dtype == jnp.float32:
            frames = decode(self.pipe.vae, latents, dtype="float32")
        else:  # bfloat16's own error is larger than that of 8 bits
            frames = decode(self.pipe.vae, latents, dtype="uint8") / 255
        text, timestep = np.asarray(self.text, np.float32), float(steps.timestep[0])
        video = reference.decode(np.asarray(denormalize(latents, self.size.vae)))
        return {
            "velocity": _error(velocity, reference.velocity(np.asarray(latents), timestep, text, parts, indices)),
            "decode": _error(frames, np.clip(video / 2 + 0.5, 0, 1)),
        }


def _error(ours: Any, theirs: np.ndarray) -> float:
    return float(np.linalg.norm(np.asarray(ours, np.float32) - theirs) / np.linalg.norm(theirs))


def seconds(call: Callable[[], Any]) -> float:
    """Seconds of one call, until its result is ready."""
    begin = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - begin


def best(call: Callable[[], Any]) -> float:
    """The shortest of some calls, after one that compiles."""
    return min([seconds(call) for _ in range(6)][1:])


def measure(
    size_name: str,
    dtype: Any,
    repeats: int,
    budget: float,
    chunks: int | None,
    alone: bool,
    implementations: Implementations,
    save: Callable[[dict[str, Any]], Any] = lambda report: None,
) -> dict[str, Any]:
    """The report of a run (see docs/results/benchmarks/README.md). `save` gets it after each round."""
    begin = time.monotonic()

    def say(text: str) -> None:
        print(f"[{time.monotonic() - begin:4.0f} s] {text}", flush=True)

    def spent() -> bool:
        return time.monotonic() - begin > budget

    size, notes = SIZES[size_name], []
    check_implementations(implementations, size.transformer, dtype)
    chunks = chunks or size.chunks
    pipe = make(size, dtype, stacked=jax.default_backend() == "tpu", implementations=implementations)
    ours = Ours(pipe, size, chunks)
    rate = flops.matmul_rate(2048 if jax.default_backend() == "cpu" else 8192, dtype, best)
    say(f"weights made; products of {jnp.dtype(dtype).name} matrices: {rate / 1e12:.3g} TFLOP/s")

    cold = []
    for steps in STEPS:
        cold.append(ours.run(steps))
        say(f"ours, first call of {'+'.join(map(str, steps))}: {cold[-1]:.2f} s")
    peak = _peak()
    calls = ours.parts()
    for call in calls.values():
        seconds(call())  # compiles the parts that are not compiled yet

    reference = None
    if alone:
        notes.append("The reference was not asked for (--alone).")
    else:
        try:
            reference = Reference(ours.pipe, size)
        except (ModuleNotFoundError, ValueError) as error:
            notes.append(f"No comparison: {error}.")
            say(notes[-1])
    agreement = {}
    if reference is not None:
        agreement = ours.agreement(reference)
        say("norm(ours - reference) / norm(reference): " + ", ".join(f"{k} {v:.1e}" for k, v in agreement.items()))
        notes.append(_choose_threads(reference))
        say(notes[-1])
        reference.run(STEPS[0], 1)
    if implementations != DEVICE:
        asked = {name: value for name, value in vars(implementations).items() if value is not None}
        notes.append("As asked: " + ", ".join(f"{name} by {value}" for name, value in asked.items()) + ".")
    notes.append(f"Peak memory of our side before the reference was there: {peak}.")

    work = ours.work()
    names = {"text": "text encoder", "decode": f"VAE decode, {ours.frames} frames"}
    for t, h, w, _ in ours.sizes:
        names[f"pass {h}"] = f"transformer pass, latents {t} x {h} x {w}"
    parts = {key: Comparison(name, [], tflop=work[key]) for key, name in names.items()}
    whole = []
    for steps, first in zip(STEPS, cold):
        passes = sum(n * work[f"pass {shape[1]}"] for n, shape in zip(steps, ours.sizes))
        total = work["text"] + work["text kv"] + chunks * (passes + work["decode"])
        what = f"end to end, {'+'.join(map(str, steps))}, {ours.frames * chunks} frames"
        whole.append(Comparison(what, [], cold_s=first, tflop=total, frames=ours.frames * chunks))
    t, h, w, _ = ours.sizes[-1]

    def report() -> dict[str, Any]:
        later = []
        if reference is not None and (theirs := reference.peak_bytes()) is not None:
            later.append(f"Peak memory of torch, the shared weights not counted: {theirs / 2**30:.1f} GiB.")
        return {
            "command": "python -m helios_jax.benchmarks.throughput",
            "size": size_name,
            "setting": f"{jnp.dtype(dtype).name}, {size.height} x {size.width} pixels, latents {t} x {h} x {w} a chunk,"
            f" {chunks} chunk{'s' if chunks > 1 else ''} a call; the floor is {rate / 1e12:.3g} TFLOP/s, the measured"
            f" rate of large {jnp.dtype(dtype).name} products.",
            "machine": facts(),
            "dtype": jnp.dtype(dtype).name,
            "attention": implementations.attention,
            "norms": implementations.norms,
            "matmul_flop_per_s": rate,
            "peak_memory": peak,
            "agreement": agreement,
            "reference": None if reference is None else {"pipeline": "HeliosPyramidPipeline", **reference.versions},
            "comparisons": [comparison.facts(rate) for comparison in (*parts.values(), *whole)],
            "notes": [*notes, *later],
        }

    for turn in range(repeats):
        for key, call in calls.items():
            parts[key].ours_runs.append(seconds(call()))
        if reference is not None:
            for key, value in reference.parts(STEPS[0]).items():
                parts[key].reference_runs.append(value)
        for steps, comparison in zip(STEPS, whole):
            comparison.ours_runs.append(ours.run(steps))
            if reference is not None:
                comparison.reference_runs.append(reference.run(steps, chunks))
        say(f"round {turn + 1} of {repeats}")
        if spent() and turn + 1 < repeats:
            notes.append(f"{turn + 1} of {repeats} rounds: --budget was spent.")
            break
        save(report())
    return report()


def _choose_threads(reference: Reference) -> str:
    """Lets torch have the number of CPU threads that suits it: one is faster than all where cores are shared."""
    if reference.device != "cpu":
        return "The reference runs eagerly, on our weights in place."
    every = reference.threads()
    latents = np.zeros((1, 9, 24, 40, reference.size.vae.z_dim), np.float32)[:, :2]
    taken = {}
    for count in {1, every}:
        reference.threads(count)
        taken[count] = min(seconds(lambda: reference.decode(latents)) for _ in range(2))
    chosen = min(taken, key=lambda count: taken[count])
    reference.threads(chosen)
    return f"torch runs with {chosen} of {every} threads, the faster here; XLA with all cores."


def _peak() -> str:
    if jax.default_backend() == "cpu":
        return f"{peak_gib():.2f} GiB of host memory, the process's own"
    return f"{peak_gib():.1f} GiB of device memory"


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    parser = Tool(prog="python -m helios_jax.benchmarks.throughput", description="Time the sampler.")
    parser.add_argument("--size", choices=SIZES, help="by default 14b on an accelerator and small on a CPU")
    parser.add_argument("--precision", choices=("float32", "bfloat16"), help="by default float32 on CPU, else bfloat16")
    parser.add_argument("--attention", choices=("xla", "cudnn", "pallas"), help="by default the device's best")
    parser.add_argument("--norms", choices=("xla", "pallas"), help="by default the device's best")
    parser.add_argument("--repeats", type=int, default=3, help="rounds of ours and reference in turn")
    parser.add_argument("--chunks", type=int, help="chunks of 33 frames a call")
    parser.add_argument("--budget", type=float, default=450, help="seconds after which no further round begins")
    parser.add_argument("--alone", action="store_true", help="without the reference")
    parser.add_argument("--out", type=Path, default=Path("docs/results/benchmarks"), help="folder of the two files")
    args = parser.parse_args(argv)
    if args.repeats < 1 or (args.chunks is not None and args.chunks < 1):
        parser.error("--repeats and --chunks must be at least 1")
    # torch needs its part of the device's memory, too.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    cpu = jax.default_backend() == "cpu"
    dtype = jnp.dtype(args.precision or ("float32" if cpu else "bfloat16"))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*trained at.*")
        report = measure(
            args.size or ("small" if cpu else "14b"),
            dtype,
            args.repeats,
            args.budget,
            args.chunks,
            args.alone,
            Implementations(args.attention, args.norms),
            lambda report: write(report, args.out),
        )
    print("\n".join(["", *table(report), "", *report["notes"]]))
    for path in write(report, args.out):
        print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
