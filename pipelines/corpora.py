"""Texts: local files, files of installed packages, Hugging Face datasets; ordered so that any cut is a fair sample.

Source files are often sorted (the demo text by topic). `stratified_order` therefore shuffles within topics and then
interleaves the topics, so that every prefix, and the held-out share, has the topics in their proportions.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.config import TextSource
from pipelines.documents import Document
from pipelines.errors import UsageError
from pipelines.sources import locate, sha256_of


def read_source(source: TextSource) -> tuple[list[Document], dict[str, str]]:
    """All non-empty documents of a source, and the provenance that belongs into the store's fingerprint.

    Raises:
        UsageError: missing file or package, unreadable format, missing field, or no documents.
    """
    origin = source.path or f"hub:{source.dataset}"
    if source.path is not None:
        path = locate(source.path, sha256=source.sha256)
        records, provenance = _read_file(path), {"origin": source.path, "sha256": source.sha256 or sha256_of(path)}
    else:
        records, provenance = _read_hub(source)
    topics: Mapping[str, Any] = {}
    if source.topics_path is not None:
        topics_file = locate(source.topics_path, sha256=source.topics_sha256)
        topics = _read_topics(topics_file)
        provenance["topics_sha256"] = source.topics_sha256 or sha256_of(topics_file)
    documents = []
    for id_, record in records:
        if source.text_field not in record:
            raise UsageError(
                f"text source {origin}: document {id_!r} has no field {source.text_field!r}; it has "
                f"{sorted(record)}: set `text_field`"
            )
        text = record[source.text_field]
        if not isinstance(text, str):
            raise UsageError(
                f"text source {origin}: field {source.text_field!r} of document {id_!r} is "
                f"{type(text).__name__}, not text"
            )
        topic = record.get(source.topic_field) if source.topic_field else topics.get(id_)
        if text.strip():
            title = str(record.get(source.title_field) or id_) if source.title_field else id_
            documents.append(
                Document(id=id_, source=origin, title=title, topic="" if topic is None else str(topic), text=text)
            )
    if not documents:
        raise UsageError(f"text source {origin} has no documents with text")
    return documents, provenance


def _read_topics(path: Path) -> Mapping[str, Any]:
    try:
        topics = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UsageError(f"topics_path {path} cannot be read as JSON: {error}") from error
    if not isinstance(topics, dict):
        raise UsageError(
            f"topics_path {path} must hold an object from document id to topic, not {type(topics).__name__}"
        )
    return topics


def _read_file(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Document id and fields of every record of a file, in its order."""
    readers = {".txt": _read_txt, ".jsonl": _read_jsonl, ".json": _read_json, ".parquet": _read_parquet}
    if path.suffix not in readers:
        raise UsageError(f"text source {path}: unknown format {path.suffix!r}; use .txt, .jsonl, .json or .parquet")
    try:
        yield from readers[path.suffix](path)
    except ValueError as error:  # of the decoder, of json and of pyarrow
        raise UsageError(f"text source {path} cannot be read as {path.suffix}: {error}") from error


def _read_txt(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    # Not str.splitlines, here and below: it also breaks lines at U+2028, form feeds and the like inside a text.
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            yield f"{path.name}:{number}", {"text": line.removesuffix("\n")}


def _read_jsonl(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            record = json.loads(line)
            if not isinstance(record, dict):
                raise ValueError(f"line {number} must be a JSON object, not {type(record).__name__}")
            yield str(record.get("id", f"{path.name}:{number}")), record


def _read_json(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    data = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(data, dict | list):
        raise ValueError(f"it must hold an object or a list of documents, not {type(data).__name__}")
    for id_, record in data.items() if isinstance(data, dict) else enumerate(data):
        yield str(id_), record if isinstance(record, dict) else {"text": record}


def _read_parquet(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    import pyarrow.parquet as pq

    row = 0
    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches():
            for record in batch.to_pylist():
                yield str(record.get("id", f"{path.name}:{row}")), record
                row += 1


def _read_hub(source: TextSource) -> tuple[Iterator[tuple[str, Mapping[str, Any]]], dict[str, str]]:
    try:
        import datasets
    except ImportError as error:
        raise UsageError(
            f"text source {source.dataset} is a Hugging Face dataset: pip install 'sae-pipelines[hub]'"
        ) from error
    assert source.dataset is not None
    try:
        rows = datasets.load_dataset(source.dataset, source.name, split=source.split, revision=source.revision)
    except (OSError, ValueError) as error:
        raise UsageError(
            f"text source {source.dataset}: {error}; check the name, the revision and the network"
        ) from error
    provenance = {
        "origin": f"hub:{source.dataset}",
        "revision": str(source.revision),
        "fingerprint": str(rows._fingerprint),
    }
    return ((str(row.get("id", i)), row) for i, row in enumerate(rows)), provenance


def stratified_order(topics: list[str], rng: np.random.Generator) -> NDArray[np.int64]:
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
