"""Pack documents into contexts: documents keep to their split, positions restart at each document.

A context holds documents of one split only. A document that does not fit into the rest of a context goes on in the next
one as a new span, whose attention and positions start again. Contexts are shuffled by seed inside their split and the
train contexts come first, so that a shard is a random sample and a split is a range.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipelines.chat import ROLES
from pipelines.config import CollectConfig, TextSource
from pipelines.corpora import heldout_mask
from pipelines.documents import Documents, Spans
from pipelines.errors import UsageError
from pipelines.progress import Reporter
from pipelines.tokencache import TokenisedSource, tokenised
from pipelines.tokenising import TextTokenizer
from storage import BOS, SPECIAL, TableSpec

TABLES = (
    TableSpec("flags", "uint8"),
    TableSpec("source", "int16"),
    TableSpec("role", "int8"),
    TableSpec("turn", "int16"),
)
"""What the store keeps of each token beside its id, document and position.

flags   BOS at the start of a span, or another special token; contexts are packed, so there is no padding
source  number of the text source
role    `pipelines.chat.ROLES`: plain text, the author of a message, or the chat template
turn    number of the message; template text has the turn of the message that it opens or closes
"""


@dataclass(frozen=True)
class Packed:
    """Contexts of both splits, train first."""

    tokens: NDArray[np.int32]
    """(n_contexts, context_length)"""
    document: NDArray[np.int32]
    """(n_contexts, context_length), rows of `documents`"""
    position: NDArray[np.int32]
    """(n_contexts, context_length), restarting at each span"""
    tables: Mapping[str, NDArray[Any]]
    """(n_contexts, context_length) each, as `TABLES` lists them"""
    n_train_contexts: int
    documents: Documents
    spans: Spans
    text_provenance: list[dict[str, Any]]


class _Chosen(NamedTuple):
    """The chosen documents' tokens, one document after another."""

    tokens: NDArray[np.int32]
    role: NDArray[np.int8]
    turn: NDArray[np.int16]
    start: NDArray[np.int64]
    """First token of each document, and the end."""
    source: NDArray[np.int16]
    """Of each document."""
    is_chat: NDArray[np.bool_]
    """Of each document."""


def plan_tokens(
    sources: Sequence[TextSource],
    collect: CollectConfig,
    tokenizer: TextTokenizer,
    seed: int,
    *,
    cache: Path | None = None,
    ui: Reporter | None = None,
) -> Packed:
    """Choose, split, tokenise and pack the documents; the same inputs give the same bytes.

    Args:
        cache: folder of tokenised sources; by default `token_cache()`.

    Raises:
        UsageError: the sources hold too few tokens, or a split gets no whole context.
    """
    if collect.prepend_bos and tokenizer.bos is None:
        raise UsageError("collect.prepend_bos is on, but this model's tokenizer has no BOS token: turn it off")
    total_weight = sum(source.weight for source in sources)
    parts = [
        tokenised(
            source,
            tokenizer,
            budget=round(collect.n_tokens * source.weight / total_weight),
            seed=seed,
            index=index,
            n_workers=collect.text_workers,
            root=cache,
            ui=ui,
        )
        for index, source in enumerate(sources)
    ]
    topics = [topic for part in parts for topic in part.documents["topic"].to_pylist()]
    held_out = heldout_mask(topics, collect.heldout_fraction)
    packed, n_train = _pack(_join(parts), held_out, collect, tokenizer, np.random.default_rng([seed, 1]))
    stored = np.bincount(packed["document"].ravel(), minlength=len(topics))
    documents = Documents.of(
        **{name: [x for part in parts for x in part.documents[name].to_pylist()] for name in ("id", "title")},
        source=[part.provenance["origin"] for part in parts for _ in range(len(part.documents))],
        topic=topics,
        split=["heldout" if h else "train" for h in held_out],
        n_tokens=stored.tolist(),
        text=pa.chunked_array([chunk for part in parts for chunk in part.documents["text"].chunks]),
        columns=[x for part in parts for x in part.documents["columns"].to_pylist()],
    )
    return Packed(
        tokens=packed["tokens"],
        document=packed["document"],
        position=packed["position"],
        tables={table.name: packed[table.name] for table in TABLES},
        n_train_contexts=n_train,
        documents=documents,
        spans=_spans(packed["document"], packed["position"], packed["document_token"]),
        text_provenance=[
            {**part.provenance, "weight": source.weight, **({"id": source.id} if source.id else {})}
            for part, source in zip(parts, sources, strict=True)
        ],
    )


