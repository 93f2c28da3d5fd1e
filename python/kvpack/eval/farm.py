"""Tasks done side by side by worker processes, some of which may die.

A farm starts workers; each makes what it needs once (`make()`, a model and the exact cache's results, say) and then
does one task after the other. What a worker's death costs is the task that it was at: another worker gets it.

`kvpack.eval.ray_farm` has the farm that runs on Ray; this file knows no Ray.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from .errors import WorkerDiedError

TRIES = 3

Work = Callable[[Any], Any]
"""Does one task: its argument describes the task, and it returns the result."""


class Farm(Protocol):
    """Where workers come from. Workers and tickets are whatever the farm likes, if it is hashable."""

    workers: int

    def start(self, make: Callable[[], Work]) -> Any:
        """A new worker, which calls `make` once, in its own process."""

    def submit(self, worker: Any, task: Any) -> Any:
        """Give a worker that has none a task; returns a ticket for the result."""

    def wait(self, tickets: Sequence[Any]) -> Any:
        """The first of these tickets to be done, or to have lost its worker."""

    def result(self, ticket: Any) -> Any:
        """The result of a task that is done. WorkerDiedError if its worker died; otherwise the task's own error."""

    def stop(self, worker: Any) -> None:
        """End a worker and give back what it holds."""


def run(
    farm: Farm,
    make: Callable[[], Work],
    tasks: Sequence[Any],
    on_result: Callable[[int, Any], None],
) -> dict[int, Exception]:
    """Do all tasks, on at most `farm.workers` workers at a time; `on_result(index, result)` as they finish.

    A task whose worker dies is tried again, up to TRIES times, on another worker and after the others. An error of one
    task does not stop the others. Where no worker ever answers, the run ends early.

    Returns the errors of the tasks that failed, by index.
    """
    waiting = deque(range(len(tasks)))
    running: dict[Any, tuple[Any, int]] = {}
    workers: set[Any] = set()  # alive
    idle: list[Any] = []
    deaths: Counter[int] = Counter()
    failed: dict[int, Exception] = {}
    alive = False  # whether any worker ever answered
    try:
        while waiting or running:
            while waiting and len(running) < farm.workers:
                worker = idle.pop() if idle else farm.start(make)
                workers.add(worker)
                index = waiting.popleft()
                running[farm.submit(worker, tasks[index])] = (worker, index)
            ticket = farm.wait(list(running))
            worker, index = running.pop(ticket)
            try:
                result = farm.result(ticket)
            except WorkerDiedError as error:
                workers.remove(worker)
                deaths[index] += 1
                if deaths[index] < TRIES:
                    waiting.append(index)
                else:
                    failed[index] = error
                if not alive and deaths.total() >= TRIES * farm.workers:
                    failed.update(dict.fromkeys(waiting, error))
                    waiting.clear()
                continue
            except Exception as error:
                failed[index] = error
            else:
                on_result(index, result)
            alive = True
            if waiting:
                idle.append(worker)
            else:  # what it holds may be what the next worker waits for
                workers.remove(worker)
                farm.stop(worker)
    finally:
        for worker in workers:
            farm.stop(worker)
    return failed
