"""Two drivers at once on one store outside their runs."""

from pathlib import Path

import pytest
from command_line import Driver, FinishedRun, events, shard_digests


def shards(out: Path) -> list[int]:
    """Shards that the driver has heard of."""
    return [line["shard"] for line in events(out) if line["event"] == "shard"]


def start(finished: FinishedRun, folder: Path, name: str) -> tuple[Driver, Path]:
    out = folder / name
    arguments = ("collect", finished.config, "--out", out, "--set", f"collect.store={folder / 'shared'}")
    return Driver(*arguments, log=folder / f"{name}.log"), out


@pytest.mark.slow
def test_two_drivers_share_the_shards_and_do_none_twice(finished: FinishedRun, tmp_path):
    drivers, outs = zip(*(start(finished, tmp_path, name) for name in ("a", "b")), strict=True)
    for driver in drivers:
        driver.finish()
    done = sorted([*shards(outs[0]), *shards(outs[1])])
    assert done == list(range(len(done)))
    assert shard_digests(tmp_path / "shared") == shard_digests(finished.out / "activations")
    assert not (tmp_path / "shared/leases").exists()


@pytest.mark.slow
def test_driver_takes_over_what_a_killed_one_was_at(finished: FinishedRun, tmp_path):
    victim, out = start(finished, tmp_path, "victim")
    victim.wait_until(lambda: len(shards(out)) >= 3)
    survivor, other_out = start(finished, tmp_path, "survivor")
    victim.kill("machine")
    survivor.finish()
    expected = shard_digests(finished.out / "activations")
    assert shard_digests(tmp_path / "shared") == expected
    assert 0 < len(shards(other_out)) <= len(expected) - 3
