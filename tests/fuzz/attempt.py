"""Answers of a command to an input: the exit code, the lines, and whether a person can use them."""

import contextlib
import io
import json
import os
import signal
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LIMIT = 60  # seconds after which an input counts as a hang
MOST = 8000  # letters of a line, which may repeat what was given
FAILURES: list[str] = []
COUNTS = Path(os.environ.get("FUZZ_COUNTS", "/dev/null"))


class Hang(BaseException):
    """An input that is not answered within `LIMIT`."""


@dataclass(frozen=True)
class Outcome:
    """The exit code of a command and the lines that it wrote to stderr; `error` is a traceback, or a hang."""

    code: int | None
    lines: list[str]
    error: str = ""

    @property
    def kind(self) -> str:
        if self.error:
            return "hang" if self.error.startswith("hang") else "traceback"
        if self.code == 0:
            return "accepted"
        errors = [line for line in self.lines if ": warning: " not in line and " by xla (" not in line]
        return "refused" if self.code in (1, 2) and len(errors) == 1 and len(errors[0]) < MOST else "unclear"


def command(main: Callable[[list[str]], int], argv: Sequence[Any]) -> Outcome:
    """Runs a command line in this process."""
    out, err = io.StringIO(), io.StringIO()
    code, error = None, ""
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        error, code = _within_limit(lambda: main([str(text) for text in argv]))
    return Outcome(code, [line for line in err.getvalue().splitlines() if line.strip()], error)


def call(function: Callable[[], Any], errors: tuple[type[Exception], ...] = (ValueError, FileNotFoundError)) -> Any:
    """(outcome, result) of a call, of which `errors` are the refusals that the command prints as its one line."""
    result, lines, code = None, [], 0

    def run() -> int:
        nonlocal result
        try:
            result = function()
            return 0
        except errors as error:
            lines.extend(str(error).splitlines() or [""])
            return 2

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        error, code = _within_limit(run)
    return Outcome(code, lines, error), result


def _within_limit(run: Callable[[], int]) -> tuple[str, int | None]:
    def stop(*_: Any) -> None:
        raise Hang

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(LIMIT)
    try:
        return "", run()
    except SystemExit as end:  # argparse
        return "", int(end.code) if isinstance(end.code, int) else 2
    except Hang:
        return f"hang: {traceback.format_exc()}", None
    except BaseException:
        return traceback.format_exc(), None
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def judge(area: str, outcome: Outcome, given: Any, wrong: str = "") -> None:
    """Counts an outcome; unless it is a right answer, the test fails at its end. `wrong` says what is wrong with it."""
    kind = "wrong" if wrong and outcome.kind == "accepted" else outcome.kind
    with COUNTS.open("a") as file:
        file.write(json.dumps({"area": area, "kind": kind}) + "\n")
    if kind not in ("accepted", "refused"):
        shown = "\n".join([*outcome.lines[:5], *outcome.error.splitlines()[-12:]])
        FAILURES.append(f"{area}: {kind} {wrong}\ngiven {given!r}\n{shown}\n")


def counts(path: Path) -> dict[str, Counter[str]]:
    """The numbers of each kind of outcome, by area."""
    found: dict[str, Counter[str]] = {}
    for line in path.read_text().splitlines():
        row = json.loads(line)
        found.setdefault(row["area"], Counter())[row["kind"]] += 1
    return found
