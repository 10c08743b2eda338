import shutil
from pathlib import Path

import example_store
import numpy as np
import pytest

from storage import NotFoundError, verify

N_SAMPLED = 3


def files(path: Path) -> list[str]:
    """Every file whose bytes matter, by key."""
    return sorted(key for key in example_store.contents(path) if key not in ("spec.json", "tables.json"))


def test_sound_store_has_no_problems(built: Path) -> None:
    assert verify(built) == []
    assert verify(built, fast=True) == []
    assert len(files(built)) == 13 + 5 + 12 + 1  # metadata, tables, two files per hook and shard, sidecar


def test_every_flipped_bit_is_found(damaged: Path) -> None:
    rng = np.random.default_rng(0)
    for key in files(damaged):
        good = (damaged / key).read_bytes()
        for place in rng.integers(0, len(good), N_SAMPLED).tolist():
            bad = bytearray(good)
            bad[place] ^= 1 << int(rng.integers(8))
            (damaged / key).write_bytes(bad)
            assert {problem.file for problem in verify(damaged)} == {key}
        (damaged / key).write_bytes(good)


@pytest.mark.parametrize("fast", [True, False])
def test_every_missing_and_truncated_file_is_found_at_once(damaged: Path, fast: bool) -> None:
    keys = files(damaged)
    for number, key in enumerate(keys):
        if number % 2:
            (damaged / key).unlink()
        else:
            data = (damaged / key).read_bytes()
            (damaged / key).write_bytes(data[:-1])
    problems = verify(damaged, fast)
    found = {problem.file: problem.kind for problem in problems if problem.kind != "wrong metadata"}
    assert found == {key: "missing file" if number % 2 else "wrong size" for number, key in enumerate(keys)}


def test_problem_names_the_shard(damaged: Path) -> None:
    key = f"data.zarr/hooks/{example_store.WIDE}/activations/c/2/0"
    (damaged / key).unlink()
    (problem,) = verify(damaged)
    assert (problem.file, problem.shard, problem.kind) == (key, 2, "missing file")


def test_unsealed_store_with_holes_is_reported(tmp_path: Path) -> None:
    example_store.create(tmp_path / "s")
    kinds = [problem.kind for problem in verify(tmp_path / "s")]
    assert kinds == ["not committed"] * 3 + ["not sealed"]


@pytest.mark.parametrize("key", ["spec.json", "tables.json", "seal.json", "commits/000001.json"])
def test_unreadable_protocol_files_are_reported(damaged: Path, key: str) -> None:
    (damaged / key).write_text("{")
    assert ("unreadable" in {problem.kind for problem in verify(damaged)}) is True


def test_reformatted_spec_is_reported(damaged: Path) -> None:
    (damaged / "spec.json").write_bytes((damaged / "spec.json").read_bytes() + b"\n")
    assert [(problem.file, problem.kind) for problem in verify(damaged)] == [("spec.json", "unreadable")]


def test_lost_digest_table_is_reported(damaged: Path) -> None:
    (damaged / "tables.json").unlink()
    assert [(problem.file, problem.kind) for problem in verify(damaged)] == [("tables.json", "missing file")]


def test_data_without_a_commit_is_reported(damaged: Path) -> None:
    (damaged / "commits/000001.json").unlink()
    found = {problem.file for problem in verify(damaged) if problem.kind == "not committed"}
    assert f"data.zarr/hooks/{example_store.WIDE}/activations/c/1/0" in found
    assert "commits/000001.json" in found


def test_no_store_at_all_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="must be an activation store"):
        verify(tmp_path)


def test_verify_changes_nothing(damaged: Path, tmp_path: Path) -> None:
    shutil.copytree(damaged, tmp_path / "before")
    verify(damaged)
    assert example_store.contents(damaged) == example_store.contents(tmp_path / "before")
