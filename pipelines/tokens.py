"""Pack documents into contexts: documents keep to their split, positions restart at each document.

A context holds documents of one split only. A document that does not fit into the rest of a context goes on in the next
one as a new span, whose attention and positions start again. Contexts are shuffled by seed inside their split and the
train contexts come first, so that a shard is a random sample and a split is a range.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.config import CollectConfig, TextSource
from pipelines.corpora import heldout_mask, read_source, stratified_order
from pipelines.documents import Document, Documents, Spans
from pipelines.errors import UsageError


@dataclass(frozen=True)
class Packed:
    """Contexts of both splits, train first."""

    tokens: NDArray[np.int32]
    """(n_contexts, context_length)"""
    document: NDArray[np.int32]
    """(n_contexts, context_length), rows of `documents`"""
    position: NDArray[np.int32]
    """(n_contexts, context_length), restarting at each span"""
    n_train_contexts: int
    documents: Documents
    spans: Spans
    text_provenance: list[dict[str, Any]]


def plan_tokens(sources: Sequence[TextSource], collect: CollectConfig, tokenizer: Any, seed: int) -> Packed:
    """Choose, split, tokenise and pack the documents; the same inputs give the same bytes.

    Args:
        tokenizer: a Hugging Face fast tokenizer.

    Raises:
        UsageError: the sources hold too few tokens, or a split gets no whole context.
    """
    rng = np.random.default_rng([seed, 0])
    total_weight = sum(source.weight for source in sources)
    chosen: list[Document] = []
    token_ids: list[list[int]] = []
    provenance = []
    for source in sources:
        documents, origin = read_source(source)
        budget = round(collect.n_tokens * source.weight / total_weight)
        order = stratified_order([document.topic for document in documents], rng)
        found = 0
        for index, ids in _tokenise(documents, order, tokenizer, collect.prepend_bos):
            if found >= budget:
                break
            chosen.append(documents[index])
            token_ids.append(ids)
            found += len(ids)
        if found < budget:
            raise UsageError(
                f"text source {origin['origin']} holds {found:,} tokens, the config asks for {budget:,}: "
                "lower collect.n_tokens or the source's weight, or add a source"
            )
        provenance.append({**origin, "weight": source.weight})
    held_out = heldout_mask([document.topic for document in chosen], collect.heldout_fraction)
    return _pack(chosen, token_ids, held_out, collect, tokenizer.bos_token_id, rng, provenance)


def _tokenise(
    documents: list[Document], order: NDArray[np.int64], tokenizer: Any, prepend_bos: bool, batch: int = 512
) -> Iterator[tuple[int, list[int]]]:
    if prepend_bos and tokenizer.bos_token_id is None:
        raise UsageError("collect.prepend_bos is on, but this model's tokenizer has no BOS token: turn it off")
    for start in range(0, len(order), batch):
        rows = order[start : start + batch]
        # Special tokens are ours to place: once per document, wherever its spans begin.
        encoded = tokenizer([documents[row].text for row in rows], add_special_tokens=False, verbose=False)["input_ids"]
        yield from ((int(row), ids) for row, ids in zip(rows, encoded, strict=True) if ids)


def _pack(
    chosen: list[Document],
    token_ids: list[list[int]],
    held_out: NDArray[np.bool_],
    collect: CollectConfig,
    bos: int | None,
    rng: np.random.Generator,
    provenance: list[dict[str, Any]],
) -> Packed:
    length = collect.context_length
    parts = []
    for name, rows in (("train", np.flatnonzero(~held_out)), ("heldout", np.flatnonzero(held_out))):
        part = _pack_split([token_ids[row] for row in rows], rows, length, bos if collect.prepend_bos else None)
        if len(part[0]) == 0:
            raise UsageError(
                f"the {name} split has {sum(len(token_ids[row]) for row in rows)} tokens, fewer than one "
                f"context of {length}: "
                "raise collect.n_tokens, give more documents, or lower collect.context_length"
            )
        order = rng.permutation(len(part[0]))
        parts.append((*(array[order] for array in part),))
    tokens, document, position, document_token = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    stored = np.bincount(document.ravel(), minlength=len(chosen))
    documents = Documents(
        id=[d.id for d in chosen],
        source=[d.source for d in chosen],
        title=[d.title for d in chosen],
        topic=[d.topic for d in chosen],
        split=["heldout" if h else "train" for h in held_out],
        n_tokens=[int(n) for n in stored],
        text=[d.text for d in chosen],
    )
    return Packed(
        tokens=tokens,
        document=document,
        position=position,
        n_train_contexts=len(parts[0][0]),
        documents=documents,
        spans=_spans(document, position, document_token),
        text_provenance=provenance,
    )


def _pack_split(
    token_ids: list[list[int]], rows: NDArray[np.int64], length: int, bos: int | None
) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.int32], NDArray[np.int32]]:
    """Tokens, document, position and token-of-document of whole contexts; the last, incomplete one is dropped."""
    columns: list[list[int]] = [[], [], [], []]
    filled = 0
    for ids, row in zip(token_ids, rows, strict=True):
        taken = 0
        while taken < len(ids):
            room = length - filled % length
            lead = 1 if bos is not None and room > 1 else 0
            piece = ids[taken : taken + room - lead]
            columns[0] += [bos] * lead + piece if bos is not None else piece
            columns[1] += [int(row)] * (lead + len(piece))
            columns[2] += range(lead + len(piece))
            columns[3] += [taken] * lead + list(range(taken, taken + len(piece)))
            taken += len(piece)
            filled += lead + len(piece)
    n_contexts = filled // length
    arrays = [
        np.asarray(column[: n_contexts * length], dtype=np.int32).reshape(n_contexts, length) for column in columns
    ]
    return arrays[0], arrays[1], arrays[2], arrays[3]


def _spans(document: NDArray[np.int32], position: NDArray[np.int32], document_token: NDArray[np.int32]) -> Spans:
    context, start = np.nonzero(position == 0)
    length = position.shape[1]
    ends = np.append(context[1:] * length + start[1:], document.size)
    return Spans(
        context=context.astype(np.int32),
        start=start.astype(np.int32),
        length=(ends - (context * length + start)).astype(np.int32),
        document=document[context, start],
        document_token=document_token[context, start],
    )
