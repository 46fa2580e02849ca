"""A run of sample.py: check everything, load once, make each video chunk by chunk, write and report."""

import importlib.metadata
import platform
import resource
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing, nullcontext
from functools import partial
from typing import Any

import jax

from helios_jax import lora
from helios_jax.config import ConfigError
from helios_jax.locations import location
from helios_jax.media.writers import ThreadedWriter, Writer, open_writer, remove_frames, sidecar, write_sidecar
from helios_jax.models.transformer import Transformer
from helios_jax.runtime import interrupts
from helios_jax.sampling import outputs
from helios_jax.sampling.checkpoint import Checkpoint
from helios_jax.sampling.context import Context, read_context
from helios_jax.sampling.fingerprint import file_hash
from helios_jax.sampling.jobs import Job, make_jobs
from helios_jax.sampling.options import SampleConfig
from helios_jax.sampling.pipeline import HeliosPipeline, check_identity, compute_dtype, identity_of
from helios_jax.sampling.plan import Plan, chunk_frames, make_plan
from helios_jax.sampling.progress import RunProgress
from helios_jax.sampling.prompts import make_schedule
from helios_jax.sampling.resume import Rest, check_gap, later_switches, missing, rest_of
from helios_jax.sampling.stream import Snapshot, Stream, read_state

PACKAGES = ("helios_jax", "jax", "flax", "numpy")


def run(config: SampleConfig) -> int:
    """Makes every video of a config; returns sample.py's exit code.

    Raises ValueError, in one line and before weights are read, for a run that is not possible.
    """
    begin = time.monotonic()
    checkpoint = Checkpoint.open(config.model, transformer=config.transformer)
    files, scales = {}, {}
    for i, text in enumerate(config.loras):
        name, scales[str(i)] = lora.file_and_scale(text)
        files[str(i)] = lora.read(name)
    lora.check(Transformer.abstract(checkpoint.transformer), files)
    checkpoint = checkpoint.with_loras({name: files[str(i)].metadata for i, name in enumerate(config.loras)})
    hashes: dict[str, Any] = {"weights": checkpoint.hash()}
    if files:
        hashes["loras"] = [f"{file_hash(location(file.source))}={scales[i]}" for i, file in files.items()]
    jobs = make_jobs(config, chunk_frames(config, checkpoint.vae, checkpoint.variant), hashes)
    todo = [job for job in jobs if config.csv is None or not job.done()]
    if config.csv is not None:
        print(f"{len(jobs)} videos, {len(jobs) - len(todo)} of them done before", flush=True)
        if not todo:
            return 0
    parts = checkpoint.transformer, checkpoint.vae, checkpoint.scheduler, checkpoint.variant
    plans = [make_plan(*parts, job.config.options()) for job in todo]
    rests = [rest_of(job, plan) for job, plan in zip(todo, plans)]
    if all(rest is not None and rest.finished for rest in rests):
        print(f"nothing left to make: {config.resume} is after the last chunk, ask for more num_frames", flush=True)
        return 0
    for job, plan, rest in zip(todo, plans, rests):
        _check(job, plan, rest, checkpoint, alone=config.csv is None)
    # A CSV's video is claimed when its turn comes.
    claims = ExitStack()
    for job in todo if config.csv is None else ():
        if not claims.enter_context(outputs.claim(job.out)):
            claims.close()
            raise ConfigError(f"out: {job.out} is being made by another run: wait for it, or name another file")
    with claims:
        return _make_all(config, checkpoint, list(zip(todo, plans, rests)), files, scales, begin)


def _make_all(
    config: SampleConfig,
    checkpoint: Checkpoint,
    todo: Sequence[tuple[Job, Plan, Rest | None]],
    files: Mapping[str, lora.LoRAFile],
    scales: Mapping[str, float],
    begin: float,
) -> int:
    """Loads the weights and makes the videos in turn; returns sample.py's exit code."""
    # The inputs of a CSV's row fail when its turn comes, and the other rows are made.
    alone = config.csv is None
    contexts = [_read_context(job, plan, checkpoint) if alone else None for job, plan, _ in todo]
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
    failed, others, shown = [], 0, RunProgress([plan.num_chunks for _, plan, _ in todo])
    for i, ((job, plan, rest), context) in enumerate(zip(todo, contexts)):
        shown.begin(i, job.name)
        try:
            with nullcontext(True) if alone else outputs.claim(job.out) as ours:
                if not ours or (not alone and job.done()):  # by another run, since this one began
                    others += 1
                    continue
                context = context if alone else _read_context(job, plan, checkpoint)
                with interrupts.deferred():
                    if make(pipe, job, plan, rest, context, shown, begin if i == 0 else time.monotonic()):
                        return interrupts.EXIT_CODE
        except (ValueError, OSError, FloatingPointError) as error:
            if alone:
                raise
            failed.append(f"{job.name}: {error}")
            print(f"failed: {failed[-1]}", file=sys.stderr, flush=True)
    if others:
        print(f"{others} of {len(todo)} videos are left to another run that makes them, or has made them", flush=True)
    if failed:
        print(f"{len(failed)} of {len(todo)} videos failed; the same command makes them again", file=sys.stderr)
    return 1 if failed else 0


