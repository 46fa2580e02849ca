"""A run of sample.py: check everything, load once, make each video."""

import itertools
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any

from helios_jax import lora
from helios_jax.config import ConfigError
from helios_jax.locations import location
from helios_jax.models.transformer import Transformer
from helios_jax.runtime import interrupts, many
from helios_jax.runtime.compilation import compute_dtype, enable_cache
from helios_jax.runtime.memory import use_gpus_whole
from helios_jax.sampling import outputs
from helios_jax.sampling.checkpoint import Checkpoint
from helios_jax.sampling.context import Context, read_context
from helios_jax.sampling.download import is_url
from helios_jax.sampling.fingerprint import file_hash
from helios_jax.sampling.jobs import Job, make_jobs
from helios_jax.sampling.one_video import make, open_file
from helios_jax.sampling.options import SampleConfig, refuse_unused
from helios_jax.sampling.pipeline import HeliosPipeline, check_identity, identity_of
from helios_jax.sampling.plan import Plan, frames_of_chunks, make_plan
from helios_jax.sampling.progress import RunProgress
from helios_jax.sampling.prompts import make_schedule
from helios_jax.sampling.resume import NEW, Rest, check_gap, rest_of
from helios_jax.sampling.stream_state import read_state

NOTHING: Mapping[str, str] = MappingProxyType({})


@dataclass(frozen=True)
class Weights:
    """The files of a run's checkpoint and of its LoRAs (by their number), checked but not read."""

    checkpoint: Checkpoint
    loras: Mapping[str, lora.LoRAFile]
    scales: Mapping[str, float]

    @classmethod
    def open(cls, config: SampleConfig) -> "Weights":
        """Finds the weights that a config names. Raises ValueError if files are missing or do not fit."""
        checkpoint = Checkpoint.open(config.model, transformer=config.transformer)
        files, scales = {}, {}
        for i, text in enumerate(config.loras):
            name, scales[str(i)] = lora.file_and_scale(text)
            files[str(i)] = lora.read(name)
        lora.check(Transformer.abstract(checkpoint.transformer), files)
        checkpoint = checkpoint.with_loras({name: files[str(i)].metadata for i, name in enumerate(config.loras)})
        return cls(checkpoint, files, scales)

    def hashes(self) -> dict[str, Any]:
        """Hashes of the files, by name, for `Job.weights`."""
        hashes: dict[str, Any] = {"weights": self.checkpoint.hash()}
        if self.loras:
            files = self.loras.items()
            hashes["loras"] = [f"{file_hash(location(file.source))}={self.scales[i]}" for i, file in files]
        return hashes

    def plan(self, job: Job) -> Plan:
        """The plan of a video. Raises ValueError, which names it, for an option that does not fit."""
        parts = self.checkpoint
        return make_plan(parts.transformer, parts.vae, parts.scheduler, parts.variant, job.config.options())

    def load(self, config: SampleConfig) -> HeliosPipeline:
        """The pipeline, with the LoRAs merged in."""
        begin = time.monotonic()
        pipe = HeliosPipeline.from_pretrained(
            self.checkpoint,
            dtype=config.precision,
            offload_text_encoder=config.offload_text_encoder,
            attention=config.attention,
            norms=config.norms,
        )
        if self.loras:
            pipe.transformer = lora.merge(lora.attach(pipe.transformer, self.loras, self.scales), donate=True)
        print(f"loading: {time.monotonic() - begin:.2f} s", flush=True)
        return pipe


def run(config: SampleConfig, typed: Mapping[str, str] = NOTHING) -> int:
    """Makes every video of a config; returns sample.py's exit code.

    `typed` has the options that a person typed, with their texts, which must have an effect.
    Raises ValueError, in one line and before weights are read, for a run that is not possible.
    """
    begin = time.monotonic()
    cluster = many.cluster(config.ray, config.ray_worker)
    weights = Weights.open(config)
    checkpoint = weights.checkpoint
    jobs = make_jobs(config, frames_of_chunks(config, checkpoint.vae, checkpoint.variant), weights.hashes())
    todo = [job for job in jobs if config.csv is None or not job.done()]
    if config.csv is not None:
        print(f"{len(jobs)} videos, {len(jobs) - len(todo)} of them done before", flush=True)
        if not todo:
            return 0
    plans = [weights.plan(job) for job in todo]
    no_switches = config.csv is not None and not any(job.config.switches for job in jobs)
    unused = {
        "negative_prompt": (all(plan.guidance_scale is None for plan in plans), "guidance is off"),
        "interpolation_steps": (no_switches, "no prompt of the csv takes over"),
        "interpolate_time": (no_switches, "the csv has no column prompt_index"),
    }
    refuse_unused(unused, typed)
    rests = [rest_of(job, plan) for job, plan in zip(todo, plans)]
    if all(rest.finished for rest in rests):
        print(f"nothing left to make: {config.resume} is after the last chunk, ask for more num_frames", flush=True)
        return 0
    for job, plan, rest in zip(todo, plans, rests):
        try:
            _check(job, plan, rest, weights.checkpoint, alone=config.csv is None)
        except ValueError as error:
            raise error if config.csv is None else ConfigError(f"{config.csv}: {job.name}: {error}") from None
    if config.csv is not None:
        _tell_missing_inputs(todo)
        return _make_rows(config, weights, todo, [plan.num_chunks for plan in plans], cluster, begin)
    with ExitStack() as claims:
        for job in todo:
            if not claims.enter_context(outputs.claim(job.out)):
                raise ConfigError(f"out: {job.out} is being made by another run: wait for it, or name another file")
        contexts = [_read_context(job, plan, weights.checkpoint) for job, plan in zip(todo, plans)]
        pipe, shown = weights.load(config), RunProgress([plan.num_chunks for plan in plans])
        for i, (job, plan, rest, context) in enumerate(zip(todo, plans, rests, contexts)):
            shown.begin(i, job.name)
            with interrupts.deferred():
                make(pipe, job, plan, rest, context, shown, begin if i == 0 else time.monotonic())
    return 0


