import itertools
import json
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import example_store
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from storage import PADDING, ActivationStore, CorruptionError, HookSpec, ShuffledReader, StoreSpec, TableSpec
from storage.spec import Split
from storage.streams import WindowPlan, parts
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


def usable(store: ActivationStore, split: Split = "train") -> set[int]:
    start, stop = store.spec.split_range(split)
    rows = np.arange(start * LENGTH, stop * LENGTH)
    return set(rows[store.position[start:stop].ravel() != 0].tolist())


def reader_of(
    store: ActivationStore,
    *,
    batch_size: int = 20,
    seed: int = 0,
    split: Split = "train",
    window_contexts: int = 8,
    n_streams: int = 4,
    rank: int = 0,
    world_size: int = 1,
    epochs: int | None = None,
    start_batch: int = 0,
) -> ShuffledReader:
    return ShuffledReader(
        store,
        HOOK,
        split=split,
        batch_size=batch_size,
        seed=seed,
        window_contexts=window_contexts,
        n_streams=n_streams,
        rank=rank,
        world_size=world_size,
        epochs=epochs,
        start_batch=start_batch,
    )


@pytest.mark.parametrize("split", ["train", "heldout", "all"])
@pytest.mark.parametrize(("window_contexts", "n_streams"), [(1, 1), (7, 5), (1024, 16)])
def test_epochs_give_every_usable_row_once_each(
    store: ActivationStore, split: Split, window_contexts: int, n_streams: int
) -> None:
    # as many epochs as make whole batches: then nothing is left over
    reader = reader_of(
        store,
        split=split,
        window_contexts=window_contexts,
        n_streams=n_streams,
        batch_size=n_streams,
        epochs=n_streams,
    )
    rows = [row for batch in stream(reader) for row in batch]
    assert reader.n_batches == reader.n_rows
    assert Counter(rows) == dict.fromkeys(usable(store, split), n_streams)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(1, 40), st.integers(1, 6), st.integers(1, 12), st.integers(1, 3))
def test_fewer_rows_than_a_batch_are_left_over_and_none_is_repeated(
    store: ActivationStore, window: int, n_streams: int, take: int, epochs: int
) -> None:
    batch_size = n_streams * take
    reader = reader_of(store, window_contexts=window, n_streams=n_streams, batch_size=batch_size, epochs=epochs)
    batches = stream(reader)
    assert {len(batch) for batch in batches} == {batch_size}
    assert len(batches) == reader.n_batches == epochs * 180 // batch_size
    counts = Counter(row for batch in batches for row in batch)
    assert set(counts) <= usable(store)
    missing = [row for row in usable(store) for _ in range(epochs - counts[row])]
    assert max(counts.values()) <= epochs
    assert len(missing) == epochs * 180 % batch_size < batch_size


def test_streams_differ_by_at_most_one_row_after_every_window(store: ActivationStore) -> None:
    plan = WindowPlan(0, 30, 6, 7, seed=3)
    count, given = 0, [0] * 4
    for epoch in range(3):
        for window in plan.windows(epoch):
            usable_rows = np.full(sum(map(len, window.runs)), 6)
            for part in parts(window, usable_rows, count, range(4), 4):
                given[part.stream] += part.n_rows
            count += int(usable_rows.sum())
            assert sum(given) == count
            assert max(given) - min(given) <= 1


