"""Splits keep groups whole and classes in both halves; manifests show every change."""

import pytest

from pipelines.audit.concepts import Example
from pipelines.audit.splits import digest, manifest, split_by_group


def some(n=60, per_group=1):
    return [
        Example(text=f"text {i}", role="positive" if i < n // 2 else "hard_negative", group=f"g{i // per_group}")
        for i in range(n)
    ]


@pytest.mark.parametrize("per_group", [1, 3])
def test_split_keeps_groups_whole_covers_all_and_balances_classes(per_group):
    examples = some(per_group=per_group)
    discover, confirm = split_by_group(examples, seed=0)
    assert sorted([*discover, *confirm]) == list(range(60))
    assert not {examples[i].group for i in discover} & {examples[i].group for i in confirm}
    assert sum(examples[i].positive for i in discover) == 15
    assert discover.size == 30


def test_split_depends_on_the_seed_alone():
    one, same, other = (split_by_group(some(), seed=seed).discover.tolist() for seed in (1, 1, 2))
    assert one == same != other


def test_split_refuses_a_half_without_both_classes():
    examples = [Example(text="p", role="positive", group="only"), *some()[30:]]
    with pytest.raises(ValueError, match=r"each part needs both classes.*Add independent groups"):
        split_by_group(examples, seed=0)
    with pytest.raises(ValueError, match=r"discover_fraction must lie between 0 and 1; got 1.5"):
        split_by_group(some(), seed=0, discover_fraction=1.5)


def test_manifest_digest_shows_a_changed_text_label_split_or_setting():
    examples, settings = some(), {"max_candidates": 20}
    split = split_by_group(examples, seed=0)
    plan = manifest(examples, split, concept="c", dictionary={"name": "main"}, settings=settings)
    assert plan["sha256"] == digest(plan)
    changed = [
        manifest([Example(text="new", role="positive", group="g0"), *examples[1:]], split, concept="c",
                 dictionary={"name": "main"}, settings=settings),
        manifest([Example(text="text 0", role="negative", group="g0"), *examples[1:]], split, concept="c",
                 dictionary={"name": "main"}, settings=settings),
        manifest(examples, split_by_group(examples, seed=3), concept="c",
                 dictionary={"name": "main"}, settings=settings),
        manifest(examples, split, concept="c", dictionary={"name": "other"}, settings=settings),
        manifest(examples, split, concept="c", dictionary={"name": "main"}, settings={"max_candidates": 21}),
    ]  # fmt: skip
    assert len({plan["sha256"], *(p["sha256"] for p in changed)}) == 6
