"""Texts of a source, as documents: checked records of files, folders and Hugging Face datasets, read one by one.

Source files are often sorted (the demo text by topic). `stratified_order` therefore shuffles within topics and then
interleaves the topics, so that every prefix, and the held-out share, has the topics in their proportions.
"""

import json
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.chat import checked_messages
from pipelines.config import TextSource
from pipelines.errors import UsageError
from pipelines.hubtext import hub_provenance, hub_records
from pipelines.sources import locate, sha256_of
from pipelines.textfiles import digest_of, read_records, text_files

_USE = {"text": "text_field", "chat": "messages_field", "tokens": "tokens_field"}


@dataclass(frozen=True, slots=True)
class Document:
    """One text before tokenising."""

    id: str
    title: str
    topic: str
    content: bytes
    """UTF-8 text; or JSON [[role, content], …]; or int32 token ids: as the source's kind says."""
    columns: str
    """JSON object of the further fields that the source keeps."""


def describe(source: TextSource) -> dict[str, Any]:
    """What identifies a source's documents: goes into the store's fingerprint and names cached tokens.

    Raises:
        UsageError: a missing file or package, an unknown format, another digest than expected, an unknown dataset.
    """
    if source.path is not None:
        files = text_files(source.path, source.sha256)
        folder = Path(source.path).expanduser()
        digest = digest_of(files, folder if folder.is_dir() else None)
        provenance: dict[str, Any] = {"origin": source.path, "sha256": digest}
        if source.document is not None:
            provenance["document"] = source.document
    else:
        provenance = hub_provenance(source)
    if source.topics_path is not None:
        topics_file = locate(source.topics_path, sha256=source.topics_sha256)
        provenance["topics_sha256"] = source.topics_sha256 or sha256_of(topics_file)
    return provenance | {"kind": source.kind, "field": source.field}


def is_stream(source: TextSource) -> bool:
    """Whether the documents come from a stream, of which no more is read than is needed."""
    return source.dataset is not None and "[" not in source.split


def documents_of(
    source: TextSource, *, revision: str | None = None, seed: int = 0, n_vocab: int
) -> Generator[Document]:
    """The documents of a source that are not blank, in its order; a stream is shuffled by seed.

    Args:
        revision: commit of a Hugging Face dataset, as `describe` found it.
        n_vocab: size of the tokenizer's vocabulary, which token ids must be inside of.

    Raises:
        UsageError: an unreadable file, or a record that is not what the source says; the message names the document.
    """
    topics = _read_topics(source)
    for id_, record in _records(source, revision, seed):
        if source.field not in record:
            raise _wrong(source, id_, f"has no field {source.field!r}; it has {sorted(record)}: set `text_field`")
        content = _content(source, id_, record[source.field], n_vocab)
        if content is None:
            continue
        topic = record.get(source.topic_field) if source.topic_field else topics.get(id_)
        yield Document(
            id=id_,
            title=str(record.get(source.title_field) or id_) if source.title_field else id_,
            topic="" if topic is None else str(topic),
            content=content,
            columns=_columns(source, id_, record),
        )


def _records(source: TextSource, revision: str | None, seed: int) -> Iterator[tuple[str, Mapping[str, Any]]]:
    if source.path is None:
        yield from hub_records(source, revision, seed, stream=is_stream(source))
        return
    folder = Path(source.path).expanduser()
    inside = folder.is_dir()
    for file in text_files(source.path):
        name = file.relative_to(folder).as_posix() if inside else file.name
        yield from read_records(file, name, source.document or ("file" if inside else "line"))


