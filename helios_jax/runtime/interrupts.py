"""Ctrl-C and SIGTERM: a process ends with one line and exit code 130, at once or at its next `check`.

No handler raises an exception: Python runs handlers between any two instructions, and an exception out of a
`__del__` or a callback of the garbage collector is printed and lost. Handlers here do nothing. The signal's number
goes through a socket to a thread, which is not held up by a main thread that waits in a compiler, say. The thread ends
the process, unless a video is being made (`deferred`): then it leaves the signal to `check`, which the main thread
calls between steps and which raises `Interrupted` there. A second signal ends the process at once.

This module imports nothing that takes time: `install` comes before anything that does.
"""

import contextlib
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import NoReturn

EXIT_CODE = 130
SIGNALS = (signal.SIGINT, signal.SIGTERM)
# Seconds that a main thread which has nothing to keep yet may take to reach a `check`: longer is a compilation.
PATIENCE = 1.0
# Seconds in which one signal may arrive twice: `timeout` sends it to a process and to its group.
TWICE = 0.3
POLL = 0.005  # seconds between two tests of a condition that is waited for


class Interrupted(KeyboardInterrupt):
    """Raised by `check`, which has printed its line."""


class _State:
    """State of the signal handling, of which a process has one."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.program = os.path.basename(sys.argv[0] if sys.argv else "")
        self.deferring = False  # a video is being made
        self.keeping = False  # there are frames in its file
        self.came: signal.Signals | None = None
        self.noticed = threading.Event()
        self.temporary: set[str] = set()
        self.at_leave: list[Callable[[], None]] = []


_state = _State()


def install(program: str) -> None:
    """Handles SIGINT and SIGTERM from now on, in the name of `program`. A signal that was ignored stays ignored."""
    _state.program = program
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
    threading.Thread(target=_watch, args=(ours, theirs), name="interrupts", daemon=True).start()
    for number in SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, lambda *_: None)


@contextlib.contextmanager
def deferred() -> Iterator[None]:
    """Leaves signals to `check` while a video is made, and raises `Interrupted` at the end if one came."""
    check()
    with _state.lock:
        _state.deferring = True
    try:
        yield
    finally:
        with _state.lock:
            _state.deferring = _state.keeping = False
    check()


@contextlib.contextmanager
def temporary(path: str | os.PathLike) -> Iterator[None]:
    """The file at `path` is removed, too, if a signal ends the process at once; else whoever made it removes it."""
    name = os.fspath(path)
    with _state.lock:
        _state.temporary.add(name)
    try:
        yield
    finally:
        with _state.lock:
            _state.temporary.discard(name)


def pause() -> int:
    """Leaves signals to the handlers that are set next; `resume` takes the result and undoes it."""
    return signal.set_wakeup_fd(-1)


def resume(paused: int) -> None:
    """Handles signals again if they were handled before `pause`."""
    signal.set_wakeup_fd(paused, warn_on_full_buffer=False)


def keep() -> None:
    """Says that the video's file holds something from now on, so that a signal always waits for a `check`."""
    with _state.lock:
        _state.keeping = True


def check() -> None:
    """Raises `Interrupted` if a signal came while it was `deferred`; the first time, a line says so."""
    if _state.came is None:
        return
    if not _state.noticed.is_set():
        _state.noticed.set()
        print(f"{_state.program}: interrupted by {_state.came.name}", file=sys.stderr, flush=True)
    raise Interrupted


def wait(ready: Callable[[], bool]) -> None:
    """Waits until `ready()`, with a `check` between."""
    while not ready():
        check()
        time.sleep(POLL)


def at_leave(action: Callable[[], None]) -> None:
    """Calls `action`, which must not wait for anything, when `leave` ends the process."""
    _state.at_leave.append(action)


def end(line: str, code: int) -> NoReturn:
    """Ends the process at once with a line in the program's name, whatever its main thread waits for."""
    with contextlib.suppress(OSError):
        os.write(2, f"{_state.program}: {line}\n".encode())
    leave(code)


def leave(code: int) -> NoReturn:
    """Ends the process at once, without waiting for the work that a device's queue holds."""
    # In a thread: a reader of our output that has stopped reading would hold up the flush for ever.
    flush = threading.Thread(target=_flush, daemon=True)
    flush.start()
    flush.join(PATIENCE)
    for action in _state.at_leave:
        action()
    os._exit(code)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # nobody reads it any more
            stream.flush()


def _watch(ours: socket.socket, theirs: socket.socket) -> None:
    """Runs the thread, which reads signals from `ours`; `theirs` is a parameter so that it stays open."""
    first = 0.0  # when the first signal came
    patient = False
    while True:
        if not select.select([ours], [], [], PATIENCE if patient else None)[0]:
            patient = False
            with _state.lock:
                if _state.came is not None and not (_state.keeping or _state.noticed.is_set()):
                    _end(_state.came)
            continue
        for byte in ours.recv(64):
            if byte not in SIGNALS:  # another handler's
                continue
            with _state.lock:
                if not _state.deferring or (_state.came is not None and time.monotonic() - first > TWICE):
                    _end(signal.Signals(byte))
                if _state.came is None:
                    _state.came, first, patient = signal.Signals(byte), time.monotonic(), True


def _end(number: signal.Signals) -> None:
    for name in _state.temporary:
        with contextlib.suppress(OSError):
            os.unlink(name)
    again = " again, ended at once" if _state.noticed.is_set() else ""
    # Straight to the file: the main thread may hold the lock of sys.stderr. A bar hides the cursor.
    shown = "\x1b[?25h\r" if os.isatty(2) else ""
    with contextlib.suppress(OSError):
        os.write(2, f"{shown}{_state.program}: interrupted by {number.name}{again}\n".encode())
    leave(EXIT_CODE)
