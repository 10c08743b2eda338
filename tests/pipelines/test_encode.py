import numpy as np
import pytest
import torch
from dictionaries import random_dictionary

from pipelines.dictionaries import stored_input
from pipelines.documents import DOCUMENTS_FILE, Documents
from pipelines.encode import RandomFeatures, Reader, encode_passages, passages_of, pool_documents
from pipelines.progress import SilentReporter

HOOK = "model.layers.1"
TEXTS = [
    "the king and the rook near the old castle",
    "river",
    "",
    "iron copper zinc ore smelter alloy furnace mine steel nickel from some new mine near many rivers",
    "a heron was in the nest",
    "k",
]


@pytest.fixture(scope="module")
def dictionary():
    return random_dictionary(HOOK)


def encode_texts(lm, dictionary, texts, *, max_tokens, sink_norm=None, random=None, **options):
    (pooled,) = encode_passages(
        lm, [Reader(dictionary, sink_norm, random)], passages_of(lm, texts, max_tokens=max_tokens), **options
    )
    return pooled


def slow_pool(lm, dictionary, text, max_tokens, sink_norm):
    """One text, one token at a time."""
    ids = lm.tokenizer(text, add_special_tokens=False)["input_ids"][:max_tokens]
    best, total, n = np.zeros(dictionary.d_sae, np.float32), np.zeros(dictionary.d_in), 0
    if not ids:
        return best, total, n
    x = lm.capture(torch.tensor([ids]), torch.arange(len(ids))[None], [HOOK])[HOOK][0]
    for i in range(1, len(ids)):
        if sink_norm is not None and float(x[i].norm()) >= sink_norm:
            continue
        best = np.maximum(best, dictionary.encode(x[i]).numpy())
        total += x[i].numpy()
        n += 1
    return best, total / max(n, 1), n


