"""Checks the arguments of a call and brings them into one form."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from helios_jax.runtime.seeds import check_seed

# One prompt, or a sequence of prompts.
Prompt = str | Sequence[str]


def check_output_type(output_type: str) -> None:
    """Raises ValueError for an unknown output type."""
    if output_type not in ("np", "latent"):
        raise ValueError(f'output_type must be "np" or "latent", got {output_type!r}')


def make_prompts(prompt: Any) -> list[str]:
    """The prompts as a list. Raises ValueError unless `prompt` is a string or a non-empty sequence of strings."""
    prompts = [prompt] if isinstance(prompt, str) else prompt
    if not isinstance(prompts, Sequence) or not prompts or not all(isinstance(text, str) for text in prompts):
        raise ValueError(f"prompt must be a string or a list of at least one, got {prompt!r}")
    return list(prompts)


def make_seeds(seed: int | Sequence[int], prompts: int, videos: int) -> list[int]:
    """One seed per video, prompt by prompt, for `prompts` prompts with `videos` videos each.

    A single number seeds each prompt's first video, and the prompt's next videos get seed + 1, seed + 2, ... A sequence
    has a seed for every video. Raises ValueError for a sequence of another length.
    """
    if not isinstance(seed, Sequence | np.ndarray):
        return [check_seed(check_seed(seed) + i) for i in range(videos)] * prompts
    if len(seed) != prompts * videos:
        raise ValueError(f"seed has {len(seed)} numbers for {prompts * videos} videos: give as many, or one number")
    return [check_seed(one) for one in seed]


def make_negatives(negative_prompt: Prompt | None, count: int) -> list[str]:
    """One negative prompt for each of `count` prompts, empty unless given. Raises ValueError for another number."""
    if negative_prompt is None or isinstance(negative_prompt, str):
        return [negative_prompt or ""] * count
    if len(negative_prompt) != count:
        raise ValueError(
            f"{len(negative_prompt)} negative prompts for {count} prompts: give as many, or one string for all"
        )
    return list(negative_prompt)
