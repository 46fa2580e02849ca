"""A run of sample.py: check everything, load once, make each video chunk by chunk, write and report."""

import importlib.metadata
import platform
import resource
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack, closing
from functools import partial
from typing import Any

import jax

from helios_jax import lora
from helios_jax.media.writers import ThreadedWriter, open_writer, sidecar, write_sidecar
from helios_jax.models.transformer import Transformer
from helios_jax.runtime import interrupts
from helios_jax.sampling import outputs
from helios_jax.sampling.checkpoint import Checkpoint
from helios_jax.sampling.context import Context, read_context
from helios_jax.sampling.fingerprint import weights_hash
from helios_jax.sampling.jobs import Job, make_jobs
from helios_jax.sampling.options import SampleConfig
from helios_jax.sampling.pipeline import HeliosPipeline
from helios_jax.sampling.plan import Plan, chunk_frames, make_plan
from helios_jax.sampling.progress import RunProgress
from helios_jax.sampling.prompts import make_schedule
from helios_jax.sampling.stream import Snapshot, Stream, read_state

PACKAGES = ("helios_jax", "jax", "flax", "numpy")


def run(config: SampleConfig) -> int:
    """Makes every video of a config; returns sample.py's exit code.

    Raises ValueError, in one line and before weights are read, for a run that is not possible.
    """
    begin = time.monotonic()
    checkpoint = Checkpoint.open(config.model, transformer=config.transformer)
    jobs = make_jobs(config, chunk_frames(config, checkpoint.vae))
    todo = [job for job in jobs if config.csv is None or not job.done()]
    if config.csv is not None:
        print(f"{len(jobs)} videos, {len(jobs) - len(todo)} of them done before", flush=True)
        if not todo:
            return 0
    parts = checkpoint.transformer, checkpoint.vae, checkpoint.scheduler, checkpoint.variant
    plans = [make_plan(*parts, job.config.options()) for job in todo]
    for job, plan in zip(todo, plans):
        _check(job, plan, alone=config.csv is None)
    # The inputs of a CSV's row fail when its turn comes, and the other rows are made.
    contexts = [_read_context(job, plan, checkpoint) if config.csv is None else None for job, plan in zip(todo, plans)]
    files, scales = {}, {}
    for i, text in enumerate(config.loras):
        name, scales[str(i)] = lora.file_and_scale(text)
        files[str(i)] = lora.read(name)
    lora.check(Transformer.abstract(checkpoint.transformer), files)

    pipe = HeliosPipeline.from_pretrained(
        checkpoint,
        dtype=config.precision,
        offload_text_encoder=config.offload_text_encoder,
        attention=config.attention,
        norms=config.norms,
    )
    if files:
        pipe.transformer = lora.merge(lora.attach(pipe.transformer, files, scales), donate=True)
    print(f"loading: {time.monotonic() - begin:.2f} s", flush=True)
    failed, shown = [], RunProgress([plan.num_chunks for plan in plans])
    for i, (job, plan, context) in enumerate(zip(todo, plans, contexts)):
        shown.begin(i, job.name)
        try:
            context = _read_context(job, plan, checkpoint) if config.csv is not None else context
            with interrupts.deferred():
                if make(pipe, job, plan, context, checkpoint, shown, begin if i == 0 else time.monotonic()):
                    return interrupts.EXIT_CODE
        except (ValueError, OSError, FloatingPointError) as error:
            if config.csv is None:
                raise
            failed.append(f"{job.name}: {error}")
            print(f"failed: {failed[-1]}", file=sys.stderr, flush=True)
    if failed:
        print(f"{len(failed)} of {len(todo)} videos failed; the same command makes them again", file=sys.stderr)
    return 1 if failed else 0


def _check(job: Job, plan: Plan, *, alone: bool) -> None:
    """Raises ValueError for a video that cannot be made, or if it is `alone`, whose file cannot be written."""
    outputs.check(job)
    config = job.config
    if config.profile is not None and plan.num_chunks is not None and plan.num_chunks < 2:
        least = plan.chunk_frames + 1
        raise ValueError(
            f"profile traces the second chunk, and num_frames {config.num_frames} has one: ask for {least}"
        )
    if config.resume is not None:
        read_state(config.resume)  # before the weights are read
    else:
        make_schedule([config.prompt], config.switches, config, plan.chunk_frames)
    if alone and not job.out.is_dir():
        open_writer(job.out, config.fps, config.height, config.width).close()


def _read_context(job: Job, plan: Plan, checkpoint: Checkpoint) -> Context:
    config = job.config
    return None if config.resume else read_context(config.image, config.video, 1, plan, checkpoint.vae)


