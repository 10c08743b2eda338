"""Documents → token ids, in batches, in this process or several: the same bytes either way.

A batch is a run of documents of the chosen order, cut by their size alone; documents do not influence each other; and
results are taken in order. So nothing depends on the number of processes.
"""

import hashlib
import json
import multiprocessing
import os
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipelines.chat import ChatTemplate, TemplateError, template_of
from pipelines.errors import RunError, UsageError
from pipelines.spool import Spool

BATCH_BYTES = 2**18
BATCH_DOCUMENTS = 256
PARALLEL_BYTES = 2**23
"""Text from which processes of their own pay: starting one takes as long as tokenising about half a megabyte."""

Kind = Literal["text", "chat", "tokens"]


@dataclass(frozen=True)
class TextTokenizer:
    """What is needed of a tokenizer, as plain values that any process can use."""

    backend: str
    """JSON of a `tokenizers.Tokenizer`, without post-processing: special tokens are ours to place, and offsets are
    whole."""
    bos: int | None
    special: tuple[int, ...]
    """Ids of special tokens, ascending."""
    n_vocab: int
    template: ChatTemplate | None
    sha256: str | None = None
    """Digest of the file that the tokenizer came from."""

    @classmethod
    def of(cls, tokenizer: Any, *, chat_template: str | None = None, sha256: str | None = None) -> "TextTokenizer":
        """From a Hugging Face fast tokenizer; `chat_template` replaces its own.

        Raises:
            UsageError: it is not a fast one.
        """
        if getattr(tokenizer, "backend_tokenizer", None) is None:
            raise UsageError(
                f"the tokenizer {type(tokenizer).__name__} is no fast one: give a model with a tokenizer.json"
            )
        backend = json.loads(tokenizer.backend_tokenizer.to_str())
        backend |= {"post_processor": None, "padding": None, "truncation": None}
        special = {token["id"] for token in backend["added_tokens"] if token["special"]}
        return cls(
            backend=json.dumps(backend, ensure_ascii=False),
            bos=tokenizer.bos_token_id,
            special=tuple(sorted({*special, *tokenizer.all_special_ids})),
            n_vocab=len(tokenizer),
            template=template_of(tokenizer, chat_template),
            sha256=sha256,
        )

    @cached_property
    def fingerprint(self) -> str:
        """Changes with anything that changes the ids that a text gets; the file's formatting is no such thing."""
        return hashlib.sha256(f"{self.bos} {self.backend}".encode()).hexdigest()

    @property
    def template_sha256(self) -> str | None:
        """Digest of the chat template and of the values that it reads."""
        if self.template is None:
            return None
        parts = json.dumps([self.template.source, dict(self.template.values)], sort_keys=True)
        return hashlib.sha256(parts.encode()).hexdigest()


class Encoded(NamedTuple):
    """Some documents, tokenised."""

    tokens: NDArray[np.int32]
    """Of all documents, one after another."""
    lengths: NDArray[np.int64]
    role: NDArray[np.int8] | None
    """Per token, of chats."""
    turn: NDArray[np.int16] | None
    texts: list[str]
    """What each document reads like: the text itself, the chat as its template gives it, or the decoded tokens."""


class Encoder:
    """Tokenises documents of one kind."""

    def __init__(self, tokenizer: TextTokenizer, kind: Kind) -> None:
        from tokenizers import Tokenizer

        self._tokenizer, self._kind = tokenizer, kind
        self._backend = Tokenizer.from_str(tokenizer.backend)

    def encode(self, ids: Sequence[str], contents: Sequence[bytes]) -> Encoded:
        """Token ids of documents; `ids` name them in errors.

        Raises:
            UsageError: a chat that the template refuses or rewrites.
        """
        if self._kind == "tokens":
            arrays = [np.frombuffer(content, "<i4") for content in contents]
            texts = self._backend.decode_batch([array.tolist() for array in arrays], skip_special_tokens=True)
            return _joined(arrays, None, None, texts)
        if self._kind == "text":
            texts = [content.decode() for content in contents]
            found = self._backend.encode_batch_fast(texts, add_special_tokens=False)
            return _joined([np.array(one.ids, np.int32) for one in found], None, None, texts)
        return self._encode_chats(ids, contents)

    def _encode_chats(self, ids: Sequence[str], contents: Sequence[bytes]) -> Encoded:
        template, bos = self._tokenizer.template, self._tokenizer.bos
        assert template is not None
        chats = []
        for id_, content in zip(ids, contents, strict=True):
            try:
                chats.append(template.render([(role, text) for role, text in json.loads(content)]))
            except TemplateError as error:
                raise UsageError(f"document {id_!r} cannot be used as a chat: {error}") from error
        texts = [chat.text for chat in chats]
        arrays, roles, turns = [], [], []
        for chat, found in zip(chats, self._backend.encode_batch(texts, add_special_tokens=False), strict=True):
            tokens = np.array(found.ids, np.int32)
            # A token belongs to whoever wrote its first character.
            role, turn = chat.at(np.array(found.offsets, np.int64).reshape(-1, 2)[:, 0])
            extra = 0  # one BOS, whatever the template wrote
            while bos is not None and extra + 1 < len(tokens) and tokens[extra] == tokens[extra + 1] == bos:
                extra += 1
            arrays.append(tokens[extra:])
            roles.append(role[extra:])
            turns.append(turn[extra:])
        return _joined(arrays, roles, turns, texts)


