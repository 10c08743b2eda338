import json
import os

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from label_corpus import fire_on, reader, spell, to_firings, zipf_table

from pipelines.labels.labelling import deal_to_others, label_latents
from pipelines.labels.settings import LabelSettings
from pipelines.labels.stage import label_dictionary, read_token_table
from pipelines.labels.tables import EXAMPLES, FEATURES, ParquetFile
from pipelines.progress import SilentReporter
from sae import Dictionary, TopKConfig, build
from storage import ActivationStore, ActivationWriter, HookSpec, LatentStore, LatentWriter, StoreSpec

VOCAB = 2000
STRINGS = spell(VOCAB)


@pytest.fixture(scope="module")
def table():
    return zipf_table(np.random.default_rng(0))


def run(table, columns, out_dir, *, unembedding=None, seed=0, **options):
    firings = to_firings(*zip(*columns, strict=True))
    W_dec = torch.randn(firings.n_latents, 8, generator=torch.Generator().manual_seed(0))
    config = LabelSettings(**options)
    summary = label_latents(
        table,
        reader(firings),
        firings.n_firings,
        W_dec,
        STRINGS,
        unembedding,
        out_dir,
        SilentReporter(),
        seed=seed,
        config=config,
    )
    return summary, pq.read_table(out_dir / "features.parquet").to_pylist()


def named(row):
    """What a rule of one condition names."""
    ((atom,),) = (clause["all"] for clause in json.loads(row["rule"])["any"])
    return {value.strip().casefold() for value in atom["in"]}


def noise_column(rng, table, n):
    return rng.choice(table.n_tokens, n, replace=False), rng.gamma(1, 1, n) + 0.01


@pytest.fixture(scope="module")
def planted(table, tmp_path_factory):
    """60 latents with a planted rule (even) or none (odd), one silent, one that fires in train documents only."""
    rng = np.random.default_rng(1)
    columns, truth = [], []
    for i in range(60):
        if i % 2:
            columns.append(noise_column(rng, table, 400))
            truth.append(None)
            continue
        tokens = rng.choice(np.arange(10, 120), 3, replace=False)
        holds = np.isin(table.token, tokens)
        if i % 4 == 2:
            holds = np.concatenate([[False], holds[:-1]]) & (table.position > 0)
        columns.append(fire_on(rng, holds, table))
        truth.append(("previous" if i % 4 == 2 else "token", {STRINGS[t].strip().casefold() for t in tokens}))
    columns.append((np.zeros(0, np.int64), np.zeros(0)))
    columns.append(fire_on(rng, (table.token == 30) & (np.arange(table.n_tokens) < table.n_train), table, noise=0))
    out_dir = tmp_path_factory.mktemp("planted")
    return *run(table, columns, out_dir), truth, columns, out_dir


def test_labels_recover_planted_rules_and_claim_nothing_else(planted):
    _, rows, truth, _, _ = planted
    for row, rule in zip(rows, truth, strict=False):
        assert row["labelled"] == (rule is not None)
        if rule is not None:
            assert row["label_kind"] == rule[0]
            assert named(row) == rule[1]
            assert row["detection_low"] > 0.6
            assert row["detection_tpr_strong"] > 0.95
            assert row["detection_mismatch_p"] < 0.05


def test_summary_counts_what_the_table_holds(planted):
    summary, rows, _, _, _ = planted
    assert summary.n_latents == len(rows) == 62
    assert summary.n_live == 61
    assert summary.n_labelled == sum(row["labelled"] for row in rows) == 30
    assert summary.n_candidates == sum(row["candidate"] is not None for row in rows)
    assert summary.share_labelled == 30 / 61
    scores = [r["detection_balanced_accuracy"] for r in rows if r["detection_balanced_accuracy"] is not None]
    assert summary.mean_balanced_accuracy == pytest.approx(np.mean(scores))


def test_rules_dealt_to_wrong_latents_do_not_pass(planted):
    summary, _, _, _, _ = planted
    assert summary.null_share <= 1 / 61
    assert summary.mean_null_balanced_accuracy == pytest.approx(0.5, abs=0.02)
    assert summary.mean_balanced_accuracy > 0.85


def test_unlabelled_latents_say_why(planted):
    _, rows, _, _, _ = planted
    silent, unseen = rows[60], rows[61]
    assert (silent["label_kind"], silent["label"], silent["candidate"], silent["density"]) == ("silent", None, None, 0)
    assert unseen["label_kind"] == "unlabelled"
    assert unseen["label"] is None
    assert unseen["candidate"] is not None
    assert unseen["detection_balanced_accuracy"] is None
    assert (unseen["n_heldout_active"], unseen["detection_mismatch_p"]) == (0, None)


