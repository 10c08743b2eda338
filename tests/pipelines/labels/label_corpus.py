"""A made-up corpus with Zipf tokens and latents whose rules are known: the truth that labels are held against."""

import numpy as np

from pipelines.labels.families import TokenTable
from pipelines.labels.firings import Firings


def zipf_table(rng, *, n_contexts=400, context_length=128, vocab=2000, document_length=160, heldout=0.2, exponent=1.0):
    """Documents of Poisson length, each in one split, packed end to end; position restarts at each piece."""
    n_train_contexts = round(n_contexts * (1 - heldout))
    document = np.empty(n_contexts * context_length, np.int32)
    n_documents = 0
    for start, stop in ((0, n_train_contexts), (n_train_contexts, n_contexts)):
        n = (stop - start) * context_length
        lengths = np.maximum(rng.poisson(document_length, 2 + 2 * n // document_length), 2)
        split = np.repeat(np.arange(len(lengths)), lengths)[:n]
        document[start * context_length : stop * context_length] = n_documents + split
        n_documents += split[-1] + 1
    rows = np.arange(len(document))
    starts = np.ones(len(document), bool)
    starts[1:] = (document[1:] != document[:-1]) | (rows[1:] % context_length == 0)
    position = (rows - np.maximum.accumulate(np.where(starts, rows, 0))).astype(np.int32)
    probability = 1.0 / np.arange(1, vocab + 1) ** exponent
    token = rng.choice(vocab, len(document), p=probability / probability.sum()).astype(np.int32)
    return TokenTable(
        token=token,
        document=document,
        position=position,
        usable=position > 0,
        context_length=context_length,
        n_train=n_train_contexts * context_length,
    )


def spell(vocab):
    """' w0', ' w1' … with an odd id capitalised; every seventh is a piece without a leading space."""
    return [
        ("" if i % 7 == 3 else " ") + ("Word" if i % 2 else "word") + "abcdefghij"[i % 10] + _letters(i)
        for i in range(vocab)
    ]


def _letters(i):
    text = ""
    while True:
        text = chr(97 + i % 26) + text
        i //= 26
        if not i:
            return text


def to_firings(rows_per_latent, values_per_latent):
    """Firings from ragged lists, rows sorted."""
    indptr = np.concatenate([[0], np.cumsum([len(r) for r in rows_per_latent])]).astype(np.int64)
    rows, values = [], []
    for row, value in zip(rows_per_latent, values_per_latent, strict=True):
        by = np.argsort(row, kind="stable")
        rows.append(np.asarray(row, np.int64)[by])
        values.append(np.asarray(value, np.float32)[by])
    return Firings(indptr, np.concatenate(rows), np.concatenate(values))


def fire_on(rng, holds, table, *, recall=0.9, noise=0.001):
    """Rows and values of a latent that fires strongly where `holds` is true and weakly at random elsewhere."""
    hit = np.flatnonzero(holds & (rng.random(table.n_tokens) < recall))
    stray = np.flatnonzero(~holds & (rng.random(table.n_tokens) < noise))
    row = np.concatenate([hit, stray])
    value = np.concatenate([rng.gamma(8, 0.5, len(hit)), rng.gamma(2, 0.3, len(stray))])
    return row, value + 0.01


def reader(firings):
    """A `read_block` over firings in memory."""

    def read_block(lo, hi):
        return firings.take(np.arange(lo, hi))

    return read_block
