"""Hands: several jobs at a time, in threads; the first that fails stops the others. Knows nothing of files."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from threading import Condition, Event, Thread

Job = Callable[[Callable[[], None]], object]
"""A job is given a function and calls it between its steps: it ends the job when another one failed."""


class _Stopped(Exception):
    """Ends a job because another one failed."""


class _Crew:
    """The jobs, and what became of them."""

    def __init__(self, jobs: Sequence[Job]) -> None:
        self.stopped = Event()
        self.state = Condition()
        self.waiting = deque(enumerate(jobs))
        self.at_work: list[int] = []
        self.failures: dict[int, BaseException] = {}

    def work(self) -> None:
        """Do jobs until none waits, or one has failed."""
        while True:
            with self.state:
                if self.stopped.is_set() or not self.waiting:
                    return
                number, job = self.waiting.popleft()
                self.at_work.append(number)
            try:
                job(self.check)
            except _Stopped:
                pass
            except BaseException as error:
                self.failures[number] = error
                self.stopped.set()
            finally:
                with self.state:
                    self.at_work.remove(number)
                    self.state.notify_all()

    def check(self) -> None:
        if self.stopped.is_set():
            raise _Stopped


def together(jobs: Sequence[Job], hands: int) -> None:
    """Do all jobs, at most `hands` of them at a time, begun in their order; one after the other when `hands` is 1.

    When one fails, no other begins, those at work end at their next step, and the error of the first that failed, in the order of the
    jobs, is raised. Ctrl-C stops them in the same way. No job is at work any more when this returns.
    """
    crew = _Crew(jobs)
    if min(hands, len(jobs)) < 2:
        crew.work()
    else:
        # No thread is joined: a join that Ctrl-C interrupts takes the thread for one that ended.
        try:
            for _ in range(min(hands, len(jobs))):
                Thread(target=crew.work).start()
            with crew.state:
                crew.state.wait_for(lambda: crew.stopped.is_set() or not (crew.waiting or crew.at_work))
        finally:
            crew.stopped.set()
            with crew.state:
                crew.state.wait_for(lambda: not crew.at_work)
    if crew.failures:
        raise crew.failures[min(crew.failures)]
