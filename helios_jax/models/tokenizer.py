"""Prompts to token ids, with the `tokenizers` package alone."""

import html
import json
import re
import warnings
from pathlib import Path

import ftfy
import numpy as np
import tokenizers

from helios_jax.locations import location

PAD, END = 0, 1
LIMIT = 512  # tokens of a prompt
FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "spiece.model")


def prompt_clean(text: str) -> str:
    """Repairs mojibake, unescapes HTML entities (also doubly escaped ones) and makes each run of white space one space.

    Helios' training captions were cleaned like this, and diffusers' HeliosPipeline does the same.
    """
    text = html.unescape(html.unescape(ftfy.fix_text(text))).strip()
    return re.sub(r"\s+", " ", text).strip()


class Tokenizer:
    """The tokenizer of UMT5, as its tokenizer.json describes it.

    transformers before version 5, with which Helios was trained, gives the same ids. Version 5 rebuilds the steps
    before the vocabulary from its own code, which differs if a file has other steps than T5's.
    """

    def __init__(self, backend: tokenizers.Tokenizer, folder: Path, max_length: int):
        self._backend = backend
        self._folder = folder
        self.max_length = max_length  # at most LIMIT

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "Tokenizer":
        """The tokenizer in `folder`, of which tokenizer.json is needed.

        Raises:
            ValueError: the file is missing or broken, or it is not a tokenizer with `<pad>` 0 that ends with `</s>` 1.
        """
        folder = location(folder)
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise ValueError(f"{path} is missing: copy the tokenizer folder of a Helios or Wan 2.1 checkpoint")
        try:
            backend = tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8"))
        except Exception as error:  # the package raises nothing narrower
            raise ValueError(f"{path} is not a tokenizer ({error}): download it again") from None
        for token, number in (("<pad>", PAD), ("</s>", END)):
            if backend.token_to_id(token) != number:
                raise ValueError(
                    f"{path} gives {token} the id {backend.token_to_id(token)}, UMT5 {number}: not its file"
                )
        backend.no_truncation()
        backend.no_padding()
        if _encoded(backend, path) != [END]:
            raise ValueError(f"{path} does not end a prompt with </s>, UMT5 does: not its file")
        return cls(backend, folder, _limit(folder / "tokenizer_config.json"))

    @property
    def vocab_size(self) -> int:
        """The number of token ids."""
        return self._backend.get_vocab_size()

    def __call__(self, prompts: list[str], max_length: int) -> tuple[np.ndarray, np.ndarray]:
        """Ids (int32, 0 after the end) and mask (bool) of the cleaned `prompts`, both [b, max_length].

        A prompt that is too long loses its last tokens, not its `</s>`, with a warning.
        """
        ids = np.full((len(prompts), max_length), PAD, np.int32)
        mask = np.zeros((len(prompts), max_length), bool)
        for i, encoding in enumerate(self._backend.encode_batch([prompt_clean(p) for p in prompts])):
            if len(encoding.ids) > max_length:
                warnings.warn(
                    f"prompt {prompts[i][:30]!r}... has {len(encoding.ids)} tokens, of which {max_length} are used:"
                    " make it shorter",
                    stacklevel=2,
                )
            row = encoding.ids if len(encoding.ids) <= max_length else [*encoding.ids[: max_length - 1], END]
            ids[i, : len(row)] = row
            mask[i, : len(row)] = True
        return ids, mask

    def save_pretrained(self, folder: str | Path) -> None:
        """Copies the tokenizer's files to `folder`."""
        folder = location(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for name in FILES:
            source = self._folder / name
            if source.is_file() and source.resolve() != (folder / name).resolve():
                (folder / name).write_bytes(source.read_bytes())


def _encoded(backend: tokenizers.Tokenizer, path: Path) -> list[int]:
    """The ids of an empty text. Raises ValueError for a tokenizer that cannot make them."""
    try:
        return backend.encode("").ids
    except BaseException as error:  # the package's panics are no Exception
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":
            raise ValueError(f"{path} is not a tokenizer ({error}): download it again") from None
        raise


def _limit(path: Path) -> int:
    """The most tokens of a prompt that a tokenizer_config.json allows; transformers writes 1e30 for no limit."""
    if not path.is_file():
        return LIMIT
    try:
        limit = json.loads(path.read_text(encoding="utf-8")).get("model_max_length")
        limit = LIMIT if limit is None else min(int(limit), LIMIT)
    except (OSError, ValueError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise ValueError(f"{path} is not a tokenizer's config ({error}): download it again") from None
    if limit < 1:
        raise ValueError(f"{path}: model_max_length is {limit}, it must be at least 1: download it again")
    return limit