def _joined(
    arrays: Sequence[NDArray[np.int32]],
    roles: Sequence[NDArray[np.int8]] | None,
    turns: Sequence[NDArray[np.int16]] | None,
    texts: list[str],
) -> Encoded:
    return Encoded(
        np.concatenate([np.empty(0, np.int32), *arrays]),
        np.array([len(array) for array in arrays], np.int64),
        None if roles is None else np.concatenate(roles),
        None if turns is None else np.concatenate(turns),
        texts,
    )


def cut_batches(order: NDArray[np.int64], sizes: NDArray[np.int64]) -> Iterator[NDArray[np.int64]]:
    """Runs of `order` of at most `BATCH_DOCUMENTS` documents and, but for a single document, `BATCH_BYTES` bytes."""
    ends = np.cumsum(sizes[order])
    start = 0
    while start < len(order):
        before = int(ends[start - 1]) if start else 0
        stop = int(np.searchsorted(ends, before + BATCH_BYTES, side="right"))
        stop = min(max(stop, start + 1), start + BATCH_DOCUMENTS)
        yield order[start:stop]
        start = stop


class TokenisingPool:
    """Encodes rows of a spool, in this process or in `n_workers` others."""

    def __init__(
        self, tokenizer: TextTokenizer, kind: Kind, executor: ProcessPoolExecutor | None, n_workers: int
    ) -> None:
        self._executor, self._n_workers = executor, n_workers
        self._encoder = Encoder(tokenizer, kind) if executor is None else None

    def encode(
        self, spool: Spool, batches: Iterator[NDArray[np.int64]]
    ) -> Generator[tuple[NDArray[np.int64], Encoded]]:
        """Each batch with its tokens, in order.

        Raises:
            RunError: a process was killed.
        """
        if self._encoder is not None:
            for rows in batches:
                yield rows, self._encoder.encode(*spool.read(rows))
            return
        assert self._executor is not None
        waiting: deque[tuple[NDArray[np.int64], Future[Encoded]]] = deque()
        try:
            for rows in batches:
                waiting.append((rows, self._executor.submit(_encode_rows, spool.path, rows)))
                if len(waiting) > 2 * self._n_workers:
                    yield _result(*waiting.popleft())
            while waiting:
                yield _result(*waiting.popleft())
        finally:  # also when the caller has enough
            for _, future in waiting:
                future.cancel()


@contextmanager
def tokenising_pool(tokenizer: TextTokenizer, kind: Kind, n_workers: int) -> Iterator[TokenisingPool]:
    """A pool whose processes end with the block; one worker is this process itself."""
    if n_workers == 1:
        yield TokenisingPool(tokenizer, kind, None, 1)
        return
    # Spawned, since a fork of a process with threads may hang. One thread each: the processes are the parallelism.
    with ProcessPoolExecutor(
        n_workers,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_start_worker,
        initargs=(tokenizer, kind),
    ) as executor:
        try:
            yield TokenisingPool(tokenizer, kind, executor, n_workers)
        finally:
            executor.shutdown(wait=True, cancel_futures=True)


def _result(rows: NDArray[np.int64], future: Future[Encoded]) -> tuple[NDArray[np.int64], Encoded]:
    try:
        return rows, future.result()
    except BrokenProcessPool as error:
        raise RunError(
            "a process that tokenises was killed, perhaps for want of memory: lower collect.text_workers, then rerun"
        ) from error


_worker: Encoder | None = None
_spools: dict[Path, Spool] = {}


def _start_worker(tokenizer: TextTokenizer, kind: Kind) -> None:
    global _worker
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    os.environ["RAYON_NUM_THREADS"] = "1"
    _worker = Encoder(tokenizer, kind)


def _encode_rows(path: Path, rows: NDArray[np.int64]) -> Encoded:
    assert _worker is not None
    if path not in _spools:
        _spools.clear()
        _spools[path] = Spool(path)
    return _worker.encode(*_spools[path].read(rows))
