"""Texts → latent activations, pooled: what audits read.

A text's score for a latent is its largest activation over the text's tokens; attention sinks (the first position, and
tokens whose norm exceeds a multiple of the training median) do not count, as in training. Beside the scores stand what
baselines need: the means of the activations, of their reconstruction and of what it misses, and the scores of random
features.

    readers = [Reader(dictionary, sink_norm, RandomFeatures.like(dictionary, store))]
    pooled = encode_passages(lm, readers, passages_of(lm, texts, max_tokens=256))   # one Pooled a reader, one pass
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipelines.dictionaries import stored_input, stored_target
from pipelines.models import LanguageModel
from pipelines.progress import Bar
from pipelines.selection import Selection, kept
from sae import Dictionary
from storage import ActivationStore
from storage.spec import Split

_BLOCK = 2**24
"""Latent activations that are held at a time: 64 MB in float32."""


@dataclass(frozen=True)
class Pooled:
    """One row a text."""

    max_latents: NDArray[np.float32]
    """(n_texts, d_sae): largest activation over the counted tokens."""
    mean_latents: NDArray[np.float32]
    """(n_texts, d_sae): mean activation over the counted tokens."""
    mean_activations: NDArray[np.float32]
    """(n_texts, d_in): mean of the model's activations over the counted tokens, for dense probes."""
    mean_reconstruction: NDArray[np.float32]
    """(n_texts, d_out): mean of what the dictionary makes of them."""
    mean_error: NDArray[np.float32]
    """(n_texts, d_out): mean of what it misses."""
    max_random: NDArray[np.float32]
    """(n_texts, d_sae): as `max_latents`, of random features; no columns without any."""
    n_tokens: NDArray[np.int64]
    """(n_texts,): counted tokens."""
    n_cut: int
    """Texts that were longer than the limit and were cut."""

    def rows(self, index: NDArray[np.int64]) -> "Pooled":
        """Some texts, none of which counts as cut."""
        arrays = {item.name: getattr(self, item.name)[index] for item in fields(self) if item.name != "n_cut"}
        return Pooled(**arrays, n_cut=0)


class Passage(NamedTuple):
    """One text as the model reads it."""

    ids: list[int]
    counted: list[bool] | None = None
    """Tokens that are pooled; all, if None."""
    cut: bool = False


@dataclass(frozen=True)
class RandomFeatures:
    """A dictionary that learnt nothing: as many random directions as latents, and as many active on each token.

        pre_acts    = ((x - mean) / std) @ V,   V ~ N(0, 1)          latent_acts = relu(topk(pre_acts, k))

    Dimensions are scaled to unit variance first, or the few that hold most of it would decide every direction.
    """

    mean: Tensor
    scale: Tensor
    directions: Tensor
    k: int

    @classmethod
    def like(cls, dictionary: Dictionary, store: ActivationStore, *, seed: int = 0) -> "RandomFeatures":
        """Of the width and the mean number of active latents of a dictionary, over the first held-out contexts."""
        parts = [store.statistics(hook) for hook in dictionary.input_hooks]
        mean = np.concatenate([s.mean for s in parts])
        scale = np.concatenate([1 / np.sqrt(np.maximum(s.m2 / max(s.count, 1), 1e-12)) for s in parts])
        start, stop = store.split_range("heldout")
        x = stored_input(store, dictionary, start, min(stop, start + 4)).float()
        ordinary = torch.from_numpy(~store.sink_mask(dictionary.required_hook_name, start, min(stop, start + 4)))
        x = x[ordinary].to(dictionary.W_dec.device)
        active = dictionary.encode(x).count_nonzero(dim=-1).double() if len(x) else torch.ones(1)
        generator = torch.Generator().manual_seed(seed)
        return cls(
            mean=torch.from_numpy(mean).float(),
            scale=torch.from_numpy(scale).float(),
            directions=torch.randn(len(mean), dictionary.d_sae, generator=generator),
            k=max(1, round(float(active.mean()))),
        )

    def encode(self, x: Tensor) -> Tensor:
        """Activations of random features, [n_tokens, d_sae]."""
        pre_acts = ((x - self.mean) * self.scale) @ self.directions
        least = pre_acts.topk(min(self.k, pre_acts.shape[1]), dim=-1).values[:, -1:]
        return torch.where(pre_acts >= least, pre_acts, 0).relu_()


