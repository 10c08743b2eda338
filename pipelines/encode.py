"""Texts → latent activations, pooled: what audits read.

A text's score for a latent is its largest activation over the text's tokens; attention sinks (the first position, and
tokens whose norm exceeds a multiple of the training median) do not count, as in training.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipelines.dictionaries import stored_input
from pipelines.models import LanguageModel
from pipelines.progress import Bar
from pipelines.selection import Selection, kept
from sae import Dictionary
from storage import ActivationStore
from storage.spec import Split

_Row = tuple[NDArray[np.float32], NDArray[np.float32], int]
"""Largest latent activations, mean activations and number of counted tokens of one text."""


@dataclass(frozen=True)
class Pooled:
    """One row a text."""

    max_latents: NDArray[np.float32]
    """(n_texts, d_sae): largest activation over the counted tokens."""
    mean_activations: NDArray[np.float32]
    """(n_texts, d_in): mean of the model's activations over the counted tokens, for dense probes."""
    n_tokens: NDArray[np.int64]
    """(n_texts,): counted tokens."""
    n_cut: int
    """Texts that were longer than the limit and were cut."""


def encode_texts(
    lm: LanguageModel,
    dictionary: Dictionary,
    texts: Sequence[str],
    *,
    max_tokens: int,
    sink_norm: float | None,
    prepend_bos: bool = False,
    bar: Bar | None = None,
    batch_tokens: int = 2048,
) -> Pooled:
    """Run texts through the model and the dictionary, alone (no packing), and pool.

    Args:
        sink_norm: tokens whose norm is not below this are sinks; None counts every token but the first.
        prepend_bos: put the BOS token in front of every text, as the store did.
    """
    rows: list[_Row] = [_empty(dictionary)] * len(texts)
    n_cut = 0
    for i, x, was_cut in counted_activations(
        lm,
        dictionary,
        texts,
        max_tokens=max_tokens,
        sink_norm=sink_norm,
        prepend_bos=prepend_bos,
        batch_tokens=batch_tokens,
    ):
        rows[i] = _pool(dictionary, x)
        n_cut += was_cut
        if bar is not None:
            bar.advance(1)
    return _stack(rows, n_cut)


def counted_activations(
    lm: LanguageModel,
    dictionary: Dictionary,
    texts: Sequence[str],
    *,
    max_tokens: int,
    sink_norm: float | None,
    prepend_bos: bool = False,
    batch_tokens: int = 2048,
) -> Iterator[tuple[int, Tensor, bool]]:
    """Each text's number, the dictionary's inputs at its counted tokens [n_counted, d_in], and whether it was cut.

    Texts come in the order of their length; see `encode_texts` for the arguments.
    """
    hook = dictionary.required_hook_name
    # As in collection: special tokens are ours to place.
    lead = [lm.tokenizer.bos_token_id] if prepend_bos else []
    encoded = [lead + lm.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] for text in texts]
    cut = [len(ids) > max_tokens for ids in encoded]
    encoded = [ids[:max_tokens] for ids in encoded]
    order = sorted(range(len(texts)), key=lambda i: len(encoded[i]))
    for batch in _batches(order, [len(ids) for ids in encoded], batch_tokens):
        # Right padding: causal attention keeps it from the real tokens, and the mask keeps it from the pools.
        width = max(max(len(encoded[i]) for i in batch), 2)
        tokens = torch.zeros(len(batch), width, dtype=torch.long)
        real = torch.zeros(len(batch), width, dtype=torch.bool)
        for j, i in enumerate(batch):
            tokens[j, : len(encoded[i])] = torch.tensor(encoded[i], dtype=torch.long)
            real[j, : len(encoded[i])] = True
        position = torch.arange(width).expand(len(batch), width)
        captured = lm.capture(tokens.to(lm.device), position.to(lm.device), list(dictionary.input_hooks))
        x = torch.cat([captured[name].float().cpu() for name in dictionary.input_hooks], dim=-1)
        counted = real & (position > 0)
        if sink_norm is not None:
            counted &= captured[hook].float().cpu().norm(dim=-1) < sink_norm
        for j, i in enumerate(batch):
            yield i, x[j][counted[j]], cut[i]


def pool_documents(
    store: ActivationStore,
    dictionary: Dictionary,
    *,
    split: Split,
    sink_multiple: float,
    bar: Bar | None = None,
    selection: Selection | None = None,
) -> tuple[NDArray[np.int64], Pooled]:
    """Pool the stored activations by document: rows of the documents that have counted tokens, and their pools."""
    hook = dictionary.required_hook_name
    start, stop = store.split_range(split)
    best: dict[int, tuple[Tensor, Tensor, int]] = {}
    for context in range(start, stop):
        document = torch.from_numpy(store.contexts(context, context + 1).document[0].astype(np.int64))
        x = stored_input(store, dictionary, context, context + 1)[0].float()
        keep = torch.from_numpy(kept(store, hook, context, context + 1, sink_multiple, selection)[0])
        latents = dictionary.encode(x)
        for row in torch.unique(document[keep]).tolist():
            here = keep & (document == row)
            top, total, n = latents[here].amax(0), x[here].sum(0), int(here.sum())
            if row in best:
                old = best[row]
                top, total, n = torch.maximum(top, old[0]), total + old[1], n + old[2]
            best[row] = (top, total, n)
        if bar is not None:
            bar.advance(1)
    documents = np.array(sorted(best), dtype=np.int64)
    if not best:
        return documents, Pooled(
            np.empty((0, dictionary.d_sae), np.float32), np.empty((0, dictionary.d_in), np.float32), documents, 0
        )
    rows = [(best[row][0].numpy(), (best[row][1] / best[row][2]).numpy(), best[row][2]) for row in documents.tolist()]
    return documents, _stack(rows, 0)


def _empty(dictionary: Dictionary) -> _Row:
    return np.zeros(dictionary.d_sae, np.float32), np.zeros(dictionary.d_in, np.float32), 0


def _pool(dictionary: Dictionary, x: Tensor) -> _Row:
    if len(x) == 0:
        return _empty(dictionary)
    return dictionary.encode(x).amax(0).float().numpy(), x.mean(0).numpy(), len(x)


def _stack(rows: Sequence[_Row], cut: int) -> Pooled:
    return Pooled(
        max_latents=np.stack([row[0] for row in rows]).astype(np.float32),
        mean_activations=np.stack([row[1] for row in rows]).astype(np.float32),
        n_tokens=np.array([row[2] for row in rows], dtype=np.int64),
        n_cut=cut,
    )


def _batches(order: Sequence[int], lengths: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    """Consecutive items whose padded size stays within `batch_tokens`; sorted input wastes little."""
    batch: list[int] = []
    for i in order:
        if batch and lengths[i] * (len(batch) + 1) > batch_tokens:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch
