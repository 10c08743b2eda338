import shutil
from collections.abc import Iterable
from pathlib import Path

import example_store
import pytest

from storage import ActivationStore, ActivationWriter, CorruptionError, FormatError, StorageError, verify
from storage.backends import Buffer, LocalBackend
from storage.commits import CommitLog
from storage.spec import checked_json, parse_checked_json


def assert_undisturbed(path: Path, built: Path) -> None:
    """The store is what a run without faults leaves."""
    assert example_store.contents(path) == example_store.contents(built)
    assert [file.name for file in (path / "staging").iterdir()] == [".keep"]
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    assert verify(path) == []


def test_zombie_that_wakes_up_after_the_commit_changes_nothing(built: Path, tmp_path: Path) -> None:
    writer = example_store.create(tmp_path / "s")
    log = CommitLog(LocalBackend(tmp_path / "s"), writer.spec.fingerprint, writer.spec.n_shards)
    late, very_late = log.begin(0), log.begin(1)
    late.write("data.zarr/zombie", [b"zombie"])
    very_late.write("data.zarr/zombie", [b"zombie"])
    example_store.fill(writer)
    assert log.commit(late, {})[1] is False
    writer.seal()
    assert log.commit(very_late, {})[1] is False
    assert_undisturbed(tmp_path / "s", built)


def test_writer_whose_files_a_faster_one_removes_takes_the_faster_ones_commit(built: Path, tmp_path: Path) -> None:
    class Overtaken(LocalBackend):
        def write(self, key: str, buffers: Iterable[Buffer]) -> None:
            if key.startswith("staging/000001-") and not (self.root / "commits/000001.json").exists():
                example_store.fill(ActivationWriter.open(self.root))
                ActivationWriter.open(self.root).seal()
                raise FileNotFoundError(key)
            super().write(key, buffers)

    path = tmp_path / "s"
    writer = example_store.create(path, backend=Overtaken(path))
    receipt = writer.write_shard(1, {hook: array[:4] for hook, array in example_store.activations(writer.spec).items()})
    assert not receipt.written
    assert_undisturbed(path, built)


def test_nothing_uncommitted_stands_at_a_final_key(tmp_path: Path) -> None:
    writer = example_store.create(tmp_path / "s")
    before = example_store.contents(tmp_path / "s")
    log = CommitLog(LocalBackend(tmp_path / "s"), writer.spec.fingerprint, writer.spec.n_shards)
    log.begin(0).write("data.zarr/hooks/new", [b"bytes"])
    assert example_store.contents(tmp_path / "s") == before


def test_opening_installs_what_a_killed_writer_committed(tmp_path: Path) -> None:
    writer = example_store.create(tmp_path / "s")
    log = CommitLog(LocalBackend(tmp_path / "s"), writer.spec.fingerprint, writer.spec.n_shards)
    attempt = log.begin(0)
    attempt.write("extra/file", [b"by", b"tes"])
    rival = log.begin(0)
    rival.write("extra/file", [b"other"])
    log.roll_forward = lambda commit: None  # type: ignore[method-assign]  # the writer dies here
    log.commit(attempt, {})
    assert not (tmp_path / "s/extra").exists()
    ActivationWriter.open(tmp_path / "s")
    assert (tmp_path / "s/extra/file").read_bytes() == b"bytes"
    assert [file.name for file in (tmp_path / "s/staging").iterdir()] == [".keep"]


def test_vanished_staging_is_reported_not_committed(tmp_path: Path) -> None:
    writer = example_store.create(tmp_path / "s")
    log = CommitLog(LocalBackend(tmp_path / "s"), writer.spec.fingerprint, writer.spec.n_shards)

    class Vanishing(LocalBackend):
        def publish(self, source: str, key: str) -> bool:
            shutil.rmtree(self.root / "staging")
            return super().publish(source, key)

    log.backend = Vanishing(tmp_path / "s")
    with pytest.raises(StorageError, match="staged files of shard 0 vanished"):
        log.commit(log.begin(0), {})
    assert writer.missing() == [0, 1, 2]


def test_commit_of_another_store_is_refused(damaged: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    example_store.build(other, example_store.spec(seed=5))
    shutil.copy(other / "commits/000001.json", damaged / "commits/000001.json")
    log = CommitLog(LocalBackend(damaged), example_store.spec().fingerprint, 3)
    with pytest.raises(
        CorruptionError, match=r"must be the commit of shard 1 of the store .* copied here from elsewhere"
    ):
        log.read(1)
    shutil.copy(other / "seal.json", damaged / "seal.json")
    with pytest.raises(CorruptionError, match=r"seals the store .* copied here from elsewhere"):
        ActivationStore.open(damaged)


def test_malformed_commit_is_a_format_error(damaged: Path) -> None:
    log = CommitLog(LocalBackend(damaged), example_store.spec().fingerprint, 3)
    path = damaged / "commits/000001.json"
    value = parse_checked_json(path.read_bytes(), "here")
    path.write_bytes(checked_json({**value, "files": [{"sha": ""}]}))
    with pytest.raises(FormatError, match="is not a commit of format version 1"):
        log.read(1)
    path.write_text("{")
    with pytest.raises(FormatError, match="must be a JSON object, but it does not parse"):
        log.read(1)
    path.write_text("[]")
    with pytest.raises(FormatError, match="must be a JSON object, but it holds a list"):
        log.read(1)
