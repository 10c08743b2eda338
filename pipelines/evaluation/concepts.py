"""The user's own concepts: their texts, pooled, for absorption."""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float
from numpy.typing import NDArray

from pipelines.audit.concepts import Concept, examples_of
from pipelines.encode import counted_activations
from pipelines.errors import UsageError
from pipelines.evaluation.absorption import Absorbed, absorption
from pipelines.evaluation.pools import Pool
from pipelines.evaluation.probes import fit_dense_probes, stratified_folds
from pipelines.models import LanguageModel
from sae import Dictionary

MAX_TOKENS = 256


@dataclass(frozen=True)
class ConceptTexts:
    """Texts with and without a concept; texts of one group stay on one side of the split."""

    texts: tuple[str, ...]
    positive: Bool[np.ndarray, " n"]
    group: tuple[str, ...]

    @classmethod
    def of(cls, concept: Concept) -> "ConceptTexts":
        """The examples of a concept file that has its own, but for those out of distribution.

        Raises:
            UsageError: they are chats.
        """
        examples = [example for example in examples_of(concept) if not example.ood]
        if any(example.messages is not None for example in examples):
            raise UsageError(
                f"evaluate.concepts: {concept.name} holds chats, but absorption is measured on texts: drop it, or give "
                "a concept with texts"
            )
        return cls(
            tuple(example.text for example in examples),
            np.array([example.positive for example in examples]),
            tuple(example.group for example in examples),
        )

    def in_train(self, seed: int) -> NDArray[np.bool_]:
        """Half of the groups of each kind, at random: those that hold positives only, others only, or both."""
        groups, index = np.unique(np.asarray(self.group), return_inverse=True)
        n_positive = np.bincount(index, weights=self.positive, minlength=len(groups))
        kind = np.where(n_positive == 0, 0, np.where(n_positive == np.bincount(index), 2, 1))
        return np.asarray(stratified_folds(kind, seed, 2)[index] == 0)

    def absorption(self, pool: Pool, W_dec: Float[np.ndarray, "d_sae d_in"], seed: int) -> Absorbed | str:
        """Absorption of the concept on its own texts, or why it cannot be measured."""
        first = self.in_train(seed)
        fit, held = self.positive[first], self.positive[~first]
        if min(fit.sum(), (~fit).sum(), held.sum()) < 5:
            return "five texts of each class are needed in each half"
        train, test = pool.take(first), pool.take(~first)
        fold = stratified_folds(fit.astype(np.int64), seed)
        probe = fit_dense_probes(train.x.astype(np.float64), fit[None], fold)
        return absorption(train, test, fit, held, fold, probe, 0, W_dec)


@torch.inference_mode()
def pool_concept(
    lm: LanguageModel, dictionary: Dictionary, texts: ConceptTexts, *, sink_norm: float, prepend_bos: bool
) -> Pool:
    """Each text run alone; means over its tokens that are no sinks. A text without one is a row of zeros."""
    n = len(texts.texts)
    x, latents = np.zeros((n, dictionary.d_in), np.float32), np.zeros((n, dictionary.d_sae), np.float32)
    for i, counted, _ in counted_activations(
        lm, dictionary, texts.texts, max_tokens=MAX_TOKENS, sink_norm=sink_norm, prepend_bos=prepend_bos
    ):
        if len(counted):
            x[i] = counted.mean(0).numpy()
            latents[i] = dictionary.encode(counted.to(dictionary.W_dec.device)).float().mean(0).cpu().numpy()
    return Pool(np.arange(n), x, latents)
