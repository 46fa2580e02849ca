"""A table of runs: commands with placeholders, rows that fill them in, and the claims that rows are compared for.

    title: Anchor and positions
    seeds: [0, 1, 2]
    variables: {memory: "", model: "{stage1}/pipeline"}
    steps:
      stage1: python train.py configs/toy/stage1.yaml run={out} seed={seed} {memory}
      score: python -m helios_jax.toy.rollouts --model {model} --out {out} --seed {seed}
    rows:
      full: {}
      no anchor: {memory: flow.memory.anchor=null}
    claims:
      - {says: The anchor keeps colours, metric: colour_shift, better: lower, row: full, against: [no anchor]}

A step is one command. In it `{out}` is the step's own folder, `{seed}` the seed, the name of another step that step's
folder, and the name of a variable its text, in which placeholders may stand, too. A row changes variables. A row's
result is its step `score`; other steps run only if it needs them. The same command is one job, whichever rows ask for
it: rows that differ in sampling alone share a model.
"""

import hashlib
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from helios_jax import config_files
from helios_jax.config import ConfigError, find, from_dict, require
from helios_jax.config_types import did_you_mean, shown

SCORE = "score"  # the step whose folder holds a row's result
OWN = ("out", "seed")  # placeholders that no variable may be named after
PLACEHOLDER = re.compile(r"\{(\w+)\}")


@dataclass
class Claim:
    """A comparison of a row with others: the mean of `metric` should be `better` in `row` than in each of `against`.

    With `at_most` in place of `against`, the mean should not be above this number.
    """

    says: str = "???"
    metric: str = "???"
    row: str = "???"
    better: Literal["higher", "lower"] = "lower"
    against: tuple[str, ...] = ()
    at_most: float | None = None

    def __post_init__(self):
        require(
            bool(self.against) != (self.at_most is not None),
            "against: name rows to compare with, or give at_most, a number; one of the two",
        )


@dataclass
class Options:
    """Settings of a table beside its commands and rows.

    `shown` are the metrics of the page's table, all if none is named. `curves` are those drawn over the seconds of the
    videos. `text` goes below the title.
    """

    title: str = "???"
    seeds: tuple[int, ...] = (0,)
    claims: list[Claim] = field(default_factory=list)
    shown: tuple[str, ...] = ()
    curves: tuple[str, ...] = ()
    text: str = ""

    def __post_init__(self):
        require(
            bool(self.seeds) and len({*self.seeds}) == len(self.seeds) and min(self.seeds) >= 0,
            f"seeds must be different numbers from 0 up, one at least, got {list(self.seeds)}",
        )


@dataclass(frozen=True)
class Table:
    """A table as the module's docstring shows it: options, commands, variables and rows."""

    options: Options
    steps: Mapping[str, str]
    variables: Mapping[str, str]
    rows: Mapping[str, Mapping[str, str]]

    def __post_init__(self):
        require(SCORE in self.steps, f"steps must have one named {SCORE}: its result is the row's")
        require(bool(self.rows), "rows must name at least one row, such as full: {}")
        for name in (*self.steps, *self.variables):
            require(PLACEHOLDER.fullmatch(f"{{{name}}}") is not None, f"{name!r} cannot be a placeholder: use a word")
            require(name not in OWN, f"{name} is a placeholder of every step: use another name")
            require(not (name in self.steps and name in self.variables), f"{name} is a step and a variable: rename one")
        for row, changes in self.rows.items():
            for name in changes:
                require(
                    name in self.variables,
                    f"rows: {row!r} sets {name}, which is no variable{did_you_mean(name, list(self.variables))}",
                )

    def of(self, rows: Sequence[str] | None = None, seeds: Sequence[int] | None = None) -> "Table":
        """The table with some of its rows, and with other seeds. Raises ConfigError for rows that it has not."""
        for row in rows or ():
            if row not in self.rows:
                raise ConfigError(f"{row!r} is no row of the table; there are {', '.join(self.rows)}")
        options = self.options if seeds is None else replace(self.options, seeds=tuple(dict.fromkeys(seeds)))
        return replace(self, options=options, rows={row: self.rows[row] for row in rows or self.rows})


def read(path: Path | str) -> Table:
    """The table in a YAML file, or in one of configs/ by its name.

    Raises ConfigError, in one line, for a file that cannot be used.
    """
    path = find(path)
    try:
        values = dict(config_files.read(path))
        parts = {name: _texts(values.pop(name, {}), name) for name in ("steps", "variables")}
        rows = values.pop("rows", {})
        if not isinstance(rows, dict):
            raise ValueError(f"rows must be a group of rows, each with its variables, got {shown(rows)}")
        filled = {str(row): _texts(changes or {}, f"rows: {row!r}") for row, changes in rows.items()}
        table = Table(from_dict(values, Options, "options"), **parts, rows=filled)
        for i, claim in enumerate(table.options.claims):
            for row in (claim.row, *claim.against):
                require(row in table.rows, f"claims[{i}] names the row {row!r}, which is not in rows")
        for row in table.rows:
            Jobs(table, Path("out"))(row, 0)
        _check_used(table)
    except (ConfigError, TypeError, ValueError) as error:
        raise ConfigError(f"{path}: {str(error).removeprefix('options: ')}") from None
    return table


