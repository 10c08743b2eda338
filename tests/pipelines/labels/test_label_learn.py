import json

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from label_corpus import fire_on, reader, spell, to_firings, zipf_table

from pipelines.labels.families import build_families
from pipelines.labels.forked import run_blocks
from pipelines.labels.labelling import label_latents
from pipelines.labels.learn import _code_length
from pipelines.labels.rules import Views
from pipelines.labels.settings import LabelSettings
from pipelines.progress import SilentReporter

VOCAB = 1000
STRINGS = spell(VOCAB)


@pytest.fixture(scope="module")
def table():
    return zipf_table(np.random.default_rng(3), n_contexts=500, vocab=VOCAB)


def after(table, mask):
    follows = np.concatenate([[False], mask[:-1]])
    return follows & (table.position > 0) & (np.arange(table.n_tokens) % table.context_length > 0)


@pytest.fixture(scope="module")
def labelled(table, tmp_path_factory):
    """Latents with a rule of two conditions, with an exception, with two alternatives, absorbed, noise; their truth."""
    rng = np.random.default_rng(4)
    token = table.token
    truths = [
        np.isin(token, (2, 3)) & after(table, np.isin(token, (0, 1, 4, 5))),
        np.isin(token, (6, 7)) & ~after(table, np.isin(token, (0, 1))),
        np.isin(token, (8, 9)) | after(table, token == 10),
        np.isin(token, (11, 12)),
    ]
    columns = [fire_on(rng, truth, table, recall=0.95, noise=0.0005) for truth in truths]
    child = token == 12
    parent = truths[3] & ~child
    columns[3] = fire_on(rng, parent, table, recall=0.95, noise=0.0005)
    columns.append(fire_on(rng, child, table, recall=0.97, noise=0.0))
    columns += [
        (rng.choice(table.n_tokens, n, replace=False), rng.gamma(1, 1, n) + 0.01)
        for n in (300, 900, 2500, *range(100, 1100, 40))
    ]
    firings = to_firings(*zip(*columns, strict=True))
    folder = tmp_path_factory.mktemp("learned")
    W_dec = torch.randn(firings.n_latents, 8, generator=torch.Generator().manual_seed(0))
    label_latents(
        table,
        reader(firings),
        firings.n_firings,
        W_dec,
        STRINGS,
        None,
        folder,
        SilentReporter(),
        seed=0,
        config=LabelSettings(),
    )
    return firings, truths, pq.read_table(folder / "features.parquet").to_pylist(), folder


def held(table, row):
    views = Views(table, STRINGS)
    return views.score(views.of_data(json.loads(row["rule"])), np.arange(table.n_tokens)) > 0


def test_rules_of_several_conditions_are_found(labelled, table):
    _, truths, rows, _ = labelled
    for truth, row in zip(truths[:3], rows, strict=False):
        said = held(table, row)
        assert (said & truth).sum() >= 0.9 * (said | truth).sum(), row["candidate"]
        assert row["survives"], row["candidate"]


def test_noise_has_no_label_and_survives_nothing(labelled):
    _, _, rows, _ = labelled
    for row in rows[5:]:
        assert not row["labelled"]
        assert not row["survives"]


def test_scores_are_those_of_the_rule_run_naively(labelled, table):
    firings, _, rows, _ = labelled
    heldout = table.rows("heldout")
    for latent, row in enumerate(rows[:5]):
        said = held(table, row)[heldout]
        fires = np.zeros(table.n_tokens, bool)
        fires[firings.row[firings.indptr[latent] : firings.indptr[latent + 1]]] = True
        fires = fires[heldout]
        assert row["detection_tpr"] == pytest.approx((said & fires).sum() / fires.sum(), abs=1e-6)
        assert row["detection_fpr"] == pytest.approx((said & ~fires).sum() / (~fires).sum(), abs=1e-6)
        assert row["detection_precision"] == pytest.approx((said & fires).sum() / said.sum(), abs=1e-6)
        assert row["mismatch_rank"] == 1


def test_counter_examples_are_where_the_rule_is_wrong(labelled, table):
    firings, _, rows, folder = labelled
    found = pq.read_table(folder / "counter_examples.parquet").to_pylist()
    assert {example["kind"] for example in found} == {"miss", "false alarm"}
    for example in found:
        row = example["context"] * table.context_length + example["offset"]
        latent = example["latent"]
        fires = row in firings.row[firings.indptr[latent] : firings.indptr[latent + 1]]
        assert row >= table.n_train
        assert fires == (example["kind"] == "miss")
        assert bool(held(table, rows[latent])[row]) == (example["kind"] == "false alarm")


def test_a_category_of_one_document_is_not_named(table, tmp_path):
    document = table.document[0]
    mine = np.flatnonzero((table.document == document) & (table.token < 30) & table.usable)
    firings = to_firings([mine], [np.ones(len(mine))])
    label_latents(
        table, reader(firings), firings.n_firings, torch.randn(1, 8), STRINGS, None, tmp_path, SilentReporter(), seed=0
    )
    (row,) = pq.read_table(tmp_path / "features.parquet").to_pylist()
    for clause in json.loads(row["rule"])["any"] if row["rule"] else []:
        families = {f.name: f for f in build_families(table, STRINGS)}
        for atom in clause["all"]:
            names = families[atom["view"]].names
            for value in atom.get("in", []):
                here = np.flatnonzero(families[atom["view"]].code[mine] == list(names).index(value))
                assert len(np.unique(table.document[mine[here]])) >= 3


def test_code_length_is_that_of_the_formula():
    n, a = np.array([10.0, 10.0, 8.0, 0.0]), np.array([0.0, 10.0, 2.0, 0.0])
    expected = [0, 0, 8 * -(0.25 * np.log2(0.25) + 0.75 * np.log2(0.75)), 0]
    assert np.allclose(_code_length(n, a), expected, atol=1e-8)


def test_blocks_come_back_in_order_whatever_the_processes():
    blocks = [(i, i + 1) for i in range(9)]
    for n_workers in (1, 2, 3):
        assert list(run_blocks(lambda lo, hi: lo * 10 + hi, iter(blocks), n_workers=n_workers)) == [
            lo * 10 + hi for lo, hi in blocks
        ]


def test_an_error_in_a_block_is_raised():
    def broken(i):
        raise ValueError(f"block {i} is broken")

    for n_workers in (1, 2):
        with pytest.raises(ValueError, match="is broken"):
            list(run_blocks(broken, [(1,), (2,)], n_workers=n_workers))
