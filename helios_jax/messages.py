"""Errors in messages of one line."""

MOST = 300  # characters of an error that others wrote


def one_line(error: object, most: int | None = MOST) -> str:
    """The text of an error on one line, cut after `most` characters; the name of its class if it has no text."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if most is None or len(text) <= most else f"{text[: most - 3]}..."
