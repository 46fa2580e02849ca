"""Prompts to keys and values: each text is encoded once, and projected once for consecutive chunks that share it."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from helios_jax.models import umt5
from helios_jax.models.tokenizer import Tokenizer
from helios_jax.models.transformer import Transformer
from helios_jax.models.umt5 import UMT5Encoder
from helios_jax.runtime.offload import on_device
from helios_jax.runtime.program import program
from helios_jax.sampling.prompts import Mixture, Prompts


@program()
def encode_text(encoder: UMT5Encoder, ids: Array, mask: Array) -> Array:
    with jax.named_scope("text_encoder"):
        return umt5.encode(encoder, ids, mask)


@program()
def text_kv(transformer: Transformer, embeddings: Array) -> Any:
    return transformer.text_kv(embeddings.astype(transformer.dtype))


def encode_prompts(
    encoder: UMT5Encoder, tokenizer: Tokenizer, prompts: Sequence[str], max_sequence_length: int | None
) -> Array:
    """Text embeddings [b, m, d], zero past each prompt's end; m is `max_sequence_length` or the tokenizer's limit.

    An encoder in host memory is copied to the device for this call. Raises ValueError for a length below 1.
    """
    length = tokenizer.max_length if max_sequence_length is None else max_sequence_length
    if length < 1:
        raise ValueError(f"max_sequence_length must be at least 1, got {length}")
    ids, mask = tokenizer(list(prompts), length)
    return encode_text(on_device(encoder), jnp.asarray(ids), jnp.asarray(mask))


class Texts:
    """Cache of the text embeddings of one call. `negatives` are one per video, or empty without guidance."""

    def __init__(self, embed: Callable[[Sequence[str]], Array], transformer: Transformer, negatives: Sequence[str]):
        self.negatives = tuple(negatives)
        self._embed = embed
        self._transformer = transformer
        self._known: dict[Prompts, Array] = {}
        self._last: tuple[Mixture, Any] | None = None

    def encode(self, batches: Sequence[Prompts]) -> None:
        """Encodes the batches that are new; a batch is one prompt per video."""
        for prompts in batches:
            if prompts not in self._known:
                self._known[prompts] = self._embed(prompts)
        if self.negatives and self.negatives not in self._known:
            self._known[self.negatives] = self._embed(self.negatives)

    def forget(self, batches: Sequence[Prompts]) -> None:
        """Drops all embeddings but those of `batches` and of the negative prompts."""
        keep = {*batches, self.negatives}
        self._known = {prompts: value for prompts, value in self._known.items() if prompts in keep}

    def embeddings(self, mixture: Mixture) -> Array:
        """[b, m, d] of the weighted prompts, then of the negative prompts."""
        self.encode([prompts for prompts, _ in mixture])
        (prompts, weight), *rest = mixture
        out = self._known[prompts] if weight == 1.0 else weight * self._known[prompts]
        for prompts, weight in rest:
            out = out + weight * self._known[prompts]
        return jnp.concatenate([out, self._known[self.negatives]]) if self.negatives else out

    def kv(self, mixture: Mixture) -> Any:
        """Keys and values of `embeddings(mixture)`; those of the last mixture are cached."""
        if self._last is None or self._last[0] != mixture:
            self._last = None  # frees the memory for the new ones
            self._last = (mixture, text_kv(self._transformer, self.embeddings(mixture)))
        return self._last[1]
