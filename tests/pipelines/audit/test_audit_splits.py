"""Splits keep groups whole and classes in every part, and depend on seed and names alone."""

from dataclasses import replace

import pytest

from pipelines.audit.examples import Example
from pipelines.audit.splits import split_by_group


def some(n=60, per_group=1):
    return [
        Example(text=f"text {i}", role="positive" if i < n // 2 else "hard_negative", group=f"g{i // per_group}")
        for i in range(n)
    ]


@pytest.mark.parametrize("per_group", [1, 3])
def test_split_keeps_groups_whole_covers_all_and_balances_classes(per_group):
    examples = some(per_group=per_group)
    split = split_by_group(examples, seed=0)
    assert sorted(row for rows in split for row in rows) == list(range(60))
    groups = [{examples[i].group for i in rows} for rows in split[:3]]
    assert not groups[0] & groups[1]
    assert not groups[0] & groups[2]
    assert not groups[1] & groups[2]
    assert abs(sum(examples[i].positive for i in split.discover) - 15) <= per_group - 1
    assert split.ood.size == 0


def test_shares_are_a_half_a_fifth_and_three_tenths_of_each_class():
    examples = some(160)
    split = split_by_group(examples, seed=0)
    assert [sum(examples[i].positive for i in rows) for rows in split[:3]] == [40, 16, 24]
    assert [rows.size for rows in split] == [80, 32, 48, 0]


def test_split_depends_on_the_seed_and_not_on_the_order():
    examples = some()

    def confirm(some_examples, seed):
        return {some_examples[i].group for i in split_by_group(some_examples, seed=seed).confirm}

    assert confirm(examples, 1) == confirm(examples, 1) == confirm(examples[::-1], 1) != confirm(examples, 2)


def test_a_new_text_moves_few_others():
    before = split_by_group(some(), seed=0)
    after = split_by_group([*some(), Example(text="new", role="positive", group="new")], seed=0)
    assert len(set(before.confirm) & set(after.confirm)) >= len(before.confirm) - 1


def test_out_of_distribution_examples_are_a_part_of_their_own():
    examples = [*some(), replace(some()[0], text="far", group="g0", ood=True)]
    split = split_by_group(examples, seed=0)
    assert split.ood.tolist() == [60]
    assert split.part_of()[60] == "ood"
    assert [split.part_of()[i] for i in split.tune] == ["tune"] * split.tune.size


def test_split_refuses_a_part_without_both_classes_and_shares_that_leave_none():
    examples = [Example(text="p", role="positive", group="only"), *some()[30:]]
    with pytest.raises(ValueError, match=r"each part needs both classes; discover has.*Add independent groups"):
        split_by_group(examples, seed=0)
    for discover, tune in ((1.5, 0.2), (0.5, 0.5), (0.5, 0.0)):
        with pytest.raises(ValueError, match=rf"leave something to confirm; got {discover} and {tune}\. Use 0.5"):
            split_by_group(some(), seed=0, discover_fraction=discover, tune_fraction=tune)
