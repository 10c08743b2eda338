import json

import numpy as np
import pytest
import torch
from label_corpus import spell, zipf_table

from pipelines.labels.families import DOCUMENT_START, REPEATS, build_families
from pipelines.labels.rules import Atom, Clause, Views

VOCAB = 400
STRINGS = spell(VOCAB)


@pytest.fixture(scope="module")
def table():
    return zipf_table(np.random.default_rng(0), n_contexts=60, vocab=VOCAB)


@pytest.fixture(scope="module")
def views(table):
    return Views(table, STRINGS, W_U=torch.randn(16, VOCAB, generator=torch.Generator().manual_seed(0)))


def family(views, name):
    return views.names.index(name)


def naive_holds(views, atom, row):
    code = int(views.families[atom.family].code[row])
    return (code in atom.codes) != atom.negated


def test_a_rule_scores_as_its_first_clause_that_holds(views, table):
    token, previous = family(views, "token"), family(views, "previous")
    rule = (
        Clause((Atom(token, (3, 5)), Atom(previous, (0, 1), negated=True)), 0.9),
        Clause((Atom(token, (3, 7)),), 0.7),
    )
    rows = np.arange(0, table.n_tokens, 3)
    expected = [next((c.score for c in rule if all(naive_holds(views, a, row) for a in c.atoms)), 0.0) for row in rows]
    assert np.allclose(views.score(rule, rows), expected)
    assert set(np.unique(np.float32(expected)).tolist()) == {0.0, np.float32(0.9).item(), np.float32(0.7).item()}


def test_a_rule_comes_back_from_its_json_on_other_views(views, table):
    rows = np.arange(table.n_tokens)
    without_meaning = Views(table, STRINGS)
    for name in views.names:
        rule = (Clause((Atom(family(views, name), (0, 1), negated=name == "shape"),), 0.8),)
        read = without_meaning.of_data(json.loads(json.dumps(views.data(rule))))
        assert np.array_equal(without_meaning.score(read, rows), views.score(rule, rows)), name


def test_a_category_that_a_text_has_not_holds_nowhere(views):
    data = {"any": [{"all": [{"view": "token", "in": ["no such token"]}], "score": 1.0}]}
    unknown = {"any": [{"all": [{"view": "no such view", "not_in": ["x"]}], "score": 1.0}]}
    rows = np.arange(500)
    assert not views.score(views.of_data(data), rows).any()
    assert not views.score(views.of_data(unknown), rows).any()


def test_english_names_the_token_first_and_what_it_leaves_out(views):
    token, previous = family(views, "token"), family(views, "previous")
    names = views.families[token].names
    rule = (Clause((Atom(previous, (2,), negated=True), Atom(token, (4,))), 0.9), Clause((Atom(token, (9,)),), 0.6))
    said = f"{names[4]!r} but not the token after {names[2]!r}; or {names[9]!r}"
    assert views.english(rule) == said
    assert views.english(()) == ""


def test_repeats_are_those_of_the_document_piece(table):
    families = {f.name: f for f in build_families(table, STRINGS)}
    code, own = families["repeated"].code, families["token"].code
    seen, pairs = set(), set()
    for row in range(2000):
        if table.position[row] == 0 or row % table.context_length == 0:
            seen, pairs, before = set(), set(), None
        pair = (before, own[row])
        expected = 2 if before is not None and pair in pairs else 1 if own[row] in seen else 0
        assert REPEATS[code[row]] == REPEATS[expected]
        seen.add(own[row])
        pairs.add(pair)
        before = own[row]


def test_pairs_and_earlier_tokens_stop_at_the_start_of_a_piece(table):
    families = {f.name: f for f in build_families(table, STRINGS)}
    starts = np.flatnonzero((table.position == 0) | (np.arange(table.n_tokens) % table.context_length == 0))
    earlier, forms = families["earlier"], families["token"].names
    for row in [*starts.tolist(), *(starts[:-1] + 1).tolist()]:
        assert earlier.names[earlier.code[row]] == DOCUMENT_START
    inside = starts[0] + 2
    assert earlier.names[earlier.code[inside]] == forms[families["token"].code[inside - 2]]
    pair = families["pair"]
    spelled = forms[families["token"].code[inside - 1]] + forms[families["token"].code[inside]]
    assert pair.names[int(pair.code[inside])] == spelled


def test_meanings_group_forms_with_like_directions(table):
    direction = torch.eye(16).repeat_interleave(25, 1)  # 16 groups of 25 ids
    W_U = direction + 0.01 * torch.randn(16, VOCAB, generator=torch.Generator().manual_seed(1))
    views = Views(table, STRINGS, W_U=W_U)
    for name in ("meaning1024", "meaning256"):
        group = views.families[family(views, name)].code
        # Clusters may split a group of ids, but never join two.
        for cluster in np.unique(group):
            assert len(np.unique(table.token[group == cluster] // 25)) == 1
