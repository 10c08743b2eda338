import numpy as np
import pytest
from label_corpus import fire_on, spell, to_firings, zipf_table
from pipelines.labels.predicates import Predicates, concatenate, describe, firing_weights, fit_predicates

from pipelines.labels.contexts import order_by_strength
from pipelines.labels.families import FAMILY_NAMES, Family, build_families

VOCAB = 2000


@pytest.fixture(scope="module")
def corpus():
    table = zipf_table(np.random.default_rng(0))
    return table, build_families(table, spell(VOCAB))


def fit(firings, corpus, **options):
    table, families = corpus
    train = firings.where(np.isin(firings.row, table.rows("train")))
    weight, _ = firing_weights(train, order_by_strength(train))
    return fit_predicates(train, weight, families, table.rows("train"), table.document, **options)


def planted(corpus, holds, seed=0, **options):
    return fit(to_firings(*zip(fire_on(np.random.default_rng(seed), holds, corpus[0], **options), strict=True)), corpus)


def rule(predicates, families, latent=0):
    family = families[predicates.family[latent]]
    codes = predicates.code[predicates.indptr[latent] : predicates.indptr[latent + 1]]
    return family.name, {family.names[code] for code in codes}


def entropy_bits(n, mass):
    p = mass / n
    return 0.0 if p in (0, 1) else -n * (p * np.log2(p) + (1 - p) * np.log2(1 - p))


def test_weight_saturates_where_half_of_the_activation_lies_above():
    firings = to_firings([np.arange(4), [], [5]], [[1.0, 2.0, 3.0, 4.0], [], [7.0]])
    weight, scale = firing_weights(firings, order_by_strength(firings))
    assert scale.tolist() == [3.0, 0.0, 7.0]  # 4 + 3 reaches half of 10
    assert weight.tolist() == pytest.approx([1 / 3, 2 / 3, 1, 1, 1])


def test_saved_bits_agree_with_a_hand_computation():
    # 64 tokens, 4 categories of 16; the latent fires on all of category 2 and nowhere else, in 4 documents.
    code = np.tile(np.arange(4, dtype=np.int32), 16)
    document = np.repeat(np.arange(4, dtype=np.int32), 16)
    rows = np.flatnonzero(code == 2)
    firings = to_firings([rows], [np.ones(16)])
    found = fit_predicates(
        firings, np.ones(16), [Family("token", code, list("abcd"))], np.arange(64), document, min_documents=3
    )
    expected = entropy_bits(64, 16) - np.log2(4) - np.log2(4) - 0.5 * np.log2(64)
    assert found.bits[0] == pytest.approx(expected, rel=1e-6)
    assert found.explained[0] == pytest.approx(expected / entropy_bits(64, 16), rel=1e-6)
    assert found.code.tolist() == [2]
    assert found.rate.tolist() == [1.0]


def test_fit_recovers_a_planted_token_set(corpus):
    table, families = corpus
    names = {families[0].names[families[0].code[np.flatnonzero(table.token == t)[0]]] for t in (40, 55, 71)}
    found = planted(corpus, np.isin(table.token, (40, 55, 71)))
    assert rule(found, families) == ("token", names)


def test_fit_recovers_a_planted_previous_token(corpus):
    table, families = corpus
    holds = np.zeros(table.n_tokens, bool)
    holds[1:] = (table.token[:-1] == 41) & (table.position[1:] > 0)
    family, names = rule(planted(corpus, holds), families)
    assert family == "previous"
    assert len(names) == 1


@pytest.mark.parametrize("name", ["shape", "position"])
def test_fit_recovers_a_planted_broad_class(corpus, name):
    _, families = corpus
    family = families[FAMILY_NAMES.index(name)]
    code = 2 if name == "position" else 0
    found = planted(corpus, family.code == code)
    assert rule(found, families) == (name, {family.names[code]})


def test_fit_prefers_the_word_over_its_last_piece(corpus):
    _, families = corpus
    word = families[FAMILY_NAMES.index("word")]
    joined = word.code >= len(families[0].names)
    # a two-piece word that is common, while its last piece also ends other words
    code = np.bincount(word.code[joined]).argmax()
    found = planted(corpus, word.code == code)
    assert rule(found, families) == ("word", {word.names[code]})


