import numpy as np
import pytest
import torch
from rerun_model import random_dictionary, tiny_lm

from pipelines.labels.logit_lens import logit_lens
from pipelines.labels.output_test import (
    Amplifier,
    draw_pool,
    matched_controls,
    measure_rises,
    score_rises,
)
from pipelines.progress import SilentReporter
from sae import replace_activations
from sae.edits import Exclude

HOOK, D_SAE, N_TESTED = "model.layers.1", 80, 8


@pytest.fixture(scope="module")
def lm(tmp_path_factory):
    return tiny_lm(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def dictionary(lm):
    """The first rows promise one token each: they are directions of the unembedding."""
    dictionary = random_dictionary(HOOK, D_SAE)
    weight, W_U = lm.unembedding()
    with torch.no_grad():
        for i in range(N_TESTED):
            dictionary.sae.W_dec[i] = torch.nn.functional.normalize(W_U[:, 300 + i] / weight, dim=0)
    return dictionary


def texts(n=3, length=10):
    return np.random.default_rng(0).integers(2, 400, (n, length))


def rises_of(lm, dictionary, promised, folder, key="k", level=20.0, pool=None):
    pool = np.arange(D_SAE) if pool is None else pool
    amplifier = Amplifier(lm, dictionary, texts(), promised, Exclude(first=True))
    return measure_rises(amplifier, pool, np.full(len(pool), level, np.float32), folder, key, SilentReporter())


def controls_of_all(n_tested):
    return [np.delete(np.arange(D_SAE), i) for i in range(n_tested)]


def test_a_latent_that_writes_its_promise_beats_its_controls(lm, dictionary, tmp_path):
    promised = np.arange(300, 300 + N_TESTED)[:, None]
    scores = score_rises(rises_of(lm, dictionary, promised, tmp_path / "parts"), controls_of_all(N_TESTED))
    assert (scores.p <= 2 / D_SAE).all()
    assert scores.passes.all()
    assert (scores.low > scores.controls).all()
    assert (scores.low <= scores.rise).all()
    assert (scores.rise <= scores.high).all()
    assert not scores.passes_dealt.any()


def test_random_promises_do_not_pass(lm, dictionary, tmp_path):
    promised = np.random.default_rng(1).integers(2, 400, (D_SAE, 3))
    scores = score_rises(rises_of(lm, dictionary, promised, tmp_path / "parts"), controls_of_all(D_SAE))
    assert 0.4 < scores.p.mean() < 0.6
    assert (scores.p <= 0.05).mean() <= 0.12
    assert not scores.passes.any()


def test_rises_are_those_of_a_plain_forward_pass_with_the_direction_added(lm, dictionary, tmp_path):
    promised = np.array([[300, 7], [11, 12]])
    rises = rises_of(lm, dictionary, promised, tmp_path / "parts", pool=np.array([5, 0, 33]), level=6.0)
    ids = torch.from_numpy(texts())
    with torch.no_grad():
        clean = lm.model(input_ids=ids, use_cache=False).logits.log_softmax(-1)
        for n, latent in enumerate((5, 0, 33)):

            def add(x, latent=latent):
                f = dictionary.encode(x)[..., latent]
                new = x + (6.0 - f)[..., None] * dictionary.W_dec[latent]
                return torch.cat([x[:, :1], new[:, 1:]], dim=1)

            with replace_activations(lm.model, HOOK, add):
                changed = lm.model(input_ids=ids, use_cache=False).logits.log_softmax(-1)
            rise = (changed - clean)[:, 1:]
            for i, tokens in enumerate(promised):
                np.testing.assert_allclose(rises[n, :, i], rise[..., tokens].mean((1, 2)), atol=2e-5)


def test_an_interrupted_test_goes_on_where_it_stopped(lm, dictionary, tmp_path):
    promised = np.array([[300]])
    whole = rises_of(lm, dictionary, promised, tmp_path / "whole")

    class Interrupted(Amplifier):
        def rise(self, latent, level):
            if latent == 40:
                raise KeyboardInterrupt
            return super().rise(latent, level)

    class Counting(Amplifier):
        n = 0

        def rise(self, latent, level):
            Counting.n += 1
            return super().rise(latent, level)

    def measure(kind, key):
        amplifier = kind(lm, dictionary, texts(), promised, Exclude(first=True))
        level = np.full(D_SAE, 20.0, np.float32)
        return measure_rises(amplifier, np.arange(D_SAE), level, tmp_path / "parts", key, SilentReporter())

    with pytest.raises(KeyboardInterrupt):
        measure(Interrupted, "k")
    assert np.array_equal(measure(Counting, "k"), whole)
    assert Counting.n == D_SAE - 32
    measure(Counting, "another key")
    assert Counting.n == 2 * D_SAE - 32


def test_controls_are_the_latents_most_like_the_tested_one():
    density = np.array([1e-3, 1e-2, 1.1e-3, 1e-1, 0.9e-3, 1e-3])
    norm = np.array([1.0, 1.0, 1.0, 1.0, 1.0, 9.0])
    (chosen,) = matched_controls(np.array([0]), np.arange(6), density, norm, 2)
    assert sorted(chosen.tolist()) == [2, 4]


def test_the_pool_begins_with_the_tested_latents_and_repeats_none():
    pool = draw_pool(np.array([7, 3]), np.arange(50), 5, np.random.default_rng(0))
    assert pool[:2].tolist() == [7, 3]
    assert len(np.unique(pool)) == len(pool) == 2 + 15


def test_the_lens_names_the_planted_promise(lm, dictionary):
    lens = logit_lens(dictionary.W_dec[:1], *lm.unembedding(), n_top=1)
    assert lens.promoted.tolist() == [[300]]
