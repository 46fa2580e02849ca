"""Input images and videos by http and https: downloaded to a temporary file, within limits of size and time."""

import http.client
import logging
import os
import re
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from helios_jax.locations import PACKAGES, LocationError, local_copy, location
from helios_jax.messages import one_line
from helios_jax.runtime import interrupts

log = logging.getLogger(__name__)

MOST_BYTES = {"image": 100_000_000, "video": 4_000_000_000}
SILENCE = 30.0  # seconds without a byte
MOST_SECONDS = 1800.0
BLOCK = 1 << 20
SCHEME = re.compile(r"([a-z][a-z0-9+.-]*)://", re.IGNORECASE)
KEPT = "%/:=&?~#+!$,;'@()*[]"  # characters that stay in an address; all others are quoted


class _TooLargeError(Exception):
    pass


def _opener() -> urllib.request.OpenerDirector:
    """An opener that knows http and https only, so that a redirection cannot lead to a file."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler,
        urllib.request.UnknownHandler,
        urllib.request.HTTPHandler,
        urllib.request.HTTPSHandler,
        urllib.request.HTTPDefaultErrorHandler,
        urllib.request.HTTPRedirectHandler,
        urllib.request.HTTPErrorProcessor,
    ):
        opener.add_handler(handler())
    return opener


def is_url(name: str | os.PathLike) -> bool:
    """True for an http or https address."""
    scheme = SCHEME.match(str(name))
    return scheme is not None and scheme[1].lower() in ("http", "https")


@contextmanager
def local(name: str | os.PathLike, kind: str) -> Iterator[Path]:
    """Yields a local file with the content of `name`: a path, a file of a bucket, or an http or https address.

    `kind`, "image" or "video", decides how large a download may be. Raises ValueError, in one line that begins with the
    address, if it cannot be downloaded or has another scheme. In errors that the caller raises about the temporary
    file, the address takes the place of its name.
    """
    if not is_url(name):
        try:
            path = location(name)
        except LocationError as error:
            if not (scheme := SCHEME.match(str(name))) or scheme[1] in PACKAGES:
                raise
            text = f"{name}: {scheme[1]} is not read; name a file, or an address of http or https"
            raise ValueError(text) from error
        with local_copy(path) as file:
            yield file
        return
    with tempfile.NamedTemporaryFile(prefix="helios-") as file, interrupts.temporary(file.name):
        log.info("downloading %s", name)
        _fetch(str(name), file, MOST_BYTES[kind])
        file.flush()
        try:
            yield Path(file.name)
        except (ValueError, FileNotFoundError) as error:
            raise type(error)(str(error).replace(file.name, str(name))) from None


def _fetch(url: str, file: IO[bytes], most: int) -> None:
    end, got = time.monotonic() + MOST_SECONDS, 0
    try:
        request = urllib.request.Request(urllib.parse.quote(url, safe=KEPT), headers={"User-Agent": "helios_jax"})
        with _opener().open(request, timeout=SILENCE) as response:
            length = int(response.headers.get("Content-Length") or 0)
            if length > most:
                raise _TooLargeError
            while block := response.read(BLOCK):
                got += len(block)
                if got > most:
                    raise _TooLargeError
                if time.monotonic() > end:
                    raise TimeoutError(f"not done in {MOST_SECONDS:.0f} s")
                file.write(block)
            if got < length:
                raise TimeoutError(f"{got} of {length} bytes came")
    except urllib.error.HTTPError as error:
        raise _failed(url, f"{error.code} {error.reason}") from None
    except urllib.error.URLError as error:
        raise _failed(url, error.reason) from None
    except _TooLargeError:
        text = f"{url}: larger than {most // 1_000_000} MB; name a smaller file, or download it first"
        raise ValueError(text) from None
    except (OSError, http.client.HTTPException, ValueError) as error:  # ValueError: not a valid address
        raise _failed(url, error) from None


def _failed(url: str, reason: object) -> ValueError:
    text = getattr(reason, "strerror", None) or one_line(reason)
    return ValueError(f"{url}: cannot be downloaded ({text}); check the address and the network, or name a file")