def _tell_missing_inputs(jobs: Sequence[Job]) -> None:
    """Prints a line about local inputs that are missing now: their rows fail, but only when their turn comes."""
    named = [(job.name, name) for job in jobs for name in (job.config.image, job.config.video) if name is not None]
    missing = [(job, name) for job, name in named if not is_url(name) and not location(name).exists()]
    if missing:
        job, name = missing[0]
        print(f"{len(missing)} of {len(jobs)} videos have no input yet, the first {job}: {name}", file=sys.stderr)


def _make_rows(
    config: SampleConfig,
    weights: Weights,
    todo: Sequence[Job],
    chunks: Sequence[int | None],
    cluster: many.Cluster | None,
    begin: float,
) -> int:
    """Makes the videos of a CSV, here or on a cluster; returns sample.py's exit code.

    Inputs are read when a row's turn comes: those that cannot be used fail their row only.
    """
    start = partial(_RowMaker, config, weights, RunProgress(chunks), begin)
    if cluster is not None:
        start = partial(_start_on_cluster, config, todo[0].weights)
    results = list(many.run(todo, start, cluster=cluster, shared=[location(config.out)]))
    failed = sum(result.error is not None for result in results)
    if others := sum(result.value is False for result in results):
        print(f"{others} of {len(todo)} videos are left to another run that makes them, or has made them", flush=True)
    if failed:
        print(f"{failed} of {len(todo)} videos failed; the same command tries them again", file=sys.stderr)
    return 1 if failed else 0


def _start_on_cluster(config: SampleConfig, hashes: Mapping[str, Any]) -> "_RowMaker":
    """The function that makes videos on a cluster's worker. Raises ValueError if its weights lack these `hashes`."""
    begin = time.monotonic()
    use_gpus_whole()
    enable_cache()
    weights = Weights.open(config)
    if weights.hashes() != hashes:
        raise ValueError(f"model: {config.model} has other files here than where the run was started: share one folder")
    return _RowMaker(config, weights, None, begin)


class _RowMaker:
    """Makes videos of a CSV with one pipeline. `shown` is the progress of all of them; None gives each its own."""

    def __init__(self, config: SampleConfig, weights: Weights, shown: RunProgress | None, begin: float):
        self._weights, self._shown, self._begin = weights, shown, begin
        self._pipe, self._number = weights.load(config), itertools.count()

    def __call__(self, job: Job) -> bool:
        """Makes a video; returns False if another run is making it now or has made it since this run began."""
        number, plan = next(self._number), self._weights.plan(job)
        shown = self._shown or RunProgress([plan.num_chunks])
        shown.begin(number if self._shown else 0, job.name)
        with outputs.claim(job.out) as ours:
            if not ours or job.done():
                return False
            context = _read_context(job, plan, self._weights.checkpoint)
            with interrupts.deferred():
                begin = self._begin if number == 0 else time.monotonic()
                make(self._pipe, job, plan, NEW, context, shown, begin)
        return True


def _check(job: Job, plan: Plan, rest: Rest, checkpoint: Checkpoint, *, alone: bool) -> None:
    """Raises ValueError for a video that cannot be made or, if it is `alone` (no row of a CSV), cannot be written."""
    config = job.config
    if config.profile is not None and plan.num_chunks is not None and plan.num_chunks < 2:
        least = plan.frames.first + 1
        raise ValueError(
            f"profile traces the second chunk, and num_frames {config.num_frames} has one: ask for {least}"
        )
    if config.resume is not None:
        identity = identity_of(checkpoint.variant, checkpoint.transformer, compute_dtype(config.precision))
        check_identity(config.resume, read_state(config.resume), identity)
    else:
        make_schedule([config.prompt], config.switches, config, plan.frames)
    outputs.check(job, goes_on=rest.in_its_file)
    if rest.in_its_file or (alone and not job.out.is_dir()):
        writer = open_file(job, rest)
        writer.close()
        if rest.in_its_file:
            check_gap(job.out, rest, writer.frames, plan)


def _read_context(job: Job, plan: Plan, checkpoint: Checkpoint) -> Context:
    config = job.config
    return None if config.resume else read_context(config.image, config.video, 1, plan, checkpoint.vae)
