"""A run of the benchmark: measures what is not measured yet, over processes and threads, and writes all results.

OUT/MODEL has a record per video (`measure`), upstream's result files and their merged summary; OUT has the summary of
all models and the report. Scores that upstream's scripts wrote to OUT/MODEL before count as measured.
"""

import concurrent.futures as futures
import importlib.util
import multiprocessing
import os
import shutil
import signal
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from helios_jax.config import ConfigError
from helios_jax.heliosbench import measure, rating, result_files
from helios_jax.heliosbench.bench_progress import BenchProgress
from helios_jax.heliosbench.bench_videos import BenchVideo
from helios_jax.heliosbench.measure import Recipe, View
from helios_jax.heliosbench.metric import Metric

STATE = "heliosbench.json"


@dataclass
class Model:
    """A folder of videos to judge: `folder` gets its results."""

    name: str
    folder: Path
    videos: list[BenchVideo]
    records: dict[int, dict[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class Task:
    """A video and the metrics that it still lacks."""

    model: Model
    video: BenchVideo
    recipes: tuple[Recipe, ...]


def open_model(name: str, out: Path, videos: list[BenchVideo], view: View) -> Model:
    """The model with the records of its videos; raises ConfigError if its folder has results of another length."""
    model, state = Model(name, out / name, videos), out / name / STATE
    facts = {"length": view.length, "size": list(view.box)}
    if state.exists():
        if (theirs := result_files.read(state)) != facts:
            raise ConfigError(
                f"--out: {model.folder} holds results of {theirs.get('length')} videos at {theirs.get('size')}, this is"
                f" for {view.length} ones at {list(view.box)}; name another folder"
            )
        imported = {}
    else:
        imported = _upstream_scores(model.folder)
    for video in videos:
        record = measure.read_record(model.folder, video)
        for metric, (fields, settings) in imported.get(video.path.name, {}).items():
            source = metric.removeprefix("drifting_")
            record["scores"].setdefault(source, {})[metric] = fields
            record["settings"].setdefault(source, {}).update(settings)
        if imported:
            result_files.write(measure.record_path(model.folder, video), record)
        model.records[video.id] = record
    result_files.write(state, facts)
    return model


def _upstream_scores(folder: Path) -> dict[str, dict[str, tuple[dict[str, Any], dict[str, Any]]]]:
    """Reads upstream's result files in a new folder: by video name and metric, an item's fields and its settings.

    The files are copied to `imported`, as ours take their places.
    """
    found: dict[str, dict[str, tuple[dict[str, Any], dict[str, Any]]]] = {}
    for metric in rating.METRICS["long"]:
        path = folder / f"{metric}{result_files.SUFFIX}"
        if not path.exists():
            continue
        data = result_files.read(path)
        known = {"model": data.get("model_name"), "pictures": data.get("num_frames_per_video")}
        settings = {"imported": True} | {key: value for key, value in known.items() if value is not None}
        for item in data.get("per_video_results", []):
            fields = {key: value for key, value in item.items() if key not in ("id", "video_name", "prompt")}
            if result_files.SCORES[metric] not in fields or "video_name" not in item:
                raise ConfigError(f"{path}: an item lacks video_name or {result_files.SCORES[metric]}; remove the file")
            found.setdefault(item["video_name"], {})[metric] = fields, settings
        copy = folder / "imported" / path.name
        copy.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, copy)
    return found


def pending(models: Sequence[Model], recipes: Sequence[Recipe]) -> list[Task]:
    """Tasks for the videos that lack metrics: one for metrics of this machine, and one for metrics of a service."""
    tasks = []
    for remote in (False, True):
        for model in models:
            for video in model.videos:
                record = model.records[video.id]
                lacking = (r for r in recipes if r.remote == remote and not measure.is_done(record, r))
                if found := tuple(lacking):
                    tasks.append(Task(model, video, found))
    return tasks


def run_tasks(tasks: Sequence[Task], view: View, workers: int, threads: int) -> dict[str, str]:
    """Measures the videos, and writes the scores of each at once; returns a line on each video that failed."""
    failed: dict[str, str] = {}
    local = [task for task in tasks if not task.recipes[0].remote]
    remote = [task for task in tasks if task.recipes[0].remote]
    with BenchProgress(len(tasks)) as progress:
        for task, outcome in _outcomes(local, remote, view, workers, threads):
            path = measure.record_path(task.model.folder, task.video)
            name = f"{task.model.name}/{task.video.path.name}"
            record = task.model.records[task.video.id]
            if isinstance(outcome, Exception):
                failed[name] = str(outcome)
            else:
                failed |= {f"{name}, {metric}": reason for metric, reason in outcome["failed"].items()}
                result_files.write(path, measure.keep(record, outcome, task.recipes))
            progress.done(name)
    return failed


def _outcomes(
    local: Sequence[Task], remote: Sequence[Task], view: View, workers: int, threads: int
) -> Iterator[tuple[Task, dict[str, Any] | Exception]]:
    """Yields each task when it ends, with its measurements or the error of its video. Other errors are raised."""
    with ExitStack() as stack:
        jobs: dict[futures.Future, Task] = {}
        pools: list[futures.Executor] = []

        def start(pool: futures.Executor, tasks: Sequence[Task], metrics: Mapping[str, Metric] | None = None) -> None:
            pools.append(pool)
            stack.callback(pool.shutdown, wait=False, cancel_futures=True)
            for task in tasks:
                strip = measure.record_path(task.model.folder, task.video).with_suffix(".jpg")
                made = None if task in remote and strip.exists() else strip
                names = [recipe.name for recipe in task.recipes]
                jobs[pool.submit(_work, task.video, names, view, made, metrics)] = task

        if remote:
            start(futures.ThreadPoolExecutor(threads), remote, _make(_recipes(remote)))
        if local and workers > 1:
            context = multiprocessing.get_context("spawn")
            recipes = _recipes(local)
            start(futures.ProcessPoolExecutor(workers, context, initializer=_begin, initargs=(recipes,)), local)
        elif local:
            start(futures.ThreadPoolExecutor(1), local, _make(_recipes(local)))
        for job in futures.as_completed(jobs):
            try:
                yield jobs[job], job.result()
            except BrokenProcessPool:
                raise OSError(
                    "a process that measures ended without a word, for lack of memory perhaps: try fewer --workers"
                ) from None
            except (ValueError, FileNotFoundError, PermissionError) as error:
                yield jobs[job], error
        for pool in pools:
            pool.shutdown()


def _recipes(tasks: Sequence[Task]) -> list[Recipe]:
    return list({recipe.name: recipe for task in tasks for recipe in task.recipes}.values())


def _make(recipes: Sequence[Recipe]) -> dict[str, Metric]:
    return {recipe.name: recipe.make() for recipe in recipes}


class SetupError(RuntimeError):
    """Metrics that a process could not make; the message is one line."""


# State of a process that measures: its metrics, whose networks are loaded once, or the error of making them.
_MADE: dict[str, Metric] = {}
_FAILED: list[str] = []


def _begin(recipes: Sequence[Recipe]) -> None:
    """Sets up a process that measures: it ends with its parent, which alone answers signals."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if importlib.util.find_spec("cv2") is not None:
        import cv2

        cv2.setNumThreads(1)  # the processes share the cores
    try:
        _MADE.update(_make(recipes))
    except ValueError as error:
        _FAILED.append(str(error))


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _work(
    video: BenchVideo, names: Sequence[str], view: View, strip: Path | None, metrics: Mapping[str, Metric] | None
) -> dict[str, Any]:
    if _FAILED:
        raise SetupError(_FAILED[0])
    made = _MADE if metrics is None else metrics
    return measure.measure(video, {name: made[name] for name in names}, view, strip)


def write_results(models: Sequence[Model], prompts: Mapping[int, str], view: View, strict: bool) -> dict[str, Any]:
    """Writes result files and summaries of all models; returns the merged summaries by model."""
    merged = {}
    for model in models:
        records = [model.records[video.id] for video in model.videos]
        found = measure.items(records, prompts)
        for metric in result_files.SCORES:
            path = model.folder / f"{metric}{result_files.SUFFIX}"
            if metric in found:
                result_files.write(path, result_files.results(metric, found[metric], **_facts(metric, records)))
            else:
                path.unlink(missing_ok=True)
        merged[model.name] = result_files.merge(model.folder, view.length, strict)
        result_files.write(model.folder / result_files.MERGED, merged[model.name])
    return merged


def _facts(metric: str, records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Further keys of naturalness' result files: the judge's model, and the number of pictures that it sees."""
    if not metric.endswith("naturalness"):
        return {}
    settings = [record["settings"].get("naturalness", {}) for record in records]
    found = {one["model"]: one.get("pictures") for one in settings if "model" in one}
    if not found:
        return {}
    facts = {"model_name": ", ".join(sorted(found))}
    return facts if rating.is_drift(metric) else facts | {"num_frames_per_video": next(iter(found.values()))}


def warn(text: str) -> None:
    """A line on stderr."""
    print(f"heliosbench: {text}", file=sys.stderr)
