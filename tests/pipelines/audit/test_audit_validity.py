"""Error rates, coverage and power over a thousand simulated audits, and what is planted to mislead is stamped.

Small versions run always; `--runslow` adds those whose size the promises are made for.
"""

import dataclasses

import numpy as np
import pytest
from shipped_design import TRUTHS, audits, coverage, promised, shipped_texts
from simulations import WORLDS, draw, false_discovery_proportions, holds

from pipelines.audit.concepts import concept_from_dict, examples_of
from pipelines.audit.ledger import Ledger
from pipelines.audit.preflight import prepare
from pipelines.audit.settings import AuditSettings
from pipelines.audit.stage import audit_concept
from pipelines.audit.statistics import associate, benjamini_hochberg
from pipelines.audit.views import View

PLANTED = [0.75, 0.8, 0.85, 0.9, 0.95]


@pytest.mark.slow
@pytest.mark.parametrize("world", WORLDS)
def test_the_mean_false_discovery_proportion_stays_at_q(world):
    proportions = false_discovery_proportions(WORLDS[world], 1000, seed=1)
    assert holds(proportions), f"{proportions.mean():.4f}"


def test_a_hundred_searches_in_two_worlds_are_no_worse_than_chance_allows():
    for name in ("global null", "zero-inflated, 5 % planted, groups of one to eight"):
        proportions = false_discovery_proportions(WORLDS[name], 100, seed=2, n_permutations=200)
        assert holds(proportions), f"{name}: {proportions.mean():.3f}"


def test_the_check_of_false_discoveries_can_fail():
    """The control: groups that are taken for independent texts break the rate, and `holds` says so."""
    rng, out = np.random.default_rng(3), []
    world = dataclasses.replace(WORLDS["groups of four"], correlated=False, n_texts=48)
    for seed in range(60):
        scores, labels, _, _ = draw(rng, world)
        found = associate(scores, labels, np.arange(labels.size), n_permutations=200, seed=seed)
        out.append(float((benjamini_hochberg(found.p_pooled[found.tested]) <= 0.05).any()))
    assert not holds(np.array(out))


def test_the_shipped_design_confirms_on_26_positives_and_50_negatives():
    texts = shipped_texts()
    assert texts.groups_of(texts.split.confirm) == (26, 50)


@pytest.mark.parametrize("truth", TRUTHS)
def test_intervals_of_the_shipped_design_cover_93_of_100(truth):
    assert coverage(truth, 2000) >= 0.93


@pytest.mark.slow
def test_intervals_of_candidates_cover_93_of_100_although_the_search_chose_them():
    found = audits(150, PLANTED, seed=4)
    assert found.covered.size >= 1000
    assert found.covered.mean() >= 0.93


@pytest.mark.slow
def test_a_confirmation_is_false_in_5_of_100_audits_at_most():
    found = audits(500, [], seed=5)
    assert holds(found.false.astype(float)), f"{found.false.mean():.3f}"


@pytest.mark.slow
@pytest.mark.parametrize("step", ["associated", "detects"])
def test_what_is_planted_is_found_nine_times_of_ten_at_the_effect_that_the_power_table_promises(step):
    effect = promised().smallest(step)
    assert effect is not None
    found = getattr(audits(500, [effect], seed=6), step)
    assert found.mean() >= 0.9, f"{found.mean():.3f} at {effect}"
    less = getattr(audits(100, [effect - 0.12], seed=7), step)
    assert less.mean() < 0.9, "the promise says nothing if far weaker effects are found as often"


# -- planted confounds -------------------------------------------------------------------------------------------------


def concept_with(seed: int, confound: str):
    """160 texts of the same words; the positives with a marker in nine of ten, or twice as long, or no different."""
    rng = np.random.default_rng(seed)
    texts = [" ".join(rng.choice([f"w{k}" for k in range(60)], 20)) + f" id{i}" for i in range(160)]
    if confound == "words":
        texts[:80] = [t if rng.random() > 0.9 else f"marker{i % 3} {t}" for i, t in enumerate(texts[:80])]
    if confound == "length":
        texts[:80] = [" ".join([t, *rng.choice([f"w{k}" for k in range(60)], 20)]) for t in texts[:80]]
    return concept_from_dict({"name": "planted", "positives": texts[:80], "hard_negatives": texts[80:]})


def stamps(concept) -> str:
    return "\n".join(prepare(examples_of(concept), seed=0).preflight.stamps)


@pytest.mark.parametrize("seed", range(5))
def test_planted_confounds_are_stamped_before_anything_is_computed_and_clean_texts_are_not(seed):
    assert "CONFOUNDED by words" in stamps(concept_with(seed, "words"))
    assert "CONFOUNDED by length" in stamps(concept_with(seed, "length"))
    assert stamps(concept_with(seed, "nothing")) == ""


@pytest.mark.slow
@pytest.mark.parametrize("confound", ["words", "length", "nothing"])
def test_planted_confounds_are_stamped_in_the_verdict_and_cap_the_claim(confound, tmp_path):
    """A latent that sees the positives, with an AUROC of about 0.9, where words or length see them as well."""
    stamped = []
    for seed in range(20):
        rng = np.random.default_rng(seed)
        scores = np.maximum(rng.normal(size=(160, 100)) - rng.uniform(-1, 1, 100), 0).astype(np.float32)
        scores[:80, 3] += 2
        result = audit_concept(
            concept := concept_with(seed, confound),
            examples_of(concept),
            [View(identity={}, scores=scores)],
            tmp_path / str(seed),
            settings=AuditSettings(n_permutations=100, n_confirm_permutations=999, n_simulated=50, max_candidates=5),
            ledger=Ledger(tmp_path / f"{seed}.jsonl"),
        )
        stamped.append(result.verdict.confounded)
        if result.verdict.confounded:
            assert result.verdict.level in ("associated", "nothing_found")
    assert sum(stamped) == (0 if confound == "nothing" else 20)
