"""Several jobs at a time: all are done, the first that fails stops the others, nothing is at work afterwards."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from layercut import hands
from layercut.hands import together

HANGS = 300
"""Seconds after which something counts as hanging, on a busy machine too."""


def waits(check, seconds=HANGS):
    """A job that ends only when it is stopped, or fails the test."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        check()
        time.sleep(0.001)
    raise AssertionError("nobody stopped this job")


@pytest.mark.parametrize("width", [1, 2, 3, 10])
def test_all_jobs_are_done_once(width):
    done = []
    together([lambda check, number=number: done.append(number) for number in range(7)], width)
    assert sorted(done) == list(range(7))
    if width == 1:
        assert done == list(range(7))


@pytest.mark.parametrize("width", [1, 4])
def test_no_jobs_are_no_work(width):
    together([], width)


def test_one_hand_and_one_job_need_no_thread():
    seen = []
    together([lambda check: seen.append(threading.current_thread())] * 2, 1)
    together([lambda check: seen.append(threading.current_thread())], 4)
    assert seen == [threading.main_thread()] * 3


def test_never_more_at_a_time_than_there_are_hands():
    lock, at_work, most, three = threading.Lock(), [], [], threading.Barrier(3, timeout=HANGS)

    def job(check):
        with lock:
            at_work.append(1)
            most.append(len(at_work))
        three.wait()  # all hands have a job now: time for a fourth, if there were one
        time.sleep(0.002)
        with lock:
            at_work.pop()

    together([job] * 12, 3)
    assert max(most) == 3


def test_they_really_are_at_work_together():
    """Each waits for the other, so one after the other would never end."""
    barrier = threading.Barrier(2, timeout=HANGS)
    together([lambda check: barrier.wait()] * 2, 2)


def test_the_first_failure_stops_those_at_work_and_those_to_come():
    begun = []

    def fails(check):
        begun.append("fails")
        raise OSError("full")

    def never(check):
        begun.append("never")

    with pytest.raises(OSError, match=r"^full$"):
        together([waits, fails, never, never], 2)
    assert begun == ["fails"]


def test_of_two_failures_the_earlier_job_counts():
    barrier = threading.Barrier(2, timeout=HANGS)

    def fails(number):
        def job(check):
            barrier.wait()
            raise ValueError(number)

        return job

    with pytest.raises(ValueError, match=r"^1$"):
        together([fails(1), fails(2)], 2)


def test_one_after_the_other_ends_at_the_failure():
    done = []

    def fails(check):
        raise ValueError("no")

    with pytest.raises(ValueError, match=r"^no$"):
        together([lambda check: done.append(1), fails, lambda check: done.append(3)], 1)
    assert done == [1]


def test_jobs_that_are_not_stopped_may_ask_as_often_as_they_like():
    counts = []
    together([lambda check: counts.append([check() for _ in range(50)])] * 2, 2)
    assert counts == [[None] * 50] * 2


CTRL_C = """
import os, time
from layercut.hands import together
count = 0
def waits(check):
    global count
    count += 1
    os.write(1, b"at work\\n")
    try:
        while True:
            check()
            time.sleep(0.001)
    finally:
        time.sleep(0.1)
        count -= 1
try:
    together([waits, waits, lambda check: print("begun too late", flush=True)], 2)
except KeyboardInterrupt:
    print("left", count, flush=True)
"""


def test_ctrl_c_stops_all_of_them():
    environment = {**os.environ, "PYTHONPATH": str(Path(hands.__file__).parents[1])}
    process = subprocess.Popen(
        [sys.executable, "-c", CTRL_C],
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
        # A shell that starts its jobs in the background has them ignore Ctrl-C.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert process.stdout is not None
    assert [process.stdout.readline(), process.stdout.readline()] == ["at work\n"] * 2
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=HANGS)[0] == "left 0\n"
    assert process.returncode == 0
