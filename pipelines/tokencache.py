"""Tokenised sources on disk: made once, shared by every run and model with the same tokenizer and text.

    tokens/<key>-<n_tokens>/   tokens.bin [role.bin turn.bin] documents.arrow entry.json

The key is the digest of everything that decides the bytes: tokenizer, chat template, text, fields and seed. An entry
holds the first documents of the source's order, at least as many as were asked for; since the order does not depend on
that number, any entry with enough tokens serves. An entry appears by one rename, and is used only if every file has
the digest that entry.json gives; a damaged one is removed and made anew.
"""

import contextlib
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipelines.config import TextSource
from pipelines.corpora import describe, documents_of, is_stream, stratified_order
from pipelines.errors import UsageError
from pipelines.models import cache_root
from pipelines.progress import Reporter, SilentReporter
from pipelines.sources import sha256_of
from pipelines.spool import Spool
from pipelines.tokenising import PARALLEL_BYTES, Encoded, TextTokenizer, cut_batches, tokenising_pool

VERSION = 1
STREAM_BLOCK = 8192
"""Documents of a stream that are put in order together."""
_ENTRY = "entry.json"
_DOCUMENTS = "documents.arrow"
_ARRAYS = {"tokens": "<i4", "role": "i1", "turn": "<i2"}
_SCHEMA = pa.schema(
    {
        **dict.fromkeys(("id", "title", "topic", "columns", "text"), pa.large_string()),
        "n_tokens": pa.int64(),
    }
)


def token_cache() -> Path:
    """Folder of tokenised sources: `SAE_PIPELINES_TOKENS`, else in the cache folder."""
    return Path(os.environ.get("SAE_PIPELINES_TOKENS", cache_root() / "tokens"))


@dataclass(frozen=True)
class TokenisedSource:
    """The first documents of a source's order, in memory maps."""

    provenance: dict[str, Any]
    documents: pa.Table
    """id, title, topic, columns (JSON), text, n_tokens"""
    tokens: NDArray[np.int32]
    """Of all documents, one after another."""
    role: NDArray[np.int8] | None
    """Per token, of chats."""
    turn: NDArray[np.int16] | None

    def first(self, budget: int) -> "TokenisedSource":
        """The fewest documents with `budget` tokens.

        Raises:
            UsageError: there are fewer tokens.
        """
        total = np.cumsum(self.documents["n_tokens"].to_numpy())
        found = int(total[-1])
        if found < budget:
            raise UsageError(
                f"text source {self.provenance['origin']} holds {found:,} tokens, the config asks for {budget:,}: "
                "lower collect.n_tokens or the source's weight, or add a source"
            )
        n = int(np.searchsorted(total, budget)) + 1
        stop = int(total[n - 1])
        return TokenisedSource(
            self.provenance,
            self.documents.slice(0, n),
            self.tokens[:stop],
            None if self.role is None else self.role[:stop],
            None if self.turn is None else self.turn[:stop],
        )


def tokenised(
    source: TextSource,
    tokenizer: TextTokenizer,
    *,
    budget: int,
    seed: int,
    index: int = 0,
    n_workers: int | None = None,
    root: Path | None = None,
    ui: Reporter | None = None,
) -> TokenisedSource:
    """The source's first documents with `budget` tokens, in a seeded order in which topics are mixed.

    Args:
        index: number of the source in its run, so that one file named twice gives different documents.
        n_workers: processes that tokenise; by default one a core. Short texts are tokenised in this one.
        root: folder of the cache.

    Raises:
        UsageError: the source cannot be used (see `documents_of`) or holds too few tokens.
    """
    root = token_cache() if root is None else root
    provenance = describe(source)
    if source.kind == "chat":
        if tokenizer.template is None:
            raise UsageError(
                f"text source {source.origin} holds chats, but this model's tokenizer has no chat template: set "
                "collect.chat_template_path to a Jinja file, or use the model's chat version"
            )
        provenance["template_sha256"] = tokenizer.template_sha256
    if source.kind == "tokens":
        provenance["tokenizer_sha256"] = tokenizer.sha256
        if source.tokenizer_sha256 not in (None, tokenizer.sha256):
            raise UsageError(
                f"text source {source.origin}: its tokens were made with the tokenizer {source.tokenizer_sha256}, but "
                f"the model's is {tokenizer.sha256}: use that model, or tokenise the text again"
            )
    key = _key(source, tokenizer, provenance, seed, index)
    for entry in _candidates(root, key, budget):
        found = _load(entry, provenance)
        if found is not None:
            return found.first(budget)
        shutil.rmtree(entry, ignore_errors=True)
    build = _Build(source, tokenizer, provenance, budget, np.random.default_rng([seed, 0, index]), n_workers)
    entry = build.into(root, key, ui or SilentReporter())
    made = _load(entry, provenance)
    if made is None:
        raise UsageError(f"the tokens in {entry} changed while they were read: is the disk of the cache in order?")
    return made.first(budget)


def _key(source: TextSource, tokenizer: TextTokenizer, provenance: dict[str, Any], seed: int, index: int) -> str:
    settings = source.model_dump(
        mode="json",
        include={"title_field", "topic_field", "columns", "shuffle_buffer", "document"},
    )
    what = [VERSION, tokenizer.fingerprint, provenance, settings, seed, index]
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:32]


def _candidates(root: Path, key: str, budget: int) -> Iterator[Path]:
    """Entries with enough tokens, or all that the source has; the smallest first. Removes those that make no sense."""
    entries = []
    for entry in root.glob(f"{key}-*"):
        try:
            record = json.loads((entry / _ENTRY).read_text(encoding="utf-8"))
            if entry.name != f"{key}-{record['n_tokens']}" or not isinstance(record["exhausted"], bool):
                raise ValueError(entry.name)
        except (OSError, ValueError, KeyError, TypeError):
            shutil.rmtree(entry, ignore_errors=True)
            continue
        if record["n_tokens"] >= budget or record["exhausted"]:
            entries.append((record["n_tokens"], entry))
    yield from (entry for _, entry in sorted(entries))


