"""Work side by side: scheduling and the death of workers on a farm of this file; the same on Ray, where it is there."""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kvpack.eval import (
    CacheSpec,
    IncompleteSweepError,
    NothingPackedError,
    RayFarm,
    RayUnavailableError,
    WorkerDiedError,
    farm,
    grid,
    sweep,
    sweeps,
)
from kvpack.eval.models import LoadedModel


class Killed(Exception):
    """Raised by a task: its worker dies here."""


class FakeFarm:
    """Workers are numbers. Tasks run when they are waited for, the newest first; a Killed ends its worker."""

    def __init__(self, workers: int) -> None:
        self.workers = workers
        self.works: dict[int, farm.Work] = {}
        self.started = 0
        self.most = 0
        self.pending: dict[int, tuple[int, Any]] = {}
        self.tickets = 0

    def start(self, make: Callable[[], farm.Work]) -> int:
        self.started += 1
        self.works[self.started] = make()
        self.most = max(self.most, len(self.works))
        return self.started

    def submit(self, worker: int, task: Any) -> int:
        assert worker in self.works, "a dead or stopped worker got a task"
        assert worker not in [busy for busy, _ in self.pending.values()], "a busy worker got a task"
        self.tickets += 1
        self.pending[self.tickets] = (worker, task)
        return self.tickets

    def wait(self, tickets: Sequence[int]) -> int:
        assert sorted(tickets) == sorted(self.pending)
        return max(tickets)

    def result(self, ticket: int) -> Any:
        worker, task = self.pending.pop(ticket)
        try:
            return self.works[worker](task)
        except Killed as error:
            del self.works[worker]
            raise WorkerDiedError("a worker died") from error

    def stop(self, worker: int) -> None:
        self.works.pop(worker, None)


def run(fake: FakeFarm, work: Callable[[], farm.Work], tasks: Sequence[Any]) -> tuple[dict[int, Any], dict[int, Any]]:
    results: dict[int, Any] = {}
    failed = farm.run(fake, work, tasks, results.__setitem__)
    assert not fake.works, "workers were left running"
    assert fake.most <= fake.workers
    return results, failed


@pytest.mark.parametrize("workers", [1, 2, 3, 9])
def test_every_task_is_done_once(workers: int) -> None:
    fake = FakeFarm(workers)
    done: Counter[int] = Counter()

    def make() -> farm.Work:
        return lambda n: (done.update([n]), n * n)[1]

    assert run(fake, make, range(7)) == ({n: n * n for n in range(7)}, {})
    assert set(done.values()) == {1}
    assert fake.started == min(workers, 7)


def test_nothing_to_do_starts_nothing() -> None:
    fake = FakeFarm(3)
    assert run(fake, lambda: str, []) == ({}, {})
    assert fake.started == 0


@pytest.mark.parametrize("workers", [1, 2])
def test_a_task_whose_worker_dies_is_tried_again_on_another(workers: int) -> None:
    fake = FakeFarm(workers)
    tries: Counter[int] = Counter()

    def make() -> farm.Work:
        def work(n: int) -> int:
            tries[n] += 1
            if n == 1 and tries[n] < farm.TRIES:
                raise Killed
            return n

        return work

    assert run(fake, make, range(4)) == ({n: n for n in range(4)}, {})
    assert tries == {0: 1, 1: farm.TRIES, 2: 1, 3: 1}
    assert fake.started > workers


def test_a_task_that_kills_every_worker_fails_alone() -> None:
    fake = FakeFarm(2)

    def make() -> farm.Work:
        def work(n: int) -> int:
            if n == 0:
                raise Killed
            return n

        return work

    results, failed = run(fake, make, range(5))
    assert results == {n: n for n in range(1, 5)}
    assert list(failed) == [0]
    assert isinstance(failed[0], WorkerDiedError)


