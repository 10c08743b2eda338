import hashlib
import itertools
import json
import threading
from pathlib import Path

import example_store
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from test_format import rows

from storage import (
    DELETED,
    ActivationStore,
    ActivationWriter,
    Consumer,
    HookSpec,
    IncompleteError,
    NotFoundError,
    Ring,
    ShuffledReader,
    SpecMismatchError,
    StorageError,
    StoreSpec,
    ring_sidecar,
    verify,
)
from storage.layout import RING
from storage.ring import RingQueue
from storage.spec import canonical_json

HOOK, LENGTH = "h", 8
SPEC = StoreSpec(
    n_contexts=100,
    context_length=LENGTH,
    contexts_per_shard=4,
    n_train_contexts=82,  # shard 20 holds contexts of both splits
    hooks=(HookSpec(HOOK, 2, "float32"),),
)
FIRST_RETAINED = 18  # at least a tenth of 82 contexts, in whole shards


def create(path: Path) -> ActivationWriter:
    return ActivationWriter.create(
        path,
        SPEC,
        **example_store.tables(SPEC),  # type: ignore[arg-type]
        sidecars={RING: ring_sidecar(SPEC, 0.1)},
    )


def write(writer: ActivationWriter, shard: int) -> None:
    """Each row is (100, its number / 4): norms are about equal, and a row is known by its value."""
    start, stop = SPEC.shard_range(shard)
    numbers = np.arange(start * LENGTH, stop * LENGTH)
    rows = np.stack([np.full(len(numbers), 100.0), numbers / 4], axis=1).astype(np.float32)
    writer.write_shard(shard, {HOOK: rows.reshape(stop - start, LENGTH, 2)})


def reader(path: Path, consumer: Consumer, start_batch: int = 0, *, window_contexts: int = 9) -> ShuffledReader:
    return ShuffledReader(
        ActivationStore.open(path, tail=True),
        HOOK,
        batch_size=12,
        n_streams=4,
        seed=0,
        window_contexts=window_contexts,
        epochs=1,
        start_batch=start_batch,
        ring=consumer,
    )


def opened(path: Path, consumer: Consumer, window_contexts: int = 9) -> ShuffledReader:
    """The reader, as soon as the statistics that it needs are there."""
    retained = consumer.ring.retained_train
    consumer.wait(retained, threading.Event(), threading.Event())
    return reader(path, consumer, window_contexts=window_contexts)


def numbers(batch: torch.Tensor) -> list[int]:
    rows: NDArray[np.int64] = (batch[:, 1].numpy() * 4).astype(np.int64)
    return rows.tolist()


def on_disk(path: Path) -> set[int]:
    return {int(file.parent.name) for file in path.glob(f"data.zarr/hooks/{HOOK}/activations/c/*/0")}


class Filler:
    """Writers and janitor of one ring in a thread; notes the most shards that were there at once."""

    def __init__(self, path: Path, capacity: int, delay_s: float = 0.0) -> None:
        self.ring, self.writer = Ring.open(path), ActivationWriter.open(path)
        self.path, self.capacity, self.delay_s = path, capacity, delay_s
        self.most = 0
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        for shard in [shard for shard in self.ring.writing_order() if shard in set(self.writer.missing())]:
            while not self.ring.may_write(shard, self.capacity):
                if self.stop.wait(0.002):
                    return
                self.ring.sweep()
            write(self.writer, shard)
            self.most = max(self.most, len([s for s in on_disk(self.path) if s < FIRST_RETAINED]))
            if self.stop.wait(self.delay_s):
                return

    def __enter__(self) -> "Filler":
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        self.thread.join()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> list[list[int]]:
    """All batches of a ring in which nothing is ever deleted or waited for."""
    path = tmp_path_factory.mktemp("undisturbed") / "s"
    writer = create(path)
    for shard in writer.missing():
        write(writer, shard)
    return [numbers(batch) for batch in reader(path, Consumer(Ring.open(path), "only", capacity=1000))]


def test_ring_gives_every_training_row_once(undisturbed: list[list[int]]) -> None:
    rows = [row for batch in undisturbed for row in batch]
    usable = {row for row in range(82 * LENGTH) if row % 4}  # documents begin at offsets 0 and 4
    assert len(rows) == len(set(rows)) == len(usable) // 12 * 12
    assert set(rows) <= usable


@pytest.mark.parametrize("delay_s", [0.0, 0.01])
@pytest.mark.parametrize("capacity", [8, 12])
def test_batches_do_not_depend_on_timing_and_the_ring_stays_bounded(
    tmp_path: Path, undisturbed: list[list[int]], capacity: int, delay_s: float
) -> None:
    path = tmp_path / "s"
    create(path)
    consumer = Consumer(Ring.open(path), "main", capacity=capacity, poll_s=0.002, patience_s=5)
    given = []
    with Filler(path, capacity, delay_s) as filler:
        stream = opened(path, consumer)
        for number, batch in enumerate(stream, start=1):
            given.append(numbers(batch))
            if number % 3 == 0:  # the checkpoint is durable
                consumer.advance(stream.first_needed(number))
    assert given == undisturbed
    assert 1 <= filler.most <= capacity
    assert stream.first_needed(len(given)) > 0


