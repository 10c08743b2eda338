"""What every backend must do, and what a store on it must survive: `test_backends.py` has a subclass per backend."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import example_store
import numpy as np
import pytest

from storage import (
    ActivationStore,
    ActivationWriter,
    AlreadyExistsError,
    CorruptionError,
    IncompleteError,
    LatentStore,
    LatentWriter,
    NotFoundError,
    ShuffledReader,
    SpecMismatchError,
    repair,
    verify,
)
from storage.backends import Backend, Buffer, backend_for
from storage.commits import CommitLog

HERE = Path(__file__).parent
SHARD = f"data.zarr/hooks/{example_store.WIDE}/activations/c/1/0"


class BackendContract:
    """Subclasses give the fixture `url`: where nothing is yet, for `backend_for`."""

    @pytest.fixture
    def url(self) -> str:
        raise NotImplementedError

    @pytest.fixture
    def backend(self, url: str) -> Backend:
        return backend_for(url)

    # Files

    def test_written_file_reads_back_in_every_way(self, backend: Backend) -> None:
        backend.write("a/b", [b"12", np.array([[51, 52]], np.uint8), memoryview(b""), np.empty((0, 3))])
        assert backend.read("a/b") == b"1234"
        assert bytes(backend.map("a/b")) == b"1234"
        assert backend.size("a/b") == 4
        assert backend.list("a") == ["b"]
        source = backend.open("a/b")
        assert source.size == 4
        assert [bytes(source[1:3]), bytes(source[0:4]), bytes(source[4:4])] == [b"23", b"1234", b""]

    def test_empty_file_maps_to_an_empty_array(self, backend: Backend) -> None:
        backend.write("empty", [])
        assert backend.map("empty").size == 0
        assert backend.read("empty") == b""

    def test_what_is_read_cannot_be_written_to(self, backend: Backend) -> None:
        backend.write("a", [b"1"])
        assert not backend.map("a").flags.writeable
        assert not backend.open("a")[0:1].flags.writeable

    def test_absent_file_is_named(self, backend: Backend) -> None:
        for read in (backend.read, backend.map, backend.open):
            with pytest.raises(NotFoundError, match=r"There must be a file at .*/root/x/y, but there is none"):
                read("x/y")
        assert backend.size("x/y") is None
        assert backend.list("x/y") == []
        backend.remove("x/y")

    def test_prefix_is_no_file(self, backend: Backend) -> None:
        backend.write("a/b/c", [b"1"])
        backend.write("ab", [b"1"])
        assert backend.size("a") is None
        assert backend.size("a/b") is None
        assert backend.list("a") == ["b"]
        assert backend.list("") == ["a", "ab"]

    def test_write_never_overwrites(self, backend: Backend) -> None:
        backend.write("a", [b"1"])
        with pytest.raises(FileExistsError):
            backend.write("a", [b"2"])
        assert backend.read("a") == b"1"

    def test_file_of_several_parts_reads_back(self, backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("storage.objects.PART_BYTES", 5 * 2**20)  # the least that S3 allows
        blocks = [np.random.default_rng(i).integers(0, 256, 6 * 2**20, np.uint8) for i in range(2)]
        backend.write("large", [*blocks, b"end"])
        whole = np.concatenate([*blocks, np.frombuffer(b"end", np.uint8)])
        assert backend.size("large") == whole.size
        assert (backend.map("large") == whole).all()
        assert (backend.open("large")[3:-3] == whole[3:-3]).all()
        with pytest.raises(FileExistsError):
            backend.write("large", blocks)

    def test_write_that_fails_halfway_can_be_removed_and_done_again(
        self, backend: Backend, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def failing(n: int) -> Iterator[Buffer]:
            for _ in range(n):
                yield bytes(5 * 2**20)
            raise RuntimeError("out of luck")

        monkeypatch.setattr("storage.objects.PART_BYTES", 5 * 2**20)
        for n in (0, 2):
            with pytest.raises(RuntimeError, match="out of luck"):
                backend.write("staging/a/000", failing(n))
            backend.remove("staging/a")
            assert backend.list("staging") == []
        backend.write("staging/a/000", [b"1"])
        assert backend.read("staging/a/000") == b"1"

    def test_remove_takes_a_file_or_all_below_a_prefix(self, backend: Backend) -> None:
        for key in ("a", "b/c", "b/d/e", "bc"):
            backend.write(key, [b"1"])
        backend.remove("a")
        backend.remove("b")
        assert backend.list("") == ["bc"]
        assert backend.size("b/d/e") is None

    # Decisions

    def test_only_the_first_publication_of_a_name_wins(self, backend: Backend) -> None:
        backend.write("first", [b"1"])
        backend.write("second", [b"2"])
        assert backend.publish("first", "commits/name") is True
        assert backend.publish("second", "commits/name") is False
        assert backend.read("commits/name") == b"1"

    def test_publication_of_a_file_that_is_gone_is_an_error(self, backend: Backend) -> None:
        backend.write("a", [b"1"])
        with pytest.raises(FileNotFoundError):
            backend.publish("gone", "commits/name")
        assert backend.size("commits/name") is None

    def test_of_many_publishing_threads_one_wins(self, backend: Backend) -> None:
        for number in range(12):
            backend.write(f"staging/{number}", [str(number).encode()])
        with ThreadPoolExecutor(12) as pool:
            won = list(pool.map(lambda number: backend.publish(f"staging/{number}", "commits/name"), range(12)))
        assert sum(won) == 1
        assert backend.read("commits/name") == str(won.index(True)).encode()

    def test_install_may_be_repeated(self, backend: Backend) -> None:
        backend.write("staged", [b"1"])
        assert backend.install("staged", "deep/er/key") is True
        assert backend.install("staged", "deep/er/key") is False
        assert backend.read("deep/er/key") == b"1"
        assert backend.size("staged") is None

    def test_install_replaces_what_stands_there_at_once(self, backend: Backend) -> None:
        for content in (b"old", b"newer"):
            backend.write("staged", [content])
            assert backend.install("staged", "consumers/a.json") is True
            assert bytes(backend.open("consumers/a.json")[0 : len(content)]) == content
        assert backend.read("consumers/a.json") == b"newer"

    def test_install_by_many_threads_leaves_the_file(self, backend: Backend) -> None:
        backend.write("staged", [b"1"])
        with ThreadPoolExecutor(8) as pool:
            moved = list(pool.map(lambda _: backend.install("staged", "key"), range(8)))
        assert any(moved)
        assert backend.read("key") == b"1"
        assert backend.size("staged") is None

    # Creation

    def test_create_is_all_or_nothing(self, backend: Backend) -> None:
        def failing() -> Iterator[tuple[str, Buffer]]:
            yield "a", b"1"
            yield "b/c", b"2"
            raise RuntimeError("out of luck")

        with pytest.raises(RuntimeError, match="out of luck"):
            backend.create(failing())
        assert backend.size("a") is None
        assert backend.create([("a", b"1"), ("b/c", b"2")]) is True
        assert backend.create([("a", b"other"), ("b/c", b"other")]) is False
        assert [backend.read("a"), backend.read("b/c")] == [b"1", b"2"]
        assert backend.list("") == ["a", "b"]

    def test_of_many_creating_threads_one_wins(self, backend: Backend) -> None:
        files = [("spec.json", b"same"), *((f"data/{n}", b"same") for n in range(5))]
        with ThreadPoolExecutor(8) as pool:
            created = list(pool.map(lambda _: backend.create(files), range(8)))
        assert sum(created) >= 1  # equal bytes: on an object store the one who hears of it late has created it too
        assert [backend.read(key) for key, _ in files] == [b"same"] * 6
        assert backend.list("") == ["data", "spec.json"]

    def test_nothing_is_created_where_something_else_is(self, url: str, backend: Backend) -> None:
        backend.write("thesis.tex", [b"\\end"])
        with pytest.raises(AlreadyExistsError, match="something else stands there"):
            example_store.create(url)
        assert backend.list("") == ["thesis.tex"]

    # Stores

    def test_store_has_the_same_bytes_on_every_backend(self, url: str, backend: Backend, built: Path) -> None:
        example_store.build(url)
        assert verify(url) == []
        assert files(backend) == files(backend_for(built))
        assert backend.list("staging") == [".keep"]
        store, values = ActivationStore.open(url), example_store.activations(example_store.spec())
        for hook, array in values.items():
            assert (store.activations_numpy(hook, 3, 7) == array[3:7]).all()
        assert store.sidecar("documents.parquet") == b"opaque"
        readers = [
            ShuffledReader(opened, example_store.WIDE, batch_size=8, seed=0, epochs=1, n_streams=4)
            for opened in (store, ActivationStore.open(built))
        ]
        batches = list(zip(*readers, strict=True))
        assert batches
        assert all((ours == theirs).all() for ours, theirs in batches)

    def test_damaged_shard_is_found_discarded_and_written_again(self, url: str, backend: Backend, built: Path) -> None:
        example_store.build(url)
        data = bytearray(backend.read(SHARD))
        data[70] ^= 1
        backend.remove(SHARD)
        backend.write(SHARD, [bytes(data)])
        assert [(problem.file, problem.kind) for problem in verify(url)] == [(SHARD, "wrong digest")]
        with pytest.raises(CorruptionError, match=r"shard 1\): chunk 0 must match its checksum"):
            ActivationStore.open(url).activations_numpy(example_store.WIDE, 4, 5)
        assert repair(url).discarded == [1]
        with pytest.raises(IncompleteError, match=r"1 are missing \(1\)"):
            ActivationStore.open(url)
        example_store.build(url)
        assert verify(url) == []
        assert files(backend) == files(backend_for(built))

    def test_missing_shard_is_found(self, url: str, backend: Backend) -> None:
        example_store.build(url)
        backend.remove(SHARD)
        assert [(problem.file, problem.kind) for problem in verify(url, fast=True)] == [(SHARD, "missing file")]
        with pytest.raises(CorruptionError, match=r"shard 1\): the file must exist, but it is missing"):
            ActivationStore.open(url).activations_numpy(example_store.WIDE, 4, 5)

    def test_other_settings_do_not_mix(self, url: str) -> None:
        example_store.create(url)
        with pytest.raises(SpecMismatchError, match="seed"):
            example_store.create(url, example_store.spec(seed=5))

    def test_opening_installs_what_a_killed_writer_committed(self, url: str, backend: Backend) -> None:
        writer = example_store.create(url)
        log = CommitLog(backend, writer.spec.fingerprint, writer.spec.n_shards)
        attempt, rival = log.begin(0), log.begin(0)
        attempt.write("extra/file", [b"by", b"tes"])
        rival.write("extra/file", [b"other"])
        log.roll_forward = lambda commit: None  # type: ignore[method-assign]  # the writer dies here
        log.commit(attempt, {})
        assert backend.size("extra/file") is None
        ActivationWriter.open(url)
        assert backend.read("extra/file") == b"bytes"
        assert backend.list("staging") == [".keep"]

    def test_zombie_that_wakes_up_after_the_seal_changes_nothing(self, url: str, backend: Backend, built: Path) -> None:
        writer = example_store.create(url)
        log = CommitLog(backend, writer.spec.fingerprint, writer.spec.n_shards)
        late, very_late = log.begin(0), log.begin(1)
        late.write("data.zarr/zombie", [b"zombie"])
        very_late.write("data.zarr/zombie", [b"zombie"])
        example_store.fill(writer)
        assert log.commit(late, {})[1] is False
        writer.seal()
        assert log.commit(very_late, {})[1] is False
        writer.write_shard(2, {hook: array[8:] for hook, array in example_store.activations(writer.spec, 9).items()})
        assert files(backend) == files(backend_for(built))
        assert backend.list("staging") == [".keep"]

    def test_threads_racing_for_every_shard_leave_whole_shards(self, url: str) -> None:
        def build(seed: int) -> None:
            example_store.build(url, backend=backend_for(url), seed=seed)

        with ThreadPoolExecutor(3) as pool:
            for _ in pool.map(build, (1, 2, 3)):
                pass
        assert_each_shard_is_of_one_writer(url, (1, 2, 3))

    def test_processes_racing_for_every_shard_leave_whole_shards(self, url: str) -> None:
        command = [sys.executable, str(HERE / "faulty_writer.py"), url, "0"]
        environment = os.environ | {"PYTHONPATH": str(HERE.parent.parent)}
        processes = [subprocess.Popen([*command, seed], env=environment, stdout=subprocess.DEVNULL) for seed in "123"]
        assert [process.wait(timeout=120) for process in processes] == [0, 0, 0]
        assert_each_shard_is_of_one_writer(url, (1, 2, 3))

    def test_latent_store_reads_back(self, url: str, backend: Backend) -> None:
        meta = {"d_sae": 3, "n_shards": 2, "n_rows": 8, "fingerprint": "00"}
        writer = LatentWriter.create(url, meta)
        for shard, base in ((0, 0), (1, 4)):
            row, latent = np.array([base, base + 2]), np.array([1, 2])
            writer.write_shard(shard, row, latent, np.array([1.5, 2.5], np.float32))
        writer.seal()
        assert verify(url) == []
        block = LatentStore.open(url).block(1, 3)
        assert [block.row.tolist(), block.value.tolist()] == [[0, 4, 2, 6], [1.5, 1.5, 2.5, 2.5]]


def files(backend: Backend, prefix: str = "") -> dict[str, bytes]:
    """Every file that must be the same however and wherever a store came about: all but commits, seal and staging."""
    found: dict[str, bytes] = {}
    for name in backend.list(prefix):
        key = f"{prefix}/{name}" if prefix else name
        if key in ("commits", "staging", "seal.json"):
            continue
        if backend.size(key) is None:
            found |= files(backend, key)
        else:
            found[key] = backend.read(key)
    return found


def assert_each_shard_is_of_one_writer(url: str, seeds: tuple[int, ...]) -> None:
    assert verify(url) == []
    store, spec = ActivationStore.open(url), example_store.spec()
    candidates = [example_store.activations(spec, seed) for seed in seeds]
    for shard in range(spec.n_shards):
        start, stop = spec.shard_range(shard)
        read = {hook.name: store.activations_numpy(hook.name, start, stop) for hook in spec.hooks}
        owners = [all((read[hook] == values[hook][start:stop]).all() for hook in read) for values in candidates]
        assert sum(owners) == 1