def test_an_error_of_a_task_costs_no_worker() -> None:
    fake = FakeFarm(2)

    def make() -> farm.Work:
        def work(n: int) -> float:
            return 1 / n

        return work

    results, failed = run(fake, make, [1, 0, 2, 0, 4])
    assert results == {0: 1.0, 2: 0.5, 4: 0.25}
    assert {index: type(error) for index, error in failed.items()} == dict.fromkeys((1, 3), ZeroDivisionError)
    assert fake.started == 2


def test_workers_that_only_die_end_the_run() -> None:
    fake = FakeFarm(2)

    def make() -> farm.Work:
        def work(_: int) -> None:
            raise Killed

        return work

    results, failed = run(fake, make, range(50))
    assert results == {}
    assert sorted(failed) == list(range(50))
    assert fake.started < 3 * farm.TRIES


def test_an_interrupt_stops_all_workers() -> None:
    fake = FakeFarm(3)

    def make() -> farm.Work:
        def work(_: int) -> None:
            raise KeyboardInterrupt

        return work

    with pytest.raises(KeyboardInterrupt):
        farm.run(fake, make, range(5), lambda *_: None)
    assert not fake.works


# Sweeps.


def test_a_sweep_on_a_farm_is_the_sweep(tiny: LoadedModel, ids: Tensor, tmp_path: Path) -> None:
    specs = grid(["tq4", "tq3/tq2"], [10, 60])
    want = sweep(tiny, ids, specs)
    seen: list[str] = []
    shown: list[tuple[int, int]] = []
    got = sweep(
        tiny,
        ids,
        specs,
        path=tmp_path / "rows",
        farm=FakeFarm(2),
        progress=lambda _, done, total: shown.append((done, total)),
        on_row=lambda row, known: seen.append(row.label),
    )
    assert [(row.label, row.window) for row in got] == [(row.label, row.window) for row in want]
    assert [row.kld.value for row in got] == pytest.approx([row.kld.value for row in want], rel=1e-6)
    assert sorted(seen) == sorted(row.label for row in want)
    assert shown == [(done, 4) for done in range(5)]
    assert len(list((tmp_path / "rows").iterdir())) == 4  # a file each, and nothing half written


