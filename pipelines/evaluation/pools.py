"""Documents as rows: means of activations and of latents over each document's counted tokens, for probes.

Means of latents keep linear reading intact: mean(x) - b_dec - mean(error) = Σ_j mean(f_j) W_dec_j.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray

from pipelines.dictionaries import stored_input
from pipelines.evaluation.reconstruction import BLOCK_LATENTS, BLOCK_TOKENS, Block
from pipelines.selection import Selection, kept
from sae import Dictionary, SparseLatents
from storage import ActivationStore


@dataclass(frozen=True)
class Pool:
    """One row a document."""

    document: NDArray[np.int64]
    x: Float[np.ndarray, "n d_in"]
    """Mean activations."""
    latents: Float[np.ndarray, "n d_sae"]
    """Mean latent activations, float32."""

    def __len__(self) -> int:
        return len(self.document)

    def take(self, rows: NDArray[np.intp] | NDArray[np.bool_]) -> "Pool":
        """Some of the documents."""
        return Pool(self.document[rows], self.x[rows], self.latents[rows])


class DocumentPools:
    """Sums over chosen documents as their tokens pass by; memory is n_documents x (d_in + d_sae)."""

    def __init__(self, documents: Sequence[int] | NDArray[np.integer], d_in: int, d_sae: int) -> None:
        self._documents = np.sort(np.asarray(documents, np.int64))
        n = len(self._documents)
        self._x, self._latents = torch.zeros(n, d_in, dtype=torch.float64), torch.zeros(n, d_sae)
        self._n = torch.zeros(n, dtype=torch.float64)

    def __call__(self, block: Block) -> None:
        """Add the tokens of a block that belong to the chosen documents."""
        document = block.document.numpy()
        row = np.searchsorted(self._documents, document)
        row = np.minimum(row, max(len(self._documents) - 1, 0))
        ours = self._documents[row] == document if len(self._documents) else np.zeros(len(document), bool)
        if not ours.any():
            return
        index, mine = torch.from_numpy(row), torch.from_numpy(ours)
        self._n += torch.bincount(index[mine], minlength=len(self._n))
        self._x.index_add_(0, index[mine], block.x.cpu()[mine].double())
        where, latent, value = (part.cpu() for part in block.latents)
        counted = mine[where]
        flat = index[where[counted]] * self._latents.shape[1] + latent[counted]
        self._latents.view(-1).index_add_(0, flat, value[counted].float())

    def finish(self) -> Pool:
        """The documents that had a counted token."""
        seen = self._n > 0
        n = self._n[seen][:, None]
        return Pool(
            self._documents[seen.numpy()],
            (self._x[seen] / n).float().numpy(),
            (self._latents[seen] / n.float()).numpy(),
        )


def choose_documents(
    store: ActivationStore, topic: NDArray[np.int64], contexts: tuple[int, int], n: int
) -> tuple[NDArray[np.int64], int]:
    """About `n` documents of a range of contexts, as evenly over topics as there are documents of them.

    Contexts are in random order, so the first documents of a topic are a random sample of it.

    Args:
        topic: of every document of the store; -1 for one that is not wanted.
    Returns: the documents, ascending, and the context after the last one that is needed. The search ends early, with
        fewer of rare topics, after ten times as many documents as are wanted.
    """
    wanted = topic[topic >= 0]
    if not len(wanted) or not n:
        return np.empty(0, np.int64), contexts[0]
    left = np.full(int(wanted.max()) + 1, -(-n // len(np.unique(wanted))))
    left[np.setdiff1d(np.arange(len(left)), wanted)] = 0
    found: list[int] = []
    spare: list[int] = []
    known: set[int] = set()
    low, stop = contexts
    while low < stop and (left > 0).any() and len(known) < 10 * n:
        for document in dict.fromkeys(store.contexts(low, low + 1).document[0].tolist()):
            if document < 0 or topic[document] < 0 or document in known:
                continue
            known.add(document)
            if left[topic[document]] > 0:
                left[topic[document]] -= 1
                found.append(document)
            else:
                spare.append(document)
        low += 1
    chosen = (found + spare)[:n]
    return np.array(sorted(chosen), np.int64), low


@torch.inference_mode()
def pool_range(
    store: ActivationStore,
    dictionaries: Mapping[str, Dictionary],
    documents: NDArray[np.int64],
    split: tuple[int, int],
    *,
    sink_multiple: float,
    selection: Selection | None = None,
    advance: Callable[[float], None] = lambda n: None,
) -> dict[str, Pool]:
    """Pool documents of a range of contexts with every dictionary."""
    pools = {name: DocumentPools(documents, d.d_in, d.d_sae) for name, d in dictionaries.items()}
    length = store.spec.context_length
    widest = max(d.d_sae for d in dictionaries.values())
    step = max(1, min(BLOCK_TOKENS, BLOCK_LATENTS // widest) // length)
    for low in range(*split, step):
        high = min(low + step, split[1])
        contexts = store.contexts(low, high)
        document = torch.from_numpy(np.asarray(contexts.document)).flatten().long()
        ours = np.isin(document.numpy(), documents)
        for name, dictionary in dictionaries.items():
            keep = kept(store, dictionary.required_hook_name, low, high, sink_multiple, selection).reshape(-1) & ours
            x = stored_input(store, dictionary, low, high).flatten(0, 1)[torch.from_numpy(keep)].float()
            x = x.to(dictionary.sae.W_dec.device)
            latents = dictionary.encode_sparse(x) if len(x) else _nothing(x)
            token = torch.from_numpy(np.asarray(contexts.tokens)).flatten().long()[keep]
            place = torch.arange(low * length, high * length)[keep]
            pools[name](Block(x, latents, token, document[keep], place))
        advance((high - low) * length)
    return {name: pool.finish() for name, pool in pools.items()}


def _nothing(x: torch.Tensor) -> SparseLatents:
    index = torch.zeros(0, dtype=torch.long, device=x.device)
    return SparseLatents(index, index, x.new_zeros(0))
