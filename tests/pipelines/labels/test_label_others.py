"""Labels in words against planted latents: what is right passes, what is wrong does not, and the counting is exact."""

import re

import numpy as np
import pytest
from label_corpus import fire_on, spell, to_firings, zipf_table

from pipelines.labels.judging import Verdicts, score_columns
from pipelines.labels.lexical import LexicalJudge, content_words
from pipelines.labels.llm.questions import Passage
from pipelines.labels.llm.settings import EndpointConfig, LLMConfig
from pipelines.labels.llm.tasks import Reader, choose_latents, make_tasks
from pipelines.labels.llm.worker import shared_out
from pipelines.labels.rows import LABELS, preferred, read_rows, replace_rows, row
from pipelines.labels.testset import SplitIndex, window_bounds
from pipelines.labels.trials import Sizes, draw_trials, of_latent

VOCAB, N, SEED = 2000, 24, 0
STRINGS = [f" {text.strip()}" for text in spell(VOCAB)]
"""Whole words: a word that goes on in the next token is another one."""
SIZES = Sizes(positives=60, negatives=60, fuzzed=30, others=10, neighbours=3, windows_per_other=5)


@pytest.fixture(scope="module")
def table():
    return zipf_table(np.random.default_rng(3), n_contexts=300)


@pytest.fixture(scope="module")
def planted(table):
    """Latents that each fire on every occurrence of one word."""
    rng = np.random.default_rng(4)
    whole = list(range(40, 40 + N))
    columns = [fire_on(rng, table.token == token, table, recall=1.0, noise=0) for token in whole]
    held = np.zeros(table.n_tokens, bool)
    held[table.rows("heldout")] = True
    firings = to_firings(*zip(*columns, strict=True))
    index = SplitIndex(table)
    neighbours = (np.arange(N)[:, None] + np.arange(1, 4)[None]) % N
    return whole, firings.where(held[firings.row]), index, neighbours


@pytest.fixture(scope="module")
def trials(planted):
    _, firings, index, neighbours = planted
    return draw_trials(firings, np.arange(N), index, neighbours, SIZES, seed=SEED)


def judged(table, trials, labels, index):
    judge = LexicalJudge(table, STRINGS, index.rows, 16)
    verdicts = Verdicts(
        np.arange(N),
        judge.windows(labels, trials.detect.latent, trials.detect.centre),
        judge.tokens(labels, trials.fuzz.latent, trials.fuzz.row),
        {i: judge.windows(labels, np.full(len(trials.others[i].centre), i), trials.others[i].centre) for i in range(N)},
    )
    density = np.full(N, 0.001)
    return score_columns(trials, verdicts, density, min_detection=0.6)


def test_right_words_pass_and_wrong_ones_do_not(table, planted, trials):
    words, _, index, _ = planted
    right = [f"the word '{STRINGS[token].strip()}'" for token in words]
    scores = judged(table, trials, right, index)
    for found in scores.values():
        assert found["tpr"] == 1
        # The word may stand at a token that takes no part, where the latent is not known to fire.
        assert min(found["detection_random"], found["detection_same_document"]) > 0.95
        assert found["fuzz"] == 1
        assert found["mismatch_rank"] == 1
        assert found["passed"]
    dealt = judged(table, trials, [*right[5:], *right[:5]], index)
    assert not any(found["passed"] for found in dealt.values())
    assert np.mean([found["detection_random"] for found in dealt.values()]) == pytest.approx(0.5, abs=0.05)
    assert np.mean([found["fuzz"] for found in dealt.values()]) == pytest.approx(0.5, abs=0.02)


def test_broad_label_fits_others_as_well_and_does_not_pass(table, planted, trials):
    words, _, index, _ = planted
    everything = " ".join(sorted({STRINGS[token].strip() for token in words}))
    scores = judged(table, trials, [everything] * N, index)
    assert all(found["tpr"] == 1 for found in scores.values())
    assert all(found["mismatch_rank"] == found["n_mismatch"] + 1 for found in scores.values())
    assert not any(found["passed"] for found in scores.values())


def test_label_without_content_words_has_no_answer_and_counts_as_wrong(table, planted, trials):
    _, _, index, _ = planted
    scores = judged(table, trials, ["tokens of the text"] * N, index)
    for found in scores.values():
        assert found["n_failed"] == found["n_positive"] + found["n_negative"]
        assert (found["tpr"], found["detection_random"], found["fuzz"], found["passed"]) == (0, 0, 0, False)


def test_words_are_found_as_a_reader_finds_them(table, planted):
    _, _, index, _ = planted
    judge = LexicalJudge(table, STRINGS, index.rows, 16)
    rng = np.random.default_rng(0)
    centre = rng.choice(index.rows, 200, replace=False)
    first, last = window_bounds(centre, table, 16)
    texts = ["".join(STRINGS[t] for t in table.token[a : b + 1]) for a, b in zip(first, last, strict=True)]
    labels = [re.findall(r"\w+", texts[i])[len(texts[i]) % 5] for i in range(100)]
    which = rng.integers(0, len(labels), 200)
    found = judge.windows(labels, which, centre)
    # A window may begin or end inside a word, where a reader of the window alone sees a piece of it.
    whole = ["".join(STRINGS[t] for t in table.token[a - 8 : b + 9]) for a, b in zip(first, last, strict=True)]
    for i in range(200):
        word = labels[which[i]].casefold()
        if word in re.findall(r"\w+", texts[i].casefold())[1:-1]:
            assert found[i] == 1
        if word not in whole[i].casefold():
            assert found[i] == 0