@dataclass(frozen=True)
class Reader:
    """A dictionary that reads a pass."""

    dictionary: Dictionary
    sink_norm: float | None = None
    """Tokens whose norm is not below this are sinks; None counts every token but the first."""
    random: RandomFeatures | None = None


def passages_of(
    lm: LanguageModel, texts: Sequence[str], *, max_tokens: int, prepend_bos: bool = False
) -> list[Passage]:
    """Tokenised texts, cut at `max_tokens`.

    Args:
        prepend_bos: put the BOS token in front of every text, as the store did.
    """
    # As in collection: special tokens are ours to place.
    lead = [lm.tokenizer.bos_token_id] if prepend_bos else []
    encoded = [lead + lm.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] for text in texts]
    return [Passage(ids[:max_tokens], cut=len(ids) > max_tokens) for ids in encoded]


def encode_passages(
    lm: LanguageModel,
    readers: Sequence[Reader],
    passages: Sequence[Passage],
    *,
    bar: Bar | None = None,
    batch_tokens: int = 2048,
) -> list[Pooled]:
    """Run passages through the model, each alone (no packing), in batches of like lengths, and pool for each reader.

    The model runs once for all readers, and not beyond the last of their hooks.
    """
    hooks = list(dict.fromkeys(hook for reader in readers for hook in _hooks(reader.dictionary)))
    pools = [_Pool(reader, len(passages)) for reader in readers]
    for batch, captured, real in _passes(lm, hooks, passages, batch_tokens):
        for pool in pools:
            pool.add(batch, captured, real)
        if bar is not None:
            bar.advance(len(batch))
    n_cut = sum(passage.cut for passage in passages)
    return [pool.pooled(n_cut) for pool in pools]


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

    Texts come in the order of their length; see `passages_of` and `Reader` for the arguments.
    """
    passages = passages_of(lm, texts, max_tokens=max_tokens, prepend_bos=prepend_bos)
    reader = Reader(dictionary, sink_norm)
    for batch, captured, real in _passes(lm, list(dictionary.input_hooks), passages, batch_tokens):
        x, counted = _inputs(reader, captured), _counted(reader, captured, real)
        for j, i in enumerate(batch):
            yield i, x[j][counted[j]], passages[i].cut


def pool_documents(
    store: ActivationStore,
    reader: Reader,
    *,
    split: Split,
    sink_multiple: float,
    bar: Bar | None = None,
    selection: Selection | None = None,
) -> tuple[NDArray[np.int64], Pooled]:
    """Pool the stored activations by document: rows of the documents that have counted tokens, and their pools."""
    dictionary = reader.dictionary
    start, stop = store.split_range(split)
    rows: dict[int, int] = {}
    pool = _Pool(reader, len(np.unique(store.document[start:stop])))
    for context in range(start, stop):
        keep = kept(store, dictionary.required_hook_name, context, context + 1, sink_multiple, selection)[0]
        documents = store.contexts(context, context + 1).document[0][keep]
        if documents.size:
            chosen = torch.from_numpy(keep)
            found, lengths = np.unique(documents, return_counts=True)
            by_document = torch.from_numpy(np.argsort(documents, kind="stable"))
            x = stored_input(store, dictionary, context, context + 1)[0].float()[chosen][by_document]
            target = stored_target(store, dictionary, context, context + 1)[0].float()[chosen][by_document]
            places = [rows.setdefault(document, len(rows)) for document in found.tolist()]
            pool.add_tokens(places, lengths.tolist(), x, target)
        if bar is not None:
            bar.advance(1)
    order = np.array(sorted(rows), dtype=np.int64)
    return order, pool.pooled(0).rows(np.array([rows[row] for row in order.tolist()], dtype=np.int64))


def _hooks(dictionary: Dictionary) -> list[str]:
    """What it reads and, where that is known, what it reconstructs."""
    return list(dict.fromkeys([*dictionary.input_hooks, *dictionary.output_hooks]))


def _passes(
    lm: LanguageModel, hooks: Sequence[str], passages: Sequence[Passage], batch_tokens: int
) -> Iterator[tuple[list[int], dict[str, Tensor], Tensor]]:
    """Batches of passages of like lengths: which ones, what the hooks saw, and which tokens may count."""
    lengths = [len(passage.ids) for passage in passages]
    for batch in _batches(sorted(range(len(passages)), key=lengths.__getitem__), lengths, batch_tokens):
        # Right padding: causal attention keeps it from the real tokens, and the mask keeps it from the pools.
        width = max(max(lengths[i] for i in batch), 2)
        tokens = torch.zeros(len(batch), width, dtype=torch.long)
        real = torch.zeros(len(batch), width, dtype=torch.bool)
        for j, i in enumerate(batch):
            ids, counted, _ = passages[i]
            tokens[j, : len(ids)] = torch.tensor(ids, dtype=torch.long)
            real[j, : len(ids)] = True if counted is None else torch.tensor(counted, dtype=torch.bool)
        position = torch.arange(width).expand(len(batch), width)
        yield batch, lm.capture(tokens.to(lm.device), position.to(lm.device), hooks), real & (position > 0)


def _inputs(reader: Reader, captured: dict[str, Tensor]) -> Tensor:
    """What the dictionary encodes, [batch, seq, d_in]."""
    return torch.cat([captured[name].float().cpu() for name in reader.dictionary.input_hooks], dim=-1)


def _counted(reader: Reader, captured: dict[str, Tensor], real: Tensor) -> Tensor:
    """Tokens that are no sinks."""
    if reader.sink_norm is None:
        return real
    norms: Tensor = captured[reader.dictionary.required_hook_name].float().cpu().norm(dim=-1)
    return real & (norms < reader.sink_norm)


class _Pool:
    """Running maxima and sums of one reader over some texts."""

    def __init__(self, reader: Reader, n_texts: int) -> None:
        self._reader = reader
        d = reader.dictionary
        self._device = d.W_dec.device
        d_out = d.sae.d_out if d.output_hooks else 0
        self._top = torch.zeros(n_texts, d.d_sae)
        self._latents = torch.zeros(n_texts, d.d_sae)
        self._x = torch.zeros(n_texts, d.d_in)
        self._x_hat, self._error = torch.zeros(n_texts, d_out), torch.zeros(n_texts, d_out)
        self._random = torch.zeros(n_texts, 0 if reader.random is None else d.d_sae)
        self._n = torch.zeros(n_texts, dtype=torch.long)

    def add(self, batch: Sequence[int], captured: dict[str, Tensor], real: Tensor) -> None:
        """Counted tokens of a batch of whole texts."""
        counted = _counted(self._reader, captured, real)
        x = _inputs(self._reader, captured)[counted]
        outputs = self._reader.dictionary.output_hooks
        target = torch.cat([captured[name].float().cpu()[counted] for name in outputs], dim=-1) if outputs else None
        self.add_tokens(batch, counted.sum(1).tolist(), x, target)

    @torch.no_grad()
    def add_tokens(self, texts: Sequence[int], lengths: Sequence[int], x: Tensor, target: Tensor | None) -> None:
        """Tokens of some texts, one text after another; a block of them is encoded at a time."""
        limit = max(1, _BLOCK // self._reader.dictionary.d_sae)
        ends = np.cumsum(lengths)
        for low in range(0, len(x), limit):
            part = x[low : low + limit]
            x_hat, latents = (out.float().cpu() for out in self._reader.dictionary.sae(part.to(self._device)))
            error = None if target is None else target[low : low + limit] - x_hat
            random = None if self._reader.random is None else self._reader.random.encode(part)
            first = int(np.searchsorted(ends, low, side="right"))
            for text, end, length in zip(texts[first:], ends[first:].tolist(), lengths[first:], strict=True):
                here = slice(max(end - length - low, 0), end - low)
                if here.start >= len(part):
                    break
                self._n[text] += len(part[here])
                self._x[text] += part[here].sum(0)
                self._latents[text] += latents[here].sum(0)
                if length:
                    self._top[text] = torch.maximum(self._top[text], latents[here].amax(0))
                    if random is not None:
                        self._random[text] = torch.maximum(self._random[text], random[here].amax(0))
                if error is not None:
                    self._x_hat[text] += x_hat[here].sum(0)
                    self._error[text] += error[here].sum(0)

    def pooled(self, n_cut: int) -> Pooled:
        """Maxima and means."""
        n = self._n.clamp_min(1)[:, None]
        return Pooled(
            max_latents=self._top.numpy(),
            mean_latents=(self._latents / n).numpy(),
            mean_activations=(self._x / n).numpy(),
            mean_reconstruction=(self._x_hat / n).numpy(),
            mean_error=(self._error / n).numpy(),
            max_random=self._random.numpy(),
            n_tokens=self._n.numpy(),
            n_cut=n_cut,
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
