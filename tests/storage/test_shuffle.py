import itertools
import threading
from pathlib import Path

import example_store
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from storage import ActivationStore, CorruptionError, HookSpec, ShuffledReader, StoreSpec
from storage.writer import ActivationWriter

HOOK = "h"
LENGTH = 8


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> ActivationStore:
    """40 contexts of 8; each row is (100, its number / 4): norms are about equal, and a row is known by its value."""
    spec = StoreSpec(
        n_contexts=40,
        context_length=LENGTH,
        contexts_per_shard=6,
        n_train_contexts=30,
        hooks=(HookSpec(HOOK, 2, "float32"),),
    )
    path = tmp_path_factory.mktemp("shuffle") / "s"
    writer = ActivationWriter.create(path, spec, **example_store.tables(spec))
    rows = np.stack([np.full(spec.n_tokens, 100.0), np.arange(spec.n_tokens) / 4], axis=1).astype(np.float32)
    values = rows.reshape(spec.n_contexts, LENGTH, 2)
    for shard in writer.missing():
        start, stop = spec.shard_range(shard)
        writer.write_shard(shard, {HOOK: values[start:stop]})
    writer.seal()
    return ActivationStore.open(path)


def numbers(batch: torch.Tensor) -> NDArray[np.int64]:
    return (batch[:, 1].numpy() * 4).astype(np.int64)


def stream(reader: ShuffledReader, n_batches: int | None = None) -> list[list[int]]:
    return [numbers(batch).tolist() for batch in itertools.islice(reader, n_batches)]


def usable(store: ActivationStore, split: str = "train") -> set[int]:
    start, stop = store.spec.split_range(split)  # type: ignore[arg-type]
    rows = np.arange(start * LENGTH, stop * LENGTH)
    return set(rows[store.position[start:stop].ravel() != 0].tolist())


@pytest.mark.parametrize("split", ["train", "heldout", "all"])
@pytest.mark.parametrize("window_contexts", [1, 7, 1024])
def test_an_epoch_gives_every_usable_row_once(store: ActivationStore, split: str, window_contexts: int) -> None:
    reader = ShuffledReader(
        store,
        HOOK,
        split=split,
        batch_size=1,
        seed=0,
        epochs=1,
        window_contexts=window_contexts,  # type: ignore[arg-type]
    )
    rows = [row for batch in stream(reader) for row in batch]
    assert len(rows) == len(set(rows)) == reader.n_rows
    assert set(rows) == usable(store, split)


def test_sinks_are_given_when_asked_for(store: ActivationStore) -> None:
    reader = ShuffledReader(store, HOOK, split="train", batch_size=240, seed=0, epochs=1, exclude_sinks=False)
    assert sorted(stream(reader)[0]) == list(range(240))


def test_rows_are_not_in_order(store: ActivationStore) -> None:
    (rows,) = stream(ShuffledReader(store, HOOK, split="train", batch_size=180, seed=0, epochs=1))
    assert abs(np.corrcoef(rows, np.arange(180))[0, 1]) < 0.3


def test_incomplete_batch_carries_over_into_the_next_epoch(store: ActivationStore) -> None:
    reader = ShuffledReader(store, HOOK, split="train", batch_size=50, seed=0, epochs=2, window_contexts=4)
    batches = stream(reader)
    assert (reader.n_rows, reader.n_batches, len(batches)) == (180, 7, 7)
    rows = [row for batch in batches for row in batch]
    assert set(rows[:180]) == usable(store)
    assert len(set(rows[180:])) == 350 - 180


def test_epochs_and_seeds_differ_and_repeats_are_equal(store: ActivationStore) -> None:
    def read(seed: int) -> list[list[int]]:
        return stream(ShuffledReader(store, HOOK, split="train", batch_size=180, seed=seed), 2)

    first, second = read(0)
    assert first != second
    assert read(0) == [first, second]
    assert read(1)[0] != first


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(1, 40), st.integers(1, 70), st.integers(0, 30))
def test_any_batch_is_reached_directly(store: ActivationStore, window: int, batch_size: int, start: int) -> None:
    def reader(start_batch: int) -> ShuffledReader:
        return ShuffledReader(
            store,
            HOOK,
            split="train",
            batch_size=batch_size,
            seed=3,
            window_contexts=window,
            start_batch=start_batch,
        )

    assert stream(reader(start), 3) == stream(reader(0), start + 3)[start:]


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(1, 4), st.integers(1, 20), st.integers(1, 40))
def test_ranks_together_give_the_batches_of_one_process(
    store: ActivationStore, world_size: int, rows_each: int, window: int
) -> None:
    def reader(rank: int, world_size: int, batch_size: int) -> ShuffledReader:
        return ShuffledReader(
            store,
            HOOK,
            split="train",
            batch_size=batch_size,
            seed=0,
            window_contexts=window,
            rank=rank,
            world_size=world_size,
        )

    batch_size = rows_each * world_size
    alone = stream(reader(0, 1, batch_size), 8)
    parts = [stream(reader(rank, world_size, batch_size), 8) for rank in range(world_size)]
    for number, batch in enumerate(alone):
        assert [part[number] for part in parts] == [batch[rank::world_size] for rank in range(world_size)]


