import os
import subprocess
import sys
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import example_store
import pytest

from storage import ActivationWriter, verify
from storage.backends import Backend, backend_for
from storage.leases import SKEW_S, Leases, lease_key

HERE = Path(__file__).parent


class Clock:
    """A clock and a stopwatch that go when they are told to."""

    def __init__(self, ahead_s: float = 0.0) -> None:
        self.passed = 0.0
        self.ahead_s = ahead_s

    def clock(self) -> float:
        return 1_800_000_000 + self.ahead_s + self.passed

    def stopwatch(self) -> float:
        return self.passed


def holder(backend: Backend, clock: Clock) -> Leases:
    return Leases(backend, duration_s=60, clock=clock.clock, stopwatch=clock.stopwatch)


@pytest.fixture(params=["local", "memory", "s3"])
def backend(request: pytest.FixtureRequest, tmp_path: Path) -> Backend:
    """Of a store that is still being written."""
    match request.param:
        case "local":
            url = str(tmp_path / "s")
        case "memory":
            url = f"memory://{uuid.uuid4()}"
        case _:
            url = request.getfixturevalue("s3_url")
    example_store.create(url)
    return backend_for(url)


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leases are taken by holders of whom it cannot be told whether they live."""
    monkeypatch.setattr("storage.leases._MACHINE", "")


def test_of_many_holders_one_gets_the_lease_until_it_is_released(backend: Backend) -> None:
    holders = [Leases(backend) for _ in range(6)]
    with ThreadPoolExecutor(6) as pool:
        taken = list(pool.map(lambda leases: leases.take(1), holders))
    assert sum(taken) == 1
    owner = holders[taken.index(True)]
    assert owner.held == [1]
    assert owner.take(1)
    assert not Leases(backend).take(1)
    assert Leases(backend).take(2)
    owner.release(1)
    assert Leases(backend).take(1)


def test_lease_expires_unless_it_is_renewed(backend: Backend, elsewhere: None) -> None:
    clock = Clock()
    first, second = holder(backend, clock), holder(backend, clock)
    assert first.take(0)
    clock.passed += 59
    assert first.renew() == []
    clock.passed += 59
    assert not second.take(0)
    assert first.renew() == []
    clock.passed += 60 + SKEW_S + 1
    assert second.take(0)
    assert first.renew() == [0]
    assert first.held == []
    assert len(backend.list("leases")) == 1


def test_of_many_that_take_over_one_succeeds(tmp_path: Path, elsewhere: None) -> None:
    example_store.create(tmp_path / "s")
    clock = Clock()
    for _ in range(5):
        assert holder(backend_for(tmp_path / "s"), clock).take(0)
        clock.passed += 60 + SKEW_S + 1
        with ThreadPoolExecutor(6) as pool:
            rivals = [holder(backend_for(tmp_path / "s"), clock) for _ in range(6)]
            assert sum(pool.map(lambda leases: leases.take(0), rivals)) == 1
        clock.passed += 60 + SKEW_S + 1


def test_clock_that_is_behind_delays_a_take_over_by_one_lease_at_most(tmp_path: Path, elsewhere: None) -> None:
    example_store.create(tmp_path / "s")
    backend = backend_for(tmp_path / "s")
    behind = Clock(ahead_s=-3600)
    observer = holder(backend, behind)
    assert holder(backend, Clock()).take(0)
    assert not observer.take(0)
    behind.passed += 59
    assert not observer.take(0)
    behind.passed += 2
    assert observer.take(0)


def test_clock_that_is_ahead_takes_over_early_and_the_holder_hears_of_it(tmp_path: Path, elsewhere: None) -> None:
    example_store.create(tmp_path / "s")
    backend = backend_for(tmp_path / "s")
    owner = holder(backend, Clock())
    assert owner.take(0)
    assert not holder(backend, Clock(ahead_s=60 + SKEW_S - 1)).take(0)
    assert holder(backend, Clock(ahead_s=3600)).take(0)
    assert owner.renew() == [0]


def test_damaged_lease_binds_as_long_as_a_lease_does(tmp_path: Path) -> None:
    example_store.create(tmp_path / "s")
    backend, clock = backend_for(tmp_path / "s"), Clock()
    backend.write(lease_key(0, 7), [b"{"])
    leases = holder(backend, clock)
    assert not leases.take(0)
    clock.passed += 61
    assert leases.take(0)
    assert backend.list("leases") == [lease_key(0, 8).rpartition("/")[2]]


def test_lease_of_a_killed_process_is_free_at_once(tmp_path: Path) -> None:
    example_store.create(tmp_path / "s")
    process = start_driver(tmp_path / "s", pause_s=600)
    assert process.stdout is not None
    assert process.stdout.readline() == "taken 0\n"
    leases = Leases(backend_for(tmp_path / "s"))
    assert not leases.take(0)
    process.kill()
    process.communicate(timeout=30)
    assert leases.take(0)


def test_sealed_store_has_no_leases_and_gives_none(tmp_path: Path) -> None:
    writer = example_store.create(tmp_path / "s")
    leases = Leases(backend_for(tmp_path / "s"))
    assert leases.take(0)
    example_store.fill(writer)
    writer.seal()
    assert not (tmp_path / "s/leases").exists()
    assert leases.renew() == [0]
    assert not leases.take(1)
    assert not (tmp_path / "s/leases").exists()
    assert os.listdir(tmp_path / "s/staging") == [".keep"]


def test_leases_are_renewed_while_they_are_kept_and_then_released(tmp_path: Path) -> None:
    example_store.create(tmp_path / "s")
    backend = backend_for(tmp_path / "s")
    leases = Leases(backend, duration_s=0.03)
    with leases.kept():
        assert leases.take(0)
        while lease_key(0, 3).rpartition("/")[2] > max(backend.list("leases"), default=""):
            time.sleep(0.01)  # the test's own time limit ends this if it never happens
    assert backend.list("leases") == []


def start_driver(path: Path, pause_s: float) -> subprocess.Popen[str]:
    environment = os.environ | {"PYTHONPATH": str(HERE.parent.parent), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(HERE / "leasing_driver.py"), str(path), str(pause_s)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)


def shards(output: str, verb: str) -> list[int]:
    return [int(line.split()[1]) for line in output.splitlines() if line.startswith(verb)]


def test_two_drivers_share_the_shards_and_do_none_twice(tmp_path: Path) -> None:
    path, wanted = tmp_path / "s", example_store.spec(n_contexts=20, contexts_per_shard=1)
    writer = example_store.create(path, wanted)
    drivers = [start_driver(path, pause_s=0.05) for _ in range(2)]
    outputs = [driver.communicate(timeout=60)[0] for driver in drivers]
    assert [driver.returncode for driver in drivers] == [0, 0]
    taken = [shards(output, "taken") for output in outputs]
    assert sorted(taken[0] + taken[1]) == list(range(20))
    assert taken == [shards(output, "written") for output in outputs]
    assert min(map(len, taken)) > 0
    assert list(path.glob("leases/*")) == []
    writer.seal()
    assert verify(path) == []


def test_shards_of_a_killed_driver_are_done_by_the_other(tmp_path: Path) -> None:
    path, wanted = tmp_path / "s", example_store.spec(n_contexts=6, contexts_per_shard=1)
    writer = example_store.create(path, wanted)
    victim = start_driver(path, pause_s=600)
    assert victim.stdout is not None
    assert victim.stdout.readline() == "taken 0\n"
    survivor = start_driver(path, pause_s=0)
    assert survivor.stdout is not None
    done = [survivor.stdout.readline() for _ in range(10)]
    assert done[-1] == "written 5\n"
    assert writer.missing() == [0]
    victim.kill()
    victim.communicate(timeout=30)
    output, _ = survivor.communicate(timeout=60)
    assert shards(output, "written") == [0]
    writer.seal()
    assert verify(path) == []


def test_shard_whose_worker_is_gone_is_handed_out_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = example_store.create(tmp_path / "s")
    with writer.queue() as queue, ActivationWriter.open(tmp_path / "s").queue() as other:
        assert queue.take() == 0
        assert other.take() == 1
        assert queue.take() == 2
        assert queue.take() is None
        assert queue.open()
        queue.give_back(2)
        assert not queue.waiting
        assert queue.take() == 2
        example_store.fill(writer)
        for shard in (0, 2):
            queue.done(shard)
        assert queue.waiting
        monkeypatch.setattr("storage.leases.POLL_S", 0.0)
        assert queue.take() is None
        assert not queue.open()