def test_killed_consumer_goes_on_from_its_checkpoint(tmp_path: Path, undisturbed: list[list[int]]) -> None:
    path = tmp_path / "s"
    writer = create(path)
    for shard in range(FIRST_RETAINED, 21):
        write(writer, shard)
    consumer = Consumer(Ring.open(path), "main", capacity=8, poll_s=0.002, patience_s=5)
    checkpoint = 0
    given: list[list[int]] = []
    with Filler(path, 8):
        for lifetime in itertools.count(1):
            stream = reader(path, consumer, checkpoint)
            del given[checkpoint:]
            for batch in stream:
                given.append(numbers(batch))
                if len(given) % 4 == 0:
                    checkpoint = len(given)
                    consumer.advance(stream.first_needed(checkpoint))
                elif len(given) - checkpoint == 3 and len(given) > 7 * lifetime:
                    break  # killed
            else:
                break
    assert lifetime > 3
    assert given == undisturbed


def test_the_slowest_consumer_decides_what_is_deleted(tmp_path: Path) -> None:
    path = tmp_path / "s"
    writer = create(path)
    for shard in range(6):
        write(writer, shard)
    ring = Ring.open(path)
    assert ring.sweep() == []  # nobody has read anything
    fast, slow = (Consumer(ring, name, capacity=6) for name in ("fast", "slow"))
    fast.advance(5)
    assert ring.sweep() == []
    slow.advance(2)
    assert ring.sweep() == [0, 1]
    assert on_disk(path) == {2, 3, 4, 5}
    assert ring.may_write(7, 6)
    assert not ring.may_write(8, 6)
    assert ring.may_write(FIRST_RETAINED, 6)
    fast.advance(3)  # back
    assert Consumer(ring, "fast", capacity=6).cursor == 5
    slow.finish()
    fast.finish()
    assert ring.sweep() == list(range(2, FIRST_RETAINED))


def test_shards_are_handed_out_as_the_ring_allows(tmp_path: Path) -> None:
    create(tmp_path / "s")
    ring = Ring.open(tmp_path / "s")
    consumer = Consumer(ring, "main", capacity=5)
    with RingQueue(ring, 5) as queue:
        assert [queue.take() for _ in range(3)] == [18, 19, 20]  # retained, for training
        assert [queue.take() for _ in range(5)] == [0, 1, 2, 3, 4]
        assert [queue.take() for _ in range(4)] == [24, 23, 22, 21]  # held-out ones while the ring is full
        assert queue.take() is None
        assert queue.waiting
        consumer.advance(2)
        queue.give_back(2)
        assert [queue.take() for _ in range(4)] == [2, 5, 6, None]
        consumer.finish()
        assert queue.take() is None  # the rest is not needed any more
        for shard in [*range(7), *range(18, 25)]:
            queue.done(shard)
        assert not queue.open()
    assert queue.most == 5


