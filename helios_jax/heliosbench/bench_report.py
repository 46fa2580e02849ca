"""The report of a run: one HTML page with ratings beside the paper's, curves over time, and every video."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from helios_jax.heliosbench import measure, rating, result_files
from helios_jax.heliosbench.bench_run import Model
from helios_jax.heliosbench.measure import View
from helios_jax.heliosbench.published import PUBLISHED, SOURCE
from helios_jax.locations import replacing

BINS = 60  # of a curve
WIDTH, HEIGHT, MARGIN = 460, 150, 42  # of a chart in pixels
COLOURS = ("#2563eb", "#d97706", "#059669", "#dc2626", "#7c3aed", "#0891b2")
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 76rem; padding: 0 1rem; color: #1e293b }
table { border-collapse: collapse; margin: .5rem 0 1.5rem } td, th { padding: .25rem .7rem; text-align: right }
th { border-bottom: 2px solid #cbd5e1; font-weight: 600 } td { border-bottom: 1px solid #e2e8f0 }
td:first-child, th:first-child { text-align: left } .ratings td { white-space: nowrap }
.total { font-weight: 700 } .missing, small { color: #64748b }
figure { display: inline-block; margin: 0 1rem 1rem 0 } figcaption { font-weight: 600 } code { background: #f1f5f9 }
.strip { max-width: 46rem; display: block } .failed { color: #b91c1c } .scroll { overflow-x: auto }
"""


@dataclass(frozen=True)
class BenchReport:
    """Content of the page: merged summaries and records of the models, and lines on videos that failed."""

    out: Path
    view: View
    models: Sequence[Model]
    merged: Mapping[str, Mapping[str, Any]]
    failed: Mapping[str, str]
    command: str
    fps: Mapping[str, float] = field(default_factory=dict)

    def write(self, path: Path) -> None:
        """Writes the page as a whole."""
        parts = [
            f"<h1>HeliosBench, {self.view.length} videos</h1><p><code>{escape(self.command)}</code></p>",
            self._ratings(),
            self._curves(),
            *(self._videos(model) for model in self.models),
        ]
        if self.failed:
            lines = "".join(f"<li class=failed>{escape(name)}: {escape(why)}" for name, why in self.failed.items())
            parts.insert(2, f"<h2>Not measured</h2><ul>{lines}</ul>")
        page = f"<!doctype html><meta charset=utf-8><title>HeliosBench</title><style>{STYLE}</style>{''.join(parts)}\n"
        with replacing(path) as part:
            part.write_text(page, encoding="utf-8")

    def _ratings(self) -> str:
        """A row for each metric, a column for each model and each system of the paper."""
        metrics = rating.METRICS[self.view.length]
        columns = [["", *(name.replace("_", " ") for name in metrics), "total", "throughput", "border jumps"]]
        for name, one in self.merged.items():
            summary = one["summary"]
            found = summary["non_drifting"] | summary["drifting"]
            total = f"<span class=total>{summary['total_weighted_rating']:g}</span>"
            if missing := result_files.missing(summary, self.view.length):
                total += f' <small title="without {escape(", ".join(missing))}">partial</small>'
            cells = [_rating(found.get(metric)) for metric in metrics]
            columns.append([escape(name), *cells, total, _throughput(self.fps.get(name)), self._jumps(name)])
        for system in PUBLISHED:
            total = system.short if self.view.length == "short" else system.long
            if total is not None or system.fps is not None:
                shown = "" if total is None else f"{total:.2f}"
                columns.append([f"{system.name}*", *[""] * len(metrics), shown, _throughput(system.fps), ""])
        notes = (
            "Ratings are from 1 to 10; the raw score is in brackets. A partial total lacks metrics: do not compare it"
            " with a whole one. Throughput rates the speed (frames per second) and is not part of the total. Border"
            " jumps are ours: by how many of 255 levels pixels change more across borders of chunks than within them."
            f' * Published: <a href="{SOURCE}">{SOURCE}</a>.'
        )
        summaries = [kind for one in self.merged.values() for kind in one["summary"].values() if isinstance(kind, dict)]
        counts = {metric["num_videos"] for summary in summaries for metric in summary.values()}
        if len(counts) > 1:
            notes += f" Metrics are averages over {min(counts)} to {max(counts)} videos."
        rows = list(zip(*columns, strict=True))
        return f"<h2>Ratings</h2><div class='scroll ratings'>{_table(rows)}</div><p><small>{notes}</small></p>"

    def _jumps(self, name: str) -> str:
        """The mean of border jumps over a model's videos."""
        records = next(model.records for model in self.models if model.name == name).values()
        found = [record["scores"].get("border_jumps", {}).get("border_jumps") for record in records]
        scores = [one["border_jumps_score"] for one in found if one]
        return f"{np.mean(scores):.2f}" if scores else ""

    def _curves(self) -> str:
        charts = []
        for name in _curve_names(self.models):
            lines = {model.name: line for model in self.models if (line := mean_curve(model, name)) is not None}
            if lines:
                charts.append(f"<figure><figcaption>{name.replace('_', ' ')}</figcaption>{chart(lines)}</figure>")
        if not charts:
            return ""
        keys = " ".join(
            f'<span style="color:{COLOURS[i % len(COLOURS)]}">&#9644; {escape(model.name)}</span>'
            for i, model in enumerate(self.models)
        )
        note = "<small>means over the videos, from start to end</small>"
        return f"<h2>Over time</h2><p>{keys} {note}</p>{''.join(charts)}"

    def _videos(self, model: Model) -> str:
        found = {}
        for record in model.records.values():
            for scores in record["scores"].values():
                found |= dict.fromkeys(scores)
        metrics = [name for name in result_files.SCORES if name in found]
        rows = [["video", "frames", *(name.replace("_", " ") for name in metrics)]]
        for video in model.videos:
            record = model.records[video.id]
            scores = {name: one for several in record["scores"].values() for name, one in several.items()}
            strip = measure.record_path(model.folder, video).with_suffix(".jpg")
            source = escape(strip.relative_to(self.out).as_posix())
            image = f'<img class=strip loading=lazy alt="" src="{source}">' if strip.exists() else ""
            text = escape(video.prompt if len(video.prompt) <= 160 else f"{video.prompt[:157]}...")
            first = f"{escape(video.path.name)}<br><small>{text}</small>{image}"
            values = [f"{scores[name][result_files.SCORES[name]]:.4f}" if name in scores else "-" for name in metrics]
            rows.append([first, str(record.get("frames", "-")), *values])
        return f"<h2>{escape(model.name)}</h2><div class=scroll>{_table(rows)}</div>"


