"""The tests of labels that run the language model again, for some latents of a labelled dictionary.

    edits          what the latent reads: contexts are changed        `counterfactual`
    output test    what it writes: it is amplified                    `output_test`

Both go on where an interrupted attempt stopped and set columns of features.parquet, null for latents not tested.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipelines.labels import counterfactual
from pipelines.labels.counterfactual import choose_firings, run_edits
from pipelines.labels.families import TokenTable
from pipelines.labels.in_model_settings import EditsConfig, OutputTestConfig
from pipelines.labels.logit_lens import logit_lens
from pipelines.labels.on_texts import LabelsOnTexts
from pipelines.labels.output_test import Amplifier, draw_pool, matched_controls, measure_rises, score_rises
from pipelines.labels.parts import Parts, join_columns
from pipelines.labels.rerun import Rerun, heldout_texts
from pipelines.labels.swaps import Corpus
from pipelines.models import LanguageModel
from pipelines.progress import Reporter
from pipelines.rundir import key_of
from sae import Dictionary
from sae.edits import Exclude
from storage.latents import LatentStore

_EDITED_TOGETHER = 8
"""Latents of a block of edits."""
_AMPLIFIED_TO = 0.99
"""Quantile of a latent's positive activations."""


class InModel:
    """A labelled dictionary and the model that it belongs to."""

    def __init__(
        self,
        lm: LanguageModel,
        dictionary: Dictionary,
        table: TokenTable,
        latents: LatentStore,
        folder: Path,
        *,
        max_norm: float,
        seed: int,
    ) -> None:
        """Args:
        table: the tokens of the store that `latents` was computed from.
        folder: holds features.parquet; finished blocks are kept in folders below it.
        max_norm: tokens with a larger norm at the hook are attention sinks.
        """
        self._lm, self._dictionary, self._table, self._latents = lm, dictionary, table, latents
        self._folder, self._max_norm, self._seed = folder, max_norm, seed
        self._features = folder / "features.parquet"
        self._key = [self._rows(), latents.meta, lm.resolved.provenance(), max_norm, seed]

    def edits(self, config: EditsConfig, ui: Reporter) -> dict[str, Any]:
        """Edit the contexts of `config.n_latents` latents; returns figures for metrics.json."""
        rows = self._rows()
        chosen = self._choose(rows, config.n_latents, 1)
        anchor = next(
            (t for t in (self._lm.tokenizer.bos_token_id, self._lm.tokenizer.eos_token_id) if t is not None),
            int(np.bincount(self._table.token).argmax()),
        )
        strings = self._lm.token_strings()
        corpus = Corpus.of(self._table, strings, anchor)
        holds = LabelsOnTexts({int(i): rows[i] for i in chosen}, strings)
        rerun = Rerun(self._lm, self._dictionary, max_norm=self._max_norm)
        parts = Parts(self._folder / "edits", key_of(self._key, config.model_dump()), counterfactual.COLUMNS)
        blocks = [chosen[start : start + _EDITED_TOGETHER] for start in range(0, len(chosen), _EDITED_TOGETHER)]
        with ui.stage("edit contexts", total=len(chosen), unit="latents") as bar:
            for number, block in enumerate(blocks):
                if number not in parts:
                    firings = [
                        firing
                        for latent in block.tolist()
                        for firing in choose_firings(
                            latent, *self._heldout(latent), self._table, config.n_documents, self._seed
                        )
                    ]
                    scores = run_edits(firings, corpus, rerun, holds, config, seed=self._seed)
                    table = pa.Table.from_pylist([scores[i].row() for i in block.tolist()], counterfactual.COLUMNS)
                    parts.write(number, {name: table[name] for name in table.column_names})
                bar.advance(len(block))
        columns = parts.read(len(blocks)) if blocks else counterfactual.COLUMNS.empty_table()
        join_columns(self._features, chosen, columns)
        return _figures_of_edits(columns)

    def output_test(self, config: OutputTestConfig, ui: Reporter) -> dict[str, Any]:
        """Amplify `config.n_latents` latents and their controls; returns figures for metrics.json.

        Raises:
            ValueError: no held-out document has `config.n_tokens` tokens.
        """
        rows = self._rows()
        chosen = self._choose(rows, config.n_latents, 2)
        rng = np.random.default_rng([self._seed, 3])
        live = np.flatnonzero(np.array([row["n_heldout_active"] > 0 for row in rows]))
        pool = draw_pool(chosen, live, config.n_controls, rng)
        density = np.array([row["density"] for row in rows], np.float64)
        norm = self._dictionary.W_dec.norm(dim=1).double().cpu().numpy()
        controls = matched_controls(chosen, pool, density, norm, config.n_controls)
        level = np.array([np.quantile(self._heldout(i)[1], _AMPLIFIED_TO) for i in pool.tolist()], np.float32)
        weight, W_U = self._lm.unembedding()
        promised = logit_lens(self._dictionary.W_dec[chosen].cpu(), weight, W_U, n_top=config.n_promised).promoted
        amplifier = Amplifier(
            self._lm,
            self._dictionary,
            heldout_texts(self._table, config.n_texts, config.n_tokens, rng),
            promised.numpy(),
            Exclude(first=True, max_norm=self._max_norm),
        )
        key = key_of(self._key, config.model_dump())
        scores = score_rises(measure_rises(amplifier, pool, level, self._folder / "output", key, ui), controls)
        join_columns(self._features, chosen, scores.columns())
        return {
            "output_n": len(chosen),
            "output_share_passed": float(scores.passes.mean()),
            "output_share_passed_dealt": float(scores.passes_dealt.mean()),
        }

    def _rows(self) -> list[dict[str, Any]]:
        names = ["latent", "labelled", "rule", "density", "n_heldout_active"]
        rows: list[dict[str, Any]] = pq.read_table(self._features, columns=names).to_pylist()
        return rows

    def _choose(self, rows: list[dict[str, Any]], n: int, stream: int) -> NDArray[np.int64]:
        """Latents that fire on held-out documents: a random sample of the labelled ones, then of the others."""
        rng = np.random.default_rng([self._seed, stream])
        active = np.array([row["n_heldout_active"] > 0 for row in rows])
        labelled = np.array([row["labelled"] for row in rows])
        order = [rng.permutation(np.flatnonzero(active & which)) for which in (labelled, ~labelled)]
        return np.sort(np.concatenate(order)[:n])

    def _heldout(self, latent: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Rows and values of a latent's firings on usable held-out tokens."""
        block = self._latents.block(latent, latent + 1)
        keep = (block.row >= self._table.n_train) & self._table.usable[block.row]
        return block.row[keep], block.value[keep]


def _figures_of_edits(columns: pa.Table) -> dict[str, Any]:
    """Shares and means over the tested latents; None where nothing could be measured."""
    kind = columns["edit_kind"].to_pylist()
    known = [k for k in kind if k is not None]

    def mean(name: str) -> float | None:
        values = [value for value in columns[name].to_pylist() if value is not None]
        return float(np.mean(values)) if values else None

    return {
        "edits_n": len(kind),
        "edits_share_token": known.count("token") / len(known) if known else None,
        "edits_share_in_context": known.count("token in context") / len(known) if known else None,
        "edits_same_on": mean("edit_same_on"),
        "edits_other_off": mean("edit_other_off"),
    }
