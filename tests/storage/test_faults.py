"""Writers that are killed with SIGKILL at every place, disks that are full, file systems that are read-only.

After each fault the same work is begun again, and must end with the digests of an undisturbed run, without doing
again what was committed. `test_durability.py` covers what a kill cannot show: the order of fsyncs.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import example_store
import pytest
from backend_contract import files

from storage import ActivationStore, ActivationWriter, StorageError, verify
from storage.backends import backend_for
from tests.s3_server import S3Server, environment

HERE = Path(__file__).parent
PYTHON = [sys.executable, str(HERE / "faulty_writer.py")]


class Writers:
    """Starts writers as children of a process that has imported everything already."""

    def __init__(self, variables: dict[str, str]) -> None:
        self.environment = os.environ | {"PYTHONPATH": str(HERE.parent.parent), "OMP_NUM_THREADS": "1"} | variables
        self._server = subprocess.Popen(
            [*PYTHON, "--serve"], env=self.environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def run(self, url: str, *, kill_at: int = 0, seed: int = 0, delay_s: float = 0) -> int:
        """The exit code of one writer; kill_at: the place at which it kills itself; delay_s: when it is killed."""
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.write(f"{url} {kill_at} {seed} {delay_s}\n")
        self._server.stdin.flush()
        return int(self._server.stdout.readline())

    def count_places(self, url: str) -> int:
        """Places at which an undisturbed writer could have died."""
        run = subprocess.run([*PYTHON, url, "0"], env=self.environment, capture_output=True, text=True, timeout=120)
        assert run.returncode == 0, run.stderr
        return int(run.stdout)

    def close(self) -> None:
        self._server.communicate(timeout=60)


@pytest.fixture(scope="module")
def writers(s3: S3Server) -> Iterator[Writers]:
    started = Writers(environment(s3.endpoint))
    yield started
    started.close()


def commits(url: str) -> dict[str, bytes]:
    backend = backend_for(url)
    return {name: backend.read(f"commits/{name}") for name in backend.list("commits") if name.endswith(".json")}


def digests(url: str) -> set[str]:
    log = ActivationWriter.open(url)._log
    return {file.sha256 for shard in log.committed() if (commit := log.read(shard)) for file in commit.files}


def resume(url: str, built: Path) -> None:
    """Runs the killed work again and requires the outcome of an undisturbed run, and that nothing was done twice."""
    before = commits(url)
    example_store.build(url)
    assert before.items() <= commits(url).items()
    assert digests(url) == digests(str(built))
    assert files(backend_for(url)) == files(backend_for(built))
    assert backend_for(url).list("staging") == [".keep"]
    assert backend_for(url).list("") == backend_for(built).list("")
    assert verify(url) == []


def inject(writers: Writers, base: str, built: Path, places: Iterable[int]) -> int:
    """Kills a writer at each of the places; returns how many were killed."""
    n_killed = 0
    for place in places:
        url = f"{base}/{place}/s"
        assert writers.run(url, kill_at=place) == -signal.SIGKILL
        n_killed += 1
        resume(url, built)
        if "://" not in base:
            assert os.listdir(Path(url).parent) == ["s"]
            shutil.rmtree(Path(url).parent)
    return n_killed


def test_writer_killed_anywhere_resumes_to_the_same_digests(writers: Writers, built: Path, in_memory: Path) -> None:
    n_places = writers.count_places(str(in_memory / "undisturbed/s"))
    assert n_places > 200
    chosen = random.Random(0).sample(range(1, n_places + 1), 20)
    assert inject(writers, str(in_memory), built, chosen) == 20


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_writer_killed_at_every_place_resumes_to_the_same_digests(
    writers: Writers, built: Path, in_memory: Path
) -> None:
    n_places = writers.count_places(str(in_memory / "undisturbed/s"))
    assert inject(writers, str(in_memory), built, range(1, n_places + 1)) >= 200


def test_writer_to_s3_killed_between_any_two_requests_resumes_to_the_same_digests(
    writers: Writers, built: Path, s3_url: str
) -> None:
    assert inject(writers, s3_url, built, random.Random(1).sample(range(1, 200), 2)) == 2


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_writer_to_s3_killed_at_many_places_resumes_to_the_same_digests(
    writers: Writers, built: Path, s3_url: str
) -> None:
    n_places = writers.count_places(f"{s3_url}/undisturbed/s")
    assert n_places > 200
    chosen = random.Random(2).sample(range(1, n_places + 1), 80)
    assert inject(writers, s3_url, built, chosen) == 80


def kill_at_random_times(writers: Writers, base: Path, built: Path, n: int, seed: int) -> int:
    """Kills from outside, wherever the writer is; returns how many were still at work."""
    moments, n_killed = random.Random(seed), 0
    for number in range(n):
        path = base / str(number) / "s"
        n_killed += writers.run(str(path), delay_s=moments.uniform(0.001, 0.06)) == -signal.SIGKILL
        resume(str(path), built)
        assert os.listdir(path.parent) == ["s"]
        shutil.rmtree(path.parent)
    return n_killed


def test_writer_killed_at_any_time_resumes_to_the_same_digests(writers: Writers, built: Path, in_memory: Path) -> None:
    assert kill_at_random_times(writers, in_memory, built, 10, seed=0) > 0


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_writer_killed_at_a_hundred_times_resumes_to_the_same_digests(
    writers: Writers, built: Path, in_memory: Path
) -> None:
    assert kill_at_random_times(writers, in_memory, built, 100, seed=1) >= 50


def test_writer_killed_again_and_again_resumes_to_the_same_digests(
    writers: Writers, built: Path, in_memory: Path
) -> None:
    url, places = str(in_memory / "s"), random.Random(1)
    for _ in range(8):
        assert writers.run(url, kill_at=places.randint(5, 40)) == -signal.SIGKILL
    resume(url, built)


def test_reader_sees_no_store_before_it_is_sealed(writers: Writers, in_memory: Path) -> None:
    n_places = writers.count_places(str(in_memory / "undisturbed/s"))
    for kill_at in (1, n_places // 2, n_places - 30):
        assert writers.run(str(in_memory / "s"), kill_at=kill_at) == -signal.SIGKILL
        with pytest.raises(StorageError):
            ActivationStore.open(in_memory / "s")
        shutil.rmtree(in_memory / "s", ignore_errors=True)


def mount(*arguments: str) -> None:
    """Mounts, or skips the test where that is not allowed."""
    if shutil.which("mount") is None:
        pytest.skip("there is no mount command")
    run = subprocess.run(["mount", *arguments], capture_output=True, text=True, timeout=30)
    if run.returncode:
        pytest.skip(f"this user may not mount: {run.stderr.strip()}")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MiB."""
    path = tmp_path / "disk"
    path.mkdir()
    mount("-t", "tmpfs", "-o", "size=2m", "tmpfs", str(path))
    yield path
    subprocess.run(["umount", str(path)], check=True, timeout=30)