def test_janitor_killed_after_the_tombstone_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "s"
    writer = create(path)
    write(writer, 0)
    ring = Ring.open(path)
    Consumer(ring, "main", capacity=2).advance(1)
    with monkeypatch.context() as patch:
        patch.setattr(Ring, "_delete", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            ring.sweep()
    assert on_disk(path) == {0}
    Ring.open(path).recover()
    assert on_disk(path) == set()
    assert Ring.open(path).first_standing() == 1


def finished_ring(path: Path) -> ActivationStore:
    """A ring whose consumer stopped early: shards from 10 on were given up before they were written."""
    writer = create(path)
    ring = Ring.open(path)
    for shard in [*range(FIRST_RETAINED, SPEC.n_shards), *range(10)]:
        write(writer, shard)
    Consumer(ring, "main", capacity=12).finish()
    ring.sweep()
    writer.seal()
    return ActivationStore.open(path)


def test_sealed_ring_keeps_the_retained_slice_and_knows_that_the_rest_was_deleted(tmp_path: Path) -> None:
    store = finished_ring(tmp_path / "s")
    assert on_disk(tmp_path / "s") == set(range(FIRST_RETAINED, SPEC.n_shards))
    assert verify(tmp_path / "s") == []
    assert (store.split_range("train"), store.split_range("heldout")) == ((72, 82), (82, 100))
    assert (82 - 72) / 82 >= 0.1
    mask = store.mask(HOOK, 60, 80)
    assert (mask[:12] & DELETED != 0).all()
    assert not (mask[12:] & DELETED).any()
    assert store.sink_mask(HOOK, 0, 72).all()
    assert store.activations(HOOK, 72, 100).shape == (28, LENGTH, 2)
    assert store.statistics(HOOK).count == 3 * 4 * (LENGTH - 2)  # first tokens are not counted
    rows = [
        row
        for batch in ShuffledReader(store, HOOK, batch_size=1, n_streams=1, seed=0, epochs=1)
        for row in numbers(batch)
    ]
    assert sorted(rows) == [row for row in range(72 * LENGTH, 82 * LENGTH) if row % 4]


def test_reading_what_was_deleted_says_so(tmp_path: Path) -> None:
    store = finished_ring(tmp_path / "s")
    with pytest.raises(NotFoundError, match=r"Shard 3 of .* deleted on purpose .* Read contexts from 72 on"):
        store.activations(HOOK, 12, 14)
    consumer = Consumer(Ring.open(tmp_path / "s"), "late", capacity=4)
    with pytest.raises(StorageError, match=r"Shard 0 of .* is needed, but it was deleted on purpose"):
        list(reader(tmp_path / "s", consumer))


def test_verify_still_finds_damage_in_a_ring(tmp_path: Path) -> None:
    finished_ring(tmp_path / "s")
    (tmp_path / "s" / f"data.zarr/hooks/{HOOK}/activations/c/19/0").unlink()
    (tmp_path / "s" / f"data.zarr/hooks/{HOOK}/norms/c/2").unlink()
    assert {(problem.shard, problem.kind) for problem in verify(tmp_path / "s")} == {
        (19, "missing file"),
        (2, "missing file"),
    }


def test_statistics_of_a_ring_wait_for_its_retained_shards(tmp_path: Path) -> None:
    writer = create(tmp_path / "s")
    write(writer, 0)
    store = ActivationStore.open(tmp_path / "s", tail=True)
    with pytest.raises(IncompleteError, match="does not hold shard 18 yet"):
        store.statistics(HOOK)
    for shard in range(FIRST_RETAINED, 21):
        write(writer, shard)
    assert store.statistics(HOOK).count == 3 * 4 * (LENGTH - 2)  # first tokens are not counted


def test_too_small_a_capacity_is_an_error_and_no_hang(tmp_path: Path) -> None:
    path = tmp_path / "s"
    create(path)
    consumer = Consumer(Ring.open(path), "main", capacity=3, poll_s=0.002, patience_s=0.05)
    with Filler(path, 3):
        stream = opened(path, consumer, window_contexts=40)
        with pytest.raises(StorageError, match=r"only 3 shards may be on disk .* Raise the capacity"):
            list(stream)


def test_failed_writers_end_the_wait(tmp_path: Path) -> None:
    path = tmp_path / "s"
    writer = create(path)
    for shard in range(FIRST_RETAINED, 21):
        write(writer, shard)
    consumer = Consumer(Ring.open(path), "main", capacity=8, poll_s=0.002, failure=lambda: "the model is gone")
    with pytest.raises(StorageError, match=r"Shard 0 of .* will not come: the model is gone"):
        list(reader(path, consumer))


def test_waiting_reader_is_left_at_once(tmp_path: Path) -> None:
    path = tmp_path / "s"
    writer = create(path)
    for shard in [*range(FIRST_RETAINED, 21), 0, 1, 2, 3]:
        write(writer, shard)
    batches = iter(reader(path, Consumer(Ring.open(path), "main", capacity=8, poll_s=60)))
    next(batches)
    batches.close()  # type: ignore[attr-defined]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("ShuffledReader")]


def test_files_of_a_ring_have_exactly_the_documented_keys(tmp_path: Path) -> None:
    finished_ring(tmp_path / "s")
    described = [row for row in rows("Rings") if row[0] not in ("file", "---")]
    documented: dict[str, set[str]] = {row[0]: {"sha256"} for row in described if row[1] in ("created", "rewritten")}
    documented |= {row[0]: {"sha256"} for row in described if row[1] == "deleted"}
    for file, key, _ in described:
        if key not in ("created", "rewritten", "deleted"):
            documented[file].add(key)
    examples = {
        "ring.json": "ring.json",
        "consumers/<consumer>.json": "consumers/main.json",
        "tombstones/<iiiiii>.json": "tombstones/000003.json",
    }
    found = {name: json.loads((tmp_path / "s" / path).read_text()) for name, path in examples.items()}
    assert {name: set(value) for name, value in found.items()} == documented
    for value in found.values():
        digest = value.pop("sha256")
        assert hashlib.sha256(canonical_json(value)).hexdigest() == digest


def test_bad_use_is_refused(tmp_path: Path) -> None:
    example_store.create(tmp_path / "plain")
    with pytest.raises(SpecMismatchError, match=r"must be a ring .* has no ring.json"):
        Ring.open(tmp_path / "plain")
    create(tmp_path / "s")
    with pytest.raises(ValueError, match="name of a consumer must be of letters"):
        Consumer(Ring.open(tmp_path / "s"), "a/b", capacity=1)
    with pytest.raises(ValueError, match=r"retained_fraction must lie in \(0, 1\], got 0"):
        ring_sidecar(SPEC, 0)
    with pytest.raises(ValueError, match="epochs must be 1 for a ring"):
        ShuffledReader(
            ActivationStore.open(tmp_path / "s", tail=True),
            HOOK,
            batch_size=16,
            seed=0,
            ring=Consumer(Ring.open(tmp_path / "s"), "main", capacity=1),
        )
