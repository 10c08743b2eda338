"""Counterfactual edits against latents whose causes are known: planted in a tiny model's own activations."""

import json

import numpy as np
import pytest
import torch
from label_corpus import zipf_table
from rerun_model import random_dictionary, tiny_lm

from pipelines.labels.counterfactual import choose_firings, run_edits, shortened
from pipelines.labels.in_model_settings import EditsConfig
from pipelines.labels.on_texts import LabelsOnTexts
from pipelines.labels.rerun import Rerun, heldout_texts, piece_up_to
from pipelines.labels.swaps import Corpus

HOOK, VOCAB = "model.layers.0", 300
NEVER = 0
WORDS = tuple(range(20, 26))


class Fires:
    """A `Rerun` whose activations are a function of the text: the truth behind a latent."""

    def __init__(self, rules):
        self.rules, self.n_texts = rules, 0

    def last(self, texts, latents):
        self.n_texts += len(texts)
        return np.array([float(self.rules[int(i)](t)) for i, t in zip(latents, texts, strict=True)], np.float32)


def reads_token(text):
    return 3.0 * (text[-1] in WORDS)


def reads_one_word(text):
    return 3.0 * (text[-1] == WORDS[0])


def reads_pair(text):
    return 3.0 * (len(text) > 1 and text[-2] in WORDS)


def reads_far(text):
    """A token of the set, with any of them within the eight tokens before."""
    return 3.0 * (text[-1] in WORDS and len(text) > 8)


RULES = (reads_token, reads_one_word, reads_pair, reads_far)
STRINGS = [f" w{chr(97 + i % 26)}{chr(97 + i // 26)}" for i in range(VOCAB)]
LABELS = {
    0: ("token", [STRINGS[w] for w in WORDS]),
    1: ("token", [STRINGS[w] for w in WORDS]),  # claims a class, but one word does it
    2: ("previous", [STRINGS[w] for w in WORDS]),
    3: ("token", [STRINGS[w] for w in WORDS]),
}


@pytest.fixture(scope="module")
def corpus():
    table = zipf_table(np.random.default_rng(0), n_contexts=300, context_length=64, vocab=VOCAB, document_length=40)
    return Corpus.of(table, STRINGS, anchor=NEVER)


def rows_of(labels):
    rules = {i: {"any": [{"all": [{"view": f, "in": v}], "score": 1.0}]} for i, (f, v) in labels.items()}
    return {i: {"labelled": True, "rule": json.dumps(rule)} for i, rule in rules.items()}


@pytest.fixture(scope="module")
def scores(corpus):
    firings = [firing for latent in range(len(RULES)) for firing in firings_of(corpus, latent)]
    settings = EditsConfig(max_context=32)
    return run_edits(firings, corpus, Fires(RULES), LabelsOnTexts(rows_of(LABELS), STRINGS), settings, seed=0)


def firings_of(corpus, latent, n=12):
    table = corpus.table
    held = table.rows("heldout")
    fires = np.array([RULES[latent](piece_up_to(table, row)) > 0 for row in held.tolist()])
    return choose_firings(latent, held[fires], np.full(fires.sum(), 3.0, np.float32), table, n, seed=0)


def test_a_latent_of_a_token_needs_no_context_and_follows_its_class(scores):
    row = scores[0].row()
    assert (row["edit_kind"], row["edit_token_share"], row["edit_context"]) == ("token", 1.0, 0.0)
    assert (row["edit_trigger"], row["edit_same_on"], row["edit_other_off"]) == (0, 1.0, 1.0)
    assert row["edit_same_n"] == row["edit_other_n"] == row["edit_documents"] == 12
    assert row["edit_token_low"] > 0.5
    assert row["edit_other_low"] > 0.6


def test_a_class_claimed_for_one_word_is_found_out(scores):
    row = scores[1].row()
    assert row["edit_same_on"] == 0.0
    assert row["edit_same_high"] < 0.5
    assert row["edit_other_off"] == 1.0


def test_a_latent_that_reads_the_token_before_has_its_trigger_there(scores):
    row = scores[2].row()
    assert (row["edit_trigger"], row["edit_same_on"], row["edit_other_off"]) == (1, 1.0, 1.0)
    assert (row["edit_kind"], row["edit_context"]) == ("token in context", 1.0)


def test_a_latent_of_a_token_in_context_is_told_from_a_token(scores):
    row = scores[3].row()
    assert row["edit_kind"] == "token in context"
    assert row["edit_token_high"] < 0.5
    assert row["edit_context"] == 8.0


def test_swaps_are_shown_with_what_became_of_the_activation(scores):
    assert len(scores[0].swaps) == 6
    assert any(text.endswith(": 100%") for text in scores[0].swaps)
    assert any(text.endswith(": 0%") for text in scores[0].swaps)


def test_scores_do_not_depend_on_which_latents_are_tested_together(scores, corpus):
    settings, holds = EditsConfig(max_context=32), LabelsOnTexts(rows_of(LABELS), STRINGS)
    alone = run_edits(firings_of(corpus, 2), corpus, Fires(RULES), holds, settings, seed=0)
    assert alone[2].row() == scores[2].row()


