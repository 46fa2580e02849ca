"""Makes one video of a run, chunk by chunk: its file, its saved state, its figures and the facts beside it."""

import platform
import resource
import time
from collections.abc import Sequence
from contextlib import closing
from functools import partial
from typing import Any

import jax

from helios_jax.locations import location
from helios_jax.media.writers import ThreadedWriter, Writer, open_writer, remove_frames, sidecar, write_sidecar
from helios_jax.runtime import interrupts
from helios_jax.runtime.profile import Profile
from helios_jax.runtime.versions import versions
from helios_jax.sampling.context import Context
from helios_jax.sampling.jobs import Job
from helios_jax.sampling.options import SampleConfig
from helios_jax.sampling.pipeline import HeliosPipeline
from helios_jax.sampling.plan import Plan
from helios_jax.sampling.progress import RunProgress
from helios_jax.sampling.resume import Rest, later_switches, missing
from helios_jax.sampling.stream import Stream
from helios_jax.sampling.stream_state import Snapshot, read_state

PACKAGES = ("helios_jax", "jax", "flax", "numpy")


def open_file(job: Job, rest: Rest) -> Writer:
    """Opens the writer of a job's file, which keeps the frames before `rest`."""
    config = job.config
    return open_writer(job.out, config.fps, config.height, config.width, rest.keep)


def make(
    pipe: HeliosPipeline, job: Job, plan: Plan, rest: Rest, context: Context, shown: RunProgress, begin: float
) -> None:
    """Makes the `rest` of a video, prints its figures and writes its sidecar.

    `begin` is the time, by `time.monotonic`, from which the first chunk's figure counts. A video that is interrupted
    gets figures and a sidecar, too, before the KeyboardInterrupt is raised again.
    """
    about = {"settings": job.settings(), "inputs": job.inputs}
    times: list[float] = []  # when each chunk was in the file
    interrupted = None
    if not rest.in_its_file:
        remove_frames(job.out)
    with shown, closing(ThreadedWriter(open_file(job, rest))) as writer:
        # Written first: if this run is killed, the next one can tell from it which video the file holds.
        write_sidecar(job.out, {**about, "first_chunk": rest.begins, "complete": False})
        kept = writer.frames
        shown.start(plan)
        try:
            # Waiting for every step costs a little, so it is done for a bar or a profile only. A profile needs it: it
            # would not show the part of a chunk that was queued before.
            wait = job.config.profile is not None or shown.live
            progress = (lambda chunk, step: shown.step(step, plan.num_steps(chunk))) if wait else None
            stream = _start(pipe, job.config, plan, context, writer.takes, progress)
            stream.about = about
            if kept < rest.keep:
                interrupts.keep()
                writer.write(missing(stream, rest, kept, plan))
            _write(stream, writer, job.config, shown, times)
            writer.close()
        except KeyboardInterrupt as error:
            interrupted = error
    figures = _figures(begin, times, writer.frames - kept)
    for name, value in figures.items():
        print(f"{name}: {value}")
    seconds = f", {writer.frames / job.config.fps:.1f} s" if writer.takes == "np" else ""
    kind = "frames" if writer.takes == "np" else "latent frames"
    print(f"video: {writer.path} ({writer.frames} {kind}{seconds})")
    held = rest.chunk + len(times) - rest.begins
    if interrupted is not None:
        print(f"interrupted: {writer.path} holds the {held} of {plan.num_chunks} chunks that were done")
    if not writer.frames:
        sidecar(job.out).unlink()
    else:
        counts = {"frames": writer.frames, "first_chunk": rest.begins, "chunks": held}
        facts = {"resumed_from": job.config.resume, "complete": interrupted is None, **counts, "figures": figures}
        write_sidecar(job.out, {**about, **facts, **_machine()})
    if interrupted is not None:
        raise interrupted


def _start(
    pipe: HeliosPipeline, config: SampleConfig, plan: Plan, context: Context, output_type: str, progress: Any
) -> Stream:
    """Starts the stream of a video, or resumes it from the state that the config names."""
    if config.resume is not None:
        switches = later_switches(config, plan, read_state(config.resume).chunk)
        return pipe.resume(config.resume, plan=plan, switches=switches, output_type=output_type, progress=progress)
    call = pipe.prepare(
        config.prompt, config.negative_prompt, plan, context=context, switches=config.switches, seed=config.seed
    )
    return pipe.start(call, output_type, progress)


def _write(
    stream: Stream, writer: ThreadedWriter, config: SampleConfig, shown: RunProgress, times: list[float]
) -> None:
    """Writes the chunks of a stream and, after each, its state; appends to `times` when each was in the file."""

    def written(chunk: int, state: Snapshot | None) -> None:
        """Runs once a chunk is in the file, so that the state on disk is never ahead of the frames."""
        times.append(time.monotonic())
        if config.state is not None and state is not None:
            state.save(config.state)
        shown.chunk(chunk, stream.plan.num_chunks, writer.frames)

    folder = None if config.profile is None else location(config.profile)
    with closing(Profile(folder, 1, skipped=1, unit="chunk")) as profile:
        for out in stream:
            state = None if config.state is None else stream.snapshot()
            interrupts.keep()
            writer.write(out[0], partial(written, stream.chunk, state))
            profile.after_step(out)


def _figures(begin: float, times: Sequence[float], frames: int) -> dict[str, str]:
    """Figures of a run, by name. The seconds a chunk leave the first chunk out, which includes compilation."""
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
        "versions": {"python": platform.python_version()} | versions(PACKAGES),
    }
