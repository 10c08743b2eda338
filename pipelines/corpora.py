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
    topics: Mapping[str, str] = {}
    if source.topics_path is not None:
        topics_file = locate(source.topics_path, sha256=source.topics_sha256)
        topics = json.loads(topics_file.read_text(encoding="utf-8"))
        provenance["topics_sha256"] = source.topics_sha256 or sha256_of(topics_file)
    documents = []
    for id_, record in records:
        if source.text_field not in record:
            raise UsageError(
                f"text source {origin}: document {id_!r} has no field {source.text_field!r}; it has {sorted(record)}: set `text_field`"
            )
        text = record[source.text_field]
        if not isinstance(text, str):
            raise UsageError(f"text source {origin}: field {source.text_field!r} of document {id_!r} is {type(text).__name__}, not text")
        topic = record.get(source.topic_field, "") if source.topic_field else topics.get(id_, "")
        if text.strip():
            title = str(record.get(source.title_field) or id_) if source.title_field else id_
            documents.append(Document(id=id_, source=origin, title=title, topic=str(topic), text=text))
    if not documents:
        raise UsageError(f"text source {origin} has no documents with text")
    return documents, provenance


def _read_file(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    try:
        match path.suffix:
            case ".txt":
                for i, line in enumerate(path.read_text(encoding="utf-8").splitlines()):
                    yield f"{path.name}:{i + 1}", {"text": line}
            case ".jsonl":
                for i, line in enumerate(path.read_text(encoding="utf-8").splitlines()):
                    if line.strip():
                        record = json.loads(line)
                        yield str(record.get("id", f"{path.name}:{i + 1}")), record
            case ".json":
                data = json.loads(path.read_text(encoding="utf-8"))
                items = data.items() if isinstance(data, dict) else enumerate(data)
                for id_, record in items:
                    yield str(id_), record if isinstance(record, dict) else {"text": record}
            case ".parquet":
                import pyarrow.parquet as pq

                for batch in pq.ParquetFile(path).iter_batches():
                    for i, record in enumerate(batch.to_pylist()):
                        yield str(record.get("id", f"{path.name}:{i}")), record
            case suffix:
                raise UsageError(f"text source {path}: unknown format {suffix!r}; use .txt, .jsonl, .json or .parquet")
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UsageError(f"text source {path} cannot be read as {path.suffix}: {error}") from error


def _read_hub(source: TextSource) -> tuple[Iterator[tuple[str, Mapping[str, Any]]], dict[str, str]]:
    try:
        import datasets
    except ImportError as error:
        raise UsageError(f"text source {source.dataset} is a Hugging Face dataset: pip install 'sae-pipelines[hub]'") from error
    assert source.dataset is not None
    try:
        rows = datasets.load_dataset(source.dataset, source.name, split=source.split, revision=source.revision)
    except (OSError, ValueError) as error:
        raise UsageError(f"text source {source.dataset}: {error}; check the name, the revision and the network") from error
    provenance = {"origin": f"hub:{source.dataset}", "revision": str(source.revision), "fingerprint": str(rows._fingerprint)}
    return ((str(row.get("id", i)), row) for i, row in enumerate(rows)), provenance


def stratified_order(topics: list[str], rng: np.random.Generator) -> NDArray[np.int64]:
    """A random order of documents in which every prefix holds each topic in proportion (to within one document).

    The j-th of a topic's n documents, in random order, gets the key (j + u) / n with one u ~ U(0, 1) per topic; documents are
    sorted by key (systematic sampling within strata; Cochran, Sampling Techniques, chapter 8).
    """
    labels = np.asarray(topics)
    keys = np.empty(len(labels))
    for topic in np.unique(labels):
        rows = rng.permutation(np.flatnonzero(labels == topic))
        keys[rows] = (np.arange(len(rows)) + rng.random()) / len(rows)
    return np.argsort(keys, kind="stable")


def heldout_mask(topics: list[str], fraction: float) -> NDArray[np.bool_]:
    """Which documents, in the given order, are held out: every 1/fraction-th of each topic."""
    labels = np.asarray(topics)
    mask = np.zeros(len(labels), dtype=bool)
    for topic in np.unique(labels):
        rows = np.flatnonzero(labels == topic)
        count = np.arange(1, len(rows) + 1)
        # Half a step ahead, so that a topic with fewer than 1/fraction documents is not always left out.
        mask[rows] = np.floor(count * fraction + 0.5) > np.floor((count - 1) * fraction + 0.5)
    return mask
