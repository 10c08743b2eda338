import numpy as np
import pytest
from proving_corpus import holds, make_corpus
from proving_ground import SMALL, grade, plant, prove
from proving_rules import EXPRESSIBLE, OUTSIDE


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return prove(SMALL, tmp_path_factory.mktemp("proving"))


def test_a_quarter_of_the_rules_is_outside_of_the_grammar():
    rules = EXPRESSIBLE + OUTSIDE
    assert len(OUTSIDE) >= len(rules) / 4
    assert len({rule.name for rule in rules}) == len(rules)


def test_rules_hold_where_a_naive_reading_says():
    corpus = make_corpus(4096)
    table, rules = corpus.table, {rule.name: rule for rule in EXPRESSIBLE + OUTSIDE}
    words = [corpus.strings[token] for token in table.token]
    pairs, bracket, first_5 = set(), corpus.strings[corpus.vocabulary.ids["brackets"][0]], 0
    piece = "".join
    masks = {name: holds(rule, corpus) for name, rule in rules.items()}
    for row in range(table.n_tokens):
        if table.position[row] == 0:
            pairs, first_5 = set(), row
        before = words[row - 1] if row > first_5 else None
        assert masks["words that begin with over"][row] == words[row].startswith(" over")
        assert masks["words that end in ly"][row] == words[row].endswith("ly")
        assert masks["numbers"][row] == words[row].strip().isdigit()
        assert masks["after a bracket opens"][row] == (before == bracket)
        assert masks["a pair seen before"][row] == (before is not None and piece((before, words[row])) in pairs)
        assert masks["after oclock"][row] == (before == " oclock")
        if before is not None:
            pairs.add(piece((before, words[row])))


def test_confounds_of_the_corpus_are_perfect():
    corpus = make_corpus(20_000)
    token, ids = corpus.table.token, corpus.vocabulary.ids
    for leader, led in (("doctors", "surnames"), ("clocks", "chimes")):
        leads = np.flatnonzero(np.isin(token, ids[leader]))
        assert len(leads) > 50
        assert np.array_equal(leads + 1, np.flatnonzero(np.isin(token, ids[led])))


def test_labels_of_a_trained_sae_recover_planted_rules_or_abstain(small):
    _, _, _, graded = small
    print(graded.table())
    assert min(graded.found.values()) > 0.9
    assert graded.precision >= 0.95
    assert graded.recall >= 0.7
    assert all(graded.abstained.values())


def test_labels_dealt_to_wrong_latents_are_graded_wrong(small):
    planted, dictionary, rows, _ = small
    graded = grade(planted, dictionary, [*rows[1:], rows[0]])
    assert graded.precision < 0.2
    assert graded.recall < 0.2


def test_same_seed_plants_the_same_activations():
    assert plant(SMALL, seed=3).x.equal(plant(SMALL, seed=3).x)
    assert not plant(SMALL, seed=3).x.equal(plant(SMALL, seed=4).x)