def test_statistics_are_over_usable_tokens(planted, table):
    _, rows, _, columns, _ = planted
    for row, (fired, value) in list(zip(rows, columns, strict=True))[:10]:
        usable = table.usable[fired]
        train = usable & (fired < table.n_train)
        assert row["n_train_active"] == train.sum()
        assert row["n_heldout_active"] == (usable & ~train).sum()
        assert row["density"] == pytest.approx(usable.sum() / table.usable.sum())
        assert row["max_activation"] == pytest.approx(value[usable].max(), rel=1e-6)
        mass = np.bincount(table.token[fired[train]], weights=value[train], minlength=VOCAB)
        assert row["top_tokens"][0].strip().casefold() == STRINGS[int(mass.argmax())].strip().casefold()


def test_examples_are_train_windows_that_read_as_the_text(planted, table):
    _, rows, _, _, out_dir = planted
    examples = pq.read_table(out_dir / "examples.parquet").to_pylist()
    assert {e["latent"] for e in examples} == {row["latent"] for row in rows if row["n_train_active"]}
    for example in examples[::7]:
        row = example["context"] * table.context_length + example["offset"]
        assert row < table.n_train
        assert table.usable[row]
        assert example["document"] == table.document[row]
        assert example["token_ids"][example["peak"]] == table.token[row]
        assert example["values"][example["peak"]] == example["max_value"]
        assert example["text"] == "".join(STRINGS[token] for token in example["token_ids"])
        assert len(example["values"]) == len(example["token_ids"]) <= 33


def test_nothing_to_find_gives_no_labels(table, tmp_path):
    rng = np.random.default_rng(5)
    columns = [noise_column(rng, table, int(n)) for n in rng.integers(1, 3000, 300)]
    summary, rows = run(table, columns, tmp_path)
    assert summary.n_labelled == 0
    assert summary.null_share == 0
    assert (summary.n_candidates, summary.mean_balanced_accuracy, summary.mean_precision) == (0, None, None)
    assert not any(row["label"] for row in rows)
    assert summary.n_live == 300


def test_shuffling_activations_between_tokens_removes_the_labels(planted, table, tmp_path):
    _, _, _, columns, _ = planted
    rng = np.random.default_rng(7)
    shuffled = [(rng.permutation(table.n_tokens)[: len(row)], value) for row, value in columns]
    assert run(table, shuffled, tmp_path)[0].n_labelled == 0


def test_results_do_not_depend_on_the_blocks(planted, table, tmp_path):
    _, rows, _, columns, _ = planted
    _, again = run(table, columns, tmp_path, max_firings_per_block=1500)
    assert again == rows
    for name in ("examples.parquet", "counter_examples.parquet"):
        assert pq.read_table(tmp_path / name).equals(pq.read_table(planted[4] / name)), name


def test_same_seed_same_bytes(planted, table, tmp_path):
    _, _, _, columns, out_dir = planted
    run(table, columns, tmp_path)
    for name in ("features.parquet", "examples.parquet"):
        assert (tmp_path / name).read_bytes() == (out_dir / name).read_bytes()


def test_lens_words_enter_the_table(table, tmp_path):
    rng = np.random.default_rng(0)
    unembedding = (torch.ones(8), torch.randn(8, VOCAB + 64, generator=torch.Generator().manual_seed(1)))
    _, rows = run(table, [noise_column(rng, table, 50)], tmp_path, unembedding=unembedding, n_words=3)
    W_dec = torch.randn(1, 8, generator=torch.Generator().manual_seed(0))
    order = (W_dec @ unembedding[1]).argsort(1)[0].tolist()
    spelled = [*STRINGS, *(f"<unused {VOCAB + i}>" for i in range(64))]
    assert rows[0]["promotes"] == [spelled[t] for t in order[::-1][:3]]
    assert rows[0]["suppresses"] == [spelled[t] for t in order[:3]]


def test_dealing_never_gives_a_latent_its_own_rule():
    has_rule = np.array([True, False, True, True, False, True])
    for seed in range(50):
        dealt = deal_to_others(has_rule, np.random.default_rng(seed))
        assert sorted(dealt[has_rule].tolist()) == [0, 2, 3, 5]
        assert (dealt != np.arange(6)).all()
        assert (dealt[~has_rule] == -1).all()
    assert deal_to_others(np.array([True]), np.random.default_rng(0)).tolist() == [-1]


def test_tables_have_the_published_schema(planted):
    out_dir = planted[4]
    assert pq.read_schema(out_dir / "features.parquet").equals(FEATURES, check_metadata=True)
    assert pq.read_schema(out_dir / "examples.parquet").equals(EXAMPLES, check_metadata=True)
    assert pq.read_schema(out_dir / "features.parquet").metadata[b"schema_version"] == b"2"


def test_an_error_leaves_no_file_behind(tmp_path):
    with pytest.raises(RuntimeError, match="interrupted"), ParquetFile(tmp_path / "features.parquet", FEATURES):
        raise RuntimeError("interrupted")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("n_top", 0, "n_top must be at least 1, got 0"),
        ("window", -1, "window must be at least 0, got -1"),
        ("min_detection", 1.0, r"min_detection must lie in \[0.5, 1\), got 1.0"),
    ],
)
def test_settings_refuse_impossible_values(field, value, message):
    with pytest.raises(ValueError, match=message):
        LabelSettings(**{field: value})