def test_fit_abstains_on_random_firings(corpus):
    table, _ = corpus
    rng = np.random.default_rng(3)
    counts = rng.integers(5, 4000, 200)
    rows = [rng.choice(table.n_tokens, n, replace=False) for n in counts]
    found = fit(to_firings(rows, [rng.gamma(1, 1, n) + 0.01 for n in counts]), corpus)
    assert not found.found.any()
    assert (found.bits == 0).all()


def test_fit_abstains_on_latents_that_never_or_always_fire(corpus):
    table, families = corpus
    found = fit(to_firings([[], np.arange(table.n_tokens)], [[], np.ones(table.n_tokens)]), corpus)
    assert not found.found.any()
    assert describe(found, 0, families) == ""


def test_fit_ignores_what_happens_in_one_document_only(corpus):
    table, _ = corpus
    in_one = np.isin(table.document, np.unique(table.document)[:2])
    found = planted(corpus, in_one & (table.token < 8), recall=1.0, noise=0.0)
    assert not found.found.any()
    found = planted(corpus, table.token == 8, recall=1.0, noise=0.0)
    assert found.found.all()


def test_fit_names_at_most_max_categories(corpus):
    table, _ = corpus
    holds = np.isin(table.token, np.arange(30, 70))
    firings = to_firings(*zip(fire_on(np.random.default_rng(0), holds, table), strict=True))
    found = fit(firings, corpus, max_categories=5)
    assert 1 <= len(found.code) <= 5


def test_fit_weighs_strong_firings_more_than_the_noise_floor(corpus):
    table, families = corpus
    # five times as many weak firings on token 2 as strong ones on token 60
    strong, weak = np.flatnonzero(table.token == 60), np.flatnonzero(table.token == 2)[:1500]
    value = np.concatenate([np.full(len(strong), 10.0), np.full(len(weak), 0.02)])
    found = fit(to_firings([np.concatenate([strong, weak])], [value]), corpus)
    assert rule(found, families) == ("token", {families[0].names[families[0].code[strong[0]]]})


def test_fit_of_a_block_equals_fits_of_its_parts(corpus):
    table, _ = corpus
    rng = np.random.default_rng(5)
    columns = [fire_on(rng, np.isin(table.token, rng.integers(20, 300, 3)), table) for _ in range(8)]
    together = fit(to_firings(*zip(*columns, strict=True)), corpus)
    apart = concatenate([fit(to_firings(*zip(*columns[i : i + 3], strict=True)), corpus) for i in (0, 3, 6)])
    assert together.found.sum() >= 7
    for field in Predicates._fields:
        np.testing.assert_allclose(getattr(together, field), getattr(apart, field), rtol=1e-6)


def test_take_reorders_rules_and_leaves_gaps_for_minus_one(corpus):
    table, _ = corpus
    rng = np.random.default_rng(5)
    columns = [fire_on(rng, np.isin(table.token, (20 + i, 40 + i)), table) for i in range(3)]
    found = fit(to_firings(*zip(*columns, strict=True)), corpus)
    taken = found.take(np.array([2, -1, 0]))
    assert taken.family.tolist() == [found.family[2], -1, found.family[0]]
    assert np.diff(taken.indptr).tolist() == [2, 0, 2]
    assert taken.code.tolist() == [*found.code[4:6].tolist(), *found.code[:2].tolist()]


def predicates_of(family, codes, mass):
    n = len(codes)
    return Predicates(
        np.array([family], np.int8),
        np.ones(1, np.float32),
        np.ones(1, np.float32),
        np.array([0, n]),
        np.array(codes, np.int32),
        np.ones(n, np.float32),
        np.array(mass, np.float32),
    )


def test_describe_reads_as_english_with_the_largest_first():
    names = [" of", " battalion", " Regiment", "a", "b", "c", "d", "e"]
    code = np.zeros(1, np.int32)
    families = [Family(f, code, names) for f in ("token", "word", "previous", "shape", "position")]
    assert describe(predicates_of(0, [1, 2], [1, 5]), 0, families) == "' Regiment', ' battalion'"
    assert describe(predicates_of(2, [0], [1]), 0, families) == "the token after ' of'"
    assert describe(predicates_of(4, [3], [1]), 0, families) == "position a of a document"
    long = describe(predicates_of(1, list(range(8)), list(range(8, 0, -1))), 0, families)
    assert long == "' of', ' battalion', ' Regiment', 'a', 'b', 'c' and 2 more"
