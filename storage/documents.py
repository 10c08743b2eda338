"""Where each document's tokens are, so that an audit reads a document without reading the store.

One pass over the table `document` (and `position`, `flags`) gives the spans; they are held sorted by document, 16 bytes
each, so that memory grows with the number of spans and not of tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from storage.spec import FLAGS, PADDING, StoreSpec


class Span(NamedTuple):
    """Tokens [start, stop) of a context that belong to one piece of a document."""

    context: int
    start: int
    stop: int


class DocumentIndex:
    """Spans by document."""

    def __init__(self, spec: StoreSpec, table: Callable[[str, int, int], NDArray[Any]], contexts_at_once: int) -> None:
        """Args:
        table: gives a per-token table over contexts [start, stop).
        contexts_at_once: how many contexts of the tables are held at the same time.
        """
        blocks = []
        for low in range(0, spec.n_contexts, contexts_at_once):
            high = min(low + contexts_at_once, spec.n_contexts)
            document, position = table("document", low, high), table("position", low, high)
            padding = np.zeros(document.shape, bool)
            if FLAGS in spec.table_dtypes:
                padding = table(FLAGS, low, high) & PADDING != 0
            begins = np.ones(
                document.shape, bool
            )  # a new span: another document, a new piece of it, to or from padding
            begins[:, 1:] = document[:, 1:] != document[:, :-1]
            begins[:, 1:] |= (position[:, 1:] == 0) | (padding[:, 1:] != padding[:, :-1])
            at = np.flatnonzero(begins)
            stops = np.append(at[1:], begins.size)
            context, start = np.divmod(at, spec.context_length)
            spans = np.stack([document.ravel()[at], context + low, start, start + stops - at], axis=1)
            blocks.append(spans[~padding.ravel()[at]].astype(np.int32))
        spans = np.concatenate(blocks)
        self._spans = spans[np.argsort(spans[:, 0], kind="stable")]

    def spans(self, document: int) -> list[Span]:
        """Spans of a document, by context and start; empty if no token of it is stored."""
        low, high = np.searchsorted(self._spans[:, 0], [document, document + 1])
        return [Span(*map(int, span)) for span in self._spans[low:high, 1:]]