def _rating(one: Mapping[str, Any] | None) -> str:
    if one is None or one["rating"] is None:
        return "<span class=missing>missing</span>"
    return f"{one['rating']} <small>({one['raw_score']:.4g})</small>"


def _throughput(fps: float | None) -> str:
    return "" if fps is None else f"{rating.throughput_score(fps)} <small>({fps:g})</small>"


def _table(rows: Sequence[Sequence[str]]) -> str:
    head, *body = rows
    lines = ["<tr>" + "".join(f"<th>{cell}" for cell in head)]
    lines += ["<tr>" + "".join(f"<td>{cell}" for cell in row) for row in body]
    return f"<table>{''.join(lines)}</table>"


def _curve_names(models: Sequence[Model]) -> list[str]:
    names: dict[str, None] = {}
    for model in models:
        for record in model.records.values():
            names |= dict.fromkeys(name for name, curve in record["curves"].items() if curve)
    return list(names)


def mean_curve(model: Model, metric: str) -> np.ndarray | None:
    """The mean over a model's videos at `BINS` equal parts of their time (NaN where none has a value), or None."""
    total, count = np.zeros(BINS), np.zeros(BINS)
    for record in model.records.values():
        for number, value in record["curves"].get(metric, ()):
            place = min(BINS - 1, int(number / record["frames"] * BINS))
            total[place] += value
            count[place] += 1
    return np.divide(total, count, out=np.full(BINS, np.nan), where=count > 0) if count.any() else None


def chart(lines: Mapping[str, np.ndarray]) -> str:
    """An SVG of lines over time, with the least and the greatest value at the left."""
    low, high = (float(f([f(line) for line in lines.values()])) for f in (np.nanmin, np.nanmax))
    span = high - low or 1.0
    drawn = []
    for i, line in enumerate(lines.values()):
        points = [
            f"{MARGIN + (j + 0.5) / BINS * (WIDTH - MARGIN):.1f},{8 + (high - y) / span * (HEIGHT - 16):.1f}"
            for j, y in enumerate(line)
            if not np.isnan(y)
        ]
        colour = COLOURS[i % len(COLOURS)]
        drawn.append(f'<polyline fill="none" stroke="{colour}" stroke-width="1.6" points="{" ".join(points)}"/>')
        if len(points) < 8:
            drawn += [f'<circle r="3" fill="{colour}" cx="{x}" cy="{y}"/>' for x, y in (p.split(",") for p in points)]
    labels = "".join(
        f'<text x="0" y="{y}" font-size="10" fill="#64748b">{value:.3g}</text>'
        for y, value in ((12, high), (HEIGHT - 6, low))
    )
    frame = f'<path d="M{MARGIN} 4V{HEIGHT - 4}H{WIDTH}" fill="none" stroke="#cbd5e1"/>'
    return f'<svg width="{WIDTH}" height="{HEIGHT}" role="img">{frame}{labels}{"".join(drawn)}</svg>'
