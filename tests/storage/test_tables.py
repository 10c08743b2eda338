"""Extra per-token tables, and the masks and selections that follow from them."""

import json
import shutil
from pathlib import Path
from typing import Any

import example_store
import numpy as np
import pytest
import zarr
from example_store import NARROW

from storage import BOS, PADDING, SINK, ActivationStore, ActivationWriter, SpecMismatchError, StoreSpec, TableSpec

SPEC = example_store.spec()
EXTRA = example_store.extra_tables(SPEC)
DTYPES = ["uint8", "int8", "int16", "int32", "uint32"]


def plain_store(
    path: Path, tables: tuple[TableSpec, ...] = (), values: dict[str, Any] | None = None
) -> ActivationStore:
    """The example store with other extra tables."""
    spec = StoreSpec(**{**vars(SPEC), "tables": tables})
    writer = ActivationWriter.create(path, spec, **example_store.tables(spec), tables=values)
    example_store.fill(writer)
    writer.seal()
    return ActivationStore.open(path)


def test_tables_read_back_in_their_own_type(built: Path) -> None:
    store = ActivationStore.open(built)
    for name, dtype in (("flags", np.uint8), ("source", np.int16)):
        table = store.table(name, 2, 9)
        assert table.dtype == dtype
        assert (table == EXTRA[name][2:9]).all()
    assert (store.table("tokens", 0, 10) == store.tokens).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_table_keeps_the_whole_range_of_its_type(tmp_path: Path, dtype: str) -> None:
    limits = np.iinfo(dtype)
    values = np.random.default_rng(0).integers(limits.min, limits.max, (10, 8), endpoint=True)
    values[0, :2] = limits.min, limits.max
    store = plain_store(tmp_path / "s", (TableSpec("turn", dtype),), {"turn": values})  # type: ignore[arg-type]
    assert (store.table("turn", 0, 10) == values).all()
    stock = zarr.open_array(str(tmp_path / "s/data.zarr/turn"), mode="r")
    assert stock.dtype == dtype
    assert stock.fill_value == {"int8": -128, "int16": -1, "int32": -1}.get(dtype, limits.max)
    assert (stock[:] == values).all()


def test_tables_are_part_of_the_fingerprint() -> None:
    others = [(), (TableSpec("flags", "uint8"),), (TableSpec("flags", "uint8"), TableSpec("source", "int32"))]
    prints = {StoreSpec(**{**vars(SPEC), "tables": tables}).fingerprint for tables in others}
    assert len(prints | {SPEC.fingerprint}) == 4


def test_digest_of_every_table_is_recorded(built: Path) -> None:
    assert set(json.loads((built / "tables.json").read_text())["tables"]) == set(SPEC.table_dtypes)


def test_create_refuses_another_extra_table_under_the_same_settings(built: Path) -> None:
    changed = {**EXTRA, "source": EXTRA["source"] + 1}
    with pytest.raises(SpecMismatchError, match="same settings but other source"):
        ActivationWriter.create(built, SPEC, **example_store.tables(SPEC), tables=changed)


def test_create_lists_all_that_does_not_fit(tmp_path: Path) -> None:
    wrong = {"flags": EXTRA["flags"] + 255, "other": EXTRA["flags"]}
    with pytest.raises(
        ValueError, match=r"'other' is not in the spec; flags must lie in \[0, 255\].*257\]; table 'source' is absent"
    ):
        ActivationWriter.create(tmp_path / "s", SPEC, **example_store.tables(SPEC), tables=wrong)


@pytest.mark.parametrize("name", ["tokens", "position", "hooks", "", "A", "a/b", "1", "a.b"])
def test_name_of_a_table_must_be_plain_and_free(name: str) -> None:
    with pytest.raises(ValueError, match="The name of a table must be of lower-case letters"):
        TableSpec(name)


def test_type_of_a_table_is_checked() -> None:
    with pytest.raises(ValueError, match="dtype of table 'a' must be one of uint8, int8, int16, int32, uint32"):
        TableSpec("a", "uint16")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="'flags' holds bits and must be uint8, got int32"):
        TableSpec("flags")
    with pytest.raises(ValueError, match=r"tables must differ in name, got \['a', 'a'\]"):
        StoreSpec(**{**vars(SPEC), "tables": (TableSpec("a"), TableSpec("a"))})


def test_mask_has_the_bits_of_the_flags_and_of_sinks(built: Path) -> None:
    store = ActivationStore.open(built)
    mask = store.mask(NARROW, 0, 10)
    assert mask.dtype == np.uint8
    assert (mask & ~np.uint8(SINK) == EXTRA["flags"]).all()
    assert (mask[:, 0] == BOS | SINK).all()
    assert (store.mask(NARROW, 3, 4) == mask[3:4]).all()


def test_padding_is_never_a_sink_and_never_usable(tmp_path: Path) -> None:
    flags = np.zeros((10, 8), np.uint8)
    flags[2] = PADDING  # a whole context, its first position too
    store = plain_store(tmp_path / "s", (TableSpec("flags", "uint8"),), {"flags": flags})
    assert (store.mask(NARROW, 2, 3) == PADDING).all()
    assert store.sink_mask(NARROW, 2, 3).all()


def test_store_without_flags_has_neither_bos_nor_padding(tmp_path: Path) -> None:
    store = plain_store(tmp_path / "s")
    mask = store.mask(NARROW, 0, 10)
    assert ((mask == 0) | (mask == SINK)).all()
    assert ((mask == SINK) == store.sink_mask(NARROW, 0, 10)).all()


def test_unknown_bits_of_flags_are_left_out(tmp_path: Path) -> None:
    flags = np.full((10, 8), 0xF8, np.uint8)
    store = plain_store(tmp_path / "s", (TableSpec("flags", "uint8"),), {"flags": flags})
    assert set(np.unique(store.mask(NARROW, 0, 10))) == {0, SINK}


def test_selection_is_the_intersection_over_its_tables(built: Path) -> None:
    store = ActivationStore.open(built)
    chosen = store.select({"source": {-1, 1}, "position": [0]}, 1, 9)
    assert (chosen == (np.isin(EXTRA["source"], [-1, 1]) & (store.position == 0))[1:9]).all()
    assert chosen.any()
    assert store.select({}, 1, 9).all()
    assert not store.select({"source": []}, 1, 9).any()
    assert not store.select({"source": [7]}, 1, 9).any()


def test_unknown_table_is_named(built: Path) -> None:
    store = ActivationStore.open(built)
    message = "no table 'role'; it has tokens, document, position, flags, source"
    with pytest.raises(ValueError, match=message):
        store.table("role", 0, 1)
    with pytest.raises(ValueError, match=message):
        store.select({"role": [1]}, 0, 1)
    with pytest.raises(ValueError, match=r"Contexts must lie in \[0, 10\]"):
        store.select({}, 0, 11)


def test_a_copy_with_another_table_is_told_apart(built: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(built, tmp_path / "copy"))
    spec = StoreSpec(**{**vars(SPEC), "tables": SPEC.tables[:1]})
    with pytest.raises(SpecMismatchError, match=r"tables\.1\.name: store 'source', asked for 'absent'"):
        ActivationWriter.create(copy, spec, **example_store.tables(SPEC), tables={"flags": EXTRA["flags"]})
