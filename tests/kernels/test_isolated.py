"""Jobs in a separate process: a job that hangs, dies or breaks the device affects only itself."""

import sys
from contextlib import closing

import pytest

from pallas_kernels.tools import check, isolated, tune

JOBS = """
import os, time
from pallas_kernels.tools import isolated

def job(number):
    print("what a job prints is no answer")
    if number == 1:
        time.sleep(60)
    if number == 2:
        os.abort()
    if number == 3:
        isolated._works = lambda: False
        return {"why": "an illegal access"}
    return {"seconds": number, "process": os.getpid()}

isolated.serve({"device": "an abacus"}, job)
"""


def test_every_job_is_answered_and_a_lost_process_is_replaced():
    with closing(isolated.Apart([sys.executable, "-c", JOBS])) as jobs:
        assert jobs.greeting == {"device": "an abacus"}
        first, second = jobs.ask(0, 60), jobs.ask(4, 60)
        assert (first["seconds"], second["seconds"]) == (0, 4)
        assert first["process"] == second["process"]
        assert jobs.ask(1, 0.5) == {"why": "no answer in 0 s"}
        third = jobs.ask(5, 60)
        assert third["seconds"] == 5
        assert jobs.ask(2, 60) == {"why": "its process ended with SIGABRT"}
        assert jobs.ask(3, 60) == {"why": "an illegal access"}
        fourth = jobs.ask(6, 60)
    assert len({first["process"], third["process"], fourth["process"]}) == 3


def test_worker_that_cannot_start_gives_a_one_line_error():
    with pytest.raises(RuntimeError, match="no worker process could be started: its process ended with exit code 7"):
        isolated.Apart([sys.executable, "-c", "raise SystemExit(7)"])


@pytest.mark.parametrize("command", [check.main, tune.main])
def test_a_limit_below_zero_is_refused(command, capsys):
    with pytest.raises(SystemExit) as end:
        command(["adaln", "--limit", "-1"])
    assert end.value.code == 2
    assert "--limit: must be at least 0 seconds, got -1" in capsys.readouterr().err


def test_job_after_a_failed_one_has_a_working_device(monkeypatch):
    assert isolated._works()
    here = isolated.Here({}, lambda number: {"seconds": number})
    assert here.ask(3, 0) == {"seconds": 3}