def test_saved_position_resumes_exactly_with_another_number_of_ranks(store: ActivationStore) -> None:
    reader = ShuffledReader(store, HOOK, split="train", batch_size=20, seed=0, window_contexts=8)
    batches = iter(reader)
    for _ in range(5):
        next(batches)
    state = reader.state_dict()
    expected = numbers(next(batches)).tolist()
    halves = []
    for rank in range(2):
        other = ShuffledReader(
            store, HOOK, split="train", batch_size=20, seed=0, window_contexts=8, rank=rank, world_size=2
        )
        other.load_state_dict(state)
        halves.append(stream(other, 1)[0])
    assert halves == [expected[0::2], expected[1::2]]


def test_position_of_other_settings_is_refused(store: ActivationStore) -> None:
    state = ShuffledReader(store, HOOK, split="train", batch_size=20, seed=0).state_dict()
    other = ShuffledReader(store, HOOK, split="train", batch_size=10, seed=1)
    with pytest.raises(ValueError, match=r"other settings \(batch_size: saved 20, here 10; seed: saved 0, here 1\)"):
        other.load_state_dict(state)


def test_impossible_settings_are_listed(store: ActivationStore) -> None:
    with pytest.raises(
        ValueError, match=r"multiple of world_size, got 5 and 2; rank must .* 2 of 2; window.*; seed.*; ep.*; start"
    ):
        ShuffledReader(
            store,
            HOOK,
            split="train",
            batch_size=5,
            seed=-1,
            rank=2,
            world_size=2,
            window_contexts=0,
            epochs=0,
            start_batch=-1,
        )
    with pytest.raises(ValueError, match=r"one batch of 1000 rows, but 1 epoch\(s\) of it have 180 usable rows"):
        ShuffledReader(store, HOOK, split="train", batch_size=1000, seed=0, epochs=1)


def test_dtype_is_the_hooks_own(built: Path) -> None:
    store = ActivationStore.open(built)
    for hook, dtype in ((example_store.WIDE, torch.bfloat16), (example_store.NARROW, torch.float32)):
        batch = next(iter(ShuffledReader(store, hook, split="train", batch_size=4, seed=0)))
        assert batch.dtype == dtype


def test_thread_ends_when_iteration_is_left(store: ActivationStore) -> None:
    for _ in ShuffledReader(store, HOOK, split="train", batch_size=4, seed=0, window_contexts=2):
        break
    assert not [thread for thread in threading.enumerate() if thread.name == "ShuffledReader"]


def test_damage_found_by_the_prefetch_thread_reaches_the_caller(damaged: Path) -> None:
    path = damaged / f"data.zarr/hooks/{example_store.NARROW.replace(':', '@')}/activations/c/1/0"
    path.write_bytes(bytes(100) + path.read_bytes()[100:])
    reader = ShuffledReader(ActivationStore.open(damaged), example_store.NARROW, split="train", batch_size=4, seed=0)
    with pytest.raises(CorruptionError, match=r"\(shard 1\): chunk 0 must match its checksum"):
        list(itertools.islice(reader, 100))


def test_mixing_is_one_neighbour_less_with_wider_windows(store: ActivationStore) -> None:
    def expected(window_contexts: int) -> float:
        return ShuffledReader(
            store, HOOK, split="train", batch_size=20, seed=0, window_contexts=window_contexts
        ).expected_same_context

    assert expected(1) == pytest.approx(19.0)  # one context at a time: all 19 other rows are from it
    assert expected(30) == pytest.approx(19 * 5 / 179)  # six rows of each of 30 contexts
