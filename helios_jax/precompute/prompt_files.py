"""Files of prompts: text with one prompt per line, or HeliosBench's CSV."""

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from helios_jax.messages import one_line


@dataclass(frozen=True)
class Prompt:
    """A caption and its position in all files together."""

    id: str
    caption: str
    number: int


def read_prompts(files: Sequence[Path]) -> list[Prompt]:
    """The prompts of .txt files (one per line, empty lines skipped) and .csv files (`refined_prompt`, else `prompt`).

    Raises FileNotFoundError or ValueError for a file without prompts.
    """
    prompts: list[Prompt] = []
    for path in files:
        try:
            text = path.read_text(encoding="utf-8-sig")
        except FileNotFoundError:
            raise FileNotFoundError(f"{path}: no such file; name a file of prompts") from None
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: is not in UTF-8 (byte {error.start}); save it in that encoding") from None
        except OSError as error:
            raise ValueError(f"{path}: cannot be read ({one_line(error)})") from None
        rows = _csv(path, text) if path.suffix.lower() == ".csv" else text.splitlines()
        found = [(i, row.strip()) for i, row in enumerate(rows) if row.strip()]
        if not found:
            raise ValueError(f"{path}: holds no prompt; write one on each line")
        prompts += [Prompt(f"{path.stem}_{i:05d}", row, len(prompts) + n) for n, (i, row) in enumerate(found)]
    return prompts


def _csv(path: Path, text: str) -> list[str]:
    reader = csv.DictReader(text.splitlines(keepends=True))
    names = reader.fieldnames or []
    if not {"prompt", "refined_prompt"} & set(names):
        raise ValueError(f"{path}: has no column prompt; it has {', '.join(names) or 'none'}")
    return [row.get("refined_prompt") or row.get("prompt") or "" for row in reader]