@pytest.mark.parametrize("max_tokens", [4, 100])
@pytest.mark.parametrize("sinks", [False, True])
def test_pooling_equals_a_slow_loop(lm, dictionary, max_tokens, sinks):
    ids = lm.tokenizer(TEXTS[3], add_special_tokens=False)["input_ids"]
    norms = lm.capture(torch.tensor([ids]), torch.arange(len(ids))[None], [HOOK])[HOOK][0, 1:].norm(dim=-1)
    sink_norm = float(norms.quantile(0.55)) if sinks else None  # between two tokens' norms
    pooled = encode_texts(lm, dictionary, TEXTS, max_tokens=max_tokens, sink_norm=sink_norm)
    for i, text in enumerate(TEXTS):
        best, mean, n = slow_pool(lm, dictionary, text, max_tokens, sink_norm)
        assert pooled.n_tokens[i] == n
        np.testing.assert_allclose(pooled.max_latents[i], best, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(pooled.mean_activations[i], mean, rtol=1e-4, atol=1e-5)
    if sinks and max_tokens == 100:
        assert 0 < pooled.n_tokens[3] < len(ids) - 1


def test_texts_without_a_counted_token_are_zero(lm, dictionary):
    pooled = encode_texts(lm, dictionary, ["", "k"], max_tokens=10, sink_norm=None)
    assert pooled.n_tokens.tolist() == [0, 0]  # nothing, and a first position
    assert not pooled.max_latents.any()
    assert not pooled.mean_activations.any()


def test_sinks_do_not_count(lm, dictionary):
    assert encode_texts(lm, dictionary, TEXTS, max_tokens=100, sink_norm=0.0).n_tokens.tolist() == [0] * len(TEXTS)


@pytest.mark.parametrize("batch_tokens", [1, 16, 2048])
def test_batches_equal_single_texts(lm, dictionary, batch_tokens):
    together = encode_texts(lm, dictionary, TEXTS, max_tokens=100, sink_norm=None, batch_tokens=batch_tokens)
    for i, text in enumerate(TEXTS):
        alone = encode_texts(lm, dictionary, [text], max_tokens=100, sink_norm=None)
        np.testing.assert_allclose(together.max_latents[i], alone.max_latents[0], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(together.mean_activations[i], alone.mean_activations[0], rtol=1e-4, atol=1e-5)
        assert together.n_tokens[i] == alone.n_tokens[0]


def test_cut_texts_are_counted(lm, dictionary):
    lengths = [len(lm.tokenizer(text, add_special_tokens=False)["input_ids"]) for text in TEXTS]
    pooled = encode_texts(lm, dictionary, TEXTS, max_tokens=6, sink_norm=None)
    assert pooled.n_cut == sum(n > 6 for n in lengths) > 0
    assert pooled.n_tokens.max() == 5
    assert encode_texts(lm, dictionary, TEXTS, max_tokens=max(lengths), sink_norm=None).n_cut == 0


def test_progress_counts_every_text(lm, dictionary):
    class Bar:
        done = 0.0

        def advance(self, n):
            self.done += n

    bar = Bar()
    encode_texts(lm, dictionary, TEXTS, max_tokens=100, sink_norm=None, bar=bar, batch_tokens=16)
    assert bar.done == len(TEXTS)


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_pooled_documents_equal_a_slow_loop_over_the_store(store, split):
    dictionary, multiple = random_dictionary(HOOK), 1.2
    with SilentReporter().stage("pool", total=1, unit="contexts") as bar:
        rows, pooled = pool_documents(store, Reader(dictionary), split=split, sink_multiple=multiple, bar=bar)
    threshold = store.statistics(HOOK).sink_threshold(multiple)
    start, stop = store.spec.split_range(split)
    best, total, n = {}, {}, {}
    for context in range(start, stop):
        x = store.activations(HOOK, context, context + 1)[0].float()
        norms = store.norms(HOOK, context, context + 1)[0]
        found = store.contexts(context, context + 1)
        latents = dictionary.encode(x).numpy()
        for token in range(store.spec.context_length):
            if found.position[0, token] == 0 or norms[token] >= threshold:
                continue
            row = int(found.document[0, token])
            best[row] = np.maximum(best.get(row, 0), latents[token])
            total[row] = total.get(row, 0) + x[token].numpy().astype(np.float64)
            n[row] = n.get(row, 0) + 1
    assert rows.tolist() == sorted(best)
    assert pooled.n_tokens.tolist() == [n[row] for row in sorted(best)]
    np.testing.assert_allclose(pooled.max_latents, [best[row] for row in sorted(best)], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(
        pooled.mean_activations, [total[row] / n[row] for row in sorted(best)], rtol=1e-3, atol=1e-4
    )
    documents = Documents.from_parquet(store.sidecar(DOCUMENTS_FILE))
    assert {documents.split[row] for row in rows} == {split}
    assert sum(n.values()) < (stop - start) * (store.spec.context_length - 1)  # some were sinks


def test_means_of_latents_reconstruction_and_error_equal_a_slow_loop(lm, dictionary):
    pooled = encode_texts(lm, dictionary, TEXTS, max_tokens=100)
    np.testing.assert_allclose(
        pooled.mean_reconstruction + pooled.mean_error, pooled.mean_activations, rtol=1e-4, atol=1e-5
    )
    ids = lm.tokenizer(TEXTS[0], add_special_tokens=False)["input_ids"]
    x = lm.capture(torch.tensor([ids]), torch.arange(len(ids))[None], [HOOK])[HOOK][0, 1:]
    latents = dictionary.encode(x)
    np.testing.assert_allclose(pooled.mean_latents[0], latents.mean(0), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(pooled.mean_reconstruction[0], dictionary.decode(latents).mean(0), rtol=1e-4, atol=1e-5)


def test_one_pass_serves_readers_of_different_hooks_as_single_passes_do(lm, dictionary):
    readers = [Reader(dictionary, 9.0), Reader(random_dictionary("model.layers.0", d_sae=40), None)]
    passages = passages_of(lm, TEXTS, max_tokens=100)
    together = encode_passages(lm, readers, passages)
    for reader, pooled in zip(readers, together, strict=True):
        (alone,) = encode_passages(lm, [reader], passages)
        np.testing.assert_allclose(pooled.max_latents, alone.max_latents, rtol=1e-4, atol=1e-5)
        assert pooled.n_tokens.tolist() == alone.n_tokens.tolist()


def test_only_counted_tokens_are_pooled(lm, dictionary):
    (passage,) = passages_of(lm, [TEXTS[0]], max_tokens=100)
    last = passage._replace(counted=[False] * (len(passage.ids) - 1) + [True])
    (pooled,) = encode_passages(lm, [Reader(dictionary)], [last])
    x = lm.capture(torch.tensor([last.ids]), torch.arange(len(last.ids))[None], [HOOK])[HOOK][0, -1]
    assert pooled.n_tokens.tolist() == [1]
    np.testing.assert_allclose(pooled.mean_activations[0], x, rtol=1e-4, atol=1e-5)


def test_random_features_fire_as_often_as_the_latents_and_are_reproducible(lm, store):
    dictionary = random_dictionary(HOOK)  # k = 8
    features = RandomFeatures.like(dictionary, store, seed=3)
    assert features.k == 8
    x = stored_input(store, dictionary, 0, 2).flatten(0, 1).float()
    active = features.encode(x)
    assert active.shape == (len(x), dictionary.d_sae)
    assert active.count_nonzero(dim=1).float().mean() == pytest.approx(8, abs=0.5)
    assert torch.equal(active, RandomFeatures.like(dictionary, store, seed=3).encode(x))
    pooled = encode_texts(lm, dictionary, TEXTS, max_tokens=100, random=features)
    assert pooled.max_random.shape == pooled.max_latents.shape
    assert pooled.max_random[0].any()


def test_blocks_of_tokens_do_not_change_the_pools(lm, dictionary, monkeypatch):
    whole = encode_texts(lm, dictionary, TEXTS, max_tokens=100)
    monkeypatch.setattr("pipelines.encode._BLOCK", 3 * dictionary.d_sae)
    cut = encode_texts(lm, dictionary, TEXTS, max_tokens=100)
    for name in ("max_latents", "mean_latents", "mean_activations", "mean_reconstruction", "mean_error"):
        np.testing.assert_allclose(getattr(whole, name), getattr(cut, name), rtol=1e-4, atol=1e-5)
    assert whole.n_tokens.tolist() == cut.n_tokens.tolist()
