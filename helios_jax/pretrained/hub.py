"""Files of hub repositories; every failure of the hub becomes one line."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from helios_jax.messages import one_line
from helios_jax.pretrained.errors import CheckpointError

Result = TypeVar("Result")

# Errors of huggingface_hub by name, the special ones first, and what a user can do. Their own texts have many lines.
REASONS = (
    ("GatedRepoError", "it is gated: accept its terms on huggingface.co and log in with `hf auth login`"),
    ("RepositoryNotFoundError", "there is no such repository, or it is private: check the name, or log in"),
    ("RevisionNotFoundError", "it has no such revision: check the branch, tag or commit"),
    (
        "LocalEntryNotFoundError",
        "the hub cannot be reached and the cache does not hold it: connect, or download it first",
    ),
    ("OfflineModeIsEnabled", "HF_HUB_OFFLINE is set and the cache does not hold it: unset it, or download it first"),
    ("EntryNotFoundError", "it has no such file: check the name"),
)


def check_hub_name(name: str | Path) -> None:
    """Raises `CheckpointError` if `name`, which is not a folder, cannot be a hub repository either."""
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", str(name)):
        raise CheckpointError(
            f"no folder {name}: give a diffusers folder or a hub name such as BestWishYsh/Helios-Base"
        )


def from_hub(name: str | Path, ask: Callable[[], Result]) -> Result:
    """Calls `ask()`, which talks to the hub. Raises `CheckpointError` with the reason if it fails."""
    try:
        return ask()
    except Exception as error:  # huggingface_hub raises classes of its own, of httpx and of the system
        raise CheckpointError(f"no folder {name}, and the hub does not give it: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    kinds = [kind.__name__ for kind in type(error).__mro__]
    for kind, reason in REASONS:
        if kind in kinds:
            return reason
    return f"{kinds[0]}: {one_line(error)}" if str(error).strip() else kinds[0]


def list_files(name: str | Path, revision: str | None = None) -> list[str]:
    """The files of a hub repository; without a connection, those of its snapshot in the cache."""
    from huggingface_hub import constants, model_info, snapshot_download

    def ask() -> list[str]:  # list_repo_files would try for half a minute where there is no connection
        told = model_info(str(name), revision=revision, timeout=constants.HF_HUB_ETAG_TIMEOUT)
        return [file.rfilename for file in told.siblings or ()]

    try:
        return from_hub(name, ask)
    except CheckpointError:
        try:
            folder = Path(snapshot_download(str(name), revision=revision, local_files_only=True))
        except Exception:  # nothing is cached: the first error says why the hub was of no help
            folder = None
        if folder is None:
            raise
        return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