@given(st.integers(0, 30), st.integers(1, 40), st.integers(1, 9), st.integers(1, 50), st.integers(0, 3))
def test_windows_cover_the_split_once_in_runs_within_shards(
    first: int, n: int, per_shard: int, window: int, epoch: int
) -> None:
    plan = WindowPlan(first, first + n, per_shard, window, seed=1)
    windows = list(plan.windows(epoch))
    contexts = [context for w in windows for run in w.runs for context in range(run.start, run.stop)]
    assert sorted(contexts) == list(range(first, first + n))
    sizes = {sum(map(len, w.runs)) for w in windows}
    assert len(windows) == plan.n_windows
    assert max(sizes) <= window
    assert max(sizes) - min(sizes) <= 1
    assert min(sizes) == plan.least_window
    assert all(run.start // per_shard == (run.stop - 1) // per_shard for w in windows for run in w.runs)
    # a shard is read through before the next one begins
    shards = [shard for shard, _ in itertools.groupby(context // per_shard for context in contexts)]
    assert shards == plan.shards(epoch)


def test_sinks_are_given_when_asked_for(store: ActivationStore) -> None:
    reader = ShuffledReader(store, HOOK, split="train", batch_size=240, seed=0, epochs=1, exclude_sinks=False)
    assert sorted(stream(reader)[0]) == list(range(240))


@pytest.fixture(scope="module")
def flagged(tmp_path_factory: pytest.TempPathFactory) -> ActivationStore:
    """20 contexts of 8 of the same rows; every context ends in two padded tokens, and the role is 0 and 1 in turn."""
    spec = StoreSpec(
        n_contexts=20,
        context_length=LENGTH,
        contexts_per_shard=6,
        n_train_contexts=20,
        hooks=(HookSpec(HOOK, 2, "float32"),),
        tables=(TableSpec("flags", "uint8"), TableSpec("role", "int8")),
    )
    flags = np.zeros((20, LENGTH), np.uint8)
    flags[:, -2:] = PADDING
    roles = np.broadcast_to(np.arange(LENGTH) % 2, (20, LENGTH))
    tables = example_store.tables(spec) | {"tables": {"flags": flags, "role": roles.copy()}}
    path = tmp_path_factory.mktemp("flagged") / "s"
    writer = ActivationWriter.create(path, spec, **tables)  # type: ignore[arg-type]
    rows = np.stack([np.full(spec.n_tokens, 100.0), np.arange(spec.n_tokens) / 4], axis=1).astype(np.float32)
    for shard in writer.missing():
        start, stop = spec.shard_range(shard)
        writer.write_shard(shard, {HOOK: rows.reshape(20, LENGTH, 2)[start:stop]})
    writer.seal()
    return ActivationStore.open(path)


@pytest.mark.parametrize("exclude_sinks", [True, False])
@pytest.mark.parametrize("select", [None, {"role": [1]}])
def test_padding_is_left_out_and_a_selection_kept(
    flagged: ActivationStore, exclude_sinks: bool, select: dict[str, list[int]] | None
) -> None:
    reader = ShuffledReader(
        flagged,
        HOOK,
        batch_size=2,
        n_streams=2,
        seed=0,
        window_contexts=7,
        epochs=1,
        exclude_sinks=exclude_sinks,
        select=select,
    )
    offsets = range(6) if not exclude_sinks else [1, 2, 3, 5]  # documents begin at 0 and 4
    wanted = [o for o in offsets if select is None or o % 2 == 1]
    rows = [row for batch in stream(reader) for row in batch]
    assert sorted(rows) == [context * LENGTH + offset for context in range(20) for offset in wanted]
    assert reader.state_dict()["settings"]["select"] == select


def test_rows_are_not_in_order(store: ActivationStore) -> None:
    (rows,) = stream(reader_of(store, batch_size=180, window_contexts=30, n_streams=1, epochs=1))
    assert abs(np.corrcoef(rows, np.arange(180))[0, 1]) < 0.3


def test_epochs_and_seeds_differ_and_repeats_are_equal(store: ActivationStore) -> None:
    def read(seed: int) -> list[list[int]]:
        return stream(reader_of(store, batch_size=180, seed=seed), 2)

    first, second = read(0)
    assert first != second
    assert read(0) == [first, second]
    assert read(1)[0] != first


def slow_batches(store: ActivationStore, seed: int, window: int, n_streams: int, batch_size: int) -> Iterator[set[int]]:
    """The plan once more, one row at a time: the oracle. Order inside of a batch is left out."""
    spec, lo, hi = store.spec, 0, 30
    queues: list[list[int]] = [[] for _ in range(n_streams)]
    dealt_to = 0
    for epoch in itertools.count():
        shards = np.random.default_rng([seed, epoch]).permutation(np.arange(-(-hi // spec.contexts_per_shard)))
        per = spec.contexts_per_shard
        contexts = [c for s in shards for c in range(s * per, (s + 1) * per) if lo <= c < hi]
        n_windows = -(-len(contexts) // window)
        cuts = [i * len(contexts) // n_windows for i in range(n_windows + 1)]
        for number, (low, high) in enumerate(itertools.pairwise(cuts)):
            rows = [c * LENGTH + p for c in contexts[low:high] for p in range(LENGTH) if store.position[c, p] != 0]
            share = [0] * n_streams
            for _ in rows:
                share[dealt_to % n_streams] += 1
                dealt_to += 1
            for v in range(n_streams):
                own, rows = rows[: share[v]], rows[share[v] :]
                places = np.random.default_rng([seed, epoch, number, v]).permutation(len(own))
                queues[v] += [row for _, row in sorted(zip(places, own, strict=True))]
            while min(map(len, queues)) >= batch_size // n_streams:
                yield {queue.pop(0) for queue in queues for _ in range(batch_size // n_streams)}


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(1, 40), st.integers(1, 7), st.integers(1, 9), st.integers(0, 3))
def test_batches_are_those_of_the_plan_carried_out_row_by_row(
    store: ActivationStore, window: int, n_streams: int, take: int, seed: int
) -> None:
    size = n_streams * take
    reader = reader_of(store, window_contexts=window, n_streams=n_streams, batch_size=size, seed=seed)
    n = 3 * 180 // size
    expected = list(itertools.islice(slow_batches(store, seed, window, n_streams, size), n))
    assert [set(batch) for batch in stream(reader, n)] == expected


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(1, 40), st.integers(1, 6), st.integers(1, 12), st.integers(0, 30))
def test_any_batch_is_reached_directly(
    store: ActivationStore, window: int, n_streams: int, take: int, start: int
) -> None:
    def reader(start_batch: int) -> ShuffledReader:
        return reader_of(
            store,
            batch_size=n_streams * take,
            seed=3,
            window_contexts=window,
            n_streams=n_streams,
            start_batch=start_batch,
        )

    assert stream(reader(start), 3) == stream(reader(0), start + 3)[start:]


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 9), st.integers(1, 40))
def test_ranks_together_give_the_batches_of_one_process(
    store: ActivationStore, world_size: int, streams_each: int, take: int, window: int
) -> None:
    n_streams = world_size * streams_each

    def reader(rank: int, world_size: int) -> ShuffledReader:
        return reader_of(
            store,
            batch_size=n_streams * take,
            window_contexts=window,
            n_streams=n_streams,
            rank=rank,
            world_size=world_size,
        )

    alone = stream(reader(0, 1), 8)
    ranks = [stream(reader(rank, world_size), 8) for rank in range(world_size)]
    for number, batch in enumerate(alone):
        streams = [batch[v * take : (v + 1) * take] for v in range(n_streams)]
        for rank in range(world_size):
            assert ranks[rank][number] == [row for own in streams[rank::world_size] for row in own]


def test_a_rank_reads_only_the_contexts_of_its_own_streams(
    store: ActivationStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = [0] * 4
    original = ActivationStore.activations_pieces
    for rank in range(4):

        def counting(self: ActivationStore, *args: Any, rank: int = rank) -> Iterator[NDArray[Any]]:
            for piece in original(self, *args):
                read[rank] += len(piece) // LENGTH
                yield piece

        monkeypatch.setattr(ActivationStore, "activations_pieces", counting)
        stream(reader_of(store, n_streams=4, window_contexts=30, rank=rank, world_size=4, epochs=1))
    # 30 contexts in four parts: two parts share the context where they meet
    assert 30 <= sum(read) <= 30 + 3
    assert max(read) <= 9


def test_saved_position_resumes_exactly_with_another_number_of_ranks(store: ActivationStore) -> None:
    reader = reader_of(store)
    batches = iter(reader)
    for _ in range(5):
        next(batches)
    state = json.loads(json.dumps(reader.state_dict()))
    expected = numbers(next(batches)).tolist()
    halves = []
    for rank in range(2):
        other = reader_of(store, rank=rank, world_size=2)
        other.load_state_dict(state)
        halves += stream(other, 1)[0]
    assert sorted(halves) == sorted(expected)


def test_position_of_other_settings_is_refused(store: ActivationStore) -> None:
    state = reader_of(store, batch_size=20, seed=0).state_dict()
    other = reader_of(store, batch_size=12, seed=1)
    with pytest.raises(ValueError, match=r"other settings \(batch_size: saved 20, here 12; seed: saved 0, here 1\)"):
        other.load_state_dict(state)


def test_impossible_settings_are_listed(store: ActivationStore) -> None:
    with pytest.raises(
        ValueError,
        match=r"multiple of n_streams, got 5 and 4; n_streams must be a multiple of world_size, got 4 and 3: each "
        r"stream is read by one rank; rank must .* 3 of 3; window.*; seed.*; ep.*; start",
    ):
        reader_of(store, batch_size=5, seed=-1, rank=3, world_size=3, window_contexts=0, epochs=0, start_batch=-1)
    with pytest.raises(ValueError, match=r"one batch of 1000 rows, but 1 epoch\(s\) of it have 180 usable rows"):
        reader_of(store, batch_size=1000, epochs=1)


def test_dtype_is_the_hooks_own(built: Path) -> None:
    store = ActivationStore.open(built)
    for hook, dtype in ((example_store.WIDE, torch.bfloat16), (example_store.NARROW, torch.float32)):
        batch = next(iter(ShuffledReader(store, hook, split="train", batch_size=16, seed=0)))
        assert batch.dtype == dtype


@pytest.mark.parametrize("hook", [example_store.WIDE, example_store.NARROW, example_store.DEEP])
def test_quantised_and_compressed_rows_come_as_the_store_reads_them(tmp_path: Path, hook: str) -> None:
    example_store.build(tmp_path / "s", example_store.coded_spec())
    store = ActivationStore.open(tmp_path / "s")
    batches = ShuffledReader(store, hook, split="all", batch_size=2, n_streams=2, seed=0, exclude_sinks=False, epochs=1)
    rows = torch.cat(list(batches)).float()
    expected = store.activations(hook, 0, store.spec.n_contexts).float()
    expected = expected[torch.from_numpy(store.mask(hook, 0, store.spec.n_contexts) & PADDING == 0)]
    assert sorted(map(tuple, rows.tolist())) == sorted(map(tuple, expected.tolist()))


def test_batches_keep_their_values_when_the_buffers_are_used_again(store: ActivationStore) -> None:
    reader = reader_of(store, window_contexts=2, epochs=2)
    kept = list(reader)
    assert [numbers(batch).tolist() for batch in kept] == stream(reader_of(store, window_contexts=2, epochs=2))


def test_thread_ends_when_iteration_is_left(store: ActivationStore) -> None:
    for _ in reader_of(store, window_contexts=2):
        break
    assert not [thread for thread in threading.enumerate() if thread.name == "ShuffledReader"]


@pytest.mark.parametrize("kind", ["changed", "missing"])
def test_damage_found_by_the_prefetch_thread_reaches_the_caller(damaged: Path, kind: str) -> None:
    path = damaged / f"data.zarr/hooks/{example_store.NARROW.replace(':', '@')}/activations/c/1/0"
    if kind == "changed":
        path.write_bytes(bytes(100) + path.read_bytes()[100:])
    else:
        path.unlink()
    reader = ShuffledReader(ActivationStore.open(damaged), example_store.NARROW, split="train", batch_size=16, seed=0)
    expected = {"changed": "chunk 0 must match its checksum", "missing": "the file must exist, but it is missing"}
    with pytest.raises(CorruptionError, match=rf"\(shard 1\): {expected[kind]}"):
        list(itertools.islice(reader, 100))


@pytest.mark.parametrize(("window_contexts", "n_streams"), [(30, 1), (30, 4), (15, 4), (15, 2)])
def test_mixing_is_as_expected(store: ActivationStore, window_contexts: int, n_streams: int) -> None:
    def reader(seed: int) -> ShuffledReader:
        return reader_of(store, batch_size=8, window_contexts=window_contexts, n_streams=n_streams, seed=seed, epochs=4)

    pairs = n_rows = 0
    for seed in range(12):
        for batch in stream(reader(seed)):
            per_context = Counter(row // LENGTH for row in batch)
            pairs += sum(n * (n - 1) for n in per_context.values())
            n_rows += len(batch)
    expected = reader(0).expected_same_context
    # batches that lie across two windows, and contexts that lie in two streams, are mixed a little otherwise
    assert pairs / n_rows == pytest.approx(expected, rel=0.15)


def test_mixing_worsens_with_smaller_windows_up_to_a_whole_context(store: ActivationStore) -> None:
    def expected(window_contexts: int) -> float:
        return reader_of(store, n_streams=1, window_contexts=window_contexts).expected_same_context

    assert expected(30) == pytest.approx(19 * 5 / 179)  # six rows of each of 30 contexts
    assert expected(30) < expected(15) < expected(5) < expected(1) == 5


def test_windows_that_mix_too_little_are_refused_with_one_that_does(store: ActivationStore) -> None:
    def reader(window_contexts: int, most: float) -> ShuffledReader:
        return ShuffledReader(
            store,
            HOOK,
            batch_size=20,
            seed=0,
            window_contexts=window_contexts,
            n_streams=4,
            max_same_context=most,
        )

    with pytest.raises(
        ValueError, match=r"at most 1 other rows on average, but .* 7 contexts it is 2\.5\. Shuffle over 15"
    ):
        reader(7, 1.0)
    assert reader(15, 1.0).expected_same_context <= 1
    reader(30, 0.01)  # the whole split is shuffled together: there is nothing larger
