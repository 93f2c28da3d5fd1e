"""A farm whose workers are Ray actors: one process each, on this machine or on a cluster."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

from .errors import RayUnavailableError, WorkerDiedError
from .farm import Work


class RayFarm:
    """Workers on Ray: on the cluster that `RAY_ADDRESS` names or the program has joined, else on this machine.

    A context manager: a Ray that it started, it also ends.

    Args:
        workers: processes at a time; None: as many as the cluster has CPUs for.
        threads: of each worker, and CPUs that it is given.

    Raises:
        RayUnavailableError: Ray is not installed, or does not start.
        ValueError: the cluster does not have the CPUs.
    """

    def __init__(self, workers: int | None = None, threads: int = 1) -> None:
        for name, number in (("workers", workers), ("threads", threads)):
            if number is not None and number < 1:
                raise ValueError(f"{name}={number} is not allowed: 1 or more")
        try:
            import ray
        except ImportError as error:
            raise RayUnavailableError(f"this needs Ray: pip install 'kvpack[ray]' ({error})") from error
        self._ray = ray
        self._started = not ray.is_initialized()
        if self._started:
            _start(ray)
        try:
            self.workers = _check(ray, workers, threads)
        except Exception:
            self.close()
            raise
        self.threads = threads
        self._made: tuple[Callable[[], Work], Any] | None = None
        self._actor = ray.remote(num_cpus=threads, max_restarts=0, max_task_retries=0)(_Actor)

    def __enter__(self) -> RayFarm:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """End the Ray that was started here, and all workers in it."""
        if self._started:
            self._ray.shutdown()

    def start(self, make: Callable[[], Work]) -> Any:
        if self._made is None or self._made[0] is not make:  # into the object store once, not once per worker
            self._made = (make, self._ray.put(make))
        return self._actor.remote(self._made[1], self.threads)

    def submit(self, worker: Any, task: Any) -> Any:
        return worker.do.remote(task)

    def wait(self, tickets: Sequence[Any]) -> Any:
        done, _ = self._ray.wait(list(tickets), num_returns=1)
        return done[0]

    def result(self, ticket: Any) -> Any:
        errors = self._ray.exceptions
        try:
            return self._ray.get(ticket)
        except errors.RayTaskError as error:
            cause: Exception = error.cause if isinstance(error.cause, Exception) else error
            raise cause from error
        except errors.RayError as error:  # the actor died or cannot be reached, its memory ran out, ...
            raise WorkerDiedError(f"a worker died: {_first_lines(error)}") from error

    def stop(self, worker: Any) -> None:
        self._ray.kill(worker, no_restart=True)


class _Actor:
    """What runs in a worker's process."""

    def __init__(self, make: Callable[[], Work], threads: int) -> None:
        import torch

        torch.set_num_threads(threads)
        self._make = make
        self._work: Work | None = None

    def do(self, task: Any) -> Any:
        if self._work is None:  # not in __init__, whose error would be that of a worker that died
            self._work = self._make()
        return self._work(task)


def _start(ray: Any) -> None:
    # A cluster that a command starts for its own use reports to nobody.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        ray.init(logging_level="ERROR", log_to_driver=False)
    except Exception as error:
        where = os.environ.get("RAY_ADDRESS")
        what = f"the Ray cluster at RAY_ADDRESS={where} cannot be joined" if where else "Ray does not start here"
        raise RayUnavailableError(f"{what}: {_first_lines(error)}") from error


def _check(ray: Any, workers: int | None, threads: int) -> int:
    """The number of workers; ValueError if they would wait for CPUs that the cluster does not have."""
    sizes = [int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]]
    room = sum(size // threads for size in sizes)
    if room < (workers or 1):
        raise ValueError(
            f"{workers or 1} workers of {threads} threads do not fit on the CPUs of this Ray cluster "
            f"({', '.join(map(str, sizes))}): at most {room} do"
        )
    return workers or room


def _first_lines(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:2]) or type(error).__name__
