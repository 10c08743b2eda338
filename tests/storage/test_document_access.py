from pathlib import Path

import example_store
import numpy as np
import pytest
import torch
from example_store import DEEP, NARROW, WIDE
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from storage import ActivationStore
from storage.documents import DocumentIndex, Span
from storage.spec import PADDING, StoreSpec, TableSpec


def slow_spans(
    document: NDArray[np.int64], position: NDArray[np.int64], padding: NDArray[np.bool_], wanted: int
) -> list[Span]:
    """Token by token."""
    spans: list[Span] = []
    for context in range(len(document)):
        for offset in range(document.shape[1]):
            if document[context, offset] != wanted or padding[context, offset]:
                continue
            goes_on = spans and spans[-1][0] == context and spans[-1][2] == offset and position[context, offset] > 0
            if goes_on:
                spans[-1] = Span(context, spans[-1].start, offset + 1)
            else:
                spans.append(Span(context, offset, offset + 1))
    return spans


@given(st.integers(1, 6), st.integers(1, 7), st.integers(1, 4), st.booleans(), st.randoms(use_true_random=False))
@settings(max_examples=50)
def test_spans_equal_those_found_token_by_token(
    n_contexts: int, length: int, at_once: int, flags: bool, random
) -> None:
    rng = np.random.default_rng(random.randrange(2**32))
    shape = (n_contexts, length)
    document, position = rng.integers(0, 4, shape), rng.integers(0, 3, shape)
    padding = (rng.random(shape) < 0.3) & flags
    tables = {"document": document, "position": position, "flags": padding * PADDING}
    spec = StoreSpec(
        n_contexts=n_contexts,
        context_length=length,
        contexts_per_shard=1,
        n_train_contexts=0,
        hooks=example_store.spec().hooks,
        tables=(TableSpec("flags", "uint8"),) if flags else (),
    )
    index = DocumentIndex(spec, lambda name, low, high: tables[name][low:high], at_once)
    for wanted in range(5):
        assert index.spans(wanted) == slow_spans(document, position, padding, wanted)


@pytest.mark.parametrize(("kind", "hook"), [("built", WIDE), ("built", NARROW), ("coded", WIDE), ("coded", DEEP)])
def test_activations_of_a_document_are_those_of_its_tokens(
    kind: str, hook: str, request: pytest.FixtureRequest
) -> None:
    store = ActivationStore.open(request.getfixturevalue(kind))
    every = store.activations(hook, 0, 10)
    for document in range(20):
        chosen = torch.from_numpy((store.document == document) & (store.table("flags", 0, 10) & PADDING == 0))
        assert torch.equal(store.document_activations(hook, document), every[chosen])
    assert store.document_spans(3) == [Span(1, 4, 8)]
    assert store.document_spans(7) == [Span(3, 4, 7)]  # its last token is padding


def test_only_the_shards_that_hold_a_document_are_read(damaged: Path) -> None:
    for shard in (0, 2):
        (damaged / f"data.zarr/hooks/{WIDE}/activations/c/{shard}/0").unlink()
    store = ActivationStore.open(damaged)
    assert store.document_activations(WIDE, 11).shape == (4, 12)


def test_unknown_document_is_named(built: Path) -> None:
    store = ActivationStore.open(built)
    for document in (20, -1):
        with pytest.raises(ValueError, match=f"holds no token of document {document}"):
            store.document_spans(document)