def test_an_unlabelled_latent_has_no_swaps_but_a_context(corpus):
    rows = {0: {"labelled": False, "rule": None}}
    settings = EditsConfig(max_context=32)
    row = run_edits(firings_of(corpus, 0), corpus, Fires(RULES), LabelsOnTexts(rows, STRINGS), settings, seed=0)[
        0
    ].row()
    assert row["edit_kind"] == "token"
    assert (row["edit_trigger"], row["edit_same_on"], row["edit_other_off"]) == (None, None, None)
    assert (row["edit_same_n"], row["edit_other_n"]) == (0, 0)


def test_a_latent_that_needs_the_whole_document_is_counted_as_too_long(corpus):
    def whole(text):
        return 3.0 * (len(text) > 20)

    table = corpus.table
    held = table.rows("heldout")
    fires = table.position[held] >= 20
    firings = choose_firings(0, held[fires], np.full(fires.sum(), 3.0, np.float32), table, 12, seed=0)
    settings = EditsConfig(max_context=4)
    row = run_edits(firings, corpus, Fires([whole]), LabelsOnTexts(rows_of(LABELS), STRINGS), settings, seed=0)[0].row()
    assert (row["edit_documents"], row["edit_too_long"], row["edit_kind"]) == (0, 12, None)


def test_firings_are_strong_and_of_different_documents(corpus):
    table = corpus.table
    held = table.rows("heldout")
    row, value = held[::3], np.linspace(1, 2, len(held[::3])).astype(np.float32)
    chosen = choose_firings(5, row, value, table, 10, seed=1)
    documents = table.document[[firing.row for firing in chosen]]
    assert len(chosen) == len(np.unique(documents)) == 10
    strongest = {d: value[table.document[row] == d].max() for d in documents.tolist()}
    assert all(firing.value == strongest[d] for firing, d in zip(chosen, documents.tolist(), strict=True))
    assert min(firing.value for firing in chosen) > 1.4


def test_shortened_texts_keep_the_end_behind_the_anchor(corpus):
    table = corpus.table
    row = int(np.flatnonzero(table.position == 9)[3])
    piece = table.token[row - 9 : row + 1]
    assert piece_up_to(table, row).tolist() == piece.tolist()
    assert shortened(corpus, row, 2).tolist() == [NEVER, *piece[-3:]]
    assert shortened(corpus, row, 9).tolist() == shortened(corpus, row, 50).tolist() == piece.tolist()


# -- on a real model ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lm(tmp_path_factory):
    return tiny_lm(tmp_path_factory.mktemp("model"))


def test_batched_activations_are_those_of_one_text_at_a_time(lm):
    dictionary = random_dictionary(HOOK, 10)
    rng = np.random.default_rng(0)
    texts = [rng.integers(2, 400, n) for n in (1, 7, 3, 7, 12, 2)]
    latents = np.array([0, 3, 3, 9, 1, 0])
    batched = Rerun(lm, dictionary, batch_tokens=16).last(texts, latents)
    for text, latent, value in zip(texts, latents, batched, strict=True):
        with torch.no_grad():
            x = lm.model(input_ids=torch.from_numpy(text)[None], output_hidden_states=True).hidden_states[1][0, -1]
        assert value == pytest.approx(float(dictionary.encode(x)[latent]), abs=1e-4)
    assert (batched > 0).any()
    norm = float(x.norm())
    assert Rerun(lm, dictionary, max_norm=norm / 2).last([texts[-1]], latents[-1:]) == 0.0


def test_a_direction_of_a_tokens_embedding_is_measured_as_a_token_latent(lm, corpus):
    """At the embedding the stream is the token: planted truth through the real forward pass."""
    dictionary = random_dictionary("model.embed_tokens", 4)
    table = corpus.table
    word, other = 20, 21
    with torch.no_grad():
        embeddings = lm.model.get_input_embeddings().weight
        apart = embeddings[word] - embeddings[:VOCAB].mean(0)
        dictionary.sae.W_enc[:, 0] = apart / apart.norm()
    rerun = Rerun(lm, dictionary)
    held = table.rows("heldout")
    rows = held[table.token[held] == word]
    value = rerun.last([piece_up_to(table, row) for row in rows.tolist()], np.zeros(len(rows), np.int64))
    assert (value > 0).all()
    firings = choose_firings(0, rows, value, table, 12, seed=0)
    labels = LabelsOnTexts(rows_of({0: ("token", [STRINGS[word], STRINGS[other]])}), STRINGS)
    row = run_edits(firings, corpus, rerun, labels, EditsConfig(max_context=16), seed=0)[0].row()
    assert (row["edit_kind"], row["edit_token_share"]) == ("token", 1.0)
    assert row["edit_other_off"] >= 0.9
    assert row["edit_same_on"] == 0.0  # the direction is one word's, whatever the label says


def test_texts_for_amplifying_are_starts_of_heldout_documents(corpus):
    table = corpus.table
    texts = heldout_texts(table, 5, 12, np.random.default_rng(0))
    assert texts.shape == (5, 12)
    starts = [r for r in range(table.n_train, table.n_tokens - 12) if table.position[r] == 0]
    assert all(any((table.token[r : r + 12] == text).all() for r in starts) for text in texts)
    with pytest.raises(ValueError, match="no held-out document has as many"):
        heldout_texts(table, 5, 65, np.random.default_rng(0))