def make(
    pipe: HeliosPipeline,
    job: Job,
    plan: Plan,
    context: Context,
    checkpoint: Checkpoint,
    shown: RunProgress,
    begin: float,
) -> bool:
    """One video, its figures and its sidecar; returns whether it was interrupted."""
    config = job.config
    times: list[float] = []
    interrupted = False
    outputs.clear(job.out)
    with (
        shown,
        ExitStack() as trace,
        closing(ThreadedWriter(open_writer(job.out, config.fps, config.height, config.width))) as writer,
    ):
        # A run that is killed leaves it, so that the next one knows whose file it is.
        write_sidecar(job.out, {"settings": job.settings(), "complete": False})
        first = 0
        shown.start(plan)

        def progress(chunk: int, step: int) -> None:
            shown.step(step, plan.num_steps(chunk))

        def written(chunk: int, state: Snapshot | None) -> None:
            """After a chunk is in the file: the state on disk is never ahead of the frames."""
            times.append(time.monotonic())
            if config.state is not None and state is not None:
                state.save(config.state)
            shown.chunk(chunk, plan.num_chunks, writer.frames)

        try:
            # A bar waits for every step, which costs a little; without one nothing does. A trace needs it, too: of a
            # chunk that was queued before the trace began it would show nothing.
            wait = config.profile is not None or shown.live
            stream = _start(pipe, config, plan, context, writer.takes, progress if wait else None)
            first = stream.chunk
            for made, out in enumerate(stream, 1):
                state = None if config.state is None else stream.snapshot()
                interrupts.keep()
                writer.write(out[0], partial(written, stream.chunk, state))
                if config.profile is not None and made == 1:
                    trace.enter_context(jax.profiler.trace(config.profile))
                elif made == 2:
                    trace.close()
            writer.close()
        except KeyboardInterrupt:
            interrupted = True
    figures = _figures(begin, times, writer.frames)
    for name, value in figures.items():
        print(f"{name}: {value}")
    seconds = f", {writer.frames / config.fps:.1f} s" if writer.takes == "np" else ""
    kind = "frames" if writer.takes == "np" else "latent frames"
    print(f"video: {writer.path} ({writer.frames} {kind}{seconds})")
    if config.profile is not None and times:
        print(f"profile: {config.profile}" if len(times) > 1 else "profile: none, no second chunk was made")
    if interrupted:
        print(f"interrupted: {writer.path} holds the {len(times)} of {plan.num_chunks} chunks that were done")
    if not times:
        sidecar(job.out).unlink()
    else:
        write_sidecar(job.out, _facts(job, checkpoint, figures, writer.frames, first, len(times), not interrupted))
    return interrupted


def _start(
    pipe: HeliosPipeline, config: SampleConfig, plan: Plan, context: Context, output_type: str, progress: Any
) -> Stream:
    if config.resume is not None:
        return pipe.resume(config.resume, plan=plan, output_type=output_type, progress=progress)
    call = pipe.prepare(
        config.prompt, config.negative_prompt, plan, context=context, switches=config.switches, seed=config.seed
    )
    return pipe.start(call, output_type, progress)


def _figures(begin: float, times: Sequence[float], frames: int) -> dict[str, str]:
    """Figures of a run. The first chunk includes compilation; the seconds a chunk leave it out."""
    figures = {}
    if times:
        figures["time to first chunk"] = f"{times[0] - begin:.2f} s"
    if len(times) > 1:
        seconds = (times[-1] - times[0]) / (len(times) - 1)
        figures["seconds a chunk"] = f"{seconds:.2f} s"
        warm, overall = frames / len(times) / seconds, frames / (times[-1] - begin)
        figures["frames/s"] = f"{warm:.1f} warm, {overall:.1f} in all"
    figures["peak host memory"] = f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB"
    device = jax.local_devices()[0]
    if (stats := device.memory_stats()) and "peak_bytes_in_use" in stats:
        figures["peak device memory"] = f"{stats['peak_bytes_in_use'] / 2**30:.2f} GiB"
    return figures


def _facts(
    job: Job, checkpoint: Checkpoint, figures: dict[str, str], frames: int, first: int, chunks: int, complete: bool
) -> dict[str, Any]:
    """The contents of a video's sidecar."""
    return {
        "settings": job.settings(),
        "resumed_from": job.config.resume,
        "complete": complete,
        "frames": frames,
        "first_chunk": first,
        "chunks": chunks,
        "figures": figures,
        "weights_hash": weights_hash(
            checkpoint.folder / part for part in (job.config.transformer, "vae", "text_encoder")
        ),
        "device": jax.local_devices()[0].device_kind,
        "versions": {"python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in PACKAGES if _installed(name)},
    }


def _installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
