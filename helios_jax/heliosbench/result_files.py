"""Result files in upstream's layout: one per metric, their merged summary, and one file over all models."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from helios_jax.config import ConfigError
from helios_jax.heliosbench import rating
from helios_jax.heliosbench.rating import Length
from helios_jax.locations import replacing

SUFFIX = "_results.json"
MERGED = f"merged{SUFFIX}"
ALL_MODELS = "all_models_merged.json"

# Names inside a metric's file, where they differ from the file's own.
TITLES = {"motion_amplitude": "motion_fb"}
SCORES = {"motion_amplitude": "motion_fb"} | {
    name: f"{name.replace('drifting', 'drift')}_score" for name in rating.METRICS["long"] if name != "motion_amplitude"
}
SCORES["border_jumps"] = "border_jumps_score"  # ours
DESCRIPTIONS = {
    "drifting_aesthetic": "aesthetic",
    "drifting_motion_smoothness": "motion smoothness",
    "drifting_semantic": "semantic consistency",
    "drifting_naturalness": "naturalness",
}


def results(metric: str, items: Iterable[Mapping[str, Any]], **facts: Any) -> dict[str, Any]:
    """A metric's file: the average over the videos and each video's item, sorted by id; `facts` are further keys."""
    items = sorted(items, key=lambda item: item["id"])
    scores = [item[SCORES[metric]] for item in items]
    drift = rating.is_drift(metric)
    about = {"description": f"Start-end contrast of {DESCRIPTIONS[metric]} (first/last 15% frames)"} if drift else {}
    return {
        "metric": TITLES.get(metric, metric),
        **about,
        "average_drift_score" if drift else "average_score": sum(scores) / len(scores),
        "num_videos": len(scores),
        **facts,
        "per_video_results": items,
    }


def merge(folder: Path, length: Length, strict: bool = False) -> dict[str, Any]:
    """The summary of a folder's metric files: raw scores, ratings and the weighted total.

    Raises ConfigError for a file that is not one of a metric's results.
    """
    summary: dict[str, Any] = {"non_drifting": {}, "drifting": {}}
    for metric in sorted(rating.METRICS[length]):
        if not (path := folder / f"{metric}{SUFFIX}").exists():
            continue
        data = read(path)
        raw, drift = data.get("average_score"), data.get("average_drift_score")
        if raw is None or (strict and not raw):  # upstream takes an average score of 0 for none
            raw = drift
        value = rating.normalized(raw)
        summary["drifting" if rating.is_drift(metric) else "non_drifting"][metric] = {
            "name": metric.replace("_", " ").title(),
            "raw_score": raw,
            "normalized_score": value,
            "rating": rating.rate(metric, value, length, strict),
            "num_videos": data.get("num_videos", 0),
        }
    summary["total_weighted_rating"] = rating.total(ratings(summary), length)
    return {"rating_scale": rating.SCALE, "summary": summary, "per_video": {}}


def ratings(summary: Mapping[str, Any]) -> dict[str, int | None]:
    """The rating of each metric of a summary."""
    return {name: one["rating"] for kind in ("non_drifting", "drifting") for name, one in summary[kind].items()}


def missing(summary: Mapping[str, Any], length: Length) -> list[str]:
    """Metrics of the total that have no rating: with any, the total is partial."""
    found = ratings(summary)
    return [metric for metric in rating.WEIGHTS[length] if found.get(metric) is None]


def merge_models(summaries: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The ratings of all models, by name, from their merged summaries."""
    models = {
        name: {**ratings(one["summary"]), "total_weighted_rating": one["summary"]["total_weighted_rating"]}
        for name, one in summaries.items()
    }
    names = sorted({metric for one in models.values() for metric in one if metric != "total_weighted_rating"})
    return {
        "num_models": len(models),
        "score_type": "rating",
        "metrics": [*names, "total_weighted_rating"],
        "models": models,
        "rating_scale": rating.SCALE,
    }


def read(path: Path) -> dict[str, Any]:
    """A JSON object in a file; raises ConfigError, in one line, for anything else."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read as JSON ({error}); remove it, and it is made again") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: must hold a JSON object; remove it, and it is made again")
    return data


def write(path: Path, data: Mapping[str, Any]) -> None:
    """Writes a JSON file as a whole: a reader finds the old or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as part:
        part.write_text(json.dumps(data, indent=2, ensure_ascii=False), encoding="utf-8")