def _load(entry: Path, provenance: dict[str, Any]) -> TokenisedSource | None:
    """The entry, or None if a file of it is missing or changed."""
    try:
        record = json.loads((entry / _ENTRY).read_text(encoding="utf-8"))
        if any(sha256_of(entry / name) != digest for name, digest in record["files"].items()):
            return None
        arrays: dict[str, NDArray[Any] | None] = dict.fromkeys(_ARRAYS)
        for name, dtype in _ARRAYS.items():
            if f"{name}.bin" in record["files"]:
                arrays[name] = np.memmap(entry / f"{name}.bin", dtype, "r")
        with pa.memory_map(str(entry / _DOCUMENTS)) as file:
            table = pa.ipc.open_file(file).read_all()
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    assert arrays["tokens"] is not None
    return TokenisedSource(provenance, table, arrays["tokens"], arrays["role"], arrays["turn"])


@dataclass(frozen=True)
class _Build:
    """One source on its way into the cache."""

    source: TextSource
    tokenizer: TextTokenizer
    provenance: dict[str, Any]
    budget: int
    rng: np.random.Generator
    n_workers: int | None

    def into(self, root: Path, key: str, ui: Reporter) -> Path:
        """Tokenise until the budget is met or the source ends; returns the new entry's folder."""
        partial = root / f".{uuid.uuid4().hex}.partial"
        partial.mkdir(parents=True)
        try:
            with _Writer(partial) as writer:
                exhausted = self._fill(writer, partial / "spool.arrow", ui)
            (partial / "spool.arrow").unlink()
            entry = root / f"{key}-{writer.n_tokens}"
            writer.finish(exhausted)
            if not writer.n_tokens:
                raise UsageError(f"text source {self.source.origin} has no documents with text")
            try:
                partial.rename(entry)
            except OSError:  # another process was faster, with the same bytes
                if not (entry / _ENTRY).is_file():
                    raise
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        return entry

    def _fill(self, writer: "_Writer", path: Path, ui: Reporter) -> bool:
        documents = documents_of(
            self.source,
            revision=self.provenance.get("revision"),
            seed=int(self.rng.bit_generator.seed_seq.generate_state(1)[0]),
            n_vocab=self.tokenizer.n_vocab,
        )
        block = STREAM_BLOCK if is_stream(self.source) else None
        with closing(documents), contextlib.ExitStack() as stack:
            pool = bar = None
            while True:
                spool = Spool.write(path, islice(documents, block))
                if pool is None:
                    size = min(int(spool.sizes.sum()), 4 * self.budget)
                    workers = self.n_workers or os.cpu_count() or 1
                    if size < PARALLEL_BYTES:
                        workers = 1
                    else:
                        bar = stack.enter_context(ui.stage("tokenise", total=self.budget, unit="tokens"))
                    pool = stack.enter_context(tokenising_pool(self.tokenizer, self.source.kind, workers))
                order = stratified_order(spool.topics, self.rng)
                with closing(pool.encode(spool, cut_batches(order, spool.sizes))) as encoded:
                    for rows, batch in encoded:
                        writer.add(spool, rows, batch)
                        if bar is not None:
                            bar.advance(len(batch.tokens))
                        if writer.n_tokens >= self.budget:
                            return False
                if block is None or len(spool) < block:
                    return True


class _Writer:
    """Appends tokenised documents to the files of an entry."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.n_tokens = 0

    def __enter__(self) -> "_Writer":
        self._files: dict[str, IO[bytes]] = {}
        self._sink = pa.OSFile(str(self._folder / _DOCUMENTS), "wb")
        self._documents = pa.ipc.new_file(self._sink, _SCHEMA)
        self._append("tokens", np.empty(0, np.int32))
        return self

    def __exit__(self, *_: object) -> None:
        self._documents.close()
        self._sink.close()
        for file in self._files.values():
            file.close()

    def add(self, spool: Spool, rows: NDArray[np.int64], batch: Encoded) -> None:
        """Append the documents that have tokens."""
        kept = batch.lengths > 0
        columns = {name: spool.column(name, rows[kept]) for name in ("id", "title", "topic", "columns")}
        columns["text"] = [text for text, keep in zip(batch.texts, kept, strict=True) if keep]
        columns["n_tokens"] = batch.lengths[kept].tolist()
        arrays = [pa.array(columns[field.name], field.type) for field in _SCHEMA]
        self._documents.write_batch(pa.record_batch(arrays, schema=_SCHEMA))
        self._append("tokens", batch.tokens)
        if batch.role is not None and batch.turn is not None:
            self._append("role", batch.role)
            self._append("turn", batch.turn)
        self.n_tokens += len(batch.tokens)

    def finish(self, exhausted: bool) -> None:
        """Make the files durable and write entry.json."""
        names = sorted(file.name for file in self._folder.iterdir())
        for name in names:
            with (self._folder / name).open("rb") as file:
                os.fsync(file.fileno())
        record = {
            "n_tokens": self.n_tokens,
            "exhausted": exhausted,
            "files": {name: sha256_of(self._folder / name) for name in names},
        }
        (self._folder / _ENTRY).write_text(json.dumps(record, indent=2), encoding="utf-8")

    def _append(self, name: str, values: NDArray[Any]) -> None:
        if name not in self._files:
            self._files[name] = (self._folder / f"{name}.bin").open("wb")
        self._files[name].write(values.astype(_ARRAYS[name]).tobytes())
