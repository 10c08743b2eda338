import numpy as np
import pytest
import torch
from dictionaries import random_dictionary

from pipelines.latents import compute_latents, dictionary_digest
from pipelines.progress import SilentReporter
from pipelines.rundir import RunDir
from storage import LatentWriter, SpecMismatchError

HOOK = "model.layers.1"
MULTIPLE = 1.2


class Counting(SilentReporter):
    """Remembers how much of a stage was done before, and how much was done now."""

    def stage(self, name, *, total, unit, done=0):
        self.total, self.before, self.advanced = total, done, 0
        return super().stage(name, total=total, unit=unit, done=done)


@pytest.fixture(scope="module")
def dictionary():
    return random_dictionary(HOOK)


def compute(store, dictionary, path, ui=None, digest="d1"):
    return compute_latents(
        store, dictionary, RunDir(path), "main", ui or SilentReporter(), sink_multiple=MULTIPLE, digest=digest
    )


def dense(latents):
    block = latents.block(0, latents.d_sae)
    values = np.zeros((latents.n_rows, latents.d_sae), np.float32)
    values[block.row, np.repeat(np.arange(latents.d_sae), np.diff(block.indptr))] = block.value
    return values


@pytest.mark.parametrize("block_tokens", [1, 10 * 32, 4096])  # a context, parts of a shard, a shard at once
def test_latents_equal_a_dense_encoding_with_sinks_left_out(store, dictionary, tmp_path, monkeypatch, block_tokens):
    monkeypatch.setattr("pipelines.latents.BLOCK_TOKENS", block_tokens)
    latents = compute(store, dictionary, tmp_path)
    n = store.spec.n_contexts
    x = store.activations(HOOK, 0, n).flatten(0, 1).float()
    sinks = store.sink_mask(HOOK, 0, n, MULTIPLE).ravel()
    expected = dictionary.encode(x).numpy()
    assert sinks.sum() > (store.position == 0).sum()
    expected[sinks] = 0
    np.testing.assert_allclose(dense(latents), expected, rtol=1e-4, atol=1e-5)
    assert latents.counts().tolist() == (expected > 0).sum(0).tolist()
    assert latents.n_rows == store.spec.n_tokens
    assert latents.meta["fingerprint"] == store.spec.fingerprint
    assert latents.meta["sink_multiple"] == MULTIPLE


def test_latents_continue_after_an_interruption_and_redo_nothing(store, dictionary, tmp_path, monkeypatch):
    write = LatentWriter.write_shard
    written = []

    def stops_at_the_fourth(self, shard, *arrays):
        if len(written) == 3:
            raise KeyboardInterrupt
        written.append(shard)
        return write(self, shard, *arrays)

    monkeypatch.setattr(LatentWriter, "write_shard", stops_at_the_fourth)
    with pytest.raises(KeyboardInterrupt):
        compute(store, dictionary, tmp_path / "a")

    def counts(self, shard, *arrays):
        written.append(shard)
        return write(self, shard, *arrays)

    monkeypatch.setattr(LatentWriter, "write_shard", counts)
    ui = Counting()
    resumed = compute(store, dictionary, tmp_path / "a", ui)
    assert sorted(written) == list(range(store.spec.n_shards))
    assert ui.before == 3 * store.spec.contexts_per_shard * store.spec.context_length
    assert ui.total == store.spec.n_tokens
    written.clear()
    again = compute(store, dictionary, tmp_path / "a")
    assert not written
    straight = compute(store, dictionary, tmp_path / "b")
    np.testing.assert_array_equal(dense(resumed), dense(straight))
    np.testing.assert_array_equal(dense(again), dense(straight))


def test_latents_of_another_dictionary_are_refused(store, dictionary, tmp_path):
    compute(store, dictionary, tmp_path)
    with pytest.raises(SpecMismatchError, match=r"They differ in dictionary: store 'd1', asked for 'd2'"):
        compute(store, dictionary, tmp_path, digest="d2")


def test_dictionary_digest_follows_the_weights(dictionary, tmp_path):
    dictionary.save(tmp_path / "a", provenance={}, metrics={"fvu": 0.1})
    dictionary.save(tmp_path / "b", provenance={"x": 1}, metrics={})
    random_dictionary(HOOK, seed=1).save(tmp_path / "c", provenance={}, metrics={})
    a, b, c = (dictionary_digest(tmp_path / name) for name in "abc")
    assert a == b != c


def test_silent_tokens_leave_an_empty_store(store, tmp_path):
    dictionary = random_dictionary(HOOK)
    with torch.no_grad():
        dictionary.sae.b_enc.fill_(-1e6)
    latents = compute(store, dictionary, tmp_path)
    assert latents.n_entries == 0
    assert not latents.counts().any()
