"""The page of a table: claims and how they came out, means with intervals, curves over time, pictures; CSV and JSON."""

import csv
import json
import math
import re
import shutil
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from helios_jax.ablations.intervals import LEVEL, Mean, mean
from helios_jax.ablations.scores import ScoreError, Scores, together
from helios_jax.ablations.table import Claim, Table
from helios_jax.config import ConfigError
from helios_jax.config_types import did_you_mean
from helios_jax.locations import replacing
from helios_jax.path_checks import check_folder, kind_of

Results = Mapping[str, Mapping[int, Scores]]  # by row and seed


@dataclass(frozen=True)
class Outcome:
    """The result of a claim, `holds` None for one that the intervals leave open; `told` has the numbers.

    `seeds` is the number of seeds that all rows of the claim have results for, out of `planned`."""

    claim: Claim
    holds: bool | None
    told: str
    seeds: int
    planned: int

    @property
    def word(self) -> str:
        """The outcome; for one seed it says so, as its intervals leave out how results vary between trainings."""
        word = {True: "Holds", False: "Does not hold", None: "Open"}[self.holds]
        if self.seeds == 1 and self.holds is not None:
            return f"{word} for one seed"
        return word if self.seeds == self.planned else f"{word} for {self.seeds} of {self.planned} seeds"


def outcome(claim: Claim, results: Results, planned: int) -> Outcome | None:
    """The outcome of a claim, by the seeds that all its rows have results for, of `planned`; None if there is no such.

    Raises ScoreError for a metric that was not scored, and for rows or seeds of different videos.
    """
    rows = (claim.row, *claim.against)
    found = [results.get(row, {}) for row in rows]  # rows that were not asked for have none
    seeds = [seed for seed in found[0] if all(seed in one for one in found)]
    if not seeds:
        return None
    values = {row: together({seed: results[row][seed] for seed in seeds}, row) for row in rows}
    if missing := [row for row in rows if claim.metric not in values[row]]:
        raise ScoreError(f"claims: {claim.metric} is no metric of {missing[0]}; it has {', '.join(values[missing[0]])}")
    ours = values[claim.row][claim.metric]
    sign = 1 if claim.better == "lower" else -1
    if claim.at_most is not None:
        value = mean(ours)
        holds = True if value.high <= claim.at_most else False if value.low > claim.at_most else None
        told = f"{claim.metric} of {claim.row}: {value}, at most {claim.at_most:g} was claimed"
        return Outcome(claim, holds, told, len(seeds), planned)
    told, each = [f"{claim.row} {mean(ours)}"], []
    for row in claim.against:
        theirs = values[row][claim.metric]
        if results[row][seeds[0]].ids != results[claim.row][seeds[0]].ids:
            raise ScoreError(f"claims: {claim.row} and {row} have different videos: score both alike")
        by = mean(sign * (theirs - ours))
        each.append(True if by.low > 0 else False if by.high < 0 else None)
        word = "the same" if not by.value else f"{'worse' if by.value > 0 else 'better'} by {_size(by)}"
        told.append(f"{row} {mean(theirs)}, {word}")
    holds = True if all(each) else False if any(one is False for one in each) else None
    numbers = f"{claim.metric} ({claim.better} is better): {'; '.join(told)}"
    return Outcome(claim, holds, numbers, len(seeds), planned)


def _size(by: Mean) -> Mean:
    return by if by.value > 0 else Mean(-by.value, -by.high, -by.low)


def check(table: Table, path: Path) -> None:
    """Raises ConfigError if no page can be written at `path`, or if it would replace files that are not a page's.

    The JSON beside a page tells that they are: it is written first.
    """
    if path.suffix != ".md":
        raise ConfigError(f"--page: {path} does not end in .md; name a Markdown file, such as {path.name or 'page'}.md")
    files = [path, path.with_suffix(".csv"), path.with_suffix(".json")]
    there = [file for file in files if kind_of(file) != "missing"]
    if odd := [file for file in there if kind_of(file) != "file"]:
        raise ConfigError(f"--page: {odd[0]} is no regular file; name another page")
    check_folder(path.parent, path)
    pictures = {_beside(path, name) for name in ("curves", *table.rows)}
    there += [file for file in path.parent.iterdir() if file.stem in pictures]
    if there and not _is_page(path.with_suffix(".json")):
        raise ConfigError(
            f"--page: {there[0]} is there already, and was not written with a page: move it, or name another page"
        )


