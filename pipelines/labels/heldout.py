"""Run rules on held-out documents: what each rule predicts per document, against where latents really fire."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from pipelines.labels.families import Family, TokenTable
from pipelines.labels.firings import Firings
from pipelines.labels.predicates import Predicates
from pipelines.labels.scores import Detection, detection, graded_auroc


class Scores(NamedTuple):
    """Held-out scores of a block's rules; NaN where undefined."""

    detection: Detection
    tpr_strong: NDArray[np.float64]
    """TPR over firings at least as strong as `strong` only."""
    auroc: NDArray[np.float64]


class HeldOut:
    """The held-out tokens, arranged so that a rule's predictions per document are one sparse product."""

    def __init__(self, table: TokenTable, families: Sequence[Family]) -> None:
        self.rows = table.rows("heldout")
        self._code = [family.code for family in families]
        self._n_categories = [len(family.names) for family in families]
        documents, index = np.unique(table.document[self.rows], return_inverse=True)
        index = index.reshape(-1)
        self._document = np.full(table.n_tokens, -1, np.int64)
        self._document[self.rows] = index
        self.tokens = np.bincount(index, minlength=len(documents))
        """Usable tokens of each document."""
        self._occurrences: list[Any] = [
            sparse.coo_array(
                (np.ones(len(self.rows), np.int64), (code[self.rows], index)), shape=(width, len(documents))
            ).tocsr()
            for code, width in zip(self._code, self._n_categories, strict=True)
        ]

    @property
    def n_documents(self) -> int:
        return len(self.tokens)

    def select(self, firings: Firings) -> Firings:
        """The firings on usable held-out tokens."""
        return firings.where(self._document[firings.row] >= 0)

    def predicted_by_document(self, predicates: Predicates) -> NDArray[np.int64]:
        """`[n, d]` tokens on which each rule holds."""
        predicted = np.zeros((predicates.n_latents, self.n_documents), np.int64)
        owner = predicates.owner
        for family, occurrences in enumerate(self._occurrences):
            entry = np.flatnonzero(predicates.family[owner] == family)
            if len(entry):
                shape = (predicates.n_latents, self._n_categories[family])
                rule = sparse.csr_array(
                    (np.ones(len(entry), np.int64), (owner[entry], predicates.code[entry])), shape=shape
                )
                predicted += (rule @ occurrences).toarray()
        return predicted

    def score(self, firings: Firings, predicates: Predicates, strong: NDArray[np.float32]) -> Scores:
        """Score rule `i` on latent `i` of the block.

        Args:
            firings: held-out firings, from `select`.
            predicates: one rule per latent of the block.
            strong: activation from which a firing of each latent counts as strong.
        """
        latent = firings.latent
        entry = self._entry_of_firing(firings, predicates)
        hit = entry >= 0
        cell = latent * self.n_documents + self._document[firings.row]
        shape = (predicates.n_latents, self.n_documents)
        firing = np.bincount(cell, minlength=shape[0] * shape[1]).reshape(shape)
        hits = np.bincount(cell[hit], minlength=shape[0] * shape[1]).reshape(shape)
        found = detection(hits, firing, self.predicted_by_document(predicates), self.tokens)

        is_strong = firings.value >= strong[latent]
        n_strong = np.bincount(latent[is_strong], minlength=shape[0])
        n_strong_hit = np.bincount(latent[is_strong & hit], minlength=shape[0])
        tpr_strong = np.divide(n_strong_hit, n_strong, out=np.full(shape[0], np.nan), where=n_strong > 0)
        auroc = graded_auroc(
            predicates.indptr,
            np.bincount(entry[hit], minlength=len(predicates.code)),
            self._tokens_of_entry(predicates),
            predicates.rate,
            found.n_firing,
            len(self.rows),
        )
        return Scores(
            _without_rules(found, predicates), _nan_unless(tpr_strong, predicates), _nan_unless(auroc, predicates)
        )

    def score_on_others(self, firings: Firings, predicates: Predicates) -> NDArray[np.float32]:
        """`[n_rules, n_latents]` balanced accuracy of every rule on every latent of `firings`; NaN without firings."""
        owner, n_rules = predicates.owner, predicates.n_latents
        n_predicted = np.bincount(owner, weights=self._tokens_of_entry(predicates), minlength=n_rules)
        result = np.full((n_rules, firings.n_latents), np.nan, np.float32)
        for i in range(firings.n_latents):
            row = firings.row[firings.indptr[i] : firings.indptr[i + 1]]
            if not 0 < len(row) < len(self.rows):
                continue
            inside = np.zeros(len(predicates.code), np.int64)
            for family, code in enumerate(self._code):
                count = np.bincount(code[row], minlength=self._n_categories[family])
                entry = predicates.family[owner] == family
                inside[entry] = count[predicates.code[entry]]
            hits = np.bincount(owner, weights=inside, minlength=n_rules)
            fpr = (n_predicted - hits) / (len(self.rows) - len(row))
            result[:, i] = (hits / len(row) + 1 - fpr) / 2
        return result

    def _entry_of_firing(self, firings: Firings, predicates: Predicates) -> NDArray[np.int64]:
        """For each firing, the entry of `predicates.code` that holds on its token; -1 if the rule does not hold."""
        latent, result = firings.latent, np.full(len(firings.row), -1, np.int64)
        width = max(self._n_categories)
        keys = predicates.owner * width + predicates.code  # ascending
        if not len(keys):
            return result
        for family, code in enumerate(self._code):
            of_family = np.flatnonzero(predicates.family[latent] == family)
            wanted = latent[of_family] * width + code[firings.row[of_family]]
            at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
            result[of_family] = np.where(keys[at] == wanted, at, -1)
        return result

    def _tokens_of_entry(self, predicates: Predicates) -> NDArray[np.int64]:
        """Usable held-out tokens in the category of each entry."""
        tokens = np.zeros(len(predicates.code), np.int64)
        family_of_entry = predicates.family[predicates.owner]
        for family, occurrences in enumerate(self._occurrences):
            entry = family_of_entry == family
            tokens[entry] = np.asarray(occurrences.sum(axis=1)).reshape(-1)[predicates.code[entry]]
        return tokens


def _nan_unless(x: NDArray[np.float64], predicates: Predicates) -> NDArray[np.float64]:
    return np.where(predicates.found, x, np.nan)


def _without_rules(found: Detection, predicates: Predicates) -> Detection:
    scores = {f: _nan_unless(getattr(found, f), predicates) for f in Detection._fields if f != "n_firing"}
    return Detection(n_firing=found.n_firing, **scores)