def leave_free(disk: Path, n_bytes: int) -> Path:
    """Fills the disk but for so many bytes; returns the file to remove."""
    filler = disk / "filler"
    free = os.statvfs(disk)
    filler.write_bytes(bytes(max(0, free.f_bavail * free.f_bsize - n_bytes)))
    return filler


def failure_of(url: str) -> str | None:
    """The message with which building the store ends, if it fails."""
    try:
        example_store.build(url)
    except StorageError as error:
        return str(error)
    return None


def test_full_disk_is_named_keeps_nothing_half_written_and_is_recovered_from(small_disk: Path, built: Path) -> None:
    folder = small_disk / "runs"
    seen: set[int | None] = set()
    for free_kib in range(0, 400, 12):
        folder.mkdir()
        url = str(folder / "s")
        filler = leave_free(small_disk, free_kib * 1024)
        failure = failure_of(url)
        if failure is None:
            break
        assert "must be writable, but the disk is full" in failure
        assert "run the same command again" in failure
        if os.path.exists(url):
            seen.add(len(commits(url)))
            # What is committed may still have to be installed; nothing else may lie there.
            staged = set(os.listdir(f"{url}/staging")) - {".keep"}
            log = ActivationWriter(backend_for(url), example_store.spec())._log
            assert staged <= {commit.attempt for shard in log.committed() if (commit := log.read(shard))}
        else:
            seen.add(None)
            assert os.listdir(folder) == []
        filler.unlink()
        resume(url, built)
        shutil.rmtree(folder)
    else:
        pytest.fail("the disk never had room enough")
    assert {None, 0} <= seen
    assert seen & {1, 2, 3}


def test_read_only_file_system_is_named_and_can_be_read_from(tmp_path: Path, built: Path) -> None:
    store, view = tmp_path / "store", tmp_path / "view"
    writer = example_store.create(store / "s")
    values = example_store.activations(writer.spec)
    writer.write_shard(0, {hook: array[:4] for hook, array in values.items()})
    view.mkdir()
    mount("--bind", str(store), str(view))
    try:
        mount("-o", "remount,bind,ro", str(view))
        before = files(backend_for(store / "s"))
        with pytest.raises(StorageError, match="must be writable, but the file system is mounted read-only"):
            example_store.build(view / "s")
        with pytest.raises(StorageError, match="mounted read-only"):
            example_store.build(view / "another")
        assert files(backend_for(store / "s")) == before
        assert os.listdir(store) == ["s"]
        read = ActivationStore.open(view / "s", tail=True).activations_numpy(example_store.WIDE, 0, 4)
        assert (read == values[example_store.WIDE][:4]).all()
        resume(str(store / "s"), built)
        example_store.build(view / "s")  # finished: there is nothing to write
        assert verify(view / "s") == []
    finally:
        subprocess.run(["umount", str(view)], check=True, timeout=30)