def _beside(path: Path, name: str) -> str:
    """The name, without its ending, of a page's picture."""
    return f"{path.stem}-{''.join(c if c.isalnum() else '-' for c in name.lower())}"


def _is_page(path: Path) -> bool:
    """True for the JSON that is written with a page."""
    try:
        return {"title", "seeds", "rows", "claims"} <= json.loads(path.read_text()).keys()
    except (OSError, ValueError, AttributeError):
        return False


@dataclass(frozen=True)
class Page:
    """A page that was written: the outcomes of claims, and in one line each what it lacks beside missing results.

    `undecided` are the claims about rows that the table was asked to leave out.
    """

    outcomes: list[Outcome]
    lacks: list[str]
    undecided: list[Claim]


def write(table: Table, results: Results, path: Path, command: str, missing: Mapping[str, str]) -> Page:
    """Writes `path`, a Markdown page, and beside it NAME.csv, NAME.json and pictures.

    `missing` maps each row and seed without a result to the reason.
    """
    values, lacks = gathered(results)
    planned, outcomes = len(table.options.seeds), list[Outcome]()
    for claim in table.options.claims:
        try:
            if (one := outcome(claim, results, planned)) is not None:
                outcomes.append(one)
        except ScoreError as error:
            lacks.append(str(error))
    path.parent.mkdir(parents=True, exist_ok=True)
    # First: it tells whose the others are (`check`).
    _write_json(table, values, results, outcomes, path.with_suffix(".json"))
    _write_csv(results, path.with_suffix(".csv"))
    lines = [
        f"# {table.options.title}",
        "",
        *([table.options.text.strip(), ""] if table.options.text else []),
        f"`{command}`",
        "",
    ]
    lines += [f"- **{one.word}**: {one.claim.says}. {one.told}." for one in outcomes]
    undecided = [claim for claim in table.options.claims if not {claim.row, *claim.against} <= table.rows.keys()]
    lines += [f"- **Left out**: {claim.says}. Some of its rows are not on this page." for claim in undecided]
    means, curves = _means(table, values, lacks), _curves(table, results, path, lacks)
    pictures = {row: _picture(row, found, path, lacks) for row, found in results.items() if found}
    lacks = list(dict.fromkeys(lacks))
    lines += ["", *means, ""]
    lines += [f"- no result: {name}: {reason}" for name, reason in missing.items()]
    lines += [f"- missing: {reason}" for reason in lacks]
    if curves is not None:
        lines += ["", f"![metrics over the seconds of the videos]({curves.name})", ""]
    for row, picture in pictures.items():
        if picture is not None:
            lines += [f"## {row}", "", f"`{_changes(table, row)}`", "", f"![videos of {row}]({picture.name})", ""]
    with replacing(path) as part:
        part.write_text("\n".join(lines) + "\n")
    return Page(outcomes, lacks, undecided)


def gathered(results: Results) -> tuple[dict[str, dict[str, np.ndarray]], list[str]]:
    """The values of each row's metrics, [seeds, videos], and in one line each the rows whose seeds do not agree."""
    values, wrong = {}, []
    for row, found in results.items():
        try:
            if found:
                values[row] = together(found, row)
        except ScoreError as error:
            wrong.append(str(error))
    return values, wrong


def send(table: Table, results: Results, project: str) -> None:
    """Sends the means of each row to Weights & Biases, as a run of the row's name in `project`."""
    import wandb  # pyright: ignore[reportMissingImports]

    for row, metrics in gathered(results)[0].items():
        run = wandb.init(
            project=project, name=row, group=table.options.title, config=dict(table.rows[row]), reinit=True
        )
        run.summary.update({name: mean(each).value for name, each in metrics.items()})
        run.finish()


def _known(key: str, asked: Sequence[str], scored: Collection[str], lacks: list[str]) -> list[str]:
    """The metrics `asked` for that some row has; `lacks` gets a line for each other one."""
    if scored:  # else there is no result, which is told
        there = f"; there are {', '.join(scored)}"
        lacks += [
            f"{key}: {name} was not scored in any row{did_you_mean(name, list(scored)) or there}"
            for name in asked
            if name not in scored
        ]
    return [name for name in asked if name in scored]