def _join(parts: Sequence[TokenisedSource]) -> _Chosen:
    lengths = np.concatenate([part.documents["n_tokens"].to_numpy() for part in parts])
    plain = ROLES["text"]
    return _Chosen(
        tokens=np.concatenate([part.tokens for part in parts]),
        role=np.concatenate(
            [np.full(len(part.tokens), plain, np.int8) if part.role is None else part.role for part in parts]
        ),
        turn=np.concatenate(
            [np.zeros(len(part.tokens), np.int16) if part.turn is None else part.turn for part in parts]
        ),
        start=np.concatenate([[0], np.cumsum(lengths)]),
        source=np.repeat(np.arange(len(parts), dtype=np.int16), [len(part.documents) for part in parts]),
        is_chat=np.repeat([part.role is not None for part in parts], [len(part.documents) for part in parts]),
    )


def _pack(
    chosen: _Chosen,
    held_out: NDArray[np.bool_],
    collect: CollectConfig,
    tokenizer: TextTokenizer,
    rng: np.random.Generator,
) -> tuple[dict[str, NDArray[Any]], int]:
    """Arrays (n_contexts, context_length) by name, and the number of train contexts."""
    length = collect.context_length
    bos = tokenizer.bos if collect.prepend_bos else None
    parts = []
    for name, rows in (("train", np.flatnonzero(~held_out)), ("heldout", np.flatnonzero(held_out))):
        part = _pack_split(chosen, rows, length, bos)
        n_contexts = len(part["tokens"]) // length
        if n_contexts == 0:
            n_tokens = int((chosen.start[rows + 1] - chosen.start[rows]).sum())
            raise UsageError(
                f"the {name} split has {n_tokens} tokens, fewer than one context of {length}: "
                "raise collect.n_tokens, give more documents, or lower collect.context_length"
            )
        order = rng.permutation(n_contexts)
        parts.append({key: values.reshape(n_contexts, length)[order] for key, values in part.items()})
    joined = {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
    joined["flags"] = _flags(joined["tokens"], joined["position"], tokenizer)
    return joined, len(parts[0]["tokens"])


def _pack_split(chosen: _Chosen, rows: NDArray[np.int64], length: int, bos: int | None) -> dict[str, NDArray[Any]]:
    """Per-token arrays of whole contexts; the last, incomplete one is dropped."""
    cuts = _cut_spans(chosen, rows, length, bos)
    span_length = cuts["lead"] + cuts["n"]
    starts = np.concatenate([[0], np.cumsum(span_length)])
    n_tokens = int(starts[-1]) // length * length
    kept = starts[:-1] < n_tokens  # spans never cross contexts, so none is cut in two
    cuts, span_length, starts = (
        {name: values[kept] for name, values in cuts.items()},
        span_length[kept],
        starts[:-1][kept],
    )
    position = np.arange(n_tokens) - np.repeat(starts, span_length)
    row = np.repeat(cuts["row"], span_length)
    lead = np.repeat(cuts["lead"], span_length)
    offset = np.maximum(position - lead, 0)  # a BOS stands for the token after it
    document_token = np.repeat(cuts["taken"], span_length) + offset
    source_token = chosen.start[row] + document_token
    added = position < lead
    tokens, role = chosen.tokens[source_token], chosen.role[source_token]
    if bos is not None:
        tokens = np.where(added, np.int32(bos), tokens)
        role = np.where(added & chosen.is_chat[row], np.int8(ROLES["template"]), role)
    return {
        "tokens": tokens,
        "document": row.astype(np.int32),
        "position": position.astype(np.int32),
        "document_token": document_token.astype(np.int32),
        "source": chosen.source[row],
        "role": role,
        "turn": chosen.turn[source_token],
    }


def _cut_spans(chosen: _Chosen, rows: NDArray[np.int64], length: int, bos: int | None) -> dict[str, NDArray[np.int64]]:
    """Document, first token, number of tokens and added BOS of every span, as contexts are filled one after another."""
    cuts: list[tuple[int, int, int, int]] = []
    filled = 0
    for row, start, stop in zip(
        rows.tolist(), chosen.start[rows].tolist(), chosen.start[rows + 1].tolist(), strict=True
    ):
        taken = start
        while taken < stop:
            room = length - filled % length
            # No second BOS where the text has one itself, such as a chat's or, in ChatML, every message's.
            lead = int(bos is not None and room > 1 and chosen.tokens[taken] != bos)
            n = min(room - lead, stop - taken)
            cuts.append((row, taken - start, n, lead))
            taken += n
            filled += lead + n
    columns = np.array(cuts, np.int64).reshape(-1, 4)
    return {name: columns[:, i] for i, name in enumerate(("row", "taken", "n", "lead"))}


def _flags(tokens: NDArray[np.int32], position: NDArray[np.int32], tokenizer: TextTokenizer) -> NDArray[np.uint8]:
    flags = np.where(np.isin(tokens, tokenizer.special), np.uint8(SPECIAL), np.uint8(0))
    if tokenizer.bos is not None:
        flags[(position == 0) & (tokens == tokenizer.bos)] = BOS
    return flags


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
