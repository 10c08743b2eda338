"""Preflight: near duplicates stay together, what explains the labels is stamped, hopeless designs are refused."""

from dataclasses import replace

import numpy as np
import pytest

from pipelines.audit.examples import Example, join_near_duplicates
from pipelines.audit.preflight import prepare, require_possible
from pipelines.errors import UsageError

VOCABULARY = [f"w{k}" for k in range(60)]
LONG = "one two three four five six seven eight nine"


def texts(n: int, seed: int, length: int = 20) -> list[str]:
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(VOCABULARY, size=length)) for _ in range(n)]


def labelled(positives: list[str], hard_negatives: list[str]) -> list[Example]:
    return [Example(text=t, role="positive", group=f"p{i}") for i, t in enumerate(positives)] + [
        Example(text=t, role="hard_negative", group=f"n{i}") for i, t in enumerate(hard_negatives)
    ]


GOOD = labelled(texts(80, 0), texts(80, 1))


def test_near_duplicates_share_a_group_and_so_a_part_transitively():
    examples = labelled([LONG, f"{LONG} ten eleven twelve", "a word"], ["five six seven eight nine ten eleven twelve!"])
    joined = join_near_duplicates(examples)
    assert [e.group for e in joined.examples] == ["n0", "n0", "p2", "n0"]
    assert joined.n_joined == 3
    many = [*GOOD, *(replace(e, group=f"copy{e.group}", text=f"{e.text} again") for e in GOOD[:40])]
    design = prepare(many, seed=0)
    part = design.split.part_of()
    assert all(part[i] == part[160 + i] for i in range(40))
    assert design.preflight.n_joined == 80


def test_texts_that_share_seven_words_stay_apart():
    joined = join_near_duplicates(labelled(["a b c d e f g h1", "a b c d e f g h2"], ["x"]))
    assert joined.n_joined == 0
    assert len({e.group for e in joined.examples}) == 3


def test_repeats_count_once_and_contradictions_not_at_all():
    examples = labelled(["Same text!", "same, TEXT", "both", "own"], ["both.", "other"])
    joined = join_near_duplicates(examples)
    assert [e.text for e in joined.examples] == ["Same text!", "own", "other"]
    assert joined.kept == [0, 3, 5]
    assert (joined.n_repeated, joined.n_contradictory) == (1, 2)
    design = prepare([*GOOD, GOOD[0], replace(GOOD[1], role="negative")], seed=0)
    assert len(design.examples) == 159
    assert design.preflight.notes[-2:] == [
        "1 repeated text(s) count once",
        "2 text(s) that stand there with both labels are left out",
    ]


def test_out_of_distribution_texts_that_were_seen_are_left_out():
    ood = [Example(text=f"{GOOD[0].text} and more", role="positive", group="o", ood=True)]
    ood += [Example(text=t, role="positive", group=f"o{i}", ood=True) for i, t in enumerate(texts(5, 7))]
    design = prepare([*GOOD, *ood], seed=0)
    assert design.preflight.n_ood_seen == 1
    assert design.preflight.parts["ood"].positive == 5
    assert "1 out-of-distribution text(s) resemble the others and are left out" in design.preflight.notes


def test_a_good_design_has_no_stamp_and_says_what_it_would_see():
    preflight = prepare(GOOD, seed=0, n_latents=4608).preflight
    assert preflight.stamps == preflight.refusals == []
    assert [(p.positive, p.hard_negative) for p in preflight.parts.values()] == [(40, 40), (16, 16), (24, 24), (0, 0)]
    assert 0.3 < preflight.words_auroc < 0.7
    (row,) = preflight.power
    assert row.n_latents == 4608
    assert row.minimum_detectable_auroc == pytest.approx(0.799, abs=0.01)
    assert 75 <= row.groups_for_080 <= 85
    require_possible(preflight)


def test_without_a_dictionary_the_power_table_has_several_widths():
    rows = prepare(GOOD, seed=0).preflight.power
    assert [row.n_latents for row in rows] == [1024, 4096, 16_384, 65_536]
    smallest = [row.minimum_detectable_auroc for row in rows]
    assert smallest == sorted(smallest)


def test_words_that_explain_the_labels_are_stamped_except_for_topics():
    marked = labelled([f"{t} marker" for t in texts(80, 0, 19)], texts(80, 1))
    (stamp,) = prepare(marked, seed=0).preflight.stamps
    assert stamp.startswith("CONFOUNDED by words: a bag of words reaches an AUROC of ")
    assert "write negatives with the same words" in stamp
    assert prepare(marked, seed=0, by_vocabulary=True).preflight.stamps == []


def test_lengths_that_explain_the_labels_are_stamped():
    for positive, negative in ((30, 15), (15, 30)):
        stamp = prepare(labelled(texts(80, 0, positive), texts(80, 1, negative)), seed=0).preflight.stamps[-1]
        assert stamp.startswith("CONFOUNDED by length: the number of words alone reaches 1.00")
        assert f"(medians {positive} and {negative})" in stamp


def test_words_are_cross_validated_over_whole_groups():
    """Copies in another fold would give every label away."""
    base = labelled(texts(20, 0), texts(20, 1))
    copies = [replace(e, text=f"{e.text} {k}") for e in base for k in "abcd"]
    assert prepare(copies, seed=0).preflight.words_auroc < 0.75


def test_unequal_classes_and_missing_hard_negatives_are_noted():
    easy = [replace(e, role="negative") for e in GOOD[80:]]
    notes = prepare([*GOOD[:15], *easy], seed=0).preflight.notes
    assert notes[:2] == [
        "15 positives stand against 80 negatives: the smaller class decides the power",
        "there are no hard negatives: a latent for the subject passes as one for the concept",
    ]
    assert "hard negatives" not in " ".join(prepare(GOOD, seed=0).preflight.notes)


def test_a_design_that_can_detect_nothing_is_refused_with_what_is_needed():
    few = prepare(labelled(texts(30, 0), texts(30, 1)), seed=0, n_latents=65_536).preflight
    with pytest.raises(UsageError, match=r"30 groups of positives and 30 of negatives can detect nothing.*among 65536"):
        require_possible(few)
    needed = int(few.refusals[0].partition("Write ")[2].split()[0])
    assert 31 <= needed <= 45
    enough = prepare(labelled(texts(needed, 0), texts(needed, 1)), seed=0, n_latents=65_536).preflight
    require_possible(enough)


def test_one_template_is_one_group_and_is_refused_with_the_reason():
    filled = [f"{LONG} {word}" for word in range(160)]
    with pytest.raises(UsageError, match=r"needs both classes.*160 texts share 8 consecutive words.*word them"):
        prepare(labelled(filled[:80], filled[80:]), seed=0)