def _means(table: Table, values: Mapping[str, Mapping[str, np.ndarray]], lacks: list[str]) -> list[str]:
    scored = list(dict.fromkeys(name for one in values.values() for name in one))
    names = _known("shown", table.options.shown, scored, lacks) if table.options.shown else scored
    lines = [
        f"Means with {LEVEL:.0%} intervals over the videos of {_seeds(table)}:",
        "",
        f"| row | {' | '.join(names)} |",
        "| --- |" + " --- |" * len(names),
    ]
    for row, metrics in values.items():
        cells = [str(mean(metrics[name])) if name in metrics else "" for name in names]
        count, planned = len(next(iter(metrics.values()))), len(table.options.seeds)
        fewer = "" if count == planned else f" ({count} of {planned} seeds)"
        lines.append(f"| {row}{fewer} | {' | '.join(cells)} |")
    return lines


def _seeds(table: Table) -> str:
    count = len(table.options.seeds)
    return "one seed" if count == 1 else f"{count} seeds"


def _changes(table: Table, row: str) -> str:
    return ", ".join(f"{name}: {value}" for name, value in table.rows[row].items()) or "nothing changed"


def _curves(table: Table, results: Results, path: Path, lacks: list[str]) -> Path | None:
    """A panel for each metric: the mean of each row over the seconds, and the range of its seeds."""
    found = [scores for each in results.values() for scores in each.values()]
    scored = list(dict.fromkeys(name for scores in found for name in scores.seconds))
    if found and not scored and table.options.curves:
        lacks.append("curves: no row has scores over the seconds of its videos (`seconds` in scores.json)")
    drawn = _known("curves", table.options.curves, scored, lacks)
    if not drawn:
        return None
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(drawn), figsize=(5.5 * len(drawn), 4), layout="constrained", squeeze=False)
    for axis, name in zip(axes[0], drawn):
        for row, found in results.items():
            each = [scores.seconds[name].mean(0) for scores in found.values() if name in scores.seconds]
            if len({len(one) for one in each}) > 1:
                lacks.append(f"curves: {name} of {row} has another number of seconds in each seed: score all alike")
            elif each:
                seconds = np.arange(len(each[0])) + 0.5
                (line,) = axis.plot(seconds, np.mean(each, 0), label=row)
                axis.fill_between(seconds, np.min(each, 0), np.max(each, 0), color=line.get_color(), alpha=0.15)
        axis.set(title=name, xlabel="second of the video")
    axes[0, 0].legend(fontsize=8)
    file = path.with_name(f"{_beside(path, 'curves')}.png")
    figure.savefig(file, dpi=80)
    plt.close(figure)
    return file


def _picture(row: str, found: Mapping[int, Scores], path: Path, lacks: list[str]) -> Path | None:
    """Copies the picture of the first seed to the page's folder; None if there is no picture."""
    picture = next(iter(found.values())).picture
    if picture is None:
        return None
    try:
        return Path(shutil.copyfile(picture, path.with_name(f"{_beside(path, row)}{picture.suffix}")))
    except (OSError, ValueError) as error:
        lacks.append(f"picture of {row}: {picture}: {getattr(error, 'strerror', None) or error}")
        return None


def _write_csv(results: Results, path: Path) -> None:
    """One line for each row, seed, video and metric."""
    with replacing(path) as part, part.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["row", "seed", "video", "metric", "value"])
        for row, found in results.items():
            for seed, scores in found.items():
                for name, each in scores.metrics.items():
                    writer.writerows([row, seed, video, name, f"{value:.6g}"] for video, value in zip(scores.ids, each))


def _write_json(table: Table, values: Any, results: Results, outcomes: list[Outcome], path: Path) -> None:
    """Writes means, intervals (null: an end that one value cannot give), claims, and curves: each seed's mean."""

    def ends(found: Mean) -> dict[str, float | None]:
        return {name: value if math.isfinite(value) else None for name, value in vars(found).items()}

    def curves(scores: Scores) -> dict[str, list[float]]:
        return {name: each.mean(0).round(5).tolist() for name, each in scores.seconds.items()}

    rows = {row: {name: ends(mean(each)) for name, each in metrics.items()} for row, metrics in values.items()}
    claims = [{"says": one.claim.says, "outcome": one.word, "numbers": one.told} for one in outcomes]
    facts = {"title": table.options.title, "seeds": list(table.options.seeds), "rows": rows, "claims": claims}
    facts["curves"] = {row: {seed: curves(one) for seed, one in found.items()} for row, found in results.items()}
    # A list of numbers stands on one line.
    text = re.sub(r"\[[^][{}\"]*\]", lambda numbers: " ".join(numbers[0].split()), json.dumps(facts, indent=2))
    with replacing(path) as part:
        part.write_text(text + "\n")