@pytest.mark.parametrize(
    ("label", "words"),
    [
        ("references to Rivers and streams", {"river", "stream"}),
        ("the word 'the'", set()),
        ("tokens related to the company's profits", {"company", "profit"}),
        ("שלום and 🎈 emoji", {"שלום", "emoji"}),
        ("Paris; glass", {"pari", "glass"}),
    ],
)
def test_content_words(label, words):
    assert content_words(label) == words


def test_trials_of_a_latent_do_not_depend_on_its_company(planted, trials):
    _, firings, index, neighbours = planted
    alone = draw_trials(firings, np.array([7]), index, neighbours, SIZES, seed=SEED)
    for exam, of_all in ((alone.detect, trials.detect), (alone.fuzz, trials.fuzz)):
        span = of_latent(of_all, 7)
        for column, whole in zip(exam, of_all, strict=True):
            assert np.array_equal(column, whole[span])
    for column, whole in zip(alone.others[7], trials.others[7], strict=True):
        assert np.array_equal(column, whole)


def test_others_are_other_latents_and_fire_in_the_middle(planted, trials):
    _, firings, _, neighbours = planted
    for latent, others in trials.others.items():
        assert latent not in others.which
        assert set(others.which[others.neighbour].tolist()) == set(neighbours[latent].tolist())
        assert len(set(others.which[~others.neighbour].tolist())) == SIZES.others
        for which, centre in zip(others.which, others.centre, strict=True):
            assert centre in firings.row[firings.indptr[which] : firings.indptr[which + 1]]


def test_tasks_hold_the_windows_and_mark_the_tokens_that_are_asked_about(table, planted, trials):
    words, _, _, _ = planted
    (task,) = make_tasks({5: "x"}, trials, Reader(table, STRINGS, 16), {}, {})
    word = STRINGS[words[5]]
    asked, fuzzed = of_latent(trials.detect, 5), of_latent(trials.fuzz, 5)
    positive = trials.detect.kind[asked] == 0
    assert [word in passage.tokens for passage in task.detect] == positive.tolist()
    right = trials.fuzz.kind[fuzzed] == 0
    marked = [passage.tokens[passage.marked[0]] == word for passage in task.fuzz]
    assert marked == right.tolist()
    assert all(len(passage.marked) == 1 and word in passage.tokens for passage in task.fuzz)
    assert 0.3 < np.mean(right) < 0.7


def test_right_and_wrong_marks_of_a_window_are_never_in_one_question():
    passages = [Passage((f"w{i}", "a", "b"), (mark,)) for i in range(10) for mark in (1, 2)]
    groups = shared_out(passages, 8, "seed")
    assert sorted(i for group in groups for i in group) == list(range(20))
    for group in groups:
        assert len(group) <= 8
        assert len({passages[i].tokens for i in group}) == len(group)
    assert shared_out(passages, 8, "seed") == groups != shared_out(passages, 8, "other")


def test_latents_are_chosen_among_those_that_fire():
    endpoint = EndpointConfig(base_url="http://x/v1", model="m")
    live = np.arange(0, 100, 2)
    few = choose_latents(LLMConfig(explainer=endpoint, latents=10), live, 100, 0)
    assert len(set(few)) == 10
    assert set(few) <= set(live.tolist())
    assert few == sorted(few)
    assert choose_latents(LLMConfig(explainer=endpoint, latents="all"), live, 100, 0) == live.tolist()
    assert choose_latents(LLMConfig(explainer=endpoint, latents=(7, 3)), live, 100, 0) == [3, 7]
    with pytest.raises(ValueError, match="lists 100, but the dictionary has latents 0 to 99"):
        choose_latents(LLMConfig(explainer=endpoint, latents=(100,)), live, 100, 0)


# ---- the table -------------------------------------------------------------------------------------------------------


def test_rows_of_others_stay_when_ours_are_written(tmp_path):
    theirs = row(3, "human:Ada", "months", "tested", passed=True, author="Ada", date="2026-05-31")
    replace_rows(tmp_path, [theirs, row(3, "predicate", "a", "tested", passed=True)], lambda _: True)
    replace_rows(tmp_path, [row(1, "predicate", "b", "tested", passed=True)], lambda source: source == "predicate")
    rows = read_rows(tmp_path)
    assert [(r["latent"], r["source"]) for r in rows] == [(1, "predicate"), (3, "human:Ada")]
    assert rows[1] == {**dict.fromkeys(LABELS.names), **theirs}
    with pytest.raises(KeyError, match="no column extra"):
        row(1, "x", None, "failed", extra=1)


def test_preferred_is_the_first_that_passed():
    rows = [
        row(0, "predicate", "rule", "tested", passed=True),
        row(0, "human:Bob", "bob", "tested", passed=True),
        row(0, "human:Ada", "ada", "tested", passed=True),
        row(1, "predicate", "rule", "tested", passed=True),
        row(1, "human:Ada", "ada", "tested", passed=False),
        row(2, "predicate", "rule", "tested", passed=False),
        row(2, "llm:m:8b", "llm", "tested", passed=True),
    ]

    def shown(*prefer):
        return {latent: chosen["label"] for latent, chosen in preferred(rows, prefer).items()}

    assert shown("predicate") == {0: "rule", 1: "rule"}
    assert shown("human", "predicate") == {0: "ada", 1: "rule"}
    assert shown("human:Bob", "human", "llm") == {0: "bob", 2: "llm"}
    assert shown("llm:m:8b", "predicate") == {0: "rule", 1: "rule", 2: "llm"}