# -- on real storage ---------------------------------------------------------------------------------------------------


@pytest.fixture
def stored(tmp_path):
    """A store of 48 contexts whose activations are token directions, and its latents under an SAE that reads them."""
    rng = np.random.default_rng(0)
    vocab, d_in = 12, 16
    table = zipf_table(rng, n_contexts=48, context_length=64, vocab=vocab, document_length=50, exponent=0.3)
    spec = StoreSpec(
        n_contexts=48,
        context_length=64,
        contexts_per_shard=20,
        n_train_contexts=38,
        hooks=(HookSpec(name="model.layers.1", d_in=d_in, dtype="float32"),),
    )
    shape = (48, 64)
    writer = ActivationWriter.create(
        tmp_path / "store",
        spec,
        tokens=table.token.reshape(shape),
        document=table.document.reshape(shape),
        position=table.position.reshape(shape),
    )
    directions = np.linalg.qr(rng.normal(size=(d_in, d_in)))[0].astype(np.float32)
    x = directions[table.token] * (1 + 0.1 * rng.random((table.n_tokens, 1), np.float32))
    x[100] *= 50  # an attention sink
    for shard in writer.missing():
        start, stop = spec.shard_range(shard)
        writer.write_shard(shard, {"model.layers.1": x.reshape(*shape, d_in)[start:stop]})
    writer.seal()
    sae = build(TopKConfig(d_in=d_in, d_sae=vocab, k=1), seed=0)
    with torch.no_grad():
        sae.W_dec.copy_(torch.from_numpy(directions[:vocab]))
        sae.W_enc.copy_(sae.W_dec.T)
        sae.b_enc.zero_()
        sae.b_dec.zero_()
    dictionary = Dictionary(sae, hook_name="model.layers.1")
    store = ActivationStore.open(tmp_path / "store")
    return store, write_latents(tmp_path / "latents", spec, dictionary, x), dictionary


def write_latents(path, spec, dictionary, x, d_sae=None):
    meta = {"d_sae": d_sae or dictionary.d_sae, "n_shards": spec.n_shards, "n_rows": spec.n_tokens, "fingerprint": "f"}
    writer = LatentWriter.create(path, meta)
    for shard in writer.missing():
        start, stop = (64 * c for c in spec.shard_range(shard))
        sparse = dictionary.encode_sparse(torch.from_numpy(x[start:stop]))
        writer.write_shard(shard, sparse.row.numpy() + start, sparse.latent.numpy(), sparse.value.numpy())
    writer.seal()
    return LatentStore.open(path)


def test_stage_labels_a_stored_dictionary(stored, tmp_path):
    store, latents, dictionary = stored
    strings = [f" word{c}" for c in "abcdefghijkl"]
    unembedding = (torch.ones(16), torch.randn(16, 12))
    out = tmp_path / "out"
    # 12 latents are few for a 5 % mismatch level: 11 others allow no p below 1/12, so nothing may be labelled ...
    summary = label_dictionary(store, latents, dictionary, strings, unembedding, out, SilentReporter(), seed=0)
    rows = pq.read_table(out / "features.parquet").to_pylist()
    assert summary.n_labelled == 0
    # ... although every rule is found and perfect on held-out documents.
    for i, row in enumerate(rows):
        assert row["candidate"] == f"' word{'abcdefghijkl'[i]}'"
        assert row["detection_balanced_accuracy"] == 1.0
        assert row["detection_mismatch_p"] == pytest.approx(1 / 12)


def test_stage_leaves_sinks_out(stored):
    store, _, _ = stored
    table = read_token_table(store, "model.layers.1", contexts_at_once=7)
    assert not table.usable[100]
    assert not table.usable[table.position == 0].any()
    assert table.usable.sum() == (table.position > 0).sum() - (table.position[100] > 0)
    assert table.n_train == 38 * 64
    assert np.array_equal(table.token.reshape(48, 64), store.tokens)
    assert read_token_table(store, "model.layers.1", 100.0).usable[100] == (table.position[100] > 0)


def test_stage_refuses_latents_of_another_dictionary(stored, tmp_path):
    store, latents, _ = stored
    other = Dictionary(build(TopKConfig(d_in=16, d_sae=24, k=1), seed=0), hook_name="model.layers.1")
    with pytest.raises(ValueError, match="12 latents, the store has 3072 tokens and the dictionary 24 latents"):
        label_dictionary(store, latents, other, [""] * 12, None, tmp_path / "out", SilentReporter(), seed=0)
    assert not (tmp_path / "out").exists()


def test_stage_refuses_a_dictionary_without_a_hook(stored, tmp_path):
    store, latents, dictionary = stored
    with pytest.raises(ValueError, match=r"hook of the store: model\.layers\.1"):
        label_dictionary(
            store, latents, Dictionary(dictionary.sae), [""] * 12, None, tmp_path / "out", SilentReporter(), seed=0
        )
