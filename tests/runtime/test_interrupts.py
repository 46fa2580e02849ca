"""Signals: where they end a process, where they wait, and that it takes one line."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
BEGIN = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)
from helios_jax.runtime import interrupts
interrupts.install("sample.py")
heavy = {"jax", "numpy", "yaml", "omegaconf", "rich"} & set(sys.modules)
assert not heavy, heavy

def forever(step=lambda: None):
    print("ready", flush=True)
    while True:
        step()

class Deaf:  # what a handler raises in __del__ is printed and lost
    def __del__(self):
        end = time.monotonic() + 0.01
        while time.monotonic() < end:
            pass
"""
NOTHING_YET = "forever(lambda: Deaf())"
CHECKED = """
try:
    with interrupts.deferred():
        interrupts.keep()
        forever(lambda: (Deaf(), interrupts.check()))
except KeyboardInterrupt:
    print("kept")
    interrupts.leave(interrupts.EXIT_CODE)
"""
COMPILING = "with interrupts.deferred(): forever()"
STUCK = "with interrupts.deferred():\n    interrupts.keep()\n    forever()"
WAITING = CHECKED.replace(
    "forever(lambda: (Deaf(), interrupts.check()))", "forever(lambda: interrupts.wait(lambda: False))"
)
AT_THE_END = """
try:
    with interrupts.deferred():
        print("ready", flush=True)
        sys.stdin.readline()
except interrupts.Interrupted:
    interrupts.leave(interrupts.EXIT_CODE)
"""


def start(script: str) -> subprocess.Popen:
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen([sys.executable, "-c", BEGIN + script], cwd=ROOT, text=True, **pipes)
    assert process.stdout.readline() == "ready\n", process.stderr.read()
    return process


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(
    ("script", "out"),
    [(NOTHING_YET, ""), (CHECKED, "kept\n"), (COMPILING, ""), (WAITING, "kept\n"), (AT_THE_END, "")],
    ids=["nothing yet", "checked", "compiling", "waiting", "at the end"],
)
def test_a_signal_is_one_line_and_130_wherever_it_comes(script, out, number):
    process = start(script)
    time.sleep(0.05)
    process.send_signal(number)
    if script is AT_THE_END:
        time.sleep(0.2)
        process.stdin.write("\n")
    assert process.communicate(timeout=10) == (out, f"sample.py: interrupted by {number.name}\n")
    assert process.returncode == 130


def test_a_second_signal_ends_what_is_kept_and_stuck():
    with start(STUCK) as process:
        process.send_signal(signal.SIGINT)
        time.sleep(0.05)
        process.send_signal(signal.SIGTERM)  # as `timeout` does: to the process, and to its group
        time.sleep(1.5)
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        assert process.communicate(timeout=10) == ("", "sample.py: interrupted by SIGTERM\n")
        assert process.returncode == 130


def test_a_signal_that_the_parent_ignores_stays_ignored():
    script = BEGIN.replace("signal.default_int_handler", "signal.SIG_IGN") + "print('ready', flush=True)\ninput()"
    with subprocess.Popen(
        [sys.executable, "-c", script], cwd=ROOT, text=True, stdin=-1, stdout=-1, stderr=-1
    ) as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        assert process.communicate("\n", timeout=10) == ("", "")
        assert process.returncode == 0
