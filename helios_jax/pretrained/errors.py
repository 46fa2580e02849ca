"""The error of checkpoints that cannot be used."""


class CheckpointError(ValueError):
    """A checkpoint that cannot be used. The one-line message names the file, the rule and the remedy."""
