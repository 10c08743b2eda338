import random
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import get_args

import example_store
import numpy as np
import pytest
from backend_contract import files

from storage import ActivationStore, HookSpec, StorageError, StoreSpec, verify
from storage.backends import backend_for
from storage.objects import ObjectBackend, Patience
from storage.ranges import RangeReader
from tests.s3_server import Fault, FaultyProxy, Policy, S3Server, environment

PATIENT = Patience(budget_s=20, timeout_s=1.0, first_wait_s=0.01, max_wait_s=0.05)
HASTY = Patience(budget_s=0.3, timeout_s=0.2, first_wait_s=0.01, max_wait_s=0.05)
PASSING = [fault for fault in get_args(Fault) if fault not in ("forbid", "conflict")]

Through = Callable[[Policy, Patience], tuple[ObjectBackend, FaultyProxy]]


@pytest.fixture
def through(s3: S3Server, s3_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Through]:
    """A backend whose requests pass a proxy with that policy."""
    proxies: list[FaultyProxy] = []

    def make(policy: Policy, patience: Patience) -> tuple[ObjectBackend, FaultyProxy]:
        proxies.append(FaultyProxy(s3.port, policy))
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxies[-1].endpoint)
        backend = ObjectBackend.from_url(s3_url, patience=patience)
        monkeypatch.setenv("AWS_ENDPOINT_URL", s3.endpoint)
        return backend, proxies[-1]

    yield make
    for proxy in proxies:
        proxy.close()


class FirstOfEach:
    """A fault at the first request of each method and path."""

    def __init__(self, fault: Fault) -> None:
        self.fault = fault
        self.known: set[tuple[str, str]] = set()

    def __call__(self, method: str, path: str) -> Fault | None:
        new = (method, path) not in self.known
        self.known.add((method, path))
        return self.fault if new else None


@pytest.mark.parametrize("fault", PASSING)
def test_every_operation_succeeds_in_spite_of_one_failure(through: Through, fault: Fault) -> None:
    backend, proxy = through(FirstOfEach(fault), replace(PATIENT, timeout_s=0.2) if fault == "stall" else PATIENT)
    backend.write("staging/a", [b"12", b"34"])
    assert backend.read("staging/a") == b"1234"
    assert bytes(backend.open("staging/a")[1:3]) == b"23"
    assert backend.publish("staging/a", "commits/0") is True
    assert backend.publish("staging/a", "commits/0") is True  # the same bytes: it takes itself for the first
    backend.write("staging/b", [b"b"])
    assert backend.publish("staging/b", "commits/0") is False
    assert backend.install("staging/a", "data/0") in (True, False)  # False: the answer to the removal got lost
    assert backend.read("data/0") == b"1234"
    assert backend.list("staging") == ["b"]
    backend.remove("staging")
    assert backend.list("staging") == []
    assert sum(seen == fault for _, _, seen in proxy.seen) >= 10


def test_lost_answer_to_a_conditional_put_does_not_lose_the_decision(through: Through) -> None:
    lose: list[str] = []

    def policy(method: str, path: str) -> Fault | None:
        return "lose the answer" if lose and method == "PUT" and path.endswith(lose[0]) and lose.pop() else None

    backend, _ = through(policy, PATIENT)
    backend.write("staging/a", [b"a"])
    backend.write("staging/b", [b"b"])
    lose.append("commits/0")
    assert backend.publish("staging/a", "commits/0") is True
    lose.append("commits/0")
    assert backend.publish("staging/b", "commits/0") is False
    assert backend.read("commits/0") == b"a"


def test_conditional_put_that_conflicts_with_one_under_way_is_repeated(through: Through) -> None:
    left = [3]

    def policy(method: str, path: str) -> Fault | None:
        if method == "PUT" and path.endswith("commits/0") and left[0]:
            left[0] -= 1
            return "conflict"
        return None

    backend, _ = through(policy, PATIENT)
    backend.write("staging/a", [b"a"])
    assert backend.publish("staging/a", "commits/0") is True
    assert backend.read("commits/0") == b"a"
    left[0] = 1000
    backend.remove("commits/0")
    with pytest.raises(StorageError, match=r"must either create .*/commits/0 or show what stands there"):
        backend.publish("staging/a", "commits/0")


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow)])
def test_store_written_over_a_bad_network_is_the_same(through: Through, built: Path, seed: int) -> None:
    drawn = random.Random(seed)
    faults = [fault for fault in PASSING if fault != "stall"]

    def policy(method: str, path: str) -> Fault | None:
        return drawn.choice(faults) if drawn.random() < 0.15 else None

    backend, proxy = through(policy, PATIENT)
    example_store.build(backend.location(), backend=backend)
    assert sum(fault is not None for _, _, fault in proxy.seen) > 15
    assert verify(backend.location()) == []
    assert files(backend_for(backend.location())) == files(backend_for(built))


