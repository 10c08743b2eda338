"""Claims and the verdict: what 'detects' needs, how often it is wrong, and which latent is named."""

from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from pipelines.audit.concepts import concept_from_dict, examples_of
from pipelines.audit.confirm import confirm
from pipelines.audit.discover import choose, search
from pipelines.audit.figures import best_candidate
from pipelines.audit.intervals import auroc_interval
from pipelines.audit.result import AuditResult
from pipelines.audit.settings import AuditSettings
from pipelines.audit.splits import split_by_group
from pipelines.audit.stage import audit_concept
from pipelines.audit.verdict import claim_of
from pipelines.audit.views import Texts, View

N = 266  # texts: 40 positives and 40 negatives to confirm
SETTINGS = AuditSettings(n_permutations=100, n_confirm_permutations=499, n_simulated=50, max_candidates=10)
TEXTS = [f"text {i:03}" for i in range(N)]  # words and length tell nothing
CONCEPT = concept_from_dict({"name": "demo", "positives": TEXTS[: N // 2], "hard_negatives": TEXTS[N // 2 :]})
EXAMPLES = examples_of(CONCEPT)
POSITIVE = np.array([e.positive for e in EXAMPLES])
SPLIT = split_by_group(EXAMPLES, seed=0, discover_fraction=0.5)
PARTS = Texts.of(EXAMPLES, SPLIT)


def latents(rng: np.random.Generator, truth: float, n_latents: int) -> np.ndarray:
    """Independent latents with this true AUROC, firing on every text."""
    shift = np.sqrt(2) * stats.norm.ppf(truth) * POSITIVE[:, None]
    return (rng.normal(size=(N, n_latents)) + shift + 10).astype(np.float32)


def audited(tmp_path, scores: np.ndarray, **changes) -> AuditResult:
    settings = replace(SETTINGS, **changes)
    return audit_concept(CONCEPT, EXAMPLES, [View(identity={}, scores=scores)], tmp_path / "audit", settings=settings)


def share_of_detects(bound: str, n_repeats: int) -> float:
    """Share of audits with any 'detects' when ten latents have a true AUROC of exactly `detects_above`."""
    rng = np.random.default_rng(0)
    wrong = 0
    for seed in range(n_repeats):
        scores = latents(rng, SETTINGS.detects_above, 10)
        views = [View(identity={}, scores=scores)]
        found = search(views, PARTS, n_permutations=100, min_texts=4, seed=seed)
        choices = choose(found, views, CONCEPT, max_candidates=10, max_proposed=0)
        taken = confirm(
            choices,
            np.zeros(len(choices)),
            found,
            views,
            PARTS,
            CONCEPT,
            n_permutations=499,
            alpha=SETTINGS.alpha,
            detects_above=SETTINGS.detects_above,
            seed=seed,
        )
        assert len(taken) >= 8  # nearly all of them go on
        claims = [
            claim_of(
                candidate.model_copy(update={"low_familywise": getattr(candidate, bound)}),
                null_upper=0.0,
                confounded=False,
                reused=0,
                alpha=SETTINGS.alpha,
                detects_above=SETTINGS.detects_above,
            )
            for candidate in taken
        ]
        wrong += "detects" in claims
    return wrong / n_repeats


def holds(share: float, n: int) -> bool:
    return share <= SETTINGS.alpha + 2 * np.sqrt(SETTINGS.alpha * (1 - SETTINGS.alpha) / n)


@pytest.mark.parametrize("n", [60, pytest.param(400, marks=pytest.mark.slow)])
def test_detects_is_false_in_5_of_100_audits_at_most_when_ten_latents_only_reach_the_bar(n):
    assert holds(share_of_detects("low_familywise", n), n)


@pytest.mark.slow
def test_a_bound_for_one_latent_at_a_time_breaks_that_error_rate():
    """The control of the test above: it has the power to fail."""
    assert not holds(share_of_detects("low", 100), 100)


def test_detects_is_still_reached_by_a_latent_well_above_the_bar(tmp_path):
    scores = latents(np.random.default_rng(1), 0.5, 200)
    scores[:, 7] = latents(np.random.default_rng(2), 0.95, 1)[:, 0]
    result = audited(tmp_path, scores)
    assert (result.verdict.level, result.verdict.latent) == ("detects", 7)


def test_bounds_are_one_sided_at_levels_that_granted_claims_pass_on(tmp_path):
    result = audited(tmp_path, latents(np.random.default_rng(3), 0.8, 30), max_candidates=4)
    c, passed_on = SPLIT.confirm, 0.0
    for k, candidate in enumerate(result.candidates):
        level = passed_on + (0.025 if k == 0 else 0.025 / 3)
        assert candidate.level == pytest.approx(level, abs=1e-6)
        interval = auroc_interval(np.array(candidate.scores)[c, None], POSITIVE[c], c, level=1 - 2 * level)
        assert candidate.low_familywise == pytest.approx(interval.low[0], abs=1e-5)
        passed_on = level if candidate.low_familywise > SETTINGS.detects_above else 0.0
    assert result.candidates[0].low_familywise == pytest.approx(result.candidates[0].low, abs=1e-6)


def test_the_latent_with_the_best_discover_z_is_named_not_the_one_with_the_best_confirm_auroc(tmp_path):
    result = audited(tmp_path, latents(np.random.default_rng(4), 0.9, 30))
    assert result.verdict.level == "detects"
    top = [c for c in result.candidates if c.claim == "detects"]
    named = max(top, key=lambda c: c.discover_z)
    assert named.auroc < max(c.auroc for c in top)  # the two rules differ here
    assert result.verdict.latent == named.latent == best_candidate(result).latent
    assert (result.verdict.auroc, result.verdict.low, result.verdict.high) == (named.auroc, named.low, named.high)
    assert f"AUROC {named.auroc:.2f} ({named.low:.2f}–{named.high:.2f})" in result.verdict.sentence
    assert any("so an AUROC close to the bar leans upward" in limit for limit in result.limits)


def test_the_highest_rung_comes_before_the_discover_z(tmp_path):
    scores = latents(np.random.default_rng(5), 0.5, 30)
    scores[:, 3] = latents(np.random.default_rng(6), 0.97, 1)[:, 0]
    scores[:, 4] = latents(np.random.default_rng(7), 0.97, 1)[:, 0]
    d = SPLIT.discover
    scores[d, 4] += 9 * POSITIVE[d]  # first on the discover half ...
    c = SPLIT.confirm
    scores[c, 4] = latents(np.random.default_rng(8), 0.65, 1)[c, 0]  # ... and weaker on the confirm half
    result = audited(tmp_path, scores)
    claims = {x.latent: x.claim for x in result.candidates}
    assert result.candidates[0].latent == 4
    assert (claims[3], claims[4]) == ("detects", "associated")
    assert result.verdict.latent == 3


def test_when_nothing_is_confirmed_the_first_candidate_is_drawn(tmp_path):
    result = audited(tmp_path, latents(np.random.default_rng(10), 0.5, 30))
    assert (result.verdict.level, result.verdict.latent, result.verdict.auroc) == ("nothing_found", None, None)
    assert best_candidate(result) == result.candidates[0]
