"""Every kind of file of a store, damaged in every way: `verify` finds it, and readers refuse what they read of it.

A kind is a path with its numbers and hook taken out; a file of each is damaged, another one for each way of damaging.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import example_store
import numpy as np
import pytest

from storage import ActivationStore, FormatError, LatentStore, LatentWriter, NotFoundError, StorageError, verify

SPEC = "spec.json"
N_FLIPS = 3
"""Bits flipped per file, besides one in its first and one in its last byte."""
N_FILES = 2
"""Files of each kind that are damaged."""
READERS_IGNORE = ("zarr.json",)
"""What only other Zarr readers read."""

Damage = Callable[[bytes, np.random.Generator], Iterator[bytes | None]]
"""Versions of a file to put in its place; None removes it."""


def flip(data: bytes, rng: np.random.Generator, n_flips: int = N_FLIPS) -> Iterator[bytes]:
    for place in [0, len(data) - 1, *rng.integers(0, len(data), n_flips).tolist()]:
        bad = bytearray(data)
        bad[place] ^= 1 << int(rng.integers(8))
        yield bytes(bad)


def truncate(data: bytes, rng: np.random.Generator) -> Iterator[bytes]:
    for n_bytes in {0, len(data) // 2, len(data) - 1, int(rng.integers(len(data)))}:
        yield data[:n_bytes]


def remove(data: bytes, rng: np.random.Generator) -> Iterator[None]:
    yield None


def grow(data: bytes, rng: np.random.Generator) -> Iterator[bytes]:
    yield data + b"\n"
    yield data + data[-1:] * 100


def swap(data: bytes, rng: np.random.Generator) -> Iterator[bytes]:
    """Two different stretches change places: what a sum of bytes would not notice."""
    n = len(data) // 3
    if n and data[:n] != data[-n:]:
        yield data[-n:] + data[n:-n] + data[:n]


DAMAGES: list[Damage] = [flip, truncate, remove, grow, swap]


def build_latents(path: Path) -> None:
    writer = LatentWriter.create(path, {"d_sae": 5, "n_shards": 3, "n_rows": 30, "fingerprint": "x"})
    for shard in writer.missing():
        rows = np.arange(10) + 10 * shard
        writer.write_shard(shard, rows, rows % 4, rows.astype(np.float32) + 1)
    writer.seal()


BUILD: dict[str, Callable[[Path], None]] = {
    "plain": lambda path: example_store.build(path),
    "coded": lambda path: example_store.build(path, example_store.coded_spec()),
    "latents": build_latents,
}


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    paths = {name: tmp_path_factory.mktemp(name) / "store" for name in BUILD}
    for name, build in BUILD.items():
        build(paths[name])
    return paths


def kind_of(key: str) -> str:
    key = re.sub(r"hooks/[^/]+/", "hooks/<hook>/", key)
    key = re.sub(r"data\.zarr/(?!hooks)\w+/", "data.zarr/<table>/", key)
    return re.sub(r"\d+", "<i>", key.replace("/c/0/0", "/c/<i>/0"))


def files(path: Path) -> dict[str, list[str]]:
    """Keys by kind, without the empty files that only keep a directory."""
    kinds: dict[str, list[str]] = {}
    for file in sorted(path.rglob("*")):
        if file.is_file() and file.name != ".keep":
            key = str(file.relative_to(path))
            kinds.setdefault(kind_of(key), []).append(key)
    return kinds


def read_everything(path: Path, *, tail: bool) -> None:
    if (path / "meta.json").exists() and not (path / "data.zarr").exists():
        latents = LatentStore.open(path)
        latents.block(0, 5)
        latents.counts()
        return
    store = ActivationStore.open(path, tail=tail)
    for table in store.spec.table_dtypes:
        store.table(table, 0, 10)
    for hook in store.spec.hooks:
        store.activations_numpy(hook.name, 0, 10)
        store.norms(hook.name, 0, 10)
        store.mask(hook.name, 0, 10)
        store.statistics(hook.name)
    for name in example_store.SIDECARS:
        store.sidecar(name)
    store.document_spans(3)


ACTIVATION_KINDS = [
    "spec.json",
    "tables.json",
    "seal.json",
    "documents.parquet",
    "commits/<i>.json",
    "data.zarr/zarr.json",
    "data.zarr/hooks/zarr.json",
    "data.zarr/<table>/zarr.json",
    "data.zarr/<table>/c/<i>/<i>",
    "data.zarr/hooks/<hook>/zarr.json",
    "data.zarr/hooks/<hook>/activations/zarr.json",
    "data.zarr/hooks/<hook>/activations/c/<i>/<i>",
    "data.zarr/hooks/<hook>/norms/zarr.json",
    "data.zarr/hooks/<hook>/norms/c/<i>",
]
SCALES_KINDS = ["data.zarr/hooks/<hook>/scales/zarr.json", "data.zarr/hooks/<hook>/scales/c/<i>"]
LATENT_KINDS = [
    "meta.json",
    "seal.json",
    "commits/<i>.json",
    *(f"pieces/<i>/{name}.npy" for name in ("indptr", "row", "value")),
]
KINDS = {"plain": ACTIVATION_KINDS, "coded": ACTIVATION_KINDS + SCALES_KINDS, "latents": LATENT_KINDS}


@pytest.mark.parametrize("store", KINDS)
def test_kinds_are_all_that_there_are(sound: dict[str, Path], store: str) -> None:
    assert sorted(files(sound[store])) == sorted(KINDS[store])


@pytest.mark.parametrize("store", KINDS)
def test_sound_store_is_read_without_complaint(sound: dict[str, Path], store: str) -> None:
    read_everything(sound[store], tail=False)
    read_everything(sound[store], tail=True)
    assert verify(sound[store]) == []


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
@pytest.mark.parametrize(("store", "kind"), [(store, kind) for store, kinds in KINDS.items() for kind in kinds])
def test_damage_is_found(sound: dict[str, Path], tmp_path: Path, store: str, kind: str, damage: Damage) -> None:
    rng = np.random.default_rng([DAMAGES.index(damage), *kind.encode()])
    path = Path(shutil.copytree(sound[store], tmp_path / "store"))
    keys = files(path)[kind]
    tried = 0
    for key in rng.choice(keys, min(len(keys), N_FILES), replace=False).tolist():
        good = (path / key).read_bytes()
        for bad in damage(good, rng):
            if bad is None:
                (path / key).unlink()
            else:
                (path / key).write_bytes(bad)
            check(path, key)
            (path / key).write_bytes(good)
            tried += 1
    assert tried >= (1 if damage is not swap else 0)
    read_everything(path, tail=False)


def check(path: Path, key: str) -> None:
    try:
        problems = verify(path)
    except NotFoundError:
        assert key in (SPEC, "meta.json")  # without it there is no store
    else:
        named = {problem.file for problem in problems}  # the digest of these is in every other file
        assert named if key in (SPEC, "meta.json") else key in named, f"verify overlooked {key}"
    if key.endswith(READERS_IGNORE):
        return
    # A sealed store's commits are read to follow a store that is being written; then its seal is not.
    with pytest.raises(StorageError):
        read_everything(path, tail=key.startswith("commits/"))


@pytest.mark.parametrize("store", ["plain", "coded", "latents"])
def test_store_of_a_newer_version_is_refused(sound: dict[str, Path], tmp_path: Path, store: str) -> None:
    path = Path(shutil.copytree(sound[store], tmp_path / "store"))
    for key in ("seal.json", "commits/000001.json", "tables.json", SPEC, "meta.json"):
        if not (path / key).exists():
            continue
        good = (path / key).read_text()
        assert '"format_version": 1' in good
        (path / key).write_text(good.replace('"format_version": 1', '"format_version": 2'))
        with pytest.raises(StorageError, match=r"says 2: upgrade this package to read it"):
            read_everything(path, tail=key.startswith("commits/"))
        assert key in {problem.file for problem in verify(path)}
        (path / key).write_text(good)


def test_meta_without_a_key_is_refused(sound: dict[str, Path], tmp_path: Path) -> None:
    path = Path(shutil.copytree(sound["latents"], tmp_path / "store"))
    meta = (path / "meta.json").read_text()
    (path / "meta.json").write_text(meta.replace('"n_shards"', '"n_shardr"'))
    with pytest.raises(FormatError, match=r"must have .*n_shards is absent"):
        LatentStore.open(path)
    assert [problem.kind for problem in verify(path)] == ["unreadable"]


@pytest.mark.slow
@pytest.mark.parametrize(("store", "kind"), [(store, kind) for store, kinds in KINDS.items() for kind in kinds])
def test_many_flipped_bits_are_all_found(sound: dict[str, Path], tmp_path: Path, store: str, kind: str) -> None:
    path = Path(shutil.copytree(sound[store], tmp_path / "store"))
    for key in files(path)[kind]:
        good = (path / key).read_bytes()
        for bad in flip(good, np.random.default_rng(0), n_flips=100):
            (path / key).write_bytes(bad)
            check(path, key)
        (path / key).write_bytes(good)