def test_parts_of_a_large_file_are_repeated_one_by_one(through: Through, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("storage.objects.PART_BYTES", 5 * 2**20)
    once = FirstOfEach("refuse")
    backend, proxy = through(lambda method, path: once(method, path.partition("&uploadId")[0]), PATIENT)
    data = np.random.default_rng(0).integers(0, 256, 11 * 2**20, np.uint8)
    backend.write("large", iter([data]))
    assert (backend.map("large") == data).all()
    assert sum(method == "PUT" and "partNumber" in path for method, path, _ in proxy.seen) == 6


@pytest.mark.parametrize(
    ("fault", "cause"), [("refuse", "503 Service Unavailable"), ("throttle", "429 Too Many"), ("stall", "HTTP error")]
)
def test_when_patience_ends_the_error_names_url_and_cause(through: Through, fault: Fault, cause: str) -> None:
    backend, proxy = through(lambda *_: fault, HASTY)
    url = backend.location()
    for request, key in (
        (lambda: backend.read("spec.json"), "spec.json"),
        (lambda: backend.write("staging/a", [b"1"]), "staging/a"),
    ):
        with pytest.raises(
            StorageError, match=rf"must answer for {url}/{key}, but it did not in .*Last cause: .*{cause}"
        ) as raised:
            request()
        assert "run the same command again" in str(raised.value)
        assert "not a secret" not in str(raised.value)
    assert 2 <= len(proxy.seen) < 100


def test_refusal_is_not_repeated(through: Through) -> None:
    backend, proxy = through(lambda *_: "forbid", PATIENT)
    with pytest.raises(StorageError, match="403 Forbidden"):
        backend.read("spec.json")
    assert len(proxy.seen) == 1


def test_bucket_that_does_not_exist_is_named(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in environment(s3.endpoint).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(StorageError, match="s3://nothing/a must be in a bucket that exists"):
        ActivationStore.open("s3://nothing/a")
    with pytest.raises(StorageError, match=r"s3://nothing/a.*NoSuchBucket"):
        example_store.create("s3://nothing/a")


class Counting(ObjectBackend):
    """Counts the bytes that are fetched."""

    fetched = 0

    def _get_range(self, key: str, start: int, stop: int) -> np.ndarray:
        self.fetched += stop - start
        return super()._get_range(key, start, stop)


def large_store(url: str, n_shards: int) -> tuple[Counting, StoreSpec]:
    """Shards of 8 MiB: four contexts, each a chunk of 2 MiB."""
    spec = StoreSpec(
        n_contexts=4 * n_shards,
        context_length=128,
        contexts_per_shard=4,
        n_train_contexts=4 * n_shards,
        hooks=(HookSpec("h", 4096, "float32"),),
        provenance={},
    )
    backend = Counting.from_url(url)
    assert isinstance(backend, Counting)
    table = np.zeros((spec.n_contexts, 128), np.int64)
    writer = example_store.ActivationWriter.create(
        url, spec, tokens=table, document=table, position=table, backend=backend
    )
    for shard in range(n_shards):
        writer.write_shard(shard, {"h": np.full((4, 128, 4096), shard + 1, np.float32)})
    writer.seal()
    return backend, spec


def test_reading_one_context_does_not_fetch_its_shard() -> None:
    backend, _ = large_store("memory://ranged", 1)
    backend.fetched = 0  # the writer reads positions
    store = ActivationStore.open(backend.location(), backend=backend)
    assert (store.activations_numpy("h", 2, 3) == 1).all()
    assert 2**21 <= backend.fetched < 2**21 + 200
    store.activations_numpy("h", 2, 3)
    assert backend.fetched < 2**21 + 200


def test_file_that_is_read_in_order_is_fetched_ahead_and_once(monkeypatch: pytest.MonkeyPatch) -> None:
    backend, spec = large_store("memory://ahead", 2)
    store = ActivationStore.open(backend.location(), backend=backend)
    fetched: list[tuple[str, int, int]] = []
    honest = backend._get_range

    def recording(key: str, start: int, stop: int) -> np.ndarray:
        fetched.append((key, start, stop))
        return honest(key, start, stop)

    monkeypatch.setattr(backend, "_get_range", recording)
    assert (store.activations_numpy("h", 0, 2) == 1).all()
    while backend._ranges._under_way:
        time.sleep(0.001)
    chunks = [entry for entry in fetched if entry[2] - entry[1] > 2**20]
    assert len(chunks) == 4  # two asked for, two ahead, none past the end of the shard
    for context in range(spec.n_contexts):
        assert (store.activations_numpy("h", context, context + 1) == context // 4 + 1).all()
    chunks = [entry for entry in fetched if entry[2] - entry[1] > 2**20]
    assert len(chunks) == len(set(chunks)) == 8


def test_memory_for_reading_does_not_grow_with_the_store() -> None:
    backend, spec = large_store("memory://bounded", 4)
    ranges = backend._ranges = RangeReader(backend._fetch, 9 * 2**20)
    store = ActivationStore.open(backend.location(), backend=backend)
    for context in range(spec.n_contexts):
        assert (store.activations_numpy("h", context, context + 1) == context // 4 + 1).all()
        with ranges._lock:
            kept, held_bytes = list(ranges._kept.values()), ranges.held_bytes
        assert held_bytes <= 9 * 2**20
        assert sum(data.nbytes for data in kept) <= 9 * 2**20
    assert len(kept) >= 4


def test_fetched_chunk_is_tested_each_time_it_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = Counting.from_url("memory://flipped")
    example_store.build("memory://flipped", backend=backend)
    backend._ranges = RangeReader(backend._fetch, 0)
    store = ActivationStore.open("memory://flipped", backend=backend)
    store.activations_numpy(example_store.WIDE, 0, 4)
    honest = backend._get_range

    def flipping(key: str, start: int, stop: int) -> np.ndarray:
        data = honest(key, start, stop).copy()
        data[0] ^= 1
        return data

    monkeypatch.setattr(backend, "_get_range", flipping)
    with pytest.raises(StorageError, match="chunk 0 must match its checksum"):
        store.activations_numpy(example_store.WIDE, 0, 4)
