"""Which label features.parquet shows: somebody's that passed every test, else the rule that passed its own."""

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from label_corpus import fire_on, reader, spell, to_firings, zipf_table

from pipelines.labels.gather import _predicate_rows, _show_preferred
from pipelines.labels.labelling import label_latents
from pipelines.labels.rows import preferred, row
from pipelines.labels.settings import LabelSettings
from pipelines.progress import SilentReporter

VOCAB, MIN_DETECTION = 800, 0.6
STRINGS = spell(VOCAB)


@pytest.fixture
def folder(tmp_path):
    """Latents that fire on a word: always, or on a third of its occurrences, which nothing in the text tells apart."""
    table = zipf_table(np.random.default_rng(5), n_contexts=300, vocab=VOCAB)
    rng = np.random.default_rng(6)
    recall = [1.0, 0.35] * 15
    columns = [
        fire_on(rng, np.isin(table.token, (10 + 2 * i, 11 + 2 * i)), table, recall=share, noise=0.0002)
        for i, share in enumerate(recall)
    ]
    columns += [(rng.choice(table.n_tokens, 300, replace=False), rng.gamma(1, 1, 300) + 0.01) for _ in range(5)]
    firings = to_firings(*zip(*columns, strict=True))
    W_dec = torch.randn(firings.n_latents, 8, generator=torch.Generator().manual_seed(0))
    config = LabelSettings(min_detection=MIN_DETECTION)
    label_latents(
        table,
        reader(firings),
        firings.n_firings,
        W_dec,
        STRINGS,
        None,
        tmp_path,
        SilentReporter(),
        seed=0,
        config=config,
    )
    return tmp_path


def shown(folder):
    names = ["label", "label_kind", "labelled", "label_source", "survives", "candidate"]
    return pq.read_table(folder / "features.parquet", columns=names).to_pylist()


def test_a_rule_that_labels_without_surviving_every_test_stays(folder):
    before = shown(folder)
    assert any(r["labelled"] and not r["survives"] for r in before)
    assert any(r["survives"] for r in before)
    assert all(r["labelled"] for r in before if r["survives"])
    assert not any(r["labelled"] for r in before[-5:])
    _show_preferred(folder, preferred(_predicate_rows(folder), ["predicate"]), MIN_DETECTION)
    assert shown(folder) == before


def test_a_label_of_somebody_else_is_shown_while_it_is_preferred(folder):
    before = shown(folder)
    human = row(1, "human:Ada", "what Ada says", "tested", passed=True)
    _show_preferred(folder, {1: human}, MIN_DETECTION)
    changed = shown(folder)
    assert (changed[1]["label"], changed[1]["label_source"]) == ("what Ada says", "human:Ada")
    assert (changed[1]["label_kind"], changed[1]["labelled"]) == ("human", True)
    assert changed[:1] + changed[2:] == before[:1] + before[2:]
    _show_preferred(folder, {}, MIN_DETECTION)
    assert shown(folder) == before