def _texts(values: Any, name: str) -> dict[str, str]:
    """A group of texts; numbers and other plain values are texts as they are written in an override."""
    if not isinstance(values, dict):
        raise ValueError(f"{name} must be a group of names with texts, got {shown(values)}")
    for key, value in values.items():
        if not isinstance(value, str | int | float):
            raise ValueError(f"{name}: {key} must be a text, got {shown(value)}")
    return {str(key): str(value) for key, value in values.items()}


def _check_used(table: Table) -> None:
    """Raises ConfigError for a variable that would change nothing where it is given."""
    reached = {row: _reached(table, row) for row in table.rows}
    for row, changes in table.rows.items():
        if unused := [name for name in changes if name not in reached[row]]:
            raise ConfigError(
                f"rows: {row!r} sets {unused[0]}, which no step of this row uses: write {{{unused[0]}}} into one, or"
                f" leave it out{did_you_mean(unused[0], sorted(reached[row] & {*table.variables}))}"
            )
    used = {name for names in reached.values() for name in names}
    if unused := [name for name in table.variables if name not in used]:
        raise ConfigError(
            f"variables: {unused[0]} is used by no step that a row needs: write {{{unused[0]}}} into one, or leave it"
            f" out{did_you_mean(unused[0], sorted(used & {*table.variables}))}"
        )


def _reached(table: Table, row: str) -> set[str]:
    """The steps and variables that the result of a row depends on."""
    texts = {**table.steps, **table.variables, **table.rows[row]}
    found, left = set[str](), [SCORE]
    while left:
        name = left.pop()
        if name in texts and name not in found:
            found.add(name)
            left += PLACEHOLDER.findall(texts[name])
    return found


@dataclass(frozen=True)
class Job:
    """A command that is run once: its arguments, the folder of its results, and the jobs whose results it takes.

    Its `name` says the step, and which row and seed first asked for it.
    """

    name: str
    command: tuple[str, ...]
    folder: Path
    needs: tuple["Job", ...] = field(repr=False)


class Jobs:
    """The jobs of a table, their folders in `folder`."""

    def __init__(self, table: Table, folder: Path):
        self._table, self._folder = table, folder
        self._made: dict[str, Job] = {}  # by the identity of the command

    def __call__(self, row: str, seed: int) -> Job:
        """The job whose result is a row's with one seed. Raises ConfigError for placeholders that cannot be filled."""
        return self._step(SCORE, row, seed, ())

    @property
    def in_order(self) -> list[Job]:
        """All jobs that were asked for, each after those that it needs."""
        return list(self._made.values())

    def _step(self, step: str, row: str, seed: int, within: tuple[str, ...]) -> Job:
        if step in within:
            raise ConfigError(f"steps: {step} needs itself, by way of {' and '.join(within[within.index(step) :])}")
        variables = {**self._table.variables, **self._table.rows[row]}
        words = _words(_filled(self._table.steps[step], variables, step), step)
        used = {name for word in words for name in PLACEHOLDER.findall(word)}
        if unknown := used - {*self._table.steps, *OWN}:
            raise ConfigError(
                f"steps: {step}: {{{min(unknown)}}} is no step, no variable, and neither out nor seed"
                f"{did_you_mean(min(unknown), [*self._table.steps, *variables])}"
            )
        needs = {name: self._step(name, row, seed, (*within, step)) for name in self._table.steps if name in used}
        # Without the table's folder: the same words are the same job, wherever the folder is.
        named = {name: job.folder.name for name, job in needs.items()} | {"seed": str(seed)}
        identity = hashlib.sha256("\0".join(_replaced(word, named) for word in words).encode()).hexdigest()[:10]
        if identity not in self._made:
            out = self._folder / f"{step}-{identity}"
            values = {name: str(job.folder) for name, job in needs.items()} | {"seed": str(seed), "out": str(out)}
            command = tuple(_replaced(word, values) for word in words)
            self._made[identity] = Job(f"{step} of {row}, seed {seed}", command, out, tuple(needs.values()))
        return self._made[identity]


def _filled(text: str, variables: Mapping[str, str], step: str) -> str:
    """`text` with its variables replaced by their values, until none is left."""
    for _ in range(len(variables) + 1):
        found = {name: variables[name] for name in PLACEHOLDER.findall(text) if name in variables}
        if not found:
            return text
        text = _replaced(text, found)
    raise ConfigError(f"steps: {step}: its variables stand for one another without end")


def _words(command: str, step: str) -> list[str]:
    """The words of a command as a shell takes them apart; there is at least one that is not empty, the program."""
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise ConfigError(f"steps: {step}: {str(error).lower()}: correct the quotes in {shown(command)}") from None
    if not words or not words[0]:
        raise ConfigError(f"steps: {step} is {shown(command)}: it must begin with a program, such as python")
    return words


def _replaced(text: str, values: Mapping[str, str]) -> str:
    return PLACEHOLDER.sub(lambda found: values.get(found[1], found[0]), text)
