"""The language model and the SAE again, on texts that are not in the store."""

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipelines.labels.families import TokenTable
from pipelines.models import LanguageModel
from sae import Dictionary

Text = NDArray[np.integer[Any]]
"""Token ids of one text, from its start."""


@runtime_checkable
class Activations(Protocol):
    """Where a latent fires on any text."""

    def last(self, texts: Sequence[Text], latents: NDArray[np.int64]) -> NDArray[np.float32]:
        """Activation of `latents[i]` at the last token of `texts[i]`."""
        ...


class Rerun:
    """A model that stops at the dictionary's hooks, and the dictionary."""

    def __init__(
        self, lm: LanguageModel, dictionary: Dictionary, *, max_norm: float | None = None, batch_tokens: int = 4096
    ) -> None:
        """Args:
        max_norm: a token whose activations have a larger norm is an attention sink, on which no latent fires.
        batch_tokens: tokens of a forward pass, padding included; bounds memory.
        """
        self._lm, self._dictionary = lm, dictionary.to(lm.device)
        self._max_norm, self._batch_tokens = max_norm, batch_tokens

    def last(self, texts: Sequence[Text], latents: NDArray[np.int64]) -> NDArray[np.float32]:
        """See `Activations`.

        Texts of like length share a forward pass. They are padded on the right, where a causal model does not look.
        """
        result = np.zeros(len(texts), np.float32)
        length = np.array([len(text) for text in texts], np.int64)
        order = np.argsort(length, kind="stable")
        start = 0
        while start < len(order):
            stop = start + 1
            while stop < len(order) and (stop + 1 - start) * length[order[stop]] <= self._batch_tokens:
                stop += 1
            batch = order[start:stop]
            result[batch] = self._batch([texts[i] for i in batch], length[batch], latents[batch])
            start = stop
        return result

    @torch.inference_mode()
    def _batch(
        self, texts: Sequence[Text], length: NDArray[np.int64], latents: NDArray[np.int64]
    ) -> NDArray[np.float32]:
        tokens = np.zeros((len(texts), int(length.max())), np.int64)
        for row, text in zip(tokens, texts, strict=True):
            row[: len(text)] = text
        ids = torch.from_numpy(tokens).to(self._lm.device)
        position = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        hooks = self._dictionary.input_hooks
        captured = self._lm.capture(ids, position, hooks)
        at = torch.from_numpy(length - 1).to(ids.device)
        rows = torch.arange(len(at), device=ids.device)
        x = torch.cat([captured[hook][rows, at].float() for hook in hooks], dim=-1)
        distinct, which = np.unique(latents, return_inverse=True)
        activation: Tensor = self._dictionary.encode(x, torch.from_numpy(distinct))[
            rows, torch.from_numpy(which.reshape(-1)).to(ids.device)
        ]
        if self._max_norm is not None:
            sink = captured[hooks[0]][rows, at].float().norm(dim=-1) > self._max_norm
            activation = activation.masked_fill(sink, 0.0)
        return activation.float().cpu().numpy()


def piece_up_to(table: TokenTable, row: int) -> NDArray[np.int32]:
    """The tokens of a document piece from its start to a token row."""
    return table.token[row - int(min(table.position[row], row % table.context_length)) : row + 1]


def heldout_texts(table: TokenTable, n: int, n_tokens: int, rng: np.random.Generator) -> NDArray[np.int32]:
    """The first `n_tokens` tokens of up to `n` held-out documents that are as long, `[n, n_tokens]`.

    Raises:
        ValueError: no held-out document is long enough.
    """
    start = np.flatnonzero(table.position[table.n_train :] == 0) + table.n_train
    start = start[start + n_tokens <= table.n_tokens]
    stays = start % table.context_length + n_tokens <= table.context_length
    last = start + n_tokens - 1
    whole = (
        stays & (table.document[start] == table.document[last]) & (table.position[last] == n_tokens - 1)
    )  # position restarts at each piece
    start = start[whole]
    start = start[np.unique(table.document[start], return_index=True)[1]]
    if not len(start):
        raise ValueError(
            f"Texts of {n_tokens} tokens are needed, but no held-out document has as many. Ask for fewer tokens, or "
            "collect longer documents."
        )
    chosen = np.sort(rng.permutation(start)[:n])
    return table.token[chosen[:, None] + np.arange(n_tokens)]
