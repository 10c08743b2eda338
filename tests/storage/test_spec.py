import hashlib
from typing import Any

import example_store
import pytest
from hypothesis import given
from hypothesis import strategies as st

from storage import FormatError, HookSpec, SpecMismatchError, StoreSpec, zarr_name
from storage.spec import canonical_json, require_equal_settings

sizes = st.integers(1, 50)


@given(sizes, sizes)
def test_shards_cover_every_context_once(n_contexts: int, contexts_per_shard: int) -> None:
    spec = example_store.spec(n_contexts=n_contexts, contexts_per_shard=contexts_per_shard)
    ranges = [spec.shard_range(shard) for shard in range(spec.n_shards)]
    assert [context for start, stop in ranges for context in range(start, stop)] == list(range(n_contexts))
    assert all(stop - start == contexts_per_shard for start, stop in ranges[:-1])


def test_splits_cover_every_context_once() -> None:
    spec = example_store.spec()
    assert spec.split_range("train") == (0, 8)
    assert spec.split_range("heldout") == (8, 10)
    assert spec.split_range("all") == (0, 10)


def test_split_must_be_known() -> None:
    with pytest.raises(ValueError, match=r"split must be one of train, heldout, all; got 'test'"):
        example_store.spec().split_range("test")  # type: ignore[arg-type]


def test_shard_must_exist() -> None:
    with pytest.raises(ValueError, match=r"must lie in \[0, 3\), got 3"):
        example_store.spec().shard_range(3)


def test_fingerprint_is_the_digest_of_the_json_file() -> None:
    spec = example_store.spec()
    assert spec.fingerprint == hashlib.sha256(canonical_json(spec.to_json())).hexdigest()
    assert StoreSpec.from_json(spec.to_json()) == spec


def test_fingerprint_changes_with_every_setting() -> None:
    fingerprints = {
        example_store.spec(**changed).fingerprint
        for changed in ({}, {"n_contexts": 11}, {"context_length": 4}, {"contexts_per_shard": 5}, {"seed": 1})
    }
    assert len(fingerprints) == 5


def test_default_site_of_a_hook_does_not_change_the_fingerprint() -> None:
    assert HookSpec("model.layers.8:output", 4) == HookSpec("model.layers.8", 4)


@pytest.mark.parametrize(
    ("hook", "name"),
    [
        ("model.layers.8", "model.layers.8"),
        ("model.layers.8:output", "model.layers.8"),
        ("h.0.mlp:input", "h.0.mlp@input"),
    ],
)
def test_zarr_name_keeps_the_module_path(hook: str, name: str) -> None:
    assert zarr_name(hook) == name


@pytest.mark.parametrize(
    "hook", ["", ".", "..", "a/b", "../a", "a..b", "__a", "a:b", "a:", "a b", "ä", "a:input:input"]
)
def test_zarr_name_refuses_what_is_no_module_path(hook: str) -> None:
    with pytest.raises(ValueError, match="A hook name must be a module path"):
        zarr_name(hook)


def test_hook_refuses_bad_width_and_dtype() -> None:
    with pytest.raises(ValueError, match="d_in of hook 'h' must be at least 1, got 0"):
        HookSpec("h", 0)
    with pytest.raises(ValueError, match="dtype of hook 'h' must be one of bfloat16, float16, float32; got 'int8'"):
        HookSpec("h", 1, "int8")  # type: ignore[arg-type]


def test_spec_lists_all_problems_at_once() -> None:
    with pytest.raises(
        ValueError, match=r"n_contexts must be.*n_train_contexts must lie.*hooks must be.*provenance must"
    ):
        StoreSpec(
            n_contexts=0,
            context_length=1,
            contexts_per_shard=1,
            n_train_contexts=1,
            hooks=(HookSpec("h", 1), HookSpec("h:output", 1)),
            provenance={"x": object()},
        )


@pytest.mark.parametrize("version", [2, None, "1"])
def test_other_format_versions_are_refused(version: object) -> None:
    with pytest.raises(FormatError, match=r"must have format version 1, but spec.json says"):
        StoreSpec.from_json({**example_store.spec().to_json(), "format_version": version})


def test_newer_format_version_advises_an_upgrade() -> None:
    with pytest.raises(FormatError, match="upgrade this package"):
        StoreSpec.from_json({**example_store.spec().to_json(), "format_version": 2})


@pytest.mark.parametrize("change", [{"unknown": 1}, {"n_contexts": 0}, {"hooks": [{"nom": "h"}]}])
def test_malformed_spec_is_a_format_error(change: dict[str, Any]) -> None:
    with pytest.raises(FormatError, match="is not a store specification of format version 1"):
        StoreSpec.from_json({**example_store.spec().to_json(), **change})


def test_mismatch_lists_every_differing_key() -> None:
    old, new = example_store.spec().to_json(), example_store.spec(n_contexts=11, seed=3).to_json()
    with pytest.raises(
        SpecMismatchError, match=r"n_contexts: store 10, asked for 11.*provenance.seed: store 0, asked for 3"
    ):
        require_equal_settings(old, new, "runs/x")
    require_equal_settings(old, old, "runs/x")