def _content(source: TextSource, id_: str, value: Any, n_vocab: int) -> bytes | None:
    """A document's content in its stored form; None for a blank text."""
    if source.kind == "text":
        if isinstance(value, list) and value and isinstance(value[0], dict):
            raise _wrong(source, id_, f"has messages in the field {source.field!r}, not text: use `messages_field`")
        if not isinstance(value, str):
            raise UsageError(
                f"text source {source.origin}: field {source.field!r} of document {id_!r} is "
                f"{type(value).__name__}, not text"
            )
        try:
            return value.encode() if value.strip() else None
        except UnicodeEncodeError as error:
            raise _wrong(source, id_, f"has text that is not Unicode ({error.reason}): clean it") from error
    if source.kind == "chat":
        try:
            return json.dumps(checked_messages(value), ensure_ascii=False).encode()
        except ValueError as error:  # also of a text that is not Unicode
            raise _wrong(source, id_, f"cannot be used as a chat, since {error}") from error
    if isinstance(value, str) or not hasattr(value, "__len__"):
        raise _wrong(source, id_, f"has {type(value).__name__} in the field {source.field!r}, not a list of token ids")
    try:
        ids = np.asarray(value, dtype=None if len(value) else np.int64)
    except ValueError:  # lists of different lengths
        ids = np.empty(0, object)
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        raise _wrong(source, id_, f"has values in the field {source.field!r} that are not whole numbers")
    if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < n_vocab:
        raise _wrong(
            source,
            id_,
            f"has token ids from {ids.min()} to {ids.max()}, but the tokenizer knows 0 to {n_vocab - 1}: these tokens "
            "were made with another tokenizer",
        )
    return ids.astype("<i4").tobytes() if len(ids) else None


def _columns(source: TextSource, id_: str, record: Mapping[str, Any]) -> str:
    missing = [name for name in source.columns if name not in record]
    if missing:
        raise _wrong(source, id_, f"has no field {missing[0]!r}; it has {sorted(record)}: correct `columns`")
    return json.dumps({name: record[name] for name in source.columns}, ensure_ascii=False, default=str)


def _wrong(source: TextSource, id_: str, what: str) -> UsageError:
    what = what.replace("set `text_field`", f"set `{_USE[source.kind]}`")
    return UsageError(f"text source {source.origin}: document {id_!r} {what}")


def _read_topics(source: TextSource) -> Mapping[str, Any]:
    if source.topics_path is None:
        return {}
    path = locate(source.topics_path)
    try:
        topics = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UsageError(f"topics_path {path} cannot be read as JSON: {error}") from error
    if not isinstance(topics, dict):
        raise UsageError(
            f"topics_path {path} must hold an object from document id to topic, not {type(topics).__name__}"
        )
    return topics


def stratified_order(topics: Sequence[str] | NDArray[np.int64], rng: np.random.Generator) -> NDArray[np.int64]:
    """A random order of documents in which every prefix holds the same share of each topic, to within one document.

    The j-th of a topic's n documents, in random order, gets the key (j + u) / n with one u ~ U(0, 1) per topic;
    documents are sorted by key (systematic sampling within strata; Cochran, Sampling Techniques, chapter 8). A prefix
    is the documents with keys up to some x: it holds more than n·x - 1 and less than n·x + 1 of each topic's n
    documents, and any one document is in it with probability x.
    """
    labels = np.asarray(topics)
    keys = np.empty(len(labels))
    for topic in np.unique(labels):
        rows = rng.permutation(np.flatnonzero(labels == topic))
        keys[rows] = (np.arange(len(rows)) + rng.random()) / len(rows)
    return np.argsort(keys, kind="stable")


def heldout_mask(topics: list[str], fraction: float) -> NDArray[np.bool_]:
    """Which documents, in the given order, are held out: every 1/fraction-th, counted through one topic after another.

    Each topic gives its share to within one document. The count does not start again at each topic, so that many topics
    of few documents together give theirs.
    """
    by_topic = np.argsort(np.asarray(topics), kind="stable")
    count = np.arange(1, len(topics) + 1)
    mask = np.zeros(len(topics), dtype=bool)
    mask[by_topic] = np.floor(count * fraction + 0.5) > np.floor((count - 1) * fraction + 0.5)
    return mask