def _check(job: Job, plan: Plan, rest: Rest | None, checkpoint: Checkpoint, *, alone: bool) -> None:
    """Raises ValueError for a video that cannot be made, or if it is `alone`, whose file cannot be written."""
    goes_on = rest is not None and rest.begins is not None
    outputs.check(job, goes_on=goes_on)
    config = job.config
    if config.profile is not None and plan.num_chunks is not None and plan.num_chunks < 2:
        least = plan.chunk_frames + 1
        raise ValueError(
            f"profile traces the second chunk, and num_frames {config.num_frames} has one: ask for {least}"
        )
    if config.resume is not None:
        identity = identity_of(checkpoint.variant, checkpoint.transformer, compute_dtype(config.precision))
        check_identity(config.resume, read_state(config.resume), identity)
    else:
        make_schedule([config.prompt], config.switches, config, plan.chunk_frames)
    if goes_on or (alone and not job.out.is_dir()):
        writer = _open(job, rest)
        writer.close()
        if rest is not None:
            check_gap(job.out, rest, writer.frames, plan)


def _open(job: Job, rest: Rest | None) -> Writer:
    config = job.config
    return open_writer(job.out, config.fps, config.height, config.width, 0 if rest is None else rest.keep)


def _read_context(job: Job, plan: Plan, checkpoint: Checkpoint) -> Context:
    config = job.config
    return None if config.resume else read_context(config.image, config.video, 1, plan, checkpoint.vae)


def make(
    pipe: HeliosPipeline,
    job: Job,
    plan: Plan,
    rest: Rest | None,
    context: Context,
    shown: RunProgress,
    begin: float,
) -> bool:
    """One video, its figures and its sidecar; returns whether it was interrupted."""
    config = job.config
    times: list[float] = []
    interrupted = False
    begins = 0 if rest is None else rest.chunk if rest.begins is None else rest.begins
    about = {"settings": job.settings(), "inputs": job.inputs}
    if rest is None or rest.begins is None:
        remove_frames(job.out)
    with (
        shown,
        ExitStack() as trace,
        closing(ThreadedWriter(_open(job, rest))) as writer,
    ):
        # A run that is killed leaves it, so that the next one knows whose file it is.
        write_sidecar(job.out, {**about, "first_chunk": begins, "complete": False})
        kept, first = writer.frames, begins if rest is None else rest.chunk
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
            stream.about, first = about, stream.chunk
            if rest is not None and kept < rest.keep:
                interrupts.keep()
                writer.write(missing(stream, rest, kept, plan))
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
    figures = _figures(begin, times, writer.frames - kept)
    for name, value in figures.items():
        print(f"{name}: {value}")
    seconds = f", {writer.frames / config.fps:.1f} s" if writer.takes == "np" else ""
    kind = "frames" if writer.takes == "np" else "latent frames"
    print(f"video: {writer.path} ({writer.frames} {kind}{seconds})")
    if config.profile is not None and times:
        print(f"profile: {config.profile}" if len(times) > 1 else "profile: none, no second chunk was made")
    held = first + len(times) - begins
    if interrupted:
        print(f"interrupted: {writer.path} holds the {held} of {plan.num_chunks} chunks that were done")
    if not writer.frames:
        sidecar(job.out).unlink()
    else:
        counts = {"frames": writer.frames, "first_chunk": begins, "chunks": held}
        facts = {"resumed_from": config.resume, "complete": not interrupted, **counts, "figures": figures}
        write_sidecar(job.out, {**about, **facts, **_machine()})
    return interrupted


def _start(
    pipe: HeliosPipeline, config: SampleConfig, plan: Plan, context: Context, output_type: str, progress: Any
) -> Stream:
    if config.resume is not None:
        switches = later_switches(config, plan, read_state(config.resume).chunk)
        return pipe.resume(config.resume, plan=plan, switches=switches, output_type=output_type, progress=progress)
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


def _machine() -> dict[str, Any]:
    """The device and the versions of a run, for the sidecar."""
    return {
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
