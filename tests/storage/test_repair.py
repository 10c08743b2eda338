import shutil
from pathlib import Path

import example_store
import pytest

from storage import ActivationStore, ActivationWriter, CorruptionError, IncompleteError, NotFoundError, repair, verify
from storage.backends import LocalBackend

FILE = f"data.zarr/hooks/{example_store.WIDE}/activations/c/{{}}/0"
NORMS = f"data.zarr/hooks/{example_store.WIDE}/norms/c/{{}}"


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-2])


def test_sound_store_is_left_as_it_is(damaged: Path) -> None:
    done = repair(damaged)
    assert (done.problems, done.discarded, done.irreparable) == ([], [], [])
    ActivationStore.open(damaged)


@pytest.mark.parametrize("key", [FILE.format(1), NORMS.format(1), "commits/000001.json"])
@pytest.mark.parametrize("damage", [cut, Path.unlink, lambda path: path.write_text("{")])
def test_damaged_shard_is_discarded_and_written_again(damaged: Path, built: Path, key: str, damage) -> None:
    damage(damaged / key)
    done = repair(damaged)
    assert done.problems
    assert done.discarded == [1]
    assert ActivationWriter.open(damaged).missing() == [1]
    with pytest.raises(IncompleteError, match=r"1 are missing \(1\)"):
        ActivationStore.open(damaged)
    assert not (damaged / key).exists()
    example_store.build(damaged)
    assert verify(damaged) == []
    assert example_store.contents(damaged) == example_store.contents(built)


@pytest.mark.parametrize("key", ["spec.json", "tables.json", "documents.parquet", "data.zarr/zarr.json"])
def test_nothing_is_discarded_where_the_store_itself_is_damaged(damaged: Path, key: str) -> None:
    cut(damaged / key)
    (damaged / FILE.format(1)).unlink()
    done = repair(damaged)
    assert done.discarded == []
    assert key in {problem.file for problem in done.irreparable}
    assert (damaged / "seal.json").exists()
    assert (damaged / "commits/000001.json").exists()


def test_shard_that_is_only_not_installed_yet_is_not_discarded(damaged: Path) -> None:
    (damaged / "seal.json").unlink()
    log = ActivationWriter.open(damaged)._log
    commit = log.read(1)
    assert commit is not None
    staged = damaged / "staging" / commit.attempt
    staged.mkdir()
    for file in commit.files:
        (damaged / file.key).rename(staged / file.staged)
    done = repair(damaged)
    assert done.discarded == []
    assert [problem.kind for problem in done.problems] == ["not sealed"]


def test_repair_killed_at_any_removal_leaves_an_unfinished_store_that_can_be_repaired(
    built: Path, tmp_path: Path
) -> None:
    class Killed(LocalBackend):
        left = 0

        def remove(self, key: str) -> None:
            if self.left == 0:
                raise KeyboardInterrupt
            self.left -= 1
            super().remove(key)

    for n_removals in range(1, 12):
        path = Path(shutil.copytree(built, tmp_path / str(n_removals)))
        cut(path / FILE.format(0))
        cut(path / FILE.format(2))
        backend = Killed(path)
        backend.left = n_removals
        with pytest.raises(KeyboardInterrupt):
            repair(path, backend=backend)
        with pytest.raises((IncompleteError, CorruptionError)):
            ActivationStore.open(path)
        repair(path)
        example_store.build(path)
        assert verify(path) == []
        assert example_store.contents(path) == example_store.contents(built)


def test_no_store_at_all_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="must be an activation store"):
        repair(tmp_path)