def test_what_was_measured_before_a_worker_died_is_kept(
    tiny: LoadedModel, ids: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    specs = [CacheSpec("tq4", window=10), CacheSpec("tq3", window=10), CacheSpec("tq2", window=10)]
    real = sweeps.divergence
    measured: list[str] = []

    def divergence(model: Any, ids: Any, spec: CacheSpec, *args: Any, **options: Any) -> Any:
        if spec.key == "tq3" and not (tmp_path / "well").exists():
            raise Killed
        measured.append(spec.key)
        return real(model, ids, spec, *args, **options)

    monkeypatch.setattr(sweeps, "divergence", divergence)
    rows = tmp_path / "rows"
    with pytest.raises(IncompleteSweepError, match=r"1 of 3 rows.*tq3 with window 10: a worker died.*rows: run"):
        sweep(tiny, ids, specs, path=rows, farm=FakeFarm(2))
    assert sorted(measured) == ["tq2", "tq4"]
    with pytest.raises(
        IncompleteSweepError, match=r"2 of 4 .*tq3 with window 10, tq3 with window 20: .*`rows`"
    ) as told:
        sweep(tiny, ids, [*specs, CacheSpec("tq3", window=20)], farm=FakeFarm(2))
    assert [row.label for row in told.value.rows] == ["tq4", "tq2"]
    assert list(told.value.failed) == ["tq3 with window 10", "tq3 with window 20"]
    measured = measured[:2]
    (tmp_path / "well").touch()
    got = sweep(tiny, ids, specs, path=rows, farm=FakeFarm(2))
    assert [row.label for row in got] == ["tq4", "tq3", "tq2"]
    assert sorted(measured) == ["tq2", "tq3", "tq4"]
    assert sweep(tiny, ids, specs, path=rows) == got  # without a farm, from the same files


def test_rows_are_taken_over_only_where_all_is_the_same(tiny: LoadedModel, ids: Tensor, tmp_path: Path) -> None:
    taken: list[bool] = []

    def run(**options: Any) -> None:
        sweep(
            tiny.model,
            ids,
            grid(["tq4"], [0]),
            path=tmp_path / "v0.1",
            on_row=lambda _, old: taken.append(old),
            **options,
        )

    run()
    run()
    run(confidence=0.5)
    for parameter in tiny.model.parameters():
        kept = parameter.detach().clone()
        with torch.no_grad():
            parameter.mul_(1.01)
        run()
        with torch.no_grad():
            parameter.copy_(kept)
    assert taken == [False, True, False, *[False for _ in tiny.model.parameters()]]
    assert not (tmp_path / "v0.1.jsonl").exists()


def test_a_place_where_no_rows_can_be_kept(tiny: LoadedModel, ids: Tensor, tmp_path: Path) -> None:
    (tmp_path / "a").write_text("")
    (tmp_path / "b.jsonl").mkdir()
    for name, message in (
        ("a", "it is a file; allowed: a directory"),
        ("b.jsonl", "it is a directory; allowed: a file"),
    ):
        with pytest.raises(ValueError, match=message):
            sweep(tiny.model, ids, grid(["tq4"], [0]), path=tmp_path / name)


def test_a_bad_cache_is_refused_before_any_work(tiny: LoadedModel, ids: Tensor) -> None:
    fake = FakeFarm(2)
    with pytest.raises(NothingPackedError, match="nothing would be packed"):
        sweep(tiny, ids, ["tq4", CacheSpec("tq4", window=1000)], farm=fake)
    assert fake.started == 0


# Ray itself, where it is installed. Functions inside the tests travel by value: the workers need not find this file.


@pytest.fixture
def ray_farm() -> Iterator[Any]:
    pytest.importorskip("ray", reason="Ray is not installed (pip install 'kvpack[ray]')")
    with RayFarm(2) as started:
        yield started


@pytest.mark.full
@pytest.mark.filterwarnings("ignore")  # Ray's own
def test_ray_workers_die_and_are_replaced(ray_farm: Any, tmp_path: Path) -> None:
    def make() -> farm.Work:
        def work(n: int) -> tuple[int, int]:
            marker = tmp_path / str(n)
            if n == 3 and not marker.exists():
                marker.touch()
                os.kill(os.getpid(), 9)
            if n == 4:
                raise ValueError("four")
            return n * n, os.getpid()

        return work

    results: dict[int, tuple[int, int]] = {}
    failed = farm.run(ray_farm, make, range(7), results.__setitem__)
    assert {n: result[0] for n, result in results.items()} == {n: n * n for n in (0, 1, 2, 3, 5, 6)}
    assert os.getpid() not in {pid for _, pid in results.values()}
    assert list(failed) == [4]
    assert isinstance(failed[4], ValueError)


@pytest.mark.full
@pytest.mark.filterwarnings("ignore")
def test_a_sweep_on_ray_is_the_sweep(ray_farm: Any, tiny: LoadedModel, ids: Tensor, tmp_path: Path) -> None:
    specs = grid(["tq4", "tq2"], [10, 60])
    rows = sweep(tiny, ids, specs, path=tmp_path / "rows", farm=ray_farm)
    want = sweep(tiny, ids, specs)
    assert [row.kld.value for row in rows] == pytest.approx([row.kld.value for row in want], rel=1e-6)
    assert sweep(tiny, ids, specs, path=tmp_path / "rows") == rows


def test_without_ray_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(RayUnavailableError, match=r"pip install 'kvpack\[ray\]'"):
        RayFarm(2)
    for options in ({"workers": 0}, {"threads": 0}, {"workers": -1}):
        with pytest.raises(ValueError, match="1 or more"):
            RayFarm(**options)
