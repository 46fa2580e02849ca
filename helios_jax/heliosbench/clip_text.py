"""CLIP's tokenizer, made from the vocabulary file that its releases share."""

import gzip
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import models, pre_tokenizers

from helios_jax.models.tokenizer import prompt_clean
from helios_jax.pretrained.errors import CheckpointError

CONTEXT = 32  # tokens of a prompt that ViCLIP reads; the rest is cut off
VOCABULARY = 49408
MERGES = VOCABULARY - 2 * 256 - 2
START, END = "<|startoftext|>", "<|endoftext|>"
# Bytes that stand for themselves; the others take the letters from 256 on.
PLAIN = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"


class ClipTokenizer:
    """Texts to tokens; raises CheckpointError for a file that is not CLIP's vocabulary."""

    def __init__(self, path: Path):
        try:
            lines = gzip.decompress(path.read_bytes()).decode("utf-8").split("\n")
        except (OSError, EOFError, ValueError) as error:
            raise CheckpointError(f"{path} cannot be read ({error}): download it again") from None
        pairs = [line.split() for line in lines[1 : MERGES + 1]]
        letters = [chr(byte) for byte in PLAIN] + [chr(256 + i) for i in range(256 - len(PLAIN))]
        words = [*letters, *(f"{letter}</w>" for letter in letters), *map("".join, pairs), START, END]
        if any(len(pair) != 2 for pair in pairs) or len(set(words)) != len(words):
            raise CheckpointError(f"{path} is not CLIP's vocabulary, a pair of parts a line: download it again")
        self._ids = {word: i for i, word in enumerate(words)}
        self._backend = tokenizers.Tokenizer(
            models.BPE(self._ids, [(first, second) for first, second in pairs], end_of_word_suffix="</w>")
        )
        self._backend.add_special_tokens([START, END])  # also where a text spells them
        self._backend.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(tokenizers.Regex(WORDS), "removed", invert=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )

    def __call__(self, text: str, length: int = CONTEXT) -> np.ndarray:
        """Tokens int32 [length], padded with 0; a long text loses its last tokens, but keeps the end token."""
        tokens = self._backend.encode(prompt_clean(text).lower()).ids
        tokens = [self._ids[START], *tokens[: length - 2], self._ids[END]]
        return np.array(tokens + [0] * (length - len(tokens)), np.int32)
