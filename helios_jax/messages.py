"""Errors in messages of one line."""

MOST = 300  # characters


def one_line(error: object) -> str:
    """The text of an error on one line, cut after `MOST` characters; the name of its class if it has no text."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= MOST else f"{text[: MOST - 3]}..."
