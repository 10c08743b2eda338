"""The label stage on a store: contexts, a first label and its held-out score for every latent of a dictionary."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from pipelines.documents import documents_of
from pipelines.labels.families import TokenTable
from pipelines.labels.firings import Firings
from pipelines.labels.labelling import label_latents
from pipelines.labels.settings import LabelSettings, LabelSummary
from pipelines.progress import Reporter
from pipelines.selection import Selection, kept
from sae import Dictionary
from storage import NotFoundError
from storage.activations import ActivationStore
from storage.latents import LatentStore

_MOST_TOPICS = 1000
"""More values than this in the column are no topics but titles, say."""


def label_dictionary(
    store: ActivationStore,
    latents: LatentStore,
    dictionary: Dictionary,
    token_strings: Sequence[str],
    unembedding: tuple[Float[Tensor, " d_model"], Float[Tensor, "d_model vocab"]] | None,
    out_dir: Path,
    ui: Reporter,
    *,
    seed: int,
    config: LabelSettings | None = None,
    sink_multiple: float = 3.0,
    selection: Selection | None = None,
) -> LabelSummary:
    """Label every latent of `dictionary` and write features.parquet and examples.parquet into `out_dir`.

    Args:
        store: the activation store that `latents` was computed from.
        token_strings: readable text of every token id, a leading space kept.
        unembedding: final norm weight and W_U; None leaves promotes and suppresses null (a hook that is not the
            residual stream).
        sink_multiple: a token whose norm exceeds this many medians is a sink and takes no part; as in training.
        selection: tokens to fit and test rules on; by default all.

    Raises:
        ValueError: store, latents and dictionary do not belong together; too few documents; a token id without a
            string.
    """
    if latents.n_rows != store.spec.n_tokens or latents.d_sae != dictionary.d_sae:
        raise ValueError(
            f"Latent activations must match the store and the dictionary: they cover {latents.n_rows} tokens and "
            f"{latents.d_sae} latents, the store has {store.spec.n_tokens} tokens and the dictionary "
            f"{dictionary.d_sae} latents. Encode the store again with this dictionary."
        )
    if dictionary.hook_name is None:
        raise ValueError(
            "Labels need to know which activations the dictionary reads, but its hook_name is missing. "
            "Set hook_name in its cfg.json to a hook of the store: " + ", ".join(h.name for h in store.spec.hooks) + "."
        )

    def read_block(lo: int, hi: int) -> Firings:
        block = latents.block(lo, hi)
        return Firings(block.indptr, block.row, block.value)

    return label_latents(
        read_token_table(store, dictionary.hook_name, sink_multiple, selection=selection),
        read_block,
        latents.counts(),
        dictionary.W_dec,
        token_strings,
        unembedding,
        out_dir,
        ui,
        seed=seed,
        config=config,
    )


def read_token_table(
    store: ActivationStore,
    hook_name: str,
    sink_multiple: float = 3.0,
    *,
    selection: Selection | None = None,
    contexts_at_once: int = 4096,
) -> TokenTable:
    """The tokens of a store, those usable that are selected and no attention sinks; 15 bytes a token."""
    n, length = store.spec.n_contexts, store.spec.context_length
    columns: list[list[NDArray[Any]]] = [[], [], [], []]
    for start in range(0, n, contexts_at_once):
        stop = min(start + contexts_at_once, n)
        contexts = store.contexts(start, stop)
        usable = kept(store, hook_name, start, stop, sink_multiple, selection) & (contexts.document >= 0)
        for column, part in zip(columns, (contexts.tokens, contexts.document, contexts.position, usable), strict=True):
            column.append(np.asarray(part).reshape(-1))
    token, document, position, usable = (np.concatenate(column) for column in columns)
    topic, topics = _topics(store, document)
    return TokenTable(
        topic=topic,
        topics=topics,
        token=token,
        document=document,
        position=position,
        usable=usable,
        context_length=length,
        n_train=store.spec.split_range("train")[1] * length,
    )


def _topics(store: ActivationStore, document: NDArray[np.int32]) -> tuple[NDArray[np.int16] | None, list[str]]:
    """Topic of each token's document; padding has the last one, none. None where the text came without topics."""
    try:
        named = documents_of(store).topic
    except NotFoundError:  # a store that was made elsewhere
        return None, []
    names, code = np.unique(named, return_inverse=True)
    if not 2 <= len(names) <= _MOST_TOPICS:
        return None, []
    of_document = np.append(code.reshape(-1), len(names)).astype(np.int16)
    return of_document[np.where(document >= 0, document, len(names))], [*names.tolist(), "nothing"]
